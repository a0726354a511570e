//! ebpf mode: maps that programs at sockets and at tc look into.
//!
//! ```text
//!   connect(2), sendmsg(2) ──► socket hooks ─┐   frontends ─► group ─► slots ─► endpoints
//!   packets at devices ──────► tc programs ──┴─────────────────▲
//!                                                              │ this crate
//!                              ForwardingTable ─► render ─► plan ─► apply
//! ```
//!
//! What the maps hold and in which order they may be written is said in `shunt-ebpf-abi`; the programs
//! are in `ebpf/programs`. The walker ([`trace`]) runs the lookup that the programs run.
//!
//! Maps are not written in transactions: every operation alone leaves a state in which every packet
//! meets a fate that is right before or after the change. [`plan`] orders them so.
//!
//! Start reading at `shunt_ebpf_abi`, then [`state`], then [`plan`]. [`kernel`] is the only module that
//! touches the kernel.

#![deny(unsafe_code)]

#[cfg(any(test, feature = "testkit"))]
pub mod fake;
pub mod idle;
pub mod kernel;
pub mod op;
pub mod plan;
pub mod render;
pub mod sizes;
pub mod slots;
pub mod state;
pub mod trace;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::{Backend, Counted, KernelError, Mode, Plan, Remains, Transaction, Unsupported, Usage};

use crate::kernel::Kernel;
use crate::op::Op;
use crate::render::Desired;
use crate::state::State;

/// ebpf mode for one family, over a real kernel or a fake one.
#[derive(Debug)]
pub struct Ebpf<K> {
    kernel: K,
}

impl<K: Kernel> Ebpf<K> {
    /// The mode over a kernel.
    pub const fn new(kernel: K) -> Self {
        Self { kernel }
    }

    /// The kernel under the mode.
    pub const fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }
}

impl<K: Kernel + Send> Backend for Ebpf<K> {
    const MODE: Mode = Mode::Ebpf;
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
        for op in &transaction.ops {
            op.carry_out(state);
        }
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

    fn usage(state: &State) -> Vec<Usage> {
        state.usage()
    }

    fn counted(&mut self) -> Result<Vec<Counted>, KernelError> {
        self.kernel.counted()
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.kernel.probe()
    }

    fn make_ready(&mut self) -> Result<(), KernelError> {
        self.kernel.make_ready()
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.kernel.observe()
    }

    fn apply(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.kernel.carry_out(&transaction.ops)
    }

    fn ripen(&mut self, _state: &State, now: Instant) -> Result<(Plan<Op>, Option<Instant>), KernelError> {
        Ok((Plan::default(), self.kernel.sweep(now)?))
    }

    fn refresh(&mut self) -> Result<(), KernelError> {
        self.kernel.refresh()
    }

    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        self.kernel.remains()
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        self.kernel.retire()
    }

    fn keep_off(&mut self, answers: &[Tuple]) -> Result<(), KernelError> {
        self.kernel.keep_off(answers)
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.kernel.remove()
    }
}
