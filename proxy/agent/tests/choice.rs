//! Which mode a node can run: one that it cannot is refused by name, and `auto` takes another and says why.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{ChildGuard, Lab, require_kernel};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
/// Longer than anything takes that works, also on a slow machine.
const LONG: Duration = Duration::from_mins(1);

/// The agent in a mode, over the examples.
fn command(mode: &str) -> Command {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let mut command = Command::new(SHUNT);
    command.args(["run", "--mode", mode, "--hostname-override", "n", "--manifests"]).arg(examples);
    command
}

fn start(lab: &Lab, mode: &str) -> Result<ChildGuard> {
    lab.node().spawn(&command(mode))
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

/// The tools of the nft flavour are the system's, and the kernel has no tables for them. Without a word of the
/// kubelet or a rule that is there only the kernel can tell.
fn without_nf_tables(mode: &str, expected: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    for tool in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let to = Path::new("/usr/sbin").join(format!("{tool}-nft{suffix}"));
            std::os::unix::fs::symlink(to, folder.path().join(format!("{tool}{suffix}")))?;
        }
    }
    let mut path = folder.path().as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let lab = Lab::builder().node(["192.0.2.11".parse()?, "2001:db8::11".parse()?]).build()?;
    let mut agent = lab.node().spawn(command(mode).env("PATH", path))?;
    agent.wait_for(expected, LONG)?;
    agent.wait_for("in sync with the kernel", LONG)?;
    let rules = lab.node().exec("iptables-legacy-save", [""; 0], "")?;
    ensure!(rules.contains(":KUBE-SERVICES"), "{rules}\n{agent}");
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}

mod guest {
    use super::*;

    #[test]
    fn a_flavour_that_the_kernel_lacks_is_not_used() {
        test_in_guest(module_path!(), "a_flavour_that_the_kernel_lacks_is_not_used", || {
            without_nf_tables("iptables", "mode=iptables").unwrap();
            without_nf_tables("auto", "mode chosen: iptables: a trial").unwrap();
        });
    }
}
