//! Destinations (real servers) of virtual services.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use netlink_requests::{Attributes, Writer, be16, native16, native32};

use crate::service::{AF_INET, AF_INET6, read_address, write_address};
use crate::stats::{self, Stats};

const ADDRESS: u16 = 1;
const PORT: u16 = 2;
const FORWARDING: u16 = 3;
const WEIGHT: u16 = 4;
const UPPER: u16 = 5;
const LOWER: u16 = 6;
const ACTIVE: u16 = 7;
const INACTIVE: u16 = 8;
const PERSISTENT: u16 = 9;
const FAMILY: u16 = 11;
const STATS64: u16 = 12;

/// The bits of a forwarding method; others are the kernel's own.
const FORWARDING_MASK: u32 = 7;

/// How packets get to a destination.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Forwarding {
    /// Addresses and ports are translated.
    #[default]
    Masquerade,
    /// The destination is this node.
    Local,
    /// Encapsulated.
    Tunnel,
    /// Routed as they are.
    Route,
    /// Sent to their own destination past the balancer; only made by the kernel.
    Bypass,
}

impl Forwarding {
    const fn number(self) -> u32 {
        match self {
            Self::Masquerade => 0,
            Self::Local => 1,
            Self::Tunnel => 2,
            Self::Route => 3,
            Self::Bypass => 4,
        }
    }

    const fn from_number(number: u32) -> Option<Self> {
        match number & FORWARDING_MASK {
            0 => Some(Self::Masquerade),
            1 => Some(Self::Local),
            2 => Some(Self::Tunnel),
            3 => Some(Self::Route),
            4 => Some(Self::Bypass),
            _ => None,
        }
    }
}

/// A destination of a service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Destination {
    /// Its address and port. Its family may only differ from the service's with [`Forwarding::Tunnel`].
    pub address: SocketAddr,
    /// How packets get there.
    pub forwarding: Forwarding,
    /// Its share; 0 for no new connections.
    pub weight: u32,
    /// Most connections before it gets no new ones; 0 for no limit.
    pub upper_threshold: u32,
    /// Below how many connections it gets new ones again.
    pub lower_threshold: u32,
}

impl Destination {
    /// A destination by masquerading, without thresholds.
    pub const fn new(address: SocketAddr, weight: u32) -> Self {
        Self { address, forwarding: Forwarding::Masquerade, weight, upper_threshold: 0, lower_threshold: 0 }
    }

    pub(crate) fn write(&self, w: &mut Writer) {
        write_key(w, self.address);
        for (kind, number) in [
            (FORWARDING, self.forwarding.number()),
            (WEIGHT, self.weight),
            (UPPER, self.upper_threshold),
            (LOWER, self.lower_threshold),
        ] {
            w.attribute(kind, &number.to_ne_bytes());
        }
    }
}

pub(crate) fn write_key(w: &mut Writer, address: SocketAddr) {
    let family = if address.is_ipv4() { AF_INET } else { AF_INET6 };
    w.attribute(FAMILY, &family.to_ne_bytes());
    write_address(w, ADDRESS, address.ip());
    w.attribute(PORT, &address.port().to_be_bytes());
}

/// As `ipvsadm -Sn` prints it, without the service.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.forwarding {
            Forwarding::Masquerade => "-m",
            Forwarding::Tunnel => "-i",
            Forwarding::Local | Forwarding::Route | Forwarding::Bypass => "-g",
        };
        write!(f, "-r {} {method} -w {}", self.address, self.weight)?;
        if self.upper_threshold != 0 {
            write!(f, " -x {}", self.upper_threshold)?;
        }
        if self.lower_threshold != 0 {
            write!(f, " -y {}", self.lower_threshold)?;
        }
        Ok(())
    }
}

/// A destination as the kernel lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DestinationEntry {
    /// The destination.
    pub destination: Destination,
    /// Connections that carry data.
    pub active: u32,
    /// Connections that begin or end.
    pub inactive: u32,
    /// Clients that are remembered.
    pub persistent: u32,
    /// What it carried.
    pub stats: Stats,
}

/// Reads the attributes of a destination of a service of `family`; the error names what is missing.
pub(crate) fn decode(attributes: &[u8], family: u16) -> Result<Option<DestinationEntry>, &'static str> {
    let find = |kind| Attributes::find(attributes, kind);
    let number = |kind, what| find(kind).and_then(native32).ok_or(what);
    // Kernels before 3.18 do not say, and mean the service's.
    let family = find(FAMILY).and_then(native16).filter(|f| *f != 0).unwrap_or(family);
    let address: IpAddr =
        find(ADDRESS).and_then(|b| read_address(family, b)).ok_or("a destination's address")?;
    let port = find(PORT).and_then(be16).ok_or("a destination's port")?;
    let forwarding = number(FORWARDING, "a destination's forwarding method")?;
    let Some(forwarding) = Forwarding::from_number(forwarding) else { return Ok(None) };
    let destination = Destination {
        address: SocketAddr::new(address, port),
        forwarding,
        weight: number(WEIGHT, "a destination's weight")?,
        upper_threshold: number(UPPER, "a destination's upper threshold")?,
        lower_threshold: number(LOWER, "a destination's lower threshold")?,
    };
    Ok(Some(DestinationEntry {
        destination,
        active: number(ACTIVE, "a destination's active connections").unwrap_or_default(),
        inactive: number(INACTIVE, "a destination's inactive connections").unwrap_or_default(),
        persistent: number(PERSISTENT, "a destination's persistent connections").unwrap_or_default(),
        stats: find(STATS64).map(stats::decode).unwrap_or_default(),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::service::tests::address;

    proptest! {
        #[test]
        fn what_is_decoded_is_what_was_encoded(
            address in address(), port in any::<u16>(), method in 0..5_u32, numbers in any::<[u32; 3]>()
        ) {
            let destination = Destination {
                address: SocketAddr::new(address, port),
                forwarding: Forwarding::from_number(method).unwrap(),
                weight: numbers[0],
                upper_threshold: numbers[1],
                lower_threshold: numbers[2],
            };
            let mut writer = Writer::default();
            destination.write(&mut writer);
            let decoded = decode(writer.as_bytes(), 0).unwrap().unwrap();
            prop_assert_eq!(decoded.destination, destination);
        }
    }
}
