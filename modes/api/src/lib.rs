//! What every mode is.
//!
//! ```text
//!   ForwardingTable + Change ──render──> desired ──plan(observed)──> Plan<Op> ──apply──> kernel
//!                                                      ▲                                   │
//!                                                      └──────────── observe ──────────────┘
//! ```
//!
//! A mode answers no Kubernetes question: if it needs to, the compiler in `shunt-core` is
//! incomplete. `render` and `plan` are pure; only `probe`, `observe`, `apply` and `cleanup` touch
//! the kernel. Start reading at [`Backend`], then [`sync`].

#![forbid(unsafe_code)]

pub mod driver;
pub mod plan;
pub mod sync;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use shunt_core::id::{IpFamily, ServicePortName};
use shunt_core::stale::Tuple;
use shunt_core::table::{Change, ForwardingTable, NodeFacts};
use shunt_core::walk::{Outcome, Packet};

pub use plan::{Plan, Transaction};

/// The four ways to program the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Mode {
    /// iptables, legacy or nft flavour.
    Iptables,
    /// nftables by netlink.
    Nftables,
    /// IPVS by netlink.
    Ipvs,
    /// eBPF at sockets and at tc.
    Ebpf,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::Iptables, Self::Nftables, Self::Ipvs, Self::Ebpf];

    /// The name used on the command line and in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Ipvs => "ipvs",
            Self::Ebpf => "ebpf",
        }
    }

    /// Whether the kernel's conntrack remembers the endpoint of each flow, so that flows to endpoints
    /// that are gone must be deleted there. eBPF asks its own map for every packet.
    pub const fn uses_conntrack(self) -> bool {
        match self {
            Self::Iptables | Self::Nftables | Self::Ipvs => true,
            Self::Ebpf => false,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A mode name that does not exist.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("unknown mode {0:?}: want iptables, nftables, ipvs or ebpf")]
pub struct UnknownMode(pub String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(s: &str) -> Result<Self, UnknownMode> {
        Self::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| UnknownMode(s.to_owned()))
    }
}

/// What to do about an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remedy {
    /// The same plan may work in a moment.
    Retry,
    /// What is believed about the kernel is wrong: observe, then plan anew.
    Resync,
    /// Nothing will help but a change outside.
    Fatal,
}

/// Why the kernel could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {source}")]
pub struct KernelError {
    /// What was being done, naming the object.
    pub context: String,
    /// The kernel's answer.
    pub source: Box<dyn std::error::Error + Send + Sync>,
    /// What to do about it.
    pub remedy: Remedy,
}

/// Why a mode cannot run on this node.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{mode} mode cannot run here: {missing}; {advice}")]
pub struct Unsupported {
    /// The mode.
    pub mode: Mode,
    /// What is missing.
    pub missing: String,
    /// What to do about it.
    pub advice: String,
}

/// Rules of ours in a table of iptables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RuleCount {
    /// The table.
    pub table: &'static str,
    /// All that there are.
    pub total: usize,
    /// Those that the last sync wrote.
    pub written: usize,
}

/// How full a table of the kernel is that has a limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// The table, in the mode's own words.
    pub table: &'static str,
    /// Entries in it.
    pub entries: usize,
    /// Entries that it takes before it must be replaced or overflows.
    pub limit: usize,
}

/// What a mode has counted of a Service port, ever since the kernel's counter was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counted {
    /// The Service port.
    pub port: ServicePortName,
    /// The kernel's counter. It may belong to another Service port later, and then goes on from where it is.
    pub counter: u32,
    /// New flows that were sent to an endpoint.
    pub forwarded: u64,
    /// Flows that were refused.
    pub rejected: u64,
    /// Packets that were dropped.
    pub dropped: u64,
    /// Bytes of packets that the mode has seen, IP headers included: from clients, and to them.
    pub bytes: [u64; 2],
    /// Endpoints that ever had a flow.
    pub endpoints: Vec<CountedEndpoint>,
}

/// What a mode has counted of an endpoint of a Service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CountedEndpoint {
    /// The endpoint.
    pub address: SocketAddr,
    /// New flows that were sent to it since the mode was asked last; 0 the first time.
    pub flows: u64,
}

/// What is left of a mode that another one has taken over from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Remains {
    /// Whether it still takes new connections, of whatever family.
    pub serves: bool,
    /// TCP connections that nothing else can go on with.
    pub connections: usize,
    /// What packets from the clients of those of the family are inside the node, and behind it where that is different.
    /// netfilter must neither translate these nor let others leave likewise.
    pub tuples: Vec<Tuple>,
    /// Packets from endpoints that the mode takes for answers by these alone, whether or not their connection goes on: those
    /// to a connection of another mode should look different.
    pub answers: Vec<Tuple>,
}

/// One mode for one IP family.
///
/// Implementations hold a handle to the kernel and nothing else; what is known of the kernel is
/// `State`, which the caller keeps.
pub trait Backend: Send {
    /// Which mode this is.
    const MODE: Mode;
    /// Everything that the mode owns in the kernel, typed. Its `Display` is the dump format.
    type State: Clone + fmt::Display + Send + 'static;
    /// What the kernel should hold, for the part of the table that a change touches.
    type Desired: Send;
    /// One operation; its `Display` says what it does in the words of the mode's own tool.
    type Op: fmt::Display + Send + 'static;

    /// What the mode owns in a kernel where it has never run.
    fn empty(family: IpFamily) -> Self::State;

    /// What the kernel should hold for the part of the table that `change` touches. Pure.
    fn render(table: &ForwardingTable, change: &Change) -> Self::Desired;

    /// The operations that lead from what was observed to what is desired. Every prefix of the
    /// transactions is safe: a Service that has endpoints before and after is never refused in
    /// between. Pure.
    fn plan(observed: &Self::State, desired: &Self::Desired) -> Plan<Self::Op>;

    /// What the kernel holds after a transaction was carried out. Pure.
    fn advance(state: &mut Self::State, transaction: &Transaction<Self::Op>);

    /// Leaves only what `only` touches, for printing. Pure.
    fn restrict(state: &mut Self::State, only: &Change);

    /// Gives rules that were read from the kernel the texts of those that were rendered. Pure.
    fn annotate(observed: &mut Self::State, rendered: &Self::State);

    /// The state for programs. Pure.
    fn json(state: &Self::State) -> serde_json::Value;

    /// What becomes of a packet under `state`, as the kernel would evaluate it and without asking
    /// the table; `local` are the addresses of the node. The error says what in `state` cannot be
    /// followed. Pure.
    fn trace(state: &Self::State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String>;

    /// How full the tables of the kernel are that have a limit. Pure.
    fn usage(_: &Self::State) -> Vec<Usage> {
        Vec::new()
    }

    /// Whether [`Backend::rules`] looks at what was written.
    const COUNTS_RULES: bool = false;

    /// How many rules there are in each table of iptables, and how many of them these transactions wrote.
    /// Pure.
    fn rules(_: &Self::State, _written: &[Transaction<Self::Op>]) -> Vec<RuleCount> {
        Vec::new()
    }

    /// Whether this node can run the mode; names what is missing.
    fn probe(&mut self) -> Result<(), Unsupported>;

    /// Sets the sysctls that the mode needs on such a node, and loads modules, ahead of everything else: the
    /// mode does so as well, but what runs it may not be allowed to.
    fn prepare(&mut self, _node: &NodeFacts) -> Result<(), KernelError> {
        Ok(())
    }

    /// Does what takes long and no packet meets, while the objects are on their way; [`Self::observe`] said what there is.
    fn make_ready(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    /// Reads what the mode owns in the kernel, and only that.
    fn observe(&mut self) -> Result<Self::State, KernelError>;

    /// Carries out one transaction. Where the kernel can, all of it or nothing; elsewhere operation by
    /// operation in order. After an error the kernel is observed anew in any case.
    fn apply(&mut self, transaction: &Transaction<Self::Op>) -> Result<(), KernelError>;

    /// What is due because time has passed, not because the table changed, and when to ask again;
    /// `None` when nothing waits. Reads the kernel as far as that takes.
    fn ripen(
        &mut self,
        _state: &Self::State,
        _now: Instant,
    ) -> Result<(Plan<Self::Op>, Option<Instant>), KernelError> {
        Ok((Plan::default(), None))
    }

    /// What was counted by Service port; nothing in modes that leave that to conntrack.
    fn counted(&mut self) -> Result<Vec<Counted>, KernelError> {
        Ok(Vec::new())
    }

    /// Takes in that the node's devices or addresses have changed. Modes whose rules ask the kernel
    /// itself have nothing to do.
    fn refresh(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    /// What would break if everything was removed while another mode goes on, once what is over is forgotten; `None`
    /// where there is nothing to remove, and from modes whose connections conntrack alone goes on with.
    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        Ok(None)
    }

    /// Leaves new connections of the family to another mode, which takes them by now, and goes on with those that there
    /// are.
    fn retire(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    /// Keeps off connections of another mode, to which answers come with these tuples: none of this mode's may have such.
    /// Also before anything was applied. Modes that leave the choice of ports to conntrack need not be told.
    fn keep_off(&mut self, _answers: &[Tuple]) -> Result<(), KernelError> {
        Ok(())
    }

    /// Removes everything that the mode owns. Safe to run twice.
    fn cleanup(&mut self) -> Result<(), KernelError>;

    /// Whether what was programmed is still there, asked cheaply and often. False only if it is not:
    /// somebody flushed the rules, say.
    fn intact(&mut self) -> Result<bool, KernelError> {
        Ok(true)
    }

    /// Time spent waiting for a lock that others hold, since this was last asked.
    fn waited(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// The state in which the kernel holds exactly what the whole table asks for, starting from nothing.
pub fn rendered<B: Backend>(table: &ForwardingTable) -> B::State {
    let mut state = B::empty(table.family());
    let desired = B::render(table, &Change::everything());
    for transaction in B::plan(&state, &desired).transactions {
        B::advance(&mut state, &transaction);
    }
    state
}
