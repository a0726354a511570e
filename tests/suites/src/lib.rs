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

pub mod driver;
pub mod faulty;
pub mod golden;
pub mod mode;
pub mod objects;
pub mod random;
pub mod town;

/// Makes tests for every mode: each test is a function with the mode as its type parameter. A new mode
/// is one more line here.
#[macro_export]
macro_rules! every_mode {
    ($($test:ident),* $(,)?) => {
        $crate::for_mode!(nftables, $crate::mode::NftablesMode; $($test),*);
        $crate::for_mode!(iptables, $crate::mode::IptablesLegacy; $($test),*);
    };
}

/// The same for tests that need a kernel: modes that reach it in several ways appear with each of them.
#[macro_export]
macro_rules! every_kernel {
    ($($test:ident),* $(,)?) => {
        $crate::every_mode!($($test),*);
        $crate::for_mode!(iptables_nft, $crate::mode::IptablesNft; $($test),*);
    };
}

/// The tests of one mode; see [`every_mode`].
#[macro_export]
macro_rules! for_mode {
    ($module:ident, $mode:ty; $($test:ident),*) => {
        mod $module {
            $(#[test] fn $test() { super::$test::<$mode>(); })*
        }
    };
}
