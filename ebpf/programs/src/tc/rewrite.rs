//! Gives a packet another tuple, and mends every checksum that covers it.

use aya_ebpf::bindings::BPF_F_MARK_MANGLED_0;
use aya_ebpf::helpers::bpf_csum_diff;
use shunt_ebpf_abi::{Address, Event, Tuple};

use super::crc::changed_word;
use super::frame::{Frame, PSEUDO};
use super::packet::{SCTP, TCP, UDP};
use super::work::{Layout, Work};
use crate::tables::event;

/// The difference between two IPv6 addresses for checksums.
#[inline(always)]
pub(crate) fn difference(from: &Address, to: &Address) -> u32 {
    // SAFETY: the helper reads both.
    unsafe { bpf_csum_diff(from.0.as_ptr().cast_mut(), 16, to.0.as_ptr().cast_mut(), 16, 0) as u32 }
}

/// Two ports as one word of the packet.
#[inline(always)]
pub(crate) const fn ports(tuple: &Tuple) -> u32 {
    let (s, d) = (tuple.source_port.to_ne_bytes(), tuple.destination_port.to_ne_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}

/// Offset of a transport header's checksum, and the flags with which it is mended.
#[inline(always)]
pub(crate) const fn checksum(protocol: u8) -> Option<(u32, u64)> {
    match protocol {
        TCP => Some((16, 0)),
        // 0 means none, and stays so.
        UDP => Some((6, BPF_F_MARK_MANGLED_0 as u64)),
        _ => None,
    }
}

/// Turns the packet into what it is to become; 0 when that went well.
#[inline(never)]
pub(crate) fn rewrite<F: Frame>(frame: F, work: &Work) -> u32 {
    match turn(frame, &work.layout, &work.key.tuple, &work.to) {
        Some(()) => 0,
        None => {
            event(Event::Malformed);
            1
        }
    }
}

#[inline(always)]
fn turn<F: Frame>(frame: F, layout: &Layout, from: &Tuple, to: &Tuple) -> Option<()> {
    let sum = if layout.later { None } else { checksum(layout.protocol) };
    if !layout.later && ports(from) != ports(to) {
        if let Some((offset, flags)) = sum {
            frame.mend_word(layout.l4 + offset, ports(from), ports(to), flags)?;
        } else if layout.protocol == SCTP {
            let old: u32 = frame.read(layout.l4 + 8)?;
            let change = changed_word(ports(from) ^ ports(to), layout.length.wrapping_sub(4));
            frame.write(layout.l4 + 8, &(old ^ change.to_le()))?;
        }
    }
    let sum = sum.map(|(offset, flags)| (layout.l4 + offset, flags));
    if layout.v4 {
        return headers4(frame, layout, sum, from, to);
    }
    if !layout.later && ports(from) != ports(to) {
        frame.write(layout.l4, &ports(to))?;
    }
    if !from.source.same(&to.source) {
        replace(frame, layout, 8, sum, &from.source, &to.source)?;
    }
    if !from.destination.same(&to.destination) {
        replace(frame, layout, 24, sum, &from.destination, &to.destination)?;
    }
    Some(())
}

/// Checksum and addresses of the IPv4 header, and the ports behind it, in one write of whole words.
#[inline(always)]
fn headers4<F: Frame>(
    frame: F,
    layout: &Layout,
    sum: Option<(u32, u64)>,
    from: &Tuple,
    to: &Tuple,
) -> Option<()> {
    let mut check = u32::from(!layout.checksum);
    for (old, new) in [(&from.source, &to.source), (&from.destination, &to.destination)] {
        let (old, new) = (old.word4(), new.word4());
        if old != new {
            if let Some((at, flags)) = sum {
                frame.mend_word(at, old, new, flags | PSEUDO)?;
            }
            // RFC 1624, with the sum folded at the end.
            check += (!old & 0xffff) + (!old >> 16) + (new & 0xffff) + (new >> 16);
        }
    }
    check = (check & 0xffff) + (check >> 16);
    let check = !(((check & 0xffff) + (check >> 16)) as u16);
    let pair = |first: u32, second: u32| u64::from(first) | u64::from(second) << 32;
    let before = u32::from(layout.before) | u32::from(check) << 16;
    let first = pair(before, to.source.word4());
    if layout.l4 - layout.l3 == 20 && !layout.later {
        return frame.write(layout.l3 + 8, &[first, pair(to.destination.word4(), ports(to))]);
    }
    frame.write(layout.l3 + 8, &first)?;
    frame.write(layout.l3 + 16, &to.destination.word4())?;
    if layout.later { Some(()) } else { frame.write(layout.l4, &ports(to)) }
}

/// Replaces one address of the IP header.
#[inline(always)]
pub(crate) fn replace<F: Frame>(
    frame: F,
    layout: &Layout,
    offset: u32,
    sum: Option<(u32, u64)>,
    from: &Address,
    to: &Address,
) -> Option<()> {
    if layout.v4 {
        if let Some((at, flags)) = sum {
            frame.mend_word(at, from.word4(), to.word4(), flags | PSEUDO)?;
        }
        frame.mend_header(layout.l3 + 10, from.word4(), to.word4())?;
        frame.write(layout.l3 + offset, &to.word4())
    } else {
        if let Some((at, flags)) = sum {
            frame.mend(at, difference(from, to), flags | PSEUDO)?;
        }
        frame.write_address6(layout.l3 + offset, &to.0)
    }
}
