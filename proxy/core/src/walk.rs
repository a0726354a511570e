//! The reference walker: what happens to a packet, asked of the forwarding table itself.
//!
//! Every mode has a walker of its own over what it rendered; all must give the answer given here.

use std::fmt;
use std::net::IpAddr;

use crate::id::{Protocol, ServicePortName};
use crate::node::LocalDetector;
use crate::table::{
    ForwardingTable, Frontend, FrontendEntry, FrontendKind, LocalEndpoint, PortEntry, SourceClass, Target,
    Verdict,
};

/// First packet of a new connection. There is no history: no affinity, no conntrack entry.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Interface that it came in by, where that is known; `None` for packets of the node itself.
    pub interface: Option<String>,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let to = std::net::SocketAddr::new(self.destination, self.port);
        write!(f, "{} -> {to}/{}", self.source, self.protocol)
    }
}

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// Translated to one of these endpoints, each with whether the source is rewritten on the way.
    Forward(Vec<(std::net::SocketAddr, bool)>),
    /// Refused with an error to the client.
    Reject,
    /// Silently discarded.
    Drop,
    /// Not the proxy's business: nothing is translated or filtered.
    None,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(endpoints) => {
                f.write_str("forward")?;
                for (endpoint, masquerade) in endpoints {
                    write!(f, " {endpoint}{}", if *masquerade { " (masqueraded)" } else { "" })?;
                }
                Ok(())
            }
            Self::Reject => f.write_str("reject"),
            Self::Drop => f.write_str("drop"),
            Self::None => f.write_str("none"),
        }
    }
}

/// What decided about a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// A frontend and the class of its source.
    Frontend {
        /// The Service port.
        service: ServicePortName,
        /// The frontend that matched.
        frontend: Frontend,
        /// What the frontend is.
        kind: FrontendKind,
        /// Class of the source.
        class: SourceClass,
        /// The verdict of the table.
        verdict: Verdict,
    },
    /// The source is not in the Service's `loadBalancerSourceRanges`.
    SourceRange(ServicePortName),
    /// A cluster IP without such a port.
    UnknownPort,
    /// An address of a Service range that no Service has.
    Unallocated,
    /// No frontend has this destination.
    NoFrontend,
}

/// What becomes of a packet and what decided it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Walk {
    /// What becomes of it.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
}

/// The class of a packet's source on this node.
pub fn source_class(table: &ForwardingTable, packet: &Packet) -> SourceClass {
    let interface = packet.interface.as_deref();
    let pod = match &table.node().local_detector {
        LocalDetector::None => false,
        LocalDetector::Cidr(ranges) => ranges.iter().any(|r| r.contains(&packet.source)),
        LocalDetector::BridgeInterface(name) => interface == Some(&**name),
        LocalDetector::InterfaceNamePrefix(prefix) => interface.is_some_and(|i| i.starts_with(&**prefix)),
    };
    if pod {
        SourceClass::Pod
    } else if table.node().is_local(packet.source) {
        SourceClass::Node
    } else {
        SourceClass::Other
    }
}

/// The frontend that a packet is for: one of its address, or else a node port where those answer.
pub fn frontend_of<'a>(
    table: &'a ForwardingTable,
    packet: &Packet,
) -> Option<(&'a PortEntry, &'a FrontendEntry)> {
    let exact = Frontend { address: Some(packet.destination), protocol: packet.protocol, port: packet.port };
    let node_port = || {
        let serves = table.node().serves_node_ports(packet.destination);
        serves.then(|| table.frontend(&Frontend { address: None, ..exact })).flatten()
    };
    table.frontend(&exact).or_else(node_port)
}

/// Asks the table what becomes of a packet.
pub fn walk(table: &ForwardingTable, packet: &Packet) -> Walk {
    match frontend_of(table, packet) {
        Some((port, entry)) => walk_frontend(table, packet, port, entry),
        None => walk_miss(table, packet),
    }
}

fn walk_frontend(table: &ForwardingTable, packet: &Packet, port: &PortEntry, entry: &FrontendEntry) -> Walk {
    if let Some(guard) = &entry.source_ranges
        && !guard.allow(packet.source, packet.destination)
    {
        return Walk { outcome: Outcome::Drop, reason: Reason::SourceRange(port.name.clone()) };
    }
    let class = source_class(table, packet);
    let verdict = entry.verdict(class);
    let outcome = match verdict {
        Verdict::Reject => Outcome::Reject,
        Verdict::Drop => Outcome::Drop,
        Verdict::Forward { policy, masquerade } => {
            let to = |t: &Target| {
                let socket = std::net::SocketAddr::new(t.address, t.port);
                (socket, masquerade || hairpin(table, packet, t))
            };
            Outcome::Forward(port.group(policy).iter().map(to).collect())
        }
    };
    let reason = Reason::Frontend {
        service: port.name.clone(),
        frontend: entry.frontend,
        kind: entry.kind,
        class,
        verdict,
    };
    Walk { outcome, reason }
}

/// A local endpoint that reaches itself must see another source, or it answers itself directly.
pub(crate) fn hairpin(table: &ForwardingTable, packet: &Packet, target: &Target) -> bool {
    let endpoint = LocalEndpoint { address: target.address, protocol: packet.protocol, port: target.port };
    packet.source == target.address && table.is_local_endpoint(&endpoint)
}

fn walk_miss(table: &ForwardingTable, packet: &Packet) -> Walk {
    let destination = packet.destination;
    if table.node().is_local(destination) {
        return Walk { outcome: Outcome::None, reason: Reason::NoFrontend };
    }
    if table.is_cluster_ip(destination) {
        Walk { outcome: Outcome::Reject, reason: Reason::UnknownPort }
    } else if table.service_cidrs().iter().any(|r| r.contains(&destination)) {
        Walk { outcome: Outcome::Drop, reason: Reason::Unallocated }
    } else {
        Walk { outcome: Outcome::None, reason: Reason::NoFrontend }
    }
}
