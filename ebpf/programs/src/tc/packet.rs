//! What a packet says about itself.

use shunt_ebpf_abi::{Address, FlowKey, Fragment, FragmentKey, Tuple};

use super::frame::Frame;
use super::work::{Layout, Work};
use crate::maps::FRAGMENTS;

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const SCTP_INIT: u8 = 1;
const SCTP_ABORT: u8 = 6;
const SCTP_SHUTDOWN_COMPLETE: u8 = 14;

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ip4 {
    pub(crate) version_length: u8,
    pub(crate) service: u8,
    pub(crate) total: u16,
    pub(crate) id: u16,
    pub(crate) fragment: u16,
    pub(crate) ttl: u8,
    pub(crate) protocol: u8,
    pub(crate) checksum: u16,
    pub(crate) source: u32,
    pub(crate) destination: u32,
}

impl Ip6 {
    /// Whether it is what the frame says that it is.
    #[inline(always)]
    pub(crate) const fn is_sound(&self) -> bool {
        u32::from_be(self.version_flow) >> 28 == 6
    }
}

impl Ip4 {
    /// Whether ports follow right after it: it has no options, and the packet is no fragment.
    #[inline(always)]
    pub(crate) const fn is_plain(&self) -> bool {
        self.version_length == 0x45 && self.fragment & 0x3fff_u16.to_be() == 0
    }

    /// The two bytes before the checksum.
    #[inline(always)]
    const fn before(&self) -> u16 {
        u16::from_ne_bytes([self.ttl, self.protocol])
    }
}

/// With what follows it, where it has no options: read at once, for speed.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ip4AndPorts {
    pub(crate) ip: Ip4,
    pub(crate) ports: Fragment,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ip6 {
    pub(crate) version_flow: u32,
    pub(crate) length: u16,
    pub(crate) next: u8,
    pub(crate) hops: u8,
    pub(crate) source: [u32; 4],
    pub(crate) destination: [u32; 4],
}

/// See [`Ip4AndPorts`].
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ip6AndPorts {
    pub(crate) ip: Ip6,
    pub(crate) ports: Fragment,
}

/// Where the parts of the packet with an IP header at `l3` are, its tuple (ports of whatever kind: see
/// [`has_ports`]), and for fragments the identification. `None` when it is not sound.
#[inline(always)]
pub(crate) fn dissect<F: Frame>(
    frame: F,
    l3: u32,
    v4: bool,
    layout: &mut Layout,
    tuple: &mut Tuple,
    part: &mut FragmentKey,
) -> Option<()> {
    layout.l3 = l3;
    layout.v4 = v4;
    if v4 {
        dissect4(frame.read(l3)?, layout, tuple, part)?
    } else {
        dissect6(frame, frame.read(l3)?, layout, tuple, part)?
    }
    part.source = tuple.source;
    part.destination = tuple.destination;
    part.protocol = layout.protocol;
    part.reserved = 0;
    if layout.l4 - l3 != if v4 { 20 } else { 40 } && !layout.later {
        set_ports(tuple, frame.read(layout.l4)?);
    }
    Some(())
}

#[inline(always)]
fn set_ports(tuple: &mut Tuple, ports: Fragment) {
    let both = u32::from(ports.source_port) | u32::from(ports.destination_port) << 16;
    // SAFETY: the two ports are the last word of the tuple. They are written as what they are read as when the tuple is
    // hashed: the processor waits where it reads what was written in parts.
    unsafe { (&raw mut tuple.source_port).cast::<u32>().write_volatile(both) };
}

#[inline(always)]
fn dissect4(
    header: Ip4AndPorts,
    layout: &mut Layout,
    tuple: &mut Tuple,
    part: &mut FragmentKey,
) -> Option<()> {
    let Ip4AndPorts { ip, ports } = header;
    let header = u32::from(ip.version_length & 0xf) * 4;
    if ip.version_length >> 4 != 4 || header < 20 {
        return None;
    }
    let fragment = u16::from_be(ip.fragment);
    layout.l4 = layout.l3 + header;
    layout.length = u32::from(u16::from_be(ip.total)).wrapping_sub(header);
    layout.protocol = ip.protocol;
    layout.part = fragment & 0x3fff != 0;
    layout.later = fragment & 0x1fff != 0;
    part.id = u32::from(ip.id);
    tuple.source = Address::v4(ip.source);
    tuple.destination = Address::v4(ip.destination);
    set_ports(tuple, ports);
    layout.checksum = ip.checksum;
    layout.before = ip.before();
    Some(())
}

#[inline(always)]
fn dissect6<F: Frame>(
    frame: F,
    header: Ip6AndPorts,
    layout: &mut Layout,
    tuple: &mut Tuple,
    part: &mut FragmentKey,
) -> Option<()> {
    let Ip6AndPorts { ip, ports } = header;
    if !ip.is_sound() {
        return None;
    }
    tuple.source = Address(ip.source);
    tuple.destination = Address(ip.destination);
    set_ports(tuple, ports);
    let (mut next, mut l4) = (ip.next, layout.l3 + 40);
    layout.part = false;
    layout.later = false;
    // Hop-by-hop, routing, fragment, authentication, destination options: five at most.
    for _ in 0..5 {
        if layout.later || !matches!(next, 0 | 43 | 44 | 51 | 60) {
            break;
        }
        let extension: [u8; 8] = frame.read(l4)?;
        if next == 44 {
            let [_, _, a, b, c, d, e, f] = extension;
            layout.part = true;
            layout.later = u16::from_be_bytes([a, b]) & 0xfff8 != 0;
            part.id = u32::from_ne_bytes([c, d, e, f]);
            l4 += 8;
        } else if next == 51 {
            l4 += (u32::from(extension[1]) + 2) * 4;
        } else {
            l4 += (u32::from(extension[1]) + 1) * 8;
        }
        next = extension[0];
    }
    layout.protocol = next;
    layout.l4 = l4;
    layout.length = (u32::from(u16::from_be(ip.length)) + 40).wrapping_sub(l4 - layout.l3);
    Some(())
}

/// What a packet is.
pub(crate) const OTHER: u32 = 0;
/// Of a protocol with ports.
pub(crate) const PORTS: u32 = 1;
/// An ICMP error.
pub(crate) const ERROR: u32 = 2;

/// Sets protocol and hook of a key, whose hook is known already, as one word: see [`set_ports`].
#[inline(always)]
fn set_kind(key: &mut FlowKey, protocol: u8) {
    let word = u32::from(protocol) | u32::from(key.hook) << 8;
    // SAFETY: protocol, hook and what is reserved are the last word of the key.
    unsafe { (&raw mut key.protocol).cast::<u32>().write_volatile(word) };
}

/// Learns what a packet is whose ports lie right behind its IP header, as those of most packets do, and whether it is one
/// of these.
#[inline(always)]
pub(crate) fn plain<F: Frame>(frame: F, work: &mut Work, l3: u32, v4: bool) -> Option<()> {
    let (layout, tuple, part) = (&mut work.layout, &mut work.key.tuple, &mut work.fragment);
    layout.l3 = l3;
    layout.v4 = v4;
    let (header, protocol);
    if v4 {
        let plain: Ip4AndPorts = frame.peek(l3, 0)?;
        if !plain.ip.is_plain() || !has_ports(plain.ip.protocol) {
            return None;
        }
        (header, protocol) = (20, plain.ip.protocol);
        dissect4(plain, layout, tuple, part)?;
    } else {
        let plain: Ip6AndPorts = frame.peek(l3, 0)?;
        if !has_ports(plain.ip.next) {
            return None;
        }
        (header, protocol) = (40, plain.ip.next);
        dissect6(frame, plain, layout, tuple, part)?;
    }
    set_kind(&mut work.key, protocol);
    match kind_at(protocol) {
        // Two bytes: the verifier does not follow a comparison for one.
        Some(at) => note(work, protocol, frame.peek(l3, header + at)?),
        None => (work.begins, work.ends) = (1, 0),
    }
    Some(())
}

/// Learns what any packet is. A first fragment leaves a note of its ports for the later ones; without it
/// those are [`OTHER`], and go on as they are.
#[inline(never)]
pub(crate) fn parse<F: Frame>(frame: F, work: &mut Work, v4: bool) -> u32 {
    let (layout, tuple) = (&mut work.layout, &mut work.key.tuple);
    work.fragment.hook = work.key.hook;
    if dissect(frame, work.l2, v4, layout, tuple, &mut work.fragment).is_none() {
        return OTHER;
    }
    set_kind(&mut work.key, work.layout.protocol);
    let (layout, tuple) = (&work.layout, &mut work.key.tuple);
    if !has_ports(layout.protocol) {
        return if tells_error(frame, layout) { ERROR } else { OTHER };
    }
    (work.begins, work.ends) = (0, 0);
    if layout.later {
        // SAFETY: copied at once.
        let Some(ports) = unsafe { FRAGMENTS.get(&work.fragment) }.copied() else { return OTHER };
        set_ports(tuple, ports);
        return PORTS;
    }
    if layout.part {
        let ports = Fragment { source_port: tuple.source_port, destination_port: tuple.destination_port };
        let _ = FRAGMENTS.insert(&work.fragment, ports, 0);
    }
    let Some(at) = kind_at(layout.protocol) else {
        work.begins = 1;
        return PORTS;
    };
    let Some(kind) = frame.read(layout.l4 + at) else { return OTHER };
    note(work, layout.protocol, kind);
    PORTS
}

/// Notes what a packet does to its flow.
#[inline(always)]
fn note(work: &mut Work, protocol: u8, [kind, _]: [u8; 2]) {
    work.begins = u32::from(begins(protocol, kind));
    work.ends = u32::from(if protocol == TCP {
        kind & (FIN | RST) != 0
    } else {
        kind == SCTP_ABORT || kind == SCTP_SHUTDOWN_COMPLETE
    });
}

/// Where in its header a protocol says what a packet does to its flow: flags of TCP, the type of SCTP's first chunk.
#[inline(always)]
pub(crate) const fn kind_at(protocol: u8) -> Option<u32> {
    match protocol {
        TCP => Some(13),
        SCTP => Some(12),
        _ => None,
    }
}

/// Whether a packet that says so begins a flow.
#[inline(always)]
pub(crate) const fn begins(protocol: u8, kind: u8) -> bool {
    if protocol == TCP { kind & (SYN | ACK | RST | FIN) == SYN } else { kind == SCTP_INIT }
}

/// Whether Services have ports of this protocol.
#[inline(always)]
pub(crate) const fn has_ports(protocol: u8) -> bool {
    protocol == TCP || protocol == UDP || protocol == SCTP
}

/// Whether the packet is an error about another one.
#[inline(always)]
fn tells_error<F: Frame>(frame: F, layout: &Layout) -> bool {
    !layout.later
        && layout.protocol == if layout.v4 { ICMP } else { ICMP6 }
        && frame.read(layout.l4).is_some_and(|kind| is_error(layout.v4, kind))
}

/// Whether an ICMP message of this type is an error about another packet.
#[inline(always)]
pub(crate) const fn is_error(v4: bool, kind: u8) -> bool {
    if v4 { kind == 3 || kind == 11 || kind == 12 } else { kind >= 1 && kind <= 4 }
}
