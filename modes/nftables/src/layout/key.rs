//! Keys and data of elements as the kernel holds them: fields one after the other, each padded to four bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nft_netlink::Bytes;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::{Frontend, LocalEndpoint};

use super::List;

/// Address and port of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
}

/// Builds keys and data: fields one after the other, each padded to four bytes.
pub struct Key {
    bytes: [u8; 48],
    len: usize,
}

impl Default for Key {
    fn default() -> Self {
        Self { bytes: [0; 48], len: 0 }
    }
}

impl Key {
    fn field(mut self, field: &[u8]) -> Self {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len().next_multiple_of(4);
        self
    }

    /// An address, 4 or 16 bytes.
    #[must_use]
    pub fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => self.field(&a.octets()),
            IpAddr::V6(a) => self.field(&a.octets()),
        }
    }

    /// A protocol, one byte.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        self.field(&[protocol.number()])
    }

    /// A port, two bytes in network order.
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    /// A number in host order.
    #[must_use]
    pub fn number(self, number: u32) -> Self {
        self.field(&number.to_ne_bytes())
    }

    /// The finished key.
    pub fn done(self) -> Bytes {
        Bytes::from(&self.bytes[..self.len])
    }
}

/// Key of a frontend in its map of classes.
pub fn frontend_key(frontend: &Frontend) -> Key {
    let key = frontend.address.map_or_else(Key::default, |a| Key::default().address(a));
    key.protocol(frontend.protocol).port(frontend.port)
}

/// Key of an endpoint in its map.
pub fn slot_key(frontend: &Frontend, list: List, index: u32) -> Bytes {
    frontend_key(frontend).number(list.base() + index).done()
}

/// Data of an endpoint in its map.
pub fn endpoint_data(endpoint: &Endpoint) -> Bytes {
    Key::default().address(endpoint.address).port(endpoint.port).done()
}

/// Key of a hairpin.
pub fn hairpin_key(endpoint: &LocalEndpoint) -> Bytes {
    Key::default()
        .address(endpoint.address)
        .address(endpoint.address)
        .protocol(endpoint.protocol)
        .port(endpoint.port)
        .done()
}

/// Reads keys and data back.
pub struct KeyReader<'a>(&'a [u8]);

impl<'a> KeyReader<'a> {
    /// Reads from the start of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn field<const N: usize>(&mut self) -> Option<[u8; N]> {
        let field = self.0.get(..N)?.try_into().ok()?;
        self.0 = self.0.get(N.next_multiple_of(4)..).unwrap_or_default();
        Some(field)
    }

    /// An address of a family.
    pub fn address(&mut self, family: IpFamily) -> Option<IpAddr> {
        match family {
            IpFamily::V4 => self.field::<4>().map(|a| IpAddr::V4(Ipv4Addr::from(a))),
            IpFamily::V6 => self.field::<16>().map(|a| IpAddr::V6(Ipv6Addr::from(a))),
        }
    }

    /// A protocol that Services have.
    pub fn protocol(&mut self) -> Option<Protocol> {
        self.field::<1>().and_then(|[n]| Protocol::from_number(n))
    }

    /// A port.
    pub fn port(&mut self) -> Option<u16> {
        self.field().map(u16::from_be_bytes)
    }

    /// A number in host order.
    pub fn number(&mut self) -> Option<u32> {
        self.field().map(u32::from_ne_bytes)
    }

    /// A frontend; `family` is `None` for node ports, which have no address.
    pub fn frontend(&mut self, family: Option<IpFamily>) -> Option<Frontend> {
        let address = match family {
            Some(family) => Some(self.address(family)?),
            None => None,
        };
        Some(Frontend { address, protocol: self.protocol()?, port: self.port()? })
    }

    /// An endpoint.
    pub fn endpoint(&mut self, family: IpFamily) -> Option<Endpoint> {
        Some(Endpoint { address: self.address(family)?, port: self.port()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::SECOND_LIST_BASE;

    #[test]
    fn keys_are_read_back() {
        let frontend =
            Frontend { address: Some("2001:db8::1".parse().unwrap()), protocol: Protocol::Udp, port: 53 };
        let key = slot_key(&frontend, List::Second, 4);
        let mut reader = KeyReader::new(&key);
        assert_eq!(reader.frontend(Some(IpFamily::V6)), Some(frontend));
        assert_eq!(reader.number(), Some(SECOND_LIST_BASE + 4));
        assert_eq!(key.len(), 28);
    }
}
