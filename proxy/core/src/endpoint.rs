//! `EndpointSlice`s as the compiler needs them.

use std::hash::{DefaultHasher, Hasher as _};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::id::{IpFamily, NamespacedName, Protocol};

/// Conditions of an endpoint, with the API's defaults for absent ones applied:
/// `ready` and `serving` default to true, `terminating` to false (discovery/v1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Conditions {
    /// May receive new traffic.
    pub ready: bool,
    /// Able to answer, whether terminating or not.
    pub serving: bool,
    /// Being deleted.
    pub terminating: bool,
}

impl Default for Conditions {
    fn default() -> Self {
        Self { ready: true, serving: true, terminating: false }
    }
}

/// Topology hints of an endpoint: for which zones and nodes it is meant.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Hints {
    /// `hints.forZones[].name`.
    pub zones: Vec<Arc<str>>,
    /// `hints.forNodes[].name`.
    pub nodes: Vec<Arc<str>>,
}

/// A pod's name, as 64 bits of a hash: enough to find the pod again by its name, at a fraction of the
/// memory. The namespace is that of the slice and not part of it.
///
/// Holds within one process: another may hash in another way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct PodHash(NonZeroU64);

impl PodHash {
    /// The hash of a name.
    pub fn of(name: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write(name.as_bytes());
        Self(NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MIN))
    }
}

/// One endpoint of a slice. Only the first address of the API object counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub address: IpAddr,
    /// Conditions.
    pub conditions: Conditions,
    /// Node that runs it; `None` counts as another node.
    pub node: Option<Arc<str>>,
    /// Zone it is in.
    pub zone: Option<Arc<str>>,
    /// Topology hints; `None` when it has none at all.
    pub hints: Option<Arc<Hints>>,
    /// The pod behind it (`targetRef` of kind Pod in the slice's namespace). For people who ask for pods by
    /// name: it has no say in what becomes of packets.
    pub pod: Option<PodHash>,
}

/// A port that all endpoints of a slice share.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct EndpointPort {
    /// Name, matched with the Service port's name.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port number on the endpoint.
    pub port: u16,
}

/// One `EndpointSlice` of one Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    /// Name of the slice.
    pub name: NamespacedName,
    /// The Service it belongs to (label `kubernetes.io/service-name`, same namespace).
    pub service: NamespacedName,
    /// `addressType`.
    pub family: IpFamily,
    /// Ports.
    pub ports: Vec<EndpointPort>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, milliseconds since the epoch.
    pub last_change_trigger: Option<i64>,
}
