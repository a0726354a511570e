//! One network namespace, held open by a descriptor, and the ways to run something inside it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};

use super::echo::EchoServer;
use super::lock;

/// A network namespace without a name in the file system; the kernel removes it when the last clone of this handle,
/// the last thread and the last child process inside are gone.
///
/// A thread belongs to a namespace, not the process: everything here runs on threads which entered the namespace and
/// end afterwards, so the caller's thread never changes its own.
#[derive(Clone, Debug)]
pub struct Namespace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    handle: File,
    pods: Arc<Mutex<BTreeMap<IpAddr, String>>>,
    echo: Mutex<Option<EchoServer>>,
    cgroup: Mutex<Option<PathBuf>>,
}

impl Namespace {
    /// Creates a namespace and runs `setup` inside, on the thread that created it.
    pub(super) fn create(name: &str, setup: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        let handle = thread::scope(|scope| {
            let thread = thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
                let handle = File::open("/proc/thread-self/ns/net").context("open own namespace")?;
                setup()?;
                Ok::<_, anyhow::Error>(handle)
            })?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
        .with_context(|| format!("create namespace {name}"))?;
        let inner = Inner {
            name: name.to_owned(),
            handle,
            pods: Arc::default(),
            echo: Mutex::default(),
            cgroup: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What the lab calls this namespace: `node`, `client`, or the name given to the pod.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// A path that other programs can open to enter: `nsenter --net=<path> bash`. Valid while this process holds
    /// the namespace.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.inner.handle.as_raw_fd())
    }

    pub(super) fn handle(&self) -> &File {
        &self.inner.handle
    }

    /// Runs a closure on a thread inside the namespace and waits for it; a panic continues in the caller.
    ///
    /// Sockets made inside stay in the namespace wherever they are used afterwards, and child processes started
    /// inside stay there. `/proc/sys/net` shows the namespace's own sysctls; `/sys/class/net` does not follow.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(self.inner.name.clone()).spawn_scoped(scope, || {
                enter(&self.inner.handle, self.cgroup())?;
                work()
            })?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace. The thread keeps the namespace alive.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        // Its own descriptor, not a clone of `self`: the last owner of `self` joins the server's thread.
        let handle = self.inner.handle.try_clone()?;
        let cgroup = self.cgroup();
        let thread = thread::Builder::new().name(self.inner.name.clone()).spawn(move || {
            enter(&handle, cgroup)?;
            drop(handle);
            work()
        })?;
        Ok(thread)
    }

    /// A command which enters the namespace by itself (through `nsenter`) and so may be started from any thread.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program);
        command
    }

    /// From now on threads that enter the namespace enter this cgroup too, which must be threaded. Their
    /// sockets belong to it.
    pub fn set_cgroup(&self, cgroup: impl Into<PathBuf>) {
        *lock(&self.inner.cgroup) = Some(cgroup.into());
    }

    /// The cgroup of threads that enter the namespace, if they have one of their own.
    pub fn cgroup(&self) -> Option<PathBuf> {
        lock(&self.inner.cgroup).clone()
    }

    /// Runs a program inside to its end, feeding it `input`; fails with its error output when it fails.
    pub fn exec<A: AsRef<OsStr>>(
        &self,
        program: &str,
        args: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self
            .run(|| {
                let mut child = command.spawn()?;
                let mut stdin = child.stdin.take().context("stdin is piped")?;
                thread::scope(|scope| {
                    // Written beside reading, so that neither side waits for the other with full pipes. A program
                    // that ends without reading its input has said why in its exit status.
                    scope.spawn(move || drop(stdin.write_all(input.as_bytes())));
                    child.wait_with_output().map_err(Into::into)
                })
            })
            .with_context(|| format!("run {program} in {}", self.inner.name))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("{program} in {}: {}: {}", self.inner.name, output.status, stderr.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies an nftables script (`nft -f -`), or fails with nft's message.
    pub fn nft(&self, script: &str) -> Result<()> {
        self.exec("nft", ["-f", "-"], script).map(drop)
    }

    /// Reads a network sysctl, such as `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str) -> Result<String> {
        self.run(|| {
            let path = format!("/proc/sys/{key}");
            let value = std::fs::read_to_string(&path).with_context(|| path)?;
            Ok(value.trim().to_owned())
        })
    }

    /// Writes a network sysctl, such as `net/ipv4/ip_forward`.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        if !key.starts_with("net/") {
            bail!("sysctl {key} is not part of a network namespace");
        }
        self.run(|| write_sysctl(key, value))
    }

    /// Lets the echo server answer as pod `pod` where it is reached on `address`.
    pub fn name_address(&self, address: IpAddr, pod: &str) {
        lock(&self.inner.pods).insert(address, pod.to_owned());
    }

    pub(super) fn pods(&self) -> Arc<Mutex<BTreeMap<IpAddr, String>>> {
        Arc::clone(&self.inner.pods)
    }

    pub(super) fn with_echo<T>(&self, work: impl FnOnce(&EchoServer) -> Result<T>) -> Result<T> {
        let mut slot = lock(&self.inner.echo);
        if slot.is_none() {
            *slot = Some(EchoServer::start(self)?);
        }
        work(slot.as_ref().ok_or_else(|| anyhow!("echo server of {} is gone", self.inner.name))?)
    }
}

/// Moves the calling thread into a namespace, and into a cgroup if there is one.
fn enter(handle: &File, cgroup: Option<PathBuf>) -> Result<()> {
    setns(handle, CloneFlags::CLONE_NEWNET).context("enter namespace")?;
    let Some(cgroup) = cgroup else { return Ok(()) };
    // 0 is the thread that writes.
    std::fs::write(cgroup.join("cgroup.threads"), "0").with_context(|| format!("enter {}", cgroup.display()))
}

/// Writes a sysctl of the calling thread's namespace.
pub(super) fn write_sysctl(key: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/{key}");
    std::fs::write(&path, value).with_context(|| format!("write {value} to {path}"))
}
