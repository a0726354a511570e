//! The load tool: one process pinned to a core, in the namespace it was started in.
//!
//! ```text
//!   shunt-bench load SPEC.json ──> clients print one JSON object and end; servers run until killed
//! ```
//!
//! A process of its own, because core, cgroup and resource usage belong to processes. It knows addresses
//! only, never what serves them.

mod connect;
mod exchange;
mod flood;
mod serve;
mod stream;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

pub(crate) use connect::{ConnectSpec, Latency};
pub(crate) use exchange::{ExchangeSpec, Exchanges};
pub(crate) use flood::{Flood, FloodSpec};
pub(crate) use serve::silent_listener;
pub(crate) use stream::{Stream, StreamSpec};

/// What one process of the load tool does.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Spec {
    /// Core to run on.
    pub cpu: usize,
    /// cgroup (v2) to join before opening sockets.
    pub cgroup: Option<PathBuf>,
    /// What to do.
    pub work: Work,
}

/// Kinds of load and of servers.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Work {
    /// New TCP connections, one after the other: how long each takes.
    Connect(ConnectSpec),
    /// Connect, request, response, close: how many a second.
    Exchange(ExchangeSpec),
    /// UDP packets as fast as possible: processor time of each.
    Flood(FloodSpec),
    /// TCP streams as fast as possible.
    Stream(StreamSpec),
    /// TCP on these ports; see [`serve::serve`].
    Serve(Ports),
}

/// Ports of a server, on all addresses.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// Completes handshakes in the kernel and never wakes anybody.
    pub silent: u16,
    /// Sends back what it receives, and swallows streams.
    pub echo: u16,
}

/// Source addresses of clients. Ports are chosen one after the other, so that no time goes into the
/// kernel's search for a free one.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Sources {
    /// Addresses, used in turns.
    pub addresses: Vec<Ipv4Addr>,
    /// Number of the first connection; later runs begin elsewhere, so that no tuple is used twice soon.
    pub first: u32,
}

/// Lowest source port.
const PORT_FIRST: u32 = 1_024;
/// Number of source ports.
const PORTS: u32 = 64_000;

impl Sources {
    /// Address and port of the connection of this number.
    fn nth(&self, number: u32) -> SocketAddrV4 {
        let number = self.first.wrapping_add(number);
        let count = self.addresses.len().max(1) as u32;
        let address = self.addresses.get((number % count) as usize).copied().unwrap_or(Ipv4Addr::UNSPECIFIED);
        SocketAddrV4::new(address, (PORT_FIRST + number / count % PORTS) as u16)
    }
}

/// Reads a [`Spec`] and does what it says.
pub(crate) fn run(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let spec: Spec = serde_json::from_str(&text)?;
    if let Some(cgroup) = &spec.cgroup {
        let procs = cgroup.join("cgroup.procs");
        std::fs::write(&procs, "0").with_context(|| procs.display().to_string())?;
    }
    let mut cores = CpuSet::new();
    cores.set(spec.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cores).with_context(|| format!("run on core {}", spec.cpu))?;
    let result = match &spec.work {
        Work::Connect(work) => serde_json::to_value(connect::run(work)?)?,
        Work::Exchange(work) => serde_json::to_value(exchange::run(work)?)?,
        Work::Flood(work) => serde_json::to_value(flood::run(work)?)?,
        Work::Stream(work) => serde_json::to_value(stream::run(work)?)?,
        Work::Serve(ports) => return serve::serve(*ports),
    };
    println!("{result}");
    Ok(())
}

/// User and system time of this process so far. What the kernel does for a packet on this core while the
/// process sends it counts as system time.
fn cpu_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(microseconds)?))
}
