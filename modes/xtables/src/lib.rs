//! The tools of iptables: which of the two flavours a node uses, and how they are run.
//!
//! ```text
//!   Programs::of_node ──> save ──text──> lines ──> words
//!         │ └───────────> restore <──text── who uses this
//!         └─────────────> list
//! ```
//!
//! What the rules mean is not known here. Everything happens in the [`Namespace`] that it is told.

#![forbid(unsafe_code)]

mod held;
mod namespace;
mod nf_tables;
mod programs;
mod save;
mod tables;

pub use held::{Held, HeldReader, Stays};
pub use namespace::{Input, Namespace};
pub use programs::{Flavour, Programs, choose};
pub use save::{Line, line, target, words};
pub use tables::{Builtin, MARK_MASQ, Table, is_hook};
