//! Which addresses have flows in the connection table: most packets that a node forwards belong to no flow
//! of tc, and to find that out in a table of 262,144 entries takes longer than all else that is done with
//! them.
//!
//! It is a Bloom filter of one hash over the addresses of clients, and of the node where it masquerades, in
//! which each entry says how long it holds. An entry of `flows` has one of these at one of its ends. Where
//! two addresses share an entry, packets of the one are looked up for the sake of the other.

use crate::Address;

/// Number of entries, a power of two.
const SIZE: usize = 1 << BITS;
const BITS: u32 = 15;

/// Nanoseconds of the clock in one step of an entry, as a power of two: four and a half minutes.
const STEP: u32 = 38;

/// Most steps that an entry may lie in the future: half of what it can say. Flows that are idle for longer,
/// three months, are forgotten.
const MOST: u64 = 0x7f00;

/// The only element of `flow_filter`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowFilter {
    /// By [`FlowFilter::entry`] the [`FlowFilter::until`] up to which there may be flows; 0 for never.
    pub until: [u16; SIZE],
}

impl FlowFilter {
    /// With the same in all entries.
    #[expect(clippy::large_stack_arrays, reason = "64 KiB, for a moment, in processes only")]
    pub const fn filled(until: u16) -> Self {
        Self { until: [until; SIZE] }
    }

    /// The entry of an address.
    #[inline(always)]
    pub const fn entry(address: &Address) -> usize {
        let [a, b, c, d] = address.0;
        let high = ((a as u64) << 32 | b as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let low = ((c as u64) << 32 | d as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
        ((high ^ low) >> (u64::BITS - BITS)) as usize
    }

    /// What is written for a flow that was seen at `now` (`CLOCK_MONOTONIC`) and is remembered for `timeout`
    /// seconds.
    #[inline(always)]
    pub const fn until(now: u64, timeout: u32) -> u16 {
        let steps = (timeout as u64 * 1_000_000_000) >> STEP;
        let steps = if steps > MOST { MOST } else { steps };
        let until = ((now >> STEP) + steps + 1) as u16;
        // 0 means never.
        if until == 0 { 1 } else { until }
    }

    /// Whether there may be flows of an address whose entry says `until`.
    #[inline(always)]
    pub const fn holds(until: u16, now: u64) -> bool {
        // Half a turn of the 16 bits is the future; what is older than that looks like it, which costs a look.
        until != 0 && until.wrapping_sub((now >> STEP) as u16) < 0x8000
    }
}

const _: () = assert!(size_of::<FlowFilter>() == 65_536);

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::collections::BTreeSet;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn an_entry_holds_as_long_as_the_flow_is_remembered_and_not_much_longer() {
        for timeout in [0, 1, 120, 86_400, 30 * 86_400] {
            // From boot on, and where the 16 bits turn over: every 208 days.
            for now in [0, SECOND, 0xffff << STEP, (0x1_0000 << STEP) - 1, (0x1_ffff << STEP) + 7] {
                let (until, end) = (FlowFilter::until(now, timeout), now + u64::from(timeout) * SECOND);
                assert!(until != 0);
                for at in [now, now.midpoint(end), end] {
                    assert!(FlowFilter::holds(until, at), "{timeout} s from {now}, at {at}");
                }
                assert!(!FlowFilter::holds(until, end + (3 << STEP)), "{timeout} s from {now}");
            }
        }
        assert!(!FlowFilter::holds(0, 0) && !FlowFilter::holds(0, u64::MAX));
        assert!(FlowFilter::holds(FlowFilter::until(0, u32::MAX), 90 * 86_400 * SECOND), "three months");
    }

    #[test]
    fn addresses_of_a_network_have_entries_of_their_own() {
        let of = |address: IpAddr| FlowFilter::entry(&address.into());
        let v4 = (0..4096_u32).map(|n| of(Ipv4Addr::from(0x0a01_0000 + n).into()));
        let v6 = (0..4096_u128).map(|n| of(Ipv6Addr::from(0xfd00_u128 << 112 | n).into()));
        for entries in [v4.collect::<BTreeSet<_>>(), v6.collect()] {
            // By chance it would be 3,855.
            assert!(entries.len() > 3_600, "4,096 addresses have {} entries", entries.len());
            assert!(entries.iter().all(|entry| *entry < SIZE));
        }
    }
}
