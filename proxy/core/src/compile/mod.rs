//! Services and `EndpointSlice`s in, forwarding table out. Every Kubernetes question is answered
//! here, once, for all modes.

pub mod endpoints;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::endpoint::EndpointSlice;
use crate::id::{IpFamily, ServicePortName};
use crate::node::{Config, LocalDetector, Node, NodePortAddresses};
use crate::service::{Service, ServicePort, TrafficPolicy};
use crate::store::{Dirty, Store};
use crate::table::{
    Change, ForwardingTable, Frontend, FrontendEntry, FrontendKind, NodeFacts, NodePortMatch, PortEntry,
    ServiceEntry, SourceRanges, Verdict,
};

/// What the compiler knows of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Context {
    /// Name of this node.
    pub node_name: Arc<str>,
    /// Zone of this node.
    pub zone: Option<Arc<str>>,
    /// Addresses of the Node object, primary one of each family first.
    pub node_addresses: Vec<IpAddr>,
    /// Addresses found on the node's interfaces; those of the Node object count as well.
    pub interface_addresses: BTreeSet<IpAddr>,
    /// Settings.
    pub config: Config,
}

impl Context {
    /// The context of a node of which only the name and the settings are known.
    pub fn new(node_name: impl Into<Arc<str>>, config: Config) -> Self {
        Self {
            node_name: node_name.into(),
            zone: None,
            node_addresses: Vec::new(),
            interface_addresses: BTreeSet::new(),
            config,
        }
    }

    /// The same with what the Node object says. Without one, what was known before stays.
    #[must_use]
    pub fn with_node(mut self, node: Option<&Node>) -> Self {
        if let Some(node) = node {
            self.zone.clone_from(&node.zone);
            if !node.addresses.is_empty() {
                self.node_addresses.clone_from(&node.addresses);
            }
        }
        self
    }

    /// The node's main address of a family.
    pub fn primary_address(&self, family: IpFamily) -> Option<IpAddr> {
        self.node_addresses.iter().copied().find(|a| IpFamily::of(*a) == family)
    }

    /// What the table of one family needs to know of the node.
    pub fn facts(&self, family: IpFamily) -> NodeFacts {
        let of_family = |a: &IpAddr| IpFamily::of(*a) == family;
        let local_addresses: BTreeSet<IpAddr> =
            self.node_addresses.iter().chain(&self.interface_addresses).copied().filter(of_family).collect();
        NodeFacts {
            local_detector: self.config.local_detector.for_family(family),
            masquerade_all: self.config.masquerade_all,
            masquerade_bit: self.config.masquerade_bit,
            node_ports: self.node_port_match(family, &local_addresses),
            localhost_node_ports: self.localhost_node_ports(family),
            drop_invalid: self.config.drop_invalid,
            local_addresses,
        }
    }

    /// Loopback answers only where the setting includes it, and never in IPv6 (kube-proxy's rule).
    fn localhost_node_ports(&self, family: IpFamily) -> bool {
        let loopback = IpAddr::from(std::net::Ipv4Addr::LOCALHOST);
        let included = match &self.config.node_port_addresses {
            NodePortAddresses::Primary => false,
            NodePortAddresses::All => true,
            NodePortAddresses::Ranges(ranges) => {
                let ranges = of_family(ranges, family);
                ranges.is_empty() || ranges.iter().any(|r| r.contains(&loopback))
            }
            NodePortAddresses::PrimaryAnd(ranges) => ranges.iter().any(|r| r.contains(&loopback)),
        };
        self.config.localhost_node_ports && family == IpFamily::V4 && included
    }

    fn node_port_match(&self, family: IpFamily, local: &BTreeSet<IpAddr>) -> NodePortMatch {
        let (primary, ranges) = match &self.config.node_port_addresses {
            NodePortAddresses::All => return NodePortMatch::AllLocal,
            NodePortAddresses::Primary => (true, Vec::new()),
            NodePortAddresses::Ranges(ranges) => (false, of_family(ranges, family)),
            NodePortAddresses::PrimaryAnd(ranges) => (true, of_family(ranges, family)),
        };
        if (ranges.is_empty() && !primary) || ranges.iter().any(|r| r.prefix_len() == 0) {
            return NodePortMatch::AllLocal;
        }
        let inside = |a: &&IpAddr| ranges.iter().any(|r| r.contains(*a)) && !a.is_loopback();
        let mut addresses: BTreeSet<IpAddr> = local.iter().filter(inside).copied().collect();
        addresses.extend(self.primary_address(family).filter(|_| primary));
        NodePortMatch::Addresses(addresses)
    }
}

/// Those of a family.
fn of_family(ranges: &[IpNet], family: IpFamily) -> Vec<IpNet> {
    ranges.iter().copied().filter(|range| IpFamily::of(range.addr()) == family).collect()
}

/// Compiles one Service for one family; `None` when it has no cluster IP of that family, without
/// which it takes no part in it (kube-proxy's rule).
pub fn compile_service(
    service: &Service,
    slices: &[&Arc<EndpointSlice>],
    family: IpFamily,
    context: &Context,
) -> Option<ServiceEntry> {
    let cluster_ip = service.cluster_ips.iter().copied().find(|a| IpFamily::of(*a) == family)?;
    let ports = service.ports.iter().map(|port| compile_port(service, port, slices, family, context));
    Some(ServiceEntry {
        name: service.name.clone(),
        created: service.created,
        cluster_ip,
        health_check_node_port: service.health_check_node_port,
        ports: ports.collect(),
    })
}

fn compile_port(
    service: &Service,
    port: &ServicePort,
    slices: &[&Arc<EndpointSlice>],
    family: IpFamily,
    context: &Context,
) -> PortEntry {
    let addresses = frontend_addresses(service, family, context.config.allow_external_ips);
    let externally_accessible = port.node_port.is_some()
        || addresses
            .values()
            .any(|kind| matches!(kind, FrontendKind::ExternalIp | FrontendKind::LoadBalancer));
    let internal_local = service.internal_policy == TrafficPolicy::Local;
    let external_local = service.external_policy == TrafficPolicy::Local;
    let uses_cluster = !internal_local || externally_accessible;
    let uses_local = internal_local || (external_local && externally_accessible);

    let candidates =
        endpoints::merge(slices.iter().copied(), family, &port.name, port.protocol, &context.node_name);
    let usable = endpoints::categorize(&candidates, uses_cluster, uses_local, context);
    let no_local = usable.local.as_ref().is_none_or(|g| g.is_empty());

    let detector = context.config.local_detector.for_family(family);
    let internal = internal_verdicts(
        service.internal_policy,
        usable.any,
        no_local,
        context.config.masquerade_all,
        &detector,
    );
    let external = external_verdicts(service.external_policy, usable.any, no_local);
    let guard = source_ranges(service, family, context);

    let algorithm = |kind| match kind {
        FrontendKind::ClusterIp => service.algorithm.unwrap_or_default(),
        _ => service.algorithm.unwrap_or(context.config.external_algorithm),
    };

    let mut frontends: Vec<FrontendEntry> = addresses
        .into_iter()
        .map(|(address, kind)| FrontendEntry {
            frontend: Frontend { address: Some(address), protocol: port.protocol, port: port.port },
            kind,
            verdicts: if kind == FrontendKind::ClusterIp { internal } else { external },
            source_ranges: guard.clone().filter(|_| kind == FrontendKind::LoadBalancer),
            algorithm: algorithm(kind),
        })
        .collect();
    frontends.extend(port.node_port.map(|node_port| FrontendEntry {
        frontend: Frontend { address: None, protocol: port.protocol, port: node_port },
        kind: FrontendKind::NodePort,
        verdicts: external,
        source_ranges: None,
        algorithm: algorithm(FrontendKind::NodePort),
    }));
    frontends.sort_by_key(|f| (f.kind, f.frontend));

    let terminating =
        if port.protocol == crate::id::Protocol::Udp { usable.terminating(&candidates) } else { [].into() };
    PortEntry {
        name: ServicePortName {
            service: service.name.clone(),
            port: port.name.clone(),
            protocol: port.protocol,
        },
        listed: if context.config.keep_listed { usable.unused(&candidates, &terminating) } else { [].into() },
        terminating,
        cluster: usable.cluster,
        local: usable.local,
        has_any_endpoints: usable.any,
        affinity: service.affinity,
        scheduler: service.scheduler.clone().or_else(|| context.config.scheduler.clone()),
        frontends,
    }
}

/// The addresses of a Service with what they are. An address that is several things at once is the
/// most guarded one: a load-balancer VIP keeps its source ranges even if it is an external IP too.
fn frontend_addresses(
    service: &Service,
    family: IpFamily,
    external_ips: bool,
) -> BTreeMap<IpAddr, FrontendKind> {
    let mut addresses = BTreeMap::new();
    let externals = service.external_ips.iter().filter(|_| external_ips);
    for (list, kind) in externals
        .map(|a| (a, FrontendKind::ExternalIp))
        .chain(service.load_balancer_ips.iter().map(|a| (a, FrontendKind::LoadBalancer)))
        .chain(service.cluster_ips.iter().map(|a| (a, FrontendKind::ClusterIp)))
    {
        if IpFamily::of(*list) == family {
            addresses.insert(*list, kind);
        }
    }
    addresses
}

fn internal_verdicts(
    policy: TrafficPolicy,
    any: bool,
    no_local: bool,
    masquerade_all: bool,
    detector: &LocalDetector,
) -> [Verdict; 3] {
    if !any {
        return [Verdict::Reject; 3];
    }
    if policy == TrafficPolicy::Local && no_local {
        return [Verdict::Drop; 3];
    }
    // Traffic from outside the cluster must come back through this node. Without a way to tell
    // what is outside, nothing is masqueraded (kube-proxy's documented limitation).
    let off_cluster = masquerade_all || *detector != LocalDetector::None;
    let forward = |masquerade| Verdict::Forward { policy, masquerade };
    [forward(masquerade_all), forward(off_cluster), forward(off_cluster)]
}

fn external_verdicts(policy: TrafficPolicy, any: bool, no_local: bool) -> [Verdict; 3] {
    if !any {
        return [Verdict::Reject; 3];
    }
    let forward = |policy, masquerade| Verdict::Forward { policy, masquerade };
    match policy {
        TrafficPolicy::Cluster => [forward(TrafficPolicy::Cluster, true); 3],
        // Pods and the node itself are short-circuited to the whole cluster list: for them the
        // address means the Service, not this node's share of it.
        TrafficPolicy::Local => [
            forward(TrafficPolicy::Cluster, false),
            forward(TrafficPolicy::Cluster, true),
            if no_local { Verdict::Drop } else { forward(TrafficPolicy::Local, false) },
        ],
    }
}

/// The source ranges of one family; `None` when everything may pass. Ranges are filtered by family
/// first, so that a list with none of this family guards nothing (kube-proxy's rule).
fn source_ranges(service: &Service, family: IpFamily, context: &Context) -> Option<Arc<SourceRanges>> {
    let of_family: Vec<IpNet> =
        service.source_ranges.iter().filter(|r| IpFamily::of(r.addr()) == family).map(IpNet::trunc).collect();
    if of_family.is_empty() || of_family.iter().any(|r| r.prefix_len() == 0) {
        return None;
    }
    let node = context.primary_address(family);
    let allow_vip_source = node.is_some_and(|node| of_family.iter().any(|r| r.contains(&node)));
    let ranges = IpNet::aggregate(&of_family).into_iter().collect();
    Some(Arc::new(SourceRanges { ranges, allow_vip_source }))
}

/// A family in which a Service's load-balancer VIPs are open to everybody although it has source
/// ranges: none of them is of that family. This is kube-proxy's meaning, and rarely what is meant.
pub fn unguarded_family(service: &Service) -> Option<IpFamily> {
    let any = |list: &[IpAddr], family| list.iter().any(|a| IpFamily::of(*a) == family);
    IpFamily::ALL.into_iter().find(|family| {
        !service.source_ranges.is_empty()
            && service.source_ranges.iter().all(|r| IpFamily::of(r.addr()) != *family)
            && any(&service.load_balancer_ips, *family)
            && any(&service.cluster_ips, *family)
    })
}

/// Keeps both families' tables up to date with the store.
#[derive(Clone, Debug)]
pub struct Compiler {
    context: Context,
    tables: [ForwardingTable; 2],
}

impl Compiler {
    /// A compiler with empty tables.
    pub fn new(context: Context) -> Self {
        let tables = IpFamily::ALL.map(|family| {
            let mut table = ForwardingTable::new(family);
            table.set_node(context.facts(family));
            table
        });
        Self { context, tables }
    }

    /// Compiles everything in a store.
    pub fn full(context: Context, store: &Store) -> Self {
        let context = context.with_node(store.node());
        let mut compiler = Self::new(context);
        compiler.set_service_cidrs(store);
        let names: Vec<_> = store.services().map(|s| s.name.clone()).collect();
        for name in &names {
            for (table, entry) in compiler.tables.iter_mut().zip(compile_both(name, store, &compiler.context))
            {
                table.update(name, entry);
            }
        }
        compiler
    }

    /// The table of a family.
    pub const fn table(&self, family: IpFamily) -> &ForwardingTable {
        &self.tables[family as usize]
    }

    /// What the compiler knows of this node.
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Takes in what changed in the store and answers what changed in the tables (IPv4, IPv6).
    pub fn update(&mut self, store: &Store, dirty: &Dirty) -> [Change; 2] {
        let mut changes: [Change; 2] = Default::default();
        if dirty.node {
            let context = self.context.clone().with_node(store.node());
            merge_into(&mut changes, self.set_context(context, store));
        }
        if dirty.service_cidrs {
            merge_into(&mut changes, self.set_service_cidrs(store));
        }
        for name in &dirty.services {
            merge_into(&mut changes, self.compile_one(name, store));
        }
        changes
    }

    /// Takes in what changed about the node; recompiles what depends on it.
    pub fn set_context(&mut self, context: Context, store: &Store) -> [Change; 2] {
        if context == self.context {
            return Default::default();
        }
        // Interface addresses say where NodePorts answer, nothing about Services.
        let services_differ = Context { interface_addresses: BTreeSet::new(), ..context.clone() }
            != Context { interface_addresses: BTreeSet::new(), ..self.context.clone() };
        self.context = context;
        let mut changes =
            IpFamily::ALL.map(|family| self.tables[family as usize].set_node(self.context.facts(family)));
        if services_differ {
            let names: Vec<_> = store.services().map(|s| s.name.clone()).collect();
            for name in &names {
                merge_into(&mut changes, self.compile_one(name, store));
            }
        }
        changes
    }

    fn set_service_cidrs(&mut self, store: &Store) -> [Change; 2] {
        let ranges: Vec<IpNet> = store.service_cidrs().values().flatten().copied().collect();
        [0, 1].map(|i| self.tables[i].set_service_cidrs(ranges.iter().copied()))
    }

    fn compile_one(&mut self, name: &crate::id::NamespacedName, store: &Store) -> [Change; 2] {
        let [v4, v6] = compile_both(name, store, &self.context);
        [self.tables[0].update(name, v4), self.tables[1].update(name, v6)]
    }
}

fn compile_both(
    name: &crate::id::NamespacedName,
    store: &Store,
    context: &Context,
) -> [Option<ServiceEntry>; 2] {
    let service = store.service(name);
    let slices: Vec<&Arc<EndpointSlice>> = store.slices(name).collect();
    IpFamily::ALL.map(|family| compile_service(service?, &slices, family, context))
}

fn merge_into(changes: &mut [Change; 2], more: [Change; 2]) {
    for (change, more) in changes.iter_mut().zip(more) {
        change.merge(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_answer_where_the_setting_says() {
        let nets = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpNet>>();
        let of = |setting: NodePortAddresses| {
            let mut context = Context::new("n", Config { node_port_addresses: setting, ..Config::default() });
            context.node_addresses = ["192.0.2.1", "2001:db8::1"].map(|a| a.parse().unwrap()).to_vec();
            context.interface_addresses =
                ["127.0.0.1", "192.0.2.1", "10.0.0.1", "fd00::1"].map(|a| a.parse().unwrap()).into();
            IpFamily::ALL.map(|family| match context.facts(family).node_ports {
                NodePortMatch::AllLocal => "all".to_owned(),
                NodePortMatch::Addresses(addresses) => {
                    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
                }
            })
        };
        assert_eq!(of(NodePortAddresses::Primary), ["192.0.2.1", "2001:db8::1"]);
        assert_eq!(of(NodePortAddresses::All), ["all", "all"]);
        assert_eq!(of(NodePortAddresses::Ranges(nets(&["10.0.0.0/8"]))), ["10.0.0.1", "all"]);
        assert_eq!(of(NodePortAddresses::Ranges(nets(&["127.0.0.0/8", "fd00::/8"]))), ["", "fd00::1"]);
        let and = |texts: &[&str]| of(NodePortAddresses::PrimaryAnd(nets(texts)));
        assert_eq!(and(&["10.0.0.0/8"]), ["10.0.0.1 192.0.2.1", "2001:db8::1"]);
        assert_eq!(and(&["127.0.0.0/8", "fd00::/8"]), ["192.0.2.1", "2001:db8::1 fd00::1"]);
        assert_eq!(and(&["0.0.0.0/0"]), ["all", "2001:db8::1"]);
    }

    /// Where kube-proxy lets loopback answer.
    #[test]
    fn loopback_answers_in_ipv4_where_it_is_included_and_wanted() {
        let ranges = |texts: &[&str]| {
            NodePortAddresses::Ranges(texts.iter().map(|text| text.parse().unwrap()).collect())
        };
        for (node_port_addresses, wanted, answers) in [
            (NodePortAddresses::All, true, true),
            (NodePortAddresses::All, false, false),
            (NodePortAddresses::Primary, true, false),
            (ranges(&["192.0.2.0/24", "127.0.0.0/8"]), true, true),
            (ranges(&["127.0.0.0/8"]), false, false),
            (ranges(&["192.0.2.0/24"]), true, false),
            // Ranges of the other family alone say nothing of this one.
            (ranges(&["2001:db8::/64"]), true, true),
            (ranges(&["2001:db8::/64", "192.0.2.0/24"]), true, false),
        ] {
            let config = Config { node_port_addresses, localhost_node_ports: wanted, ..Config::default() };
            let context = Context::new("node", config);
            let facts = context.facts(IpFamily::V4);
            assert_eq!(facts.localhost_node_ports, answers, "{:?}", context.config);
            assert!(!facts.drop_invalid);
            assert!(!context.facts(IpFamily::V6).localhost_node_ports);
        }
        let config = Config { drop_invalid: true, ..Config::default() };
        assert!(
            IpFamily::ALL.map(|family| Context::new("node", config.clone()).facts(family).drop_invalid)
                == [true; 2]
        );
    }
}
