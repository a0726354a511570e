//! What one Service brings into the table: frontends, verdicts, endpoints.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::id::{NamespacedName, Protocol, ServicePortName};
use crate::service::{Algorithm, Scheduler, TrafficPolicy};

/// What a packet must match: destination address (or any address on which the node serves
/// `NodePort`s), protocol and port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// Destination address; `None` means every address of [`NodePortMatch`](super::NodePortMatch).
    pub address: Option<IpAddr>,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination port.
    pub port: u16,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(a)) => write!(f, "[{a}]")?,
            Some(IpAddr::V4(a)) => write!(f, "{a}")?,
            None => f.write_str("node")?,
        }
        write!(f, ":{}/{}", self.port, self.protocol)
    }
}

/// Why a frontend exists.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FrontendKind {
    /// A cluster IP: the internal traffic policy applies.
    ClusterIp,
    /// An external IP: the external traffic policy applies.
    ExternalIp,
    /// A load-balancer VIP: the external traffic policy and source ranges apply.
    LoadBalancer,
    /// A node port: the external traffic policy applies.
    NodePort,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "externalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::NodePort => "NodePort",
        })
    }
}

/// Classes of source that a verdict may differ for. A packet is of the first class that fits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SourceClass {
    /// A local pod, as the [`LocalDetector`](crate::node::LocalDetector) sees it.
    Pod,
    /// An address of this node.
    Node,
    /// Everything else.
    Other,
}

impl SourceClass {
    /// All classes in the order in which they are tried.
    pub const ALL: [Self; 3] = [Self::Pod, Self::Node, Self::Other];
}

impl fmt::Display for SourceClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Node => "node",
            Self::Other => "other",
        })
    }
}

/// What happens to the first packet of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Verdict {
    /// Translated to an endpoint of the group of this policy.
    Forward {
        /// Which of the Service port's groups.
        policy: TrafficPolicy,
        /// Whether the source is rewritten to a node address.
        masquerade: bool,
    },
    /// Refused with an error to the client.
    Reject,
    /// Silently discarded.
    Drop,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward { policy, masquerade } => {
                write!(f, "forward {}", policy_name(*policy))?;
                if *masquerade { f.write_str(" masquerade") } else { Ok(()) }
            }
            Self::Reject => f.write_str("reject"),
            Self::Drop => f.write_str("drop"),
        }
    }
}

const fn policy_name(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => "cluster",
        TrafficPolicy::Local => "local",
    }
}

/// `loadBalancerSourceRanges` of one family. Sources outside are dropped before anything else.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SourceRanges {
    /// Allowed ranges; never empty, never of length 0.
    pub ranges: BTreeSet<IpNet>,
    /// Whether the VIP itself is allowed as a source: a process of this node whose packet got the
    /// VIP as its source, when the node is in the ranges (kube-proxy's `allowFromNode`).
    pub allow_vip_source: bool,
}

impl SourceRanges {
    /// Whether a packet from `source` to `vip` may pass.
    pub fn allow(&self, source: IpAddr, vip: IpAddr) -> bool {
        (self.allow_vip_source && source == vip) || self.ranges.iter().any(|r| r.contains(&source))
    }
}

/// One endpoint that traffic may be sent to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Target {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Port on the endpoint.
    pub port: u16,
    /// Whether it runs on this node.
    pub local: bool,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// Endpoints among which traffic is spread evenly: sorted, each address and port once.
pub type EndpointGroup = Arc<[Target]>;

/// One frontend of a Service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendEntry {
    /// What it matches.
    pub frontend: Frontend,
    /// Why it exists.
    pub kind: FrontendKind,
    /// Verdicts for [`SourceClass::ALL`], in that order.
    pub verdicts: [Verdict; 3],
    /// Sources allowed at all; `None` for every source.
    pub source_ranges: Option<Arc<SourceRanges>>,
    /// How endpoints are chosen, in modes that can hash; others choose by chance. Session affinity goes
    /// first.
    pub algorithm: Algorithm,
}

impl FrontendEntry {
    /// The verdict for a class of source.
    pub const fn verdict(&self, class: SourceClass) -> Verdict {
        self.verdicts[class as usize]
    }
}

/// One port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortEntry {
    /// Its identity.
    pub name: ServicePortName,
    /// Endpoints for the Cluster policy; `None` when the port never uses that policy.
    pub cluster: Option<EndpointGroup>,
    /// Endpoints for the Local policy; `None` when the port never uses that policy.
    pub local: Option<EndpointGroup>,
    /// Endpoints of a UDP port that terminate, still serve and get no new flows: flows that have them keep
    /// them, in modes that know flows themselves.
    pub terminating: EndpointGroup,
    /// All others that slices list, whatever their condition, where [`Config::keep_listed`](crate::node::Config::keep_listed)
    /// asks for them: they get no flows and keep none of UDP, but they are not gone.
    pub listed: EndpointGroup,
    /// Whether any usable endpoint exists anywhere in the cluster.
    pub has_any_endpoints: bool,
    /// Timeout of the session affinity by client address.
    pub affinity: Option<Duration>,
    /// How IPVS chooses among endpoints; `None` for its usual way. Other modes choose at random.
    pub scheduler: Option<Arc<Scheduler>>,
    /// Frontends in order of kind.
    pub frontends: Vec<FrontendEntry>,
}

impl PortEntry {
    /// The endpoints of a policy; empty when the port never uses that policy.
    pub fn group(&self, policy: TrafficPolicy) -> &[Target] {
        match policy {
            TrafficPolicy::Cluster => self.cluster.as_deref(),
            TrafficPolicy::Local => self.local.as_deref(),
        }
        .unwrap_or_default()
    }
}

/// Everything that one Service puts into one family's table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceEntry {
    /// The Service.
    pub name: NamespacedName,
    /// `metadata.creationTimestamp` in seconds: the older Service wins a disputed frontend.
    pub created: i64,
    /// Cluster IP of the table's family.
    pub cluster_ip: IpAddr,
    /// Port of the node on which load balancers ask for local endpoints.
    pub health_check_node_port: Option<u16>,
    /// Ports in the order of the Service.
    pub ports: Vec<PortEntry>,
}

impl ServiceEntry {
    pub(super) fn local_targets(&self) -> impl Iterator<Item = LocalEndpoint> {
        self.ports.iter().flat_map(|port| {
            let groups = [&port.cluster, &port.local].into_iter().flatten();
            let locals: BTreeSet<LocalEndpoint> = groups
                .flat_map(|g| g.iter())
                .filter(|t| t.local)
                .map(|t| LocalEndpoint { address: t.address, protocol: port.name.protocol, port: t.port })
                .collect();
            locals
        })
    }
}

/// An endpoint of this node that some Service may choose: it may meet its own traffic (hairpin).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LocalEndpoint {
    /// Address of the endpoint.
    pub address: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the endpoint.
    pub port: u16,
}
