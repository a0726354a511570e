//! How the program is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Relocations take 20 KiB of memory at a start, not 700 (DT_RELR: glibc 2.36, binutils 2.38).
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu") {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}
