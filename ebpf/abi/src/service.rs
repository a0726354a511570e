//! What Services are made of: everything that the agent writes.

use crate::Address;

/// The smallest service id; smaller numbers own ranges of the node ([`range_owner`]).
pub const FIRST_SERVICE_ID: u32 = 16;

/// The name of a Service port, `namespace/name:port/protocol`, padded with zeros: the longest that the
/// API server lets pass fits.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Name(pub [u8; 200]);

impl Default for Name {
    fn default() -> Self {
        Self([0; 200])
    }
}

/// What a packet must match.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FrontendKey {
    /// Destination; [`Address::ANY`] for a node port of IPv6, `::ffff:0.0.0.0` for one of IPv4.
    pub address: Address,
    /// Destination port, network byte order.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

impl FrontendKey {
    /// The key of a node port of the family of `address`.
    #[inline(always)]
    #[must_use]
    pub const fn node_port(&self) -> Self {
        let address = if self.address.is_v4() { Address::v4(0) } else { Address::ANY };
        Self { address, ..*self }
    }

    /// [`Frontend::tag`] of the key's element. Never 0.
    #[inline(always)]
    pub const fn tag(&self) -> u32 {
        let rest = (self.port as u64) << 8 | self.protocol as u64;
        ((crate::filter::hash(&self.address) ^ rest).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32 | 1
    }
}

/// What happens to the first packet of a connection; one byte.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Verdict(pub u8);

impl Verdict {
    /// Silently discarded. Zero, so that what nobody filled in forwards nothing.
    pub const DROP: Self = Self(0);
    /// Refused with an error to the client.
    pub const REJECT: Self = Self(1);
    const FORWARD: u8 = 2;
    const LOCAL: u8 = 4;
    const MASQUERADE: u8 = 8;

    /// Sent to an endpoint of the cluster's group, or of this node's.
    #[inline(always)]
    pub const fn forward(local: bool, masquerade: bool) -> Self {
        Self(
            Self::FORWARD
                | if local { Self::LOCAL } else { 0 }
                | if masquerade { Self::MASQUERADE } else { 0 },
        )
    }

    /// Whether the packet is sent to an endpoint.
    #[inline(always)]
    pub const fn is_forward(self) -> bool {
        self.0 & Self::FORWARD != 0
    }

    /// Whether only endpoints of the group of the Local policy count.
    #[inline(always)]
    pub const fn is_local(self) -> bool {
        self.0 & Self::LOCAL != 0
    }

    /// Whether the source becomes a node address.
    #[inline(always)]
    pub const fn masquerades(self) -> bool {
        self.0 & Self::MASQUERADE != 0
    }
}

/// The endpoints of one policy of a Service port: `slots[base]` to `slots[base + count - 1]`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Group {
    /// First slot.
    pub base: u32,
    /// Number of endpoints.
    pub count: u32,
}

impl Group {
    /// The key of a group's table in `maglev`.
    #[inline(always)]
    pub const fn id(service: u32, local: bool) -> u32 {
        service << 1 | local as u32
    }
}

/// Bits of [`Frontend::flags`].
pub mod frontend_flags {
    /// Sources outside the service id's `ranges` are dropped.
    pub const SOURCE_RANGES: u8 = 1;
    /// Besides those ranges, the frontend's own address is allowed as a source.
    pub const ALLOW_OWN_SOURCE: u8 = 2;
    /// At tc the endpoint is chosen by the group's table in `maglev`.
    pub const MAGLEV: u8 = 4;
}

/// One frontend of a Service port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Frontend {
    /// Service id.
    pub service: u32,
    /// Timeout of the session affinity in seconds; 0 for none.
    pub affinity: u32,
    /// Endpoints of the Cluster policy.
    pub cluster: Group,
    /// Endpoints of the Local policy.
    pub local: Group,
    /// Verdicts by class of source: local pod, this node, elsewhere.
    pub verdicts: [Verdict; 3],
    /// Bits of [`frontend_flags`].
    pub flags: u8,
    /// [`FrontendKey::tag`] of the element's key: the kernel gives the memory of an element that is replaced to another one,
    /// also while somebody reads it. 0 from an agent that did not know it.
    pub tag: u32,
}

impl Frontend {
    /// The group of a policy.
    #[inline(always)]
    pub const fn group(&self, local: bool) -> Group {
        if local { self.local } else { self.cluster }
    }
}

/// Bits of [`Endpoint::flags`].
pub mod endpoint_flags {
    /// Member of the cluster's group.
    pub const CLUSTER: u16 = 1;
    /// Member of the local group.
    pub const LOCAL: u16 = 2;
    /// Flows that have the endpoint keep it. Set for all members, and for endpoints that terminate.
    pub const SERVING: u16 = 4;
    /// Runs on this node: when it reaches itself, the source must be rewritten.
    pub const HERE: u16 = 8;
}

/// One endpoint of one service id.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Endpoint {
    /// Address.
    pub address: Address,
    /// Port, network byte order.
    pub port: u16,
    /// Bits of [`endpoint_flags`].
    pub flags: u16,
    /// The service id that it belongs to; 0 for a free entry, whatever else is in it.
    pub service: u32,
    /// Counts how often the id was given away; what remembers an endpoint remembers this too.
    pub generation: u32,
    /// Zero.
    pub reserved: u32,
}

/// Bits in `addresses`.
pub mod address_flags {
    /// A cluster IP: unknown ports are rejected.
    pub const CLUSTER_IP: u32 = 1;
    /// Node ports answer here.
    pub const NODE_PORT: u32 = 2;
    /// An address of this node, as the kernel has it (loopback is known without).
    pub const LOCAL: u32 = 4;
}

/// Owners in `ranges` that are no service ids.
pub mod range_owner {
    /// Sources of local pods of IPv4.
    pub const PODS_V4: u32 = 1;
    /// Ranges from which cluster IPs of IPv4 are allocated.
    pub const SERVICE_CIDR_V4: u32 = 2;
    /// Sources of local pods of IPv6. `::/0` holds every mapped IPv4 address too, so that the families
    /// must not share an owner.
    pub const PODS_V6: u32 = 3;
    /// Ranges from which cluster IPs of IPv6 are allocated.
    pub const SERVICE_CIDR_V6: u32 = 4;

    /// The owner of the local pods' ranges of one family.
    #[inline(always)]
    pub const fn pods(v4: bool) -> u32 {
        if v4 { PODS_V4 } else { PODS_V6 }
    }

    /// The owner of the `ServiceCIDR`s of one family.
    #[inline(always)]
    pub const fn service_cidr(v4: bool) -> u32 {
        if v4 { SERVICE_CIDR_V4 } else { SERVICE_CIDR_V6 }
    }
}

/// A range in `ranges`. The prefix length of the map counts the owner's 32 bits too, and 96 for an
/// IPv4 range: [`RangeKey::prefix`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RangeKey {
    /// A service id (its `loadBalancerSourceRanges`), or one of [`range_owner`].
    pub owner: u32,
    /// Network address.
    pub address: Address,
}

impl RangeKey {
    /// Prefix length with which a single address is looked up.
    pub const FULL: u32 = 160;

    /// The prefix length of a range of `length` bits, of an address of 32 bits (`v4`) or 128.
    #[inline(always)]
    pub const fn prefix(v4: bool, length: u8) -> u32 {
        32 + if v4 { 96 } else { 0 } + length as u32
    }
}

/// Bits of [`Config::flags`].
pub mod config_flags {
    /// Node ports answer on every local address except loopback.
    pub const NODE_PORTS_ALL_LOCAL_V4: u32 = 1;
    /// The same for IPv6.
    pub const NODE_PORTS_ALL_LOCAL_V6: u32 = 2;
    /// Local pods of IPv4 are known by address (`ranges`, [`super::range_owner::PODS_V4`]).
    pub const PODS_BY_RANGE_V4: u32 = 4;
    /// The same for IPv6.
    pub const PODS_BY_RANGE_V6: u32 = 8;
    /// Local pods are known by interface (`interfaces`, [`super::Interface::POD`]). Each family says so
    /// for itself, like all that the families write apart.
    pub const PODS_BY_INTERFACE: u32 = PODS_BY_INTERFACE_V4 | PODS_BY_INTERFACE_V6;
    /// The part of IPv4.
    pub const PODS_BY_INTERFACE_V4: u32 = 16;
    /// The part of IPv6.
    pub const PODS_BY_INTERFACE_V6: u32 = 256;
    /// `ranges` has ServiceCIDRs.
    pub const SERVICE_CIDRS: u32 = SERVICE_CIDRS_V4 | SERVICE_CIDRS_V6;
    /// `ranges` has ServiceCIDRs of IPv4.
    pub const SERVICE_CIDRS_V4: u32 = 32;
    /// `ranges` has ServiceCIDRs of IPv6.
    pub const SERVICE_CIDRS_V6: u32 = 128;
    /// New flows of IPv4 are served: the maps are filled, and the programs are in place.
    pub const IN_USE_V4: u32 = 512;
    /// The same for IPv6.
    pub const IN_USE_V6: u32 = 1024;
    /// Processes may not bind to node ports.
    pub const PROTECT_NODE_PORTS: u32 = 64;

    /// The bit that says whether new flows of a family are served.
    #[inline(always)]
    pub const fn in_use(v4: bool) -> u32 {
        if v4 { IN_USE_V4 } else { IN_USE_V6 }
    }
}

/// Settings of the programs.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Config {
    /// Cookie of the node's own network namespace (`SO_NETNS_COOKIE`).
    pub host_netns: u64,
    /// Bits of [`config_flags`].
    pub flags: u32,
    /// Seed of the hash that leads into `maglev`; the same on all nodes.
    pub maglev_seed: u32,
    /// Source of masqueraded packets of IPv4 that leave by a device without an address.
    pub masquerade4: Address,
    /// The same for IPv6.
    pub masquerade6: Address,
    /// First port for masqueraded packets, host byte order. The range must lie outside
    /// `ip_local_port_range`, whose ports the node's own sockets take.
    pub masquerade_port_min: u16,
    /// Last port for masqueraded packets.
    pub masquerade_port_max: u16,
    /// Seconds after which an idle UDP flow is forgotten.
    pub udp_timeout: u32,
    /// Seconds after which an idle established TCP or SCTP flow is forgotten.
    pub tcp_timeout: u32,
    /// Seconds after which a TCP flow that is opening or closing is forgotten.
    pub tcp_transient_timeout: u32,
}

impl Config {
    /// Defaults for everything that does not depend on the node.
    pub const DEFAULT: Self = Self {
        host_netns: 0,
        flags: 0,
        maglev_seed: 0x5368_756e,
        masquerade4: Address::ANY,
        masquerade6: Address::ANY,
        masquerade_port_min: 1024,
        masquerade_port_max: 29_999,
        udp_timeout: 120,
        tcp_timeout: 86_400,
        tcp_transient_timeout: 120,
    };
}

/// A device of the node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Interface {
    /// [`Interface::POD`] or 0.
    pub flags: u32,
    /// Its address of IPv4 for masqueraded packets; [`Address::ANY`] when it has none.
    pub address4: Address,
    /// The same for IPv6, of global scope.
    pub address6: Address,
}

impl Interface {
    /// What comes in here comes from a local pod: the bridge of `BridgeInterface` and its ports, or a
    /// device with the prefix of `InterfaceNamePrefix`.
    pub const POD: u32 = 1;
}

/// Entries of a Maglev table: a prime, the default of Cilium and Calico too.
pub const MAGLEV_SIZE: usize = 16_381;

/// A Maglev table of endpoint ids.
pub type MaglevTable = [u32; MAGLEV_SIZE];

/// Who has an affinity. At sockets the client's address is not known yet: all sockets of one network
/// namespace are one client.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct AffinityKey {
    /// Source address at tc, [`Address::ANY`] at sockets.
    pub client: Address,
    /// Cookie of the network namespace at sockets, 0 at tc.
    pub netns: u64,
    /// Service id.
    pub service: u32,
    /// Zero.
    pub reserved: u32,
}

/// Which endpoint a client was sent to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Affinity {
    /// When it last opened a connection, nanoseconds of `CLOCK_MONOTONIC`.
    pub last_used: u64,
    /// Endpoint id.
    pub endpoint: u32,
    /// Its [`Endpoint::generation`] at that time.
    pub generation: u32,
}

/// Counters of one service id. Flows are counted once, when they begin.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ServiceCounters {
    /// New flows sent to an endpoint.
    pub forwarded: u64,
    /// Packets or connects refused.
    pub rejected: u64,
    /// Packets dropped.
    pub dropped: u64,
}

/// Service ids in one element of `service_stats`: ids `n * SERVICE_BLOCK` and up in element `n`. The kernel
/// allocates each element of a per-CPU map on its own, which takes half a second for as many as there are
/// endpoints.
pub const SERVICE_BLOCK: u32 = 64;
/// An element of `service_stats`.
pub type ServiceBlock = [ServiceCounters; SERVICE_BLOCK as usize];
/// Bytes of packets to and from endpoints of one service id, IP headers included. Only programs at devices see
/// packets: those of sockets that were served are not among them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct ServiceBytes {
    /// From clients.
    pub request: u64,
    /// To clients.
    pub response: u64,
}
/// An element of `service_bytes`, with as many service ids as one of `service_stats`.
pub type BytesBlock = [ServiceBytes; SERVICE_BLOCK as usize];
/// Endpoint ids in one element of `endpoint_stats`.
pub const ENDPOINT_BLOCK: u32 = 512;
/// An element of `endpoint_stats`: new flows by endpoint.
pub type EndpointBlock = [u64; ENDPOINT_BLOCK as usize];

/// What `events` counts.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Event {
    /// Packet or connect to an unknown port of a cluster IP.
    UnknownPort = 0,
    /// Packet to an unallocated address of a ServiceCIDR.
    Unallocated = 1,
    /// No consistent endpoint could be read; the packet was dropped.
    NoEndpoint = 2,
    /// No free port for a masqueraded flow; the packet was dropped.
    NoPort = 3,
    /// A flow could not be written down; the packet was dropped.
    NoFlow = 4,
    /// A packet that could not be rewritten; dropped.
    Malformed = 5,
    /// Flows that chose again because their endpoint is gone.
    Repicked = 6,
    /// ICMP errors translated.
    IcmpTranslated = 7,
    /// A bind to a node port was refused.
    BindRefused = 8,
}

impl Event {
    /// Number of events.
    pub const COUNT: u32 = 9;
}

const _: () = {
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<Name>() == 200);
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Frontend>() == 32);
    assert!(size_of::<Endpoint>() == 32);
    assert!(size_of::<RangeKey>() == 20);
    assert!(size_of::<Config>() == 64);
    assert!(size_of::<Interface>() == 36);
    assert!(size_of::<MaglevTable>() == 65_524);
    assert!(size_of::<AffinityKey>() == 32);
    assert!(size_of::<Affinity>() == 16);
    assert!(size_of::<ServiceCounters>() == 24);
    assert!(size_of::<ServiceBytes>() == 16);
};
