//! What `nf_tables` messages have beyond other netlink messages: their type, their header and user data.

use netlink_packet_core::Emitable;
use netlink_packet_netfilter::nftables::NfTablesMessageType;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily, NetfilterSubsystem};

/// Size of `struct nfgenmsg`, which every netfilter message starts with.
pub(crate) const NETFILTER_HEADER: usize = 4;

/// The 16-bit message type of an `nf_tables` message.
pub(crate) fn message_type(kind: NfTablesMessageType) -> u16 {
    u16::from(u8::from(NetfilterSubsystem::NfTables)) << 8 | u16::from(u8::from(kind))
}

/// The header of a netfilter message of `family`.
pub(crate) fn header(family: NetfilterProtoFamily, resource: u16) -> [u8; NETFILTER_HEADER] {
    let mut bytes = [0; NETFILTER_HEADER];
    NetfilterHeader::new(family, 0, resource).emit(&mut bytes);
    bytes
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
    use netlink_requests::{Writer, text};
    use proptest::prelude::*;

    use super::*;
    use crate::object::{Chain, Family, Rule, Table};
    use crate::set::{Element, Set};

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
                w.as_bytes().to_vec()
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
