//! Elements of sets.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_requests::{Attributes, Writer, be16};

use crate::set::{BIG_ENDIAN, Kind};

const IP: u16 = 1;
const CIDR: u16 = 3;
const PORT: u16 = 4;
const PROTOCOL: u16 = 7;
const IP2: u16 = 20;
const CIDR2: u16 = 21;
const SKBMARK: u16 = 27;

const ADDRESS_V4: u16 = 1;
const ADDRESS_V6: u16 = 2;

/// What of a packet an element matches. Protocols are the numbers of IP headers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Entry {
    /// Of `hash:ip`.
    Ip(IpAddr),
    /// Of `hash:ip,port`.
    IpPort(IpAddr, u8, u16),
    /// Of `hash:ip,port,ip`.
    IpPortIp(IpAddr, u8, u16, IpAddr),
    /// Of `hash:ip,port,net`: the network's address and the length of its prefix.
    IpPortNet(IpAddr, u8, u16, IpAddr, u8),
    /// Of `hash:net`.
    Net(IpAddr, u8),
    /// Of `bitmap:port`.
    Port(u16),
}

/// The mark that a packet gets: the bits in `mask` become those of `value`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Mark {
    /// New bits.
    pub value: u32,
    /// Which bits.
    pub mask: u32,
}

/// An element.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Element {
    /// What it matches.
    pub entry: Entry,
    /// What a matching packet is marked with, in sets with marks.
    pub mark: Option<Mark>,
}

impl From<Entry> for Element {
    fn from(entry: Entry) -> Self {
        Self { entry, mark: None }
    }
}

impl Entry {
    /// The type of the sets that it belongs into.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Ip(_) => Kind::HashIp,
            Self::IpPort(..) => Kind::HashIpPort,
            Self::IpPortIp(..) => Kind::HashIpPortIp,
            Self::IpPortNet(..) => Kind::HashIpPortNet,
            Self::Net(..) => Kind::HashNet,
            Self::Port(_) => Kind::BitmapPort,
        }
    }
}

fn protocol_name(number: u8) -> Option<&'static str> {
    match number {
        6 => Some("tcp"),
        17 => Some("udp"),
        132 => Some("sctp"),
        _ => None,
    }
}

struct Port(u8, u16);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match protocol_name(self.0) {
            Some(name) => write!(f, "{name}:{}", self.1),
            None => write!(f, "{}:{}", self.0, self.1),
        }
    }
}

/// A network as ipset prints it: single addresses without their length.
struct Network(IpAddr, u8);

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.0.is_ipv4() { 32 } else { 128 };
        if self.1 == whole { self.0.fmt(f) } else { write!(f, "{}/{}", self.0, self.1) }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Ip(ip) => ip.fmt(f),
            Self::IpPort(ip, protocol, port) => write!(f, "{ip},{}", Port(protocol, port)),
            Self::IpPortIp(ip, protocol, port, other) => write!(f, "{ip},{},{other}", Port(protocol, port)),
            Self::IpPortNet(ip, protocol, port, net, prefix) => {
                write!(f, "{ip},{},{}", Port(protocol, port), Network(net, prefix))
            }
            Self::Net(net, prefix) => Network(net, prefix).fmt(f),
            Self::Port(port) => port.fmt(f),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.entry.fmt(f)?;
        match self.mark {
            Some(Mark { value, mask: u32::MAX }) => write!(f, " skbmark 0x{value:x}"),
            Some(Mark { value, mask }) => write!(f, " skbmark 0x{value:x}/0x{mask:x}"),
            None => Ok(()),
        }
    }
}

fn write_address(w: &mut Writer, kind: u16, address: IpAddr) {
    w.nest(kind, |w| match address {
        IpAddr::V4(a) => w.attribute(ADDRESS_V4 | BIG_ENDIAN, &a.octets()),
        IpAddr::V6(a) => w.attribute(ADDRESS_V6 | BIG_ENDIAN, &a.octets()),
    });
}

fn read_address(value: &[u8]) -> Option<IpAddr> {
    let v4 = || Attributes::find(value, ADDRESS_V4)?.first_chunk::<4>().map(|b| Ipv4Addr::from(*b).into());
    let v6 = || Attributes::find(value, ADDRESS_V6)?.first_chunk::<16>().map(|b| Ipv6Addr::from(*b).into());
    v4().or_else(v6)
}

impl Element {
    /// Writes the attributes of one element.
    pub(crate) fn write(&self, w: &mut Writer) {
        let port = |w: &mut Writer, protocol: u8, port: u16| {
            w.attribute(PORT | BIG_ENDIAN, &port.to_be_bytes());
            w.attribute(PROTOCOL, &[protocol]);
        };
        match self.entry {
            Entry::Ip(ip) => write_address(w, IP, ip),
            Entry::IpPort(ip, protocol, number) => {
                write_address(w, IP, ip);
                port(w, protocol, number);
            }
            Entry::IpPortIp(ip, protocol, number, other) => {
                write_address(w, IP, ip);
                port(w, protocol, number);
                write_address(w, IP2, other);
            }
            Entry::IpPortNet(ip, protocol, number, net, prefix) => {
                write_address(w, IP, ip);
                port(w, protocol, number);
                write_address(w, IP2, net);
                w.attribute(CIDR2, &[prefix]);
            }
            Entry::Net(net, prefix) => {
                write_address(w, IP, net);
                w.attribute(CIDR, &[prefix]);
            }
            Entry::Port(number) => w.attribute(PORT | BIG_ENDIAN, &number.to_be_bytes()),
        }
        if let Some(Mark { value, mask }) = self.mark {
            let both = u64::from(value) << 32 | u64::from(mask);
            w.attribute(SKBMARK | BIG_ENDIAN, &both.to_be_bytes());
        }
    }
}

/// Reads an element of a set; `None` if something is missing.
pub(crate) fn decode(kind: Kind, attributes: &[u8]) -> Option<Element> {
    let find = |wanted| Attributes::find(attributes, wanted);
    let address = |wanted| find(wanted).and_then(read_address);
    let port = || find(PORT).and_then(be16);
    let byte = |wanted| find(wanted).and_then(|v| v.first().copied());
    let whole = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
    let entry = match kind {
        Kind::HashIp => Entry::Ip(address(IP)?),
        Kind::HashIpPort => Entry::IpPort(address(IP)?, byte(PROTOCOL)?, port()?),
        Kind::HashIpPortIp => Entry::IpPortIp(address(IP)?, byte(PROTOCOL)?, port()?, address(IP2)?),
        Kind::HashIpPortNet => {
            let net = address(IP2)?;
            let prefix = byte(CIDR2).unwrap_or(whole(net));
            Entry::IpPortNet(address(IP)?, byte(PROTOCOL)?, port()?, net, prefix)
        }
        Kind::HashNet => {
            let net = address(IP)?;
            Entry::Net(net, byte(CIDR).unwrap_or(whole(net)))
        }
        Kind::BitmapPort => Entry::Port(port()?),
    };
    let mark = find(SKBMARK).and_then(|v| v.try_into().ok()).map(u64::from_be_bytes);
    let mark = mark.map(|both| Mark { value: (both >> 32) as u32, mask: both as u32 });
    Some(Element { entry, mark })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)]
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let all = (address(), any::<u8>(), any::<u16>(), address(), 1..=32_u8, 0..6_u8);
        all.prop_map(|(ip, protocol, port, other, prefix, which)| match which {
            0 => Entry::Ip(ip),
            1 => Entry::IpPort(ip, protocol, port),
            2 => Entry::IpPortIp(ip, protocol, port, other),
            3 => Entry::IpPortNet(ip, protocol, port, other, prefix),
            4 => Entry::Net(ip, prefix),
            _ => Entry::Port(port),
        })
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_what_was_encoded(
            entry in entry(), mark in proptest::option::of(any::<(u32, u32)>())
        ) {
            let element = Element { entry, mark: mark.map(|(value, mask)| Mark { value, mask }) };
            let mut writer = Writer::default();
            element.write(&mut writer);
            prop_assert_eq!(decode(entry.kind(), writer.as_bytes()), Some(element));
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            crate::raw::decode(&bytes);
        }
    }

    #[test]
    fn elements_print_as_ipset_prints_them() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let mark = Some(Mark { value: 0x5e00_0001, mask: u32::MAX });
        for (element, text) in [
            (Entry::IpPort(ip("10.0.0.1"), 6, 80).into(), "10.0.0.1,tcp:80"),
            (Entry::IpPortNet(ip("fd00::1"), 132, 9, ip("fd01::"), 64).into(), "fd00::1,sctp:9,fd01::/64"),
            (Entry::IpPortNet(ip("10.0.0.1"), 17, 9, ip("10.0.0.2"), 32).into(), "10.0.0.1,udp:9,10.0.0.2"),
            (Element { entry: Entry::Port(7), mark }, "7 skbmark 0x5e000001"),
        ] {
            assert_eq!(Element::to_string(&element), text);
        }
    }
}
