//! The rules of every chain, as expressions for the kernel and as text for people, side by side.
//!
//! ```text
//!   nat-prerouting ┐                      ┌> class chain ─> pick chain: dnat
//!   nat-output     ┴> services ─ classes ─┼> pick chain: dnat
//!                     guards, node ports, └> reject-all
//!                     unknown ports
//!   nat-postrouting: masquerade what is marked, and hairpins
//! ```

mod affinity;
mod builder;

use std::fmt;

use nft_netlink::{
    Bytes, CmpOp, CtKey, Expr, MetaKey, NatFlags, NatKind, PayloadBase, Register, RejectKind, Verdict,
};
use shunt_core::id::IpFamily;
use shunt_core::node::LocalDetector;

use crate::layout::{ChainKey, Class, Leg, List, POSTROUTING, SERVICES_CHAIN, SetKey};

use builder::{Builder, pods};

pub use affinity::{AffinityRules, affinity, affinity_class};

/// One rule. Two rules are the same when their expressions are.
#[derive(Clone, Debug)]
pub struct Rule {
    /// What the kernel evaluates.
    pub exprs: Vec<Expr>,
    /// The same in the words of nft(8); empty when read back from the kernel.
    pub text: String,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.exprs == other.exprs
    }
}

impl Eq for Rule {}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.text.is_empty() {
            return f.write_str(&self.text);
        }
        let exprs: Vec<String> = self.exprs.iter().map(ToString::to_string).collect();
        f.write_str(&exprs.join(" "))
    }
}

/// Everything that rules depend on, besides what is in the maps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skeleton {
    /// Family of the table.
    pub family: IpFamily,
    /// How packets of local pods are recognised.
    pub local_detector: LocalDetector,
    /// The mark that asks for masquerade.
    pub mark: u32,
    /// Capacity of the map of frontends.
    pub services: u32,
    /// Capacity of the map of endpoints.
    pub endpoints: u32,
    /// Where node ports answer; `None` when there are no node ports.
    pub node_ports: Option<NodePorts>,
    /// Whether some frontend has source ranges.
    pub guards: bool,
    /// Whether some endpoint is local.
    pub hairpins: bool,
    /// Whether ranges of cluster IPs are known.
    pub service_cidrs: bool,
}

/// Where node ports answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodePorts {
    /// On every local address but loopback.
    AllLocal,
    /// On the addresses in the set for them.
    Set,
}

/// `RTN_LOCAL` of the kernel's routing: an address of this node.
const RTN_LOCAL: u32 = 2;
/// `IPS_DST_NAT` of conntrack: the destination was translated.
const IPS_DST_NAT: u32 = 1 << 5;
/// `ICMP` and `ICMPv6` codes of "port unreachable".
const PORT_UNREACHABLE: (u8, u8) = (3, 4);

/// Registers, by number of the 32-bit word.
const fn reg(index: u8) -> Register {
    match Register::new(index) {
        Some(register) => register,
        None => Register::R0,
    }
}

/// The rules of a chain that classes lead to.
pub fn of_chain(skeleton: &Skeleton, chain: &ChainKey) -> Vec<Rule> {
    match *chain {
        ChainKey::Reject | ChainKey::Class(Class::Reject | Class::Drop) => vec![reject(skeleton)],
        ChainKey::Pick { node_port, list, count } => pick(skeleton, node_port, list, count),
        ChainKey::Class(Class::Pick { node_port, legs, counts }) => {
            let pick = |list| ChainKey::Pick { node_port, list, count: counts[list as usize] }.to_string();
            class(skeleton, legs, pick)
        }
        // These depend on the Service port: see `affinity_class` and `affinity`.
        ChainKey::Class(Class::Affinity { .. }) | ChainKey::Affinity { .. } => Vec::new(),
    }
}

/// The chains that the rules of `chain` lead on to.
pub fn next_chains(chain: &ChainKey) -> Vec<ChainKey> {
    let ChainKey::Class(class) = *chain else { return Vec::new() };
    let (legs, chain): (_, &dyn Fn(List) -> ChainKey) = match class {
        Class::Reject | Class::Drop => return Vec::new(),
        Class::Pick { node_port, legs, counts } => {
            (legs, &move |list| ChainKey::Pick { node_port, list, count: counts[list as usize] })
        }
        Class::Affinity { id, legs } => (legs, &move |list| ChainKey::Affinity { id, list }),
    };
    let mut next: Vec<ChainKey> = legs
        .into_iter()
        .filter_map(|leg| match leg {
            Leg::Drop => None,
            Leg::Pick { list, .. } => Some(chain(list)),
        })
        .collect();
    next.sort_unstable();
    next.dedup();
    next
}

fn reject(skeleton: &Skeleton) -> Rule {
    let mut rule = Builder::new(skeleton);
    let (code, text) = match skeleton.family {
        IpFamily::V4 => (PORT_UNREACHABLE.0, "reject with icmp port-unreachable"),
        IpFamily::V6 => (PORT_UNREACHABLE.1, "reject with icmpv6 port-unreachable"),
    };
    rule.exprs.push(Expr::Reject(RejectKind::IcmpUnreach(code)));
    rule.say(text);
    rule.done()
}

/// Chooses an endpoint and translates. A commit between the lookup of the class and that of the
/// endpoint may have taken the chosen slot away: then the first slot serves, which is there as long as
/// any is. When none is any more, the packet is dropped rather than let go with the Service's address;
/// the client sends it again.
fn pick(skeleton: &Skeleton, node_port: bool, list: List, count: u32) -> Vec<Rule> {
    let map = if node_port { SetKey::NodePortEndpoints } else { SetKey::Endpoints(skeleton.endpoints) };
    let choose = |count: u32| {
        let mut rule = Builder::new(skeleton);
        let at = rule.load_frontend(node_port);
        let offset = list.base();
        rule.exprs.push(Expr::Numgen { dreg: reg(at), modulus: count, offset, random: true });
        rule.lookup(map, Some(0), false);
        let zero = rule.words() + 1;
        rule.exprs.push(Expr::Immediate { dreg: reg(zero), data: Bytes::from(&[0_u8; 4][..]) });
        rule.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(zero) });
        rule.exprs.push(Expr::Nat {
            kind: NatKind::Dnat,
            family: crate::family(skeleton.family),
            addr: reg(0),
            port: Some(reg(rule.words())),
            flags: NatFlags::default(),
        });
        let offset = if offset == 0 { String::new() } else { format!(" offset {offset}") };
        rule.say(format!(
            "meta priority set none dnat {} to {} . numgen random mod {count}{offset} map @{map}",
            rule.ip(),
            rule.frontend_text(node_port)
        ));
        rule.done()
    };
    vec![choose(count), choose(1), Builder::new(skeleton).verdict(Verdict::Drop)]
}

/// Tells the classes of source apart: pods first, then the node itself, then everything else.
fn class(skeleton: &Skeleton, legs: [Leg; 3], chain: impl Fn(List) -> String) -> Vec<Rule> {
    let [pod, node, other] = legs;
    let mut rules = Vec::new();
    let leg = |mut rule: Builder<'_>, leg: Leg| match leg {
        Leg::Drop => rule.verdict(Verdict::Drop),
        Leg::Pick { list, masquerade } => {
            if masquerade {
                rule.mark();
            }
            rule.verdict(Verdict::Goto(chain(list)))
        }
    };
    if pod != node || pod != other {
        for way in pods(&skeleton.local_detector) {
            let mut rule = Builder::new(skeleton);
            rule.pod_source(&way);
            rules.push(leg(rule, pod));
        }
    }
    if node != other {
        let mut rule = Builder::new(skeleton);
        rule.address_type(true, true);
        rules.push(leg(rule, node));
    }
    rules.push(leg(Builder::new(skeleton), other));
    rules
}

/// The rules of the chain `services`.
pub fn services(skeleton: &Skeleton) -> Vec<Rule> {
    let mut rules = Vec::new();
    if skeleton.guards {
        let mut rule = Builder::new(skeleton);
        rule.load_frontend(false);
        rule.lookup(SetKey::Guarded, None, false);
        let at = rule.load_frontend(false);
        rule.load_address(true, at);
        rule.lookup(SetKey::SourceRanges, None, true);
        let frontend = rule.frontend_text(false);
        rule.say(format!(
            "{frontend} @{} {frontend} . {} saddr != @{}",
            SetKey::Guarded,
            rule.ip(),
            SetKey::SourceRanges
        ));
        rules.push(rule.verdict(Verdict::Drop));
    }

    let map = SetKey::Services(skeleton.services);
    let mut rule = Builder::new(skeleton);
    rule.load_frontend(false);
    rule.lookup(map, Some(0), false);
    rule.dispatch(false, map);
    rules.push(rule.done());

    if let Some(node_ports) = skeleton.node_ports {
        let mut rule = Builder::new(skeleton);
        match node_ports {
            NodePorts::Set => rule.destination_in(SetKey::NodePortIps),
            NodePorts::AllLocal => {
                rule.address_type(false, true);
                if skeleton.family == IpFamily::V4 {
                    rule.exprs.push(Expr::Payload {
                        base: PayloadBase::Network,
                        offset: 16,
                        len: 1,
                        dreg: reg(0),
                    });
                    rule.compare(CmpOp::Neq, 0, &[127]);
                    rule.say("ip daddr != 127.0.0.0/8");
                } else {
                    rule.load_address(false, 0);
                    rule.compare(CmpOp::Neq, 0, &std::net::Ipv6Addr::LOCALHOST.octets());
                    rule.say("ip6 daddr != ::1");
                }
            }
        }
        rule.load_frontend(true);
        rule.lookup(SetKey::NodePorts, Some(0), false);
        rule.dispatch(true, SetKey::NodePorts);
        rules.push(rule.done());
    }

    // A cluster IP that is bound on the node (a node-local DNS cache, for one) is not ours to refuse.
    let mut rule = Builder::new(skeleton);
    rule.destination_in(SetKey::ClusterIps);
    rule.address_type(false, false);
    rules.push(rule.goto(&ChainKey::Reject));
    if skeleton.service_cidrs {
        let mut rule = Builder::new(skeleton);
        rule.destination_in(SetKey::ServiceCidrs);
        rule.address_type(false, false);
        rules.push(rule.verdict(Verdict::Drop));
    }
    rules
}

/// The rules of a base chain.
pub fn of_base_chain(skeleton: &Skeleton, name: &str) -> Vec<Rule> {
    if name != POSTROUTING {
        return vec![Builder::new(skeleton).verdict(Verdict::Goto(SERVICES_CHAIN.to_owned()))];
    }
    let mut rules = Vec::new();
    let bit = skeleton.mark.to_ne_bytes();
    let masquerade = Expr::Masquerade { flags: NatFlags::FULLY_RANDOM };

    // The bit is taken off again, so that an encapsulated packet that comes by a second time is not
    // masqueraded twice.
    let mut rule = Builder::new(skeleton);
    rule.load_meta(MetaKey::Mark, 0);
    rule.exprs.push(Expr::Bitwise {
        sreg: reg(0),
        dreg: reg(0),
        mask: Bytes::from(&bit[..]),
        xor: Bytes::from(&[0_u8; 4][..]),
    });
    rule.compare(CmpOp::Eq, 0, &bit);
    rule.load_meta(MetaKey::Mark, 0);
    rule.exprs.push(Expr::Bitwise {
        sreg: reg(0),
        dreg: reg(0),
        mask: Bytes::from(&[0xff_u8; 4][..]),
        xor: Bytes::from(&bit[..]),
    });
    rule.exprs.push(Expr::MetaSet { key: MetaKey::Mark, sreg: reg(0) });
    rule.exprs.push(masquerade.clone());
    let mark = skeleton.mark;
    rule.say(format!(
        "meta mark & 0x{mark:08x} == 0x{mark:08x} meta mark set meta mark ^ 0x{mark:08x} masquerade fully-random"
    ));
    rules.push(rule.done());

    if skeleton.hairpins {
        let mut rule = Builder::new(skeleton);
        rule.exprs.push(Expr::Ct { key: CtKey::Status, direction: None, dreg: reg(0) });
        rule.exprs.push(Expr::Bitwise {
            sreg: reg(0),
            dreg: reg(0),
            mask: Bytes::from(&IPS_DST_NAT.to_ne_bytes()[..]),
            xor: Bytes::from(&[0_u8; 4][..]),
        });
        rule.compare(CmpOp::Neq, 0, &[0; 4]);
        let at = rule.load_address(true, 0);
        let at = rule.load_address(false, at);
        let at = rule.load_meta(MetaKey::L4Proto, at);
        rule.load_destination_port(at);
        rule.lookup(SetKey::Hairpin, None, false);
        rule.exprs.push(masquerade);
        let ip = rule.ip();
        rule.say(format!(
            "ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @{} masquerade fully-random",
            SetKey::Hairpin
        ));
        rules.push(rule.done());
    }
    rules
}
