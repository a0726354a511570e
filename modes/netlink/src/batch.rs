//! Several messages in one buffer, and the messages of an answer.

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer};

use crate::wire::Writer;

/// Size of `struct nlmsghdr`.
pub(crate) const MESSAGE_HEADER: usize = 16;

/// Messages that are sent together. The kernel carries them out one after the other, and goes on after
/// one that it refuses.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    pub(crate) buf: Vec<u8>,
    /// Where each message starts.
    pub(crate) starts: Vec<usize>,
    /// The first message that does not fit into its length.
    pub(crate) oversized: Option<usize>,
}

impl Batch {
    /// Appends a message of a type, with flags beyond `NLM_F_REQUEST`.
    pub fn push(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer<'_>)) {
        let start = self.buf.len();
        self.buf.resize(start + MESSAGE_HEADER, 0);
        let mut writer = Writer::new(&mut self.buf);
        body(&mut writer);
        if writer.oversized {
            self.oversized.get_or_insert(self.starts.len());
        }
        let length = self.buf.len() - start;
        let mut message = NetlinkBuffer::new(&mut self.buf[start..]);
        message.set_length(length as u32);
        message.set_message_type(kind);
        message.set_flags(NLM_F_REQUEST | flags);
        self.starts.push(start);
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
        self.buf.len()
    }

    /// The messages as they will be sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.buf
    }

    /// Numbers the messages from `first` on and asks for an answer to the last one. (An answer to each
    /// would cost more than the messages; refusals are answered in any case.)
    pub(crate) fn seal(&mut self, first: u32) {
        let last = self.starts.last().copied();
        for (i, start) in self.starts.iter().enumerate() {
            let mut message = NetlinkBuffer::new(&mut self.buf[*start..]);
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
