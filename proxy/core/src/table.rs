//! The forwarding table: the compiler's only output and the modes' only input.
//!
//! ```text
//!   Frontend ──claims──> FrontendEntry ──verdict per class of source──> EndpointGroup
//!   (ip:port/proto)      (of one Service port)    (Cluster or Local)    (ip:port, ip:port, ...)
//! ```
//!
//! One table per IP family. It is made of one [`ServiceEntry`] per Service, shared with the
//! generation before, so that a change of one Service costs what that Service costs.

mod display;
mod entry;
mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::id::{IpFamily, NamespacedName, Protocol};

pub use entry::{
    EndpointGroup, Frontend, FrontendEntry, FrontendKind, LocalEndpoint, PortEntry, ServiceEntry,
    SourceClass, SourceRanges, Target, Verdict,
};
pub use node::{NodeFacts, NodePortMatch};

/// Who wants a frontend. Ordered: the oldest Service first, then by name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    created: i64,
    service: NamespacedName,
    port: usize,
    entry: usize,
}

/// The claims to one frontend: the best one holds it. Nearly always there is only one.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Claims {
    holder: Claim,
    waiting: Vec<Claim>,
}

/// Two Services claim the same frontend.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Conflict {
    /// What they both claim.
    pub frontend: Frontend,
    /// Who holds it.
    pub holder: NamespacedName,
    /// Who does not get it.
    pub loser: NamespacedName,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Service {}: {} is already served by the older Service {}; ignored here",
            self.loser, self.frontend, self.holder
        )
    }
}

/// What a change of the table touches. Modes look at nothing else.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Look at everything: at start, after an error, or because facts of the node changed.
    pub everything: bool,
    /// Frontends that may have changed.
    pub frontends: BTreeSet<Frontend>,
    /// Cluster IPs that may have come or gone.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// Local endpoints that may have come or gone.
    pub local_endpoints: BTreeSet<LocalEndpoint>,
    /// Addresses of the node that came or went. Modes that ask the kernel for them need not look.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Health check node ports that may have come or gone.
    pub health_check_node_ports: BTreeSet<u16>,
}

impl Change {
    /// The change that touches everything.
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// True when nothing is touched.
    pub fn is_empty(&self) -> bool {
        !self.everything
            && self.frontends.is_empty()
            && self.cluster_ips.is_empty()
            && self.local_endpoints.is_empty()
            && self.node_addresses.is_empty()
            && self.health_check_node_ports.is_empty()
    }

    /// Adds what another change touches.
    pub fn merge(&mut self, other: Self) {
        self.everything |= other.everything;
        self.frontends.extend(other.frontends);
        self.cluster_ips.extend(other.cluster_ips);
        self.local_endpoints.extend(other.local_endpoints);
        self.node_addresses.extend(other.node_addresses);
        self.health_check_node_ports.extend(other.health_check_node_ports);
    }
}

/// All Services of one IP family on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForwardingTable {
    family: IpFamily,
    node: NodeFacts,
    services: BTreeMap<NamespacedName, Arc<ServiceEntry>>,
    frontends: BTreeMap<Frontend, Claims>,
    cluster_ips: BTreeMap<IpAddr, u32>,
    local_endpoints: BTreeMap<LocalEndpoint, u32>,
    health_check_node_ports: BTreeMap<u16, BTreeSet<NamespacedName>>,
    service_cidrs: BTreeSet<IpNet>,
}

impl ForwardingTable {
    /// An empty table.
    pub fn new(family: IpFamily) -> Self {
        Self {
            family,
            node: NodeFacts::unknown(),
            services: BTreeMap::new(),
            frontends: BTreeMap::new(),
            cluster_ips: BTreeMap::new(),
            local_endpoints: BTreeMap::new(),
            health_check_node_ports: BTreeMap::new(),
            service_cidrs: BTreeSet::new(),
        }
    }

    /// The table's family.
    pub const fn family(&self) -> IpFamily {
        self.family
    }

    /// What is known of the node.
    pub const fn node(&self) -> &NodeFacts {
        &self.node
    }

    /// Replaces what is known of the node. Addresses that came or went are only named, since most modes
    /// ask the kernel which addresses are local: those of every new pod's interface come and go.
    pub fn set_node(&mut self, node: NodeFacts) -> Change {
        let local_addresses = self.node.local_addresses.clone();
        let same = NodeFacts { local_addresses: local_addresses.clone(), ..node.clone() } == self.node;
        let node_addresses = local_addresses.symmetric_difference(&node.local_addresses).copied().collect();
        self.node = node;
        if same { Change { node_addresses, ..Change::default() } } else { Change::everything() }
    }

    /// Ranges from which cluster IPs are allocated, of this family.
    pub const fn service_cidrs(&self) -> &BTreeSet<IpNet> {
        &self.service_cidrs
    }

    /// Replaces the ranges from which cluster IPs are allocated; other families are left out.
    pub fn set_service_cidrs(&mut self, ranges: impl IntoIterator<Item = IpNet>) -> Change {
        let ranges: BTreeSet<IpNet> =
            IpNet::aggregate(&ranges.into_iter().filter(|r| IpFamily::of(r.addr()) == self.family).collect())
                .into_iter()
                .collect();
        if self.service_cidrs == ranges {
            return Change::default();
        }
        self.service_cidrs = ranges;
        Change::everything()
    }

    /// Puts in, replaces or takes out what one Service contributes.
    pub fn update(&mut self, name: &NamespacedName, entry: Option<ServiceEntry>) -> Change {
        let mut change = Change::default();
        let old = self.services.get(name).cloned();
        if old.as_deref() == entry.as_ref() {
            return change;
        }
        let new = entry.map(Arc::new);
        self.update_health_check(name, old.as_deref(), new.as_deref(), &mut change);
        if let Some(old) = &old {
            self.retract(old, &mut change);
        }
        if let Some(new) = &new {
            self.claim(new, &mut change);
        }
        // Frontends whose port is the same before and after need no second look.
        if let (Some(old), Some(new)) = (&old, &new)
            && old.created == new.created
        {
            let (same, others) = common_ports(&old.ports, &new.ports);
            // Two ports of one Service may claim the same frontend, where the API server was not asked.
            let others: BTreeSet<Frontend> = others.map(|f| f.frontend).collect();
            for frontend in same.map(|f| f.frontend).filter(|f| !others.contains(f)) {
                change.frontends.remove(&frontend);
            }
        }
        match new {
            Some(new) => self.services.insert(name.clone(), new),
            None => self.services.remove(name),
        };
        change.cluster_ips.retain(|ip| {
            old.as_ref().is_some_and(|s| s.cluster_ip == *ip)
                != self.services.get(name).is_some_and(|s| s.cluster_ip == *ip)
        });
        change
    }

    fn update_health_check(
        &mut self,
        name: &NamespacedName,
        old: Option<&ServiceEntry>,
        new: Option<&ServiceEntry>,
        change: &mut Change,
    ) {
        let [old, new] = [old, new].map(|service| service.and_then(|s| s.health_check_node_port));
        if old == new {
            return;
        }
        if let Some(port) = old
            && let Some(names) = self.health_check_node_ports.get_mut(&port)
        {
            names.remove(name);
            if names.is_empty() {
                self.health_check_node_ports.remove(&port);
            }
        }
        if let Some(port) = new {
            self.health_check_node_ports.entry(port).or_default().insert(name.clone());
        }
        change.health_check_node_ports.extend(old.into_iter().chain(new));
    }

    fn retract(&mut self, service: &ServiceEntry, change: &mut Change) {
        for (p, port) in service.ports.iter().enumerate() {
            for (e, entry) in port.frontends.iter().enumerate() {
                change.frontends.insert(entry.frontend);
                let claim =
                    Claim { created: service.created, service: service.name.clone(), port: p, entry: e };
                let Some(claims) = self.frontends.get_mut(&entry.frontend) else { continue };
                if claims.holder != claim {
                    claims.waiting.retain(|c| *c != claim);
                } else if claims.waiting.is_empty() {
                    self.frontends.remove(&entry.frontend);
                } else {
                    claims.holder = claims.waiting.remove(0);
                }
            }
        }
        for local in service.local_targets() {
            if decrement(&mut self.local_endpoints, &local) {
                change.local_endpoints.insert(local);
            }
        }
        decrement(&mut self.cluster_ips, &service.cluster_ip);
        change.cluster_ips.insert(service.cluster_ip);
    }

    fn claim(&mut self, service: &ServiceEntry, change: &mut Change) {
        for (p, port) in service.ports.iter().enumerate() {
            for (e, entry) in port.frontends.iter().enumerate() {
                change.frontends.insert(entry.frontend);
                let claim =
                    Claim { created: service.created, service: service.name.clone(), port: p, entry: e };
                match self.frontends.entry(entry.frontend) {
                    std::collections::btree_map::Entry::Vacant(v) => {
                        v.insert(Claims { holder: claim, waiting: Vec::new() });
                    }
                    std::collections::btree_map::Entry::Occupied(mut o) => {
                        let claims = o.get_mut();
                        let loser = if claim < claims.holder {
                            std::mem::replace(&mut claims.holder, claim)
                        } else {
                            claim
                        };
                        let at = claims.waiting.partition_point(|c| *c < loser);
                        claims.waiting.insert(at, loser);
                    }
                }
            }
        }
        for local in service.local_targets() {
            let count = self.local_endpoints.entry(local).or_insert(0);
            *count += 1;
            if *count == 1 && !change.local_endpoints.remove(&local) {
                change.local_endpoints.insert(local);
            }
        }
        *self.cluster_ips.entry(service.cluster_ip).or_insert(0) += 1;
        change.cluster_ips.insert(service.cluster_ip);
    }

    /// Who serves a frontend.
    pub fn frontend(&self, frontend: &Frontend) -> Option<(&PortEntry, &FrontendEntry)> {
        let holder = &self.frontends.get(frontend)?.holder;
        let port = self.services.get(&holder.service)?.ports.get(holder.port)?;
        Some((port, port.frontends.get(holder.entry)?))
    }

    /// Whether something is served at an address, on any port.
    pub fn has_frontends_at(&self, address: IpAddr) -> bool {
        let first = Frontend { address: Some(address), protocol: Protocol::Tcp, port: 0 };
        self.frontends.range(first..).next().is_some_and(|(f, _)| f.address == Some(address))
    }

    /// All frontends with who serves them, in order.
    pub fn frontends(&self) -> impl Iterator<Item = (&PortEntry, &FrontendEntry)> {
        self.frontends.keys().filter_map(|f| self.frontend(f))
    }

    /// Number of frontends.
    pub fn frontend_count(&self) -> usize {
        self.frontends.len()
    }

    /// What one Service contributes.
    pub fn service(&self, name: &NamespacedName) -> Option<&Arc<ServiceEntry>> {
        self.services.get(name)
    }

    /// What all Services contribute, by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<ServiceEntry>> {
        self.services.values()
    }

    /// Number of Services.
    pub fn len(&self) -> usize {
        self.services.len()
    }

    /// True when there is no Service.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// Whether some Service has this cluster IP.
    pub fn is_cluster_ip(&self, address: IpAddr) -> bool {
        self.cluster_ips.contains_key(&address)
    }

    /// All cluster IPs, in order.
    pub fn cluster_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster_ips.keys().copied()
    }

    /// Whether some Service may choose this local endpoint.
    pub fn is_local_endpoint(&self, endpoint: &LocalEndpoint) -> bool {
        self.local_endpoints.contains_key(endpoint)
    }

    /// All local endpoints, in order.
    pub fn local_endpoints(&self) -> impl Iterator<Item = LocalEndpoint> {
        self.local_endpoints.keys().copied()
    }

    /// Whether some Service has this health check node port.
    pub fn is_health_check_node_port(&self, port: u16) -> bool {
        self.health_check_node_ports.contains_key(&port)
    }

    /// Health check node ports in order, each with the Service that has it, the first by name.
    pub fn health_check_node_ports(&self) -> impl Iterator<Item = (u16, &NamespacedName)> {
        self.health_check_node_ports.iter().filter_map(|(port, names)| Some((*port, names.first()?)))
    }

    /// Frontends that more than one Service claims.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        self.frontends.iter().flat_map(|(frontend, claims)| {
            claims.waiting.iter().map(|loser| Conflict {
                frontend: *frontend,
                holder: claims.holder.service.clone(),
                loser: loser.service.clone(),
            })
        })
    }

    /// Conflicts that one Service is part of.
    pub fn conflicts_of(&self, service: &NamespacedName) -> Vec<Conflict> {
        let Some(entry) = self.services.get(service) else { return Vec::new() };
        let frontends = entry.ports.iter().flat_map(|p| &p.frontends).map(|f| f.frontend);
        frontends
            .filter_map(|f| Some((f, self.frontends.get(&f)?)))
            .flat_map(|(frontend, claims)| {
                claims.waiting.iter().map(move |loser| Conflict {
                    frontend,
                    holder: claims.holder.service.clone(),
                    loser: loser.service.clone(),
                })
            })
            .filter(|c| c.holder == *service || c.loser == *service)
            .collect()
    }
}

/// The frontends of ports that are the same in the same place, and those of all others.
fn common_ports<'a>(
    old: &'a [PortEntry],
    new: &'a [PortEntry],
) -> (impl Iterator<Item = &'a FrontendEntry>, impl Iterator<Item = &'a FrontendEntry>) {
    let same = move |i: usize| matches!((old.get(i), new.get(i)), (Some(o), Some(n)) if o == n);
    let ports = move |list: &'a [PortEntry], wanted: bool| {
        let ports = list.iter().enumerate().filter(move |(i, _)| same(*i) == wanted);
        ports.flat_map(|(_, port)| &port.frontends)
    };
    (ports(new, true), ports(old, false).chain(ports(new, false)))
}

/// Counts one down; true when that was the last one.
fn decrement<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) -> bool {
    match counts.get_mut(key) {
        Some(n) if *n > 1 => {
            *n -= 1;
            false
        }
        Some(_) => {
            counts.remove(key);
            true
        }
        None => false,
    }
}
