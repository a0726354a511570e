//! How the suites see a mode.

mod iptables;
mod nftables;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::net::IpAddr;

use anyhow::Result;
use shunt_core::id::IpFamily;
use shunt_core::walk::{Outcome, Packet};
use shunt_harness::lab::Namespace;
use shunt_mode::{Backend, KernelError, Mode, Plan};

pub use iptables::{IptablesLegacy, IptablesNft};
pub use nftables::NftablesMode;

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
    /// Whether the mode's own tool understands the text of states, without carrying it out.
    fn check_text(namespace: &Namespace, text: &str) -> Result<()>;
    /// Everything that the mode's own tools list in a namespace; each installed version must manage, and
    /// find nothing of ours that a tool could trip over.
    fn list(namespace: &Namespace) -> Result<String>;
    /// Puts something of somebody else's where the mode's own things are.
    fn foreign(namespace: &Namespace) -> Result<()>;
    /// Ways to damage what the mode made of a case: the case, and a script.
    fn damages() -> &'static [(&'static str, &'static str)];
    /// Carries out such a script.
    fn damage(namespace: &Namespace, family: IpFamily, script: &str) -> Result<()>;
    /// How many clients of Services with session affinity the kernel remembers.
    fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize>;
    /// Makes the kernel remember so many clients more, at addresses that nobody has.
    fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()>;
    /// What the mode cannot do yet of what a case asks for.
    fn lacks(case: &str, packet: Option<&str>) -> Option<&'static str>;
}
