//! ipvs mode: a virtual server of the kernel's load balancer for each address and port, and a constant
//! number of rules beside them.
//!
//! ```text
//!            mangle            nat              filter          IPVS              nat
//!   packet ──guards, marks──> masquerade? ──> closed ports? ──> endpoint ──> masqueraded ──> pod
//!            sets              sets             sets            virtual server
//! ```
//!
//! The VIPs are addresses of the dummy link `kube-ipvs0`, which is what makes the kernel take packets to
//! them in. Sets, chains and link have kube-proxy's names, and are adopted from it. Which Service has
//! which address is in sets only: the rules are the same for no Service and for ten thousand.
//!
//! Start reading at [`layout`], then [`skeleton`], then [`plan`]. [`kernel`] is the only part that touches
//! the kernel.

#![forbid(unsafe_code)]

pub mod drain;
#[cfg(any(test, feature = "testkit"))]
pub mod fake;
pub mod kernel;
pub mod layout;
pub mod op;
pub mod parse;
pub mod plan;
pub mod render;
pub mod rules;
pub mod scheduler;
pub mod skeleton;
pub mod state;
pub mod trace;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable, NodeFacts};
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::{Backend, KernelError, Mode, Plan, Remains, Transaction, Unsupported};

use crate::drain::Drains;
use crate::kernel::{Carried, Kernel};
use crate::op::Op;
use crate::render::Desired;
use crate::state::State;

/// ipvs mode for one family, over a real kernel or a fake one.
#[derive(Debug)]
pub struct Ipvs<K> {
    kernel: K,
    drains: Drains,
}

impl<K: Kernel> Ipvs<K> {
    /// The mode over a kernel.
    pub fn new(kernel: K) -> Self {
        Self { kernel, drains: Drains::default() }
    }

    /// The kernel under the mode.
    pub const fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }
}

impl<K: Kernel + Send> Backend for Ipvs<K> {
    const MODE: Mode = Mode::Ipvs;
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

    fn annotate(_observed: &mut State, _rendered: &State) {}

    fn json(state: &State) -> serde_json::Value {
        state.json()
    }

    fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
        trace::trace(state, local, packet)
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.kernel.probe()
    }

    fn prepare(&mut self, _node: &NodeFacts) -> Result<(), KernelError> {
        self.kernel.tune()?;
        self.kernel.load_tables()
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.kernel.observe()
    }

    fn apply(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.kernel.carry_out(transaction)
    }

    fn ripen(&mut self, state: &State, now: Instant) -> Result<(Plan<Op>, Option<Instant>), KernelError> {
        let drained = drain::drained(state);
        let keys: BTreeSet<_> = drained.iter().map(|(key, _)| *key).collect();
        let keys: Vec<_> = keys.into_iter().collect();
        let connections = self.kernel.connections(&keys)?;
        Ok(self.drains.plan(&drained, &connections, now))
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        self.kernel.intact()
    }

    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        let carried = self.kernel.carried()?;
        Ok(carried.map(|Carried { open, answers }| Remains {
            connections: open,
            answers,
            ..Remains::default()
        }))
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        self.kernel.retire()
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.kernel.remove_everything()
    }
}
