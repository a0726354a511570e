//! Sockets that talk to an endpoint which is gone, because the programs sent them there, are destroyed: whoever waits
//! for an answer learns at once that none will come. Only if that is asked for ([`super::Options::destroy_sockets`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use netlink_requests::Error;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use shunt_ebpf_abi::{Address, Endpoint, Peer, SocketKey, SocketRecord, map};

use super::diag::{Connected, Diag};
use super::maps::{MapError, at, open};
use super::sys::Table;
use crate::op::Op;

/// Endpoints by id, with their generations.
pub(super) type Gone = BTreeMap<u32, u32>;

/// Endpoints that lose their owner.
pub(super) fn gone(ops: &[Op]) -> Gone {
    let freed = ops.iter().flat_map(Op::endpoints).filter(|(_, endpoint)| endpoint.service == 0);
    freed.map(|(id, endpoint)| (id, endpoint.generation)).collect()
}

/// Sockets that the programs sent to endpoints that are gone: protocol and cookie, and the endpoint's address and port.
type Wanted = BTreeMap<(u8, u64), BTreeSet<(Address, u16)>>;

/// What became of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Report {
    destroyed: usize,
    /// Network namespaces that could not be entered.
    closed: usize,
}

/// Destroys the sockets of endpoints that are gone, on a thread of its own: a node may have many namespaces.
pub(super) fn start(folder: PathBuf, own: File, gone: Gone) {
    let work = move || match wanted(&folder, &gone) {
        Ok(wanted) if wanted.is_empty() => {}
        Ok(wanted) => match destroy(&own, &wanted) {
            Ok(Report { destroyed, closed }) if closed > 0 => tracing::warn!(
                destroyed,
                closed,
                "sockets of endpoints that are gone were destroyed, but not those of network namespaces that this process may not enter (CAP_SYS_ADMIN)"
            ),
            Ok(Report { destroyed: 0, .. }) => {}
            Ok(Report { destroyed, .. }) => {
                tracing::info!(destroyed, "sockets of endpoints that are gone were destroyed");
            }
            Err(error) => tracing::warn!("sockets of endpoints that are gone may be left: {error}"),
        },
        Err(error) => tracing::warn!("sockets of endpoints that are gone are left: {error}"),
    };
    if let Err(error) = std::thread::Builder::new().name("sockets".to_owned()).spawn(work) {
        tracing::warn!("sockets of endpoints that are gone are left: {error}");
    }
}

/// What the programs remember: the table of sockets says which were sent where. An address that still is some Service's
/// endpoint is not gone.
fn wanted(folder: &Path, gone: &Gone) -> Result<Wanted, MapError> {
    let mut wanted = Wanted::new();
    let sockets: Table<SocketKey, SocketRecord> = open(folder, map::SOCKETS)?;
    sockets
        .read(|key, record| {
            if key.direction == SocketKey::REVERSE && gone.get(&record.endpoint) == Some(&record.generation) {
                wanted.entry((key.protocol, key.cookie)).or_default().insert((key.address, key.port));
            }
        })
        .map_err(at(map::SOCKETS))?;
    let peers: Table<u32, Peer> = open(folder, map::PEERS)?;
    peers
        .read(|_, peer| {
            if peer.cookie != 0 && gone.get(&peer.id) == Some(&peer.generation) {
                let sent = (peer.endpoint, peer.endpoint_port);
                wanted.entry((peer.protocol, peer.cookie)).or_default().insert(sent);
            }
        })
        .map_err(at(map::PEERS))?;
    if wanted.is_empty() {
        return Ok(wanted);
    }
    let mut lost: BTreeSet<(Address, u16)> = wanted.values().flatten().copied().collect();
    let endpoints: Table<u32, Endpoint> = open(folder, map::ENDPOINTS)?;
    endpoints
        .read_array(|_, endpoint| {
            if endpoint.service != 0 {
                lost.remove(&(endpoint.address, endpoint.port));
            }
        })
        .map_err(at(map::ENDPOINTS))?;
    wanted.retain(|_, peers| {
        peers.retain(|peer| lost.contains(peer));
        !peers.is_empty()
    });
    Ok(wanted)
}

/// Goes through the network namespaces. The calling thread stays in the last one.
fn destroy(own: &File, wanted: &Wanted) -> io::Result<Report> {
    let mut report = Report::default();
    let mut here = identity(&File::open(super::OWN_NAMESPACE)?)?;
    for (there, namespace) in namespaces(own)? {
        if there != here {
            match setns(namespace, CloneFlags::CLONE_NEWNET) {
                Ok(()) => here = there,
                // What else can be wrong is that the file is no namespace.
                Err(error) => {
                    report.closed += usize::from(error == Errno::EPERM);
                    continue;
                }
            }
        }
        report.destroyed += destroy_here(wanted).map_err(io::Error::other)?;
    }
    Ok(report)
}

fn destroy_here(wanted: &Wanted) -> Result<usize, Error> {
    let protocols: BTreeSet<u8> = wanted.keys().map(|(protocol, _)| *protocol).collect();
    let (mut diag, mut destroyed) = (Diag::open()?, 0);
    for protocol in protocols {
        let mut found: Vec<Connected> = Vec::new();
        diag.connected(protocol, |socket| {
            let peers = wanted.get(&(protocol, socket.cookie()));
            if peers.is_some_and(|peers| peers.contains(&(socket.address(), socket.port()))) {
                found.push(socket);
            }
        })?;
        destroyed += diag.destroy(protocol, &found)?;
    }
    Ok(destroyed)
}

fn identity(namespace: &File) -> io::Result<(u64, u64)> {
    let metadata = namespace.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Network namespaces: the node's own, those of processes that can be seen, and those that container runtimes keep
/// in `/run/netns`. What may not be opened is left out.
fn namespaces(own: &File) -> io::Result<Vec<((u64, u64), File)>> {
    let mut found = vec![(identity(own)?, own.try_clone()?)];
    let mut known = BTreeSet::from([identity(own)?]);
    let files =
        |folder: &str| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let of_process = |path: PathBuf| {
        let number = path.file_name()?.to_str()?.parse::<u32>().is_ok();
        number.then(|| path.join("ns/net"))
    };
    for path in files("/proc").filter_map(of_process).chain(files("/run/netns")) {
        let Ok(namespace) = File::open(path) else { continue };
        let id = identity(&namespace)?;
        if known.insert(id) {
            found.push((id, namespace));
        }
    }
    Ok(found)
}
