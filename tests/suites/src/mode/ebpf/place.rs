//! A bpffs and a cgroup for each lab, away from the machine's own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use shunt_mode_ebpf::kernel::{Options, network_namespace_cookie};

const CGROUPS: &str = "shunt-suites-";

/// Options for the lab in whose node's network namespace the calling thread is. The same lab gets the
/// same ones each time.
pub fn options() -> Result<Arc<Options>> {
    // Unlike the inode number, a cookie is never given to a second namespace.
    let cookie = network_namespace_cookie()?;
    let bpf_root = bpffs()?.join(cookie.to_string());
    make(&bpf_root).with_context(|| bpf_root.display().to_string())?;
    let cgroup = cgroup()?;
    Ok(Arc::new(Options {
        bpf_root,
        cgroup_root: Some(cgroup),
        frontends: 4096,
        endpoints: 16_384,
        flows: 65_536,
        clients: 131_072,
        ..Options::default()
    }))
}

/// The cgroup for that lab.
pub(super) fn cgroup() -> Result<PathBuf> {
    let cgroup = cgroups()?.join(network_namespace_cookie()?.to_string());
    make(&cgroup).with_context(|| cgroup.display().to_string())?;
    // Threads of one process may then be in different cgroups.
    std::fs::write(cgroup.join("cgroup.type"), "threaded")
        .with_context(|| format!("make {} threaded", cgroup.display()))?;
    Ok(cgroup)
}

fn make(folder: &Path) -> io::Result<()> {
    match std::fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// A bpffs that no other process sees, and that goes with this one.
fn bpffs() -> Result<PathBuf> {
    static MOUNTED: OnceLock<Result<File, String>> = OnceLock::new();
    let mounted = MOUNTED.get_or_init(|| {
        let mount_it = || -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
            let folder = tempfile::tempdir()?;
            mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>)?;
            let file = File::open(folder.path())?;
            nix::mount::umount2(folder.path(), nix::mount::MntFlags::MNT_DETACH)?;
            Ok(file)
        };
        // The mount namespace is the thread's: it goes with it, and the descriptor keeps the mount.
        let mounted = thread::spawn(move || mount_it().map_err(|error| format!("{error:#}"))).join();
        mounted.unwrap_or_else(|_| Err("a thread panicked".to_owned()))
    });
    let file = mounted.as_ref().map_err(|error| anyhow::anyhow!("mount a bpffs: {error}"))?;
    Ok(PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())))
}

/// The folder for this process's cgroups. Those of processes that are gone are removed.
fn cgroups() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    let root = root.context("no cgroup2 is mounted")?;
    let ours = root.join(format!("{CGROUPS}{}", std::process::id()));
    if !ours.exists() {
        for entry in std::fs::read_dir(&root)?.flatten() {
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.strip_prefix(CGROUPS));
            if process.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
                let folders = std::fs::read_dir(entry.path()).into_iter().flatten().flatten();
                folders.for_each(|folder| drop(std::fs::remove_dir(folder.path())));
                let _ = std::fs::remove_dir(entry.path());
            }
        }
        make(&ours)?;
        let _ = std::fs::write(ours.join("cgroup.type"), "threaded");
    }
    Ok(ours)
}
