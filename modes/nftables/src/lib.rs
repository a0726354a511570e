//! nftables mode: a few flat maps and a handful of chains, whatever the number of Services.
//!
//! ```text
//!            services            classes              endpoints
//!   packet ──────────> class ──────────────> chain ──────────────> dnat
//!            one lookup          one lookup           one lookup, slot by numgen
//! ```
//!
//! A change of endpoints is a few elements of maps. No set belongs to a single Service or endpoint, no
//! chain but those of Service ports with session affinity ([`affinity`]), and nothing is anonymous. Only the tables `ip shunt` and `ip6 shunt` are touched.
//! Everything happens in three hooks of type nat, which see the first packet of each connection.
//!
//! Start reading at [`layout`], then [`rules`], then [`plan`]. [`kernel`] is the only file that
//! touches the kernel.

#![forbid(unsafe_code)]

pub mod affinity;
#[cfg(any(test, feature = "testkit"))]
pub mod fake;
pub mod kernel;
pub mod layout;
pub mod op;
pub mod plan;
pub mod ranges;
pub mod render;
pub mod rules;
pub mod state;
pub mod trace;

use std::collections::BTreeSet;
use std::net::IpAddr;

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::{Backend, KernelError, Mode, Plan, Transaction, Unsupported, Usage};

use crate::kernel::Kernel;
use crate::op::Op;
use crate::render::Desired;
use crate::state::State;

/// nftables mode for one family, over a real kernel or a fake one.
#[derive(Debug)]
pub struct Nftables<K> {
    kernel: K,
}

impl<K: Kernel> Nftables<K> {
    /// The mode over a kernel.
    pub const fn new(kernel: K) -> Self {
        Self { kernel }
    }

    /// The kernel under the mode.
    pub const fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }
}

impl<K: Kernel + Send> Backend for Nftables<K> {
    const MODE: Mode = Mode::Nftables;
    type State = State;
    type Desired = Desired;
    type Op = Op;

    fn empty(family: IpFamily) -> State {
        State::empty(family)
    }

    fn render(table: &ForwardingTable, change: &Change) -> Desired {
        render::render(table, change)
    }

    fn plan(observed: &State, desired: &Desired) -> Plan<Op> {
        plan::plan(observed, desired)
    }

    fn advance(state: &mut State, transaction: &Transaction<Op>) {
        op::advance(state, transaction);
    }

    fn restrict(state: &mut State, only: &Change) {
        state.restrict(only);
    }

    fn annotate(observed: &mut State, rendered: &State) {
        observed.annotate(rendered);
    }

    fn json(state: &State) -> serde_json::Value {
        state.json()
    }

    fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
        trace::trace(state, local, packet)
    }

    fn usage(state: &State) -> Vec<Usage> {
        state.usage()
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.kernel.probe()
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.kernel.observe()
    }

    fn apply(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.kernel.commit(transaction)
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.kernel.delete_table()
    }
}

pub(crate) const fn family(family: IpFamily) -> nft_netlink::Family {
    match family {
        IpFamily::V4 => nft_netlink::Family::Ip,
        IpFamily::V6 => nft_netlink::Family::Ip6,
    }
}
