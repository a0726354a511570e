//! The connection table of tc.
//!
//! A flow from `client` to `vip` that goes to `ep`, masqueraded as `node`, has four entries, each of
//! which turns one tuple into another where a packet passes a hook. Between the hooks the node's own
//! stack sees a plain flow between client and endpoint: routes, policies and conntrack apply to that.
//!
//! ```text
//!            ingress              stack               egress
//!   client → vip      ══►   client → ep      ══►   node → ep
//!   vip → client      ◄══   ep → client      ◄══   ep → node
//!            egress                                   ingress
//! ```
//!
//! Without masquerade the two on the right are missing. When the client has another flow to the same
//! endpoint from the same port, through another frontend, the port changes at ingress. A process of the node that its socket hook did
//! not serve has two entries: its packets are translated at egress and sent on from there, the answers
//! at ingress.

use crate::{Address, Config};

/// Source and destination of a packet; ports in network byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Tuple {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

impl Tuple {
    /// The tuple of answers.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }
}

/// A packet at a hook.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FlowKey {
    /// Whence and whereto.
    pub tuple: Tuple,
    /// IP protocol number.
    pub protocol: u8,
    /// [`FlowKey::INGRESS`] or [`FlowKey::EGRESS`].
    pub hook: u8,
    /// Zero.
    pub reserved: u16,
}

impl FlowKey {
    /// Coming in by a device.
    pub const INGRESS: u8 = 0;
    /// Leaving by a device.
    pub const EGRESS: u8 = 1;
}

/// What becomes of packets with the tuple of a [`FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Flow {
    /// When a packet was last seen, nanoseconds of `CLOCK_MONOTONIC`; a second or so may be missing.
    pub last_seen: u64,
    /// The tuple that they leave the hook with.
    pub tuple: Tuple,
    /// Service id.
    pub service: u32,
    /// Endpoint id.
    pub endpoint: u32,
    /// Its generation.
    pub generation: u32,
    /// Bits of [`Flow::REPLY`] and others.
    pub flags: u16,
    /// [`Flow::OPENING`] and others.
    pub state: u8,
    /// Zero.
    pub reserved: u8,
    /// The port under which a masqueraded flow leaves, network byte order; 0 before its first packet.
    pub masquerade_port: u16,
    /// Zero.
    pub reserved2: u16,
}

impl Flow {
    /// Flag: packets from the endpoint.
    pub const REPLY: u16 = 1;
    /// Flag: the client is a process of this node, which its socket hook did not serve.
    pub const FROM_NODE: u16 = 2;
    /// Flag: where packets leave, the source becomes a node address, which is chosen with the first
    /// one ([`Flow::masquerade_port`]).
    pub const MASQUERADE: u16 = 4;
    /// State: TCP with nothing but SYN, SCTP with nothing but INIT in this direction.
    pub const OPENING: u8 = 0;
    /// State: anything that flows.
    pub const OPEN: u8 = 1;
    /// State: TCP after FIN or RST, SCTP after SHUTDOWN or ABORT in this direction.
    pub const CLOSING: u8 = 2;

    /// Whether nothing was seen of it for so long that it is forgotten; `now` as in [`Flow::last_seen`], which another
    /// processor may have set to a little later.
    #[inline(always)]
    pub const fn is_forgotten(&self, protocol: u8, config: &Config, now: u64) -> bool {
        let timeout = if protocol == UDP {
            config.udp_timeout
        } else if self.state == Self::OPEN {
            config.tcp_timeout
        } else {
            config.tcp_transient_timeout
        };
        now.saturating_sub(self.last_seen) > timeout as u64 * 1_000_000_000
    }
}

/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// A datagram in fragments.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Identification, as in the packet.
    pub id: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// [`FlowKey::INGRESS`] or [`FlowKey::EGRESS`].
    pub hook: u8,
    /// Zero.
    pub reserved: u16,
}

/// The ports in its first fragment.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Fragment {
    /// Source port, network byte order.
    pub source_port: u16,
    /// Destination port, network byte order.
    pub destination_port: u16,
}

const _: () = {
    assert!(size_of::<Tuple>() == 36);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Flow>() == 64);
    assert!(size_of::<FragmentKey>() == 40);
    assert!(size_of::<Fragment>() == 4);
};
