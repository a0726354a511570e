//! The one place that knows all modes: a new mode is one arm here.
//!
//! ```text
//!   Mode ──open──> Box<dyn Driver> (one a family)
//! ```

#![forbid(unsafe_code)]

mod choose;

pub use choose::{Choice, choose};

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::Packet;
use shunt_mode::driver::{Driver, ModeDriver, Output, Stage, Traces, dump_offline, trace_offline};
use shunt_mode::{KernelError, Mode};
use shunt_mode_iptables::Iptables;
use shunt_mode_iptables::kernel::Tools;
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::kernel::Netlink;

pub use shunt_mode_iptables::flavour::Flavour;

/// Why a mode cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// This build has no such mode.
    #[error("mode {0} is not part of this build; use --mode nftables or --mode iptables")]
    NotBuilt(Mode),
    /// The kernel could not be reached.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// The modes of this build.
pub const BUILT: &[Mode] = &[Mode::Nftables, Mode::Iptables];

/// What modes need to know besides the forwarding table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// The flavour of iptables; `None` for the one that the node uses.
    pub flavour: Option<Flavour>,
}

/// Modes of this build from which `auto` takes the first that the kernel can run: first the one that
/// costs least per connection and change and needs no privilege beyond `CAP_NET_ADMIN`.
pub const AUTO: &[Mode] = &[Mode::Nftables, Mode::Iptables];

/// Opens a mode for a family in the calling thread's network namespace.
pub fn open(mode: Mode, family: IpFamily, options: Options) -> Result<Box<dyn Driver>, OpenError> {
    match mode {
        Mode::Iptables => {
            let backend = Iptables::new(Tools::open(family, options.flavour)?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
        Mode::Nftables => {
            let backend = Nftables::new(Netlink::open(family)?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
        other => Err(OpenError::NotBuilt(other)),
    }
}

/// Removes what modes other than `in_use` and kube-proxy left for a family. Everything is tried; the
/// errors say what may be left. What kube-proxy's iptables and ipvs modes leave has the names that ours
/// use, and goes with them.
///
/// To be called once the mode in use has programmed everything: until then the old rules serve. What was left
/// is the same in both, so that packets may meet either; a connection is translated by the rules that it
/// meets first, once.
pub fn remove_leftovers(in_use: Option<Mode>, family: IpFamily, options: Options) -> Vec<KernelError> {
    let mut errors = Vec::new();
    match shunt_mode_nftables::kernel::remove_kube_proxy(family) {
        Ok(false) => {}
        Ok(true) => tracing::info!(%family, "removed the table of kube-proxy's nftables mode"),
        Err(error) => errors.push(error),
    }
    for mode in BUILT.iter().filter(|mode| Some(**mode) != in_use) {
        // What cannot even be opened has left nothing.
        match open(*mode, family, options).map(|mut driver| driver.cleanup()) {
            Ok(Ok(())) => tracing::debug!(%mode, %family, "nothing of this mode is left"),
            Ok(Err(error)) => errors.push(error),
            Err(error) => tracing::debug!(%mode, %family, "not cleaned up: {error}"),
        }
    }
    if in_use == Some(Mode::Iptables) {
        let removed = Tools::open(family, options.flavour).and_then(|mut tools| tools.remove_other_flavour());
        errors.extend(removed.err());
    }
    errors
}

/// Prints what a mode makes of a table, without a kernel.
pub fn dump(
    mode: Mode,
    table: &ForwardingTable,
    stage: Stage,
    only: Option<&Change>,
    output: Output,
) -> Result<String, OpenError> {
    match mode {
        Mode::Iptables => Ok(dump_offline::<Iptables<Tools>>(table, stage, only, output)),
        Mode::Nftables => Ok(dump_offline::<Nftables<Netlink>>(table, stage, only, output)),
        other => Err(OpenError::NotBuilt(other)),
    }
}

/// Says what becomes of packets under what a mode makes of a table, without a kernel.
pub fn trace(mode: Mode, table: &ForwardingTable, packets: &[Packet]) -> Result<Traces, OpenError> {
    match mode {
        Mode::Iptables => Ok(trace_offline::<Iptables<Tools>>(table, packets)),
        Mode::Nftables => Ok(trace_offline::<Nftables<Netlink>>(table, packets)),
        other => Err(OpenError::NotBuilt(other)),
    }
}
