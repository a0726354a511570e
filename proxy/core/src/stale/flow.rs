//! A flow as the kernel tracks it, and what to ask the kernel for.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::id::{IpFamily, Protocol};

/// Source and destination of the packets of one direction.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tuple {
    /// Where they come from.
    pub source: SocketAddr,
    /// Where they go.
    pub destination: SocketAddr,
}

/// One flow that the kernel tracks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Flow {
    /// Protocol.
    pub protocol: Protocol,
    /// What the client sends, before any translation.
    pub original: Tuple,
    /// What it is answered with, before any translation back: comes from the endpoint.
    pub reply: Tuple,
    /// Zone of the original direction; 0 is the default one.
    pub zone: u16,
    /// The kernel's number for it, by which it is told from a later flow with the same addresses.
    pub id: Option<u32>,
}

impl Flow {
    /// Whether its destination was translated.
    pub fn is_translated(&self) -> bool {
        self.reply.source != self.original.destination
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tuple { source, destination } = self.original;
        write!(f, "{} {source} -> {destination} -> {}", self.protocol, self.reply.source)
    }
}

/// Which flows to list, by what the client sent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlowFilter {
    /// Family.
    pub family: IpFamily,
    /// Protocol.
    pub protocol: Protocol,
    /// Destination address; `None` for all.
    pub address: Option<IpAddr>,
    /// Destination port; `None` for all.
    pub port: Option<u16>,
}

impl FlowFilter {
    /// Whether a flow is asked for.
    pub fn matches(&self, flow: &Flow) -> bool {
        let destination = flow.original.destination;
        self.protocol == flow.protocol
            && self.family == IpFamily::of(destination.ip())
            && self.address.is_none_or(|address| address == destination.ip())
            && self.port.is_none_or(|port| port == destination.port())
    }
}

impl fmt::Display for FlowFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} to ", self.family, self.protocol)?;
        match self.address {
            Some(IpAddr::V6(a)) => write!(f, "[{a}]")?,
            Some(IpAddr::V4(a)) => write!(f, "{a}")?,
            None => f.write_str("*")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}
