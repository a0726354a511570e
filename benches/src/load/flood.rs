//! A flood of small UDP packets: the processor time of one packet's way.
//!
//! The kernel carries a packet all the way to the far namespace on the core and in the account of the process
//! that sends it, so that the sender's processor time is that of the whole path.

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use serde::{Deserialize, Serialize};

use super::cpu_time;

/// What to send to.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct FloodSpec {
    /// Targets; flow `i` goes to target `i` modulo their number.
    pub targets: Vec<SocketAddrV4>,
    /// Source address.
    pub source: Ipv4Addr,
    /// Number of flows.
    pub flows: usize,
    /// For how long.
    pub duration: Duration,
}

/// What was sent.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Flood {
    /// Packets.
    pub sent: u64,
    /// Packets a second.
    pub per_second: f64,
    /// Processor time of a packet, nanoseconds, in the tenth of a second in which it was least: others use the same
    /// caches and memory, and the machine's other tenants the same processor.
    pub cpu_ns: f64,
}

/// As many bytes as fill the smallest Ethernet frame.
const PAYLOAD: [u8; 18] = [0; 18];
/// Packets handed to the kernel by one system call.
const BATCH: usize = 32;
/// How long processor time is measured at a time.
const WINDOW: Duration = Duration::from_millis(100);

pub(super) fn run(spec: &FloodSpec) -> Result<Flood> {
    ensure!(!spec.targets.is_empty() && spec.flows > 0, "no targets or no flows");
    let mut sockets = Vec::new();
    for flow in 0..spec.flows {
        let socket = UdpSocket::bind((spec.source, 0))?;
        socket.connect(spec.targets[flow % spec.targets.len()])?;
        // The first packet makes the flow known to conntrack; it is not measured.
        socket.send(&PAYLOAD)?;
        sockets.push(socket);
    }
    std::thread::sleep(Duration::from_millis(50));

    let payloads = [[IoSlice::new(&PAYLOAD)]; BATCH];
    let addresses = [None::<SockaddrIn>; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let none: [ControlMessage<'_>; 0] = [];
    let started = Instant::now();
    let mut window = (started, cpu_time()?, 0);
    let (mut sent, mut least) = (0_u64, f64::INFINITY);
    while started.elapsed() < spec.duration {
        for socket in &sockets {
            let batch =
                sendmmsg(socket.as_raw_fd(), &mut headers, &payloads, addresses, none, MsgFlags::empty());
            match batch {
                Ok(results) => sent += results.count() as u64,
                // Full queues are part of a flood; refusals tell of an earlier packet.
                Err(Errno::ENOBUFS | Errno::ECONNREFUSED | Errno::EAGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (since, before, sent_before) = window;
        if since.elapsed() >= WINDOW && sent > sent_before {
            let now = cpu_time()?;
            least = least.min(now.saturating_sub(before).as_secs_f64() * 1e9 / (sent - sent_before) as f64);
            window = (Instant::now(), now, sent);
        }
    }
    ensure!(least.is_finite(), "nothing could be sent");
    Ok(Flood { sent, per_second: sent as f64 / started.elapsed().as_secs_f64(), cpu_ns: least })
}
