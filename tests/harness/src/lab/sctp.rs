//! The first two packets of an SCTP association (RFC 9260), for raw sockets: many kernels have no SCTP of their own.
//!
//! The client sends INIT. The server answers INIT ACK, whose State Cookie, which means nothing to clients of the
//! protocol, holds the echo server's line.

use std::sync::atomic::{AtomicU32, Ordering};

/// The protocol's number in the IP header.
pub(super) const PROTOCOL: i32 = 132;

const HEADER: usize = 12;
const CHUNK: usize = 20;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const STATE_COOKIE: u16 = 7;

/// An INIT.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Init {
    /// Source port.
    pub(super) from: u16,
    /// Destination port.
    pub(super) to: u16,
    /// The tag by which the server shall address its packets; not zero.
    pub(super) tag: u32,
}

impl Init {
    /// The first packet to a port, from this one, or with 0 from one that this process has not used lately.
    pub(super) fn new(from: u16, to: u16) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed) % 40_000;
        let unused = u16::try_from(20_000 + number).unwrap_or(u16::MAX);
        Self { from: if from == 0 { unused } else { from }, to, tag: number + 1 }
    }

    /// Reads an INIT.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let (Self { from, to, tag: verification }, chunk) = parse(packet)?;
        let tag = u32::from_be_bytes(*chunk.get(4..)?.first_chunk()?);
        (chunk[0] == INIT && verification == 0 && tag != 0).then_some(Self { from, to, tag })
    }

    /// The packet.
    pub(super) fn packet(self) -> Vec<u8> {
        packet(Self { tag: 0, ..self }, INIT, self.tag, &[])
    }

    /// The INIT ACK that answers it.
    pub(super) fn answer(self, line: &str) -> Vec<u8> {
        let mut cookie = Vec::from(STATE_COOKIE.to_be_bytes());
        cookie.extend(length(4 + line.len()));
        cookie.extend(line.bytes());
        packet(Self { from: self.to, to: self.from, tag: self.tag }, INIT_ACK, self.tag, &cookie)
    }

    /// The line of a packet, if that is the INIT ACK that answers this INIT.
    pub(super) fn line_of(self, packet: &[u8]) -> Option<String> {
        let (header, chunk) = parse(packet)?;
        let ours = header == Self { from: self.to, to: self.from, tag: self.tag };
        let parameter = chunk.get(CHUNK..).filter(|_| ours && chunk[0] == INIT_ACK)?;
        let cookie = parameter.strip_prefix(&STATE_COOKIE.to_be_bytes())?;
        let end = usize::from(u16::from_be_bytes(*cookie.first_chunk()?));
        Some(String::from_utf8_lossy(parameter.get(4..end)?).into_owned())
    }
}

/// What a raw socket received, without the header that those of IPv4 (`v4`) give along.
pub(super) fn payload(received: &[u8], v4: bool) -> &[u8] {
    let header = if v4 { received.first().map_or(0, |first| usize::from(first & 15) * 4) } else { 0 };
    received.get(header..).unwrap_or_default()
}

/// A packet with one chunk. `header` holds its ports and its verification tag.
fn packet(header: Init, kind: u8, initiate: u32, parameter: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER + CHUNK + parameter.len() + 3);
    packet.extend(header.from.to_be_bytes());
    packet.extend(header.to.to_be_bytes());
    packet.extend(header.tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([kind, 0]);
    packet.extend(length(CHUNK + parameter.len()));
    packet.extend(initiate.to_be_bytes());
    packet.extend(0x1_0000_u32.to_be_bytes()); // Receiver window.
    packet.extend([0, 1, 0, 1]); // Streams out and in.
    packet.extend(initiate.to_be_bytes()); // The first TSN; usually the same number.
    packet.extend(parameter);
    packet.resize(packet.len().next_multiple_of(4), 0);
    let sum = checksum(&packet);
    packet[8..HEADER].copy_from_slice(&sum);
    packet
}

/// Ports and verification tag, and the first chunk of a packet whose checksum is right.
fn parse(packet: &[u8]) -> Option<(Init, &[u8])> {
    let (header, chunk) = packet.split_first_chunk::<HEADER>()?;
    let [a, b, c, d, t0, t1, t2, t3, sum @ ..] = *header;
    if chunk.len() < CHUNK || sum != checksum(packet) {
        return None;
    }
    let tag = u32::from_be_bytes([t0, t1, t2, t3]);
    let header = Init { from: u16::from_be_bytes([a, b]), to: u16::from_be_bytes([c, d]), tag };
    Some((header, chunk))
}

/// A length field.
fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// The CRC-32C of a packet, with zeros in place of the checksum itself.
fn checksum(packet: &[u8]) -> [u8; 4] {
    let bytes = packet.iter().enumerate().map(|(i, byte)| if (8..HEADER).contains(&i) { 0 } else { *byte });
    let crc = bytes.fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    });
    (!crc).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_answered_is_read_back_and_nothing_else_is() {
        let init = Init::new(0, 38412);
        let sent = init.packet();
        assert_eq!(Init::parse(&sent), Some(init));
        for line in ["pod=a\n", "pod=ab\n", "pod=abc\n", ""] {
            let answer = init.answer(line);
            assert_eq!((answer.len() % 4, init.line_of(&answer).as_deref()), (0, Some(line)));
            assert_eq!(Init::parse(&answer), None);
            assert_eq!(Init::new(0, 38412).line_of(&answer), None, "another one's answer");
            for end in 0..answer.len() {
                assert_eq!(init.line_of(&answer[..end]), None);
            }
        }
        assert_eq!(init.line_of(&sent), None);
        let mut damaged = sent;
        damaged[0] ^= 1;
        assert_eq!(Init::parse(&damaged), None);
    }

    #[test]
    fn checksums_are_those_of_the_protocol() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(checksum(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
    }

    #[test]
    fn the_header_of_the_older_protocol_is_left_out() {
        assert_eq!(payload(&[0x45; 24], true), [0x45; 4]);
        assert_eq!(payload(&[0x45; 24], false), [0x45; 24]);
        assert_eq!(payload(&[0x4f; 24], true), [0; 0]);
        assert_eq!(payload(&[], true), [0; 0]);
    }
}
