//! What is measured: Shunt in one of its modes, or the real kube-proxy, against a fake API server in the
//! node's namespace.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use shunt_harness::apiserver::ApiServer;
use shunt_harness::lab::ChildGuard;
use tokio::sync::oneshot;

use crate::bed::Bed;
use crate::cluster::{Cluster, NODE, POD_RANGE, Shape};
use crate::subject::PATIENCE;

/// The fake API server, on a thread of its own in the node's namespace.
pub(crate) struct Api {
    server: Arc<ApiServer>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    /// How large the cluster is.
    shape: Shape,
}

impl Api {
    /// Starts a server that has this cluster's objects.
    pub(crate) fn start(bed: &Bed, cluster: &Cluster) -> Result<Self> {
        let (sender, receiver) = channel();
        let (stop, stopped) = oneshot::channel();
        let thread = bed.node().thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let server = Arc::new(ApiServer::start().await?);
                // Whoever asked may have given up.
                let _ = sender.send(server);
                let _ = stopped.await;
                Ok(())
            })
        })?;
        let server: Arc<ApiServer> = receiver.recv().context("the fake API server did not start")?;
        server.put_all(cluster.objects.iter().cloned());
        Ok(Self { server, stop: Some(stop), thread: Some(thread), shape: cluster.shape })
    }

    /// The server.
    pub(crate) fn server(&self) -> &ApiServer {
        &self.server
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It has nothing to say at its end.
            let _ = thread.join();
        }
    }
}

/// As many endpoints, and as many Services, fit into ebpf mode's maps of their default size.
const EBPF_ENDPOINTS: usize = 120_000;
const EBPF_SERVICES: usize = 30_000;

/// A program that programs the kernel.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Program {
    /// The release build of Shunt, in a mode.
    Shunt {
        /// The program.
        binary: PathBuf,
        /// `--mode`; `iptables-legacy` and `iptables-nft` are iptables mode in that flavour.
        mode: String,
    },
    /// Upstream's kube-proxy, in a mode.
    KubeProxy {
        /// The program.
        binary: PathBuf,
        /// `--proxy-mode`.
        mode: String,
    },
}

impl Program {
    /// Name in reports.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Shunt { mode, .. } => format!("shunt {mode}"),
            Self::KubeProxy { mode, .. } => format!("kube-proxy {mode}"),
        }
    }

    /// The mode.
    pub(crate) fn mode(&self) -> &str {
        match self {
            Self::Shunt { mode, .. } | Self::KubeProxy { mode, .. } => mode,
        }
    }

    /// Whether it works on clients' sockets, in a cgroup, instead of on packets.
    pub(crate) fn works_on_sockets(&self) -> bool {
        self.mode() == "ebpf"
    }

    /// Whether a cluster of this size is measured. iptables' own tools need time that grows with the square of
    /// the number of chains in the nft flavour: 7 s at 10,000 x 10, a minute at 5,000 x 50, more at 30,000.
    pub(crate) fn can_take(&self, services: usize, endpoints: usize) -> bool {
        self.mode() != "iptables-nft" || services <= 10_000 && endpoints <= 10
    }

    fn command(&self, kubeconfig: &Path, bed: &Bed, shape: Shape) -> Command {
        let folder = bed.folder();
        let (binary, mode) = match self {
            Self::Shunt { binary, mode } | Self::KubeProxy { binary, mode } => (binary, mode),
        };
        let mut command = Command::new(binary);
        match self {
            Self::Shunt { .. } => {
                command.args(["run", "--logging-format", "json", "--mode"]);
                match mode.split_once('-') {
                    Some((mode, flavour)) => command.args([mode, "--iptables-flavour", flavour]),
                    None => command.arg(mode),
                };
                command.arg("--admin-socket").arg(folder.join("shunt.sock"));
                if let (Some(cgroup), Some(bpf)) = (bed.cgroup(), bed.bpf()) {
                    command.arg("--cgroup-root").arg(cgroup).arg("--bpf-fs-root").arg(bpf);
                }
                // Half of the room is for the other family; a change wants room for a few more.
                let room = |number: usize| (2 * number).next_power_of_two().to_string();
                if self.works_on_sockets() && shape.services * shape.endpoints > EBPF_ENDPOINTS {
                    command.arg("--ebpf-endpoints-max").arg(room(shape.services * shape.endpoints));
                }
                if self.works_on_sockets() && shape.services > EBPF_SERVICES {
                    command.arg("--ebpf-frontends-max").arg(room(shape.services));
                }
            }
            Self::KubeProxy { .. } => {
                command.args(["--v", "2", "--proxy-mode", mode]);
                // Limits of conntrack belong to the machine.
                command.args(["--conntrack-max-per-core", "0", "--conntrack-min", "0"]);
            }
        }
        command.args(["--hostname-override", NODE, "--cluster-cidr", POD_RANGE, "--kubeconfig"]);
        command.arg(kubeconfig);
        // Tools take a lock of their own: the machine's is everybody's.
        command.env("XTABLES_LOCKFILE", folder.join("xtables.lock"));
        command
    }
}

/// A running program.
pub(crate) struct Agent {
    child: ChildGuard,
    /// When it was started.
    pub started: Instant,
}

fn refused(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ConnectionRefused
}

/// What Shunt says of its first sync, one family.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct FirstSync {
    /// Reading the kernel, ms.
    pub read_ms: f64,
    /// Computing what to do, ms.
    pub plan_ms: f64,
    /// Writing, ms.
    pub write_ms: f64,
    /// Operations written.
    pub operations: u64,
    /// Transactions of them.
    pub transactions: u64,
}

impl Agent {
    /// Starts a program in the node's namespace.
    pub(crate) fn start(bed: &Bed, api: &Api, program: &Program) -> Result<Self> {
        let kubeconfig = bed.folder().join("kubeconfig");
        std::fs::write(&kubeconfig, api.server().kubeconfig())?;
        let command = program.command(&kubeconfig, bed, api.shape);
        let started = Instant::now();
        Ok(Self { child: bed.node().spawn(&command)?, started })
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until connections to all of these come up; the time since the start of the process.
    pub(crate) fn wait_until_served(
        &mut self,
        bed: &Bed,
        targets: &[SocketAddrV4],
        patience: Duration,
    ) -> Result<Duration> {
        let started = self.started;
        let child = &mut self.child;
        bed.as_pod(|| {
            let mut left: BTreeSet<SocketAddrV4> = targets.iter().copied().collect();
            loop {
                // The first that does not answer ends the round: nothing is gained by asking all.
                while let Some(target) = left.first().copied() {
                    if TcpStream::connect_timeout(&target.into(), Duration::from_millis(2)).is_err() {
                        break;
                    }
                    left.remove(&target);
                }
                let elapsed = started.elapsed();
                if left.is_empty() {
                    return Ok(elapsed);
                }
                ensure!(child.try_wait()?.is_none(), "it ended: {child}");
                ensure!(
                    elapsed < patience,
                    "{} of {} not served after {patience:?}: {child}",
                    left.len(),
                    targets.len()
                );
                std::thread::sleep(Duration::from_micros(500));
            }
        })
    }

    /// Waits until packets to all of these UDP Services reach pods, which have nobody on that port and say so.
    pub(crate) fn wait_until_forwarded(&mut self, bed: &Bed, targets: &[SocketAddrV4]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let child = &mut self.child;
        bed.as_pod(|| {
            for target in targets {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect(target)?;
                socket.set_read_timeout(Some(Duration::from_millis(20)))?;
                // Errors that came before the answer are those of a Service that is not there yet.
                while !socket.send(&[0]).and_then(|_| socket.recv(&mut [0])).as_ref().is_err_and(refused) {
                    ensure!(child.try_wait()?.is_none(), "it ended: {child}");
                    ensure!(Instant::now() < deadline, "{target} not served: {child}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Ok(())
        })
    }

    /// What Shunt has said of full syncs so far, both families.
    fn full_syncs(&self) -> Vec<Value> {
        let log = self.child.stderr();
        log.lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|line| line["fields"].clone())
            .filter(|fields| fields["message"] == "in sync with the kernel")
            .collect()
    }

    /// How often Shunt has read the whole kernel state.
    pub(crate) fn full_reads(&self) -> usize {
        self.full_syncs().len()
    }

    /// Waits for what Shunt logs of its first syncs; IPv4's.
    pub(crate) fn first_sync(&mut self, patience: Duration) -> Result<FirstSync> {
        let deadline = Instant::now() + patience;
        loop {
            if let [first, _, ..] = self.full_syncs().as_slice() {
                let number = |field: &str| first[field].as_f64().unwrap_or_default();
                let count = |field: &str| first[field].as_u64().unwrap_or_default();
                return Ok(FirstSync {
                    read_ms: number("observing"),
                    plan_ms: number("planning"),
                    write_ms: number("applying"),
                    operations: count("operations"),
                    transactions: count("transactions"),
                });
            }
            ensure!(self.child.try_wait()?.is_none(), "it ended: {}", self.child);
            ensure!(Instant::now() < deadline, "never in sync: {}", self.child);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends it in good order: what it programmed stays.
    pub(crate) fn stop(mut self) -> Result<()> {
        let status = self.child.stop()?;
        ensure!(status.success(), "it ended with {status}: {}", self.child);
        Ok(())
    }

    /// User and system time that it and its ended children have used.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id()))?;
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
        // utime, stime, cutime, cstime are fields 14 to 17; the first two are before the bracket.
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(4).filter_map(|f| f.parse::<u64>().ok()).sum();
        let second =
            nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.ok_or_else(|| anyhow!("CLK_TCK"))?;
        Ok(Duration::from_secs_f64(ticks as f64 / second as f64))
    }
}
