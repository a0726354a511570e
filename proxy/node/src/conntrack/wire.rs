//! Messages of ctnetlink as bytes (`linux/netfilter/nfnetlink_conntrack.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use netlink_requests::{Attributes, Writer, be16, be32, be64};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter, Tuple};

/// Size of `struct nfgenmsg`, which each message starts with.
pub(super) const NETFILTER_HEADER: usize = 4;

const SUBSYSTEM: u16 = 1 << 8;
/// `IPCTNL_MSG_CT_NEW`.
pub(super) const NEW: u16 = SUBSYSTEM;
/// `IPCTNL_MSG_CT_GET`.
pub(super) const GET: u16 = SUBSYSTEM | 1;
/// `IPCTNL_MSG_CT_DELETE`.
pub(super) const DELETE: u16 = SUBSYSTEM | 2;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

const TCP_CONNTRACK_NONE: u8 = 0;
const TCP_CONNTRACK_SYN_SENT: u8 = 1;
const TCP_CONNTRACK_SYN_RECV: u8 = 2;
const TCP_CONNTRACK_ESTABLISHED: u8 = 3;
const TCP_CONNTRACK_LAST_ACK: u8 = 6;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
const IP_CT_TCP_FLAG_BE_LIBERAL: u8 = 8;

const IPS_SEEN_REPLY: u32 = 1 << 1;
const IPS_ASSURED: u32 = 1 << 2;
const IPS_CONFIRMED: u32 = 1 << 3;

const CTA_COUNTERS_BYTES: u16 = 2;

const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const FLAG_IP_DST: u32 = 1 << 1;
const FLAG_PROTO_NUM: u32 = 1 << 3;
const FLAG_PROTO_DST_PORT: u32 = 1 << 5;

const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;

const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;

const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// What of a filter the kernel gets right. It compares IPv6 addresses the wrong way round
/// (`ctnetlink_filter_match_tuple`, 5.8 to 6.18 at least), and so leaves out what was asked for.
pub(super) fn what_the_kernel_can(filter: &FlowFilter) -> FlowFilter {
    FlowFilter { address: filter.address.filter(IpAddr::is_ipv4), ..*filter }
}

/// Writes which flows are asked for. Without `filter_in_kernel` only the family is.
pub(super) fn filter(w: &mut Writer, filter: &FlowFilter, filter_in_kernel: bool) {
    w.header(&header(filter.family));
    if !filter_in_kernel {
        return;
    }
    let mut flags = FLAG_PROTO_NUM;
    w.nest(CTA_TUPLE_ORIG, |w| {
        if let Some(address) = filter.address {
            flags |= FLAG_IP_DST;
            w.nest(CTA_TUPLE_IP, |w| put_address(w, false, address));
        }
        w.nest(CTA_TUPLE_PROTO, |w| {
            w.attribute(CTA_PROTO_NUM, &[filter.protocol.number()]);
            if let Some(port) = filter.port {
                flags |= FLAG_PROTO_DST_PORT;
                w.attribute(CTA_PROTO_DST_PORT, &port.to_be_bytes());
            }
        });
    });
    // Unlike everything else in here, flags are in the machine's own byte order.
    w.nest(CTA_FILTER, |w| w.attribute(CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes()));
}

/// Writes what tells a flow from all others. A deletion without its tuple would delete all flows.
pub(super) fn identity(w: &mut Writer, flow: &Flow) {
    w.header(&header(IpFamily::of(flow.original.destination.ip())));
    put_tuple(w, CTA_TUPLE_ORIG, flow.protocol, &flow.original);
    if flow.zone != 0 {
        w.attribute(CTA_ZONE, &flow.zone.to_be_bytes());
    }
    if let Some(id) = flow.id {
        w.u32(CTA_ID, id);
    }
}

/// Writes a TCP connection that is established and not translated, to be forgotten after so long. Nothing is known of
/// its sequence numbers, so the kernel is told not to judge by them.
pub(super) fn established(w: &mut Writer, tuple: &Tuple, seconds: u32) {
    w.header(&header(IpFamily::of(tuple.destination.ip())));
    let answers = Tuple { source: tuple.destination, destination: tuple.source };
    put_tuple(w, CTA_TUPLE_ORIG, Protocol::Tcp, tuple);
    put_tuple(w, CTA_TUPLE_REPLY, Protocol::Tcp, &answers);
    w.attribute(CTA_STATUS, &(IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED).to_be_bytes());
    w.nest(CTA_PROTOINFO, |w| {
        w.nest(CTA_PROTOINFO_TCP, |w| {
            w.attribute(CTA_PROTOINFO_TCP_STATE, &[TCP_CONNTRACK_ESTABLISHED]);
            // Flags, and which of them are meant.
            for flags in [CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY] {
                w.attribute(flags, &[IP_CT_TCP_FLAG_BE_LIBERAL; 2]);
            }
        });
    });
    w.attribute(CTA_TIMEOUT, &seconds.to_be_bytes());
}

fn put_tuple(w: &mut Writer, kind: u16, protocol: Protocol, tuple: &Tuple) {
    w.nest(kind, |w| {
        w.nest(CTA_TUPLE_IP, |w| {
            put_address(w, true, tuple.source.ip());
            put_address(w, false, tuple.destination.ip());
        });
        w.nest(CTA_TUPLE_PROTO, |w| {
            w.attribute(CTA_PROTO_NUM, &[protocol.number()]);
            w.attribute(CTA_PROTO_SRC_PORT, &tuple.source.port().to_be_bytes());
            w.attribute(CTA_PROTO_DST_PORT, &tuple.destination.port().to_be_bytes());
        });
    });
}

/// Reads the attributes of a flow; `None` for protocols that Services do not have.
pub(super) fn flow(attributes: &[u8]) -> Option<Flow> {
    let (mut original, mut reply, mut zone, mut id) = (None, None, 0, None);
    for (kind, value) in Attributes::new(attributes) {
        match kind {
            CTA_TUPLE_ORIG => {
                original = Some(tuple(value)?);
                // A zone may be of one direction only; then it stands in that direction's tuple.
                zone = Attributes::find(value, CTA_TUPLE_ZONE).and_then(be16).unwrap_or(zone);
            }
            CTA_TUPLE_REPLY => reply = Some(tuple(value)?),
            CTA_ZONE => zone = be16(value)?,
            CTA_ID => id = be32(value),
            _ => {}
        }
    }
    let ((protocol, original), (_, reply)) = (original?, reply?);
    Some(Flow { protocol, original, reply, zone, id })
}

/// Bytes of a flow in both directions, original first; zero where the kernel does not count.
pub(super) fn bytes(attributes: &[u8]) -> [u64; 2] {
    [CTA_COUNTERS_ORIG, CTA_COUNTERS_REPLY].map(|direction| {
        let counters = Attributes::find(attributes, direction).unwrap_or_default();
        Attributes::find(counters, CTA_COUNTERS_BYTES).and_then(be64).unwrap_or(0)
    })
}

/// States of TCP connections of which only one side has spoken.
pub(super) const HANDSHAKE: RangeInclusive<u8> = TCP_CONNTRACK_NONE..=TCP_CONNTRACK_SYN_SENT;
/// States of those that were answered and that not both sides have closed.
pub(super) const OPEN: RangeInclusive<u8> = TCP_CONNTRACK_SYN_RECV..=TCP_CONNTRACK_LAST_ACK;

/// The state of a TCP connection, `enum tcp_conntrack`.
pub(super) fn tcp_state(attributes: &[u8]) -> Option<u8> {
    let info = Attributes::find(attributes, CTA_PROTOINFO)?;
    let state = Attributes::find(Attributes::find(info, CTA_PROTOINFO_TCP)?, CTA_PROTOINFO_TCP_STATE)?;
    state.first().copied()
}

fn tuple(attributes: &[u8]) -> Option<(Protocol, Tuple)> {
    let ip = Attributes::find(attributes, CTA_TUPLE_IP)?;
    let proto = Attributes::find(attributes, CTA_TUPLE_PROTO)?;
    let address = |v4, v6| {
        let v4 =
            || Attributes::find(ip, v4)?.try_into().ok().map(|o: [u8; 4]| IpAddr::from(Ipv4Addr::from(o)));
        let v6 =
            || Attributes::find(ip, v6)?.try_into().ok().map(|o: [u8; 16]| IpAddr::from(Ipv6Addr::from(o)));
        v4().or_else(v6)
    };
    let port = |kind| Attributes::find(proto, kind).and_then(be16);
    let protocol = Protocol::from_number(*Attributes::find(proto, CTA_PROTO_NUM)?.first()?)?;
    let source = SocketAddr::new(address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port(CTA_PROTO_SRC_PORT)?);
    let destination = SocketAddr::new(address(CTA_IP_V4_DST, CTA_IP_V6_DST)?, port(CTA_PROTO_DST_PORT)?);
    Some((protocol, Tuple { source, destination }))
}

fn header(family: IpFamily) -> [u8; NETFILTER_HEADER] {
    let family = match family {
        IpFamily::V4 => AF_INET,
        IpFamily::V6 => AF_INET6,
    };
    [family, 0, 0, 0]
}

fn put_address(w: &mut Writer, source: bool, address: IpAddr) {
    match address {
        IpAddr::V4(a) => w.attribute(if source { CTA_IP_V4_SRC } else { CTA_IP_V4_DST }, &a.octets()),
        IpAddr::V6(a) => w.attribute(if source { CTA_IP_V6_SRC } else { CTA_IP_V6_DST }, &a.octets()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(0..32_u8, 0..200)) {
            let _ = flow(&bytes);
        }

        #[test]
        fn a_deletion_names_its_flow(v6 in any::<bool>(), a in any::<u8>(), ports in any::<[u16; 2]>(), zone in any::<u16>()) {
            let source: IpAddr = if v6 { Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, a.into()).into() } else { [10, 0, 0, a].into() };
            let destination: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { [10, 0, 1, a].into() };
            let original = Tuple {
                source: SocketAddr::new(source, ports[0]), destination: SocketAddr::new(destination, ports[1]),
            };
            let expected = Flow { protocol: Protocol::Udp, original, reply: original, zone, id: Some(9) };
            let mut w = Writer::default();
            identity(&mut w, &expected);
            prop_assert_eq!(w.as_bytes()[0], if v6 { AF_INET6 } else { AF_INET });
            // Made complete by a reply, a deletion reads like the flow.
            let inner = Attributes::find(&w.as_bytes()[NETFILTER_HEADER..], CTA_TUPLE_ORIG).unwrap().to_vec();
            w.attribute(CTA_TUPLE_REPLY, &inner);
            prop_assert_eq!(flow(&w.as_bytes()[NETFILTER_HEADER..]), Some(expected));
        }
    }
}
