//! A cgroup of the test's own, and the cookie of a network namespace.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// A cgroup with this process in it; both end with it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    parent: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup below the one that this process is in, and moves the process there.
    pub fn enter() -> Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let root = mounts
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ').skip(1);
                Some((words.next()?, words.next()?))
            })
            .find_map(|(at, kind)| (kind == "cgroup2").then(|| PathBuf::from(at)))
            .context("no cgroup2 is mounted")?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("not in cgroup2")?;
        let parent = root.join(own);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("shunt-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let cgroup = Self { path, parent };
        fs::write(cgroup.path.join("cgroup.procs"), std::process::id().to_string())?;
        Ok(cgroup)
    }

    /// A handle to attach programs to.
    pub fn open(&self) -> Result<File> {
        Ok(File::open(&self.path)?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Nothing can be done about an error here; an empty cgroup is left behind. Threads that are about to
        // end keep it for a moment.
        let _ = fs::write(self.parent.join("cgroup.procs"), std::process::id().to_string());
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            sleep(Duration::from_millis(10));
        }
    }
}

/// The cookie of the calling thread's network namespace.
pub fn netns_cookie() -> Result<u64> {
    /// Not in libc yet for all platforms (`asm-generic/socket.h`).
    const SO_NETNS_COOKIE: i32 = 71;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    cookie(&socket, SO_NETNS_COOKIE).context("SO_NETNS_COOKIE")
}

/// The kernel's cookie of a socket.
pub fn socket_cookie(socket: &impl AsFd) -> Result<u64> {
    cookie(socket, libc::SO_COOKIE).context("SO_COOKIE")
}

fn cookie(socket: &impl AsFd, option: i32) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut size = libc::socklen_t::try_from(size_of::<u64>())?;
    // SAFETY: both pointers are to variables of the sizes named.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(cookie)
}
