//! Answers a packet with "port unreachable", which a client sees as "connection refused". TCP is answered
//! so too, as by nftables' `reject`.
//!
//! ```text
//!   Ethernet | IP ICMP | IP and some bytes of what was refused
//!              └─────┘ put in
//! ```

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT};
use aya_ebpf::helpers::{bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail};
use shunt_ebpf_abi::FlowKey;

use super::frame::{Frame as _, Skb};
use super::packet::{ICMP, ICMP6, Ip4, Ip6, TCP};
use super::rewrite::checksum;
use super::work::Work;

const HOPS: u8 = 64;
/// Header of the error: type, code, checksum, unused.
const ERROR: u32 = 8;

/// Turns the packet into its rejection and sends it back.
#[inline(never)]
pub(crate) fn reject(skb: Skb, work: &mut Work) -> i32 {
    let made = if work.layout.v4 { unreachable4(skb, work) } else { unreachable6(skb, work) };
    if made.is_none() || work.l2 != 0 && turn_round(skb).is_none() {
        return TC_ACT_SHOT;
    }
    let direction = if work.key.hook == FlowKey::EGRESS { u64::from(BPF_F_INGRESS) } else { 0 };
    // SAFETY: the helper checks the device.
    unsafe { bpf_redirect(work.ifindex, direction) as i32 }
}

/// How much of the transport header is quoted. The kernel keeps room for a checksum that is yet to be
/// filled in, and TCP's lies behind the 8 bytes that must be quoted.
#[inline(always)]
const fn quoted(work: &Work) -> u32 {
    if work.layout.protocol == TCP { 20 } else { 8 }
}

#[inline(always)]
fn unreachable4(skb: Skb, work: &mut Work) -> Option<()> {
    let l3 = work.layout.l3;
    if work.layout.l4 - l3 != 20 {
        return None;
    }
    let kept = 20 + quoted(work);
    load_quote(skb, work, 20)?;
    let header = sum(&work.quote, 0, 20, 0);
    let words = [u32::from_ne_bytes([3, 3, 0, 0]), 0];
    let check = fold(sum(&words, 0, ERROR, sum_of_transport(skb, work, 5, header)?));
    make_room(skb, l3 + kept, 20 + ERROR)?;
    let mut ip = Ip4 {
        version_length: 0x45,
        // Precedence "internet control", as the kernel's own errors.
        service: 0xc0,
        total: (20 + ERROR as u16 + kept as u16).to_be(),
        id: 0,
        fragment: 0x4000_u16.to_be(),
        ttl: HOPS,
        protocol: ICMP,
        checksum: 0,
        source: work.key.tuple.destination.word4(),
        destination: work.key.tuple.source.word4(),
    };
    // SAFETY: the helper reads the header.
    ip.checksum =
        fold(unsafe { bpf_csum_diff(core::ptr::null_mut(), 0, (&raw mut ip).cast(), 20, 0) } as u32);
    skb.write(l3, &ip)?;
    skb.write(l3 + 20, &[words[0] | word_with(check), 0])
}

#[inline(always)]
fn unreachable6(skb: Skb, work: &mut Work) -> Option<()> {
    let l3 = work.layout.l3;
    if work.layout.l4 - l3 != 40 {
        return None;
    }
    let kept = 40 + quoted(work);
    load_quote(skb, work, 40)?;
    let header = sum(&work.quote, 0, 40, 0);
    let length = ERROR + kept;
    let ip = Ip6 {
        version_flow: 0x6000_0000_u32.to_be(),
        length: (length as u16).to_be(),
        next: ICMP6,
        hops: HOPS,
        source: work.key.tuple.destination.0,
        destination: work.key.tuple.source.0,
    };
    let body = sum_of_transport(skb, work, 10, header)?;
    let body = sum(&ip.source, 0, 16, body);
    let body = sum(&ip.destination, 0, 16, body);
    let words = [length.to_be(), u32::from(ICMP6).to_be(), u32::from_ne_bytes([1, 4, 0, 0]), 0];
    let check = fold(sum(&words, 0, 16, body));
    make_room(skb, l3 + kept, 40 + ERROR)?;
    skb.write(l3, &ip)?;
    skb.write(l3 + 40, &[words[2] | word_with(check), 0])
}

/// Loads what is quoted: an IP header of `header` bytes and some of what follows. Each size is a constant
/// of its own, as the verifier asks.
#[inline(always)]
fn load_quote(skb: Skb, work: &mut Work, header: u32) -> Option<()> {
    if work.layout.protocol == TCP {
        skb.load(work.layout.l3, &mut work.quote, header + 20)
    } else {
        skb.load(work.layout.l3, &mut work.quote, header + 8)
    }
}

/// The sum of the quoted transport header.
///
/// A packet from this machine may come without its checksum: the field then holds the sum of the pseudo
/// header, and when the packet leaves, the kernel sums up what follows the IP header and puts the result
/// there, without knowing that this is a quotation by then. That makes the quoted part sum up to the
/// complement of what the field held, whatever it says.
#[inline(always)]
fn sum_of_transport(skb: Skb, work: &Work, header_words: usize, seed: u32) -> Option<u32> {
    let protocol = work.layout.protocol;
    if let Some((offset, _)) = checksum(protocol) {
        let field: u16 = skb.read(work.layout.l4 + offset)?;
        let tuple = &work.key.tuple;
        let rest = [work.layout.length.to_be(), u32::from(protocol).to_be()];
        // The word of ones in a mapped IPv4 address adds nothing to a ones' complement sum.
        let addresses = sum(&tuple.destination.0, 0, 16, sum(&tuple.source.0, 0, 16, 0));
        if field == !fold(sum(&rest, 0, 8, addresses)) {
            return Some(sum(&[u32::from(!field)], 0, 4, seed));
        }
    }
    Some(if protocol == TCP {
        sum(&work.quote, header_words, 20, seed)
    } else {
        sum(&work.quote, header_words, 8, seed)
    })
}

/// Adds `size` bytes of words to a ones' complement sum, from `first` on.
#[inline(always)]
fn sum<const N: usize>(words: &[u32; N], first: usize, size: u32, seed: u32) -> u32 {
    // SAFETY: all callers name what the array has.
    unsafe {
        let words = words.as_ptr().add(first).cast_mut();
        bpf_csum_diff(core::ptr::null_mut(), 0, words, size, seed) as u32
    }
}

/// A checksum from a sum.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    !(((sum & 0xffff) + (sum >> 16)) as u16)
}

/// A checksum in its place in the first word of an error.
#[inline(always)]
const fn word_with(check: u16) -> u32 {
    let [a, b] = check.to_ne_bytes();
    u32::from_ne_bytes([0, 0, a, b])
}

/// Cuts the packet off at `end` and makes room before the IP header.
#[inline(always)]
fn make_room(skb: Skb, end: u32, room: u32) -> Option<()> {
    // SAFETY: the helpers check what they are asked for.
    unsafe {
        if bpf_skb_change_tail(skb.0, end, 0) != 0
            || bpf_skb_adjust_room(skb.0, room as i32, BPF_ADJ_ROOM_MAC, 0) != 0
        {
            return None;
        }
    }
    Some(())
}

/// Sends the Ethernet frame back to whom it came from.
#[inline(always)]
fn turn_round(skb: Skb) -> Option<()> {
    let [a, b, c, d, e, f] = skb.read::<[u16; 6]>(0)?;
    skb.write(0, &[d, e, f, a, b, c])
}
