//! ipvs mode on a machine whose kernel has no IPVS: this program runs itself in the guest kernel of the tests.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shunt_harness::guest::{Guest, INSIDE, inside};

use crate::report::Report;

/// The mode that needs it.
pub(crate) const MODE: &str = "ipvs";

/// Most time for the guest.
const PATIENCE: Duration = Duration::from_mins(20);
/// What 30,000 Services with ten endpoints each take: as objects, in the agent, in the kernel.
const MEMORY_MIB: u32 = 4_096;
/// Packets that wait for the kernel's own thread, which the load tool on the only processor holds up.
const BACKLOG: (&str, &str) = ("/proc/sys/net/core/netdev_max_backlog", "100000");

/// Whether this kernel has IPVS.
pub(crate) fn has_ipvs() -> bool {
    Path::new("/proc/net/ip_vs").exists()
}

/// Sets the guest's kernel up. That of the machine is left alone.
pub(crate) fn prepare() -> Result<()> {
    ensure!(inside(), "this is no guest");
    let (path, value) = BACKLOG;
    std::fs::write(path, value).context(path)
}

/// Measures in the guest what this process was asked to measure, ipvs mode only.
pub(crate) fn measure() -> Result<Report> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).arg("--inside").env(INSIDE, "1");
    crate::say(format_args!("{MODE} mode in a guest"));
    let mut output = Vec::new();
    let guest = Guest::new()?.memory(MEMORY_MIB).timeout(PATIENCE);
    let status = guest.pass(&command, &mut output, std::io::stderr())?;
    ensure!(status.success(), "{MODE} in the guest: {status}");
    serde_json::from_slice(&output).context("what the guest has measured")
}
