//! One transaction, encoded as it is built.

use std::borrow::Borrow;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkBuffer,
};
use netlink_packet_netfilter::nftables::NfTablesMessageType as Message;
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterProtoFamily, NetfilterSubsystem};

use netlink_requests::{MESSAGE_HEADER, Writer};

use crate::describe::describe;
use crate::object::{
    CHAIN_NAME, CHAIN_TABLE, Chain, Family, RULE_CHAIN, RULE_HANDLE, RULE_TABLE, Rule, TableId, encode_table,
};
use crate::set::{ELEMENTS_LIST, ELEMENTS_SET, ELEMENTS_TABLE, Element, SET_NAME, SET_TABLE, Set};
use crate::wire::{NETFILTER_HEADER, header, message_type};

/// Where a message of elements is full. The list of elements is one attribute with a 16-bit length, and the largest
/// element (three values of 64 bytes, a chain's name of 255) still fits behind this.
const FULL: usize = 60_000;

const BATCH_GENID: u16 = 1;

/// A transaction: operations the kernel executes together or not at all, in the order of the calls.
///
/// The kernel looks at each operation on top of those before it, so a batch may create a chain and use it, or delete
/// a map's element and add it again with other data (the only way to change it: adding over it fails with `EEXIST`).
/// Adding what exists already and is equal is not an error; deleting what does not exist is. To delete a table that
/// may be absent, add it first.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Always complete: begin, messages, end, with an acknowledgement asked for on the last message only.
    writer: Writer,
    messages: Vec<Position>,
    operations: u32,
    expected_generation: Option<u32>,
    /// Where the end message starts.
    end: usize,
    /// The operation that did not fit.
    oversized: Option<u32>,
    set_ids: u32,
}

#[derive(Clone, Copy, Debug)]
struct Position {
    offset: u32,
    operation: u32,
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Batch {
    /// An empty transaction.
    pub fn new() -> Self {
        Self::begin(None)
    }

    /// An empty transaction that is refused if the ruleset of the network namespace is not of this generation any more
    /// when it is committed: see [`Socket::generation`](crate::Socket::generation).
    pub fn at_generation(generation: u32) -> Self {
        Self::begin(Some(generation))
    }

    fn begin(generation: Option<u32>) -> Self {
        let mut batch = Self {
            writer: Writer::default(),
            messages: Vec::new(),
            operations: 0,
            expected_generation: generation,
            end: 0,
            oversized: None,
            set_ids: 0,
        };
        control_message(&mut batch.writer, &ControlMessage::BatchBegin, generation);
        batch.finish();
        batch
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.operations as usize
    }

    /// The transaction as the kernel gets it.
    pub fn as_bytes(&self) -> &[u8] {
        self.writer.as_bytes()
    }

    /// Each operation in words, for logs. A large [`Batch::add_elements`] may appear as several.
    pub fn descriptions(&self) -> impl Iterator<Item = String> + '_ {
        self.messages
            .iter()
            .map(|position| describe(&self.writer.as_bytes()[position.offset as usize..], None))
    }

    /// Creates a table.
    pub fn add_table(&mut self, table: TableId<'_>, comment: Option<&str>) {
        self.operation(table.family, Message::NewTable, NLM_F_CREATE, |w| {
            encode_table(w, table.name, comment);
        });
    }

    /// Deletes a table and everything in it.
    pub fn delete_table(&mut self, table: TableId<'_>) {
        self.operation(table.family, Message::DeleteTable, 0, |w| encode_table(w, table.name, None));
    }

    /// Creates a chain.
    pub fn add_chain(&mut self, table: TableId<'_>, chain: &Chain) {
        self.operation(table.family, Message::NewChain, NLM_F_CREATE, |w| chain.encode(w, table.name));
    }

    /// Deletes a chain, which nothing may refer to any more. Its rules go with it.
    pub fn delete_chain(&mut self, table: TableId<'_>, chain: &str) {
        self.operation(table.family, Message::DeleteChain, 0, |w| {
            w.string(CHAIN_TABLE, table.name);
            w.string(CHAIN_NAME, chain);
        });
    }

    /// Deletes all rules of a chain.
    pub fn flush_chain(&mut self, table: TableId<'_>, chain: &str) {
        self.operation(table.family, Message::DeleteRule, 0, |w| {
            w.string(RULE_TABLE, table.name);
            w.string(RULE_CHAIN, chain);
        });
    }

    /// Adds a rule at the end of its chain.
    pub fn add_rule(&mut self, table: TableId<'_>, rule: &Rule) {
        self.operation(table.family, Message::NewRule, NLM_F_CREATE | NLM_F_APPEND, |w| {
            rule.encode(w, table.name, None);
        });
    }

    /// Adds a rule at the start of its chain.
    pub fn insert_rule(&mut self, table: TableId<'_>, rule: &Rule) {
        self.operation(table.family, Message::NewRule, NLM_F_CREATE, |w| rule.encode(w, table.name, None));
    }

    /// Puts a rule in the place of another one, in the same chain.
    pub fn replace_rule(&mut self, table: TableId<'_>, handle: u64, rule: &Rule) {
        self.operation(table.family, Message::NewRule, NLM_F_REPLACE, |w| {
            rule.encode(w, table.name, Some(handle));
        });
    }

    /// Deletes a rule.
    pub fn delete_rule(&mut self, table: TableId<'_>, chain: &str, handle: u64) {
        self.operation(table.family, Message::DeleteRule, 0, |w| {
            w.string(RULE_TABLE, table.name);
            w.string(RULE_CHAIN, chain);
            w.u64(RULE_HANDLE, handle);
        });
    }

    /// Creates a set or a map.
    pub fn add_set(&mut self, table: TableId<'_>, set: &Set) {
        self.set_ids += 1;
        let id = self.set_ids;
        self.operation(table.family, Message::NewSet, NLM_F_CREATE, |w| set.encode(w, table.name, id));
    }

    /// Deletes a set or a map, which no rule may refer to any more.
    pub fn delete_set(&mut self, table: TableId<'_>, set: &str) {
        self.operation(table.family, Message::DeleteSet, 0, |w| {
            w.string(SET_TABLE, table.name);
            w.string(SET_NAME, set);
        });
    }

    /// Deletes all elements of a set or map.
    pub fn flush_set(&mut self, table: TableId<'_>, set: &str) {
        self.operation(table.family, Message::DeleteSetElement, 0, |w| {
            w.string(ELEMENTS_TABLE, table.name);
            w.string(ELEMENTS_SET, set);
        });
    }

    /// Adds elements to a set or map. No elements is no operation.
    pub fn add_elements<E: Borrow<Element>>(
        &mut self,
        table: TableId<'_>,
        set: &str,
        elements: impl IntoIterator<Item = E>,
    ) {
        self.elements(table, set, elements, Message::NewSetElement, NLM_F_CREATE);
    }

    /// Deletes elements of a set or map, found by their keys; their data does not matter. No elements is no operation.
    pub fn delete_elements<E: Borrow<Element>>(
        &mut self,
        table: TableId<'_>,
        set: &str,
        elements: impl IntoIterator<Item = E>,
    ) {
        self.elements(table, set, elements, Message::DeleteSetElement, 0);
    }

    fn elements<E: Borrow<Element>>(
        &mut self,
        table: TableId<'_>,
        set: &str,
        elements: impl IntoIterator<Item = E>,
        kind: Message,
        flags: u16,
    ) {
        let delete = kind == Message::DeleteSetElement;
        let mut elements = elements.into_iter().peekable();
        if elements.peek().is_none() {
            return;
        }
        while elements.peek().is_some() {
            self.message(table.family, kind, flags, |w| {
                w.string(ELEMENTS_TABLE, table.name);
                w.string(ELEMENTS_SET, set);
                w.nest(ELEMENTS_LIST, |w| {
                    let full = w.len() + FULL;
                    while w.len() < full
                        && let Some(element) = elements.next()
                    {
                        element.borrow().encode(w, delete);
                    }
                });
            });
        }
        self.operations += 1;
        self.finish();
    }

    fn operation(&mut self, family: Family, kind: Message, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.message(family, kind, flags, body);
        self.operations += 1;
        self.finish();
    }

    fn message(&mut self, family: Family, kind: Message, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.writer.truncate(self.end);
        if let Some(last) = self.messages.last() {
            set_flags(&mut self.writer.as_mut_bytes()[last.offset as usize..], |flags| flags & !NLM_F_ACK);
        }
        self.messages.push(Position { offset: self.end as u32, operation: self.operations });
        let sequence = self.messages.len() as u32;
        let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        self.writer.message(message_type(kind), flags, sequence, &header(family.netfilter(), 0), body);
        if self.writer.oversized() && self.oversized.is_none() {
            self.oversized = Some(self.operations);
        }
        self.end = self.writer.len();
    }

    /// Completes the batch.
    fn finish(&mut self) {
        self.end = self.writer.len();
        control_message(&mut self.writer, &ControlMessage::BatchEnd, None);
    }

    /// The generation asked for.
    pub(crate) fn expected_generation(&self) -> Option<u32> {
        self.expected_generation
    }

    /// The operation that does not fit into netlink's attributes.
    pub(crate) fn oversized(&self) -> Option<usize> {
        self.oversized.map(|operation| operation as usize)
    }

    /// The sequence number of the message the kernel answers in any case.
    pub(crate) fn last_sequence(&self) -> u32 {
        self.messages.len() as u32
    }

    /// The index of the operation a message belongs to, and what it is in words.
    pub(crate) fn message_of(&self, sequence: u32, attribute_offset: Option<u32>) -> Option<(usize, String)> {
        let position = self.messages.get((sequence as usize).checked_sub(1)?)?;
        let message = self.writer.as_bytes().get(position.offset as usize..)?;
        Some((position.operation as usize, describe(message, attribute_offset)))
    }

    /// What an operation is in words.
    pub(crate) fn description(&self, operation: usize) -> String {
        self.messages
            .iter()
            .find(|position| position.operation as usize == operation)
            .and_then(|position| self.writer.as_bytes().get(position.offset as usize..))
            .map_or_else(String::new, |message| describe(message, None))
    }
}

fn control_message(w: &mut Writer, kind: &ControlMessage, generation: Option<u32>) {
    let header = header(NetfilterProtoFamily::Unspec, u16::from(u8::from(NetfilterSubsystem::NfTables)));
    w.message(u16::from(u8::from(kind.message_type())), NLM_F_REQUEST, 0, &header, |w| {
        if let Some(generation) = generation {
            w.u32(BATCH_GENID, generation);
        }
    });
}

fn set_flags(message: &mut [u8], change: impl FnOnce(u16) -> u16) {
    debug_assert!(message.len() >= MESSAGE_HEADER + NETFILTER_HEADER);
    let mut message = NetlinkBuffer::new(message);
    let flags = change(message.flags());
    message.set_flags(flags);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expr::Expr;
    use crate::object::Verdict;
    use crate::set::FieldType;

    const TABLE: TableId<'static> = TableId::new(Family::Ip6, "t");

    /// Type and flags of each message.
    fn messages(batch: &Batch) -> Vec<(u16, u16)> {
        let mut rest = batch.as_bytes();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).unwrap();
            assert_eq!(message.length() % 4, 0);
            messages.push((message.message_type(), message.flags()));
            rest = &rest[message.length() as usize..];
        }
        messages
    }

    #[test]
    fn is_complete_after_every_operation() {
        let mut batch = Batch::new();
        assert!(batch.is_empty());
        assert_eq!(messages(&batch).len(), 2);
        for count in 1..=3 {
            batch.add_chain(TABLE, &Chain::regular("c"));
            let messages = messages(&batch);
            assert_eq!(messages.len(), 2 + count);
            assert_eq!(messages[0].0, 16);
            assert_eq!(messages[1 + count].0, 17);
            let acknowledged: Vec<_> = messages.iter().map(|(_, flags)| flags & NLM_F_ACK != 0).collect();
            assert_eq!(acknowledged.iter().filter(|&&ack| ack).count(), 1);
            assert!(acknowledged[count]);
        }
        assert_eq!(batch.len(), 3);
    }

    #[test]
    fn many_elements_take_several_messages_but_are_one_operation() {
        let mut batch = Batch::new();
        batch.add_elements(TABLE, "s", (0..10_000_u32).map(|i| Element::new(i.to_be_bytes())));
        batch.delete_elements(TABLE, "s", Vec::<Element>::new());
        batch.flush_set(TABLE, "s");
        assert_eq!(batch.len(), 2);
        assert_eq!(messages(&batch).len(), 6);
        assert_eq!(batch.oversized(), None);
        assert_eq!(batch.message_of(3, None).unwrap().0, 0);
        assert_eq!(batch.message_of(4, None).unwrap(), (1, "flush set ip6 t s".to_owned()));
        assert_eq!(batch.message_of(5, None), None);
        assert_eq!(batch.message_of(0, None), None);
    }

    #[test]
    fn the_largest_elements_fit() {
        let long = vec![7; 64];
        let element = Element {
            key_end: Some(long.clone().into()),
            ..Element::verdict(long, Verdict::Goto("x".repeat(255)))
        };
        let mut batch = Batch::new();
        batch.add_elements(TABLE, "s", std::iter::repeat_n(&element, 1000));
        assert_eq!(batch.oversized(), None);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        let huge = Expr::Unknown { name: "huge".into(), raw: vec![0; 70_000] };
        batch.add_rule(TABLE, &Rule::new("c", vec![huge]));
        batch.add_table(TABLE, None);
        assert_eq!(batch.oversized(), Some(1));
        assert_eq!(batch.description(1), "add rule ip6 t c");
    }

    #[test]
    fn operations_in_words() {
        let rule = Rule::new("c", vec![]).with_comment("why");
        let element = Element::value([1, 2, 3, 4], [5]);
        let mut batch = Batch::at_generation(3);
        batch.add_table(TABLE, Some("x"));
        batch.add_chain(TABLE, &Chain::regular("c"));
        batch.flush_chain(TABLE, "c");
        batch.add_rule(TABLE, &rule);
        batch.insert_rule(TABLE, &rule);
        batch.replace_rule(TABLE, 7, &rule);
        batch.delete_rule(TABLE, "c", 7);
        batch.add_set(TABLE, &Set::new("s", vec![FieldType::Ipv4Addr]));
        batch.add_elements(TABLE, "s", [&element]);
        batch.delete_elements(TABLE, "s", [&element, &element]);
        batch.flush_set(TABLE, "s");
        batch.delete_set(TABLE, "s");
        batch.delete_chain(TABLE, "c");
        batch.delete_table(TABLE);
        let words: Vec<_> = batch.descriptions().collect();
        assert_eq!(
            words,
            [
                "add table ip6 t",
                "add chain ip6 t c",
                "flush chain ip6 t c",
                "add rule ip6 t c comment \"why\"",
                "insert rule ip6 t c comment \"why\"",
                "replace rule ip6 t c handle 7 comment \"why\"",
                "delete rule ip6 t c handle 7",
                "add set ip6 t s",
                "add element ip6 t s { 0x01020304 : 0x05 }",
                "delete element ip6 t s (2 elements)",
                "flush set ip6 t s",
                "delete set ip6 t s",
                "delete chain ip6 t c",
                "delete table ip6 t",
            ]
        );
    }
}
