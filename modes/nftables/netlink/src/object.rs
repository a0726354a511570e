//! Tables, chains, rules and verdicts.

use std::fmt;

use netlink_packet_netfilter::NetfilterProtoFamily;

use netlink_requests::{Attributes, Writer, be32, be64, text};

use crate::expr::Expr;
use crate::wire::{comment_data, find_user_data};

/// The address family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `ip`: IPv4.
    Ip,
    /// `ip6`: IPv6.
    Ip6,
}

impl Family {
    pub(crate) fn netfilter(self) -> NetfilterProtoFamily {
        match self {
            Self::Ip => NetfilterProtoFamily::IPv4,
            Self::Ip6 => NetfilterProtoFamily::IPv6,
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [Self::Ip, Self::Ip6].into_iter().find(|f| u32::from(u8::from(f.netfilter())) == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// Names a table: everything else lives in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId<'a> {
    /// Its family.
    pub family: Family,
    /// Its name, unique within the family.
    pub name: &'a str,
}

impl<'a> TableId<'a> {
    /// The table of this family and name.
    pub const fn new(family: Family, name: &'a str) -> Self {
        Self { family, name }
    }
}

impl fmt::Display for TableId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// A table as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: String,
    /// Its comment.
    pub comment: Option<String>,
}

const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const TABLE_USERDATA: u16 = 6;
const TABLE_COMMENT: u8 = 0;

pub(crate) fn encode_table(w: &mut Writer, name: &str, comment: Option<&str>) {
    w.string(TABLE_NAME, name);
    w.u32(TABLE_FLAGS, 0);
    if let Some(comment) = comment {
        w.attribute(TABLE_USERDATA, &comment_data(TABLE_COMMENT, comment));
    }
}

impl Table {
    pub(crate) fn decode(family: Family, attributes: &[u8]) -> Result<Self, &'static str> {
        let name = Attributes::find(attributes, TABLE_NAME).and_then(text).ok_or("table without a name")?;
        let comment = Attributes::find(attributes, TABLE_USERDATA)
            .and_then(|data| find_user_data(data, TABLE_COMMENT))
            .and_then(text);
        Ok(Self { family, name: name.to_owned(), comment: comment.map(str::to_owned) })
    }
}

/// Where a base chain is called from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Every packet received, before routing.
    Prerouting,
    /// Packets for this machine.
    Input,
    /// Packets for another machine.
    Forward,
    /// Packets this machine sends.
    Output,
    /// Every packet leaving, after routing.
    Postrouting,
}

const HOOKS: [Hook; 5] = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

/// What a base chain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// Translates addresses: sees the first packet of a connection only.
    Nat,
    /// Sees every packet.
    Filter,
    /// As filter on output, but routes again when the packet changed.
    Route,
}

impl ChainType {
    fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Filter => "filter",
            Self::Route => "route",
        }
    }
}

impl fmt::Display for ChainType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What makes a chain a base chain: it is called by the kernel. The policy is always accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseChain {
    /// What it is for.
    pub kind: ChainType,
    /// Where it is called from.
    pub hook: Hook,
    /// When, relative to others on the same hook: lower numbers first.
    pub priority: i32,
}

/// A chain of rules.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chain {
    /// Its name, unique within the table.
    pub name: String,
    /// Set if the kernel calls it; otherwise it is only reached by jump and goto.
    pub base: Option<BaseChain>,
}

pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;

impl Chain {
    /// A chain that is only reached by jump and goto.
    pub fn regular(name: impl Into<String>) -> Self {
        Self { name: name.into(), base: None }
    }

    /// A chain that the kernel calls.
    pub fn base(name: impl Into<String>, kind: ChainType, hook: Hook, priority: i32) -> Self {
        Self { name: name.into(), base: Some(BaseChain { kind, hook, priority }) }
    }

    pub(crate) fn encode(&self, w: &mut Writer, table: &str) {
        w.string(CHAIN_TABLE, table);
        w.string(CHAIN_NAME, &self.name);
        if let Some(base) = self.base {
            w.nest(CHAIN_HOOK, |w| {
                w.u32(HOOK_NUMBER, HOOKS.iter().position(|&h| h == base.hook).unwrap_or(0) as u32);
                w.u32(HOOK_PRIORITY, base.priority.cast_unsigned());
            });
            w.string(CHAIN_TYPE, base.kind.name());
        }
    }

    pub(crate) fn decode(attributes: &[u8]) -> Result<Self, &'static str> {
        let name = Attributes::find(attributes, CHAIN_NAME).and_then(text).ok_or("chain without a name")?;
        let base = match Attributes::find(attributes, CHAIN_HOOK) {
            None => None,
            Some(hook) => Some(BaseChain {
                kind: Attributes::find(attributes, CHAIN_TYPE)
                    .and_then(text)
                    .and_then(|name| {
                        [ChainType::Nat, ChainType::Filter, ChainType::Route]
                            .into_iter()
                            .find(|t| t.name() == name)
                    })
                    .ok_or("base chain of an unknown type")?,
                hook: Attributes::find(hook, HOOK_NUMBER)
                    .and_then(be32)
                    .and_then(|number| HOOKS.get(number as usize).copied())
                    .ok_or("base chain on an unknown hook")?,
                priority: Attributes::find(hook, HOOK_PRIORITY)
                    .and_then(be32)
                    .ok_or("base chain without a priority")?
                    .cast_signed(),
            }),
        };
        Ok(Self { name: name.to_owned(), base })
    }
}

/// What happens to a packet next.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Leave this hook's chain; later base chains still see the packet.
    Accept,
    /// Discard the packet.
    Drop,
    /// Go on with the next rule.
    Continue,
    /// Go back to the calling chain.
    Return,
    /// Call a chain.
    Jump(String),
    /// Go to a chain and do not come back.
    Goto(String),
    /// Any other code of the kernel's (`break`, `queue`).
    Other(i32),
}

const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;

impl Verdict {
    pub(crate) fn encode(&self, w: &mut Writer) {
        let (code, chain): (i32, _) = match self {
            Self::Drop => (0, None),
            Self::Accept => (1, None),
            Self::Continue => (-1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
            Self::Return => (-5, None),
            Self::Other(code) => (*code, None),
        };
        w.u32(VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            w.string(VERDICT_CHAIN, chain);
        }
    }

    pub(crate) fn decode(attributes: &[u8]) -> Option<Self> {
        let chain = || Attributes::find(attributes, VERDICT_CHAIN).and_then(text).map(str::to_owned);
        Some(match Attributes::find(attributes, VERDICT_CODE).and_then(be32)?.cast_signed() {
            0 => Self::Drop,
            1 => Self::Accept,
            -1 => Self::Continue,
            -3 => Self::Jump(chain()?),
            -4 => Self::Goto(chain()?),
            -5 => Self::Return,
            code => Self::Other(code),
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Continue => f.write_str("continue"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Other(code) => write!(f, "verdict {code}"),
        }
    }
}

/// A rule: expressions evaluated one after the other until one says stop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// The chain it is in.
    pub chain: String,
    /// The kernel's number for it; set in dumps, ignored when a rule is added.
    pub handle: Option<u64>,
    /// A comment of up to 127 bytes, listed by nft(8); what is longer is cut.
    pub comment: Option<String>,
    /// What it does.
    pub exprs: Vec<Expr>,
}

pub(crate) const RULE_TABLE: u16 = 1;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
pub(crate) const RULE_USERDATA: u16 = 7;
pub(crate) const RULE_COMMENT: u8 = 0;

impl Rule {
    /// A rule to add.
    pub fn new(chain: impl Into<String>, exprs: Vec<Expr>) -> Self {
        Self { chain: chain.into(), handle: None, comment: None, exprs }
    }

    /// The same rule with a comment.
    #[must_use]
    pub fn with_comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }

    pub(crate) fn encode(&self, w: &mut Writer, table: &str, handle: Option<u64>) {
        w.string(RULE_TABLE, table);
        w.string(RULE_CHAIN, &self.chain);
        if let Some(handle) = handle {
            w.u64(RULE_HANDLE, handle);
        }
        w.nest(RULE_EXPRESSIONS, |w| {
            for expr in &self.exprs {
                expr.encode(w);
            }
        });
        if let Some(comment) = &self.comment {
            w.attribute(RULE_USERDATA, &comment_data(RULE_COMMENT, comment));
        }
    }

    pub(crate) fn decode(attributes: &[u8]) -> Result<Self, &'static str> {
        let mut rule = Self::new("", Vec::new());
        for (kind, value) in Attributes::new(attributes) {
            match kind {
                RULE_CHAIN => text(value).ok_or("rule without a chain")?.clone_into(&mut rule.chain),
                RULE_HANDLE => rule.handle = be64(value),
                RULE_EXPRESSIONS => {
                    rule.exprs = Attributes::new(value).map(|(_, expr)| Expr::decode(expr)).collect();
                }
                RULE_USERDATA => {
                    rule.comment = find_user_data(value, RULE_COMMENT).and_then(text).map(str::to_owned);
                }
                _ => {}
            }
        }
        Ok(rule)
    }
}

/// One expression a line, as `nft --debug=netlink` prints them.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.chain)?;
        if let Some(comment) = &self.comment {
            write!(f, " comment \"{comment}\"")?;
        }
        for expr in &self.exprs {
            write!(f, "\n  {expr}")?;
        }
        Ok(())
    }
}
