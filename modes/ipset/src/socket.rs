//! The conversation with the kernel.

use std::time::Duration;

use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Attributes, Error as NetlinkError, Refusal, Socket, text};

use crate::commands::{Commands, HEADER, LIST_MESSAGE, start};
use crate::element::{self, Element};
use crate::set::{self, BIG_ENDIAN, DATA, Family, NAME, Set};

/// `IPSET_ATTR_FLAGS` of a list, and `IPSET_FLAG_LIST_HEADER`: without elements.
const FLAGS: u16 = 6;
const WITHOUT_ELEMENTS: u32 = 1 << 2;
/// `IPSET_ATTR_ADT`: a list of elements.
const ELEMENTS: u16 = 8;
const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
/// How often it is tried to delete a set that is in use, and the time between two tries.
const DESTROY_TRIES: u32 = 100;
const DESTROY_PAUSE: Duration = Duration::from_millis(10);
/// How often an interrupted dump is started again.
const DUMP_ATTEMPTS: u32 = 8;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel has no ipset, and did not load it when asked for it.
    #[error("the kernel has no ipset: it needs CONFIG_IP_SET (module ip_set)")]
    NoIpset,
    /// The conversation failed.
    #[error("{what}: {source}")]
    Netlink {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: NetlinkError,
    },
}

/// A set as the kernel lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// Its declaration; `None` for types and options that are not known here.
    pub set: Option<Set>,
    /// Family of its addresses, also where the declaration is not known; `None` if it has none.
    pub family: Option<Family>,
    /// Its elements, in no order; none where the declaration is not known, or was all that was asked for.
    pub elements: Vec<Element>,
    /// Rules and sets that refer to it.
    pub references: u32,
}

/// Sets of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Ipset {
    socket: Socket,
}

impl Ipset {
    /// Opens ipset. The kernel loads the module if it can.
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(NETLINK_NETFILTER)
            .map_err(|source| Error::Netlink { what: "open netfilter's netlink", source })?;
        let mut ipset = Self { socket };
        // A name that no set can have: the question is whether anybody is there to be asked.
        match ipset.list(Some("")) {
            Err(Error::Netlink { source: NetlinkError::Refused(Refusal { errno: EINVAL, .. }), .. }) => {
                Err(Error::NoIpset)
            }
            Err(error) => Err(error),
            Ok(_) => Ok(ipset),
        }
    }

    /// Carries out commands one after the other and answers which the kernel refused. Those after a
    /// refused one are carried out all the same. Sets that cannot be deleted because they are in use are
    /// tried again for up to a second: they may be so for a moment after the last rule that refers to them
    /// is gone, and while anybody lists them.
    pub fn execute(&mut self, commands: &mut Commands) -> Result<Vec<Refusal>, Error> {
        let mut refusals = self.send(commands)?;
        for _ in 1..DESTROY_TRIES {
            let in_use: Vec<(usize, &str)> =
                refusals.iter().filter_map(|refusal| commands.in_use(refusal)).collect();
            if in_use.is_empty() {
                break;
            }
            std::thread::sleep(DESTROY_PAUSE);
            let mut again = Commands::default();
            for (_, name) in &in_use {
                again.destroy(name);
            }
            let still = self.send(&mut again)?;
            refusals.retain(|refusal| commands.in_use(refusal).is_none());
            refusals.extend(still.into_iter().filter_map(|refusal| {
                in_use.get(refusal.index).map(|(index, _)| Refusal { index: *index, ..refusal })
            }));
        }
        refusals.sort_by_key(|refusal| refusal.index);
        Ok(refusals)
    }

    fn send(&mut self, commands: &mut Commands) -> Result<Vec<Refusal>, Error> {
        self.socket
            .execute(&mut commands.batch)
            .map_err(|source| Error::Netlink { what: "change sets", source })
    }

    /// All sets, or the one of a name; none if there is no such set.
    pub fn list(&mut self, name: Option<&str>) -> Result<Vec<Listed>, Error> {
        self.dump(name, 0)
    }

    /// All sets, without their elements.
    pub fn declarations(&mut self) -> Result<Vec<Listed>, Error> {
        self.dump(None, WITHOUT_ELEMENTS)
    }

    fn dump(&mut self, name: Option<&str>, flags: u32) -> Result<Vec<Listed>, Error> {
        const WHAT: &str = "list sets";
        for _ in 0..DUMP_ATTEMPTS {
            let mut listed = Vec::new();
            let dumped = self.socket.dump(
                LIST_MESSAGE,
                |w| {
                    start(w);
                    if let Some(name) = name {
                        w.string(NAME, name);
                    }
                    if flags != 0 {
                        w.attribute(FLAGS | BIG_ENDIAN, &flags.to_be_bytes());
                    }
                },
                |payload| {
                    let attributes = payload.get(HEADER..).unwrap_or_default();
                    take_in(attributes, &mut listed).map_err(NetlinkError::Malformed)
                },
            );
            match dumped {
                Err(NetlinkError::Interrupted) => {}
                Err(NetlinkError::Refused(Refusal { errno: ENOENT, .. })) => return Ok(Vec::new()),
                Err(source) => return Err(Error::Netlink { what: WHAT, source }),
                Ok(()) => return Ok(listed),
            }
        }
        Err(Error::Netlink { what: WHAT, source: NetlinkError::Interrupted })
    }
}

/// Takes in one message of a list: a declaration, elements, or both. A set with many elements takes
/// several messages, of which the first one has the declaration.
pub(crate) fn take_in(attributes: &[u8], listed: &mut Vec<Listed>) -> Result<(), &'static str> {
    let name = Attributes::find(attributes, NAME).and_then(text).ok_or("a set's name")?;
    if let Some(declared) = set::decode(name, attributes) {
        listed.push(Listed {
            name: name.to_owned(),
            set: declared.set,
            family: declared.family,
            elements: Vec::new(),
            references: declared.references,
        });
    }
    let Some(elements) = Attributes::find(attributes, ELEMENTS) else { return Ok(()) };
    let last = listed.last_mut().filter(|last| last.name == name).ok_or("a set's declaration")?;
    let Some(set) = &last.set else { return Ok(()) };
    for (kind, element) in Attributes::new(elements) {
        if kind == DATA {
            last.elements.push(element::decode(set.kind, element).ok_or("an element")?);
        }
    }
    Ok(())
}
