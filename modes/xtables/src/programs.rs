//! The programs of the two flavours of iptables: which there are, which ones this node uses, and what they
//! are asked to do.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use shunt_core::id::IpFamily;

use crate::namespace::{Input, Namespace, find};
use crate::nf_tables::{has_rules, has_tables};

/// Chains by which the kubelet says which flavour it uses (in the table mangle).
const HINTS: [&str; 2] = [":KUBE-IPTABLES-HINT ", ":KUBE-KUBELET-CANARY "];

/// Through which part of the kernel the tool works. Rules of one flavour are invisible to the other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Flavour {
    /// `iptables-legacy`: `x_tables`, a table is replaced as a whole.
    Legacy,
    /// `iptables-nft`: the same rules in `nf_tables`.
    Nft,
}

impl Flavour {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Legacy, Self::Nft];

    /// How programs are called that have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Nft => "nft",
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Flavour {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|flavour| flavour.name() == text);
        known.ok_or_else(|| format!("unknown flavour {text:?} of iptables: want legacy or nft"))
    }
}

/// The programs of one flavour and family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Programs {
    /// Which flavour they are.
    pub flavour: Flavour,
    restore: PathBuf,
    save: PathBuf,
    iptables: PathBuf,
}

/// Seconds for which the tool waits for the lock of the tables.
const LOCK_TIMEOUT: &str = "10";
const LOCK_FILE: &str = "/run/xtables.lock";
const LOCK_PAUSE: Duration = Duration::from_millis(2);

const fn base(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "iptables",
        IpFamily::V6 => "ip6tables",
    }
}

impl Programs {
    /// Those that this node uses, of those that are installed: see [`choose`].
    pub fn of_node(namespace: &Namespace, family: IpFamily) -> Option<Self> {
        Self::find(namespace, family, detect(namespace)?)
    }

    /// Those of a flavour, if installed: by their full names, or as the only iptables that there is.
    pub fn find(namespace: &Namespace, family: IpFamily, flavour: Flavour) -> Option<Self> {
        Self::named(flavour, &format!("{}-{flavour}", base(family)))
            .or_else(|| Self::own(namespace, family).filter(|programs| programs.flavour == flavour))
    }

    /// Those that go by their names without a flavour.
    fn own(namespace: &Namespace, family: IpFamily) -> Option<Self> {
        let programs = Self::named(Flavour::Legacy, base(family))?;
        let version = namespace.run(&programs.iptables, &["--version"], None).ok()?;
        let flavour = if version.contains("nf_tables") { Flavour::Nft } else { Flavour::Legacy };
        Some(Self { flavour, ..programs })
    }

    fn named(flavour: Flavour, prefix: &str) -> Option<Self> {
        Some(Self {
            flavour,
            restore: find(&format!("{prefix}-restore"))?,
            save: find(&format!("{prefix}-save"))?,
            iptables: find(prefix)?,
        })
    }

    /// What there is in the kernel, in this flavour. Legacy tables that do not exist stay so.
    pub fn save(&self, namespace: &Namespace) -> io::Result<String> {
        namespace.run(&self.save, &[], None)
    }

    /// The same, line by line.
    pub fn save_lines(&self, namespace: &Namespace, line: &mut (dyn FnMut(&str) + Send)) -> io::Result<()> {
        namespace.run_lines(&self.save, line)
    }

    /// Whether a chain is there and has rules.
    pub fn has_rules(
        &self,
        namespace: &Namespace,
        family: IpFamily,
        table: &str,
        chain: &str,
    ) -> io::Result<bool> {
        if self.flavour == Flavour::Nft {
            return has_rules(namespace, family, table, chain);
        }
        let listed = namespace.run(&self.iptables, &["--wait", LOCK_TIMEOUT, "-t", table, "-S", chain], None);
        // A chain that is gone makes the tool fail.
        Ok(listed.is_ok_and(|text| text.contains("-A ")))
    }

    /// Changes tables, each at once, and leaves alone what `text` does not name. It is written while the tool reads.
    /// Answers how long others held the lock of the tables.
    pub fn restore(&self, namespace: &Namespace, text: &Input<'_>) -> io::Result<Duration> {
        let waited = self.await_lock();
        namespace.run(&self.restore, &["--noflush", "--wait", LOCK_TIMEOUT], Some(text))?;
        Ok(waited)
    }

    /// Whether tool and kernel know everything that `text` says. Nothing is changed.
    pub fn test(&self, namespace: &Namespace, text: &str) -> io::Result<()> {
        namespace.run(&self.restore, &["--noflush", "--test", "--wait", LOCK_TIMEOUT], Some(&text)).map(drop)
    }

    /// Waits until nobody holds the lock of the tables, so that the wait is known. The tool takes the lock
    /// itself, and waits again if somebody was faster.
    fn await_lock(&self) -> Duration {
        if self.flavour == Flavour::Nft {
            return Duration::ZERO;
        }
        let path = std::env::var_os("XTABLES_LOCKFILE").map_or_else(|| LOCK_FILE.into(), PathBuf::from);
        let Ok(file) = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
        else {
            return Duration::ZERO;
        };
        let started = Instant::now();
        if file.try_lock().is_ok() {
            return Duration::ZERO;
        }
        wait_for(&file, started);
        started.elapsed()
    }
}

fn wait_for(file: &File, started: Instant) {
    while started.elapsed() < Duration::from_secs(10) && file.try_lock().is_err() {
        thread::sleep(LOCK_PAUSE);
    }
}

/// Which flavour a node uses: that in which the kubelet left its hint; else the one that has more rules; else
/// the one that goes by the name of `iptables`. This is what the wrapper in kube-proxy's image does
/// (kubernetes-sigs/iptables-wrappers), where the last one is always nft. The two texts are what the programs
/// print for both families.
pub fn choose(legacy: &str, nft: &str, own: Flavour) -> Flavour {
    let hinted = |text: &str| text.lines().any(|line| HINTS.iter().any(|hint| line.starts_with(hint)));
    let rules = |text: &str| text.lines().filter(|line| line.starts_with('-')).count();
    if hinted(nft) {
        Flavour::Nft
    } else if hinted(legacy) || rules(legacy) > rules(nft) {
        Flavour::Legacy
    } else if rules(nft) > rules(legacy) {
        Flavour::Nft
    } else {
        own
    }
}

/// The flavour that this node uses, of those that are installed: the chosen one, unless the kernel has nothing for it.
/// Whether it has tables for legacy is not asked: asking would make them.
fn detect(namespace: &Namespace) -> Option<Flavour> {
    let texts = Flavour::ALL.map(|flavour| {
        let programs = IpFamily::ALL.map(|family| Programs::find(namespace, family, flavour));
        let mut found = programs.iter().flatten().peekable();
        found.peek()?;
        Some(found.filter_map(|programs| programs.save(namespace).ok()).collect::<String>())
    });
    match texts {
        [Some(legacy), Some(nft)] => {
            let own = Programs::own(namespace, IpFamily::V4).map_or(Flavour::Nft, |own| own.flavour);
            let runs_nft = || IpFamily::ALL.into_iter().any(|family| has_tables(namespace, family));
            Some(match choose(&legacy, &nft, own) {
                // Where there are rules, there are tables.
                Flavour::Nft if nft.is_empty() && !runs_nft() => Flavour::Legacy,
                chosen => chosen,
            })
        }
        [Some(_), None] => Some(Flavour::Legacy),
        [None, Some(_)] => Some(Flavour::Nft),
        [None, None] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelet_decides_then_the_number_of_rules_then_the_system() {
        let hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
        let old_hint = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n";
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A INPUT -j DROP\nCOMMIT\n";
        for own in Flavour::ALL {
            assert_eq!(choose(hint, rules, own), Flavour::Legacy);
            assert_eq!(choose(old_hint, rules, own), Flavour::Legacy);
            assert_eq!(choose(rules, hint, own), Flavour::Nft);
            assert_eq!(choose(hint, hint, own), Flavour::Nft);
            assert_eq!(choose(rules, "", own), Flavour::Legacy);
            assert_eq!(choose("", rules, own), Flavour::Nft);
            assert_eq!(choose(rules, rules, own), own);
            assert_eq!(choose("", "", own), own);
        }
    }

    #[test]
    fn names_are_read_back() {
        for flavour in Flavour::ALL {
            assert_eq!(flavour.to_string().parse(), Ok(flavour));
        }
        assert!("auto".parse::<Flavour>().is_err());
    }
}
