//! A lab of network namespaces: a node under test, a client outside the cluster, pods on the node and on other nodes.
//!
//! ```text
//!   client ns                    node ns (forwards)                  pod ns, one each
//!   eth0: any addresses ──veth── eth0: the node's addresses
//!   default via node             default via client     veth0 ──veth── eth0: the pod's addresses
//!                                                       veth1 ──veth── eth0: ...   default via node
//!                                                       veth2 ──veth── eth0 + AnyIP ranges: a remote node's pods
//! ```
//!
//! The namespaces have no names in the file system: they live as long as a descriptor or a thread of this process
//! does, so nothing is left behind even after `kill -9`. The machine's own namespace is never touched: both ends of
//! each veth are created where they belong. Links need no ARP, neighbour discovery or duplicate address detection
//! (permanent neighbour entries, `nodad`), so a lab is ready when [`LabBuilder::build`] returns.
//!
//! This module must never decide what a Service means: it only carries packets and says what came back.
//!
//! Start reading at [`Lab`] (topology.rs), then [`Namespace`], [`Probe`] and [`Outcome`].

mod child;
mod echo;
mod load;
mod namespace;
mod netlink;
pub mod place;
mod probe;
mod sctp;
mod storm;
mod topology;

use std::sync::OnceLock;

pub use child::ChildGuard;
pub use echo::Proto;
pub use load::{Conversation, Transfer, TransferReport, TransferSpec};
pub use namespace::Namespace;
pub use probe::{Answer, Icmp, Outcome, Probe};
pub use storm::{Storm, StormReport, StormSpec};
pub use topology::{Lab, LabBuilder};

/// Whether this process may build labs; says what is missing when it may not.
///
/// With `SHUNT_REQUIRE_KERNEL=1` a missing requirement is a failure, so that a build machine cannot pass by skipping.
///
/// ```no_run
/// if !shunt_harness::lab::require_kernel() {
///     return;
/// }
/// ```
pub fn require_kernel() -> bool {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        if !nix::unistd::geteuid().is_root() {
            return Some("root (network namespaces)".to_owned());
        }
        Lab::builder().build().err().map(|error| format!("network namespaces and veth: {error:#}"))
    });
    let Some(missing) = missing else { return true };
    crate::skip(missing);
    false
}

/// Locks also after another thread panicked while holding the lock: the lab must still be torn down then.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
