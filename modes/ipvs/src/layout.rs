//! Names and numbers of what the mode owns.

use std::fmt;
use std::net::IpAddr;

use ipset_netlink::{Entry, Family, Kind, Set};
use ipvs_netlink::{Protocol as Transport, ServiceKey};
use shunt_core::id::{IpFamily, Protocol};

/// The dummy link that holds all VIPs: what makes the kernel take packets to them in (kube-proxy's name).
pub const LINK: &str = "kube-ipvs0";

/// Most elements of a set: as kernel memory is taken only as sets grow, large enough for all.
const MAX_ELEMENTS: u32 = 1 << 20;

/// An address, protocol and port at which something is served.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Place {
    /// Address.
    pub address: IpAddr,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

impl Place {
    /// The virtual server of this place.
    pub const fn key(&self) -> ServiceKey {
        let protocol = match self.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        };
        ServiceKey::Address { address: self.address, protocol, port: self.port }
    }

    /// The place of a virtual server; `None` for one by mark.
    pub const fn of(key: &ServiceKey) -> Option<Self> {
        match *key {
            ServiceKey::Address { address, protocol, port } => {
                let protocol = match protocol {
                    Transport::Tcp => Protocol::Tcp,
                    Transport::Udp => Protocol::Udp,
                    Transport::Sctp => Protocol::Sctp,
                };
                Some(Self { address, protocol, port })
            }
            ServiceKey::Mark { .. } => None,
        }
    }

    /// The element of this place in sets of `hash:ip,port`.
    pub const fn entry(&self) -> Entry {
        Entry::IpPort(self.address, self.protocol.number(), self.port)
    }

    /// The place that an element begins with.
    pub fn of_entry(entry: &Entry) -> Option<Self> {
        let (Entry::IpPort(address, protocol, port)
        | Entry::IpPortIp(address, protocol, port, _)
        | Entry::IpPortNet(address, protocol, port, ..)) = *entry
        else {
            return None;
        };
        let protocol =
            [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.number() == protocol)?;
        Some(Self { address, protocol, port })
    }
}

/// The sets of one family. Names that kube-proxy has mean what they mean there; the last four are ours.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SetName {
    /// Local endpoints with themselves: a connection to itself gets another source.
    LoopBack,
    /// Places of cluster IPs.
    ClusterIp,
    /// Places of external IPs whose traffic goes to all endpoints.
    ExternalIp,
    /// Places of external IPs whose traffic from outside goes to local endpoints.
    ExternalIpLocal,
    /// Places of load-balancer VIPs.
    LoadBalancer,
    /// Those of them whose traffic from outside goes to local endpoints.
    LoadBalancerLocal,
    /// Places with source ranges.
    LoadBalancerFw,
    /// VIPs that may be sources at their own places.
    LoadBalancerSourceIp,
    /// Source ranges of places.
    LoadBalancerSourceCidr,
    /// TCP node ports.
    NodePortTcp,
    /// TCP node ports whose traffic from outside goes to local endpoints.
    NodePortLocalTcp,
    /// UDP node ports.
    NodePortUdp,
    /// UDP node ports whose traffic from outside goes to local endpoints.
    NodePortLocalUdp,
    /// Places of SCTP node ports.
    NodePortSctp,
    /// Those of them whose traffic from outside goes to local endpoints.
    NodePortLocalSctp,
    /// Ports on which the agent tells load balancers of local endpoints.
    HealthCheckNodePort,
    /// All addresses on the dummy link.
    IpvsIps,
    /// Addresses on which node ports answer.
    NodePortIps,
    /// Places at which pods and the node are served by another virtual server, and its mark.
    Fwmark,
    /// Places whose traffic (from outside, if they are in `KUBE-FWMARK`) has no local endpoint.
    NoLocal,
    /// Ranges of cluster IPs.
    ServiceCidr,
}

impl SetName {
    /// All sets.
    pub const ALL: [Self; 21] = [
        Self::LoopBack,
        Self::ClusterIp,
        Self::ExternalIp,
        Self::ExternalIpLocal,
        Self::LoadBalancer,
        Self::LoadBalancerLocal,
        Self::LoadBalancerFw,
        Self::LoadBalancerSourceIp,
        Self::LoadBalancerSourceCidr,
        Self::NodePortTcp,
        Self::NodePortLocalTcp,
        Self::NodePortUdp,
        Self::NodePortLocalUdp,
        Self::NodePortSctp,
        Self::NodePortLocalSctp,
        Self::HealthCheckNodePort,
        Self::IpvsIps,
        Self::NodePortIps,
        Self::Fwmark,
        Self::NoLocal,
        Self::ServiceCidr,
    ];

    const fn suffix(self) -> &'static str {
        match self {
            Self::LoopBack => "LOOP-BACK",
            Self::ClusterIp => "CLUSTER-IP",
            Self::ExternalIp => "EXTERNAL-IP",
            Self::ExternalIpLocal => "EXTERNAL-IP-LOCAL",
            Self::LoadBalancer => "LOAD-BALANCER",
            Self::LoadBalancerLocal => "LOAD-BALANCER-LOCAL",
            Self::LoadBalancerFw => "LOAD-BALANCER-FW",
            Self::LoadBalancerSourceIp => "LOAD-BALANCER-SOURCE-IP",
            Self::LoadBalancerSourceCidr => "LOAD-BALANCER-SOURCE-CIDR",
            Self::NodePortTcp => "NODE-PORT-TCP",
            Self::NodePortLocalTcp => "NODE-PORT-LOCAL-TCP",
            Self::NodePortUdp => "NODE-PORT-UDP",
            Self::NodePortLocalUdp => "NODE-PORT-LOCAL-UDP",
            Self::NodePortSctp => "NODE-PORT-SCTP-HASH",
            Self::NodePortLocalSctp => "NODE-PORT-LOCAL-SCTP-HASH",
            Self::HealthCheckNodePort => "HEALTH-CHECK-NODE-PORT",
            Self::IpvsIps => "IPVS-IPS",
            Self::NodePortIps => "NODE-PORT-IPS",
            Self::Fwmark => "FWMARK",
            Self::NoLocal => "NO-LOCAL",
            Self::ServiceCidr => "SERVICE-CIDR",
        }
    }

    /// The name in the kernel, cut to what it takes, as kube-proxy does.
    pub fn name(self, family: IpFamily) -> String {
        const MOST: usize = 31;
        let prefix = match family {
            IpFamily::V4 => "KUBE-",
            IpFamily::V6 => "KUBE-6-",
        };
        let mut name = format!("{prefix}{}", self.suffix());
        name.truncate(MOST);
        name
    }

    /// The set of a name.
    pub fn from_name(family: IpFamily, name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|set| set.name(family) == name)
    }

    /// Its type.
    pub const fn kind(self) -> Kind {
        match self {
            Self::LoopBack | Self::LoadBalancerSourceIp => Kind::HashIpPortIp,
            Self::LoadBalancerSourceCidr => Kind::HashIpPortNet,
            Self::NodePortTcp
            | Self::NodePortLocalTcp
            | Self::NodePortUdp
            | Self::NodePortLocalUdp
            | Self::HealthCheckNodePort => Kind::BitmapPort,
            Self::IpvsIps | Self::NodePortIps => Kind::HashIp,
            Self::ServiceCidr => Kind::HashNet,
            _ => Kind::HashIpPort,
        }
    }

    /// Its declaration.
    pub fn declaration(self, family: IpFamily) -> Set {
        let bitmap = self.kind() == Kind::BitmapPort;
        let of = match family {
            IpFamily::V4 => Family::Inet,
            IpFamily::V6 => Family::Inet6,
        };
        Set {
            name: self.name(family),
            kind: self.kind(),
            family: (!bitmap).then_some(of),
            max_elements: if bitmap { 0 } else { MAX_ELEMENTS },
            timeout: None,
            marks: self == Self::Fwmark,
        }
    }

    /// The sets of node ports of a protocol: all of them, and the local ones.
    pub const fn node_ports(protocol: Protocol) -> [Self; 2] {
        match protocol {
            Protocol::Tcp => [Self::NodePortTcp, Self::NodePortLocalTcp],
            Protocol::Udp => [Self::NodePortUdp, Self::NodePortLocalUdp],
            Protocol::Sctp => [Self::NodePortSctp, Self::NodePortLocalSctp],
        }
    }
}

/// As IPv4 names it.
impl fmt::Display for SetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KUBE-{}", self.suffix())
    }
}

/// Which seven bits say that a mark is ours, before room is made for the masquerade bit.
const TAG: u32 = 0x2e;
const ID_BITS: u32 = 24;
/// Largest id of a mark.
pub const ID_MAX: u32 = (1 << ID_BITS) - 1;

/// Spreads 31 bits over all places but the one of the masquerade bit, which rules set on their own.
const fn spread(value: u32, masquerade_bit: u8) -> u32 {
    let below = (1_u32 << masquerade_bit) - 1;
    let above = value & !below;
    // Bit 31 of `value` is never set.
    (above << 1) | (value & below)
}

/// Tag and id of a mark, for a masquerade bit. IPVS compares the whole mark.
pub const fn mark(id: u32, masquerade_bit: u8) -> u32 {
    spread((TAG << ID_BITS) | (id & ID_MAX), masquerade_bit)
}

/// The bits of the tag.
pub const fn tag_mask(masquerade_bit: u8) -> u32 {
    spread(0x7f << ID_BITS, masquerade_bit)
}

/// The id of a mark, with or without the masquerade bit; `None` if it is not one of ours.
pub fn mark_id(mark_of: u32, masquerade_bit: u8) -> Option<u32> {
    let bare = mark_of & !(1 << masquerade_bit);
    if bare & tag_mask(masquerade_bit) != mark(0, masquerade_bit) {
        return None;
    }
    let below = (1_u32 << masquerade_bit) - 1;
    Some((((bare >> 1) & !below) | (bare & below)) & ID_MAX)
}

/// Whether a mark is one of ours, whatever the masquerade bit was when it was made.
pub fn is_our_mark(mark_of: u32) -> bool {
    (ID_BITS as u8..32).any(|bit| mark_id(mark_of, bit).is_some())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn set_names_are_those_of_kube_proxy_and_differ() {
        assert_eq!(SetName::LoadBalancerSourceCidr.name(IpFamily::V4), "KUBE-LOAD-BALANCER-SOURCE-CIDR");
        assert_eq!(SetName::LoadBalancerSourceCidr.name(IpFamily::V6), "KUBE-6-LOAD-BALANCER-SOURCE-CID");
        let names: BTreeSet<String> =
            IpFamily::ALL.iter().flat_map(|f| SetName::ALL.map(|s| s.name(*f))).collect();
        assert_eq!(names.len(), 2 * SetName::ALL.len());
        for family in IpFamily::ALL {
            for set in SetName::ALL {
                assert_eq!(SetName::from_name(family, &set.name(family)), Some(set));
            }
        }
    }

    #[test]
    fn marks_leave_the_masquerade_bit_alone_and_are_recognised() {
        for bit in 0..32_u8 {
            for id in [1, 2, 0x4000, 0x8001, ID_MAX] {
                let mark = mark(id, bit);
                assert_eq!(mark & (1 << bit), 0, "{bit} {id}");
                assert_eq!(mark_id(mark, bit), Some(id), "{bit} {id:x} {mark:x}");
                assert_eq!(mark_id(mark | (1 << bit), bit), Some(id));
                assert_eq!(mark & tag_mask(bit), super::mark(0, bit));
                assert!(is_our_mark(mark), "{bit} {id}");
            }
            assert_eq!(mark_id(0x4000, bit), None);
        }
        assert!(!is_our_mark(0x4000));
        assert!(!is_our_mark(0));
    }
}
