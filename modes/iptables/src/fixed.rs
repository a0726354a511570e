//! Chains that are the same whatever Services there are, and where the kernel enters them.
//!
//! ```text
//!   nat     PREROUTING, OUTPUT  -> KUBE-SERVICES        marks what comes from outside to cluster IPs, tree of
//!                                                       frontends, SHUNT-UNSERVED, KUBE-NODEPORTS
//!           POSTROUTING         -> KUBE-POSTROUTING     masquerade what is marked, and hairpins
//!   filter  INPUT, FORWARD, OUTPUT (new connections)
//!                               -> KUBE-PROXY-FIREWALL  source ranges
//!                               -> KUBE-SERVICES        what is refused, if it was not translated
//!                               -> SHUNT-REFUSE         the same, for addresses of Services
//!           INPUT               -> KUBE-NODEPORTS       health checks are accepted
//!           FORWARD             -> KUBE-FORWARD         traffic of Services is accepted
//! ```
//!
//! The nat table of iptables cannot refuse, so what is refused meets the filter table untranslated. There
//! it is asked for in sets, so that the filter table is the same for any number of Services. A look at a set costs
//! more than a dozen comparisons of addresses: only packets to addresses near those of Services, and from and to
//! local endpoints, meet one.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::LocalDetector;
use shunt_core::table::{ForwardingTable, NodeFacts, NodePortMatch};
use xtables_tools::{Builtin, Table};

use crate::names::{self, Name};
use crate::rule::{Key, Match, Rule, Rules, Side, States, Target, comment};

/// Chains with their rules.
pub type Chains = BTreeMap<(Table, Name), Rules>;
/// Rules in chains of the kernel's that lead to ours.
pub type Hooks = BTreeMap<(Table, Builtin), Vec<Rule>>;

/// Every address that stands for the node alone.
fn loopback(family: IpFamily) -> IpNet {
    match family {
        IpFamily::V4 => Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into(),
        IpFamily::V6 => Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into(),
    }
}

/// The mark that asks for masquerade.
const fn mark(node: &NodeFacts) -> u32 {
    1 << node.masquerade_bit
}

/// The chains, without those that hold a tree.
pub fn chains(table: &ForwardingTable) -> Chains {
    let (family, node) = (table.family(), table.node());
    let mark = mark(node);
    let mut chains = Chains::new();
    let mut add =
        |table, name: &str, rules: Vec<Rule>| drop(chains.insert((table, name.into()), rules.into()));
    add(Table::Nat, names::MARK_MASQ, vec![Rule::always(Target::SetMark(mark, mark))]);
    // KUBE-FORWARD would accept them.
    add(
        Table::Nat,
        names::UNSERVED,
        vec![Rule::always(Target::SetMark(0, mark)), Rule::always(Target::Accept)],
    );
    let count_loopback = node.localhost_node_ports.then(|| {
        Rule::new(
            vec![
                Match::OriginalDestination(false, loopback(family)),
                Match::Counted(names::LOOPBACK_ACCEPTED.into()),
            ],
            // It is marked already: such connections always are.
            Target::Jump(names::MARK_MASQ.into()),
        )
    });
    add(
        Table::Nat,
        names::POSTROUTING,
        [
            // Before it those for hairpins.
            Rule::new(vec![Match::Mark(true, mark, mark)], Target::Return),
        ]
        .into_iter()
        .chain(count_loopback)
        .chain([
            // A packet that is encapsulated comes by again and must not be taken for marked.
            Rule::always(Target::SetMark(mark, 0)),
            Rule::new(vec![comment("kubernetes service traffic requiring SNAT")], Target::Masquerade),
        ])
        .collect(),
    );
    for table in Table::ALL {
        // `iptables -F` takes the rule away, `iptables -X` the chain.
        add(
            table,
            names::CANARY,
            vec![Rule::new(vec![comment("gone when rules were flushed")], Target::Return)],
        );
    }
    // Let through untranslated, it would make the client reset its connection (kubernetes/kubernetes#74839).
    let drop_invalid = node.drop_invalid.then(|| {
        let counted = Match::Counted(names::INVALID_DROPPED.into());
        Rule::new(vec![Match::State(false, States::INVALID), counted], Target::Drop)
    });
    let accept = |why, condition| Rule::new(vec![comment(why), condition], Target::Accept);
    let answers = Match::State(false, States::RELATED.or(States::ESTABLISHED));
    let accepted = [
        accept("kubernetes forwarding rules", Match::Mark(false, mark, mark)),
        accept("kubernetes forwarding conntrack rule", answers),
    ];
    add(Table::Filter, names::FORWARD, drop_invalid.into_iter().chain(accepted).collect());
    add(Table::Filter, names::PROXY_FIREWALL, Vec::new());
    let accept = |(port, service): (u16, &shunt_core::id::NamespacedName)| {
        let why = comment(&format!("{service} health check node port"));
        Rule::new(vec![Match::Ports(Protocol::Tcp, port, port), why], Target::Accept)
    };
    add(Table::Filter, names::NODE_PORTS, table.health_check_node_ports().map(accept).collect());
    let of_cidrs = table.service_cidrs().iter().map(|range| refuse().within(*range));
    // A translated packet may go to an address of the node: it is not for a node port any more.
    let to_node = node_ports(family, node, names::EXTERNAL_SERVICES);
    let to_node = to_node.into_iter().map(|rule| rule.and(Match::State(true, States::DNAT)));
    add(Table::Filter, names::SERVICES, of_cidrs.chain(to_node).collect());
    add(Table::Filter, names::REFUSE, refusals(table));
    chains
}

fn refuse() -> Rule {
    Rule::always(Target::Jump(names::REFUSE.into()))
}

/// Rules that stand first in chains, once for each range in which certain addresses are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ByRange {
    /// For packets to frontends, in these chains of the filter table.
    pub frontends: BTreeMap<Name, Rule>,
    /// For packets from and to endpoints of this node, in the chain of the nat table that masquerades.
    pub endpoints: Rule,
    /// For packets from outside of the cluster to cluster IPs, before and after the tree of the nat table: to one that
    /// is served they are masqueraded. `None` where none are, or where no one condition tells them.
    pub cluster_ips: Option<[Rule; 2]>,
}

/// Conditions of which one at least is met by packets of local pods (or, inverted, by all others, if there
/// is only one).
pub fn pods(node: &NodeFacts, inverted: bool) -> Vec<Match> {
    match &node.local_detector {
        LocalDetector::None => Vec::new(),
        LocalDetector::Cidr(ranges) => ranges.iter().map(|r| Match::Source(inverted, r.trunc())).collect(),
        LocalDetector::BridgeInterface(name) => vec![Match::Interface(inverted, name.clone())],
        LocalDetector::InterfaceNamePrefix(name) => {
            vec![Match::Interface(inverted, format!("{name}+").into())]
        }
    }
}

/// The condition for packets from outside of the cluster; `None` where there is none, or more than one.
pub fn off_cluster(node: &NodeFacts) -> Option<Vec<Match>> {
    if node.masquerade_all {
        return Some(Vec::new());
    }
    <[Match; 1]>::try_from(pods(node, true)).ok().map(Vec::from)
}

/// What stands before what [`chains`] says, and around the tree.
pub fn by_range(family: IpFamily, node: &NodeFacts) -> ByRange {
    let of_set = |inverted, name, key| Match::Set(inverted, names::set(family, name), key);
    let guard = vec![
        Match::State(true, States::DNAT),
        of_set(false, names::GUARDED, Key::Frontend),
        of_set(true, names::SOURCES, Key::FrontendSource),
    ];
    let hairpin = vec![of_set(false, names::HAIRPIN, Key::FrontendSource), Match::State(false, States::DNAT)];
    ByRange {
        frontends: BTreeMap::from([
            (names::PROXY_FIREWALL.into(), Rule::new(guard, Target::Drop)),
            (names::SERVICES.into(), refuse()),
        ]),
        endpoints: Rule::new(hairpin, Target::Jump(names::MARK_MASQ.into())),
        cluster_ips: off_cluster(node).map(|mut condition| {
            condition.push(of_set(false, names::CLUSTER_IPS, Key::Destination));
            [Target::Jump(names::MARK_MASQ.into()), Target::Goto(names::UNSERVED.into())]
                .map(|target| Rule::new(condition.clone(), target))
        }),
    }
}

/// What the filter table does with new connections to addresses of Services.
fn refusals(table: &ForwardingTable) -> Vec<Rule> {
    let family = table.family();
    let of_set =
        |name, key, target| Rule::new(vec![Match::Set(false, names::set(family, name), key)], target);
    let mut rules = vec![
        Rule::new(vec![Match::State(false, States::DNAT)], Target::Return),
        of_set(names::REJECT, Key::Frontend, Target::Reject),
        of_set(names::DROP, Key::Frontend, Target::Drop),
        Rule::new(vec![Match::Local(false, Side::Destination)], Target::Return),
        of_set(names::CLUSTER_IPS, Key::Destination, Target::Reject),
    ];
    let unallocated = |range: &IpNet| {
        Rule::new(vec![Match::Destination(false, *range), comment("unallocated service IP")], Target::Drop)
    };
    rules.extend(table.service_cidrs().iter().map(unallocated));
    rules
}

/// Rules that lead packets for an address on which node ports answer to a chain.
pub fn node_ports(family: IpFamily, node: &NodeFacts, chain: &str) -> Vec<Rule> {
    let why = "kubernetes service nodeports; NOTE: this must be the last rule in this chain";
    let to = |mut matches: Vec<Match>| {
        matches.push(comment(why));
        Rule::new(matches, Target::Jump(chain.into()))
    };
    let mut rules = Vec::new();
    if node.localhost_node_ports {
        rules.push(to(vec![Match::Destination(false, loopback(family))]));
    }
    match &node.node_ports {
        NodePortMatch::AllLocal => rules.push(to(vec![
            Match::Destination(true, loopback(family)),
            Match::Local(false, Side::Destination),
        ])),
        NodePortMatch::Addresses(addresses) => {
            let address = |a: &std::net::IpAddr| to(vec![Match::Destination(false, IpNet::from(*a))]);
            rules.extend(addresses.iter().map(address));
        }
    }
    rules
}

/// Where the kernel enters our chains, in order; kube-proxy's order and comments.
pub fn hooks() -> Hooks {
    let jump = |new: bool, why, chain: &str| {
        let mut matches = vec![comment(why)];
        matches.extend(new.then_some(Match::State(false, States::NEW)));
        Rule::new(matches, Target::Jump(chain.into()))
    };
    let firewall = || jump(true, "kubernetes load balancer firewall", names::PROXY_FIREWALL);
    let portals = |new| jump(new, "kubernetes service portals", names::SERVICES);
    let health = jump(false, "kubernetes health check service ports", names::NODE_PORTS);
    let forward = jump(false, "kubernetes forwarding rules", names::FORWARD);
    let postrouting = jump(false, "kubernetes postrouting rules", names::POSTROUTING);
    Hooks::from([
        ((Table::Filter, Builtin::Input), vec![firewall(), health, portals(true)]),
        ((Table::Filter, Builtin::Forward), vec![firewall(), forward, portals(true)]),
        ((Table::Filter, Builtin::Output), vec![firewall(), portals(true)]),
        ((Table::Nat, Builtin::Prerouting), vec![portals(false)]),
        ((Table::Nat, Builtin::Output), vec![portals(false)]),
        ((Table::Nat, Builtin::Postrouting), vec![postrouting]),
    ])
}

/// Who may talk to loopback once the kernel routes it: the node itself, and answers (CVE-2020-8558). The
/// same rule as the kubelet's.
pub fn anti_martian() -> Rule {
    let loopback = loopback(IpFamily::V4);
    let states = States::RELATED.or(States::ESTABLISHED).or(States::DNAT);
    Rule::new(
        vec![
            Match::Source(true, loopback),
            Match::Destination(false, loopback),
            comment("block incoming localnet connections"),
            Match::State(true, states),
        ],
        Target::Drop,
    )
}

/// The sets that there are as long as there are rules.
pub fn sets(family: IpFamily) -> BTreeSet<Name> {
    names::SETS.iter().map(|name| names::set(family, name)).collect()
}
