//! A store, a compiler and one family's kernel, kept together as the agent does: changes gather, a
//! sync carries out what they touch.

use shunt_core::compile::{Compiler, Context};
use shunt_core::id::IpFamily;
use shunt_core::store::Store;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Packet, Reason, walk};
use shunt_harness::cases::{self, Case};
use shunt_harness::lab::Namespace;
use shunt_mode::{Backend, KernelError, Mode, Plan, Transaction};

use crate::mode::ModeUnderTest;
use crate::random::Step;

/// Objects and the tables made of them, with what changed since each family was last asked.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The objects.
    pub store: Store,
    /// The tables.
    pub compiler: Compiler,
    pending: [Change; 2],
}

impl Cluster {
    /// An empty cluster.
    pub fn new(context: Context) -> Self {
        // Tables that a kernel has never seen are looked at as a whole.
        let pending = [Change::everything(), Change::everything()];
        Self { store: Store::default(), compiler: Compiler::new(context), pending }
    }

    /// Takes in one step.
    pub fn step(&mut self, step: &Step) {
        let changes = match step {
            Step::Event(event) => {
                let dirty = self.store.apply(event.clone());
                self.compiler.update(&self.store, &dirty)
            }
            Step::Config(config) => {
                let context = Context { config: config.clone(), ..self.compiler.context().clone() };
                self.compiler.set_context(context, &self.store)
            }
            Step::Interfaces(addresses) => {
                let context =
                    Context { interface_addresses: addresses.clone(), ..self.compiler.context().clone() };
                self.compiler.set_context(context, &self.store)
            }
        };
        for (pending, change) in self.pending.iter_mut().zip(changes) {
            pending.merge(change);
        }
    }

    /// Takes in steps, one after the other.
    pub fn steps(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step);
        }
    }

    /// The table of a family.
    pub fn table(&self, family: IpFamily) -> &ForwardingTable {
        self.compiler.table(family)
    }

    /// Whether the port that a packet asks for has session affinity.
    pub fn has_affinity(&self, packet: &Packet) -> bool {
        let table = self.table(IpFamily::of(packet.destination));
        match walk(table, packet).reason {
            Reason::Frontend { frontend, .. } => {
                table.frontend(&frontend).is_some_and(|(port, _)| port.affinity.is_some())
            }
            _ => false,
        }
    }

    /// What changed in a family's table since this was last asked.
    pub fn take_change(&mut self, family: IpFamily) -> Change {
        std::mem::take(&mut self.pending[family as usize])
    }
}

/// A case's cluster, step after step.
#[derive(Debug)]
pub struct CaseRun<'a> {
    /// The case.
    pub case: &'a Case,
    /// The cluster as it is after the steps taken so far.
    pub cluster: Cluster,
    mode: Mode,
    taken: usize,
}

impl<'a> CaseRun<'a> {
    /// The case before its first step, with the settings that it has for a mode.
    pub fn new(case: &'a Case, mode: Mode) -> Self {
        let context = Context::new(cases::NODE, case.steps[0].config(mode).unwrap());
        Self { case, cluster: Cluster::new(context), mode, taken: 0 }
    }

    /// Takes the next step, if there is one.
    pub fn next_step(&mut self) -> Option<&'a cases::Step> {
        let step = self.case.steps.get(self.taken)?;
        let before = self.taken.checked_sub(1).map(|i| &self.case.steps[i]);
        self.taken += 1;
        self.cluster.step(&Step::Config(step.config(self.mode).unwrap()));
        for event in step.events_since(before) {
            self.cluster.step(&Step::Event(event));
        }
        Some(step)
    }
}

/// One family's kernel and what is believed of it.
#[derive(Debug)]
pub struct Synced<B: Backend> {
    /// The kernel.
    pub backend: B,
    /// What it is believed to hold.
    pub mirror: B::State,
}

impl<B: Backend> Synced<B> {
    /// A kernel, looked at once.
    pub fn adopt(mut backend: B) -> Result<Self, KernelError> {
        let mirror = backend.observe()?;
        Ok(Self { backend, mirror })
    }

    /// Plans with the mode's own limits what a change touches.
    pub fn plan(&self, table: &ForwardingTable, change: &Change) -> Plan<B::Op> {
        B::plan(&self.mirror, &B::render(table, change))
    }

    /// Carries out one transaction.
    pub fn apply(&mut self, transaction: &Transaction<B::Op>) -> Result<(), KernelError> {
        self.backend.apply(transaction)?;
        B::advance(&mut self.mirror, transaction);
        Ok(())
    }

    /// Plans and carries out what a change touches; answers the plan.
    pub fn sync(&mut self, table: &ForwardingTable, change: &Change) -> Result<Plan<B::Op>, KernelError> {
        let plan = self.plan(table, change);
        for transaction in &plan.transactions {
            self.apply(transaction)?;
        }
        Ok(plan)
    }
}

/// A mode's own kernel in a node's namespace, looked at once.
pub fn adopt<M: ModeUnderTest>(node: &Namespace, family: IpFamily) -> anyhow::Result<Synced<M::Real>> {
    node.run(|| {
        let mut real = M::real(family)?;
        real.probe()?;
        Ok(Synced::adopt(real)?)
    })
}
