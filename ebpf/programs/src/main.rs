//! The kernel side of the ebpf mode.
//!
//! ```text
//!   process ── connect, sendmsg ──► socket/   the destination becomes an endpoint: nothing per packet
//!   packet  ── ingress, egress ───► tc/       from outside, and from pods that bypass their socket hook
//!                                     │
//!             shunt-ebpf-abi::lookup ◄┴── maps.rs, tables.rs
//! ```
//!
//! One file per hook. What a map holds and means is said in `shunt-ebpf-abi`.
#![no_std]
#![no_main]
// What is moved is copied to the stack, of which there is little.
#![allow(clippy::needless_borrows_for_generic_args)]

mod filter;
mod maps;
mod pick;
mod socket;
mod tables;
mod tc;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// Helpers like bpf_fib_lookup are open to programs with a licence compatible with the GPL only: the programs
// are under the MIT licence too.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
