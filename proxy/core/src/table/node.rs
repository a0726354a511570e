//! What the node itself brings into the table.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::node::LocalDetector;

/// On which destination addresses `NodePort`s of one family answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodePortMatch {
    /// Every local address, loopback excepted.
    AllLocal,
    /// These addresses.
    Addresses(BTreeSet<IpAddr>),
}

/// What the table needs to know of the node, for one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeFacts {
    /// How local pods are recognised.
    pub local_detector: LocalDetector,
    /// Whether every packet to a cluster IP is masqueraded.
    pub masquerade_all: bool,
    /// Bit of the packet mark that asks for masquerade.
    pub masquerade_bit: u8,
    /// Where `NodePort`s answer.
    pub node_ports: NodePortMatch,
    /// Whether they answer on IPv4 loopback as well.
    pub localhost_node_ports: bool,
    /// Whether forwarded packets are dropped that conntrack calls INVALID.
    pub drop_invalid: bool,
    /// Addresses of the node, as far as known. Modes ask the kernel instead where they can; the
    /// reference walker uses these.
    pub local_addresses: BTreeSet<IpAddr>,
}

impl NodeFacts {
    /// Facts of a node about which nothing is known.
    pub fn unknown() -> Self {
        Self {
            local_detector: LocalDetector::None,
            masquerade_all: false,
            masquerade_bit: 14,
            node_ports: NodePortMatch::Addresses(BTreeSet::new()),
            localhost_node_ports: false,
            drop_invalid: false,
            local_addresses: BTreeSet::new(),
        }
    }

    /// Whether `address` belongs to this node: loopback or one of its own.
    pub fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local_addresses.contains(&address)
    }

    /// Where `NodePort`s answer, as far as known.
    pub fn node_port_addresses(&self) -> BTreeSet<IpAddr> {
        let addresses = match &self.node_ports {
            NodePortMatch::AllLocal => &self.local_addresses,
            NodePortMatch::Addresses(addresses) => addresses,
        };
        addresses.iter().copied().filter(|a| self.serves_node_ports(*a)).collect()
    }

    /// Whether `NodePort`s answer on `address`.
    pub fn serves_node_ports(&self, address: IpAddr) -> bool {
        if address.is_ipv4() && address.is_loopback() {
            return self.localhost_node_ports;
        }
        match &self.node_ports {
            NodePortMatch::AllLocal => !address.is_loopback() && self.is_local(address),
            NodePortMatch::Addresses(addresses) => addresses.contains(&address),
        }
    }
}
