//! From the forwarding table to what should be there. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ipvs_netlink::{Flags, Persistence, Service};
use shunt_core::id::{IpFamily, Protocol, ServicePortName};
use shunt_core::node::LocalDetector;
use shunt_core::service::TrafficPolicy;
use shunt_core::table::{
    Change, ForwardingTable, Frontend, FrontendEntry, FrontendKind, LocalEndpoint, NodeFacts, PortEntry,
    SourceRanges, Target, Verdict,
};

use crate::layout::{Place, SetName};
use crate::scheduler;

/// What should be at a place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The Service port, for messages.
    pub owner: ServicePortName,
    /// The virtual server by address.
    pub service: Service,
    /// Its destinations.
    pub destinations: BTreeSet<SocketAddr>,
    /// Destinations for pods and the node, where those have others: a second virtual server, by mark.
    pub inside: Option<BTreeSet<SocketAddr>>,
    /// Sets of `hash:ip,port` that the place is in.
    pub sets: BTreeSet<SetName>,
    /// Sources that may use it; `None` for all.
    pub guard: Option<Arc<SourceRanges>>,
}

impl Wanted {
    /// The second virtual server, but for its key.
    ///
    /// A persistent one by mark keeps the port that the packet came for (`ip_vs_sched_persist`), which is
    /// seldom the endpoint's. So session affinity is by consistent hashing here: clients keep their
    /// endpoint as long as it is there.
    pub fn inside_service(&self) -> Service {
        let mut service = self.service.clone();
        if service.persistence.take().is_some() {
            service.scheduler = String::from(scheduler::AFFINE);
            service.flags.scheduler = [true, false, false];
        }
        service
    }
}

/// What the kernel should hold, for the part of the table that a change touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired {
    /// The family.
    pub family: IpFamily,
    /// Everything is listed below: what is not listed should not be there.
    pub everything: bool,
    /// False when the table asks for nothing at all.
    pub active: bool,
    /// What is known of the node.
    pub node: NodeFacts,
    /// Ranges of cluster IPs, as a set takes them.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Places in question.
    pub places: BTreeMap<Place, Option<Wanted>>,
    /// TCP and UDP node ports in question: `Some(true)` for those whose traffic from outside goes to
    /// local endpoints.
    pub node_ports: BTreeMap<(Protocol, u16), Option<bool>>,
    /// Health check node ports in question, and whether they should be open.
    pub health_checks: BTreeMap<u16, bool>,
    /// Addresses in question, and whether they should be on the dummy link.
    pub addresses: BTreeMap<IpAddr, bool>,
    /// Local endpoints in question, and whether they should be there.
    pub loopbacks: BTreeMap<LocalEndpoint, bool>,
}

/// What the kernel should hold for the part of `table` that `change` touches.
pub fn render(table: &ForwardingTable, change: &Change) -> Desired {
    let active = !table.is_empty() || !table.service_cidrs().is_empty();
    // Which addresses are the node's decides which VIPs are on the link and where node ports answer.
    let everything = change.everything || !change.node_addresses.is_empty() || !active;
    let node_port_addresses = table.node().node_port_addresses();
    let mut desired = Desired {
        family: table.family(),
        everything,
        active,
        node: table.node().clone(),
        service_cidrs: table.service_cidrs().iter().flat_map(|range| settable(*range)).collect(),
        places: BTreeMap::new(),
        node_ports: BTreeMap::new(),
        health_checks: BTreeMap::new(),
        addresses: BTreeMap::new(),
        loopbacks: BTreeMap::new(),
    };
    let frontends: Vec<Frontend> = if everything {
        table.frontends().map(|(_, entry)| entry.frontend).collect()
    } else {
        change.frontends.iter().copied().collect()
    };
    for frontend in frontends {
        let Frontend { address, protocol, port } = frontend;
        if let Some(address) = address {
            desired.place(table, Place { address, protocol, port });
            desired.address(table, address);
        } else {
            for address in &node_port_addresses {
                desired.place(table, Place { address: *address, protocol, port });
            }
            if protocol != Protocol::Sctp {
                let local =
                    table.frontend(&frontend).map(|(_, entry)| shape(entry, table.node()) == Shape::Local);
                desired.node_ports.insert((protocol, port), local);
            }
        }
    }
    if everything {
        table.cluster_ips().for_each(|ip| desired.address(table, ip));
        desired.loopbacks.extend(table.local_endpoints().map(|e| (e, true)));
        desired.health_checks.extend(table.health_check_node_ports().map(|(port, _)| (port, true)));
    } else {
        change.cluster_ips.iter().for_each(|ip| desired.address(table, *ip));
        let touched = change.local_endpoints.iter();
        desired.loopbacks.extend(touched.map(|e| (*e, table.is_local_endpoint(e))));
        let touched = change.health_check_node_ports.iter();
        desired.health_checks.extend(touched.map(|port| (*port, table.is_health_check_node_port(*port))));
    }
    desired
}

impl Desired {
    fn place(&mut self, table: &ForwardingTable, place: Place) {
        let exact = Frontend { address: Some(place.address), protocol: place.protocol, port: place.port };
        let node_port = || {
            let serves = table.node().serves_node_ports(place.address);
            serves.then(|| table.frontend(&Frontend { address: None, ..exact })).flatten()
        };
        let found = table.frontend(&exact).or_else(node_port);
        let wanted = found.map(|(port, entry)| wanted(&place, port, entry, table.node()));
        self.places.insert(place, wanted);
    }

    fn address(&mut self, table: &ForwardingTable, address: IpAddr) {
        let wanted = (table.is_cluster_ip(address) || table.has_frontends_at(address))
            && !table.node().is_local(address)
            && bindable(address);
        self.addresses.insert(address, wanted);
    }
}

/// Whether an interface can have an address.
const fn bindable(address: IpAddr) -> bool {
    !address.is_unspecified()
        && !address.is_multicast()
        && !matches!(address, IpAddr::V4(a) if a.is_broadcast())
}

/// Sets take no prefix of length 0: two halves stand for it.
fn settable(range: IpNet) -> Vec<IpNet> {
    if range.prefix_len() > 0 {
        return vec![range.trunc()];
    }
    match range {
        IpNet::V4(_) => Ipv4Net::default().subnets(1).into_iter().flatten().map(IpNet::V4).collect(),
        IpNet::V6(_) => Ipv6Net::default().subnets(1).into_iter().flatten().map(IpNet::V6).collect(),
    }
}

/// Which of the ways that the skeleton knows a frontend's verdicts are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    /// Refused, whoever asks.
    Reject,
    /// Discarded, whoever asks.
    Drop,
    /// A cluster IP: one list for all, masqueraded as the node's settings say.
    Internal(TrafficPolicy),
    /// From outside to all endpoints, masqueraded.
    Cluster,
    /// From outside to local endpoints or nowhere, from pods and the node to all.
    Local,
}

/// What is none of the known ways is discarded: it cannot be forwarded as it should.
fn shape(entry: &FrontendEntry, node: &NodeFacts) -> Shape {
    use TrafficPolicy::{Cluster, Local};
    let forward = |policy, masquerade| Verdict::Forward { policy, masquerade };
    let verdicts = entry.verdicts;
    if verdicts == [Verdict::Reject; 3] {
        return Shape::Reject;
    }
    if entry.kind == FrontendKind::ClusterIp {
        let outside = node.masquerade_all || node.local_detector != LocalDetector::None;
        let internal = |policy| {
            [forward(policy, node.masquerade_all), forward(policy, outside), forward(policy, outside)]
        };
        return [Cluster, Local]
            .into_iter()
            .find(|policy| verdicts == internal(*policy))
            .map_or(Shape::Drop, Shape::Internal);
    }
    let [pod, node, other] = verdicts;
    if verdicts == [forward(Cluster, true); 3] {
        Shape::Cluster
    } else if pod == forward(Cluster, false)
        && node == forward(Cluster, true)
        && (other == forward(Local, false) || other == Verdict::Drop)
    {
        Shape::Local
    } else {
        Shape::Drop
    }
}

fn sockets(group: &[Target]) -> BTreeSet<SocketAddr> {
    group.iter().map(|t| SocketAddr::new(t.address, t.port)).collect()
}

fn wanted(place: &Place, port: &PortEntry, entry: &FrontendEntry, node: &NodeFacts) -> Wanted {
    let shape = shape(entry, node);
    let other = entry.verdicts[2];
    let (destinations, inside) = match shape {
        Shape::Reject | Shape::Drop => (BTreeSet::new(), None),
        Shape::Internal(policy) => (sockets(port.group(policy)), None),
        Shape::Cluster => (sockets(port.group(TrafficPolicy::Cluster)), None),
        Shape::Local => {
            let local = if other == Verdict::Drop { &[] } else { port.group(TrafficPolicy::Local) };
            (sockets(local), Some(sockets(port.group(TrafficPolicy::Cluster))))
        }
    };
    let mut sets = BTreeSet::new();
    let local = shape == Shape::Local;
    match entry.kind {
        FrontendKind::ClusterIp => {
            sets.insert(SetName::ClusterIp);
        }
        FrontendKind::ExternalIp if local => {
            sets.insert(SetName::ExternalIpLocal);
        }
        FrontendKind::ExternalIp => {
            sets.insert(SetName::ExternalIp);
        }
        FrontendKind::LoadBalancer => {
            sets.insert(SetName::LoadBalancer);
            sets.extend(local.then_some(SetName::LoadBalancerLocal));
        }
        FrontendKind::NodePort if place.protocol == Protocol::Sctp => {
            let [all, only_local] = SetName::node_ports(place.protocol);
            sets.insert(all);
            sets.extend(local.then_some(only_local));
        }
        FrontendKind::NodePort => {}
    }
    if shape == Shape::Drop || (local && other == Verdict::Drop) {
        sets.insert(SetName::NoLocal);
    }
    if entry.source_ranges.is_some() {
        sets.insert(SetName::LoadBalancerFw);
    }
    let asked = port.scheduler.as_ref();
    let mut service = Service::new(place.key(), asked.map_or(scheduler::DEFAULT, |s| &*s.name));
    let [first, second, third] = asked.map(|s| s.flags).unwrap_or_default();
    // With mh the port counts as well as the address, as kube-proxy has it.
    let scheduler_flags = [first, second || service.scheduler == "mh", third];
    service.flags = Flags { one_packet: false, scheduler: scheduler_flags };
    service.persistence = port.affinity.map(|timeout| Persistence {
        timeout: u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1),
        prefix: if place.address.is_ipv4() { 32 } else { 128 },
    });
    let owner = port.name.clone();
    Wanted { owner, service, destinations, inside, sets, guard: entry.source_ranges.clone() }
}
