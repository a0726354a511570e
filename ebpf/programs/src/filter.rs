//! Which addresses have flows in the connection table.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use shunt_ebpf_abi::{Address, FlowFilter};

use crate::maps::FLOW_FILTER;
use crate::tables::Kernel;

/// Says that an address has a flow that was seen at `now`. To be done before the flow is written down.
#[inline(always)]
pub(crate) fn mark(kernel: &Kernel, address: &Address, now: u64) {
    let Some(filter) = FLOW_FILTER.get_ptr_mut(0) else { return };
    let config = kernel.config;
    // The longest of all timeouts, whatever the flow: what others write at the same time is the same.
    let timeout = config.tcp_timeout.max(config.tcp_transient_timeout).max(config.udp_timeout);
    let until = FlowFilter::until(now, timeout);
    // SAFETY: the verifier knows the element; one word is read or written.
    if let Some(entry) = unsafe { &mut *filter }.until.get_mut(FlowFilter::entry(address))
        && *entry != until
    {
        *entry = until;
    }
}

/// Whether no flow has either of the addresses at one of its ends. Where that takes a look at the clock, `now` is what it
/// said.
#[inline(always)]
pub(crate) fn have_no_flow(source: &Address, destination: &Address, now: &mut u64) -> bool {
    let Some(filter) = FLOW_FILTER.get(0) else { return false };
    let of = |address| filter.until.get(FlowFilter::entry(address)).copied();
    let (Some(a), Some(b)) = (of(source), of(destination)) else { return false };
    if a | b == 0 {
        return true;
    }
    // SAFETY: the helper reads a clock.
    *now = unsafe { bpf_ktime_get_coarse_ns() };
    !FlowFilter::holds(a, *now) && !FlowFilter::holds(b, *now)
}
