//! The node that the proxy runs on, and the settings that change what Services mean on it.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::id::IpFamily;
use crate::service::{Algorithm, Scheduler};

/// Label that holds a node's zone.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Taint key with which the cluster autoscaler marks a node that it is about to delete (KEP-3836).
pub const TAINT_TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// The node's own Node object, stripped.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `status.addresses` of types `InternalIP` and `ExternalIP`, in the API's order with internal
    /// ones first.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// False when the node is being deleted or carries the autoscaler's taint.
    pub eligible: bool,
}

/// How a packet is known to come from a pod of this node (kube-proxy's `detectLocalMode`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum LocalDetector {
    /// No way to tell: nothing counts as a local pod.
    #[default]
    None,
    /// Source address in a range (`ClusterCIDR`, `NodeCIDR`); at most one range a family.
    Cidr(Vec<IpNet>),
    /// Arrived over this bridge (`BridgeInterface`).
    BridgeInterface(Arc<str>),
    /// Arrived over an interface whose name starts so (`InterfaceNamePrefix`).
    InterfaceNamePrefix(Arc<str>),
}

impl LocalDetector {
    /// What is left of the detector for one address family.
    #[must_use]
    pub fn for_family(&self, family: IpFamily) -> Self {
        match self {
            Self::Cidr(ranges) => {
                let ranges: Vec<_> =
                    ranges.iter().copied().filter(|r| IpFamily::of(r.addr()) == family).collect();
                if ranges.is_empty() { Self::None } else { Self::Cidr(ranges) }
            }
            other => other.clone(),
        }
    }
}

/// On which of the node's addresses `NodePort`s answer.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum NodePortAddresses {
    /// The node's primary address of each family.
    #[default]
    Primary,
    /// Every address of the node.
    All,
    /// Addresses in these ranges. Ranges of one family only mean every address of the other
    /// family; a range of length 0 means every address of its family (kube-proxy).
    Ranges(Vec<IpNet>),
    /// The primary address of each family, and those in these ranges; a range of length 0 means every
    /// address of its family (kube-proxy 1.37). A family without ranges has its primary address.
    PrimaryAnd(Vec<IpNet>),
}

/// Settings that the compiler needs (a part of `KubeProxyConfiguration`).
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "settings that are independent of each other")]
pub struct Config {
    /// Masquerade all traffic to cluster IPs.
    pub masquerade_all: bool,
    /// Bit of the packet mark that asks for masquerade, 0 to 31.
    pub masquerade_bit: u8,
    /// How local pods are recognised.
    pub local_detector: LocalDetector,
    /// Where `NodePort`s answer.
    pub node_port_addresses: NodePortAddresses,
    /// Whether `spec.externalIPs` is honoured (gate `AllowServiceExternalIPs`, KEP-5707).
    pub allow_external_ips: bool,
    /// How IPVS chooses among the endpoints of Services that do not say (`ipvs.scheduler`).
    pub scheduler: Option<Arc<Scheduler>>,
    /// How the endpoints of Services that do not say are chosen for external traffic.
    pub external_algorithm: Algorithm,
    /// Whether `NodePort`s answer on IPv4 loopback where `node_port_addresses` include it; only for a mode
    /// that can (`iptables.localhostNodePorts`).
    pub localhost_node_ports: bool,
    /// Whether forwarded packets are dropped that conntrack calls INVALID; only for a mode that can (unless
    /// `conntrack.tcpBeLiberal`).
    pub drop_invalid: bool,
    /// Whether endpoints are known as long as a slice lists them ([`PortEntry::listed`](crate::table::PortEntry::listed)),
    /// for a mode that ends what is under way to those that are gone.
    pub keep_listed: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            masquerade_all: false,
            masquerade_bit: 14,
            local_detector: LocalDetector::None,
            node_port_addresses: NodePortAddresses::Primary,
            allow_external_ips: true,
            scheduler: None,
            external_algorithm: Algorithm::Random,
            localhost_node_ports: false,
            drop_invalid: false,
            keep_listed: false,
        }
    }
}
