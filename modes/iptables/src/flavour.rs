//! The two flavours of iptables: which there are, and which one this node uses.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use shunt_core::id::IpFamily;

use crate::process::{self, Namespace};

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
    /// Changes tables.
    pub restore: PathBuf,
    /// Prints tables.
    pub save: PathBuf,
    /// Prints a chain.
    pub iptables: PathBuf,
}

impl Programs {
    /// Those of a flavour, if installed: by their full names, or as the only iptables that there is.
    pub(crate) fn find(namespace: &Namespace, family: IpFamily, flavour: Flavour) -> Option<Self> {
        let base = match family {
            IpFamily::V4 => "iptables",
            IpFamily::V6 => "ip6tables",
        };
        let of = |prefix: &str| {
            Some(Self {
                flavour,
                restore: process::find(&format!("{prefix}-restore"))?,
                save: process::find(&format!("{prefix}-save"))?,
                iptables: process::find(prefix)?,
            })
        };
        of(&format!("{base}-{flavour}")).or_else(|| {
            let programs = of(base)?;
            let version = namespace.run(&programs.iptables, &["--version"], "").ok()?;
            let is_nft = version.contains("nf_tables");
            (is_nft == (flavour == Flavour::Nft)).then_some(programs)
        })
    }

    /// What there is in the kernel, in this flavour. Legacy tables that do not exist stay so.
    pub(crate) fn save(&self, namespace: &Namespace) -> io::Result<String> {
        namespace.run(&self.save, &[], "")
    }
}

/// Which flavour a node uses: that in which the kubelet left its hint; else the one that has more rules; else
/// nft. This is what the wrapper in kube-proxy's image does (kubernetes-sigs/iptables-wrappers). The two texts
/// are what the programs print for both families.
pub fn choose(legacy: &str, nft: &str) -> Flavour {
    let hinted = |text: &str| text.lines().any(|line| HINTS.iter().any(|hint| line.starts_with(hint)));
    let rules = |text: &str| text.lines().filter(|line| line.starts_with('-')).count();
    if hinted(nft) {
        Flavour::Nft
    } else if hinted(legacy) || rules(legacy) > rules(nft) {
        Flavour::Legacy
    } else {
        Flavour::Nft
    }
}

/// The flavour that this node uses, of those that are installed.
pub(crate) fn detect(namespace: &Namespace) -> Option<Flavour> {
    let texts = Flavour::ALL.map(|flavour| {
        let programs = IpFamily::ALL.map(|family| Programs::find(namespace, family, flavour));
        let mut found = programs.iter().flatten().peekable();
        found.peek()?;
        Some(found.filter_map(|programs| programs.save(namespace).ok()).collect::<String>())
    });
    match texts {
        [Some(legacy), Some(nft)] => Some(choose(&legacy, &nft)),
        [Some(_), None] => Some(Flavour::Legacy),
        [None, Some(_)] => Some(Flavour::Nft),
        [None, None] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelet_decides_then_the_number_of_rules() {
        let hint = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n";
        let old_hint = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n";
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A INPUT -j DROP\nCOMMIT\n";
        assert_eq!(choose(hint, rules), Flavour::Legacy);
        assert_eq!(choose(old_hint, rules), Flavour::Legacy);
        assert_eq!(choose(rules, hint), Flavour::Nft);
        assert_eq!(choose(hint, hint), Flavour::Nft);
        assert_eq!(choose(rules, ""), Flavour::Legacy);
        assert_eq!(choose(rules, rules), Flavour::Nft);
        assert_eq!(choose("", ""), Flavour::Nft);
    }

    #[test]
    fn names_are_read_back() {
        for flavour in Flavour::ALL {
            assert_eq!(flavour.to_string().parse(), Ok(flavour));
        }
        assert!("auto".parse::<Flavour>().is_err());
    }
}
