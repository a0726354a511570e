//! Writes one rule in both languages.

use std::time::Duration;

use ipnet::IpNet;
use nft_netlink::{Bytes, CmpOp, DynsetOp, Expr, FibFlags, FibResult, MetaKey, PayloadBase, Verdict};
use shunt_core::id::IpFamily;
use shunt_core::node::LocalDetector;

use crate::affinity::{ID_MASK, classid};
use crate::layout::{ChainKey, SetKey};

use super::{RTN_LOCAL, Rule, Skeleton, reg};

/// Writes one rule in both languages.
pub(super) struct Builder<'a> {
    pub(super) skeleton: &'a Skeleton,
    pub(super) exprs: Vec<Expr>,
    text: Vec<String>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(skeleton: &'a Skeleton) -> Self {
        Self { skeleton, exprs: Vec::new(), text: Vec::new() }
    }

    pub(super) fn done(self) -> Rule {
        Rule { exprs: self.exprs, text: self.text.join(" ") }
    }

    pub(super) fn say(&mut self, text: impl Into<String>) {
        self.text.push(text.into());
    }

    pub(super) fn ip(&self) -> &'static str {
        match self.skeleton.family {
            IpFamily::V4 => "ip",
            IpFamily::V6 => "ip6",
        }
    }

    /// 32-bit words that an address takes.
    pub(super) const fn words(&self) -> u8 {
        match self.skeleton.family {
            IpFamily::V4 => 1,
            IpFamily::V6 => 4,
        }
    }

    pub(super) fn load_address(&mut self, source: bool, at: u8) -> u8 {
        let (offset, len) = match (self.skeleton.family, source) {
            (IpFamily::V4, true) => (12, 4),
            (IpFamily::V4, false) => (16, 4),
            (IpFamily::V6, true) => (8, 16),
            (IpFamily::V6, false) => (24, 16),
        };
        self.exprs.push(Expr::Payload { base: PayloadBase::Network, offset, len, dreg: reg(at) });
        at + self.words()
    }

    pub(super) fn load_meta(&mut self, key: MetaKey, at: u8) -> u8 {
        self.exprs.push(Expr::Meta { key, dreg: reg(at) });
        at + 1
    }

    pub(super) fn load_destination_port(&mut self, at: u8) -> u8 {
        self.exprs.push(Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, dreg: reg(at) });
        at + 1
    }

    /// The key of a frontend in its map, from register 0 on; the next free register.
    pub(super) fn load_frontend(&mut self, node_port: bool) -> u8 {
        let at = if node_port { 0 } else { self.load_address(false, 0) };
        let at = self.load_meta(MetaKey::L4Proto, at);
        self.load_destination_port(at)
    }

    pub(super) fn frontend_text(&self, node_port: bool) -> String {
        if node_port {
            "meta l4proto . th dport".to_owned()
        } else {
            format!("{} daddr . meta l4proto . th dport", self.ip())
        }
    }

    pub(super) fn lookup(&mut self, set: SetKey, dreg: Option<u8>, invert: bool) {
        self.exprs.push(Expr::Lookup { set: set.to_string(), sreg: reg(0), dreg: dreg.map(reg), invert });
    }

    pub(super) fn compare(&mut self, op: CmpOp, at: u8, data: &[u8]) {
        self.exprs.push(Expr::Cmp { op, sreg: reg(at), data: Bytes::from(data) });
    }

    pub(super) fn verdict(mut self, verdict: Verdict) -> Rule {
        self.say(match &verdict {
            Verdict::Goto(chain) => format!("goto {chain}"),
            Verdict::Jump(chain) => format!("jump {chain}"),
            other => other.to_string(),
        });
        self.exprs.push(Expr::ImmediateVerdict(verdict));
        self.done()
    }

    pub(super) fn goto(self, chain: &ChainKey) -> Rule {
        self.verdict(Verdict::Goto(chain.to_string()))
    }

    /// `(register & mask) ^ xor`
    pub(super) fn bitwise(&mut self, at: u8, mask: u32, xor: u32) {
        self.exprs.push(Expr::Bitwise {
            sreg: reg(at),
            dreg: reg(at),
            mask: Bytes::from(&mask.to_ne_bytes()[..]),
            xor: Bytes::from(&xor.to_ne_bytes()[..]),
        });
    }

    /// `daddr @set`.
    pub(super) fn destination_in(&mut self, set: SetKey) {
        self.load_address(false, 0);
        self.lookup(set, None, false);
        self.say(format!("{} daddr @{set}", self.ip()));
    }

    /// `fib daddr type local` and the like.
    pub(super) fn address_type(&mut self, source: bool, local: bool) {
        let flags = if source { FibFlags::SADDR } else { FibFlags::DADDR };
        self.exprs.push(Expr::Fib { result: FibResult::AddrType, flags, dreg: reg(0) });
        self.compare(if local { CmpOp::Eq } else { CmpOp::Neq }, 0, &RTN_LOCAL.to_ne_bytes());
        let which = if source { "saddr" } else { "daddr" };
        self.say(format!("fib {which} type {}local", if local { "" } else { "!= " }));
    }

    /// The class of the frontend, then the chain of the class.
    pub(super) fn dispatch(&mut self, node_port: bool, map: SetKey) {
        self.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
        self.load_meta(MetaKey::Priority, 0);
        self.exprs.push(Expr::VerdictMap { set: SetKey::Classes.to_string(), sreg: reg(0) });
        self.say(format!(
            "meta priority set {} map @{map} meta priority vmap @{}",
            self.frontend_text(node_port),
            SetKey::Classes
        ));
    }

    /// Writes, renews or deletes the record of the packet's source.
    pub(super) fn dynset(&mut self, op: DynsetOp, timeout: Option<Duration>) {
        let at = self.load_meta(MetaKey::Priority, 0);
        self.bitwise(0, ID_MASK, 0);
        let at = self.load_address(true, at);
        self.load_meta(MetaKey::Priority, at);
        // The kernel wants data even for deleting from a map.
        let (key, data) = (reg(0), Some(reg(at)));
        self.exprs.push(Expr::Dynset { set: SetKey::Affinity.to_string(), op, key, data, timeout });
        let lives = timeout.map(|t| format!(" timeout {}s", t.as_secs())).unwrap_or_default();
        let (ip, set, mask) = (self.ip(), SetKey::Affinity, classid(ID_MASK));
        self.say(format!("{op} @{set} {{ meta priority & {mask} . {ip} saddr{lives} : meta priority }}"));
    }

    pub(super) fn mark(&mut self) {
        let mark = self.skeleton.mark;
        self.load_meta(MetaKey::Mark, 0);
        // (mark & ~bit) ^ bit sets the bit.
        self.exprs.push(Expr::Bitwise {
            sreg: reg(0),
            dreg: reg(0),
            mask: Bytes::from(&(!mark).to_ne_bytes()[..]),
            xor: Bytes::from(&mark.to_ne_bytes()[..]),
        });
        self.exprs.push(Expr::MetaSet { key: MetaKey::Mark, sreg: reg(0) });
        self.say(format!("meta mark set meta mark | 0x{mark:08x}"));
    }

    /// Matches one way of being a local pod.
    pub(super) fn pod_source(&mut self, pod: &Pod<'_>) {
        match pod {
            Pod::Range(range) => {
                self.load_address(true, 0);
                self.in_range(0, range);
                self.say(format!("{} saddr {range}", self.ip()));
            }
            Pod::Interface { name, prefix } => {
                self.load_meta(MetaKey::IifName, 0);
                let mut data = [0_u8; 16];
                let len = name.len().min(15);
                data[..len].copy_from_slice(&name.as_bytes()[..len]);
                self.compare(CmpOp::Eq, 0, if *prefix { &data[..len] } else { &data });
                self.say(format!("iifname \"{name}{}\"", if *prefix { "*" } else { "" }));
            }
        }
    }

    pub(super) fn in_range(&mut self, at: u8, range: &IpNet) {
        let octets = |a: std::net::IpAddr| match a {
            std::net::IpAddr::V4(a) => a.octets().to_vec(),
            std::net::IpAddr::V6(a) => a.octets().to_vec(),
        };
        let (network, mask) = (octets(range.network()), octets(range.netmask()));
        if range.prefix_len() < range.max_prefix_len() {
            let xor = Bytes::from(&vec![0; mask.len()][..]);
            self.exprs.push(Expr::Bitwise {
                sreg: reg(at),
                dreg: reg(at),
                mask: Bytes::from(&mask[..]),
                xor,
            });
        }
        self.compare(CmpOp::Eq, at, &network);
    }
}

/// One way in which a packet is known to come from a local pod.
pub(super) enum Pod<'a> {
    Range(&'a IpNet),
    Interface { name: &'a str, prefix: bool },
}

pub(super) fn pods(detector: &LocalDetector) -> Vec<Pod<'_>> {
    match detector {
        LocalDetector::None => Vec::new(),
        LocalDetector::Cidr(ranges) => ranges.iter().map(Pod::Range).collect(),
        LocalDetector::BridgeInterface(name) => vec![Pod::Interface { name, prefix: false }],
        LocalDetector::InterfaceNamePrefix(name) => vec![Pod::Interface { name, prefix: true }],
    }
}
