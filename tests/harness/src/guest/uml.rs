//! User-Mode Linux: a kernel that is an ordinary program of the host. It needs no virtualisation, no privileges and
//! no disk image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::Pid;

use super::find_program;

const MODULES: &str = "/usr/lib/uml/modules";
/// What the kernel is loaded with, made of xstate.rs by build.rs; nothing where there is no such kernel.
pub(super) const XSTATE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/xstate.so"));

/// A kernel for User-Mode Linux and its modules.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    program: PathBuf,
    modules: &'static str,
}

impl Kernel {
    pub(super) fn find() -> Result<Self> {
        let mut missing = Vec::new();
        let mut need = |name: &'static str, package: &'static str| {
            let program = find_program(name);
            if program.is_none() {
                missing.push((name, package));
            }
            program
        };
        need("nice", "coreutils");
        need("setpriv", "util-linux");
        need("unshare", "util-linux");
        need("modprobe", "kmod");
        let program = need("linux.uml", "user-mode-linux");
        if !has_module("ip_vs.ko") {
            missing.push(("the modules in /usr/lib/uml/modules", "user-mode-linux"));
        }
        match program {
            Some(program) if missing.is_empty() => Ok(Self { program, modules: MODULES }),
            _ => {
                let (names, mut packages): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
                packages.dedup();
                bail!(
                    "no guest kernel, for want of {}: apt-get install --no-install-recommends {}",
                    names.join(", "),
                    packages.join(" ")
                )
            }
        }
    }

    pub(super) fn modules(&self) -> &Path {
        Path::new(self.modules)
    }

    /// The kernel's command line: console on its own output, serial lines on descriptors 3 and 4.
    pub(super) fn command(&self, control: &Path, memory_mib: u32) -> Result<Command> {
        let control = control.to_str().context("the control folder's name is plain")?;
        let mut command = Command::new(&self.program);
        command
            .arg(format!("mem={memory_mib}M"))
            .args([format!("uml_dir={control}/"), "umid=uml".to_owned(), format!("init={control}/init")])
            .args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
            .args(["con=null", "con0=null,fd:1", "ssl=null", "ssl0=null,fd:3", "ssl1=null,fd:4"])
            .args(["quiet", "loglevel=5", "panic=-1"])
            .env("TMPDIR", memory_folder(memory_mib));
        if !XSTATE.is_empty() {
            command.env("LD_PRELOAD", format!("{control}/xstate.so"));
        }
        Ok(command)
    }

    /// Keeps the calling thread, and what it starts, on one CPU. The guest has one CPU and its processes take turns:
    /// on one CPU of the host that is two to three times faster. Guests of one process take different ones.
    pub(super) fn pin() {
        static TURN: AtomicUsize = AtomicUsize::new(0);
        // For speed only, so whatever is in its way is no reason to fail.
        let pinned = || {
            let this = Pid::from_raw(0);
            let allowed = sched_getaffinity(this).ok()?;
            let cpus: Vec<usize> =
                (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).collect();
            let turn = TURN.fetch_add(1, Ordering::Relaxed).checked_rem(cpus.len())?;
            let mut one = CpuSet::new();
            one.set(cpus[turn]).ok()?;
            sched_setaffinity(this, &one).ok()
        };
        pinned();
    }
}

/// Where the guest's memory is kept, as a file that is deleted at once: in memory if there is room (a container's
/// /dev/shm has 64 MiB) and programs can be run from there.
fn memory_folder(memory_mib: u32) -> &'static str {
    let fits = statvfs("/dev/shm").is_ok_and(|shm| {
        let room = u128::from(shm.blocks_available()) * u128::from(shm.fragment_size());
        room > u128::from(memory_mib) << 20 && !shm.flags().contains(FsFlags::ST_NOEXEC)
    });
    if fits { "/dev/shm" } else { "/tmp" }
}

fn has_module(name: &str) -> bool {
    let versions = fs::read_dir(MODULES).into_iter().flatten().flatten();
    versions.into_iter().any(|version| {
        let list = fs::read_to_string(version.path().join("modules.dep")).unwrap_or_default();
        list.lines()
            .any(|line| line.split(':').next().is_some_and(|path| path.ends_with(&format!("/{name}"))))
    })
}
