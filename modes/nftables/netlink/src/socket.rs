//! The conversation with the kernel.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkBuffer,
};
use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::NfTablesMessageType as Message;
use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, setsockopt, sockopt};

use crate::batch::Batch;
use crate::error::{CommitError, Error, Refusal};
use crate::object::{CHAIN_TABLE, Chain, Family, RULE_CHAIN, RULE_TABLE, Rule, Table, TableId};
use crate::set::{ELEMENTS_LIST, ELEMENTS_SET, ELEMENTS_TABLE, Element, SET_TABLE, Set};
use crate::wire::{Attributes, MESSAGE_HEADER, NETFILTER_HEADER, Writer, be32, header, message_type, text};

/// Room for a batch of some millions of elements. Only a limit: the kernel allocates what a batch needs.
const SEND_BUFFER: usize = 256 << 20;
/// Room for the answers to a batch in which tens of thousands of operations fail.
const RECEIVE_BUFFER: usize = 16 << 20;
/// The kernel fills messages of a dump up to 32 KiB if it sees that the reader offers as much.
const MESSAGE_BUFFER: usize = 64 << 10;
/// How often an interrupted dump is started again.
const DUMP_ATTEMPTS: u32 = 8;
/// How many refusals are reported of a batch: the first one matters.
const REFUSALS: usize = 16;

/// Sequence numbers of requests other than batches start here; batches count their messages from 0.
const FIRST_REQUEST: u32 = 0x8000_0000;

const SEND_FAILED: fn(io::Error) -> Error = |source| Error::Socket { what: "send a request", source };
const RECEIVE_FAILED: fn(io::Error) -> Error = |source| Error::Socket { what: "receive an answer", source };

const GEN_ID: u16 = 1;
const EXT_ACK_MESSAGE: u16 = 1;
const EXT_ACK_OFFSET: u16 = 2;

/// A netlink socket in the network namespace of the thread that opened it. It blocks, but never waits for anybody: the
/// kernel answers before it returns from the system call.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
    send_buffer: usize,
}

/// Makes an object of a message's attributes, or says what it lacks, or that it is not wanted.
type Decode<'a, T> = dyn Fn(&[u8]) -> Result<Option<T>, &'static str> + 'a;

/// Why a dump ended before its end.
enum Stop {
    /// Its table or set is not there.
    Missing,
    /// The ruleset changed meanwhile.
    Interrupted,
    /// It failed.
    Failed(Error),
}

impl Socket {
    /// Opens a socket. Privileges are only needed for what is done with it.
    pub fn new() -> Result<Self, Error> {
        let fail = |what| move |source| Error::Socket { what, source };
        let mut inner = netlink_sys::Socket::new(NETLINK_NETFILTER).map_err(fail("open"))?;
        inner.bind_auto().map_err(fail("bind"))?;
        // Connected to the kernel, it hears nobody else.
        inner.connect(&SocketAddr::new(0, 0)).map_err(fail("connect"))?;
        // Explanations are welcome, echoes of 60 kB requests are not; kernels too old for either do without.
        let _ = inner.set_ext_ack(true);
        let _ = inner.set_cap_ack(true);
        setsockopt(&inner, sockopt::SndBufForce, &SEND_BUFFER)
            .or_else(|_| setsockopt(&inner, sockopt::SndBuf, &SEND_BUFFER))
            .map_err(|e| fail("size the send buffer")(e.into()))?;
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .or_else(|_| setsockopt(&inner, sockopt::RcvBuf, &RECEIVE_BUFFER))
            .map_err(|e| fail("size the receive buffer")(e.into()))?;
        let send_buffer =
            getsockopt(&inner, sockopt::SndBuf).map_err(|e| fail("size the send buffer")(e.into()))?;
        Ok(Self { inner, sequence: FIRST_REQUEST, buffer: Vec::with_capacity(MESSAGE_BUFFER), send_buffer })
    }

    /// Hands a transaction to the kernel, which executes all of it or nothing. An empty one is not sent.
    pub fn commit(&mut self, batch: &Batch) -> Result<(), CommitError> {
        if let Some(index) = batch.oversized() {
            return Err(CommitError::Oversized { index, description: batch.description(index) });
        }
        if batch.is_empty() {
            return Ok(());
        }
        let bytes = batch.as_bytes();
        self.send(bytes).map_err(|source| match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMSGSIZE) => CommitError::TooLarge { bytes: bytes.len(), limit: self.send_buffer },
            _ => CommitError::Send { bytes: bytes.len(), source },
        })?;

        // All answers are there by now, in the order of the messages. The last message is answered in any case, unless
        // the transaction as a whole was turned down before the kernel looked at it.
        let mut refusals = Vec::new();
        let mut lost = None;
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Too many refusals for the receive buffer: the first ones are still in it.
                Err(e) if lost.is_none() && e.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    lost = Some(e);
                    continue;
                }
                Err(e) => return Err(CommitError::Unanswered { source: Some(e) }),
            }
            for message in Messages(&self.buffer) {
                let Some(answer) = Answer::read(&message) else { continue };
                if answer.errno != 0 {
                    if let Some(expected) = answer.stale_generation(batch) {
                        return Err(CommitError::GenerationChanged { expected });
                    }
                    if refusals.len() < REFUSALS {
                        refusals.push(answer.refusal(batch));
                    }
                } else if answer.sequence == batch.last_sequence() && refusals.is_empty() && lost.is_none() {
                    return Ok(());
                }
            }
        }
        if refusals.is_empty() {
            Err(CommitError::Unanswered { source: lost })
        } else {
            Err(CommitError::Refused(refusals))
        }
    }

    /// The generation of the ruleset in this network namespace: every transaction of anybody's makes a new one. Equal
    /// before and after several dumps, it says that they belong together.
    pub fn generation(&mut self) -> Result<u32, Error> {
        let request = || "get generation".to_owned();
        let message = self.request(Message::GetGen, NetfilterProtoFamily::Unspec, 0, |_| {});
        let sequence = self.sequence;
        let fail = |source| Error::Refused { request: request(), source };
        self.send(&message).map_err(SEND_FAILED)?;
        loop {
            self.receive(MsgFlags::empty()).map_err(RECEIVE_FAILED)?;
            if let Some(message) = Messages(&self.buffer).find(|m| m.sequence_number() == sequence) {
                if let Some(answer) = Answer::read(&message) {
                    return Err(fail(io::Error::from_raw_os_error(answer.errno)));
                }
                return Attributes::find(attributes_of(&message), GEN_ID)
                    .and_then(be32)
                    .ok_or(Error::Malformed { request: request(), missing: "generation without a number" });
            }
        }
    }

    /// The tables of a family.
    pub fn dump_tables(&mut self, family: Family) -> Result<Vec<Table>, Error> {
        self.dump_all(
            &|| format!("list tables {family}"),
            family,
            Message::GetTable,
            &|_| {},
            &|attributes| Table::decode(family, attributes).map(Some),
        )
    }

    /// The chains of a table; none if there is no such table.
    pub fn dump_chains(&mut self, table: TableId<'_>) -> Result<Vec<Chain>, Error> {
        // The kernel lists the chains of all tables of the family.
        let ours =
            |attributes: &[u8]| Attributes::find(attributes, CHAIN_TABLE).and_then(text) == Some(table.name);
        self.dump_all(
            &|| format!("list chains {table}"),
            table.family,
            Message::GetChain,
            &|_| {},
            &|attributes| if ours(attributes) { Chain::decode(attributes).map(Some) } else { Ok(None) },
        )
    }

    /// The rules of a table, or of one chain in it, in order; none if there is no such table or chain.
    pub fn dump_rules(&mut self, table: TableId<'_>, chain: Option<&str>) -> Result<Vec<Rule>, Error> {
        self.dump_all(
            &|| format!("list rules {table} {}", chain.unwrap_or_default()),
            table.family,
            Message::GetRule,
            &|w| {
                w.string(RULE_TABLE, table.name);
                if let Some(chain) = chain {
                    w.string(RULE_CHAIN, chain);
                }
            },
            &|attributes| {
                let named = |kind| Attributes::find(attributes, kind).and_then(text);
                // Old kernels list more than they are asked for.
                if named(RULE_TABLE) == Some(table.name) && (chain.is_none() || named(RULE_CHAIN) == chain) {
                    Rule::decode(attributes).map(Some)
                } else {
                    Ok(None)
                }
            },
        )
    }

    /// The sets and maps of a table, without their elements; none if there is no such table.
    pub fn dump_sets(&mut self, table: TableId<'_>) -> Result<Vec<Set>, Error> {
        self.dump_all(
            &|| format!("list sets {table}"),
            table.family,
            Message::GetSet,
            &|w| w.string(SET_TABLE, table.name),
            &|attributes| Set::decode(attributes).map(Some),
        )
    }

    /// Hands each element of a set or map to `each`, in no order. `Ok(false)` if there is no such table or set.
    ///
    /// After [`Error::Interrupted`] forget what was seen and ask again: elements may be missing or doubled. The same
    /// can happen without an error while the kernel reorganises a set whose size was not declared, for a few
    /// milliseconds after many elements were added (`nft_rhash_walk` goes on when the walk is told of a resize).
    pub fn dump_elements(
        &mut self,
        table: TableId<'_>,
        set: &str,
        mut each: impl FnMut(Element),
    ) -> Result<bool, Error> {
        let request = || format!("list elements {table} {set}");
        let ask = |w: &mut Writer| {
            w.string(ELEMENTS_TABLE, table.name);
            w.string(ELEMENTS_SET, set);
        };
        let dump = self.dump(&request, table.family, Message::GetSetElement, &ask, &mut |attributes| {
            for (_, element) in
                Attributes::new(Attributes::find(attributes, ELEMENTS_LIST).unwrap_or_default())
            {
                each(Element::decode(element));
            }
            Ok(())
        });
        match dump {
            Ok(()) => Ok(true),
            Err(Stop::Missing) => Ok(false),
            Err(Stop::Interrupted) => Err(Error::Interrupted { request: request() }),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    /// A dump of few enough objects to be collected, and to be done again if it was interrupted.
    fn dump_all<T>(
        &mut self,
        request: &dyn Fn() -> String,
        family: Family,
        kind: Message,
        ask: &dyn Fn(&mut Writer),
        decode: &Decode<'_, T>,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut objects = Vec::new();
            match self.dump(request, family, kind, ask, &mut |attributes| {
                objects.extend(decode(attributes)?);
                Ok(())
            }) {
                Ok(()) => return Ok(objects),
                Err(Stop::Missing) => return Ok(Vec::new()),
                Err(Stop::Interrupted) => {}
                Err(Stop::Failed(error)) => return Err(error),
            }
        }
        Err(Error::Interrupted { request: request() })
    }

    /// Asks for a dump and hands on the attributes of each of its messages. Always reads to the dump's end, since the
    /// kernel starts no second one on the same socket before.
    fn dump(
        &mut self,
        request: &dyn Fn() -> String,
        family: Family,
        kind: Message,
        ask: &dyn Fn(&mut Writer),
        each: &mut dyn FnMut(&[u8]) -> Result<(), &'static str>,
    ) -> Result<(), Stop> {
        let message = self.request(kind, family.netfilter(), NLM_F_DUMP, ask);
        let sequence = self.sequence;
        let fail = |source| Stop::Failed(Error::Refused { request: request(), source });
        self.send(&message).map_err(|e| Stop::Failed(SEND_FAILED(e)))?;
        let mut malformed = None;
        let mut interrupted = false;
        loop {
            self.receive(MsgFlags::empty()).map_err(|e| Stop::Failed(RECEIVE_FAILED(e)))?;
            for message in Messages(&self.buffer).filter(|m| m.sequence_number() == sequence) {
                interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match errno_of(message.payload()).map(Errno::from_raw) {
                            Some(Errno::ENOENT) => Err(Stop::Missing),
                            Some(Errno::EINTR) => Err(Stop::Interrupted),
                            Some(errno) => Err(fail(errno.into())),
                            None if interrupted => Err(Stop::Interrupted),
                            None => match malformed {
                                None => Ok(()),
                                Some(missing) => {
                                    Err(Stop::Failed(Error::Malformed { request: request(), missing }))
                                }
                            },
                        };
                    }
                    _ if malformed.is_none() => malformed = each(attributes_of(&message)).err(),
                    _ => {}
                }
            }
        }
    }

    /// A request with the next sequence number.
    fn request(
        &mut self,
        kind: Message,
        family: NetfilterProtoFamily,
        flags: u16,
        ask: impl FnOnce(&mut Writer),
    ) -> Vec<u8> {
        self.sequence = self.sequence.wrapping_add(1).max(FIRST_REQUEST);
        let mut w = Writer::default();
        w.message(message_type(kind), NLM_F_REQUEST | flags, self.sequence, &header(family, 0), ask);
        w.buf
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.inner.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Receives one datagram of messages into the buffer.
    fn receive(&mut self, flags: MsgFlags) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.inner.recv(&mut self.buffer, (flags | MsgFlags::MSG_TRUNC).bits()) {
                Ok(length) if length > self.buffer.len() => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the kernel sent more than it may",
                    ));
                }
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// The messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = NetlinkBuffer<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = NetlinkBuffer::new_checked(self.0).ok()?;
        self.0 = self.0.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

fn attributes_of<'a>(message: &NetlinkBuffer<&'a [u8]>) -> &'a [u8] {
    message.payload().get(NETFILTER_HEADER..).unwrap_or_default()
}

/// The error number an error or done message starts with, if it is one.
fn errno_of(payload: &[u8]) -> Option<i32> {
    let code = i32::from_ne_bytes(*payload.first_chunk()?);
    (code != 0).then_some(code.saturating_neg())
}

/// One answer to a message of a batch.
struct Answer {
    sequence: u32,
    /// 0 is an acknowledgement.
    errno: i32,
    message: Option<String>,
    attribute_offset: Option<u32>,
}

impl Answer {
    fn read(message: &NetlinkBuffer<&[u8]>) -> Option<Self> {
        if message.message_type() != NLMSG_ERROR {
            return None;
        }
        let payload = message.payload();
        let mut answer = Self {
            sequence: message.sequence_number(),
            errno: errno_of(payload).unwrap_or(0),
            message: None,
            attribute_offset: None,
        };
        if message.flags() & NLM_F_ACK_TLVS != 0 {
            // They follow the error number and the request, or only its header if the request was cut.
            let request = payload.get(4..).unwrap_or_default();
            let length = match NetlinkBuffer::new_checked(request) {
                Ok(whole) if message.flags() & NLM_F_CAPPED == 0 => whole.length() as usize,
                _ => MESSAGE_HEADER,
            };
            for (kind, value) in
                Attributes::new(request.get(length.next_multiple_of(4)..).unwrap_or_default())
            {
                match kind {
                    EXT_ACK_MESSAGE => answer.message = text(value).map(str::to_owned),
                    EXT_ACK_OFFSET => answer.attribute_offset = value.try_into().ok().map(u32::from_ne_bytes),
                    _ => {}
                }
            }
        }
        Some(answer)
    }

    /// The begin message, of sequence number 0, fails with `ERESTART` if the generation asked for is over.
    fn stale_generation(&self, batch: &Batch) -> Option<u32> {
        batch.expected_generation().filter(|_| self.sequence == 0 && self.errno == Errno::ERESTART as i32)
    }

    fn refusal(self, batch: &Batch) -> Refusal {
        let (index, description) = match batch.message_of(self.sequence, self.attribute_offset) {
            Some((index, description)) => (Some(index), description),
            None => (None, "the transaction as a whole".to_owned()),
        };
        Refusal {
            index,
            description,
            errno: self.errno,
            message: self.message,
            attribute_offset: self.attribute_offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn assert_send<T: Send>() {}
    const _: () = assert_send::<Socket>();

    /// An error message as the kernel writes it.
    fn error(sequence: u32, code: i32, flags: u16, tail: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; MESSAGE_HEADER];
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(tail);
        let length = bytes.len() as u32;
        let mut message = NetlinkBuffer::new(&mut bytes);
        message.set_length(length);
        message.set_message_type(NLMSG_ERROR);
        message.set_flags(flags);
        message.set_sequence_number(sequence);
        bytes
    }

    #[test]
    fn explanations_are_found() {
        let mut explanation = Writer::default();
        explanation.string(EXT_ACK_MESSAGE, "No!");
        explanation.attribute(EXT_ACK_OFFSET, &48_u32.to_ne_bytes());
        let mut request = Writer::default();
        request.message(0, 0, 7, &header(NetfilterProtoFamily::Unspec, 0), |w| w.u32(1, 1));

        let cut = [&request.buf[..MESSAGE_HEADER], &explanation.buf].concat();
        let whole = [&request.buf[..], &explanation.buf].concat();
        for (flags, tail) in [(NLM_F_ACK_TLVS | NLM_F_CAPPED, cut), (NLM_F_ACK_TLVS, whole)] {
            let bytes = error(7, -2, flags, &tail);
            let answer = Answer::read(&Messages(&bytes).next().unwrap()).unwrap();
            assert_eq!((answer.sequence, answer.errno), (7, 2));
            assert_eq!(answer.message.as_deref(), Some("No!"));
            assert_eq!(answer.attribute_offset, Some(48));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200), code in any::<i32>(), flags in any::<u16>()
        ) {
            for message in Messages(&bytes) {
                attributes_of(&message);
            }
            for message in Messages(&error(1, code, flags, &bytes)) {
                prop_assert!(Answer::read(&message).is_some());
            }
        }
    }
}
