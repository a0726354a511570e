//! A short byte string that needs no allocation.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

/// Long enough for an IPv6 address, a protocol, a port and one number more, each padded to four bytes.
const INLINE: usize = 30;

/// A byte string of which the first 30 bytes live in place, so that set elements cost no allocation. Longer ones are
/// boxed. Compares, orders, hashes and derefs as `[u8]`.
#[derive(Clone)]
pub struct Bytes(Repr);

#[derive(Clone)]
enum Repr {
    Inline { len: u8, bytes: [u8; INLINE] },
    Boxed(Box<[u8]>),
}

impl Bytes {
    /// The empty string.
    pub const fn new() -> Self {
        Self(Repr::Inline { len: 0, bytes: [0; INLINE] })
    }

    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline { len, bytes } => bytes.get(..usize::from(*len)).unwrap_or(bytes),
            Repr::Boxed(bytes) => bytes,
        }
    }

    /// Appends `field` and pads with zeroes to the next multiple of four: how one field of a concatenation is laid
    /// out in a key.
    pub fn push_field(&mut self, field: &[u8]) {
        let padded = field.len().next_multiple_of(4);
        if let Repr::Inline { len, bytes } = &mut self.0 {
            let at = usize::from(*len);
            if let Some(room) = bytes.get_mut(at..at + padded) {
                // Bytes behind `len` are zero already: nothing ever shortens a `Bytes`.
                room[..field.len()].copy_from_slice(field);
                *len = (at + padded) as u8;
                return;
            }
        }
        let mut long = self.as_slice().to_vec();
        long.extend_from_slice(field);
        long.resize(long.len() + padded - field.len(), 0);
        self.0 = Repr::Boxed(long.into());
    }

    /// A concatenation: each field padded with zeroes to a multiple of four bytes.
    pub fn concat<F: AsRef<[u8]>>(fields: impl IntoIterator<Item = F>) -> Self {
        let mut bytes = Self::new();
        for field in fields {
            bytes.push_field(field.as_ref());
        }
        bytes
    }
}

impl From<&[u8]> for Bytes {
    fn from(value: &[u8]) -> Self {
        let mut bytes = [0; INLINE];
        match bytes.get_mut(..value.len()) {
            Some(start) => {
                start.copy_from_slice(value);
                Self(Repr::Inline { len: value.len() as u8, bytes })
            }
            None => Self(Repr::Boxed(value.into())),
        }
    }
}

impl<const N: usize> From<[u8; N]> for Bytes {
    fn from(value: [u8; N]) -> Self {
        Self::from(value.as_slice())
    }
}

impl<const N: usize> From<&[u8; N]> for Bytes {
    fn from(value: &[u8; N]) -> Self {
        Self::from(value.as_slice())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(value: Vec<u8>) -> Self {
        Self::from(value.as_slice())
    }
}

impl Default for Bytes {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl Borrow<[u8]> for Bytes {
    fn borrow(&self) -> &[u8] {
        self.as_slice()
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Bytes {}

impl PartialOrd for Bytes {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Bytes {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_slice().cmp(other.as_slice())
    }
}

impl Hash for Bytes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_slice().hash(state);
    }
}

/// `0x` and lower-case hexadecimal digits, a space after every four bytes.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, word) in self.chunks(4).enumerate() {
            f.write_str(if i == 0 { "0x" } else { " " })?;
            for byte in word {
                write!(f, "{byte:02x}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_small() {
        assert_eq!(size_of::<Bytes>(), 32);
        assert_eq!(size_of::<Option<Bytes>>(), 32);
    }

    #[test]
    fn holds_any_length() {
        for len in 0..70_usize {
            let value: Vec<u8> = (0..len as u8).collect();
            assert_eq!(Bytes::from(value.clone()).as_slice(), value);
        }
    }

    #[test]
    fn pads_fields() {
        let key = Bytes::concat([&[10, 0, 0, 1][..], &[6], &80_u16.to_be_bytes()]);
        assert_eq!(key.to_string(), "0x0a000001 06000000 00500000");
        let long = Bytes::concat([[1_u8; 16], [2; 16], [3; 16]]);
        assert_eq!(long.len(), 48);
        assert_eq!(long[32..], [3; 16]);
    }
}
