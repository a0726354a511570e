//! Attributes as bytes: a writer that patches lengths, and an iterator that reads in place.

use std::str;

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK};

/// Appends headers and attributes of one message.
#[derive(Debug)]
pub struct Writer<'a> {
    pub(crate) buf: &'a mut Vec<u8>,
    /// Set when an attribute outgrew its 16-bit length: the message must not be sent.
    pub(crate) oversized: bool,
}

impl<'a> Writer<'a> {
    /// A writer that appends to `buf`, whose length is a multiple of four.
    pub fn new(buf: &'a mut Vec<u8>) -> Self {
        Self { buf, oversized: false }
    }

    /// Bytes as they are, padded to four: a family's own header.
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
        let mut buf = Vec::new();
        let mut w = Writer::new(&mut buf);
        w.string(1, "four");
        w.nest(2, |w| {
            w.attribute(1, &7_u32.to_be_bytes());
            w.attribute(2, &[1]);
        });
        assert!(!w.oversized);
        assert_eq!(buf.len() % 4, 0);
        assert_eq!(Attributes::find(&buf, 1).and_then(text), Some("four"));
        let nested: Vec<_> = Attributes::new(Attributes::find(&buf, 2).unwrap()).collect();
        assert_eq!(nested, [(1, &[0, 0, 0, 7][..]), (2, &[1])]);
    }

    #[test]
    fn an_attribute_that_is_too_long_is_noticed() {
        let mut buf = Vec::new();
        let mut w = Writer::new(&mut buf);
        w.attribute(1, &vec![0; 65_532]);
        assert!(w.oversized);
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
