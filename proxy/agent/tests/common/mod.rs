//! What tests of the binary share.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use shunt_harness::lab::{ChildGuard, Namespace};

/// The binary.
pub(crate) const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
/// Longer than anything takes that works, also on a slow machine.
pub(crate) const LONG: Duration = Duration::from_mins(1);

/// Starts the agent on the node `worker-1`, over the `kubeconfig` in a folder, with its admin socket there; it is in
/// sync for both families when this returns.
pub(crate) fn start(node: &Namespace, folder: &Path, more: &[&str]) -> Result<ChildGuard> {
    let mut command = Command::new(SHUNT);
    command
        .args(["run", "--hostname-override", "worker-1", "--logging-format", "json", "-v", "4"])
        .arg("--kubeconfig")
        .arg(folder.join("kubeconfig"))
        .arg("--admin-socket")
        .arg(folder.join("shunt.sock"))
        .args(more);
    let mut agent = node.spawn(&command)?;
    // A guest has a part of one CPU, and connections keep it busy.
    let patience = if shunt_harness::guest::inside() { 6 * LONG } else { LONG };
    let deadline = Instant::now() + patience;
    while messages(&agent, "in sync with the kernel").len() < 2 {
        ensure!(agent.try_wait()?.is_none(), "ended: {agent}");
        ensure!(Instant::now() < deadline, "never in sync: {agent}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(agent)
}

/// The fields of the log lines with this message, in order.
pub(crate) fn messages(agent: &ChildGuard, message: &str) -> Vec<Value> {
    agent
        .stderr()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|line| line["fields"].clone())
        .filter(|fields| fields["message"] == message)
        .collect()
}
