//! Sets: what the filter table asks, and which clients an endpoint has.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use ipset_netlink::{Entry, Family, Set};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::{Frontend, LocalEndpoint};

use crate::names;

/// Most elements of a set. Memory is only taken for those that are there; what ipset assumes (65,536)
/// is too little.
pub const ELEMENTS_MAX: u32 = 1 << 22;
/// How long a client is remembered if nothing else is said. Rules always say.
const CLIENT_TIMEOUT: u32 = 10_800;

/// What a set holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Addresses.
    Addresses,
    /// Addresses, protocols and ports.
    Frontends,
    /// The same and a range of sources.
    Sources,
    /// The same and an address.
    Hairpins,
    /// Addresses of clients, each for a time. Rules write them; we never look.
    Clients,
}

impl Kind {
    /// What a set of ours with this name holds; `None` for sets that are not ours.
    pub fn of(family: IpFamily, name: &str) -> Option<Self> {
        if name.starts_with(names::ENDPOINT) {
            return Some(Self::Clients);
        }
        let known = names::SETS.into_iter().find(|known| &*names::set(family, known) == name)?;
        Some(match known {
            names::CLUSTER_IPS => Self::Addresses,
            names::SOURCES => Self::Sources,
            names::HAIRPIN => Self::Hairpins,
            _ => Self::Frontends,
        })
    }

    const fn type_of(self) -> ipset_netlink::Kind {
        match self {
            Self::Addresses | Self::Clients => ipset_netlink::Kind::HashIp,
            Self::Frontends => ipset_netlink::Kind::HashIpPort,
            Self::Sources => ipset_netlink::Kind::HashIpPortNet,
            Self::Hairpins => ipset_netlink::Kind::HashIpPortIp,
        }
    }

    /// How such a set is declared.
    pub fn declaration(self, family: IpFamily, name: &str) -> Set {
        Set {
            name: name.to_owned(),
            kind: self.type_of(),
            family: Some(family_of(family)),
            max_elements: ELEMENTS_MAX,
            timeout: (self == Self::Clients).then_some(CLIENT_TIMEOUT),
            marks: false,
        }
    }
}

/// The family as sets know it.
pub const fn family_of(family: IpFamily) -> Family {
    match family {
        IpFamily::V4 => Family::Inet,
        IpFamily::V6 => Family::Inet6,
    }
}

/// An element of a set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Element {
    /// An address.
    Address(IpAddr),
    /// Address, protocol and port.
    Frontend(IpAddr, Protocol, u16),
    /// Address, protocol and port, and who may use it.
    Source(IpAddr, Protocol, u16, IpNet),
    /// An endpoint, from itself.
    Hairpin(LocalEndpoint),
    /// Something that is not ours.
    Stray(Entry),
}

impl Element {
    /// A frontend that has an address.
    pub fn frontend(frontend: &Frontend) -> Option<Self> {
        Some(Self::Frontend(frontend.address?, frontend.protocol, frontend.port))
    }

    /// What an entry of a set of ours means.
    pub fn of(entry: Entry) -> Self {
        Self::known(entry).unwrap_or(Self::Stray(entry))
    }

    fn known(entry: Entry) -> Option<Self> {
        Some(match entry {
            Entry::Ip(address) => Self::Address(address),
            Entry::IpPort(address, protocol, port) => {
                Self::Frontend(address, Protocol::from_number(protocol)?, port)
            }
            Entry::IpPortNet(address, protocol, port, net, prefix) => {
                let range = IpNet::new(net, prefix).ok()?;
                Self::Source(address, Protocol::from_number(protocol)?, port, range)
            }
            Entry::IpPortIp(address, protocol, port, source) if source == address => {
                let protocol = Protocol::from_number(protocol)?;
                Self::Hairpin(LocalEndpoint { address, protocol, port })
            }
            _ => return None,
        })
    }

    /// The entry of its set.
    pub fn entry(&self) -> Entry {
        match *self {
            Self::Address(address) => Entry::Ip(address),
            Self::Frontend(address, protocol, port) => Entry::IpPort(address, protocol.number(), port),
            Self::Source(address, protocol, port, range) => {
                Entry::IpPortNet(address, protocol.number(), port, range.addr(), range.prefix_len())
            }
            Self::Hairpin(e) => Entry::IpPortIp(e.address, e.protocol.number(), e.port, e.address),
            Self::Stray(entry) => entry,
        }
    }
}

/// As ipset prints it.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.entry().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_back_and_strange_ones_kept() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (entry, text) in [
            (Entry::Ip(ip("10.0.0.1")), "10.0.0.1"),
            (Entry::IpPort(ip("fd00::1"), 6, 80), "fd00::1,tcp:80"),
            (Entry::IpPortNet(ip("10.0.0.1"), 132, 80, ip("10.0.0.0"), 8), "10.0.0.1,sctp:80,10.0.0.0/8"),
            (Entry::IpPortIp(ip("10.0.0.1"), 17, 53, ip("10.0.0.1")), "10.0.0.1,udp:53,10.0.0.1"),
        ] {
            let element = Element::of(entry);
            assert!(!matches!(element, Element::Stray(_)));
            assert_eq!((element.entry(), element.to_string()), (entry, text.to_owned()));
        }
        for entry in [
            Entry::IpPort(ip("10.0.0.1"), 136, 80),
            Entry::IpPortIp(ip("10.0.0.1"), 6, 80, ip("10.0.0.2")),
            Entry::IpPortNet(ip("10.0.0.1"), 6, 80, ip("10.0.0.0"), 77),
            Entry::Port(80),
        ] {
            assert_eq!(Element::of(entry), Element::Stray(entry));
            assert_eq!(Element::of(entry).entry(), entry);
        }
    }
}
