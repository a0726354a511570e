//! ICMP errors speak of a packet that was translated: they go to whom that packet came from, about what
//! they sent.

use shunt_ebpf_abi::{Event, FlowKey, Tuple};

use super::frame::Frame;
use super::packet::{dissect, has_ports};
use super::rewrite::{checksum, difference, ports, replace};
use super::work::{Layout, Work, copy};
use crate::maps::FLOWS;
use crate::tables::event;

/// Translates an error if it speaks of a packet of a flow; 1 when that failed half-way.
#[inline(never)]
pub(crate) fn translate<F: Frame>(frame: F, work: &mut Work) -> u32 {
    if find(frame, work).is_none() {
        return 0;
    }
    if quote(frame, &work.layout, &work.inner, &work.sent, &work.to.reversed()).is_none()
        || address(frame, work).is_none()
    {
        event(Event::Malformed);
        return 1;
    }
    event(Event::IcmpTranslated);
    0
}

/// Finds the flow. The error goes the way of answers to what it quotes.
#[inline(always)]
fn find<F: Frame>(frame: F, work: &mut Work) -> Option<()> {
    let (l3, v4) = (work.layout.l4 + 8, work.layout.v4);
    dissect(frame, l3, v4, &mut work.inner, &mut work.sent, &mut work.inner_part)?;
    if work.inner.later || !has_ports(work.inner.protocol) {
        return None;
    }
    work.inner_key = FlowKey {
        tuple: work.sent.reversed(),
        protocol: work.inner.protocol,
        hook: work.key.hook,
        reserved: 0,
    };
    // SAFETY: copied at once.
    copy(&mut work.to, unsafe { &FLOWS.get(&work.inner_key)?.tuple });
    Some(())
}

/// Rewrites the error's own addresses.
#[inline(always)]
fn address<F: Frame>(frame: F, work: &Work) -> Option<()> {
    let (outer, own, answer, to) = (&work.layout, &work.key.tuple, &work.inner_key.tuple, &work.to);
    // Only ICMPv6 counts them in its checksum.
    let sum = if outer.v4 { None } else { Some((outer.l4 + 2, 0)) };
    let (source_at, destination_at) = if outer.v4 { (12, 16) } else { (8, 24) };
    if own.destination.same(&answer.destination) && !own.destination.same(&to.destination) {
        replace(frame, outer, destination_at, sum, &own.destination, &to.destination)?;
    }
    // As netfilter does: whoever reports it, the client knows only the frontend.
    if !answer.source.same(&to.source) {
        replace(frame, outer, source_at, sum, &own.source, &to.source)?;
    }
    Some(())
}

/// Rewrites the quoted packet, and mends the error's own checksum, which covers it.
#[inline(always)]
fn quote<F: Frame>(frame: F, outer: &Layout, inner: &Layout, from: &Tuple, to: &Tuple) -> Option<()> {
    let sum = outer.l4 + 2;
    if let Some((offset, flags)) = checksum(inner.protocol)
        && let Some(old) = frame.read::<u16>(inner.l4 + offset)
        && !(old == 0 && flags != 0)
    {
        // Errors may quote less than that.
        frame.mend_word(inner.l4 + offset, ports(from), ports(to), flags)?;
        if inner.v4 {
            frame.mend_word(inner.l4 + offset, from.source.word4(), to.source.word4(), flags)?;
            frame.mend_word(inner.l4 + offset, from.destination.word4(), to.destination.word4(), flags)?;
        } else {
            frame.mend(inner.l4 + offset, difference(&from.source, &to.source), flags)?;
            frame.mend(inner.l4 + offset, difference(&from.destination, &to.destination), flags)?;
        }
        let new: u16 = frame.read(inner.l4 + offset)?;
        frame.mend_word(sum, old.into(), new.into(), 0)?;
    }
    frame.mend_word(sum, ports(from), ports(to), 0)?;
    frame.write(inner.l4, &ports(to))?;
    if inner.v4 {
        // The quoted header's own checksum changes by as much as its addresses, the other way round.
        replace(frame, inner, 12, None, &from.source, &to.source)?;
        replace(frame, inner, 16, None, &from.destination, &to.destination)
    } else {
        frame.mend(sum, difference(&from.source, &to.source), 0)?;
        frame.mend(sum, difference(&from.destination, &to.destination), 0)?;
        frame.write(inner.l3 + 8, &to.source.0)?;
        frame.write(inner.l3 + 24, &to.destination.0)
    }
}
