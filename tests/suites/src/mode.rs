//! How the suites see a mode.

pub mod ebpf;
mod iptables;
mod ipvs;
mod nftables;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::net::IpAddr;

use anyhow::Result;
use shunt_core::id::IpFamily;
use shunt_core::table::ForwardingTable;
use shunt_core::walk::{Outcome, Packet, walk};
use shunt_harness::lab::{Lab, Namespace};
use shunt_mode::{Backend, KernelError, Mode, Plan};

pub use iptables::{IptablesLegacy, IptablesNft};
pub use ipvs::IpvsMode;
pub use nftables::NftablesMode;

pub use ebpf::EbpfMode;

/// A mode with everything that the suites need of it.
pub trait ModeUnderTest: 'static {
    /// What the mode owns in the kernel.
    type State: Clone + Eq + Debug + std::fmt::Display + Send + Sync + 'static;
    /// What the kernel should hold.
    type Desired: Send;
    /// An operation.
    type Op: Clone + Debug + std::fmt::Display + Send + 'static;
    /// The mode over a kernel in memory.
    type Fake: Backend<State = Self::State, Desired = Self::Desired, Op = Self::Op>;
    /// The mode over the kernel of the calling thread's network namespace.
    type Real: Backend<State = Self::State, Desired = Self::Desired, Op = Self::Op>;

    /// Which mode it is.
    const MODE: Mode = <Self::Fake as Backend>::MODE;
    /// Whether its tests in the real kernel run in a guest: most machines' own kernels lack what the mode needs.
    const NEEDS_GUEST: bool = false;
    /// Most operations in the plan for one changed endpoint of one Service with one frontend.
    const OPS_PER_ENDPOINT: usize;

    /// The mode over an empty kernel in memory.
    fn fake(family: IpFamily) -> Self::Fake;
    /// The mode over the kernel of the calling thread's network namespace.
    fn real(family: IpFamily) -> Result<Self::Real, KernelError>;
    /// What the kernel in memory holds, without the reading being counted.
    fn held(fake: &mut Self::Fake) -> Self::State;
    /// From now on the kernel in memory refuses every commit after this many.
    fn fail_after(fake: &mut Self::Fake, commits: Option<usize>);
    /// How often the kernel in memory was read as a whole.
    fn reads(fake: &mut Self::Fake) -> usize;
    /// The plan with limits so small that transactions are split and tables grow.
    fn plan_tight(observed: &Self::State, desired: &Self::Desired, tightness: u8) -> Plan<Self::Op>;
    /// Whether an operation only takes away what nothing uses.
    fn is_garbage(op: &Self::Op) -> bool;
    /// The mode's own walker.
    fn trace(state: &Self::State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
        <Self::Fake as Backend>::trace(state, local, packet)
    }
    /// What the mode must make of a packet: what the table says, but for what is documented otherwise in
    /// docs/differences.md.
    fn expected(table: &ForwardingTable, packet: &Packet) -> Outcome {
        walk(table, packet).outcome
    }
    /// Whether the source of a packet is the same to the node before and after a change of the table.
    fn is_settled(_before: &ForwardingTable, _after: &ForwardingTable, _packet: &Packet) -> bool {
        true
    }
    /// Whether operations take effect one by one, so that a Service whose traffic policy changes may for
    /// a moment be masqueraded although it is not before nor after.
    const ONE_BY_ONE: bool = false;
    /// Whether the mode's own tool understands the text of states, without carrying it out.
    fn check_text(namespace: &Namespace, text: &str) -> Result<()>;
    /// Everything that the mode's own tools list in a namespace; each installed version must manage, and
    /// find nothing of ours that a tool could trip over.
    fn list(namespace: &Namespace) -> Result<String>;
    /// Gives the kernel what somebody else might have there, beside what the mode owns and as like it as can be.
    /// [`ModeUnderTest::list`] shows it, and it must stay as it is.
    fn foreign(namespace: &Namespace) -> Result<()>;
    /// Ways to damage what the mode made of a case: the case, and a script for [`ModeUnderTest::damage`].
    fn damages() -> &'static [(&'static str, &'static str)];
    /// Carries out one of them.
    fn damage(namespace: &Namespace, family: IpFamily, script: &str) -> Result<()>;
    /// Whether what is observed after a repair does what is wanted; by default they are the same.
    fn is_repaired(observed: &Self::State, wanted: &Self::State) -> bool {
        observed == wanted
    }
    /// How many clients of Services with session affinity the kernel remembers.
    fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize>;
    /// Makes the kernel remember so many clients more, at addresses that nobody has.
    fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()>;
    /// Lets processes of a lab meet the mode as those of a real node do, before anything is started in
    /// it. Answers whether refusals meet the node's processes at their sockets, without a packet.
    fn settle(_lab: &Lab) -> Result<bool> {
        Ok(false)
    }
    /// Whether a client of a Service port with session affinity has one endpoint at all its addresses, node
    /// ports included; otherwise one at each.
    const AFFINITY_OF_PORTS: bool = true;
    /// Whether a client is forgotten although it has connections, closing ones included.
    const AFFINITY_FORGETS_CONNECTED: bool = true;
    /// What the mode cannot do yet of what a case asks for.
    fn lacks(case: &str, packet: Option<&str>) -> Option<&'static str>;
}
