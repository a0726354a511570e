//! Services as the compiler needs them: what the API says, stripped and typed.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::id::{NamespacedName, Protocol};

/// Label that hands a Service to another service proxy; such a Service is not ours.
pub const LABEL_SERVICE_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label that marks headless Services and their `EndpointSlice`s.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";

/// Annotation that says how the endpoints of a Service are chosen: `random` or `maglev`.
pub const ANNOTATION_ALGORITHM: &str = "shunt/lb-algorithm";
/// Cilium's annotation with the same values.
pub const ANNOTATION_CILIUM_ALGORITHM: &str = "service.cilium.io/lb-algorithm";

/// Where traffic of a Service may go: to any endpoint or to those of this node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum TrafficPolicy {
    /// Every endpoint of the cluster.
    #[default]
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// One port of a Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ServicePort {
    /// Name; empty when the Service has a single, unnamed port.
    pub name: Arc<str>,
    /// Protocol; TCP where the API leaves it out.
    pub protocol: Protocol,
    /// Port on cluster, external and load-balancer addresses.
    pub port: u16,
    /// Port on the node's addresses; `None` when there is none.
    pub node_port: Option<u16>,
}

/// How a mode that can hash chooses the endpoint of a new flow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Algorithm {
    /// Each endpoint with the same chance.
    #[default]
    Random,
    /// By a consistent hash of addresses and ports (Maglev): every node chooses the same, and few flows
    /// move when endpoints change.
    Maglev,
}

/// How IPVS chooses among endpoints.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Scheduler {
    /// The kernel's name, `rr` for instance.
    pub name: Arc<str>,
    /// The scheduler's own flags 1 to 3.
    pub flags: [bool; 3],
}

impl Scheduler {
    /// The schedulers of Linux.
    pub const KNOWN: [&str; 14] =
        ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "mh", "fo", "ovf", "twos"];

    /// Which of the flags a word means, from 0, as ipvsadm names them.
    pub fn flag(word: &str) -> Option<usize> {
        match word {
            "flag-1" | "sh-fallback" | "mh-fallback" => Some(0),
            "flag-2" | "sh-port" | "mh-port" => Some(1),
            "flag-3" => Some(2),
            _ => None,
        }
    }
}

/// A Service that has cluster IPs (headless and `ExternalName` Services never get this far).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Name.
    pub name: NamespacedName,
    /// `metadata.creationTimestamp`, seconds since the epoch; 0 when unknown.
    /// The oldest Service wins where two claim the same address and port.
    pub created: i64,
    /// `spec.clusterIPs`, at most one of each family.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// Addresses of `status.loadBalancer.ingress` whose `ipMode` is `VIP` or unset.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`; they guard `load_balancer_ips` only.
    pub source_ranges: Vec<IpNet>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// Timeout of `sessionAffinity: ClientIP`; `None` for no affinity.
    pub affinity: Option<Duration>,
    /// How IPVS should choose among its endpoints (annotations of kube-router); other modes choose at random.
    pub scheduler: Option<Arc<Scheduler>>,
    /// How its endpoints should be chosen ([`ANNOTATION_ALGORITHM`]); `None` for the default.
    pub algorithm: Option<Algorithm>,
    /// `spec.healthCheckNodePort`, for `externalTrafficPolicy: Local` load balancers.
    pub health_check_node_port: Option<u16>,
}
