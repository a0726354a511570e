//! A test bed: client, node and pods in network namespaces, and the load tool in them.
//!
//! ```text
//!   client                      node                         pods
//!   core 0                                                   core 1
//!   10.244.1.10-17  ──veth──  192.0.2.11  ──veth──  all endpoints, ports 8080 and 8081
//!   203.0.113.10-17             rules
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use serde::de::DeserializeOwned;
use shunt_harness::lab::{ChildGuard, Lab, Namespace, place};

use crate::cluster::{ENDPOINT_PORT, NODE_ADDRESS, endpoint_networks};
use crate::load::{Ports, Sources, Spec, Work};

/// Core of clients; the kernel carries their packets there, too.
const CLIENT_CORE: usize = 0;
/// Core of servers.
const SERVER_CORE: usize = 1;
/// Port on which pods echo, beside [`ENDPOINT_PORT`], on which they answer handshakes only.
pub(crate) const ECHO_PORT: u16 = 8081;

/// Where connections come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum From {
    /// A pod of the cluster.
    Pod,
    /// Outside the cluster.
    Outside,
}

impl From {
    /// Addresses of clients: several, so that ports last.
    fn addresses(self) -> Vec<Ipv4Addr> {
        let of = |last: u8| match self {
            Self::Pod => Ipv4Addr::new(10, 244, 1, last),
            Self::Outside => Ipv4Addr::new(203, 0, 113, last),
        };
        (10..18).map(of).collect()
    }

    /// Sources for a run; each run begins with other ports.
    pub(crate) fn sources(self, run: u32) -> Sources {
        Sources { addresses: self.addresses(), first: run.wrapping_mul(41_000) }
    }
}

/// The namespaces, with a server on all endpoints.
pub(crate) struct Bed {
    lab: Lab,
    folder: tempfile::TempDir,
    /// The load tool: this program.
    tool: PathBuf,
    /// What a mode that works on sockets needs.
    place: Option<Place>,
    _server: ChildGuard,
}

/// A cgroup and a folder in a bpffs, both of this bed alone.
struct Place {
    cgroup: PathBuf,
    bpf: PathBuf,
}

impl Bed {
    /// Builds the namespaces; endpoints answer handshakes on 8080 and bytes on 8081, or the other way
    /// round with `echo`. With `sockets` pods get a cgroup, for a mode that works on sockets.
    pub(crate) fn new(echo: bool, sockets: bool) -> Result<Self> {
        let clients = [From::Pod, From::Outside].into_iter().flat_map(From::addresses).map(IpAddr::V4);
        let lab = Lab::builder()
            .node([IpAddr::V4(NODE_ADDRESS)])
            .client(clients)
            .remote("pods", endpoint_networks()?)
            .build()?;
        let folder = tempfile::tempdir()?;
        let tool = std::env::current_exe()?;
        let [silent, echo] = if echo { [ECHO_PORT, ENDPOINT_PORT] } else { [ENDPOINT_PORT, ECHO_PORT] };
        let file = folder.path().join("serve.json");
        let work = Work::Serve(Ports { silent, echo });
        write(&file, &Spec { cpu: core(SERVER_CORE)?, cgroup: None, work })?;
        let mut server = lab.pod("pods")?.spawn(first(&tool).arg("load").arg(&file))?;
        server.wait_for("serving", Duration::from_secs(5))?;
        Ok(Self { lab, folder, tool, place: sockets.then(Place::new).transpose()?, _server: server })
    }

    /// The node's namespace.
    pub(crate) fn node(&self) -> &Namespace {
        self.lab.node()
    }

    /// Runs something as a pod of the node does: in the client's namespace, and in the cgroup if there is one.
    pub(crate) fn as_pod<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let threads = self.cgroup().map(|cgroup| cgroup.join("cgroup.threads"));
        self.lab.client().run(|| {
            if let Some(threads) = threads {
                // 0 is the thread that writes.
                std::fs::write(&threads, "0").with_context(|| threads.display().to_string())?;
            }
            work()
        })
    }

    /// The pods' namespace.
    pub(crate) fn pods(&self) -> Result<&Namespace> {
        self.lab.pod("pods")
    }

    /// A folder for files, gone with the bed.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs the load tool in the client's namespace, on a core of its own and before others there. Clients
    /// outside the cluster are in no pod's cgroup.
    pub(crate) fn load<T: DeserializeOwned>(&self, from: From, work: Work) -> Result<T> {
        let file = self.folder.path().join("load.json");
        let cgroup = self.cgroup().filter(|_| from == From::Pod).map(Path::to_owned);
        write(&file, &Spec { cpu: CLIENT_CORE, cgroup, work })?;
        let tool = self.tool.to_string_lossy();
        let arguments = ["-n", "-20", &*tool, "load", &*file.to_string_lossy()];
        let output = self.lab.client().exec("nice", arguments, "")?;
        serde_json::from_str(&output).with_context(|| format!("the load tool said {output:?}"))
    }

    /// The cgroup of pods.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        self.place.as_ref().map(|place| place.cgroup.as_path())
    }

    /// The folder in the bpffs.
    pub(crate) fn bpf(&self) -> Option<&Path> {
        self.place.as_ref().map(|place| place.bpf.as_path())
    }

    /// Forgets all flows, so that every repetition begins alike.
    pub(crate) fn flush_conntrack(&self) -> Result<()> {
        self.node().run(flush_conntrack)
    }
}

impl Place {
    fn new() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let name = format!("bed-{}", COUNTER.fetch_add(1, Ordering::Relaxed));
        Ok(Self { cgroup: place::cgroup(&name)?, bpf: place::bpffs(&name)? })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What is pinned lives until then: the next bed wants the memory. A cgroup in which somebody still is
        // goes when this process has ended.
        let _ = std::fs::remove_dir_all(&self.bpf);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

/// A core, or the only one there is.
fn core(wanted: usize) -> Result<usize> {
    Ok(wanted.min(std::thread::available_parallelism()?.get() - 1))
}

/// Runs a program before all others on its core.
fn first(program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "-20"]).arg(program);
    command
}

fn write(file: &Path, spec: &Spec) -> Result<()> {
    std::fs::write(file, serde_json::to_vec(spec)?).with_context(|| file.display().to_string())
}

/// Deletes all flows of the calling thread's namespace: `IPCTNL_MSG_CT_DELETE` without a filter.
fn flush_conntrack() -> Result<()> {
    const SUBSYSTEM: u16 = 1;
    const DELETE: u16 = 2;
    const LENGTH: usize = 20;
    let mut message = [0_u8; LENGTH];
    let mut header = NetlinkBuffer::new(&mut message[..]);
    header.set_length(LENGTH as u32);
    header.set_message_type(SUBSYSTEM << 8 | DELETE);
    header.set_flags(NLM_F_REQUEST | NLM_F_ACK);
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.send(&message, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    // struct nlmsgerr follows the header; it begins with the error, negative.
    let error = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes);
    match error {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(-error)).context("flush conntrack"),
    }
}
