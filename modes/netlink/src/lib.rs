//! What every netlink family needs below its own messages.
//!
//! ```text
//!   Batch ──messages──> Socket::execute ──> refusals, each with the number of its message
//!   request ──────────> Socket::dump ──────> each answer's payload ──Attributes──> values
//! ```
//!
//! Messages are written into one buffer and attributes are read where they lie. Nothing here knows a
//! family. A socket blocks, but never waits for anybody: the kernel answers before it returns from the
//! system call.

#![forbid(unsafe_code)]

mod batch;
mod error;
mod socket;
mod wire;

pub use batch::{Batch, Messages};
pub use error::{Error, Refusal};
pub use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
pub use netlink_sys::protocols;
pub use socket::Socket;
pub use wire::{Attributes, Writer, be16, be32, be64, native16, native32, native64, text};
