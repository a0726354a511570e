//! Arbitrary answers of the kernel through everything that reads them in ipvs mode.
//!
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz netlink -- -max_total_time=300`

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    ipvs_netlink::raw::decode(data);
    ipset_netlink::raw::decode(data);
});
