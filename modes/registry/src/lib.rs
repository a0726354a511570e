//! The one place that knows all modes: a new mode is one arm here.
//!
//! ```text
//!   Mode ──open──> Box<dyn Driver> (one a family)
//! ```

#![forbid(unsafe_code)]

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

/// Removes what the modes not chosen left in the kernel. To be called once the chosen one has programmed
/// everything: until then the old rules serve. What was left is the same in both, so that packets may meet
/// either; a connection is translated by the rules that it meets first, once.
pub fn clean_up_others(chosen: Mode, family: IpFamily, options: Options) -> Result<(), OpenError> {
    for mode in BUILT.iter().filter(|mode| **mode != chosen) {
        open(*mode, family, options)?.cleanup()?;
    }
    if chosen == Mode::Iptables {
        Tools::open(family, options.flavour)?.remove_other_flavour()?;
    }
    Ok(())
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
