//! The heart of Shunt: what Services mean on this node, decided once, as pure functions over
//! plain data.
//!
//! ```text
//!   Event ──> Store ──> Dirty ──> Compiler ──> ForwardingTable + Change ──> (a mode)
//!                                                   │
//!                                                   ├──> walk(packet): the reference answer
//!                                                   └──> explain(packet): the same, with reasons
//! ```
//!
//! Nothing in here reads a clock, a file, the network, the environment or the kernel, and nothing
//! knows which mode programs the table. Start reading at [`table`], then [`compile`].

#![forbid(unsafe_code)]

pub mod compile;
pub mod endpoint;
pub mod explain;
pub mod health;
pub mod id;
pub mod node;
pub mod service;
pub mod stale;
pub mod store;
pub mod table;
pub mod walk;
