//! Rules, typed. Their `Display` is what `iptables-restore` reads.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use shunt_core::id::Protocol;

use crate::names::Name;

/// Which address of a packet.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Side {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// Conntrack states as `-m conntrack --ctstate` knows them, as bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct States(pub u8);

impl States {
    /// First packet of a flow.
    pub const NEW: Self = Self(1);
    /// Belongs to a flow that went both ways.
    pub const ESTABLISHED: Self = Self(2);
    /// Begins a flow that another one announced.
    pub const RELATED: Self = Self(4);
    /// The destination was translated.
    pub const DNAT: Self = Self(8);
    /// Fits no flow.
    pub const INVALID: Self = Self(16);

    const NAMES: [(Self, &'static str); 5] = [
        (Self::INVALID, "INVALID"),
        (Self::RELATED, "RELATED"),
        (Self::ESTABLISHED, "ESTABLISHED"),
        (Self::NEW, "NEW"),
        (Self::DNAT, "DNAT"),
    ];

    /// Both.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// States as `--ctstate` writes them; `None` for one that our rules do not use.
    pub fn parse(text: &str) -> Option<Self> {
        text.split(',').try_fold(Self(0), |all, name| {
            Some(all.or(Self::NAMES.iter().find(|(_, known)| *known == name)?.0))
        })
    }
}

impl fmt::Display for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Self::NAMES.iter().filter(|(state, _)| self.0 & state.0 != 0);
        let names: Vec<&str> = names.map(|(_, name)| *name).collect();
        f.write_str(&names.join(","))
    }
}

/// One condition; a `bool` says whether it is inverted. The order is that in which rules print them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Match {
    /// Source address.
    Source(bool, IpNet),
    /// Destination address.
    Destination(bool, IpNet),
    /// Interface that the packet came in by; a `+` at the end stands for anything.
    Interface(bool, Name),
    /// Protocol.
    Protocol(Protocol),
    /// Destination ports, from and to. Comes with the protocol.
    Ports(Protocol, u16, u16),
    /// Conntrack state.
    State(bool, States),
    /// Whether an address is one of the node's own, loopback included.
    Local(bool, Side),
    /// Where the flow's first packet went before it was translated.
    OriginalDestination(bool, IpNet),
    /// Value and mask of the packet mark.
    Mark(bool, u32, u32),
    /// Membership in a set, with the parts of the packet that make the key.
    Set(bool, Name, Key),
    /// By chance, in units of 2^-31, as the kernel holds it.
    Chance(u32),
    /// Is always met, and counts. Kernels without such counters have the rule without this.
    Counted(Name),
    /// What people are told.
    Comment(Name),
}

/// The parts of a packet that make the key of a set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// Source address.
    Source,
    /// Destination address.
    Destination,
    /// Destination address and port.
    Frontend,
    /// Destination address and port, source address.
    FrontendSource,
}

impl Key {
    const ALL: [Self; 4] = [Self::Source, Self::Destination, Self::Frontend, Self::FrontendSource];

    const fn text(self) -> &'static str {
        match self {
            Self::Source => "src",
            Self::Destination => "dst",
            Self::Frontend => "dst,dst",
            Self::FrontendSource => "dst,dst,src",
        }
    }

    /// The key that `--match-set` writes so.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|key| key.text() == text)
    }
}

/// What a rule does.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Target {
    /// On to another chain; its end leads back to the next rule.
    Jump(Name),
    /// On to another chain; its end leads to where this chain was jumped to from.
    Goto(Name),
    /// Leaves the chain.
    Return,
    /// Ends the evaluation of the table.
    Accept,
    /// Discards.
    Drop,
    /// Refuses, with "port unreachable".
    Reject,
    /// Translates the destination, to an address and port.
    Dnat(IpAddr, u16),
    /// Translates the source to the node's address.
    Masquerade,
    /// Sets the bits of a mask in the packet mark to a value.
    SetMark(u32, u32),
    /// Enters the source into a set for so many seconds.
    AddSource(Name, u32),
    /// Something that we never write, as `iptables-save` prints it.
    Other(Name),
}

/// A rule. Most rules of a large cluster send to an endpoint, with one of a few conditions: see [`Pool`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rule {
    /// What must be the case, in order.
    pub matches: Arc<[Match]>,
    /// What happens then.
    pub target: Target,
}

/// The rules of a chain: what is desired, what is written and what is known of the kernel share them.
pub type Rules = Arc<[Rule]>;

/// Conditions that rules have in common, each held once.
#[derive(Default, Debug)]
pub struct Pool(BTreeSet<Arc<[Match]>>);

impl Pool {
    /// The same rule, with its conditions held in common with others if others may have them.
    pub fn share(&mut self, rule: Rule) -> Rule {
        if let Some(matches) = self.0.get(&rule.matches) {
            return Rule { matches: Arc::clone(matches), target: rule.target };
        }
        // Addresses and comments are those of one rule.
        let own = |m: &Match| matches!(m, Match::Source(..) | Match::Destination(..) | Match::Comment(_));
        if !rule.matches.iter().any(own) {
            self.0.insert(Arc::clone(&rule.matches));
        }
        rule
    }
}

impl Rule {
    /// A rule; the order of the conditions does not matter.
    pub fn new(mut matches: Vec<Match>, target: Target) -> Self {
        matches.sort_unstable();
        Self { matches: matches.into(), target }
    }

    /// A rule without conditions.
    pub fn always(target: Target) -> Self {
        Self { matches: Arc::default(), target }
    }

    /// The rule with one more condition.
    #[must_use]
    pub fn and(&self, condition: Match) -> Self {
        Self::new(self.matches.iter().cloned().chain([condition]).collect(), self.target.clone())
    }

    /// The rule for packets to a range of addresses.
    #[must_use]
    pub fn within(&self, range: IpNet) -> Self {
        self.and(Match::Destination(false, range))
    }

    /// The chain that it leads to.
    pub fn leads_to(&self) -> Option<&Name> {
        match &self.target {
            Target::Jump(chain) | Target::Goto(chain) => Some(chain),
            _ => None,
        }
    }

    /// The range of addresses that it is for.
    pub fn destination(&self) -> Option<IpNet> {
        self.matches.iter().find_map(|m| match m {
            Match::Destination(false, range) => Some(*range),
            _ => None,
        })
    }

    /// The sets that it looks at or writes.
    pub fn sets(&self) -> impl Iterator<Item = &Name> {
        let matched = self.matches.iter().filter_map(|m| match m {
            Match::Set(_, set, _) => Some(set),
            _ => None,
        });
        let written = match &self.target {
            Target::AddSource(set, _) => Some(set),
            _ => None,
        };
        matched.chain(written)
    }

    /// Whether it is the same but for what it counts. A comment may be missing in one of them, but not say something else:
    /// it would name the wrong Service.
    pub fn does_the_same(&self, other: &Self) -> bool {
        fn conditions(rule: &Rule) -> impl Iterator<Item = &Match> {
            rule.uncounted().filter(|m| !matches!(m, Match::Comment(_)))
        }
        let told = self.comment().zip(other.comment()).is_none_or(|(one, another)| one == another);
        self == other || told && self.target == other.target && conditions(self).eq(conditions(other))
    }

    /// The conditions for a kernel that cannot count.
    pub fn uncounted(&self) -> impl Iterator<Item = &Match> {
        self.matches.iter().filter(|m| !matches!(m, Match::Counted(_)))
    }

    /// The comment.
    pub fn comment(&self) -> Option<&str> {
        self.matches.iter().find_map(|m| match m {
            Match::Comment(text) => Some(&**text),
            _ => None,
        })
    }
}

/// A comment in which nothing can be taken for anything else, and that the kernel's 256 bytes can hold.
pub fn comment(text: &str) -> Match {
    let plain = |c: char| if c.is_ascii_alphanumeric() || " .,:;/()[]-".contains(c) { c } else { '_' };
    Match::Comment(text.chars().take(200).map(plain).collect::<String>().into())
}

/// One chance in `of`, in units of 2^-31, rounded as iptables does.
pub const fn one_in(share: usize, of: usize) -> u32 {
    let (share, of) = (share as u64, of as u64);
    (((share << 32) / of).div_ceil(2)) as u32
}

/// The chance that `--probability` writes so.
pub fn parse_chance(text: &str) -> Option<u32> {
    let chance: f64 = text.parse().ok()?;
    #[expect(clippy::cast_sign_loss, reason = "it is checked to be between 0 and 1")]
    (0.0..=1.0).contains(&chance).then(|| (chance * f64::from(1_u32 << 31)).round() as u32)
}

impl fmt::Display for Rule {
    /// The rule without `-A` and the name of the chain.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.matches.iter().try_for_each(|m| write!(f, "{m} "))?;
        self.target.fmt(f)
    }
}

/// A rule for a kernel that cannot count.
#[derive(Clone, Copy, Debug)]
pub struct Uncounted<'a>(pub &'a Rule);

impl fmt::Display for Uncounted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.uncounted().try_for_each(|m| write!(f, "{m} "))?;
        self.0.target.fmt(f)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = |inverted: &bool| if *inverted { "! " } else { "" };
        match self {
            Self::Source(inverted, range) => write!(f, "{}-s {range}", not(inverted)),
            Self::Destination(inverted, range) => write!(f, "{}-d {range}", not(inverted)),
            Self::Interface(inverted, name) => write!(f, "{}-i {name}", not(inverted)),
            Self::Protocol(protocol) => write!(f, "-p {protocol}"),
            Self::Ports(protocol, from, to) if from == to => {
                write!(f, "-p {protocol} -m {protocol} --dport {from}")
            }
            Self::Ports(protocol, from, to) => write!(f, "-p {protocol} -m {protocol} --dport {from}:{to}"),
            Self::Local(inverted, side) => {
                let side = match side {
                    Side::Source => "src",
                    Side::Destination => "dst",
                };
                write!(f, "-m addrtype {}--{side}-type LOCAL", not(inverted))
            }
            Self::State(inverted, states) => write!(f, "-m conntrack {}--ctstate {states}", not(inverted)),
            Self::OriginalDestination(inverted, range) => {
                write!(f, "-m conntrack {}--ctorigdst {range}", not(inverted))
            }
            Self::Mark(inverted, value, mask) => {
                write!(f, "-m mark {}--mark {value:#x}/{mask:#x}", not(inverted))
            }
            Self::Set(inverted, set, key) => {
                write!(f, "-m set {}--match-set {set} {}", not(inverted), key.text())
            }
            Self::Chance(chance) => {
                let chance = f64::from(*chance) / f64::from(1_u32 << 31);
                write!(f, "-m statistic --mode random --probability {chance:.11}")
            }
            Self::Counted(name) => write!(f, "-m nfacct --nfacct-name {name}"),
            Self::Comment(text) => write!(f, "-m comment --comment \"{text}\""),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Jump(chain) => write!(f, "-j {chain}"),
            Self::Goto(chain) => write!(f, "-g {chain}"),
            Self::Return => f.write_str("-j RETURN"),
            Self::Accept => f.write_str("-j ACCEPT"),
            Self::Drop => f.write_str("-j DROP"),
            // Without more words both families say "port unreachable".
            Self::Reject => f.write_str("-j REJECT"),
            Self::Dnat(address, port) => {
                write!(f, "-j DNAT --to-destination {}", SocketAddr::new(*address, *port))
            }
            Self::Masquerade => f.write_str("-j MASQUERADE --random-fully"),
            Self::SetMark(value, mask) => write!(f, "-j MARK --set-xmark {value:#x}/{mask:#x}"),
            Self::AddSource(set, seconds) => {
                write!(f, "-j SET --add-set {set} src --exist --timeout {seconds}")
            }
            Self::Other(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_survive_printing() {
        for of in 1..2000 {
            for share in [1, of / 2 + 1, of] {
                let chance = one_in(share.min(of), of);
                let text = format!("{:.11}", f64::from(chance) / f64::from(1_u32 << 31));
                assert_eq!(parse_chance(&text), Some(chance), "{text}");
            }
        }
        assert_eq!(one_in(1, 2), 1 << 30);
        assert_eq!(one_in(3, 3), 1 << 31);
        assert_eq!(one_in(1, 3), 715_827_883);
    }

    #[test]
    fn a_comment_may_be_missing_but_not_say_something_else() {
        let rule = |told: &[&str]| Rule::new(told.iter().map(|text| comment(text)).collect(), Target::Accept);
        assert!(rule(&["ns/a"]).does_the_same(&rule(&[])) && rule(&[]).does_the_same(&rule(&["ns/a"])));
        assert!(rule(&["ns/a"]).does_the_same(&rule(&["ns/a"])));
        assert!(!rule(&["ns/a"]).does_the_same(&rule(&["ns/b"])));
        assert!(!rule(&["ns/a"]).does_the_same(&Rule::always(Target::Drop)));
    }

    #[test]
    fn a_comment_cannot_break_out() {
        let Match::Comment(text) = comment("ns/a\" -j ACCEPT\n-A INPUT \\") else { panic!() };
        assert!(!text.contains(['"', '\\', '\n']));
    }
}
