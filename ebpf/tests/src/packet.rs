//! Packets byte by byte, made with right checksums, and a check that those of any packet are right.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

/// A packet to be made.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Source.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// Protocol number.
    pub protocol: u8,
    /// TCP flags; for SCTP the type of the first chunk.
    pub flags: u8,
    /// What the transport carries.
    pub payload: Vec<u8>,
    /// Options of the IPv4 header, or extension headers of the IPv6 header, the first of which is of type
    /// `extension`. Each of the latter begins with the type of the one after it.
    pub options: Vec<u8>,
    /// See `options`.
    pub extension: Option<u8>,
}

/// TCP SYN.
pub const SYN: u8 = 2;
/// TCP ACK.
pub const ACK: u8 = 16;
/// TCP FIN and ACK.
pub const FIN: u8 = 17;

impl Packet {
    /// A packet with 32 bytes of payload: TCP SYN, SCTP INIT, or UDP.
    pub fn new(source: SocketAddr, destination: SocketAddr, protocol: u8) -> Self {
        let flags = if protocol == crate::TCP { SYN } else { 1 };
        let payload = (0..32).collect();
        Self { source, destination, protocol, flags, payload, options: Vec::new(), extension: None }
    }

    /// The same with these flags.
    #[must_use]
    pub const fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    /// The same with this payload.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        payload.clone_into(&mut self.payload);
        self
    }

    /// The answer to it.
    #[must_use]
    pub fn answer(&self) -> Self {
        let flags = if self.protocol == crate::TCP { ACK } else { 2 };
        Self { source: self.destination, destination: self.source, flags, ..self.clone() }
    }

    /// The transport header and what it carries.
    pub fn transport(&self) -> Vec<u8> {
        let mut bytes = [self.source.port().to_be_bytes(), self.destination.port().to_be_bytes()].concat();
        match self.protocol {
            crate::TCP => {
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 5 << 4, self.flags, 1, 0, 0, 0, 0, 0]);
                bytes.extend(&self.payload);
            }
            crate::UDP => {
                bytes.extend(u16::try_from(self.payload.len() + 8).unwrap_or(0).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(&self.payload);
            }
            _ => {
                bytes.extend([0, 0, 0, 9, 0, 0, 0, 0, self.flags, 0]);
                bytes.extend(u16::try_from(self.payload.len() + 4).unwrap_or(0).to_be_bytes());
                bytes.extend(&self.payload);
            }
        }
        set_transport_checksum(self.source.ip(), self.destination.ip(), self.protocol, &mut bytes);
        bytes
    }

    /// The whole packet with its Ethernet header.
    pub fn bytes(&self) -> Vec<u8> {
        let mut body = self.options.clone();
        body.extend(self.transport());
        frame(&self.ip(&body, 0))
    }

    /// The packet in fragments with `size` bytes of payload each.
    pub fn fragments(&self, size: usize) -> Vec<Vec<u8>> {
        let transport = self.transport();
        let last = transport.chunks(size).count() - 1;
        let one = |(i, part): (usize, &[u8])| {
            let (offset, more) = (i * size / 8, i != last);
            if self.source.is_ipv4() {
                let field = u16::try_from(offset).unwrap_or(0) | if more { 0x2000 } else { 0 };
                return frame(&self.ip(part, field));
            }
            let field = u16::try_from(offset).unwrap_or(0) << 3 | u16::from(more);
            let mut body = vec![self.protocol, 0];
            body.extend(field.to_be_bytes());
            body.extend([0, 0, 0x12, 0x34]);
            body.extend(part);
            frame(&Self { extension: Some(44), ..self.clone() }.ip(&body, 0))
        };
        transport.chunks(size).enumerate().map(one).collect()
    }

    /// The IP header and what follows it.
    fn ip(&self, body: &[u8], fragment: u16) -> Vec<u8> {
        ip(
            self.source.ip(),
            self.destination.ip(),
            self.extension.unwrap_or(self.protocol),
            body,
            fragment,
            if self.source.is_ipv4() { self.options.len() } else { 0 },
        )
    }

    /// An ICMP error from `sender` to the packet's source that quotes `quoted` bytes of the transport.
    pub fn error(&self, sender: IpAddr, quoted: usize) -> Vec<u8> {
        let mut transport = self.transport();
        transport.truncate(quoted);
        let mut inner = self.ip(&[self.options.clone(), transport].concat(), 0);
        // The quoted header tells the length of the whole packet.
        let body = self.options.len() + self.transport().len();
        if self.source.is_ipv4() {
            inner[2..4].copy_from_slice(&u16::try_from(20 + body).unwrap_or(0).to_be_bytes());
            inner[10..12].fill(0);
            let sum = !internet_sum(&inner[..20 + self.options.len()], 0);
            inner[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            inner[4..6].copy_from_slice(&u16::try_from(body).unwrap_or(0).to_be_bytes());
        }
        let (kind, protocol) = if sender.is_ipv4() { ([3, 1], ICMP) } else { ([1, 3], ICMP6) };
        let mut body = [&kind[..], &[0; 6], &inner].concat();
        set_transport_checksum(sender, self.source.ip(), protocol, &mut body);
        frame(&ip(sender, self.source.ip(), protocol, &body, 0, 0))
    }
}

fn frame(packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet[0] >> 4 == 4 { [8, 0] } else { [0x86, 0xdd] };
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..], &kind, packet].concat()
}

fn ip(source: IpAddr, destination: IpAddr, next: u8, body: &[u8], fragment: u16, options: usize) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let words = u8::try_from(5 + options / 4).unwrap_or(0);
            let total = u16::try_from(20 + body.len()).unwrap_or(0).to_be_bytes();
            let mut bytes = vec![0x40 | words, 0, total[0], total[1], 0x12, 0x34];
            bytes.extend(fragment.to_be_bytes());
            bytes.extend([64, next, 0, 0]);
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
            bytes.extend(body);
            let sum = !internet_sum(&bytes[..20 + options], 0);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            bytes
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let length = u16::try_from(body.len()).unwrap_or(0).to_be_bytes();
            let mut bytes = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
            bytes.extend(body);
            bytes
        }
        _ => Vec::new(),
    }
}

/// The ones' complement sum of RFC 1071, folded.
fn internet_sum(bytes: &[u8], seed: u32) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0)));
    let mut sum = words.fold(seed, u32::wrapping_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}

fn pseudo_sum(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> u32 {
    let octets = |a: IpAddr| match a {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    };
    let addresses = [octets(source), octets(destination)].concat();
    u32::from(internet_sum(&addresses, 0)) + u32::from(protocol) + u32::try_from(length).unwrap_or(0)
}

/// The CRC of SCTP as RFC 9260 has it, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let crc = bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    });
    !crc
}

const fn checksum_offset(protocol: u8) -> usize {
    match protocol {
        crate::TCP => 16,
        crate::UDP => 6,
        ICMP | ICMP6 => 2,
        _ => 8,
    }
}

fn set_transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, bytes: &mut [u8]) {
    let at = checksum_offset(protocol);
    if protocol == crate::SCTP {
        let crc = crc32c(bytes).to_le_bytes();
        bytes[at..at + 4].copy_from_slice(&crc);
        return;
    }
    let seed = if protocol == ICMP { 0 } else { pseudo_sum(source, destination, protocol, bytes.len()) };
    let sum = match !internet_sum(bytes, seed) {
        0 if protocol == crate::UDP => 0xffff,
        sum => sum,
    };
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What a packet says; its checksums and lengths are right.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Source; port 0 where there is none.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// Protocol number.
    pub protocol: u8,
    /// The packet that an ICMP error quotes.
    pub quoted: Option<Box<Seen>>,
}

/// Reads a packet, and checks lengths and checksums of everything that is whole.
pub fn read(bytes: &[u8]) -> Result<Seen> {
    let packet = bytes.get(ETHERNET..).context("shorter than an Ethernet header")?;
    read_ip(packet, true)
}

/// Reads the transport of a packet that was put together from fragments.
pub fn read_ip(packet: &[u8], whole: bool) -> Result<Seen> {
    let v4 = packet.first().context("empty")? >> 4 == 4;
    let word = |at: usize| -> Result<u16> {
        Ok(u16::from_be_bytes([*packet.get(at).context("short")?, *packet.get(at + 1).context("short")?]))
    };
    let (source, destination, protocol, start, length): (IpAddr, IpAddr, u8, usize, usize);
    if v4 {
        let header = usize::from(packet[0] & 15) * 4;
        let ip = packet.get(..header).context("short IPv4 header")?;
        ensure!(internet_sum(ip, 0) == 0xffff, "checksum of the IPv4 header: {ip:02x?}");
        source = <[u8; 4]>::try_from(&ip[12..16])?.into();
        destination = <[u8; 4]>::try_from(&ip[16..20])?.into();
        (protocol, start, length) = (ip[9], header, usize::from(word(2)?));
    } else {
        let ip = packet.get(..40).context("short IPv6 header")?;
        source = <[u8; 16]>::try_from(&ip[8..24])?.into();
        destination = <[u8; 16]>::try_from(&ip[24..40])?.into();
        let (mut next, mut at) = (ip[6], 40);
        while matches!(next, 0 | 43 | 60) {
            next = packet[at];
            at += (usize::from(packet[at + 1]) + 1) * 8;
        }
        (protocol, start, length) = (next, at, usize::from(word(4)?) + 40);
    }
    ensure!(!whole || length == packet.len(), "says {length} bytes and has {}", packet.len());
    let body = packet.get(start..).context("no transport")?;
    if !whole && length > packet.len() {
        // Quoted in part: nothing to check but the header.
        let port = |at: usize| word(start + at);
        return Ok(Seen {
            source: SocketAddr::new(source, port(0)?),
            destination: SocketAddr::new(destination, port(2)?),
            protocol,
            quoted: None,
        });
    }
    check_transport(source, destination, protocol, body)?;
    let error = match protocol {
        ICMP => matches!(body[0], 3 | 11 | 12),
        ICMP6 => body[0] < 128,
        _ => false,
    };
    let ports = if matches!(protocol, ICMP | ICMP6) { [0, 0] } else { [word(start)?, word(start + 2)?] };
    Ok(Seen {
        source: SocketAddr::new(source, ports[0]),
        destination: SocketAddr::new(destination, ports[1]),
        protocol,
        quoted: if error { Some(Box::new(read_ip(&body[8..], false)?)) } else { None },
    })
}

/// Checks a transport header's checksum and length.
pub fn check_transport(source: IpAddr, destination: IpAddr, protocol: u8, body: &[u8]) -> Result<()> {
    let at = checksum_offset(protocol);
    if protocol == crate::SCTP {
        let mut copy = body.to_vec();
        copy[at..at + 4].fill(0);
        ensure!(crc32c(&copy).to_le_bytes() == body[at..at + 4], "CRC of SCTP");
        return Ok(());
    }
    if protocol == crate::UDP {
        let length = usize::from(u16::from_be_bytes([body[4], body[5]]));
        ensure!(length == body.len(), "UDP says {length} bytes and has {}", body.len());
        if body[at..at + 2] == [0, 0] {
            if source.is_ipv6() {
                bail!("UDP over IPv6 without a checksum");
            }
            return Ok(());
        }
    }
    let seed = if protocol == ICMP { 0 } else { pseudo_sum(source, destination, protocol, body.len()) };
    ensure!(internet_sum(body, seed) == 0xffff, "checksum of protocol {protocol}: {body:02x?}");
    Ok(())
}
