//! Which rules the skeleton consists of.
//!
//! ```text
//!   mangle  KUBE-PROXY-FIREWALL: source ranges, drops, marks for the second virtual server of a place
//!   nat     KUBE-SERVICES: which packets get the masquerade bit
//!   filter  KUBE-IPVS-FILTER: no other port of a VIP is open
//!   filter  KUBE-NODE-PORT: health check node ports are open whatever the node's own rules say
//!   (IPVS)
//!   mangle  KUBE-IPVS-UNMARK: marks end here
//!   nat     KUBE-POSTROUTING: packets with the masquerade bit, and hairpins, get another source
//! ```
//!
//! The node's own packets meet IPVS before they meet `filter`, so that what must be dropped is dropped
//! in `mangle`, for them and for all others.

use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::LocalDetector;
use shunt_core::table::NodeFacts;
use xtables_tools::{MARK_MASQ, Table};

use crate::layout::{SetName, mark, tag_mask};
use crate::rules::{Chain, Match, Rule, RuleProtocol, Rules, Target};

const FIREWALL: &str = "KUBE-PROXY-FIREWALL";
const SOURCE_RANGES: &str = "KUBE-SOURCE-RANGES-FIREWALL";
const EXTERNAL_LOCAL: &str = "KUBE-EXTERNAL-LOCAL";
const IPVS_MARK: &str = "KUBE-IPVS-MARK";
const IPVS_UNMARK: &str = "KUBE-IPVS-UNMARK";
const SERVICES: &str = "KUBE-SERVICES";
const CLUSTER_MASQ: &str = "KUBE-CLUSTER-MASQ";
const NODE_PORT: &str = "KUBE-NODE-PORT";
const POSTROUTING: &str = "KUBE-POSTROUTING";
const FORWARD: &str = "KUBE-FORWARD";
const IPVS_FILTER: &str = "KUBE-IPVS-FILTER";

/// The chains that are ours, and those of an older kube-proxy in this mode whose place they take.
pub const OUR_CHAINS: [(Table, &str); 15] = [
    (Table::Filter, FORWARD),
    (Table::Filter, IPVS_FILTER),
    (Table::Filter, "KUBE-IPVS-OUT-FILTER"),
    (Table::Filter, NODE_PORT),
    (Table::Filter, FIREWALL),
    (Table::Filter, SOURCE_RANGES),
    (Table::Mangle, EXTERNAL_LOCAL),
    (Table::Mangle, IPVS_MARK),
    (Table::Mangle, IPVS_UNMARK),
    (Table::Mangle, FIREWALL),
    (Table::Mangle, SOURCE_RANGES),
    (Table::Nat, SERVICES),
    (Table::Nat, NODE_PORT),
    (Table::Nat, POSTROUTING),
    (Table::Nat, "KUBE-LOAD-BALANCER"),
];

/// Chains of `nat` that are ours besides [`OUR_CHAINS`].
pub const OUR_NAT_CHAINS: [&str; 3] = [CLUSTER_MASQ, EXTERNAL_LOCAL, MARK_MASQ];

/// Whether a chain is ours.
pub fn is_ours(table: Table, name: &str) -> bool {
    OUR_CHAINS.contains(&(table, name)) || (table == Table::Nat && OUR_NAT_CHAINS.contains(&name))
}

fn jump(chain: &str) -> Target {
    Target::Jump(chain.to_owned())
}

fn goto(chain: &str) -> Target {
    Target::Goto(chain.to_owned())
}

const fn at(set: SetName) -> Match {
    Match::Set(set, "dst,dst", true)
}

fn comment(text: &str) -> Match {
    Match::Comment(text.to_owned())
}

/// Rules for packets of local pods.
fn pods(detector: &LocalDetector, target: &Target) -> Vec<Rule> {
    let matches = match detector {
        LocalDetector::None => Vec::new(),
        LocalDetector::Cidr(ranges) => ranges.iter().map(|r| Match::Source(r.trunc())).collect(),
        LocalDetector::BridgeInterface(name) => vec![Match::Interface(name.to_string())],
        LocalDetector::InterfaceNamePrefix(prefix) => vec![Match::Interface(format!("{prefix}+"))],
    };
    matches.into_iter().map(|m| Rule::new([m], target.clone())).collect()
}

/// Packets of processes of this node to a VIP have the VIP itself as source, unless they say otherwise.
fn from_vip(target: Target) -> Rule {
    Rule::new([Match::Set(SetName::IpvsIps, "src", true)], target)
}

/// The rules for a node.
pub fn skeleton(node: &NodeFacts) -> Rules {
    let mut rules = Rules { chains: Vec::new(), hooks: Vec::new() };
    filter(node, &mut rules);
    mangle(node, &mut rules);
    nat(node, &mut rules);
    rules.chains.sort();
    rules.hooks.sort();
    rules
}

const fn masquerade_bit(node: &NodeFacts) -> u32 {
    1 << node.masquerade_bit
}

fn chain(rules: &mut Rules, table: Table, name: &str, list: Vec<Rule>) {
    rules.chains.push(Chain { table, name: name.to_owned(), rules: list });
}

/// Adds a rule to those that a chain of the kernel's begins with.
fn hook(rules: &mut Rules, table: Table, name: &str, rule: Rule) {
    match rules.hooks.iter_mut().find(|c| c.table == table && c.name == name) {
        Some(chain) => chain.rules.push(rule),
        None => rules.hooks.push(Chain { table, name: name.to_owned(), rules: vec![rule] }),
    }
}

/// Rules of iptables mode, and before them what closes the other ports of VIPs: so VIPs may become addresses of the
/// node while those rules still translate.
pub fn closing_vips(others: &Rules, ours: &Rules) -> Rules {
    let is_filter = |chain: &Chain| (chain.table, &*chain.name) == (Table::Filter, IPVS_FILTER);
    let mut rules = others.clone();
    rules.chains.retain(|chain| !is_filter(chain));
    rules.chains.extend(ours.chains.iter().filter(|chain| is_filter(chain)).cloned());
    for name in ["INPUT", "OUTPUT"] {
        let closes = |rule: &&Rule| rule.leads_to().is_some_and(|chain| chain == IPVS_FILTER);
        let first = ours.hook(Table::Filter, name).iter().filter(closes);
        let then = others.hook(Table::Filter, name).iter().filter(|rule| !closes(rule));
        let list = first.chain(then).cloned().collect();
        rules.hooks.retain(|hook| (hook.table, &*hook.name) != (Table::Filter, name));
        rules.hooks.push(Chain { table: Table::Filter, name: name.to_owned(), rules: list });
    }
    rules.chains.sort();
    rules.hooks.sort();
    rules
}

fn filter(node: &NodeFacts, rules: &mut Rules) {
    let bit = masquerade_bit(node);
    chain(
        rules,
        Table::Filter,
        FORWARD,
        vec![
            Rule::new([Match::Mark(bit, bit, true)], Target::Accept),
            Rule::new([Match::Established], Target::Accept),
        ],
    );
    let known = [SetName::LoadBalancer, SetName::ClusterIp, SetName::ExternalIp, SetName::ExternalIpLocal];
    let mut list: Vec<Rule> = known.into_iter().map(|set| Rule::new([at(set)], Target::Return)).collect();
    // Whoever pings a VIP is answered.
    list.push(Rule::new([Match::Protocol(RuleProtocol::Icmp)], Target::Return));
    list.push(Rule::new([Match::New, Match::Set(SetName::IpvsIps, "dst", true)], Target::Reject));
    chain(rules, Table::Filter, IPVS_FILTER, list);
    // A node whose own firewall is closed must still answer load balancers.
    let health_checks = Rule::new(
        [
            Match::Protocol(RuleProtocol::Transport(Protocol::Tcp)),
            comment("Kubernetes health check node port"),
            Match::Set(SetName::HealthCheckNodePort, "dst", true),
        ],
        Target::Accept,
    );
    chain(rules, Table::Filter, NODE_PORT, vec![health_checks]);
    let forward = [comment("kubernetes forwarding rules")];
    hook(rules, Table::Filter, "FORWARD", Rule::new(forward, jump(FORWARD)));
    for name in ["INPUT", "OUTPUT"] {
        let access = [comment("kubernetes ipvs access filter")];
        hook(rules, Table::Filter, name, Rule::new(access, jump(IPVS_FILTER)));
    }
    // After the filter of VIPs, where the node's own ports are closed.
    let health = [comment("kubernetes health check rules")];
    hook(rules, Table::Filter, "INPUT", Rule::new(health, jump(NODE_PORT)));
}

fn mangle(node: &NodeFacts, rules: &mut Rules) {
    let by_three = |set| Match::Set(set, "dst,dst,src", true);
    chain(
        rules,
        Table::Mangle,
        FIREWALL,
        vec![
            Rule::new([at(SetName::LoadBalancerFw)], jump(SOURCE_RANGES)),
            Rule::new([at(SetName::Fwmark)], goto(EXTERNAL_LOCAL)),
            Rule::new([at(SetName::NoLocal)], Target::Drop),
            Rule::new(
                [Match::Set(SetName::ServiceCidr, "dst", true), Match::DestinationNotLocal],
                Target::Drop,
            ),
        ],
    );
    chain(
        rules,
        Table::Mangle,
        SOURCE_RANGES,
        vec![
            Rule::new([by_three(SetName::LoadBalancerSourceCidr)], Target::Return),
            Rule::new([by_three(SetName::LoadBalancerSourceIp)], Target::Return),
            Rule::new([], Target::Drop),
        ],
    );
    let mut list = vec![from_vip(goto(IPVS_MARK))];
    list.extend(pods(&node.local_detector, &goto(IPVS_MARK)));
    list.push(Rule::new([Match::SourceLocal], goto(IPVS_MARK)));
    list.push(Rule::new([at(SetName::NoLocal)], Target::Drop));
    chain(rules, Table::Mangle, EXTERNAL_LOCAL, list);
    let map = Target::MapMark(SetName::Fwmark, "dst,dst");
    chain(rules, Table::Mangle, IPVS_MARK, vec![Rule::new([], map)]);
    let bit = node.masquerade_bit;
    let ours = Match::Mark(mark(0, bit), tag_mask(bit), true);
    let clear = Target::SetMark(0, !masquerade_bit(node));
    chain(rules, Table::Mangle, IPVS_UNMARK, vec![Rule::new([ours], clear)]);
    let first = [Match::New, comment("kube-proxy firewall rules")];
    hook(rules, Table::Mangle, "PREROUTING", Rule::new(first, jump(FIREWALL)));
    // A packet that IPVS sends on comes by once more, with the endpoint as its destination.
    let first = [Match::New, Match::Ipvs(false), comment("kube-proxy firewall rules")];
    hook(rules, Table::Mangle, "OUTPUT", Rule::new(first, jump(FIREWALL)));
    hook(rules, Table::Mangle, "POSTROUTING", Rule::new([Match::Ipvs(true)], jump(IPVS_UNMARK)));
}

fn nat(node: &NodeFacts, rules: &mut Rules) {
    // What is masqueraded whoever sends it comes first, so that a Service whose policy changes is for a
    // moment masqueraded too much and never too little: without a way back a connection would fail.
    let not_local = Match::Set(SetName::LoadBalancerLocal, "dst,dst", false);
    chain(
        rules,
        Table::Nat,
        SERVICES,
        vec![
            Rule::new([at(SetName::ExternalIp)], goto(MARK_MASQ)),
            Rule::new([at(SetName::LoadBalancer), not_local], goto(MARK_MASQ)),
            Rule::new([at(SetName::ExternalIpLocal)], goto(EXTERNAL_LOCAL)),
            Rule::new([at(SetName::LoadBalancer)], goto(EXTERNAL_LOCAL)),
            Rule::new([at(SetName::ClusterIp)], goto(CLUSTER_MASQ)),
            Rule::new([Match::Set(SetName::NodePortIps, "dst", true)], jump(NODE_PORT)),
        ],
    );
    let mut list = vec![from_vip(goto(MARK_MASQ))];
    list.extend(pods(&node.local_detector, &Target::Return));
    list.push(Rule::new([Match::SourceLocal], goto(MARK_MASQ)));
    chain(rules, Table::Nat, EXTERNAL_LOCAL, list);
    let mut list = vec![from_vip(goto(MARK_MASQ))];
    if node.masquerade_all {
        list.push(Rule::new([], jump(MARK_MASQ)));
    } else if node.local_detector != LocalDetector::None {
        list.extend(pods(&node.local_detector, &Target::Return));
        list.push(Rule::new([], jump(MARK_MASQ)));
    }
    chain(rules, Table::Nat, CLUSTER_MASQ, list);
    let mut list = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        let [all, local] = SetName::node_ports(protocol);
        let by = if protocol == Protocol::Sctp { "dst,dst" } else { "dst" };
        let of = || Match::Protocol(RuleProtocol::Transport(protocol));
        list.push(Rule::new([of(), Match::Set(local, by, true)], goto(EXTERNAL_LOCAL)));
        list.push(Rule::new([of(), Match::Set(all, by, true)], goto(MARK_MASQ)));
    }
    chain(rules, Table::Nat, NODE_PORT, list);
    let bit = masquerade_bit(node);
    chain(rules, Table::Nat, MARK_MASQ, vec![Rule::new([], Target::SetMark(bit, bit))]);
    let unmarked = || Match::Mark(bit, bit, false);
    let hairpin = Match::Set(SetName::LoopBack, "dst,dst,src", true);
    chain(
        rules,
        Table::Nat,
        POSTROUTING,
        vec![
            Rule::new([unmarked(), hairpin], Target::Masquerade),
            Rule::new([unmarked()], Target::Return),
            // An encapsulated packet that comes by once more must not be taken for marked.
            Rule::new([], Target::SetMark(bit, 0)),
            Rule::new([], Target::Masquerade),
        ],
    );
    for name in ["PREROUTING", "OUTPUT"] {
        let portals = [comment("kubernetes service portals")];
        hook(rules, Table::Nat, name, Rule::new(portals, jump(SERVICES)));
    }
    let post = [comment("kubernetes postrouting rules")];
    hook(rules, Table::Nat, "POSTROUTING", Rule::new(post, jump(POSTROUTING)));
}

/// The family's own tool.
pub const fn tool(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "iptables",
        IpFamily::V6 => "ip6tables",
    }
}
