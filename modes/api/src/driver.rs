//! Carries out what the sync loop says, with one mode for one family. The same code syncs everything
//! and a single Service: only the [`Change`] differs.

use std::time::{Duration, Instant};

use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_core::table::{Change, ForwardingTable, NodeFacts};
use shunt_core::walk::{Outcome, Packet};

use crate::sync::Step;
use crate::{
    Backend, Counted, KernelError, Mode, Plan, Remains, Remedy, RuleCount, Unsupported, Usage, rendered,
};

/// What a sync did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Transactions that the kernel carried out.
    pub transactions: usize,
    /// Operations in them.
    pub operations: usize,
    /// Time spent reading the kernel; zero when what was known was enough.
    pub observing: Duration,
    /// Time spent computing what to do.
    pub planning: Duration,
    /// Time spent writing.
    pub applying: Duration,
    /// Part of that time in which others held a lock.
    pub waiting: Duration,
    /// What the kernel has no room for: [`Plan::problems`].
    pub problems: Vec<String>,
    /// Rules of iptables, in modes that have many.
    pub rules: Vec<RuleCount>,
}

/// How a dump is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Output {
    /// For people: the words of the mode's own tool.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// What of a mode can be printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// What the kernel should hold.
    State,
    /// The operations that lead there from what the kernel holds.
    Plan,
    /// What the kernel holds.
    Kernel,
}

/// What a mode's rules make of packets, in the packets' order; an error says what in the rules cannot
/// be followed.
pub type Traces = Vec<Result<Outcome, String>>;

/// One mode for one family, whatever the mode.
pub trait Driver: Send {
    /// The mode.
    fn mode(&self) -> Mode;
    /// The family.
    fn family(&self) -> IpFamily;
    /// Whether this node can run the mode.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Sets the sysctls that the mode needs on such a node, and loads modules.
    fn prepare(&mut self, node: &NodeFacts) -> Result<(), KernelError>;
    /// Reads the kernel ahead of the first sync, which then need not, and makes ready what no packet meets: at a start,
    /// while the objects are still on their way.
    fn read_ahead(&mut self) -> Result<(), KernelError>;
    /// Makes the kernel hold what `table` asks for, as far as the step says.
    fn sync(&mut self, table: &ForwardingTable, step: &Step) -> Result<Report, KernelError>;
    /// Does what is due because time has passed, and answers when to come again; `None` when nothing
    /// waits.
    fn tend(&mut self, now: Instant) -> Result<Option<Instant>, KernelError>;
    /// Prints a stage; `only` restricts it to what a change touches.
    fn dump(
        &mut self,
        table: &ForwardingTable,
        stage: Stage,
        only: Option<&Change>,
        output: Output,
    ) -> Result<String, KernelError>;
    /// Reads the kernel and says what becomes of packets under what it holds. Of `table` only the
    /// node's addresses count.
    fn trace(&mut self, table: &ForwardingTable, packets: &[Packet]) -> Result<Traces, KernelError>;
    /// How full the kernel's tables are, as far as known.
    fn usage(&self) -> Vec<Usage>;
    /// What was counted by Service port, in modes that count.
    fn counted(&mut self) -> Result<Vec<Counted>, KernelError>;
    /// Takes in that the node's devices or addresses have changed.
    fn refresh(&mut self) -> Result<(), KernelError>;
    /// What would break with the mode's removal: [`Backend::remains`].
    fn remains(&mut self) -> Result<Option<Remains>, KernelError>;
    /// Takes no new connections of the family any more: [`Backend::retire`].
    fn retire(&mut self) -> Result<(), KernelError>;
    /// Keeps off connections of another mode: [`Backend::keep_off`].
    fn keep_off(&mut self, answers: &[Tuple]) -> Result<(), KernelError>;
    /// Removes everything that the mode owns.
    fn cleanup(&mut self) -> Result<(), KernelError>;
}

/// A mode with what is known of its kernel.
#[derive(Debug)]
pub struct ModeDriver<B: Backend> {
    backend: B,
    family: IpFamily,
    /// What the kernel holds, as far as known; `None` until it was read, and after an error.
    state: Option<B::State>,
    /// The kernel had no room for something: the next change may make some.
    short: bool,
    /// What was read ahead of the first sync.
    ahead: Option<Ahead<B::State>>,
}

#[derive(Debug)]
struct Ahead<S> {
    state: S,
    /// When it had been read.
    at: Instant,
    /// How long that took.
    took: Duration,
}

/// What was read longer ago is read again: somebody else may have been at work meanwhile.
const AHEAD_MAX: Duration = Duration::from_secs(10);

impl<B: Backend> ModeDriver<B> {
    /// A driver that knows nothing of the kernel yet.
    pub const fn new(backend: B, family: IpFamily) -> Self {
        Self { backend, family, state: None, short: false, ahead: None }
    }

    /// What the kernel holds, as far as known.
    pub const fn state(&self) -> Option<&B::State> {
        self.state.as_ref()
    }

    /// The mode itself.
    pub const fn backend(&mut self) -> &mut B {
        &mut self.backend
    }
}

impl<B: Backend> Driver for ModeDriver<B> {
    fn mode(&self) -> Mode {
        B::MODE
    }

    fn family(&self) -> IpFamily {
        self.family
    }

    fn probe(&mut self) -> Result<(), Unsupported> {
        self.backend.probe()
    }

    fn prepare(&mut self, node: &NodeFacts) -> Result<(), KernelError> {
        self.backend.prepare(node)
    }

    fn read_ahead(&mut self) -> Result<(), KernelError> {
        let started = Instant::now();
        let state = self.backend.observe()?;
        self.ahead = Some(Ahead { state, at: Instant::now(), took: started.elapsed() });
        self.backend.make_ready()
    }

    fn sync(&mut self, table: &ForwardingTable, step: &Step) -> Result<Report, KernelError> {
        let mut report = Report::default();
        if *step == Step::Check {
            return if self.backend.intact()? { Ok(report) } else { Err(gone()) };
        }
        let everything = Change::everything();
        // While a sync runs, what the kernel holds is not known: an error leaves it so.
        let (mut state, mut change) = if let (Step::Apply(change), Some(state)) = (step, self.state.take()) {
            (state, if self.short { &everything } else { change })
        } else if let Some(ahead) = self.ahead.take().filter(|ahead| ahead.at.elapsed() < AHEAD_MAX) {
            report.observing = ahead.took;
            (ahead.state, &everything)
        } else {
            let started = Instant::now();
            let state = self.backend.observe()?;
            report.observing = started.elapsed();
            (state, &everything)
        };
        let mut written = Vec::new();
        for _ in 0..2 {
            let started = Instant::now();
            let plan = B::plan(&state, &B::render(table, change));
            report.planning += started.elapsed();
            self.short = !plan.problems.is_empty();
            report.problems = plan.problems;
            let started = Instant::now();
            let changed = !plan.transactions.is_empty();
            for transaction in plan.transactions {
                self.backend.apply(&transaction)?;
                B::advance(&mut state, &transaction);
                report.transactions += 1;
                report.operations += transaction.ops.len();
                // The first ones are large, and the state grows by what they say.
                if B::COUNTS_RULES {
                    written.push(transaction);
                }
            }
            report.applying += started.elapsed();
            if !self.short || !changed {
                break;
            }
            // What went may have made room, and no other change may come.
            change = &everything;
        }
        report.waiting = self.backend.waited();
        report.rules = B::rules(&state, &written);
        self.state = Some(state);
        Ok(report)
    }

    fn tend(&mut self, now: Instant) -> Result<Option<Instant>, KernelError> {
        let Some(mut state) = self.state.take() else { return Ok(None) };
        let (plan, next) = self.backend.ripen(&state, now)?;
        for transaction in plan.transactions {
            self.backend.apply(&transaction)?;
            B::advance(&mut state, &transaction);
        }
        self.state = Some(state);
        Ok(next)
    }

    fn dump(
        &mut self,
        table: &ForwardingTable,
        stage: Stage,
        only: Option<&Change>,
        output: Output,
    ) -> Result<String, KernelError> {
        if stage == Stage::Plan {
            let observed = self.backend.observe()?;
            let everything = Change::everything();
            let plan = B::plan(&observed, &B::render(table, only.unwrap_or(&everything)));
            return Ok(print_plan(&plan, output));
        }
        let mut state = rendered::<B>(table);
        if stage == Stage::Kernel {
            let mut observed = self.backend.observe()?;
            B::annotate(&mut observed, &state);
            state = observed;
        }
        Ok(print_state::<B>(state, only, output))
    }

    fn trace(&mut self, table: &ForwardingTable, packets: &[Packet]) -> Result<Traces, KernelError> {
        let observed = self.backend.observe()?;
        Ok(trace::<B>(&observed, table, packets))
    }

    fn usage(&self) -> Vec<Usage> {
        self.state.as_ref().map(B::usage).unwrap_or_default()
    }

    fn counted(&mut self) -> Result<Vec<Counted>, KernelError> {
        self.backend.counted()
    }

    fn refresh(&mut self) -> Result<(), KernelError> {
        self.backend.refresh()
    }

    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        self.backend.remains()
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        self.state = None;
        self.ahead = None;
        self.backend.retire()
    }

    fn keep_off(&mut self, answers: &[Tuple]) -> Result<(), KernelError> {
        self.backend.keep_off(answers)
    }

    fn cleanup(&mut self) -> Result<(), KernelError> {
        self.state = None;
        self.ahead = None;
        self.backend.cleanup()
    }
}

fn gone() -> KernelError {
    KernelError {
        context: "look whether our rules are still there".to_owned(),
        source: "somebody removed them".into(),
        remedy: Remedy::Resync,
    }
}

/// Prints what a mode would put into a kernel that it has never run in; needs no kernel.
pub fn dump_offline<B: Backend>(
    table: &ForwardingTable,
    stage: Stage,
    only: Option<&Change>,
    output: Output,
) -> String {
    match stage {
        Stage::Plan => {
            let everything = Change::everything();
            let desired = B::render(table, only.unwrap_or(&everything));
            print_plan(&B::plan(&B::empty(table.family()), &desired), output)
        }
        Stage::State | Stage::Kernel => print_state::<B>(rendered::<B>(table), only, output),
    }
}

/// What becomes of packets in a kernel that holds exactly what the table asks for; needs no kernel.
pub fn trace_offline<B: Backend>(table: &ForwardingTable, packets: &[Packet]) -> Traces {
    trace::<B>(&rendered::<B>(table), table, packets)
}

fn trace<B: Backend>(state: &B::State, table: &ForwardingTable, packets: &[Packet]) -> Traces {
    packets.iter().map(|packet| B::trace(state, &table.node().local_addresses, packet)).collect()
}

fn print_state<B: Backend>(mut state: B::State, only: Option<&Change>, output: Output) -> String {
    if let Some(only) = only {
        B::restrict(&mut state, only);
    }
    match output {
        Output::Text => state.to_string(),
        Output::Json => format!("{:#}\n", B::json(&state)),
    }
}

fn print_plan<Op: std::fmt::Display>(plan: &Plan<Op>, output: Output) -> String {
    match output {
        Output::Text => plan.to_string(),
        Output::Json => {
            let transactions: Vec<Vec<String>> =
                plan.transactions.iter().map(|t| t.ops.iter().map(ToString::to_string).collect()).collect();
            format!("{:#}\n", serde_json::json!({ "transactions": transactions }))
        }
    }
}
