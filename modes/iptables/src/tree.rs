//! Dispatch trees: from frontends to chains in which a packet meets a few rules, however many frontends
//! there are.
//!
//! ```text
//!   root ─┬─ -d 10.96.0.0/15 -j SHUNT-0A600000-15 ─┬─ -d 10.96.0.10/32 -p tcp --dport 80 -g KUBE-SVC-…
//!         │                                         └─ -d 10.96.32.0/21 -g SHUNT-0A602000-21 …
//!         └─ -d 203.0.113.80/32 -p tcp --dport 443 -g KUBE-EXT-…
//! ```
//!
//! A key is an address, a protocol and a port, as bits. A node looks at three bits; bits in which all keys
//! below it are the same are skipped. At most [`NODE_MAX`] keys make a list instead, [`ROOT_MAX`] in the root. The
//! name of a node says which keys are below it, so that keys that come or go change the nodes on their way and no
//! others.
//!
//! The root jumps and all others go: a packet for which a tree has nothing comes back to the rules after
//! the tree's in the root, after at most eight rules a level and a list.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::Frontend;

use crate::names::{self, Name};
use crate::rule::{Match, Rule, Rules, Target};

/// Keys that a root lists: more are told apart by their bits. Packets for no Service meet all its rules.
pub const ROOT_MAX: usize = 8;
/// Keys that another node lists. 8 and 32 were measured: in the legacy flavour packets take as long, in the nft
/// flavour they take longer with 8; with 32 a large cluster has a fifth fewer chains.
pub const NODE_MAX: usize = 32;
/// Bits that a node looks at: 2, 3 and 4 were measured, 3 is fastest.
const STEP: u32 = 3;
const NODE_PORT_PREFIX: &str = "SHUNT-NP-";
const PROTOCOL_BITS: u32 = 2;
const TAIL_BITS: u32 = PROTOCOL_BITS + 16;

/// What a tree leads to: rules without the frontend's own conditions.
pub type Leaves = BTreeMap<Frontend, Rule>;

#[derive(Clone, Copy)]
struct BitKey {
    /// The address, its bits first.
    address: u128,
    /// Two bits of protocol and the port.
    tail: u32,
}

#[derive(Clone, Copy)]
struct Shape {
    /// `None` for node ports.
    family: Option<IpFamily>,
    address_bits: u32,
}

impl Shape {
    const fn of(frontend: &Frontend) -> Self {
        let (family, address_bits) = match frontend.address {
            Some(IpAddr::V4(_)) => (Some(IpFamily::V4), 32),
            Some(IpAddr::V6(_)) => (Some(IpFamily::V6), 128),
            None => (None, 0),
        };
        Self { family, address_bits }
    }

    fn key(frontend: &Frontend) -> BitKey {
        let address = match frontend.address {
            Some(IpAddr::V4(a)) => u128::from(a.to_bits()) << 96,
            Some(IpAddr::V6(a)) => a.to_bits(),
            None => 0,
        };
        let protocol = match frontend.protocol {
            Protocol::Tcp => 0,
            Protocol::Udp => 1,
            Protocol::Sctp => 2,
        };
        BitKey { address, tail: (protocol << 16) | u32::from(frontend.port) }
    }

    /// How many bits two keys have in common.
    const fn common(self, a: BitKey, b: BitKey) -> u32 {
        let address = (a.address ^ b.address).leading_zeros();
        if address < self.address_bits {
            return address;
        }
        self.address_bits + ((a.tail ^ b.tail) << (32 - TAIL_BITS)).leading_zeros()
    }

    /// The level that is next after so many bits.
    fn next(self, bits: u32) -> u32 {
        let protocol = self.address_bits + PROTOCOL_BITS;
        if bits < self.address_bits {
            (bits + STEP).min(self.address_bits)
        } else if bits < protocol {
            protocol
        } else {
            (bits + STEP).min(self.address_bits + TAIL_BITS)
        }
    }

    /// The last level at or before so many bits.
    const fn level(self, bits: u32) -> u32 {
        let protocol = self.address_bits + PROTOCOL_BITS;
        if bits >= protocol {
            protocol + (bits - protocol) / STEP * STEP
        } else if bits >= self.address_bits {
            self.address_bits
        } else {
            bits / STEP * STEP
        }
    }

    /// The address of a key, and of its port all that the first `bits` bits say.
    fn prefix(self, key: BitKey, bits: u32) -> Vec<Match> {
        let mut matches = Vec::new();
        let length = bits.min(self.address_bits);
        let address = match self.family {
            Some(IpFamily::V4) => Some(IpAddr::from(Ipv4Addr::from_bits((key.address >> 96) as u32))),
            Some(IpFamily::V6) => Some(IpAddr::from(Ipv6Addr::from_bits(key.address))),
            None => None,
        };
        // The length is never more than the address has.
        if let Some(Ok(range)) = address.map(|a| IpNet::new(a, length as u8)) {
            matches.push(Match::Destination(false, range.trunc()));
        }
        let tail = bits.saturating_sub(self.address_bits);
        if tail < PROTOCOL_BITS {
            return matches;
        }
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp][(key.tail >> 16) as usize % 3];
        let free = (1_u32 << (TAIL_BITS - tail)) - 1;
        let from = (key.tail & 0xffff) & !free;
        matches.push(if tail == PROTOCOL_BITS {
            Match::Protocol(protocol)
        } else {
            Match::Ports(protocol, from as u16, (from | free) as u16)
        });
        matches
    }

    fn name(self, key: BitKey, bits: u32) -> Name {
        let tail_bits = bits.saturating_sub(self.address_bits);
        let tail = key.tail & !((1_u32 << (TAIL_BITS - tail_bits)) - 1);
        let address_bits = bits.min(self.address_bits);
        let address = key.address & !(u128::MAX.checked_shr(address_bits).unwrap_or(0));
        let prefix = names::TREE;
        match self.family {
            Some(IpFamily::V4) if tail_bits == 0 => format!("{prefix}{:08X}-{bits}", address >> 96),
            Some(IpFamily::V4) => format!("{prefix}{:08X}-{tail:05X}-{bits}", address >> 96),
            // Too long for the name of a chain.
            Some(IpFamily::V6) => {
                format!("{prefix}{}", names::hash(&format!("{address:032x}{tail:05x}/{bits}")))
            }
            None => format!("{NODE_PORT_PREFIX}{tail:05X}-{bits}"),
        }
        .into()
    }
}

/// Whether a node's keys have addresses; those of node ports have not.
pub fn is_of_addresses(node: &str) -> bool {
    !node.starts_with(NODE_PORT_PREFIX)
}

/// The rule of a leaf where it stands in the tree.
fn place(frontend: &Frontend, leaf: &Rule) -> Rule {
    let shape = Shape::of(frontend);
    let mut matches = shape.prefix(Shape::key(frontend), shape.address_bits + TAIL_BITS);
    matches.extend(leaf.matches.iter().cloned());
    Rule::new(matches, leaf.target.clone())
}

/// The frontend of a rule that stands in a tree, and the rule without it; `None` for a branch.
pub fn leaf(rule: &Rule) -> Option<(Frontend, Rule)> {
    if rule.leads_to().is_some_and(|chain| names::is_tree(chain)) {
        return None;
    }
    let (mut address, mut port) = (None, None);
    let mut rest = Vec::new();
    for m in rule.matches.iter() {
        match m {
            Match::Destination(false, range) if range.prefix_len() == range.max_prefix_len() => {
                address = Some(range.addr());
            }
            Match::Ports(protocol, from, to) if from == to => port = Some((*protocol, *from)),
            other => rest.push(other.clone()),
        }
    }
    let (protocol, port) = port?;
    Some((Frontend { address, protocol, port }, Rule::new(rest, rule.target.clone())))
}

/// The rules of a tree: those of its root, which stand before others there, and those of its nodes.
pub fn build(leaves: &Leaves) -> (Vec<Rule>, BTreeMap<Name, Rules>) {
    let mut nodes = BTreeMap::new();
    let keys: Vec<(BitKey, &Frontend, &Rule)> =
        leaves.iter().map(|(f, leaf)| (Shape::key(f), f, leaf)).collect();
    let Some((_, first, _)) = keys.first() else { return (Vec::new(), nodes) };
    let root = node(Shape::of(first), &keys, 0, true, &mut nodes);
    (root, nodes)
}

fn node(
    shape: Shape,
    keys: &[(BitKey, &Frontend, &Rule)],
    bits: u32,
    is_root: bool,
    nodes: &mut BTreeMap<Name, Rules>,
) -> Vec<Rule> {
    if keys.len() <= if is_root { ROOT_MAX } else { NODE_MAX } {
        return keys.iter().map(|(_, frontend, leaf)| place(frontend, leaf)).collect();
    }
    let next = shape.next(bits);
    let same_group =
        |a: &(BitKey, &Frontend, &Rule), b: &(BitKey, &Frontend, &Rule)| shape.common(a.0, b.0) >= next;
    let mut rules = Vec::new();
    for group in keys.chunk_by(same_group) {
        let [(first, frontend, leaf), .., (last, ..)] = group else {
            rules.extend(group.iter().map(|(_, frontend, leaf)| place(frontend, leaf)));
            continue;
        };
        let common = shape.common(*first, *last);
        if common >= shape.address_bits + TAIL_BITS {
            // Frontends are keys of a map: two are never the same.
            rules.push(place(frontend, leaf));
            continue;
        }
        let level = shape.level(common);
        let name = shape.name(*first, level);
        let target = if is_root { Target::Jump(name.clone()) } else { Target::Goto(name.clone()) };
        rules.push(Rule::new(shape.prefix(*first, level), target));
        let below = node(shape, group, level, false, nodes);
        nodes.insert(name, below.into());
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frontend(address: &str, protocol: Protocol, port: u16) -> Frontend {
        Frontend { address: Some(address.parse().unwrap()), protocol, port }
    }

    fn leaves(frontends: impl IntoIterator<Item = Frontend>) -> Leaves {
        frontends
            .into_iter()
            .map(|f| (f, Rule::always(Target::Goto(format!("KUBE-SVC-{f}").into()))))
            .collect()
    }

    /// Rules that a key meets on its way, and where it ends.
    fn walk(root: &[Rule], nodes: &BTreeMap<Name, Rules>, key: &Frontend) -> (usize, Option<Name>) {
        let meets = |m: &Match| match m {
            Match::Destination(false, range) => key.address.is_some_and(|a| range.contains(&a)),
            Match::Protocol(protocol) => *protocol == key.protocol,
            Match::Ports(protocol, from, to) => {
                *protocol == key.protocol && (*from..=*to).contains(&key.port)
            }
            other => panic!("{other}"),
        };
        let (mut rules, mut met) = (root, 0);
        loop {
            let found = rules.iter().position(|rule| rule.matches.iter().all(meets));
            met += found.map_or(rules.len(), |at| at + 1);
            let Some(to) = found.and_then(|at| rules[at].leads_to()) else { return (met, None) };
            match nodes.get(to) {
                Some(node) => rules = node,
                None => return (met, Some(to.clone())),
            }
        }
    }

    fn check(frontends: Vec<Frontend>, others: &[Frontend], most: usize) {
        let leaves = leaves(frontends);
        let (root, nodes) = build(&leaves);
        for (key, leaf) in &leaves {
            let (met, to) = walk(&root, &nodes, key);
            assert_eq!(to.as_ref(), leaf.leads_to(), "{key}");
            assert!(met <= most, "{key} meets {met} rules");
        }
        for key in others {
            assert_eq!(walk(&root, &nodes, key).1, None, "{key}");
        }
        let read: Leaves =
            root.iter().chain(nodes.values().flat_map(|rules| rules.iter())).filter_map(leaf).collect();
        assert_eq!(read, leaves);
        for (name, rules) in &nodes {
            assert!(name.len() <= 28 && rules.len() <= NODE_MAX && rules.len() > 1, "{name}");
        }
        let found: std::collections::BTreeSet<&Name> = root
            .iter()
            .chain(nodes.values().flat_map(|rules| rules.iter()))
            .filter_map(Rule::leads_to)
            .collect();
        assert!(nodes.keys().all(|name| found.contains(name)));
    }

    #[test]
    fn every_frontend_is_found_and_no_other() {
        let services = |n: u32| {
            (0..n).map(|i| frontend(&Ipv4Addr::from_bits(0x0a60_0001 + i * 3).to_string(), Protocol::Tcp, 80))
        };
        let strangers = [
            frontend("10.96.0.2", Protocol::Tcp, 80),
            frontend("10.96.0.1", Protocol::Udp, 80),
            frontend("10.96.0.1", Protocol::Tcp, 81),
            frontend("1.2.3.4", Protocol::Tcp, 80),
        ];
        check(services(3).collect(), &strangers, 8);
        check(services(100).collect(), &strangers, 40);
        check(services(20_000).collect(), &strangers, 64);
    }

    #[test]
    fn many_ports_of_one_address_are_a_tree_too() {
        let ports = (1..3000_u16)
            .flat_map(|port| [Protocol::Tcp, Protocol::Sctp].map(|p| frontend("10.96.0.1", p, port * 7)));
        check(ports.collect(), &[frontend("10.96.0.1", Protocol::Udp, 7)], 60);
        let node_ports =
            (30_000..32_000_u16).map(|port| Frontend { address: None, protocol: Protocol::Udp, port });
        let stranger = Frontend { address: None, protocol: Protocol::Udp, port: 29_999 };
        check(node_ports.collect(), &[stranger], 60);
    }

    #[test]
    fn ipv6_is_the_same() {
        let services = (0..5000_u128)
            .map(|i| frontend(&Ipv6Addr::from_bits((0xfd00 << 112) + i * 5).to_string(), Protocol::Tcp, 443));
        check(services.collect(), &[frontend("fd00::1", Protocol::Tcp, 443)], 60);
    }

    #[test]
    fn one_frontend_more_changes_the_nodes_on_its_way() {
        let service =
            |i: u32| frontend(&Ipv4Addr::from_bits(0x0a60_0001 + i * 3).to_string(), Protocol::Tcp, 80);
        let before = build(&leaves((0..10_000).map(service)));
        let more = (0..10_000)
            .map(service)
            .chain([frontend("10.96.20.11", Protocol::Tcp, 80), frontend("203.0.113.1", Protocol::Tcp, 80)]);
        let after = build(&leaves(more));
        let changed = after.1.iter().filter(|(name, rules)| before.1.get(*name) != Some(rules)).count();
        let gone = before.1.keys().filter(|name| !after.1.contains_key(*name)).count();
        assert!(changed <= 4 && gone <= 1, "{changed} changed, {gone} gone");
    }
}
