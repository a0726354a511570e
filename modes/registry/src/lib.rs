//! The one place that knows all modes: a new mode is one arm here.
//!
//! ```text
//!   Mode ──open──> Box<dyn Driver> (one a family)
//! ```

#![forbid(unsafe_code)]

mod choose;

pub use choose::{Choice, choose};

use std::sync::Arc;

use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::Packet;
use shunt_mode::driver::{Driver, ModeDriver, Output, Stage, Traces, dump_offline, trace_offline};
use shunt_mode::{KernelError, Mode};
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::kernel::Bpf;
pub use shunt_mode_ebpf::kernel::Options as EbpfOptions;
use shunt_mode_iptables::Iptables;
use shunt_mode_iptables::kernel::Tools;
use shunt_mode_ipvs::Ipvs;
use shunt_mode_ipvs::kernel::Linux;
pub use shunt_mode_ipvs::kernel::Options as IpvsOptions;
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::kernel::Netlink;

pub use xtables_tools::Flavour;

/// Modes from which `auto` takes the first that the kernel can run: first the one that
/// costs least per connection and change and needs no privilege beyond `CAP_NET_ADMIN`.
pub const AUTO: &[Mode] = &[Mode::Nftables, Mode::Iptables];

/// Settings that only one mode has.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Those of ebpf mode.
    pub ebpf: Arc<EbpfOptions>,
    /// The flavour of iptables; `None` for the one that the node uses.
    pub flavour: Option<Flavour>,
    /// Those of ipvs mode.
    pub ipvs: IpvsOptions,
}

/// Opens a mode for a family in the calling thread's network namespace.
pub fn open(mode: Mode, family: IpFamily, options: &Options) -> Result<Box<dyn Driver>, KernelError> {
    match mode {
        Mode::Iptables => {
            let backend = Iptables::new(Tools::open(family, options.flavour)?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
        Mode::Ebpf => {
            let backend = Ebpf::new(Bpf::open(family, options.ebpf.clone())?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
        Mode::Nftables => {
            let backend = Nftables::new(Netlink::open(family)?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
        Mode::Ipvs => {
            let backend = Ipvs::new(Linux::open(family, options.ipvs.clone())?);
            Ok(Box::new(ModeDriver::new(backend, family)))
        }
    }
}

/// Removes what modes other than `in_use` and kube-proxy left for a family. Everything is tried; the
/// errors say what may be left. What kube-proxy's iptables and ipvs modes leave has the names that ours
/// use, and goes with them.
///
/// To be called once the mode in use has programmed everything: until then the old rules serve. What was left
/// is the same in both, so that packets may meet either; a connection is translated by the rules that it
/// meets first, once.
pub fn remove_leftovers(in_use: Option<Mode>, family: IpFamily, options: &Options) -> Vec<KernelError> {
    let mut errors = Vec::new();
    match shunt_mode_nftables::kernel::remove_kube_proxy(family) {
        Ok(false) => {}
        Ok(true) => tracing::info!(%family, "removed the table of kube-proxy's nftables mode"),
        Err(error) => errors.push(error),
    }
    for mode in Mode::ALL.iter().filter(|mode| Some(**mode) != in_use) {
        let removed = match (*mode, in_use) {
            (Mode::Iptables, Some(Mode::Ipvs)) => remove_iptables_beside_ipvs(family),
            (Mode::Ipvs, Some(Mode::Iptables)) => remove_ipvs_beside_iptables(family, options),
            // What cannot even be opened has left nothing.
            _ => match open(*mode, family, options) {
                Ok(mut driver) => driver.cleanup(),
                Err(error) => {
                    tracing::debug!(%mode, %family, "not cleaned up: {error}");
                    continue;
                }
            },
        };
        match removed {
            Ok(()) => tracing::debug!(%mode, %family, "nothing of this mode is left"),
            Err(error) => errors.push(error),
        }
    }
    if in_use == Some(Mode::Iptables)
        && let Err(error) =
            Tools::open(family, options.flavour).and_then(|mut tools| tools.remove_other_flavour())
    {
        errors.push(error);
    }
    errors
}

/// Whether modes of netfilter, ours or kube-proxy's, have left rules for a family. What cannot be asked has none.
pub fn has_rules_of_netfilter(family: IpFamily, options: &Options) -> bool {
    // ipvs mode has rules under the names that iptables mode uses.
    let in_iptables = Tools::open(family, options.flavour).map(|tools| tools.has_rules());
    let asked =
        [(Mode::Nftables, shunt_mode_nftables::kernel::has_table(family)), (Mode::Iptables, in_iptables)];
    asked.into_iter().any(|(mode, has)| {
        has.unwrap_or_else(|error| {
            tracing::debug!(%mode, %family, "nothing is left: {error}");
            false
        })
    })
}

/// How many packets the rules of iptables mode dropped or accepted, for those that are counted, in the calling
/// thread's network namespace: name of the counter and packets.
pub fn counted_packets(mode: Mode) -> Vec<(&'static str, u64)> {
    match mode {
        Mode::Iptables => shunt_mode_iptables::kernel::counted(),
        Mode::Ebpf | Mode::Ipvs | Mode::Nftables => Vec::new(),
    }
}

/// iptables and ipvs mode have chains of the same names, as kube-proxy's have. The one in use has made those its
/// own, and has removed such as it does not need, in the flavour that it uses.
fn remove_iptables_beside_ipvs(family: IpFamily) -> Result<(), KernelError> {
    let mut tools = Tools::open(family, None)?;
    let used = tools.flavour();
    let is_kept = |flavour, table, chain: &str| {
        Some(flavour) == used && shunt_mode_ipvs::skeleton::is_ours(table, chain)
    };
    tools.remove_beside(&is_kept)
}

fn remove_ipvs_beside_iptables(family: IpFamily, options: &Options) -> Result<(), KernelError> {
    let used = Tools::open(family, options.flavour)?.flavour();
    let is_kept = |flavour, table, chain: &str| {
        Some(flavour) == used && shunt_mode_iptables::names::is_ours(table, chain)
    };
    Linux::open(family, options.ipvs.clone())?.remove_beside(&is_kept)
}

/// Prints what a mode makes of a table, without a kernel.
pub fn dump(
    mode: Mode,
    table: &ForwardingTable,
    stage: Stage,
    only: Option<&Change>,
    output: Output,
) -> String {
    match mode {
        Mode::Ebpf => dump_offline::<Ebpf<Bpf>>(table, stage, only, output),
        Mode::Iptables => dump_offline::<Iptables<Tools>>(table, stage, only, output),
        Mode::Nftables => dump_offline::<Nftables<Netlink>>(table, stage, only, output),
        Mode::Ipvs => dump_offline::<Ipvs<Linux>>(table, stage, only, output),
    }
}

/// Says what becomes of packets under what a mode makes of a table, without a kernel.
pub fn trace(mode: Mode, table: &ForwardingTable, packets: &[Packet]) -> Traces {
    match mode {
        Mode::Ebpf => trace_offline::<Ebpf<Bpf>>(table, packets),
        Mode::Iptables => trace_offline::<Iptables<Tools>>(table, packets),
        Mode::Nftables => trace_offline::<Nftables<Netlink>>(table, packets),
        Mode::Ipvs => trace_offline::<Ipvs<Linux>>(table, packets),
    }
}
