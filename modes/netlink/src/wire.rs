//! Attributes as bytes: a writer that patches lengths, and an iterator that reads in place.

use std::str;

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK, NetlinkBuffer};

/// Size of `struct nlmsghdr`.
pub const MESSAGE_HEADER: usize = 16;

/// Appends messages, headers and attributes to one buffer.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    buf: Vec<u8>,
    oversized: bool,
}

impl Writer {
    /// A writer whose buffer has room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { buf: Vec::with_capacity(bytes), oversized: false }
    }

    /// One message: its header, the family's own header, then whatever `body` writes, then the length.
    pub fn message(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        header: &[u8],
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.buf.len();
        self.buf.resize(start + MESSAGE_HEADER, 0);
        self.header(header);
        body(self);
        let length = self.buf.len() - start;
        let mut message = NetlinkBuffer::new(&mut self.buf[start..]);
        message.set_length(length as u32);
        message.set_message_type(kind);
        message.set_flags(flags);
        message.set_sequence_number(sequence);
    }

    /// Bytes as they are, padded to four: a family's own header, or attributes that are written already.
    pub fn header(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
        self.pad();
    }

    /// One attribute, padded to four bytes.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.head(kind, NLA_HEADER_SIZE + value.len());
        self.buf.extend_from_slice(value);
        self.pad();
    }

    /// A number of 32 bits, big-endian as netfilter has it.
    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// A number of 64 bits, big-endian.
    pub fn u64(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// A string and its terminating zero.
    pub fn string(&mut self, kind: u16, value: &str) {
        self.head(kind, NLA_HEADER_SIZE + value.len() + 1);
        self.buf.extend_from_slice(value.as_bytes());
        self.buf.push(0);
        self.pad();
    }

    /// An attribute made of attributes.
    pub fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.head(kind | NLA_F_NESTED, NLA_HEADER_SIZE);
        body(self);
        let length = self.length(self.buf.len() - start);
        if let Some(field) = self.buf.get_mut(start..start + 2) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
    }

    /// What is written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.buf
    }

    /// What is written, to change it in place.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        &mut self.buf
    }

    /// Number of bytes written.
    pub const fn len(&self) -> usize {
        self.buf.len()
    }

    /// True if nothing is written.
    pub const fn is_empty(&self) -> bool {
        self.buf.is_empty()
    }

    /// Forgets what was written behind `length` bytes: the end of a message.
    pub fn truncate(&mut self, length: usize) {
        self.buf.truncate(length);
    }

    /// An attribute outgrew its 16-bit length: what was written since must not be sent.
    pub const fn oversized(&self) -> bool {
        self.oversized
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

/// The attributes of a buffer, one after the other, without their flags; ends early where they are
/// malformed.
#[derive(Clone, Debug)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes of `buf`.
    pub const fn new(buf: &'a [u8]) -> Self {
        Self(buf)
    }

    /// The first attribute of this kind.
    pub fn find(buf: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Self(buf).find_map(|(k, value)| (k == kind).then_some(value))
    }

    /// The bytes not yet read.
    pub const fn rest(&self) -> &'a [u8] {
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

/// A big-endian number of 16 bits.
pub fn be16(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_be_bytes)
}

/// A big-endian number of 32 bits.
pub fn be32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// A big-endian number of 64 bits.
pub fn be64(value: &[u8]) -> Option<u64> {
    value.try_into().ok().map(u64::from_be_bytes)
}

/// A number of 16 bits in the machine's byte order.
pub fn native16(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_ne_bytes)
}

/// A number of 32 bits in the machine's byte order.
pub fn native32(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_ne_bytes)
}

/// A number of 64 bits in the machine's byte order.
pub fn native64(value: &[u8]) -> Option<u64> {
    value.try_into().ok().map(u64::from_ne_bytes)
}

/// A string, without its terminating zero.
pub fn text(value: &[u8]) -> Option<&str> {
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    str::from_utf8(value.get(..end)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_read_as_written() {
        let mut w = Writer::default();
        w.string(1, "four");
        w.nest(2, |w| {
            w.u32(1, 7);
            w.attribute(2, &[1]);
        });
        w.u64(3, 9);
        assert!(!w.oversized());
        assert_eq!(w.len() % 4, 0);
        let bytes = w.as_bytes();
        assert_eq!(Attributes::find(bytes, 1).and_then(text), Some("four"));
        let nested: Vec<_> = Attributes::new(Attributes::find(bytes, 2).unwrap()).collect();
        assert_eq!(nested, [(1, &[0, 0, 0, 7][..]), (2, &[1])]);
        assert_eq!(Attributes::find(bytes, 3).and_then(be64), Some(9));
    }

    #[test]
    fn an_attribute_that_is_too_long_is_noticed() {
        let mut w = Writer::default();
        w.attribute(1, &vec![0; 65_532]);
        assert!(w.oversized());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            for (_, value) in Attributes::new(&bytes) {
                let _ = (text(value), be16(value), be32(value), be64(value), native64(value));
            }
        }
    }
}
