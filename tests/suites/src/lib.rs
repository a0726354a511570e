//! What every mode must pass: the trait through which the suites see a mode, random clusters, and a
//! driver that keeps a kernel up to date as the agent does.
//!
//! ```text
//!   cases, random clusters ──> Store ──> Compiler ──> table ──> core walker ─┐
//!                                                       │                    = same answer
//!                                                       └─> mode ──> State ──> mode's walker
//!                                                             └────> fake kernel, real kernel + packets
//! ```
//!
//! Nothing here knows what a Service means: the cases and the core walker do. Start reading at
//! [`mode::ModeUnderTest`], then the files in `tests/`.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used, clippy::panic)]

use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::require_kernel;

pub mod driver;
pub mod faulty;
pub mod golden;
pub mod mode;
pub mod objects;
pub mod random;
pub mod town;
pub mod web;

/// Makes tests for every mode: each test is a function with the mode as its type parameter. Those after
/// `in kernel:` use the real kernel; of a mode that the machine's own kernel may lack
/// ([`mode::ModeUnderTest::NEEDS_GUEST`]) they run in a guest. A new mode is one more line here.
///
/// ```ignore
/// every_mode!(plans_are_short; in kernel: packets_arrive, rules_are_listed);
/// ```
#[macro_export]
macro_rules! every_mode {
    (in kernel: $($real:ident),* $(,)?) => { $crate::every_mode!(; in kernel: $($real),*); };
    ($($test:ident),* $(,)? $(; in kernel: $($real:ident),* $(,)?)?) => {
        $crate::for_mode!(ipvs, $crate::mode::IpvsMode; $($test),*; $($($real),*)?);
        $crate::for_mode!(nftables, $crate::mode::NftablesMode; $($test),*; $($($real),*)?);
        $crate::for_mode!(iptables, $crate::mode::IptablesLegacy; $($test),*; $($($real),*)?);
        $crate::for_mode!(iptables_nft, $crate::mode::IptablesNft; ; $($($real),*)?);
        $crate::for_mode!(ebpf, $crate::mode::EbpfMode; $($test),*; $($($real),*)?);
    };
}

/// The tests of one mode; see [`every_mode`].
#[macro_export]
macro_rules! for_mode {
    ($module:ident, $mode:ty; $($test:ident),*; $($real:ident),*) => {
        mod $module {
            $(#[test] fn $test() { super::$test::<$mode>(); })*
            $(#[test] fn $real() {
                $crate::run_in_kernel::<$mode>(module_path!(), stringify!($real), super::$real::<$mode>);
            })*
        }
    };
}

/// Runs a test where its mode's kernel is; see [`every_mode`].
pub fn run_in_kernel<M: mode::ModeUnderTest>(path: &str, name: &str, test: fn()) {
    if M::NEEDS_GUEST {
        test_in_guest(path, name, test);
    } else if require_kernel() {
        test();
    }
}
