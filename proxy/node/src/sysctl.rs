//! Kernel parameters of the node: sizes and timeouts of connection tracking as kube-proxy sets them
//! (kubernetes 1.36, `pkg/proxy/conntrack/sysctls.go`), except that an administrator's larger value
//! is never lowered.
//!
//! ```text
//!   Sizing + CPUs ──plan──> what to set ──apply──> /proc/sys, /sys/module
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What connection tracking needs. Zero and `None` leave what is there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sizing {
    /// Entries per CPU; with zero, `min` does not count either.
    pub max_per_core: u32,
    /// Least entries.
    pub min: u32,
    /// Idle TCP connections.
    pub tcp_established: Duration,
    /// TCP connections in `CLOSE_WAIT`.
    pub tcp_close_wait: Duration,
    /// Packets outside of the window are not INVALID.
    pub tcp_be_liberal: bool,
    /// UDP without an answer.
    pub udp: Duration,
    /// UDP with answers.
    pub udp_stream: Duration,
    /// Lower larger values, too, as kube-proxy does.
    pub lower: bool,
}

/// One parameter and the value that it should have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    /// Its file, relative to the root.
    pub file: &'static str,
    /// The value.
    pub value: u64,
    /// A larger value that is not one of these (the kernel's own) was set by somebody, and stays;
    /// `None` where more is not better.
    keep_larger_but: Option<&'static [u64]>,
}

const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
const HASHSIZE: &str = "sys/module/nf_conntrack/parameters/hashsize";
/// Entries that CPUs alone ask for: more would cost memory that nobody missed so far.
const SCALED_MAX: u64 = 1 << 20;
/// Entries for each bucket of the hash table.
const ENTRIES_PER_BUCKET: u64 = 4;

impl Sizing {
    /// Most entries; `None` leaves the kernel's limit.
    ///
    /// kube-proxy 1.36 caps what follows from CPUs at 2^20 even where `min` is larger; that is a
    /// mistake, as `min` says what it says.
    pub fn entries(&self, cpus: usize) -> Option<u64> {
        let scaled = u64::from(self.max_per_core).saturating_mul(cpus as u64).min(SCALED_MAX);
        (scaled > 0).then(|| scaled.max(self.min.into()))
    }

    /// What to set.
    pub fn plan(&self, cpus: usize) -> Vec<Setting> {
        let mut settings = Vec::new();
        if let Some(entries) = self.entries(cpus) {
            let keep_larger_but = Some(&[][..]).filter(|_| !self.lower);
            settings.push(Setting { file: MAX, value: entries, keep_larger_but });
            // kube-proxy never shrinks this one.
            let value = entries / ENTRIES_PER_BUCKET;
            settings.push(Setting { file: HASHSIZE, value, keep_larger_but: Some(&[]) });
        }
        let mut set = |file, timeout: Duration, by_default: &'static [u64]| {
            if timeout.as_secs() > 0 {
                let keep_larger_but = Some(by_default).filter(|_| !self.lower);
                settings.push(Setting { file, value: timeout.as_secs(), keep_larger_but });
            }
        };
        // Five days are the kernel's default: nobody's choice.
        set("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established", self.tcp_established, &[432_000]);
        set("proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait", self.tcp_close_wait, &[60]);
        set("proc/sys/net/netfilter/nf_conntrack_udp_timeout", self.udp, &[30]);
        set("proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream", self.udp_stream, &[120, 180]);
        if self.tcp_be_liberal {
            let file = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
            settings.push(Setting { file, value: 1, keep_larger_but: None });
        }
        settings
    }
}

/// What became of a setting.
#[derive(Debug)]
pub enum Outcome {
    /// The parameter had the value.
    Same,
    /// It had this value before.
    Set(u64),
    /// It has this larger value, which somebody set.
    Kept(u64),
    /// This kernel or namespace does not have it.
    Absent,
    /// It could not be read or written.
    Failed(io::Error),
}

/// The kernel's parameters below a root folder: `/`, or another one in tests.
#[derive(Clone, Debug)]
pub struct Sysctls {
    root: PathBuf,
}

impl Default for Sysctls {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl Sysctls {
    /// Parameters below a folder.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Makes a parameter have its value.
    pub fn apply(&self, setting: &Setting) -> Outcome {
        let path = self.root.join(setting.file);
        let current = match read(&path) {
            Ok(current) => current,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Outcome::Absent,
            Err(error) => return Outcome::Failed(error),
        };
        if current == setting.value {
            return Outcome::Same;
        }
        if setting.keep_larger_but.is_some_and(|own| current > setting.value && !own.contains(&current)) {
            return Outcome::Kept(current);
        }
        match std::fs::write(&path, setting.value.to_string()) {
            Ok(()) => Outcome::Set(current),
            Err(error) => Outcome::Failed(error),
        }
    }

    /// Reads a number, such as `proc/sys/net/netfilter/nf_conntrack_count`.
    pub fn number(&self, file: &str) -> io::Result<u64> {
        read(&self.root.join(file))
    }

    /// CPUs of the machine, whatever this process may use of them.
    pub fn cpus(&self) -> usize {
        let online = std::fs::read_to_string(self.root.join("sys/devices/system/cpu/online"));
        online
            .ok()
            .and_then(|list| count(&list))
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
    }
}

fn read(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{:?} is no number", text.trim())))
}

/// How many numbers a list such as `0-3,8` has.
fn count(list: &str) -> Option<usize> {
    let ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        (last - first.min(last)).checked_add(1)
    });
    ranges.sum::<Option<usize>>().filter(|n| *n > 0)
}

/// Applies a plan and logs what it does. What cannot be set is no reason to stop: in a user namespace,
/// or after an init container did it, that is as it should be.
pub fn configure(sysctls: &Sysctls, sizing: &Sizing) {
    for setting in sizing.plan(sysctls.cpus()) {
        let Setting { file, value, .. } = setting;
        match sysctls.apply(&setting) {
            Outcome::Same | Outcome::Absent => {}
            Outcome::Set(before) => tracing::info!("/{file} set to {value}; it was {before}"),
            Outcome::Kept(larger) => tracing::info!("/{file} stays {larger}, which is more than {value}"),
            Outcome::Failed(error) => tracing::warn!("/{file} cannot be set to {value}: {error}"),
        }
    }
}

/// Sets the score by which the kernel's out-of-memory killer chooses among processes.
pub fn set_oom_score_adj(score: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kube_proxy() -> Sizing {
        Sizing {
            max_per_core: 32_768,
            min: 131_072,
            tcp_established: Duration::from_hours(24),
            tcp_close_wait: Duration::from_hours(1),
            ..Sizing::default()
        }
    }

    #[test]
    fn entries_follow_cpus_within_limits() {
        let of = |max_per_core, min, cpus| Sizing { max_per_core, min, ..Sizing::default() }.entries(cpus);
        assert_eq!(of(32_768, 131_072, 2), Some(131_072));
        assert_eq!(of(32_768, 131_072, 8), Some(262_144));
        assert_eq!(of(32_768, 131_072, 128), Some(1 << 20));
        assert_eq!(of(32_768, 4_000_000, 128), Some(4_000_000), "min says what it says");
        assert_eq!(of(0, 131_072, 8), None, "0 leaves the limit, whatever min is");
    }

    #[test]
    fn cpus_are_counted_by_the_kernels_list() {
        for (list, cpus) in
            [("0\n", Some(1)), ("0-3", Some(4)), ("0-1,4,6-7\n", Some(5)), ("", None), ("x-", None)]
        {
            assert_eq!(count(list), cpus, "{list:?}");
        }
    }

    /// A folder that looks like the kernel's parameters.
    fn kernel(values: &[(&str, u64)]) -> (tempfile::TempDir, Sysctls) {
        let root = tempfile::tempdir().unwrap();
        for (file, value) in values {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{value}\n")).unwrap();
        }
        let sysctls = Sysctls::below(root.path());
        (root, sysctls)
    }

    const ESTABLISHED: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    const CLOSE_WAIT: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    const LIBERAL: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";

    #[test]
    fn a_fresh_kernel_gets_what_is_configured() {
        let (root, sysctls) = kernel(&[
            (MAX, 65_536),
            (HASHSIZE, 16_384),
            (ESTABLISHED, 432_000),
            (CLOSE_WAIT, 60),
            (LIBERAL, 0),
        ]);
        std::fs::create_dir_all(root.path().join("sys/devices/system/cpu")).unwrap();
        std::fs::write(root.path().join("sys/devices/system/cpu/online"), "0-7\n").unwrap();
        configure(&sysctls, &Sizing { tcp_be_liberal: true, ..kube_proxy() });
        let value = |file| sysctls.number(file).unwrap();
        assert_eq!([value(MAX), value(HASHSIZE)], [262_144, 65_536]);
        assert_eq!([value(ESTABLISHED), value(CLOSE_WAIT), value(LIBERAL)], [86_400, 3_600, 1]);
    }

    #[test]
    fn an_administrators_larger_value_stays_unless_it_is_to_be_lowered() {
        let values = [(MAX, 2_000_000), (HASHSIZE, 500_000), (ESTABLISHED, 100_000), (CLOSE_WAIT, 7_200)];
        let (_root, sysctls) = kernel(&values);
        configure(&sysctls, &kube_proxy());
        for (file, value) in values {
            assert_eq!(sysctls.number(file).unwrap(), value, "{file}");
        }
        configure(&sysctls, &Sizing { lower: true, ..kube_proxy() });
        assert!(sysctls.number(MAX).unwrap() < 2_000_000);
        assert_eq!(sysctls.number(HASHSIZE).unwrap(), 500_000, "nobody shrinks the hash table");
        assert_eq!(sysctls.number(ESTABLISHED).unwrap(), 86_400);
        assert_eq!(sysctls.number(CLOSE_WAIT).unwrap(), 3_600);
    }

    #[test]
    fn what_is_not_there_or_no_number_is_survived() {
        let (root, sysctls) = kernel(&[]);
        configure(&sysctls, &kube_proxy());
        assert!(!root.path().join(MAX).exists(), "nothing is made up");
        let (root, sysctls) = kernel(&[(MAX, 0)]);
        std::fs::write(root.path().join(MAX), "many").unwrap();
        let setting = &kube_proxy().plan(1)[0];
        assert!(matches!(sysctls.apply(setting), Outcome::Failed(_)));
        assert_eq!(std::fs::read_to_string(root.path().join(MAX)).unwrap(), "many");
    }
}
