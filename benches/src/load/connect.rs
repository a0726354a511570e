//! First packets: the time from SYN to SYN/ACK of new connections.
//!
//! Connections are due at fixed times, whether or not earlier ones were slow. Each is timed twice: from its
//! own `connect` (the path alone), and from when it was due (what a client sees that does not wait for
//! others: no coordinated omission). A connection that is not up at once is looked at again between later
//! ones.

use std::io;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use super::Sources;

/// What to connect to.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct ConnectSpec {
    /// Targets; each connection takes one at random.
    pub targets: Vec<SocketAddrV4>,
    /// Where connections come from.
    pub sources: Sources,
    /// Measured connections.
    pub connections: u32,
    /// Most time for them.
    pub limit: Duration,
}

/// How long connections took.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Latency {
    /// Connections that came up.
    pub connections: u64,
    /// Connections that were refused or not up after a second.
    pub failed: u64,
    /// From `connect` to the SYN/ACK.
    pub service: Percentiles,
    /// From when the connection was due to the SYN/ACK.
    pub response: Percentiles,
    /// Connections a second that were asked for.
    pub rate: f64,
}

/// Microseconds.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Percentiles {
    /// Half took no longer.
    pub p50: f64,
    /// 99 % took no longer.
    pub p99: f64,
    /// 99.9 % took no longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// Connections before the measurement: they fill caches and tell the rate. No more than a tenth of all.
const WARM: u32 = 500;
/// The schedule asks for this share of the rate that connections one after the other reach.
const UTILISATION: f64 = 0.5;
/// After so long a connection counts as failed.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection that is not up yet.
struct Pending {
    socket: Socket,
    target: SockAddr,
    due: Instant,
    sent: Instant,
}

struct Measured {
    service: Histogram<u64>,
    response: Histogram<u64>,
    failed: u64,
    pending: Vec<Pending>,
}

pub(super) fn run(spec: &ConnectSpec) -> Result<Latency> {
    ensure!(!spec.targets.is_empty(), "no targets");
    let targets: Vec<SockAddr> = spec.targets.iter().map(|t| SockAddr::from(*t)).collect();
    let mut random = fastrand::Rng::new();
    let mut next = 0;
    let mut begin = |due: Option<Instant>| {
        let target = &targets[random.usize(..targets.len())];
        loop {
            let from = spec.sources.nth(next);
            next += 1;
            if let Some(pending) = begin(from, target, due)? {
                return Ok::<_, anyhow::Error>(pending);
            }
        }
    };

    let mut warm = Measured::new()?;
    let started = Instant::now();
    let warming = WARM.min(spec.connections / 10).max(1);
    for _ in 0..warming {
        warm.add(begin(None)?);
        while !warm.pending.is_empty() {
            warm.look_again();
        }
    }
    ensure!(warm.failed == 0, "{} of {warming} connections failed: {:?}", warm.failed, spec.targets.first());
    let interval = started.elapsed().div_f64(f64::from(warming) * UTILISATION);

    let mut measured = Measured::new()?;
    let start = Instant::now();
    for i in 0..spec.connections {
        let due = start + interval * i;
        if due - start > spec.limit {
            break;
        }
        while Instant::now() < due {
            measured.look_again();
            std::hint::spin_loop();
        }
        measured.add(begin(Some(due))?);
    }
    while !measured.pending.is_empty() {
        measured.look_again();
    }
    Ok(Latency {
        connections: measured.service.len(),
        failed: measured.failed,
        service: Percentiles::of(&measured.service),
        response: Percentiles::of(&measured.response),
        rate: interval.as_secs_f64().recip(),
    })
}

/// Sends a SYN; nothing where somebody else has the port, such as whoever waited for the rules.
fn begin(from: SocketAddrV4, target: &SockAddr, due: Option<Instant>) -> Result<Option<Pending>> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    // Closed by RST: nothing stays in TIME_WAIT.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_reuse_address(true)?;
    match socket.bind(&from.into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(None),
        bound => bound.with_context(|| format!("bind {from}"))?,
    }
    let sent = Instant::now();
    match socket.connect(target) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
            bail!("connect from {from} to {:?}: {error}", target.as_socket())
        }
        _ => Ok(Some(Pending { socket, target: target.clone(), due: due.unwrap_or(sent), sent })),
    }
}

impl Measured {
    fn new() -> Result<Self> {
        // Nanoseconds up to ten seconds, three digits.
        let histogram = Histogram::new_with_bounds(1, 10_000_000_000, 3)?;
        Ok(Self { service: histogram.clone(), response: histogram, failed: 0, pending: Vec::new() })
    }

    fn add(&mut self, pending: Pending) {
        if !self.settle(&pending) {
            self.pending.push(pending);
        }
    }

    fn look_again(&mut self) {
        for pending in std::mem::take(&mut self.pending) {
            self.add(pending);
        }
    }

    /// Whether a connection is up or has failed.
    fn settle(&mut self, pending: &Pending) -> bool {
        let answer = pending.socket.connect(&pending.target);
        let now = Instant::now();
        match answer.as_ref().err().and_then(io::Error::raw_os_error).map(Errno::from_raw) {
            None | Some(Errno::EISCONN) => {
                self.service.saturating_record((now - pending.sent).as_nanos() as u64);
                self.response.saturating_record((now - pending.due).as_nanos() as u64);
                true
            }
            Some(Errno::EALREADY | Errno::EINPROGRESS) if now - pending.sent < PATIENCE => false,
            Some(_) => {
                self.failed += 1;
                true
            }
        }
    }
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |share: f64| histogram.value_at_quantile(share) as f64 / 1e3;
        Self { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: histogram.max() as f64 / 1e3 }
    }
}
