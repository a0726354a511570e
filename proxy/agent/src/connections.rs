//! Connections by Service, for metrics: the kernel's table of tracked connections is read now and then while somebody reads
//! the metrics, on a thread of its own, and counted by where clients connected to. Which Service that is, the table says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shunt_core::compile::Compiler;
use shunt_core::id::{IpFamily, Protocol, ServicePortName};
use shunt_core::walk::{Packet, frontend_of};
use shunt_node::conntrack::Netlink;
use tokio::sync::mpsc;

/// Time between two readings.
const EVERY: Duration = Duration::from_secs(10);
/// A reading may take this share of the thread's time, however large the table is.
const SHARE: u32 = 20;

/// What there is for one Service port or one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Count {
    /// Connections.
    pub connections: u64,
    /// Bytes that clients sent on them, and that they got.
    pub bytes: [u64; 2],
}

impl Count {
    const fn add(&mut self, other: Self) {
        self.connections += other.connections;
        self.bytes[0] += other.bytes[0];
        self.bytes[1] += other.bytes[1];
    }
}

/// What was counted for a family, by what clients connected to.
#[derive(Debug)]
pub(crate) struct Counts {
    pub family: IpFamily,
    by_destination: BTreeMap<(Protocol, SocketAddr), Count>,
}

impl Counts {
    /// The same by Service port. What is no Service's (any more) is left out.
    pub(crate) fn by_service(&self, compiler: &Compiler) -> BTreeMap<ServicePortName, Count> {
        let table = compiler.table(self.family);
        let mut counts: BTreeMap<ServicePortName, Count> = BTreeMap::new();
        for ((protocol, to), count) in &self.by_destination {
            // Whoever sent it, the frontend is the same.
            let packet = Packet {
                source: to.ip(),
                interface: None,
                destination: to.ip(),
                port: to.port(),
                protocol: *protocol,
            };
            if let Some((port, _)) = frontend_of(table, &packet) {
                counts.entry(port.name.clone()).or_default().add(*count);
            }
        }
        counts
    }
}

/// Starts the thread, in the network namespace of the calling one. It reads the table if `wanted` was set since it did so
/// last, and ends when nobody listens any more.
pub(crate) fn start(wanted: Arc<AtomicBool>, tx: mpsc::Sender<Counts>) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name("connections".to_owned());
    thread.spawn(move || work(&wanted, &tx)).map(drop)
}

fn work(wanted: &AtomicBool, tx: &mpsc::Sender<Counts>) {
    let mut kernel = None;
    loop {
        let started = Instant::now();
        let families = if wanted.swap(false, Ordering::Relaxed) { &IpFamily::ALL[..] } else { &[] };
        for &family in families {
            let read = kernel.take().map_or_else(Netlink::open, Ok).and_then(|mut netlink| {
                let counts = read(&mut netlink, family)?;
                Ok((netlink, counts))
            });
            match read {
                Ok((netlink, counts)) => {
                    // What an error left unread must not be taken for the answer to something else.
                    kernel = Some(netlink);
                    if tx.blocking_send(counts).is_err() {
                        return;
                    }
                }
                Err(error) => tracing::debug!(%family, "connections cannot be counted: {error}"),
            }
        }
        if tx.is_closed() {
            return;
        }
        std::thread::sleep(EVERY.max(started.elapsed() * SHARE));
    }
}

fn read(netlink: &mut Netlink, family: IpFamily) -> Result<Counts, shunt_node::conntrack::ConntrackError> {
    let mut by_destination: BTreeMap<_, Count> = BTreeMap::new();
    netlink.list(family, &mut |flow, bytes| {
        if flow.is_translated() {
            let to = (flow.protocol, flow.original.destination);
            by_destination.entry(to).or_default().add(Count { connections: 1, bytes });
        }
    })?;
    Ok(Counts { family, by_destination })
}
