//! What most packets that a node forwards are told by, without a look into the large hash tables: they belong to no flow
//! of tc, and go to no Service.
//!
//! [`FlowFilter`] is a Bloom filter of one hash over the two addresses of each tuple in `flows`, in which each entry says
//! how long it holds. [`AddressFilter`] is one over the addresses in `frontends` and `addresses`. Where others share an
//! entry, they are looked up for nothing.

use crate::Address;

/// Number of entries, as a power of two, and of those in one element of the map. Of a node that sends traffic from
/// outside to many pods each client and pod are a pair, and stay one for as long as an idle connection is remembered.
const BITS: u32 = 20;
const BLOCK_BITS: u32 = 12;

/// Nanoseconds of the clock in one step of an entry, as a power of two: four and a half minutes.
const STEP: u32 = 38;

/// Most steps that an entry may lie in the future: half of what it can say. Flows that are idle for longer,
/// three months, are forgotten.
const MOST: u64 = 0x7f00;

/// An element of `pairs_of_flows`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowFilter {
    /// By [`FlowFilter::place`] the [`FlowFilter::until`] up to which there may be flows; 0 for never.
    pub until: [u16; 1 << BLOCK_BITS],
}

impl FlowFilter {
    /// Number of elements, 2 MiB.
    pub const BLOCKS: u32 = 1 << (BITS - BLOCK_BITS);

    /// With the same in all entries.
    pub const fn filled(until: u16) -> Self {
        Self { until: [until; 1 << BLOCK_BITS] }
    }

    /// The element for two addresses and the entry there, the same for both directions.
    #[inline(always)]
    pub const fn place(a: &Address, b: &Address) -> (u32, usize) {
        let entry = (hash(a) | 1).wrapping_mul(hash(b) | 1) >> (u64::BITS - BITS);
        ((entry >> BLOCK_BITS) as u32, entry as usize & ((1 << BLOCK_BITS) - 1))
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

    /// Whether there may be flows of addresses whose entry says `until`.
    #[inline(always)]
    pub const fn holds(until: u16, now: u64) -> bool {
        // Half a turn of the 16 bits is the future; what is older than that looks like it, which costs a look.
        until != 0 && until.wrapping_sub((now >> STEP) as u16) < 0x8000
    }
}

const _: () = assert!(size_of::<FlowFilter>() == 8_192);

/// Which addresses may have an element in `frontends` or `addresses`: bits of the words of `address_filter`. The agent
/// sets them before it writes such an element, and leaves them when it goes.
#[derive(Clone, Copy, Debug)]
pub struct AddressFilter;

impl AddressFilter {
    /// Bits, as a power of two.
    const BITS: u32 = 20;
    /// Number of words, 128 KiB.
    pub const WORDS: u32 = 1 << (Self::BITS - 6);

    /// The word of an address, and its bit there.
    #[inline(always)]
    pub const fn place(address: &Address) -> (u32, u64) {
        let bit = hash(address) >> (u64::BITS - Self::BITS);
        ((bit >> 6) as u32, 1 << (bit & 63))
    }
}

/// The high bits are good ones.
#[inline(always)]
pub(crate) const fn hash(address: &Address) -> u64 {
    let [a, b, c, d] = address.0;
    let high = ((a as u64) << 32 | b as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let low = ((c as u64) << 32 | d as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    high ^ low
}

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

    const V4: fn(u32) -> Address = |n| IpAddr::V4(Ipv4Addr::from(0x0a01_0000 + n)).into();
    const V6: fn(u32) -> Address = |n| IpAddr::V6(Ipv6Addr::from(0xfd00_u128 << 112 | u128::from(n))).into();

    #[test]
    fn pairs_of_a_network_have_entries_of_their_own() {
        for of in [V4, V6] {
            let pairs = (0..64).flat_map(|a| (64..128).map(move |b| (of(a), of(b))));
            let places: BTreeSet<_> = pairs.clone().map(|(a, b)| FlowFilter::place(&a, &b)).collect();
            // By chance it would be 4,088.
            assert!(places.len() > 4_000, "4,096 pairs have {} entries", places.len());
            assert!(places.iter().all(|(block, _)| *block < FlowFilter::BLOCKS));
            for (a, b) in pairs {
                assert_eq!(FlowFilter::place(&a, &b), FlowFilter::place(&b, &a));
            }
        }
    }

    #[test]
    fn addresses_of_a_network_have_bits_of_their_own() {
        for of in [V4, V6] {
            let places: BTreeSet<(u32, u64)> = (0..65_536).map(|n| AddressFilter::place(&of(n))).collect();
            // By chance it would be 63,530.
            assert!(places.len() > 62_000, "65,536 addresses have {} bits", places.len());
            assert!(places.iter().all(|(word, bit)| *word < AddressFilter::WORDS && bit.is_power_of_two()));
        }
    }
}
