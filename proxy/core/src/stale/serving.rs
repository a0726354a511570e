//! Endpoints that may still answer, chosen for new flows or not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::is_cleaned;
use crate::id::{IpFamily, NamespacedName, Protocol, ServicePortName};
use crate::service::{Service, ServicePort};
use crate::store::Store;
use crate::table::{ForwardingTable, Frontend};

/// Endpoints of one Service port.
pub type Endpoints = Arc<BTreeSet<SocketAddr>>;

/// For every UDP and SCTP port of one family, the endpoints that may still answer.
///
/// The forwarding table does not say: an endpoint that is left out there because of a traffic policy,
/// a topology hint or because it is terminating goes on to serve the flows it has. Kept beside the
/// table, it also tells which changes of slices matter to flows though the table stays the same: a
/// terminating endpoint that was not chosen any more, and now is gone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Serving {
    family: IpFamily,
    /// Services without such ports are left out.
    services: BTreeMap<NamespacedName, BTreeMap<(Arc<str>, Protocol), Endpoints>>,
}

impl Serving {
    /// Nothing is known yet.
    pub const fn new(family: IpFamily) -> Self {
        Self { family, services: BTreeMap::new() }
    }

    /// The endpoints of all Services in a store.
    pub fn full(family: IpFamily, store: &Store) -> Self {
        let mut serving = Self::new(family);
        for service in store.services() {
            serving.set(&service.name, Some(service), store);
        }
        serving
    }

    /// Looks at a Service again and answers the frontends whose endpoints are not what they were, as
    /// far as `table` knows them. (Frontends that come and go are known from the table's change.)
    pub fn update(
        &mut self,
        name: &NamespacedName,
        store: &Store,
        table: &ForwardingTable,
    ) -> BTreeSet<Frontend> {
        let old = self.services.get(name).cloned().unwrap_or_default();
        self.set(name, store.service(name).map(AsRef::as_ref), store);
        let new = self.services.get(name);
        let (Some(new), Some(entry)) = (new, table.service(name)) else { return BTreeSet::new() };
        entry
            .ports
            .iter()
            .filter(|port| {
                let key = (port.name.port.clone(), port.name.protocol);
                is_cleaned(port.name.protocol) && old.get(&key) != new.get(&key)
            })
            .flat_map(|port| port.frontends.iter().map(|f| f.frontend))
            .collect()
    }

    fn set(&mut self, name: &NamespacedName, service: Option<&Service>, store: &Store) {
        let ports = service.into_iter().flat_map(|s| &s.ports).filter(|p| is_cleaned(p.protocol));
        let ports: BTreeMap<_, _> = ports
            .map(|port| ((port.name.clone(), port.protocol), Arc::new(self.of_port(name, port, store))))
            .collect();
        if ports.is_empty() {
            self.services.remove(name);
        } else {
            self.services.insert(name.clone(), ports);
        }
    }

    /// An endpoint that does not serve may be ready all the same (`publishNotReadyAddresses`), and
    /// then new flows are sent to it: they must not be taken for stale at the next change.
    fn of_port(&self, service: &NamespacedName, port: &ServicePort, store: &Store) -> BTreeSet<SocketAddr> {
        store
            .slices(service)
            .filter(|slice| slice.family == self.family)
            .flat_map(|slice| {
                let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol);
                ports.flat_map(|p| {
                    let live = slice.endpoints.iter().filter(|e| e.conditions.serving || e.conditions.ready);
                    live.map(|e| SocketAddr::new(e.address, p.port))
                })
            })
            .collect()
    }

    /// The endpoints of a Service port; `None` if it is not known, or its flows are not cleaned.
    pub fn endpoints(&self, port: &ServicePortName) -> Option<Endpoints> {
        self.services.get(&port.service)?.get(&(port.port.clone(), port.protocol)).cloned()
    }

    /// Services that have such ports.
    pub fn services(&self) -> impl Iterator<Item = &NamespacedName> {
        self.services.keys()
    }
}
