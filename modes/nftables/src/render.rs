//! From the forwarding table to what the maps should hold. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::service::TrafficPolicy;
use shunt_core::table::{
    Change, EndpointGroup, ForwardingTable, Frontend, FrontendEntry, LocalEndpoint, NodeFacts, NodePortMatch,
    PortEntry, SourceRanges, Target, Verdict,
};

use crate::affinity::port_label;
use crate::layout::{Class, LIST_MAX, Leg, List, uses};

/// What one frontend should get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dispatch {
    /// Its class.
    pub class: Class,
    /// The endpoints of both lists, in no particular order of slots.
    pub lists: [EndpointGroup; 2],
    /// Sources that may use it; `None` for all.
    pub guard: Option<Arc<SourceRanges>>,
    /// With session affinity, the Service port in [`Desired::affinity`] and the legs to its lists. What
    /// is said above then only counts if no id is left for the port.
    pub affinity: Option<(Arc<str>, [Leg; 3])>,
}

/// What a Service port with session affinity should get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AffinityPort {
    /// Its protocol.
    pub protocol: Protocol,
    /// How long a client is remembered after its last new connection.
    pub timeout: Duration,
    /// The endpoints of the Cluster and of the Local policy.
    pub lists: [EndpointGroup; 2],
}

impl Dispatch {
    /// The endpoints of a list that the class counts.
    pub fn list(&self, list: List) -> &[Target] {
        let count = self.class.count(list) as usize;
        self.lists[list as usize].get(..count).unwrap_or_default()
    }
}

/// What the kernel should hold, for the part of the table that a change touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired {
    /// The family.
    pub family: IpFamily,
    /// Everything is listed below: what is not listed should not be there.
    pub everything: bool,
    /// False when the table asks for nothing at all: then no packet should pass through our rules.
    pub active: bool,
    /// What is known of the node.
    pub node: NodeFacts,
    /// Ranges of cluster IPs.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Frontends in question; `None` for one that should not be there.
    pub frontends: BTreeMap<Frontend, Option<Dispatch>>,
    /// Cluster IPs in question, and whether they should be there.
    pub cluster_ips: BTreeMap<IpAddr, bool>,
    /// Local endpoints in question, and whether they should be there.
    pub hairpins: BTreeMap<LocalEndpoint, bool>,
    /// Service ports with session affinity to which frontends in question belong.
    pub affinity: BTreeMap<Arc<str>, AffinityPort>,
}

impl Desired {
    /// The same with classes that name the ids of Service ports with affinity.
    #[must_use]
    pub fn with_ids(&self, ids: &BTreeMap<&str, u32>) -> Self {
        let none: EndpointGroup = Arc::from([]);
        let mut desired = self.clone();
        for dispatch in desired.frontends.values_mut().flatten() {
            if let Some((port, legs)) = &dispatch.affinity
                && let Some(id) = ids.get(&**port)
            {
                dispatch.class = Class::Affinity { id: *id, legs: *legs };
                dispatch.lists = [none.clone(), none.clone()];
            }
        }
        desired
    }

    /// Addresses that the set for node ports should hold; none when the kernel itself is asked for
    /// what is local.
    pub fn node_port_ips(&self) -> BTreeSet<IpAddr> {
        match &self.node.node_ports {
            NodePortMatch::AllLocal => BTreeSet::new(),
            NodePortMatch::Addresses(addresses) => addresses.clone(),
        }
    }
}

/// What the kernel should hold for the part of `table` that `change` touches.
pub fn render(table: &ForwardingTable, change: &Change) -> Desired {
    let mut affinity = BTreeMap::new();
    let mut dispatch = |port: &PortEntry, entry: &FrontendEntry| {
        let mut dispatch = dispatch(port, entry);
        if let Some(timeout) = port.affinity
            && matches!(dispatch.class, Class::Pick { .. })
        {
            let name: Arc<str> = port_label(&port.name).into();
            affinity.entry(name.clone()).or_insert_with(|| affinity_port(table, port, timeout));
            dispatch.affinity = Some((name, affinity_legs(port, entry)));
        }
        dispatch
    };
    let (frontends, cluster_ips, hairpins) = if change.everything {
        (
            table.frontends().map(|(port, entry)| (entry.frontend, Some(dispatch(port, entry)))).collect(),
            table.cluster_ips().map(|ip| (ip, true)).collect(),
            table.local_endpoints().map(|e| (e, true)).collect(),
        )
    } else {
        (
            change
                .frontends
                .iter()
                .map(|f| (*f, table.frontend(f).map(|(port, entry)| dispatch(port, entry))))
                .collect(),
            change.cluster_ips.iter().map(|ip| (*ip, table.is_cluster_ip(*ip))).collect(),
            change.local_endpoints.iter().map(|e| (*e, table.is_local_endpoint(e))).collect(),
        )
    };
    Desired {
        family: table.family(),
        everything: change.everything,
        active: !table.is_empty() || !table.service_cidrs().is_empty(),
        node: table.node().clone(),
        service_cidrs: table.service_cidrs().clone(),
        frontends,
        cluster_ips,
        hairpins,
        affinity,
    }
}

/// What a Service port with affinity should get.
fn affinity_port(table: &ForwardingTable, port: &PortEntry, timeout: Duration) -> AffinityPort {
    // Two ports of one name are nothing that the API server lets pass; if they are there, each may use
    // other policies.
    let service = table.service(&port.name.service);
    let same = || service.into_iter().flat_map(|s| &s.ports).filter(|p| p.name == port.name);
    let none = || EndpointGroup::from([]);
    let lists = [
        same().find_map(|p| p.cluster.clone()).unwrap_or_else(none),
        same().find_map(|p| p.local.clone()).unwrap_or_else(none),
    ];
    AffinityPort { protocol: port.name.protocol, timeout, lists }
}

/// The legs of a frontend with affinity: the first list is always that of the Cluster policy.
fn affinity_legs(port: &PortEntry, entry: &FrontendEntry) -> [Leg; 3] {
    entry.verdicts.map(|verdict| match verdict {
        Verdict::Forward { policy, masquerade } if !port.group(policy).is_empty() => Leg::Pick {
            list: match policy {
                TrafficPolicy::Cluster => List::First,
                TrafficPolicy::Local => List::Second,
            },
            masquerade,
        },
        Verdict::Forward { .. } | Verdict::Drop | Verdict::Reject => Leg::Drop,
    })
}

/// What a frontend should get: its verdicts become legs, its groups become lists.
fn dispatch(port: &PortEntry, entry: &FrontendEntry) -> Dispatch {
    let none: EndpointGroup = Arc::from([]);
    let guard = entry.source_ranges.clone();
    if entry.verdicts == [Verdict::Reject; 3] {
        return Dispatch { class: Class::Reject, lists: [none.clone(), none], guard, affinity: None };
    }
    let group = |policy| match policy {
        TrafficPolicy::Cluster => port.cluster.clone(),
        TrafficPolicy::Local => port.local.clone(),
    };
    let used = |policy| {
        entry.verdicts.iter().any(|v| matches!(v, Verdict::Forward { policy: p, .. } if *p == policy))
    };
    // The first list is the cluster's where it is used at all.
    let first = if used(TrafficPolicy::Cluster) { TrafficPolicy::Cluster } else { TrafficPolicy::Local };
    let list_of = |policy| if policy == first { List::First } else { List::Second };
    let lists = [
        group(first).unwrap_or_else(|| none.clone()),
        if first == TrafficPolicy::Cluster && used(TrafficPolicy::Local) {
            group(TrafficPolicy::Local).unwrap_or_else(|| none.clone())
        } else {
            none
        },
    ];
    let legs = entry.verdicts.map(|verdict| match verdict {
        Verdict::Forward { policy, masquerade } if !lists[list_of(policy) as usize].is_empty() => {
            Leg::Pick { list: list_of(policy), masquerade }
        }
        // A group that is empty cannot be forwarded to.
        Verdict::Forward { .. } | Verdict::Drop | Verdict::Reject => Leg::Drop,
    });
    let both = uses(legs, List::First) && uses(legs, List::Second);
    let most = if both { Class::SPLIT_MAX } else { LIST_MAX };
    let counts =
        List::ALL.map(|list| if uses(legs, list) { lists[list as usize].len().min(most) as u32 } else { 0 });
    let class = if counts == [0, 0] {
        Class::Drop
    } else {
        Class::Pick { node_port: entry.frontend.address.is_none(), legs, counts }
    };
    Dispatch { class, lists, guard, affinity: None }
}
