//! The conversation with the kernel.

use std::io;

use netlink_packet_netfilter::NetfilterProtoFamily;
use netlink_packet_netfilter::nftables::NfTablesMessageType as Message;
use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Answer, Attributes, Error as NetlinkError, Writer, be32, text};
use nix::errno::Errno;

use crate::batch::Batch;
use crate::error::{CommitError, Error, Refusal};
use crate::object::{CHAIN_TABLE, Chain, Family, RULE_CHAIN, RULE_TABLE, Rule, Table, TableId};
use crate::set::{ELEMENTS_LIST, ELEMENTS_SET, ELEMENTS_TABLE, Element, SET_TABLE, Set};
use crate::wire::{NETFILTER_HEADER, header, message_type};

/// Room for a batch of some millions of elements. Only a limit: the kernel allocates what a batch needs.
const SEND_BUFFER: usize = 256 << 20;
/// How often an interrupted dump is started again.
const DUMP_ATTEMPTS: u32 = 8;
/// How many refusals are reported of a batch: the first one matters.
const REFUSALS: usize = 16;

const GEN_ID: u16 = 1;

/// A netlink socket in the network namespace of the thread that opened it. It blocks, but never waits for anybody: the
/// kernel answers before it returns from the system call.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_requests::Socket,
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
        let open = || "open a socket".to_owned();
        let inner = netlink_requests::Socket::open_for(NETLINK_NETFILTER, SEND_BUFFER)
            .map_err(|error| Error::of(open(), error))?;
        let send_buffer = inner
            .send_buffer()
            .map_err(|source| Error::Socket { what: "ask for the size of the send buffer", source })?;
        Ok(Self { inner, send_buffer })
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
        self.inner.send(bytes).map_err(|source| match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMSGSIZE) => CommitError::TooLarge { bytes: bytes.len(), limit: self.send_buffer },
            _ => CommitError::Send { bytes: bytes.len(), source },
        })?;

        // All answers are there by now, in the order of the messages. The last message is answered in any case, unless
        // the transaction as a whole was turned down before the kernel looked at it.
        let mut refusals = Vec::new();
        let mut lost = None;
        loop {
            let answers = match self.inner.answers() {
                Ok(answers) => answers,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Too many refusals for the receive buffer: the first ones are still in it.
                Err(e) if lost.is_none() && e.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    lost = Some(e);
                    continue;
                }
                Err(e) => return Err(CommitError::Unanswered { source: Some(e) }),
            };
            for answer in answers.filter_map(|message| Answer::read(&message)) {
                if answer.errno != 0 {
                    if let Some(expected) = stale_generation(&answer, batch) {
                        return Err(CommitError::GenerationChanged { expected });
                    }
                    if refusals.len() < REFUSALS {
                        refusals.push(refusal(answer, batch));
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
        let mut generation = None;
        let ask = |w: &mut Writer| w.header(&header(NetfilterProtoFamily::Unspec, 0));
        let asked = self.inner.request(message_type(Message::GetGen), ask, |payload| {
            generation = Attributes::find(attributes_of(payload), GEN_ID).and_then(be32);
            Ok(())
        });
        asked
            .and(generation.ok_or(NetlinkError::Malformed("generation without a number")))
            .map_err(|error| Error::of("get generation".to_owned(), error))
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

    /// Asks for a dump and hands on the attributes of each of its messages.
    fn dump(
        &mut self,
        request: &dyn Fn() -> String,
        family: Family,
        kind: Message,
        ask: &dyn Fn(&mut Writer),
        each: &mut dyn FnMut(&[u8]) -> Result<(), &'static str>,
    ) -> Result<(), Stop> {
        let ask = |w: &mut Writer| {
            w.header(&header(family.netfilter(), 0));
            ask(w);
        };
        let each = |payload: &[u8]| each(attributes_of(payload)).map_err(NetlinkError::Malformed);
        self.inner.dump(message_type(kind), ask, each).map_err(|error| match error {
            NetlinkError::Interrupted => Stop::Interrupted,
            NetlinkError::Refused(refusal) if refusal.errno == Errno::ENOENT as i32 => Stop::Missing,
            error => Stop::Failed(Error::of(request(), error)),
        })
    }
}

fn attributes_of(payload: &[u8]) -> &[u8] {
    payload.get(NETFILTER_HEADER..).unwrap_or_default()
}

/// The begin message, of sequence number 0, fails with `ERESTART` if the generation asked for is over.
fn stale_generation(answer: &Answer, batch: &Batch) -> Option<u32> {
    batch.expected_generation().filter(|_| answer.sequence == 0 && answer.errno == Errno::ERESTART as i32)
}

fn refusal(answer: Answer, batch: &Batch) -> Refusal {
    let Answer { sequence, errno, message, attribute_offset } = answer;
    let (index, description) = match batch.message_of(sequence, attribute_offset) {
        Some((index, description)) => (Some(index), description),
        None => (None, "the transaction as a whole".to_owned()),
    };
    Refusal { index, description, errno, message, attribute_offset }
}

const fn assert_send<T: Send>() {}
const _: () = assert_send::<Socket>();
