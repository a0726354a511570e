//! Typed `nf_tables` objects, spoken to the kernel over netlink: no `nft` binary, no text, no JSON.
//!
//! ```text
//!   Chain Set Element Rule[Expr]        plain values
//!            │ Batch::add_…             encoded at once, straight into one byte buffer
//!            ▼
//!          Batch ──Socket::commit──▶ kernel     all of it or nothing; an error names the operation
//!
//!   Vec<Chain> Vec<Set> Vec<Rule>  ◀──Socket::dump_…── kernel
//!   FnMut(Element)                 ◀──Socket::dump_elements── (streamed: memory does not grow with the set)
//! ```
//!
//! What goes in comes out: an object that was committed decodes to an equal value when dumped, because the decoder
//! takes back what the kernel adds (see [`Expr`]). What the decoder does not understand becomes [`Expr::Unknown`];
//! a foreign rule is never an error.
//!
//! The crate knows nothing of what the tables are for, keeps no state, starts no thread, and never touches a table
//! it is not told to. Everything blocks; [`Socket`] is `Send`.
//!
//! ```no_run
//! use nft_netlink::{Batch, Chain, ChainType, CmpOp, Expr, Family, Hook, MetaKey, Register, Rule, Socket, TableId, Verdict};
//!
//! let table = TableId::new(Family::Ip, "example");
//! let mut batch = Batch::new();
//! batch.add_table(table, None);
//! batch.add_chain(table, &Chain::base("input", ChainType::Filter, Hook::Input, 0));
//! batch.add_rule(
//!     table,
//!     &Rule::new(
//!         "input",
//!         vec![
//!             Expr::Meta { key: MetaKey::L4Proto, dreg: Register::R0 },
//!             Expr::Cmp { op: CmpOp::Eq, sreg: Register::R0, data: [17].into() },
//!             Expr::ImmediateVerdict(Verdict::Drop),
//!         ],
//!     ),
//! );
//! let mut socket = Socket::new()?;
//! socket.commit(&batch)?;
//! println!("{:?}", socket.dump_rules(table, None)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is ours and what is not
//!
//! The socket, the writer and the reader of attributes are those of `netlink-requests`. Headers, message numbers and flags
//! are those of `netlink-packet-core` (`NetlinkBuffer`, `NLM_F_*`) and `netlink-packet-netfilter`
//! (`NetfilterHeader`, `NfTablesMessageType`, `ControlMessage`). Their attribute trees are not used: they hold
//! every attribute in a `Vec` of its own, which is too dear for sets of 100,000 elements in both directions, and
//! they lack most expressions (`numgen`, `nat`, `fib`, `reject`, `dynset`, …), concatenated sets and timeouts. So
//! [`Batch`] appends attributes to one buffer, and dumps are read in place.
//!
//! Start reading at [`Batch`], then [`Expr`], then [`Socket`].

mod batch;
mod bytes;
mod describe;
mod error;
mod expr;
mod expr_wire;
mod object;
mod set;
mod socket;
mod vocabulary;
mod wire;

pub use batch::Batch;
pub use bytes::Bytes;
pub use error::{CommitError, Error, Refusal};
pub use expr::Expr;
pub use object::{BaseChain, Chain, ChainType, Family, Hook, Rule, Table, TableId, Verdict};
pub use set::{Element, ElementData, FieldType, MapData, Set, SetFlags};
pub use socket::Socket;
pub use vocabulary::{
    ByteorderOp, CmpOp, CounterValue, CtDirection, CtKey, DynsetOp, FibFlags, FibResult, MetaKey, NatFlags,
    NatKind, PayloadBase, Register, RejectKind,
};
