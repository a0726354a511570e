//! Makes the library that the guest kernel is started with, see `src/guest/xstate.rs`.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    let source = "src/guest/xstate.rs";
    println!("cargo::rerun-if-changed={source}");
    let variable = |name: &str| std::env::var_os(name).ok_or_else(|| format!("cargo did not set {name}"));
    let library = PathBuf::from(variable("OUT_DIR")?).join("xstate.so");
    if std::env::consts::ARCH != "x86_64" {
        // Others have no User-Mode Linux.
        return Ok(std::fs::write(library, "")?);
    }
    let status = Command::new(variable("RUSTC")?)
        .args(["--edition", "2024", "--crate-type", "cdylib", "-O", "-Cpanic=abort", "-Cstrip=symbols", "-o"])
        .arg(library)
        .arg(source)
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("{source}: {status}").into()) }
}
