//! What load balancers may know of a Service on this node (`healthCheckNodePort`).

use std::collections::BTreeSet;

use crate::id::{IpFamily, NamespacedName};
use crate::store::Store;
use crate::table::{FrontendEntry, FrontendKind, ServiceEntry, SourceClass, Verdict};

/// The health check of one Service in one family.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Distinct addresses of ready endpoints on this node. Those that terminate do not count, even
    /// while they still get traffic: that is how a load balancer learns to leave the node.
    pub endpoints: usize,
}

/// The health check of a Service; `None` if it has none, or takes no part in the family.
pub fn health_check(
    store: &Store,
    service: &NamespacedName,
    family: IpFamily,
    node_name: &str,
) -> Option<HealthCheck> {
    let object = store.service(service)?;
    let port = object.health_check_node_port?;
    object.cluster_ips.iter().find(|ip| IpFamily::of(**ip) == family)?;
    let local: BTreeSet<_> = store
        .slices(service)
        .filter(|slice| slice.family == family && !slice.ports.is_empty())
        .flat_map(|slice| &slice.endpoints)
        .filter(|e| e.conditions.ready && e.node.as_deref() == Some(node_name))
        .map(|e| e.address)
        .collect();
    Some(HealthCheck { port, endpoints: local.len() })
}

/// Ports of a Service that have endpoints, but for their traffic policy none that traffic may go to from
/// here: by `internalTrafficPolicy`, and by `externalTrafficPolicy`.
pub fn ports_without_local_endpoints(service: &ServiceEntry) -> [usize; 2] {
    let dropped = |internal: bool| {
        let drops = |f: &FrontendEntry| {
            (f.kind == FrontendKind::ClusterIp) == internal && f.verdict(SourceClass::Other) == Verdict::Drop
        };
        service.ports.iter().filter(|port| port.frontends.iter().any(drops)).count()
    };
    [dropped(true), dropped(false)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
    use crate::id::Protocol;
    use crate::service::{Service, ServicePort, TrafficPolicy};
    use crate::store::Event;

    fn endpoint(address: &str, node: &str, ready: bool) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            conditions: Conditions { ready, serving: true, terminating: !ready },
            node: Some(node.into()),
            zone: None,
            hints: None,
            pod: None,
        }
    }

    #[test]
    fn ready_endpoints_of_this_node_count_once() {
        let name = NamespacedName::new("ns", "web");
        let mut store = Store::default();
        let port = ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None };
        store.apply(Event::Service(Service {
            scheduler: None,
            algorithm: None,
            name: name.clone(),
            created: 0,
            cluster_ips: vec!["10.96.0.1".parse().unwrap()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            ports: vec![port],
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Local,
            affinity: None,
            health_check_node_port: Some(31234),
        }));
        for (slice, family, endpoints) in [
            ("a", IpFamily::V4, vec![endpoint("10.0.0.1", "me", true), endpoint("10.0.0.2", "me", false)]),
            ("b", IpFamily::V4, vec![endpoint("10.0.0.1", "me", true), endpoint("10.0.0.3", "other", true)]),
            ("c", IpFamily::V4, vec![endpoint("10.0.0.4", "me", true)]),
            ("d", IpFamily::V6, vec![endpoint("fd00::1", "me", true)]),
        ] {
            store.apply(Event::Slice(EndpointSlice {
                name: NamespacedName::new("ns", slice),
                service: name.clone(),
                family,
                ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
                endpoints,
                last_change_trigger: None,
            }));
        }
        let check = |family, node| health_check(&store, &name, family, node);
        assert_eq!(check(IpFamily::V4, "me"), Some(HealthCheck { port: 31234, endpoints: 2 }));
        assert_eq!(check(IpFamily::V4, "third"), Some(HealthCheck { port: 31234, endpoints: 0 }));
        assert_eq!(check(IpFamily::V6, "me"), None, "the Service has no IPv6 address");
    }
}
