//! Netlink messages as bytes: a writer that patches lengths, and an iterator that reads attributes in place.

use std::str;

use netlink_packet_core::{Emitable, NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK, NetlinkBuffer};
use netlink_packet_netfilter::nftables::NfTablesMessageType;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily, NetfilterSubsystem};

/// Size of `struct nlmsghdr`.
pub(crate) const MESSAGE_HEADER: usize = 16;
/// Size of `struct nfgenmsg`, which every netfilter message starts with.
pub(crate) const NETFILTER_HEADER: usize = 4;

/// The 16-bit message type of an `nf_tables` message.
pub(crate) fn message_type(kind: NfTablesMessageType) -> u16 {
    u16::from(u8::from(NetfilterSubsystem::NfTables)) << 8 | u16::from(u8::from(kind))
}

/// Appends messages and attributes to one buffer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writer {
    pub(crate) buf: Vec<u8>,
    /// Set when an attribute outgrew its 16-bit length; what was written since is not to be sent.
    pub(crate) oversized: bool,
}

impl Writer {
    /// Writes one message: its headers, then whatever `body` writes, then the length.
    pub(crate) fn message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        header: &NetfilterHeader,
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.buf.len();
        self.buf.resize(start + MESSAGE_HEADER + NETFILTER_HEADER, 0);
        header.emit(&mut self.buf[start + MESSAGE_HEADER..]);
        body(self);
        let length = self.buf.len() - start;
        let mut message = NetlinkBuffer::new(&mut self.buf[start..]);
        message.set_length(length as u32);
        message.set_message_type(kind);
        message.set_flags(flags);
        message.set_sequence_number(sequence);
    }

    /// Writes one attribute, padded to four bytes.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.head(kind, NLA_HEADER_SIZE + value.len());
        self.buf.extend_from_slice(value);
        self.pad();
    }

    /// A number of 32 bits, big endian as everywhere in `nf_tables`.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// A number of 64 bits.
    pub(crate) fn u64(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// A string and its terminating zero.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        self.head(kind, NLA_HEADER_SIZE + value.len() + 1);
        self.buf.extend_from_slice(value.as_bytes());
        self.buf.push(0);
        self.pad();
    }

    /// An attribute made of attributes.
    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.head(kind | NLA_F_NESTED, NLA_HEADER_SIZE);
        body(self);
        let length = self.length(self.buf.len() - start);
        if let Some(field) = self.buf.get_mut(start..start + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    fn head(&mut self, kind: u16, length: usize) {
        let length = self.length(length);
        self.buf.extend_from_slice(&length.to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
    }

    fn length(&mut self, length: usize) -> u16 {
        u16::try_from(length).unwrap_or_else(|_| {
            self.oversized = true;
            0
        })
    }

    fn pad(&mut self) {
        // Messages start aligned and consist of aligned parts, so the buffer's own length will do.
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
    }
}

/// The header of a netfilter message of `family`.
pub(crate) fn header(family: NetfilterProtoFamily, resource: u16) -> NetfilterHeader {
    NetfilterHeader::new(family, 0, resource)
}

/// The attributes of `buf`, one after the other; ends early where they are malformed. (`NlasIterator` of
/// netlink-packet-core ties the values it yields to the loop's variable, not to the buffer.)
#[derive(Clone)]
pub(crate) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub(crate) fn new(buf: &'a [u8]) -> Self {
        Self(buf)
    }

    /// The first attribute of this kind.
    pub(crate) fn find(buf: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Self(buf).find_map(|(k, value)| (k == kind).then_some(value))
    }

    /// The bytes not yet read.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }
}

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

/// A big-endian number of 32 bits.
pub(crate) fn be32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// A big-endian number of 64 bits.
pub(crate) fn be64(value: &[u8]) -> Option<u64> {
    value.try_into().ok().map(u64::from_be_bytes)
}

/// A string, without its terminating zero.
pub(crate) fn text(value: &[u8]) -> Option<&str> {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    str::from_utf8(value.get(..end)?).ok()
}

/// A record in an object's user data, in the format nft(8) itself uses there: type, length, value.
pub(crate) fn push_user_data(data: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let value = value.get(..255).unwrap_or(value);
    data.extend_from_slice(&[kind, value.len() as u8]);
    data.extend_from_slice(value);
}

/// A comment as nft(8) stores it: terminated by zero and at most 128 bytes with it.
pub(crate) fn comment_data(kind: u8, comment: &str) -> Vec<u8> {
    let mut end = comment.len().min(127);
    while !comment.is_char_boundary(end) {
        end -= 1;
    }
    let mut value = comment.as_bytes()[..end].to_vec();
    value.push(0);
    let mut data = Vec::with_capacity(value.len() + 2);
    push_user_data(&mut data, kind, &value);
    data
}

/// Finds a record in an object's user data.
pub(crate) fn find_user_data(mut data: &[u8], kind: u8) -> Option<&[u8]> {
    while let &[k, length, ref rest @ ..] = data {
        let (value, next) = rest.split_at_checked(usize::from(length))?;
        if k == kind {
            return Some(value);
        }
        data = next;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::object::{Chain, Family, Rule, Table};
    use crate::set::{Element, Set};

    #[test]
    fn attributes_are_read_as_written() {
        let mut w = Writer::default();
        w.string(1, "four");
        w.nest(2, |w| {
            w.u32(1, 7);
            w.attribute(2, &[1]);
        });
        w.u64(3, 9);
        assert_eq!(w.buf.len() % 4, 0);
        assert_eq!(Attributes::find(&w.buf, 1).and_then(text), Some("four"));
        let nested: Vec<_> = Attributes::new(Attributes::find(&w.buf, 2).unwrap()).collect();
        assert_eq!(nested, [(1, &[0, 0, 0, 7][..]), (2, &[1])]);
        assert_eq!(Attributes::find(&w.buf, 3).and_then(be64), Some(9));
        assert!(!w.oversized);
        w.attribute(1, &vec![0; 65_532]);
        assert!(w.oversized);
    }

    #[test]
    fn comments_are_cut_between_characters() {
        let data = comment_data(0, &"ä".repeat(100));
        assert_eq!(find_user_data(&data, 0).and_then(text), Some("ä".repeat(63).as_str()));
        assert_eq!(find_user_data(&comment_data(3, "short"), 3), Some(&b"short\0"[..]));
    }

    fn attribute() -> impl Strategy<Value = Vec<u8>> {
        let leaf = prop::collection::vec(any::<u8>(), 0..20);
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop::collection::vec((0..16_u16, inner), 0..5).prop_map(|attributes| {
                let mut w = Writer::default();
                for (kind, value) in attributes {
                    w.attribute(kind, &value);
                }
                w.buf
            })
        })
    }

    proptest! {
        #[test]
        fn nothing_the_kernel_could_send_makes_a_decoder_panic(bytes in attribute(), cut in any::<prop::sample::Index>()) {
            for bytes in [&bytes[..], &bytes[..cut.index(bytes.len() + 1)]] {
                let _ = Table::decode(Family::Ip, bytes);
                let _ = Chain::decode(bytes);
                let _ = Rule::decode(bytes);
                let _ = Set::decode(bytes);
                let _ = Element::decode(bytes);
                let _ = crate::describe::describe(bytes, Some(3));
                let _ = find_user_data(bytes, 0);
            }
        }
    }
}
