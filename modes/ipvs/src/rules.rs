//! The rules beside the virtual servers: one constant skeleton, typed, and its text.

use std::borrow::Cow;
use std::fmt;

use ipnet::IpNet;
use shunt_core::id::{IpFamily, Protocol};
use xtables_tools::{Table, target, words};

use crate::layout::SetName;

/// Protocols that rules match.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum RuleProtocol {
    /// A transport protocol.
    Transport(Protocol),
    /// ICMP of the family.
    Icmp,
}

/// One condition of a rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Match {
    /// Source address in a range.
    Source(IpNet),
    /// Incoming interface; `+` at the end stands for any rest.
    Interface(String),
    /// Protocol.
    Protocol(RuleProtocol),
    /// The packet is in a set, by these directions, or not in it.
    Set(SetName, &'static str, bool),
    /// The source is an address of this node.
    SourceLocal,
    /// The destination is not an address of this node.
    DestinationNotLocal,
    /// First packet of a connection.
    New,
    /// Packet of a known connection, or related to one.
    Established,
    /// Bits of the mark: value, mask, and whether they must be so.
    Mark(u32, u32, bool),
    /// IPVS handles the packet, or not.
    Ipvs(bool),
    /// No condition.
    Comment(String),
}

/// What a rule does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Target {
    /// Goes on in a chain, and comes back.
    Jump(String),
    /// Goes on in a chain, and comes back to where this chain was called from.
    Goto(String),
    /// Back to where this chain was called from.
    Return,
    /// No more rules of the table.
    Accept,
    /// Silently discarded.
    Drop,
    /// Refused.
    Reject,
    /// `mark = (mark & !mask) ^ value`.
    SetMark(u32, u32),
    /// The mark of the packet's element in a set.
    MapMark(SetName, &'static str),
    /// The source becomes an address of this node.
    Masquerade,
    /// A rule that is none of ours, whole.
    Unknown(String),
}

/// A rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Rule {
    /// All must hold.
    pub matches: Vec<Match>,
    /// What then happens.
    pub target: Target,
}

impl Rule {
    /// A rule.
    pub fn new(matches: impl IntoIterator<Item = Match>, target: Target) -> Self {
        Self { matches: matches.into_iter().collect(), target }
    }

    /// The chain that it leads to, if it does.
    pub fn leads_to(&self) -> Option<Cow<'_, str>> {
        match &self.target {
            Target::Jump(chain) | Target::Goto(chain) => Some(Cow::Borrowed(chain)),
            // Rules of the other mode have conditions that ours have not.
            Target::Unknown(text) => target(&words(text)).map(|chain| Cow::Owned(chain.to_owned())),
            _ => None,
        }
    }

    /// As `iptables-save` prints it, without `-A` and the chain.
    pub fn text(&self, family: IpFamily) -> String {
        let matches = self.matches.iter().map(|m| m.text(family));
        matches.chain([self.target.text(family)]).collect::<Vec<_>>().join(" ")
    }
}

impl Match {
    fn text(&self, family: IpFamily) -> String {
        match self {
            Self::Source(range) => format!("-s {range}"),
            Self::Interface(name) => format!("-i {name}"),
            Self::Protocol(RuleProtocol::Transport(protocol)) => format!("-p {protocol}"),
            Self::Protocol(RuleProtocol::Icmp) => match family {
                IpFamily::V4 => "-p icmp".to_owned(),
                IpFamily::V6 => "-p ipv6-icmp".to_owned(),
            },
            Self::Set(set, by, true) => format!("-m set --match-set {} {by}", set.name(family)),
            Self::Set(set, by, false) => format!("-m set ! --match-set {} {by}", set.name(family)),
            Self::SourceLocal => "-m addrtype --src-type LOCAL".to_owned(),
            Self::DestinationNotLocal => "-m addrtype ! --dst-type LOCAL".to_owned(),
            Self::New => "-m conntrack --ctstate NEW".to_owned(),
            Self::Established => "-m conntrack --ctstate RELATED,ESTABLISHED".to_owned(),
            Self::Mark(value, mask, true) => format!("-m mark --mark 0x{value:x}/0x{mask:x}"),
            Self::Mark(value, mask, false) => format!("-m mark ! --mark 0x{value:x}/0x{mask:x}"),
            Self::Ipvs(true) => "-m ipvs --ipvs".to_owned(),
            Self::Ipvs(false) => "-m ipvs ! --ipvs".to_owned(),
            Self::Comment(text) => format!("-m comment --comment \"{text}\""),
        }
    }
}

impl Target {
    fn text(&self, family: IpFamily) -> String {
        match self {
            Self::Jump(chain) => format!("-j {chain}"),
            Self::Goto(chain) => format!("-g {chain}"),
            Self::Return => "-j RETURN".to_owned(),
            Self::Accept => "-j ACCEPT".to_owned(),
            Self::Drop => "-j DROP".to_owned(),
            Self::Reject => match family {
                IpFamily::V4 => "-j REJECT --reject-with icmp-port-unreachable".to_owned(),
                IpFamily::V6 => "-j REJECT --reject-with icmp6-port-unreachable".to_owned(),
            },
            Self::SetMark(value, mask) => format!("-j MARK --set-xmark 0x{value:x}/0x{mask:x}"),
            Self::MapMark(set, by) => format!("-j SET --map-set {} {by} --map-mark", set.name(family)),
            Self::Masquerade => "-j MASQUERADE --random-fully".to_owned(),
            Self::Unknown(text) => text.clone(),
        }
    }
}

/// A chain of ours, or a chain of the kernel's with our rules in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Chain {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
    /// Its rules; of a chain of the kernel's, only ours.
    pub rules: Vec<Rule>,
}

/// All rules of one family: our chains, and the rules that lead to them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// Our chains, in order of table and name.
    pub chains: Vec<Chain>,
    /// What leads to them from the kernel's chains.
    pub hooks: Vec<Chain>,
}

impl Rules {
    /// True when there are none.
    pub const fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.hooks.is_empty()
    }

    /// Leaves out chains that are somebody else's as well, and what leads to them. A chain to which only rules lead
    /// that are not left out is nobody else's.
    pub fn forget(&mut self, is_kept: &dyn Fn(Table, &str) -> bool) {
        let stay = |chain: &&Chain| is_kept(chain.table, &chain.name);
        let others =
            Self { chains: self.chains.iter().filter(stay).cloned().collect(), hooks: self.hooks.clone() };
        self.chains.retain(|chain| !stay(&chain) || !others.leads_to(chain.table, &chain.name));
        for hook in &mut self.hooks {
            let table = hook.table;
            hook.rules.retain(|rule| rule.leads_to().is_none_or(|chain| !is_kept(table, &chain)));
        }
        self.hooks.retain(|hook| !hook.rules.is_empty());
    }

    /// Whether a rule of ours leads to a chain.
    pub fn leads_to(&self, table: Table, name: &str) -> bool {
        let rules = self.chains.iter().chain(&self.hooks).filter(|c| c.table == table).flat_map(|c| &c.rules);
        rules.into_iter().any(|rule| rule.leads_to().is_some_and(|chain| chain == name))
    }

    /// A chain of ours.
    pub fn chain(&self, table: Table, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|c| c.table == table && c.name == name)
    }

    /// Our rules in a chain of the kernel's.
    pub fn hook(&self, table: Table, name: &str) -> &[Rule] {
        let hook = self.hooks.iter().find(|c| c.table == table && c.name == name);
        hook.map(|c| c.rules.as_slice()).unwrap_or_default()
    }

    /// As `iptables-save` prints them; other chains and rules left out.
    pub fn text(&self, family: IpFamily) -> String {
        use fmt::Write as _;
        let mut text = String::new();
        for table in Table::ALL {
            let of = |list: &[Chain]| -> Vec<Chain> {
                list.iter().filter(|c| c.table == table).cloned().collect()
            };
            let (chains, hooks) = (of(&self.chains), of(&self.hooks));
            if chains.is_empty() && hooks.is_empty() {
                continue;
            }
            // Writing to a String does not fail.
            let _ = writeln!(text, "*{}", table.name());
            for chain in &chains {
                let _ = writeln!(text, ":{} - [0:0]", chain.name);
            }
            for chain in hooks.iter().chain(&chains) {
                for rule in &chain.rules {
                    let _ = writeln!(text, "-A {} {}", chain.name, rule.text(family));
                }
            }
            text.push_str("COMMIT\n");
        }
        text
    }
}
