//! iptables mode: kube-proxy's names, in flat chains that are found through a tree.
//!
//! ```text
//!   packet ─> KUBE-SERVICES ─> tree of address, protocol, port ─> KUBE-SVC-… ─> DNAT, by chance
//!   nat                        a few rules, however many Services     one rule an endpoint
//!
//!   packet ─> KUBE-SERVICES ─> refused if a set says so
//!   filter                     the same rules, however many Services
//! ```
//!
//! Names of chains, marks, hooks and their order are kube-proxy's where other software looks for them.
//! Chains of our own begin with `SHUNT-`, as do our sets. Everything else in the tables is somebody
//! else's and stays as it is.
//!
//! Start reading at [`fixed`], then [`render`], [`tree`], then [`plan`]. [`kernel`] is the only file that
//! touches the kernel; it does so through `iptables-restore`, `iptables-save` and ipset's netlink.

#![forbid(unsafe_code)]

pub mod choice;
pub mod cover;
#[cfg(any(test, feature = "testkit"))]
pub mod fake;
pub mod fixed;
pub mod kernel;
pub mod names;
pub mod op;
pub mod parse;
pub mod plan;
pub mod render;
pub mod rule;
pub mod sets;
pub mod state;
pub mod trace;
pub mod tree;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable, NodeFacts};
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::{Backend, KernelError, Mode, Plan, RuleCount, Transaction, Unsupported};

use crate::kernel::Kernel;
use crate::op::Op;
use crate::render::Desired;
use crate::state::State;

/// iptables mode for one family, over a real kernel or a fake one.
#[derive(Debug)]
pub struct Iptables<K> {
    kernel: K,
}

impl<K: Kernel> Iptables<K> {
    /// The mode over a kernel.
    pub const fn new(kernel: K) -> Self {
        Self { kernel }
    }

    /// The kernel under the mode.
    pub const fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }
}

impl<K: Kernel + Send> Backend for Iptables<K> {
    const MODE: Mode = Mode::Iptables;
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

    /// Rules carry their comments into the kernel.
    fn annotate(_observed: &mut State, _rendered: &State) {}

    fn json(state: &State) -> serde_json::Value {
        state.json()
    }

    fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
        trace::trace(state, local, packet)
    }

    const COUNTS_RULES: bool = true;

    fn rules(state: &State, written: &[Transaction<Op>]) -> Vec<RuleCount> {
        op::count(state, written)
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.kernel.probe()
    }

    /// Packets to loopback are routed: that of another host's is kept out by the kubelet until our rules do it.
    fn prepare(&mut self, node: &NodeFacts) -> Result<(), KernelError> {
        if node.localhost_node_ports { self.kernel.route_loopback() } else { Ok(()) }
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.kernel.observe()
    }

    fn apply(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.kernel.commit(transaction)
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.kernel.remove()
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        self.kernel.intact()
    }

    fn waited(&mut self) -> Duration {
        self.kernel.waited()
    }
}
