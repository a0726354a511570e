//! Virtual services.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_requests::{Attributes, Writer, be16, native16, native32, text};

use crate::stats::{self, Stats};

pub(crate) const AF_INET: u16 = 2;
pub(crate) const AF_INET6: u16 = 10;

const AF: u16 = 1;
const PROTOCOL: u16 = 2;
const ADDRESS: u16 = 3;
const PORT: u16 = 4;
const FWMARK: u16 = 5;
const SCHEDULER: u16 = 6;
const FLAGS: u16 = 7;
const TIMEOUT: u16 = 8;
const NETMASK: u16 = 9;
const PE_NAME: u16 = 11;
const STATS64: u16 = 12;

const FLAG_PERSISTENT: u32 = 1;
const FLAG_ONE_PACKET: u32 = 4;
const FLAG_SCHEDULER: [u32; 3] = [8, 16, 32];
/// Flags that a request may change; the kernel's own (`IP_VS_SVC_F_HASHED`) are left alone.
const FLAGS_OURS: u32 = FLAG_PERSISTENT | FLAG_ONE_PACKET | 8 | 16 | 32;

/// Transport protocols that IPVS balances.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// The number in IP headers.
    pub const fn number(self) -> u16 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol of a number.
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// What a packet must match.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ServiceKey {
    /// Destination address, protocol and port. Port 0 means every port, which the kernel only takes for
    /// persistent services.
    Address {
        /// Destination address.
        address: IpAddr,
        /// Protocol.
        protocol: Protocol,
        /// Destination port.
        port: u16,
    },
    /// The packet's mark, whatever its address, protocol and port. Marks are looked at first.
    Mark {
        /// Whether the service is for IPv6.
        ipv6: bool,
        /// The whole mark; never 0.
        mark: u32,
    },
}

impl ServiceKey {
    pub(crate) const fn family(&self) -> u16 {
        match self {
            Self::Address { address: IpAddr::V4(_), .. } | Self::Mark { ipv6: false, .. } => AF_INET,
            Self::Address { .. } | Self::Mark { .. } => AF_INET6,
        }
    }

    /// Whether the service is for IPv6.
    pub const fn is_ipv6(&self) -> bool {
        self.family() == AF_INET6
    }

    pub(crate) fn write(&self, w: &mut Writer) {
        w.attribute(AF, &self.family().to_ne_bytes());
        match self {
            Self::Address { address, protocol, port } => {
                w.attribute(PROTOCOL, &protocol.number().to_ne_bytes());
                write_address(w, ADDRESS, *address);
                w.attribute(PORT, &port.to_be_bytes());
            }
            Self::Mark { mark, .. } => w.attribute(FWMARK, &mark.to_ne_bytes()),
        }
    }
}

/// As `ipvsadm -Sn` prints it, option included: `-t 10.96.0.1:443`, `-f 7 -6`.
impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { address, protocol, port } => {
                let option = match protocol {
                    Protocol::Tcp => "-t",
                    Protocol::Udp => "-u",
                    Protocol::Sctp => "--sctp-service",
                };
                write!(f, "{option} {}", std::net::SocketAddr::new(*address, *port))
            }
            Self::Mark { ipv6, mark } => write!(f, "-f {mark}{}", if *ipv6 { " -6" } else { "" }),
        }
    }
}

/// Switches of a service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Flags {
    /// Each UDP packet is scheduled on its own (`--ops`).
    pub one_packet: bool,
    /// The scheduler's own flags 1 to 3; for `sh` and `mh`: fall back to another destination (1), hash
    /// the source port too (2).
    pub scheduler: [bool; 3],
}

impl Flags {
    fn bits(self) -> u32 {
        let scheduler = FLAG_SCHEDULER.iter().zip(self.scheduler).filter(|(_, on)| *on).map(|(bit, _)| bit);
        scheduler.sum::<u32>() | if self.one_packet { FLAG_ONE_PACKET } else { 0 }
    }

    const fn from_bits(bits: u32) -> Self {
        Self {
            one_packet: bits & FLAG_ONE_PACKET != 0,
            scheduler: [bits & 8 != 0, bits & 16 != 0, bits & 32 != 0],
        }
    }
}

/// A client that comes back within a time gets the same destination.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Persistence {
    /// Seconds; at least 1.
    pub timeout: u32,
    /// Length of the prefix by which clients are told apart: 32 or 128 for single addresses, at least 1.
    pub prefix: u8,
}

/// A virtual service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Service {
    /// What it matches.
    pub key: ServiceKey,
    /// Name of the scheduler, `rr` for instance.
    pub scheduler: String,
    /// Switches.
    pub flags: Flags,
    /// Persistence, if any.
    pub persistence: Option<Persistence>,
    /// Name of the persistence engine (`sip`), if any. The kernel takes it for persistent services only.
    pub persistence_engine: Option<String>,
}

impl Service {
    /// A service without flags and persistence.
    pub fn new(key: ServiceKey, scheduler: &str) -> Self {
        Self {
            key,
            scheduler: scheduler.to_owned(),
            flags: Flags::default(),
            persistence: None,
            persistence_engine: None,
        }
    }

    pub(crate) fn write(&self, w: &mut Writer) {
        self.key.write(w);
        w.string(SCHEDULER, &self.scheduler);
        if let Some(engine) = &self.persistence_engine {
            w.string(PE_NAME, engine);
        }
        let persistent = if self.persistence.is_some() { FLAG_PERSISTENT } else { 0 };
        let mut flags = (self.flags.bits() | persistent).to_ne_bytes().to_vec();
        flags.extend_from_slice(&FLAGS_OURS.to_ne_bytes());
        w.attribute(FLAGS, &flags);
        w.attribute(TIMEOUT, &self.persistence.map_or(0, |p| p.timeout).to_ne_bytes());
        let prefix = self.persistence.map(|p| p.prefix);
        if self.key.is_ipv6() {
            // A length, unlike for IPv4; the kernel refuses 0.
            w.attribute(NETMASK, &u32::from(prefix.unwrap_or(128)).to_ne_bytes());
        } else {
            w.attribute(NETMASK, &mask_of(prefix.unwrap_or(32)).to_be_bytes());
        }
    }
}

fn mask_of(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(prefix))).unwrap_or(0)
}

/// As `ipvsadm -Sn` prints it, without the `-A`.
impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -s {}", self.key, self.scheduler)?;
        if let Some(persistence) = &self.persistence {
            write!(f, " -p {}", persistence.timeout)?;
            match persistence.prefix {
                32 if !self.key.is_ipv6() => {}
                128 if self.key.is_ipv6() => {}
                prefix if self.key.is_ipv6() => write!(f, " -M {prefix}")?,
                prefix => write!(f, " -M {}", Ipv4Addr::from(mask_of(prefix)))?,
            }
        }
        if let Some(engine) = &self.persistence_engine {
            write!(f, " --pe {engine}")?;
        }
        if self.flags.one_packet {
            f.write_str(" -o")?;
        }
        let named = match self.scheduler.as_str() {
            "sh" => ["sh-fallback", "sh-port", "flag-3"],
            "mh" => ["mh-fallback", "mh-port", "flag-3"],
            _ => ["flag-1", "flag-2", "flag-3"],
        };
        let set: Vec<&str> =
            named.iter().zip(self.flags.scheduler).filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        if set.is_empty() { Ok(()) } else { write!(f, " -b {}", set.join(",")) }
    }
}

/// A service as the kernel lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceEntry {
    /// The service.
    pub service: Service,
    /// What it carried.
    pub stats: Stats,
}

pub(crate) fn write_address(w: &mut Writer, kind: u16, address: IpAddr) {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(a) => bytes[..4].copy_from_slice(&a.octets()),
        IpAddr::V6(a) => bytes = a.octets(),
    }
    w.attribute(kind, &bytes);
}

pub(crate) fn read_address(family: u16, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => bytes.first_chunk::<4>().map(|b| Ipv4Addr::from(*b).into()),
        AF_INET6 => bytes.first_chunk::<16>().map(|b| Ipv6Addr::from(*b).into()),
        _ => None,
    }
}

/// Reads the attributes of a service. The error names what is missing; `Ok(None)` is a service of a
/// kind that is not known.
pub(crate) fn decode(attributes: &[u8]) -> Result<Option<ServiceEntry>, &'static str> {
    let find = |kind| Attributes::find(attributes, kind);
    let family = find(AF).and_then(native16).ok_or("a service's family")?;
    let key = if let Some(mark) = find(FWMARK) {
        let mark = native32(mark).ok_or("a service's mark")?;
        match family {
            AF_INET | AF_INET6 => ServiceKey::Mark { ipv6: family == AF_INET6, mark },
            _ => return Ok(None),
        }
    } else {
        let protocol = find(PROTOCOL).and_then(native16).ok_or("a service's protocol")?;
        let Some(protocol) = Protocol::from_number(protocol) else { return Ok(None) };
        if !matches!(family, AF_INET | AF_INET6) {
            return Ok(None);
        }
        let address = find(ADDRESS).and_then(|b| read_address(family, b)).ok_or("a service's address")?;
        let port = find(PORT).and_then(be16).ok_or("a service's port")?;
        ServiceKey::Address { address, protocol, port }
    };
    let scheduler = find(SCHEDULER).and_then(text).ok_or("a service's scheduler")?.to_owned();
    let flags = find(FLAGS).and_then(|b| b.first_chunk::<4>()).ok_or("a service's flags")?;
    let flags = u32::from_ne_bytes(*flags);
    let timeout = find(TIMEOUT).and_then(native32).ok_or("a service's timeout")?;
    let netmask = find(NETMASK).and_then(|b| b.first_chunk::<4>()).ok_or("a service's netmask")?;
    let prefix = if family == AF_INET6 {
        u8::try_from(u32::from_ne_bytes(*netmask)).unwrap_or(128)
    } else {
        u32::from_be_bytes(*netmask).leading_ones() as u8
    };
    let persistence = (flags & FLAG_PERSISTENT != 0).then_some(Persistence { timeout, prefix });
    let engine = find(PE_NAME).and_then(text).filter(|e| !e.is_empty()).map(str::to_owned);
    let stats = find(STATS64).map(stats::decode).unwrap_or_default();
    let service =
        Service { key, scheduler, flags: Flags::from_bits(flags), persistence, persistence_engine: engine };
    Ok(Some(ServiceEntry { service, stats }))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)]
    }

    pub(crate) fn key() -> impl Strategy<Value = ServiceKey> {
        let protocol = prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp), Just(Protocol::Sctp)];
        prop_oneof![
            (address(), protocol, any::<u16>()).prop_map(|(address, protocol, port)| ServiceKey::Address {
                address,
                protocol,
                port
            }),
            (any::<bool>(), 1..u32::MAX).prop_map(|(ipv6, mark)| ServiceKey::Mark { ipv6, mark }),
        ]
    }

    fn service() -> impl Strategy<Value = Service> {
        let flags = (any::<bool>(), any::<[bool; 3]>())
            .prop_map(|(one_packet, scheduler)| Flags { one_packet, scheduler });
        let engine = proptest::option::of(Just("sip".to_owned()));
        (key(), "[a-z]{1,15}", flags, proptest::option::of((any::<u32>(), 1..=128_u8)), engine).prop_map(
            |(key, scheduler, flags, persistence, persistence_engine)| {
                let most = if key.is_ipv6() { 128 } else { 32 };
                let persistence =
                    persistence.map(|(timeout, prefix)| Persistence { timeout, prefix: prefix.min(most) });
                Service { key, scheduler, flags, persistence, persistence_engine }
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_decoded_is_what_was_encoded(service in service()) {
            let mut writer = Writer::default();
            service.write(&mut writer);
            let decoded = decode(writer.as_bytes()).unwrap().unwrap();
            prop_assert_eq!(decoded.service, service);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            crate::raw::decode(&bytes);
        }

        #[test]
        fn damaged_services_do_not_panic(
            service in service(), cut in any::<prop::sample::Index>(), flips in any::<[(prop::sample::Index, u8); 4]>()
        ) {
            let mut writer = Writer::default();
            service.write(&mut writer);
            let mut buf = writer.as_bytes().to_vec();
            for (at, with) in flips {
                let at = at.index(buf.len());
                buf[at] = with;
            }
            buf.truncate(cut.index(buf.len() + 1));
            crate::raw::decode(&buf);
        }
    }

    #[test]
    fn services_print_as_ipvsadm_prints_them() {
        let address =
            ServiceKey::Address { address: "fd00::1".parse().unwrap(), protocol: Protocol::Sctp, port: 9 };
        let mut service = Service::new(address, "mh");
        service.flags.scheduler = [true, true, false];
        service.persistence = Some(Persistence { timeout: 300, prefix: 64 });
        assert_eq!(
            service.to_string(),
            "--sctp-service [fd00::1]:9 -s mh -p 300 -M 64 -b mh-fallback,mh-port"
        );
        let mark = Service::new(ServiceKey::Mark { ipv6: true, mark: 7 }, "rr");
        assert_eq!(mark.to_string(), "-f 7 -6 -s rr");
    }
}
