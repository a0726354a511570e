//! Several messages in one buffer, and the messages of an answer.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer};

use crate::wire::Writer;

/// Messages that are sent together. The kernel carries them out one after the other, and goes on after
/// one that it refuses.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    writer: Writer,
    /// Where each message starts.
    starts: Vec<usize>,
    /// The first message that does not fit into its length.
    pub(crate) oversized: Option<usize>,
}

impl Batch {
    /// Appends a message of a type, with flags beyond `NLM_F_REQUEST`.
    pub fn push(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer)) {
        self.starts.push(self.writer.len());
        self.writer.message(kind, NLM_F_REQUEST | flags, 0, &[], body);
        if self.writer.oversized() {
            self.oversized.get_or_insert(self.starts.len() - 1);
        }
    }

    /// Number of messages.
    pub const fn len(&self) -> usize {
        self.starts.len()
    }

    /// True without messages.
    pub const fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// Size of all messages.
    pub const fn bytes(&self) -> usize {
        self.writer.len()
    }

    /// The messages as they will be sent.
    pub fn as_bytes(&self) -> &[u8] {
        self.writer.as_bytes()
    }

    /// Numbers the only message, whose answer is asked for by its flags.
    pub(crate) fn number(&mut self, sequence: u32) {
        NetlinkBuffer::new(self.writer.as_mut_bytes()).set_sequence_number(sequence);
    }

    /// Numbers the messages from `first` on and asks for an answer to the last one. (An answer to each
    /// would cost more than the messages; refusals are answered in any case.)
    pub(crate) fn seal(&mut self, first: u32) {
        let last = self.starts.last().copied();
        for (i, start) in self.starts.iter().enumerate() {
            let mut message = NetlinkBuffer::new(&mut self.writer.as_mut_bytes()[*start..]);
            message.set_sequence_number(first.wrapping_add(i as u32));
            if Some(*start) == last {
                message.set_flags(message.flags() | NLM_F_ACK);
            }
        }
    }
}

/// The messages of a datagram; ends early where they are malformed.
#[derive(Clone, Debug)]
pub struct Messages<'a>(&'a [u8]);

impl<'a> Messages<'a> {
    /// The messages in `buf`.
    pub const fn new(buf: &'a [u8]) -> Self {
        Self(buf)
    }
}

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
