//! Whether this node can run the mode: each thing that it needs is asked for by itself, so that what is missing
//! has a name.

use std::io;
use std::path::{Path, PathBuf};

use aya::programs::ProgramType;
use aya::sys::BpfHelper;
use nix::errno::Errno;
use shunt_mode::{Mode, Unsupported};

use super::Options;

/// The oldest kernel on which all programs were loaded and run (docs/testing.md).
const KERNEL: &str = "Linux 6.1";

/// Capabilities by the number of their bit, with what they are needed for.
const CAPABILITIES: [(u32, &str, &str); 3] = [
    (12, "CAP_NET_ADMIN", "attach programs"),
    (38, "CAP_PERFMON", "load programs"),
    (39, "CAP_BPF", "make maps and load programs"),
];
const CAP_SYS_ADMIN: u32 = 21;

/// Asks for everything; the error names the first thing that is missing.
pub(super) fn probe(options: &Options) -> Result<(), Unsupported> {
    capabilities(&std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default())?;
    bpffs(&options.bpf_root)?;
    cgroup(options.cgroup_root.clone())?;
    for (kind, what, config) in [
        (ProgramType::CgroupSockAddr, "at sockets of cgroups", "CONFIG_CGROUP_BPF"),
        (ProgramType::SchedClassifier, "at devices", "CONFIG_NET and CONFIG_NET_CLS_ACT"),
    ] {
        program(kind, what, config)?;
    }
    helper()
}

fn missing(missing: String, advice: impl Into<String>) -> Unsupported {
    Unsupported { mode: Mode::Ebpf, missing, advice: advice.into() }
}

/// `status` is that of the thread in /proc. Without the line about capabilities nothing is known.
fn capabilities(status: &str) -> Result<(), Unsupported> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(held) = line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()) else { return Ok(()) };
    let has = |bit: u32| held & 1 << bit != 0;
    // What CAP_SYS_ADMIN allowed before the two were split off, it still does.
    let lacks = |(bit, ..): &&(u32, &str, &str)| !has(*bit) && (*bit < 38 || !has(CAP_SYS_ADMIN));
    let lacking: Vec<_> = CAPABILITIES.iter().filter(lacks).collect();
    if lacking.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = lacking.iter().map(|(_, name, _)| *name).collect();
    let uses: Vec<String> = lacking.iter().map(|(_, name, what)| format!("{name} to {what}")).collect();
    let advice = format!("the process needs {}", uses.join(", "));
    Err(missing(format!("it lacks {}", names.join(", ")), advice))
}

fn bpffs(root: &Path) -> Result<(), Unsupported> {
    match nix::sys::statfs::statfs(root) {
        Ok(stat) if stat.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC => Ok(()),
        Ok(_) | Err(Errno::ENOENT) => Err(missing(
            format!("{} is no bpffs", root.display()),
            "mount one (mount -t bpf bpf /sys/fs/bpf; it needs CONFIG_BPF_SYSCALL) and hand it to the container, or name another one with --bpf-fs-root",
        )),
        Err(error) => Err(missing(format!("{} ({error})", root.display()), "see --bpf-fs-root")),
    }
}

fn cgroup(root: Option<PathBuf>) -> Result<(), Unsupported> {
    let Some(root) = root.or_else(cgroup2) else {
        return Err(missing(
            "no cgroup2 is mounted".to_owned(),
            "mount one (mount -t cgroup2 none /run/cgroup2), and name it with --cgroup-root",
        ));
    };
    match nix::sys::statfs::statfs(&root) {
        Ok(stat) if stat.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC => Ok(()),
        _ => Err(missing(
            format!("{} is no cgroup2", root.display()),
            "name the root of the cgroup2 with --cgroup-root",
        )),
    }
}

fn program(kind: ProgramType, what: &str, config: &str) -> Result<(), Unsupported> {
    match aya::sys::is_program_supported(kind) {
        Ok(true) => Ok(()),
        Ok(false) => Err(missing(
            format!("the kernel has no BPF programs {what}"),
            format!("it needs CONFIG_BPF_SYSCALL and {config}, and must be {KERNEL} at least"),
        )),
        Err(error) => Err(missing(
            format!("BPF programs {what} may not be loaded ({})", io::Error::other(error)),
            format!(
                "the kernel needs CONFIG_BPF_SYSCALL, and must be {KERNEL} at least; a security module may forbid it"
            ),
        )),
    }
}

/// The youngest helper that the programs call (5.18).
fn helper() -> Result<(), Unsupported> {
    match aya::sys::is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval) {
        Ok(false) => Err(missing(
            "the kernel has no helper bpf_set_retval for programs at cgroups".to_owned(),
            format!("it must be {KERNEL} at least"),
        )),
        // Who may not ask is told by `program`.
        Ok(true) | Err(_) => Ok(()),
    }
}

/// The root of the first cgroup2 that is mounted.
pub(super) fn cgroup2() -> Option<PathBuf> {
    cgroup2_of(&std::fs::read_to_string("/proc/self/mounts").ok()?)
}

/// The same of what `/proc/self/mounts` says; hierarchies of version 1 may be there too.
fn cgroup2_of(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| Path::new(path).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let of = |held: u64| capabilities(&format!("Name:\tshunt\nCapEff:\t{held:016x}\n"));
        let (net_admin, perfmon, bpf, sys_admin) = (1 << 12, 1 << 38, 1 << 39, 1 << 21);
        assert_eq!(of(net_admin | perfmon | bpf), Ok(()));
        assert_eq!(of(net_admin | sys_admin), Ok(()));
        let error = of(net_admin).unwrap_err().to_string();
        assert!(error.contains("it lacks CAP_PERFMON, CAP_BPF;"), "{error}");
        let error = of(sys_admin).unwrap_err().to_string();
        assert!(error.contains("it lacks CAP_NET_ADMIN;"), "{error}");
        assert_eq!(capabilities(""), Ok(()));
    }

    #[test]
    fn the_second_version_is_found_beside_the_first() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs ro,mode=755 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0";
        assert_eq!(cgroup2_of(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let alone = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\ncgroup2 /run/other cgroup2 rw 0 0";
        assert_eq!(cgroup2_of(alone), Some("/sys/fs/cgroup".into()));
        assert_eq!(cgroup2_of("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0"), None);
    }

    #[test]
    fn places_that_are_others_are_named() {
        let error = bpffs(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("/proc is no bpffs") && error.contains("--bpf-fs-root"), "{error}");
        let error = cgroup(Some("/proc".into())).unwrap_err().to_string();
        assert!(error.contains("/proc is no cgroup2") && error.contains("--cgroup-root"), "{error}");
    }
}
