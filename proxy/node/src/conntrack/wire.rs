//! Messages of ctnetlink as bytes (`linux/netfilter/nfnetlink_conntrack.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{
    NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer,
};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter, Tuple};

/// Size of `struct nlmsghdr`.
const MESSAGE_HEADER: usize = 16;
/// Size of `struct nfgenmsg`, which follows it.
pub(super) const NETFILTER_HEADER: usize = 4;

const SUBSYSTEM: u16 = 1 << 8;
/// `IPCTNL_MSG_CT_NEW`: the messages of a dump.
pub(super) const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;

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

/// Appends a request for flows. Without `filter_in_kernel` only the family is asked for.
pub(super) fn dump(buf: &mut Vec<u8>, sequence: u32, filter: &FlowFilter, filter_in_kernel: bool) {
    message(buf, GET, NLM_F_REQUEST | NLM_F_DUMP, sequence, filter.family, |buf| {
        if !filter_in_kernel {
            return;
        }
        let mut flags = FLAG_PROTO_NUM;
        nest(buf, CTA_TUPLE_ORIG, |buf| {
            if let Some(address) = filter.address {
                flags |= FLAG_IP_DST;
                nest(buf, CTA_TUPLE_IP, |buf| put_address(buf, false, address));
            }
            nest(buf, CTA_TUPLE_PROTO, |buf| {
                put(buf, CTA_PROTO_NUM, &[filter.protocol.number()]);
                if let Some(port) = filter.port {
                    flags |= FLAG_PROTO_DST_PORT;
                    put(buf, CTA_PROTO_DST_PORT, &port.to_be_bytes());
                }
            });
        });
        // Unlike everything else in here, flags are in the machine's own byte order.
        nest(buf, CTA_FILTER, |buf| put(buf, CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes()));
    });
}

/// Appends the deletion of one flow. Never without its tuple: that would delete all flows.
pub(super) fn delete(buf: &mut Vec<u8>, sequence: u32, flow: &Flow) {
    let Tuple { source, destination } = flow.original;
    let family = IpFamily::of(destination.ip());
    message(buf, DELETE, NLM_F_REQUEST | NLM_F_ACK, sequence, family, |buf| {
        nest(buf, CTA_TUPLE_ORIG, |buf| {
            nest(buf, CTA_TUPLE_IP, |buf| {
                put_address(buf, true, source.ip());
                put_address(buf, false, destination.ip());
            });
            nest(buf, CTA_TUPLE_PROTO, |buf| {
                put(buf, CTA_PROTO_NUM, &[flow.protocol.number()]);
                put(buf, CTA_PROTO_SRC_PORT, &source.port().to_be_bytes());
                put(buf, CTA_PROTO_DST_PORT, &destination.port().to_be_bytes());
            });
        });
        if flow.zone != 0 {
            put(buf, CTA_ZONE, &flow.zone.to_be_bytes());
        }
        if let Some(id) = flow.id {
            put(buf, CTA_ID, &id.to_be_bytes());
        }
    });
}

/// Reads the attributes of a flow; `None` for protocols that Services do not have.
pub(super) fn flow(attributes: &[u8]) -> Option<Flow> {
    let (mut original, mut reply, mut zone, mut id) = (None, None, 0, None);
    for (kind, value) in Attributes(attributes) {
        match kind {
            CTA_TUPLE_ORIG => {
                original = Some(tuple(value)?);
                // A zone may be of one direction only; then it stands in that direction's tuple.
                zone = find(value, CTA_TUPLE_ZONE).and_then(be16).unwrap_or(zone);
            }
            CTA_TUPLE_REPLY => reply = Some(tuple(value)?),
            CTA_ZONE => zone = be16(value)?,
            CTA_ID => id = value.try_into().ok().map(u32::from_be_bytes),
            _ => {}
        }
    }
    let ((protocol, original), (_, reply)) = (original?, reply?);
    Some(Flow { protocol, original, reply, zone, id })
}

/// Bytes of a flow in both directions, original first; zero where the kernel does not count.
pub(super) fn bytes(attributes: &[u8]) -> [u64; 2] {
    [CTA_COUNTERS_ORIG, CTA_COUNTERS_REPLY].map(|direction| {
        let counters = find(attributes, direction).unwrap_or_default();
        let bytes = find(counters, CTA_COUNTERS_BYTES).and_then(|value| value.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    })
}

fn tuple(attributes: &[u8]) -> Option<(Protocol, Tuple)> {
    let ip = find(attributes, CTA_TUPLE_IP)?;
    let proto = find(attributes, CTA_TUPLE_PROTO)?;
    let address = |v4, v6| {
        let v4 = || find(ip, v4)?.try_into().ok().map(|o: [u8; 4]| IpAddr::from(Ipv4Addr::from(o)));
        let v6 = || find(ip, v6)?.try_into().ok().map(|o: [u8; 16]| IpAddr::from(Ipv6Addr::from(o)));
        v4().or_else(v6)
    };
    let port = |kind| find(proto, kind).and_then(be16);
    let protocol = Protocol::from_number(*find(proto, CTA_PROTO_NUM)?.first()?)?;
    let source = SocketAddr::new(address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port(CTA_PROTO_SRC_PORT)?);
    let destination = SocketAddr::new(address(CTA_IP_V4_DST, CTA_IP_V6_DST)?, port(CTA_PROTO_DST_PORT)?);
    Some((protocol, Tuple { source, destination }))
}

fn message(
    buf: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: IpFamily,
    body: impl FnOnce(&mut Vec<u8>),
) {
    let start = buf.len();
    buf.resize(start + MESSAGE_HEADER, 0);
    let family = match family {
        IpFamily::V4 => AF_INET,
        IpFamily::V6 => AF_INET6,
    };
    buf.extend_from_slice(&[family, 0, 0, 0]);
    body(buf);
    let length = buf.len() - start;
    let mut message = NetlinkBuffer::new(&mut buf[start..]);
    message.set_length(length as u32);
    message.set_message_type(kind);
    message.set_flags(flags);
    message.set_sequence_number(sequence);
}

/// Appends an attribute, padded to four bytes. All of them are small.
fn put(buf: &mut Vec<u8>, kind: u16, value: &[u8]) {
    buf.extend_from_slice(&((NLA_HEADER_SIZE + value.len()) as u16).to_ne_bytes());
    buf.extend_from_slice(&kind.to_ne_bytes());
    buf.extend_from_slice(value);
    buf.resize(buf.len().next_multiple_of(4), 0);
}

fn nest(buf: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::with_capacity(64);
    body(&mut inner);
    put(buf, kind | NLA_F_NESTED, &inner);
}

fn put_address(buf: &mut Vec<u8>, source: bool, address: IpAddr) {
    match address {
        IpAddr::V4(a) => put(buf, if source { CTA_IP_V4_SRC } else { CTA_IP_V4_DST }, &a.octets()),
        IpAddr::V6(a) => put(buf, if source { CTA_IP_V6_SRC } else { CTA_IP_V6_DST }, &a.octets()),
    }
}

fn be16(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_be_bytes)
}

fn find(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    Attributes(attributes).find_map(|(k, value)| (k == kind).then_some(value))
}

/// The attributes in a buffer; ends early where they are malformed.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (&[l0, l1, k0, k1], _) = self.0.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = self.0.get(NLA_HEADER_SIZE..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
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
            let mut buf = Vec::new();
            delete(&mut buf, 7, &expected);
            let message = NetlinkBuffer::new_checked(&buf).unwrap();
            prop_assert_eq!(message.length() as usize, buf.len());
            prop_assert_eq!(message.payload()[0], if v6 { AF_INET6 } else { AF_INET });
            // Made complete by a reply, a deletion reads like the flow.
            let mut attributes = message.payload()[NETFILTER_HEADER..].to_vec();
            let inner = find(&attributes, CTA_TUPLE_ORIG).unwrap().to_vec();
            put(&mut attributes, CTA_TUPLE_REPLY, &inner);
            prop_assert_eq!(flow(&attributes), Some(expected));
        }
    }
}
