//! A kernel that fails now and then.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::{Backend, KernelError, Mode, Plan, Remedy, Transaction, Unsupported};

/// What goes wrong with one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// The call is refused and has no effect.
    Refused(Remedy),
    /// The call has its effect, but the answer is lost.
    AnswerLost,
}

/// A mode whose calls to the kernel fail as planned, and succeed once the plan is used up.
#[derive(Debug)]
pub struct Faulty<B> {
    /// The mode.
    pub inner: B,
    /// What goes wrong, call by call.
    pub faults: VecDeque<Fault>,
}

impl<B> Faulty<B> {
    fn next(&mut self) -> Fault {
        self.faults.pop_front().unwrap_or(Fault::None)
    }
}

fn error(what: &str, remedy: Remedy) -> KernelError {
    KernelError { context: what.to_owned(), source: "broken on purpose".into(), remedy }
}

impl<B: Backend> Backend for Faulty<B> {
    const MODE: Mode = B::MODE;
    type State = B::State;
    type Desired = B::Desired;
    type Op = B::Op;

    fn empty(family: IpFamily) -> B::State {
        B::empty(family)
    }

    fn render(table: &ForwardingTable, change: &Change) -> B::Desired {
        B::render(table, change)
    }

    fn plan(observed: &B::State, desired: &B::Desired) -> Plan<B::Op> {
        B::plan(observed, desired)
    }

    fn advance(state: &mut B::State, transaction: &Transaction<B::Op>) {
        B::advance(state, transaction);
    }

    fn restrict(state: &mut B::State, only: &Change) {
        B::restrict(state, only);
    }

    fn annotate(observed: &mut B::State, rendered: &B::State) {
        B::annotate(observed, rendered);
    }

    fn json(state: &B::State) -> serde_json::Value {
        B::json(state)
    }

    fn trace(state: &B::State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
        B::trace(state, local, packet)
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.inner.probe()
    }

    fn observe(&mut self) -> Result<B::State, KernelError> {
        match self.next() {
            Fault::None => self.inner.observe(),
            Fault::Refused(remedy) => Err(error("observe", remedy)),
            Fault::AnswerLost => {
                self.inner.observe()?;
                Err(error("observe, after it was done", Remedy::Retry))
            }
        }
    }

    fn apply(&mut self, transaction: &Transaction<B::Op>) -> Result<(), KernelError> {
        match self.next() {
            Fault::None => self.inner.apply(transaction),
            Fault::Refused(remedy) => Err(error("apply", remedy)),
            Fault::AnswerLost => {
                self.inner.apply(transaction)?;
                Err(error("apply, after it was done", Remedy::Retry))
            }
        }
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.inner.cleanup()
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        self.inner.intact()
    }
}
