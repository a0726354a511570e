//! Changes, gathered into one batch.

use netlink_requests::{Batch, NLM_F_EXCL, Refusal, Writer};

use crate::IN_USE;
use crate::element::Element;
use crate::set::{DATA, NAME, Set, TYPE};

/// `NFNL_SUBSYS_IPSET` in the upper byte of message types.
const SUBSYSTEM: u16 = 6 << 8;
/// The version that every command used here exists in.
const PROTOCOL_VERSION: u8 = 6;
const PROTOCOL: u16 = 1;

const CREATE: u8 = 2;
const DESTROY: u8 = 3;
const FLUSH: u8 = 4;
const SWAP: u8 = 6;
const LIST: u8 = 7;
const ADD: u8 = 9;
const DELETE: u8 = 10;
/// The second name of a swap has the number of the type.
const OTHER_NAME: u16 = TYPE;

/// Size of the netfilter header.
pub(crate) const HEADER: usize = 4;
pub(crate) const LIST_MESSAGE: u16 = SUBSYSTEM | LIST as u16;
const AF_INET: u8 = 2;

/// Writes what every message starts with.
pub(crate) fn start(w: &mut Writer) {
    // Family (of no meaning here), version 0, resource 0.
    w.header(&[AF_INET, 0, 0, 0]);
    w.attribute(PROTOCOL, &[PROTOCOL_VERSION]);
}

/// Commands that are sent together and carried out one after the other.
#[derive(Clone, Debug, Default)]
pub struct Commands {
    pub(crate) batch: Batch,
    /// Sets that commands delete, by the commands' places among all.
    pub(crate) destroyed: Vec<(usize, String)>,
}

impl Commands {
    fn push(&mut self, command: u8, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.batch.push(SUBSYSTEM | u16::from(command), flags, |w| {
            start(w);
            body(w);
        });
    }

    /// Number of commands.
    pub const fn len(&self) -> usize {
        self.batch.len()
    }

    /// True without commands.
    pub const fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// Size in bytes; the kernel takes some megabytes at once.
    pub const fn bytes(&self) -> usize {
        self.batch.bytes()
    }

    /// The set that a refused command would have deleted, and the command's place, if it was refused because the
    /// set is in use.
    pub(crate) fn in_use(&self, refusal: &Refusal) -> Option<(usize, &str)> {
        let at = self.destroyed.binary_search_by_key(&refusal.index, |(index, _)| *index).ok()?;
        (refusal.errno == IN_USE).then(|| (refusal.index, &*self.destroyed[at].1))
    }

    /// Makes a set; refused (`EEXIST`) if there is one of its name.
    pub fn create(&mut self, set: &Set) {
        self.push(CREATE, NLM_F_EXCL, |w| set.write(w));
    }

    /// Deletes a set; refused if rules refer to it.
    pub fn destroy(&mut self, name: &str) {
        self.destroyed.push((self.len(), name.to_owned()));
        self.push(DESTROY, 0, |w| w.string(NAME, name));
    }

    /// Deletes all elements of a set.
    pub fn flush(&mut self, name: &str) {
        self.push(FLUSH, 0, |w| w.string(NAME, name));
    }

    /// Makes two sets of the same type and family change places; rules follow the name.
    pub fn swap(&mut self, one: &str, other: &str) {
        self.push(SWAP, 0, |w| {
            w.string(NAME, one);
            w.string(OTHER_NAME, other);
        });
    }

    /// Adds an element; one that is there gets the new mark.
    pub fn add(&mut self, name: &str, element: &Element) {
        self.element(ADD, name, element);
    }

    /// Deletes an element, if it is there.
    pub fn delete(&mut self, name: &str, element: &Element) {
        self.element(DELETE, name, &Element { mark: None, ..*element });
    }

    fn element(&mut self, command: u8, name: &str, element: &Element) {
        self.push(command, 0, |w| {
            w.string(NAME, name);
            w.nest(DATA, |w| element.write(w));
        });
    }
}
