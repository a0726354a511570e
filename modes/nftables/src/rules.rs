//! The rules of every chain, as expressions for the kernel and as text for people, side by side.
//!
//! ```text
//!   nat-prerouting ┐                      ┌> class chain ─> pick chain: dnat
//!   nat-output     ┴> services ─ classes ─┼> pick chain: dnat
//!                     guards, node ports, └> reject-all
//!                     unknown ports
//!   nat-postrouting: masquerade what is marked, and hairpins
//! ```

use std::fmt;
use std::time::Duration;

use ipnet::IpNet;
use nft_netlink::{
    Bytes, CmpOp, CtKey, DynsetOp, Expr, FibFlags, FibResult, MetaKey, NatFlags, NatKind, PayloadBase,
    Register, RejectKind, Verdict,
};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::LocalDetector;

use crate::affinity::{self, ID_MASK, NUMBER_MAX, SECOND_LIST_BIT, classid};
use crate::layout::{ChainKey, Class, Leg, List, POSTROUTING, SERVICES_CHAIN, SetKey};

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

/// Writes one rule in both languages.
struct Builder<'a> {
    skeleton: &'a Skeleton,
    exprs: Vec<Expr>,
    text: Vec<String>,
}

impl<'a> Builder<'a> {
    fn new(skeleton: &'a Skeleton) -> Self {
        Self { skeleton, exprs: Vec::new(), text: Vec::new() }
    }

    fn done(self) -> Rule {
        Rule { exprs: self.exprs, text: self.text.join(" ") }
    }

    fn say(&mut self, text: impl Into<String>) {
        self.text.push(text.into());
    }

    fn ip(&self) -> &'static str {
        match self.skeleton.family {
            IpFamily::V4 => "ip",
            IpFamily::V6 => "ip6",
        }
    }

    /// 32-bit words that an address takes.
    const fn words(&self) -> u8 {
        match self.skeleton.family {
            IpFamily::V4 => 1,
            IpFamily::V6 => 4,
        }
    }

    fn load_address(&mut self, source: bool, at: u8) -> u8 {
        let (offset, len) = match (self.skeleton.family, source) {
            (IpFamily::V4, true) => (12, 4),
            (IpFamily::V4, false) => (16, 4),
            (IpFamily::V6, true) => (8, 16),
            (IpFamily::V6, false) => (24, 16),
        };
        self.exprs.push(Expr::Payload { base: PayloadBase::Network, offset, len, dreg: reg(at) });
        at + self.words()
    }

    fn load_meta(&mut self, key: MetaKey, at: u8) -> u8 {
        self.exprs.push(Expr::Meta { key, dreg: reg(at) });
        at + 1
    }

    fn load_destination_port(&mut self, at: u8) -> u8 {
        self.exprs.push(Expr::Payload { base: PayloadBase::Transport, offset: 2, len: 2, dreg: reg(at) });
        at + 1
    }

    /// The key of a frontend in its map, from register 0 on; the next free register.
    fn load_frontend(&mut self, node_port: bool) -> u8 {
        let at = if node_port { 0 } else { self.load_address(false, 0) };
        let at = self.load_meta(MetaKey::L4Proto, at);
        self.load_destination_port(at)
    }

    fn frontend_text(&self, node_port: bool) -> String {
        if node_port {
            "meta l4proto . th dport".to_owned()
        } else {
            format!("{} daddr . meta l4proto . th dport", self.ip())
        }
    }

    fn lookup(&mut self, set: SetKey, dreg: Option<u8>, invert: bool) {
        self.exprs.push(Expr::Lookup { set: set.to_string(), sreg: reg(0), dreg: dreg.map(reg), invert });
    }

    fn compare(&mut self, op: CmpOp, at: u8, data: &[u8]) {
        self.exprs.push(Expr::Cmp { op, sreg: reg(at), data: Bytes::from(data) });
    }

    fn verdict(mut self, verdict: Verdict) -> Rule {
        self.say(match &verdict {
            Verdict::Goto(chain) => format!("goto {chain}"),
            Verdict::Jump(chain) => format!("jump {chain}"),
            other => other.to_string(),
        });
        self.exprs.push(Expr::ImmediateVerdict(verdict));
        self.done()
    }

    fn goto(self, chain: &ChainKey) -> Rule {
        self.verdict(Verdict::Goto(chain.to_string()))
    }

    /// `(register & mask) ^ xor`
    fn bitwise(&mut self, at: u8, mask: u32, xor: u32) {
        self.exprs.push(Expr::Bitwise {
            sreg: reg(at),
            dreg: reg(at),
            mask: Bytes::from(&mask.to_ne_bytes()[..]),
            xor: Bytes::from(&xor.to_ne_bytes()[..]),
        });
    }

    /// `daddr @set`.
    fn destination_in(&mut self, set: SetKey) {
        self.load_address(false, 0);
        self.lookup(set, None, false);
        self.say(format!("{} daddr @{set}", self.ip()));
    }

    /// `fib daddr type local` and the like.
    fn address_type(&mut self, source: bool, local: bool) {
        let flags = if source { FibFlags::SADDR } else { FibFlags::DADDR };
        self.exprs.push(Expr::Fib { result: FibResult::AddrType, flags, dreg: reg(0) });
        self.compare(if local { CmpOp::Eq } else { CmpOp::Neq }, 0, &RTN_LOCAL.to_ne_bytes());
        let which = if source { "saddr" } else { "daddr" };
        self.say(format!("fib {which} type {}local", if local { "" } else { "!= " }));
    }

    /// The class of the frontend, then the chain of the class.
    fn dispatch(&mut self, node_port: bool, map: SetKey) {
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
    fn dynset(&mut self, op: DynsetOp, timeout: Option<Duration>) {
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

    fn mark(&mut self) {
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
    fn pod_source(&mut self, pod: &Pod<'_>) {
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

    fn in_range(&mut self, at: u8, range: &IpNet) {
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
enum Pod<'a> {
    Range(&'a IpNet),
    Interface { name: &'a str, prefix: bool },
}

fn pods(detector: &LocalDetector) -> Vec<Pod<'_>> {
    match detector {
        LocalDetector::None => Vec::new(),
        LocalDetector::Cidr(ranges) => ranges.iter().map(Pod::Range).collect(),
        LocalDetector::BridgeInterface(name) => vec![Pod::Interface { name, prefix: false }],
        LocalDetector::InterfaceNamePrefix(name) => vec![Pod::Interface { name, prefix: true }],
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

/// The rules of the chain of a class with affinity, where it is not that of the Service port itself.
pub fn affinity_class(skeleton: &Skeleton, id: u32, port: &str, legs: [Leg; 3]) -> Vec<Rule> {
    class(skeleton, legs, |list| affinity::chain_name(id, list, port))
}

/// What the rules of a Service port with affinity depend on, besides the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AffinityRules {
    /// The Service port.
    pub id: u32,
    /// Its protocol.
    pub protocol: Protocol,
    /// How long a client is remembered after its last new connection.
    pub timeout: Duration,
}

/// The rules of a Service port with affinity for one list of `count` endpoints.
///
/// The token is in `meta priority`, as the class was before. Updating an element gives it new life but
/// not new data: so a record that leads nowhere is deleted before another one is written. Two lookups of
/// which the second follows from the first are separate rules, as everywhere.
pub fn affinity(skeleton: &Skeleton, of: AffinityRules, list: List, count: u32) -> Vec<Rule> {
    let mut rules = affinity_recall(skeleton, of.id).to_vec();
    rules.push(affinity_go(skeleton, of, list, true));

    // What was recalled leads nowhere any more.
    let mut rule = Builder::new(skeleton);
    rule.load_meta(MetaKey::Priority, 0);
    rule.bitwise(0, NUMBER_MAX, 0);
    rule.compare(CmpOp::Neq, 0, &[0; 4]);
    rule.say(format!("meta priority & {} != none", classid(NUMBER_MAX)));
    rule.dynset(DynsetOp::Delete, None);
    rules.push(rule.done());

    if count > 0 {
        rules.push(affinity_choose(skeleton, list, count));
        // Another connection of the client may be here at the same time: what one of them has recorded
        // counts for both.
        let mut rule = Builder::new(skeleton);
        rule.dynset(DynsetOp::Update, Some(of.timeout));
        rules.push(rule.done());
        rules.extend(affinity_recall(skeleton, of.id));
        rules.push(affinity_go(skeleton, of, list, false));
        // No more clients can be remembered, or a commit took the chosen endpoint away: see `pick`.
        rules.push(affinity_choose(skeleton, list, 1));
        rules.push(affinity_go(skeleton, of, list, false));
    }
    rules.push(Builder::new(skeleton).verdict(Verdict::Drop));
    rules
}

/// Takes the token from the record of the packet's source. Without one, the id is left, and no endpoint.
fn affinity_recall(skeleton: &Skeleton, id: u32) -> [Rule; 2] {
    let mut start = Builder::new(skeleton);
    let none = affinity::id_part(id);
    start.exprs.push(Expr::Immediate { dreg: reg(0), data: Bytes::from(&none.to_ne_bytes()[..]) });
    start.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    start.say(format!("meta priority set {}", classid(none)));

    let mut recall = Builder::new(skeleton);
    let at = recall.load_meta(MetaKey::Priority, 0);
    recall.load_address(true, at);
    recall.lookup(SetKey::Affinity, Some(0), false);
    recall.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    let ip = recall.ip();
    recall.say(format!("meta priority set meta priority . {ip} saddr map @{}", SetKey::Affinity));
    [start.done(), recall.done()]
}

/// Translates to the endpoint that the token stands for, if it stands for one, and renews the record.
fn affinity_go(skeleton: &Skeleton, of: AffinityRules, list: List, record: bool) -> Rule {
    let mut rule = Builder::new(skeleton);
    // Always so: nft wants to see the protocol before a port.
    rule.load_meta(MetaKey::L4Proto, 0);
    rule.compare(CmpOp::Eq, 0, &[of.protocol.number()]);
    rule.say(format!("meta l4proto {}", of.protocol));
    // The lookup comes first, so that only what leads somewhere is recorded; its registers are those
    // behind key and data of the record.
    let at = if record { rule.words() + 2 } else { 0 };
    rule.load_meta(MetaKey::Priority, at);
    let mut token = "meta priority".to_owned();
    if list == List::Second {
        rule.bitwise(at, !SECOND_LIST_BIT, SECOND_LIST_BIT);
        token = format!("{token} | {}", classid(SECOND_LIST_BIT));
    }
    rule.exprs.push(Expr::Lookup {
        set: SetKey::AffinityEndpoints.to_string(),
        sreg: reg(at),
        dreg: Some(reg(at)),
        invert: false,
    });
    if record {
        rule.dynset(DynsetOp::Update, Some(of.timeout));
    }
    let zero = at + rule.words() + 1;
    rule.exprs.push(Expr::Immediate { dreg: reg(zero), data: Bytes::from(&[0_u8; 4][..]) });
    rule.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(zero) });
    rule.exprs.push(Expr::Nat {
        kind: NatKind::Dnat,
        family: crate::family(skeleton.family),
        addr: reg(at),
        port: Some(reg(at + rule.words())),
        flags: NatFlags::default(),
    });
    let ip = rule.ip();
    rule.say(format!("meta priority set none dnat {ip} to {token} map @{}", SetKey::AffinityEndpoints));
    rule.done()
}

/// Chooses one of `count` endpoints: its token takes the place of the one that there was.
fn affinity_choose(skeleton: &Skeleton, list: List, count: u32) -> Rule {
    let mut rule = Builder::new(skeleton);
    rule.load_meta(MetaKey::Priority, 0);
    rule.bitwise(0, ID_MASK, 0);
    let offset = list.base();
    rule.exprs.push(Expr::Numgen { dreg: reg(1), modulus: count, offset, random: true });
    rule.lookup(SetKey::AffinitySlots, Some(0), false);
    rule.exprs.push(Expr::MetaSet { key: MetaKey::Priority, sreg: reg(0) });
    let offset = if offset == 0 { String::new() } else { format!(" offset {offset}") };
    rule.say(format!(
        "meta priority set meta priority & {} . numgen random mod {count}{offset} map @{}",
        classid(ID_MASK),
        SetKey::AffinitySlots
    ));
    rule.done()
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
