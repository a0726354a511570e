//! Which mode a node can run: one that it cannot is refused by name, and `auto` takes another and says why.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use shunt_harness::lab::{ChildGuard, Lab, require_kernel};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
/// Longer than anything takes that works, also on a slow machine.
const LONG: Duration = Duration::from_mins(1);

/// Starts the agent in a mode, over the examples.
fn start(lab: &Lab, mode: &str) -> Result<ChildGuard> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut command = Command::new(SHUNT);
    command.args(["run", "--mode", mode, "--hostname-override", "n", "--manifests"]).arg(examples);
    lab.node().spawn(&command)
}

#[test]
fn a_kernel_without_ipvs_is_named() -> Result<()> {
    // On a kernel that has IPVS the agent would run.
    if !require_kernel() || Path::new("/proc/net/ip_vs").exists() {
        return Ok(());
    }
    let lab = Lab::builder().build()?;
    let mut agent = start(&lab, "ipvs")?;
    let status = agent.wait(LONG)?;
    let said = agent.to_string();
    assert_eq!(status.code(), Some(1), "{said}");
    let expected = "shunt: ipvs mode cannot run here: the kernel has no IPVS (CONFIG_IP_VS, module ip_vs); load the \
        module (modprobe ip_vs), use a kernel that has it, or choose another --mode";
    assert!(said.contains(expected), "{said}");
    Ok(())
}

#[test]
fn auto_takes_a_mode_that_works_and_says_why() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = Lab::builder().node(["192.0.2.11".parse()?, "2001:db8::11".parse()?]).build()?;
    let mut agent = start(&lab, "auto")?;
    agent.wait_for("mode chosen: nftables: a trial in a private network namespace worked", LONG)?;
    agent.wait_for("in sync with the kernel", LONG)?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}
