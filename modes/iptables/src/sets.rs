//! Sets of `ipset`: what the filter table asks, and which clients an endpoint has.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::{Frontend, LocalEndpoint};

use crate::names::{self, Name};

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
    const ALL: [Self; 5] = [Self::Addresses, Self::Frontends, Self::Sources, Self::Hairpins, Self::Clients];

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

    const fn type_name(self) -> &'static str {
        match self {
            Self::Addresses | Self::Clients => "hash:ip",
            Self::Frontends => "hash:ip,port",
            Self::Sources => "hash:ip,port,net",
            Self::Hairpins => "hash:ip,port,ip",
        }
    }

    /// How ipset is told to make such a set.
    pub fn declaration(self, family: IpFamily) -> String {
        let family = match family {
            IpFamily::V4 => "inet",
            IpFamily::V6 => "inet6",
        };
        let timeout =
            if self == Self::Clients { format!(" timeout {CLIENT_TIMEOUT}") } else { String::new() };
        format!("{} family {family} maxelem {ELEMENTS_MAX}{timeout}", self.type_name())
    }

    /// The kind that is declared by these words of ipset, which may say more; `None` if none is.
    pub fn declared(family: IpFamily, type_name: &str, header: &str) -> Option<Self> {
        let said: Vec<&str> = header.split(' ').collect();
        let says = |words: &[&str]| said.windows(words.len()).any(|w| w == words);
        Self::ALL.into_iter().find(|kind| {
            let declaration = kind.declaration(family);
            let words: Vec<&str> = declaration.split(' ').collect();
            words[0] == type_name
                && words[1..].chunks(2).all(&says)
                && says(&["timeout"]) == (*kind == Self::Clients)
        })
    }
}

/// An element of a set.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Element {
    /// An address.
    Address(IpAddr),
    /// Address, protocol and port.
    Frontend(IpAddr, Protocol, u16),
    /// Address, protocol and port, and who may use it.
    Source(IpAddr, Protocol, u16, IpNet),
    /// An endpoint, from itself.
    Hairpin(LocalEndpoint),
    /// Something that is not ours, as ipset prints it.
    Stray(Name),
}

impl Element {
    /// A frontend that has an address.
    pub fn frontend(frontend: &Frontend) -> Option<Self> {
        Some(Self::Frontend(frontend.address?, frontend.protocol, frontend.port))
    }

    /// Reads an element of a set of this kind.
    pub fn parse(kind: Kind, text: &str) -> Self {
        Self::read(kind, text).unwrap_or_else(|| Self::Stray(text.into()))
    }

    fn read(kind: Kind, text: &str) -> Option<Self> {
        let mut parts = text.split(',');
        let address: IpAddr = parts.next()?.parse().ok()?;
        if matches!(kind, Kind::Addresses | Kind::Clients) {
            return parts.next().is_none().then_some(Self::Address(address));
        }
        let (protocol, port) = parts.next()?.split_once(':')?;
        let (protocol, port) = (protocol.parse().ok()?, port.parse().ok()?);
        let last = parts.next();
        if parts.next().is_some() {
            return None;
        }
        match (kind, last) {
            (Kind::Frontends, None) => Some(Self::Frontend(address, protocol, port)),
            (Kind::Sources, Some(range)) => {
                let range =
                    range.parse().ok().or_else(|| Some(IpNet::from(range.parse::<IpAddr>().ok()?)))?;
                Some(Self::Source(address, protocol, port, range))
            }
            (Kind::Hairpins, Some(source)) if source.parse() == Ok(address) => {
                Some(Self::Hairpin(LocalEndpoint { address, protocol, port }))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Frontend(address, protocol, port) => write!(f, "{address},{protocol}:{port}"),
            Self::Source(address, protocol, port, range) => write!(f, "{address},{protocol}:{port},{range}"),
            Self::Hairpin(e) => write!(f, "{0},{1}:{2},{0}", e.address, e.protocol, e.port),
            Self::Stray(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_are_recognised_in_what_ipset_prints() {
        for family in IpFamily::ALL {
            for kind in Kind::ALL {
                let declaration = kind.declaration(family);
                let (type_name, header) = declaration.split_once(' ').unwrap();
                let printed = format!(
                    "{} bucketsize 12 initval 0x1",
                    header.replace("maxelem", "hashsize 1024 maxelem")
                );
                assert_eq!(Kind::declared(family, type_name, &printed), Some(kind), "{printed}");
            }
        }
        let of = |header| Kind::declared(IpFamily::V4, "hash:ip", header);
        assert_eq!(of("family inet hashsize 1024 maxelem 65536"), None);
        assert_eq!(of("family inet hashsize 1024 maxelem 4194304 timeout 7"), None);
        assert_eq!(of("family inet6 hashsize 1024 maxelem 4194304"), None);
    }

    #[test]
    fn elements_are_read_as_they_are_printed() {
        for (kind, text) in [
            (Kind::Addresses, "10.0.0.1"),
            (Kind::Frontends, "fd00::1,tcp:80"),
            (Kind::Sources, "10.0.0.1,sctp:80,10.0.0.0/8"),
            (Kind::Hairpins, "10.0.0.1,udp:53,10.0.0.1"),
        ] {
            let element = Element::parse(kind, text);
            assert!(!matches!(element, Element::Stray(_)));
            assert_eq!(element.to_string(), text);
        }
        assert_eq!(
            Element::parse(Kind::Sources, "10.0.0.1,tcp:80,10.0.0.7").to_string(),
            "10.0.0.1,tcp:80,10.0.0.7/32"
        );
        for (kind, text) in [
            (Kind::Frontends, "10.0.0.1"),
            (Kind::Hairpins, "10.0.0.1,tcp:80,10.0.0.2"),
            (Kind::Addresses, "x"),
        ] {
            assert_eq!(Element::parse(kind, text), Element::Stray(text.into()));
        }
    }
}
