//! Messages in words: read back from the bytes, so that naming an operation costs nothing until it fails.

use std::fmt::Write as _;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_REPLACE, NetlinkBuffer};
use netlink_packet_netfilter::NetfilterHeader;
use netlink_packet_netfilter::nftables::NfTablesMessageType as Message;

use netlink_requests::{Attributes, MESSAGE_HEADER, be64, text};

use crate::object::{CHAIN_NAME, RULE_CHAIN, RULE_COMMENT, RULE_HANDLE, RULE_USERDATA};
use crate::set::{ELEMENTS_LIST, ELEMENTS_SET, Element, SET_NAME};
use crate::wire::{NETFILTER_HEADER, find_user_data};

/// In every message but those about batches and generations, attribute 1 is the table.
const TABLE: u16 = 1;

/// What the message at the start of `bytes` asks for. `at` is the offset of the attribute the kernel pointed at.
pub(crate) fn describe(bytes: &[u8], at: Option<u32>) -> String {
    let Ok(message) = NetlinkBuffer::new_checked(bytes) else { return "malformed message".to_owned() };
    let payload = message.payload();
    let Ok(header) = NetfilterHeader::parse(payload) else { return "malformed message".to_owned() };
    let attributes = payload.get(NETFILTER_HEADER..).unwrap_or_default();
    let kind = Message::from((message.message_type() & 0xff) as u8);
    let has = |kind| Attributes::find(attributes, kind).is_some();
    let (action, name) = match kind {
        Message::NewTable => ("add table", None),
        Message::DeleteTable => ("delete table", None),
        Message::NewChain => ("add chain", Some(CHAIN_NAME)),
        Message::DeleteChain => ("delete chain", Some(CHAIN_NAME)),
        Message::NewRule if message.flags() & NLM_F_REPLACE != 0 => ("replace rule", Some(RULE_CHAIN)),
        Message::NewRule if message.flags() & NLM_F_APPEND == 0 => ("insert rule", Some(RULE_CHAIN)),
        Message::NewRule => ("add rule", Some(RULE_CHAIN)),
        Message::DeleteRule if !has(RULE_HANDLE) => ("flush chain", Some(RULE_CHAIN)),
        Message::DeleteRule => ("delete rule", Some(RULE_CHAIN)),
        Message::NewSet => ("add set", Some(SET_NAME)),
        Message::DeleteSet => ("delete set", Some(SET_NAME)),
        Message::NewSetElement => ("add element", Some(ELEMENTS_SET)),
        Message::DeleteSetElement if !has(ELEMENTS_LIST) => ("flush set", Some(ELEMENTS_SET)),
        Message::DeleteSetElement => ("delete element", Some(ELEMENTS_SET)),
        _ => ("unknown operation", None),
    };
    let family = match u8::from(header.family) {
        2 => "ip".to_owned(),
        10 => "ip6".to_owned(),
        number => format!("family{number}"),
    };
    let mut words = format!("{action} {family}");
    for name in [Some(TABLE), name].into_iter().flatten() {
        words.push(' ');
        words.push_str(Attributes::find(attributes, name).and_then(text).unwrap_or("?"));
    }
    match kind {
        Message::NewRule | Message::DeleteRule => {
            if let Some(handle) = Attributes::find(attributes, RULE_HANDLE).and_then(be64) {
                let _ = write!(words, " handle {handle}");
            }
            let comment = Attributes::find(attributes, RULE_USERDATA)
                .and_then(|data| find_user_data(data, RULE_COMMENT))
                .and_then(text);
            if let Some(comment) = comment {
                let _ = write!(words, " comment \"{comment}\"");
            }
        }
        Message::NewSetElement | Message::DeleteSetElement => {
            if let Some(list) = Attributes::find(attributes, ELEMENTS_LIST) {
                let start = MESSAGE_HEADER + NETFILTER_HEADER + attributes.len();
                describe_elements(&mut words, list, |rest| at.is_some_and(|at| at as usize >= start - rest));
            }
        }
        _ => {}
    }
    words
}

/// The only element, or the one the kernel complained about, or how many there are. `reached` says whether the fault
/// is at or behind the point from which so many bytes are left; the list is the message's last attribute.
fn describe_elements(words: &mut String, list: &[u8], reached: impl Fn(usize) -> bool) {
    let mut elements = Attributes::new(list);
    let mut count = 0;
    let mut fault = None;
    loop {
        let rest = elements.rest().len();
        let Some((_, element)) = elements.next() else { break };
        count += 1;
        if reached(rest) {
            fault = Some((count, element));
        }
    }
    match fault.or(if count == 1 {
        Attributes::new(list).next().map(|(_, element)| (1, element))
    } else {
        None
    }) {
        Some((number, element)) => {
            let _ = write!(words, " {{ {} }}", Element::decode(element));
            if count > 1 {
                let _ = write!(words, " ({number} of {count})");
            }
        }
        None => {
            let _ = write!(words, " ({count} elements)");
        }
    }
}
