//! A bpffs and cgroups of this process, away from the machine's own.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// How the folder for the cgroups of a process begins; its number follows.
const CGROUPS: &str = "shunt-lab-";

/// The name under which a folder in the bpffs can be reached, by child processes too. The bpffs is mounted
/// in no mount namespace, and goes with this process.
pub fn bpffs(folder: &str) -> Result<PathBuf> {
    static MOUNTED: OnceLock<Result<File, String>> = OnceLock::new();
    let mounted = MOUNTED.get_or_init(|| {
        // The mount namespace is the thread's and goes with it; the descriptor keeps the mount.
        let mounted = thread::spawn(|| mount_bpffs().map_err(|error| format!("{error:#}"))).join();
        mounted.unwrap_or_else(|_| Err("a thread panicked".to_owned()))
    });
    let file = mounted.as_ref().map_err(|error| anyhow!("mount a bpffs: {error}"))?;
    let root = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    make(&root.join(folder))
}

fn mount_bpffs() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let folder = tempfile::tempdir()?;
    mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), None::<&str>)?;
    let file = File::open(folder.path())?;
    umount2(folder.path(), MntFlags::MNT_DETACH)?;
    Ok(file)
}

/// A cgroup of this process that its threads may enter one by one; `name` may lead below another one. Those of
/// processes that are gone are removed.
pub fn cgroup(name: &str) -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    });
    let root = root.context("no cgroup2 is mounted")?;
    let ours = root.join(format!("{CGROUPS}{}", std::process::id()));
    if !ours.exists() {
        remove_abandoned(&root)?;
        threaded(&make(&ours)?)?;
    }
    threaded(&make(&ours.join(name))?)
}

fn remove_abandoned(root: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(root)?.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(CGROUPS));
        if process.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            remove_with_children(&entry.path());
        }
    }
    Ok(())
}

/// What cannot be removed is somebody else's by now.
fn remove_with_children(cgroup: &Path) {
    let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
    let children = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.for_each(|child| remove_with_children(&child.path()));
    let _ = std::fs::remove_dir(cgroup);
}

fn make(folder: &Path) -> Result<PathBuf> {
    match std::fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(folder.to_owned()),
    }
}

fn threaded(cgroup: &Path) -> Result<PathBuf> {
    std::fs::write(cgroup.join("cgroup.type"), "threaded")
        .with_context(|| format!("make {} threaded", cgroup.display()))?;
    Ok(cgroup.to_owned())
}
