//! API objects, one JSON text a line, through conversion, compiler, render and plan.
//!
//! `cargo +nightly fuzz run --fuzz-dir tests/fuzz objects -- -max_total_time=600`

#![no_main]

use libfuzzer_sys::fuzz_target;
use shunt_suites::mode::NftablesMode;
use shunt_suites::objects::take_in;

fuzz_target!(|data: &[u8]| take_in::<NftablesMode>(data));
