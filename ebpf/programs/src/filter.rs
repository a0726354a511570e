//! Which addresses have flows in the connection table.

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use shunt_ebpf_abi::{Address, FlowFilter, Tuple};

use crate::maps::FLOW_FILTER;
use crate::tables::Kernel;

/// Says that there is a flow with such addresses, seen at `now`. To be done before the flow is written down.
#[inline(always)]
pub(crate) fn mark(kernel: &Kernel, tuple: &Tuple, now: u64) {
    let (block, entry) = FlowFilter::place(&tuple.source, &tuple.destination);
    let Some(filter) = FLOW_FILTER.get_ptr_mut(block) else { return };
    let config = kernel.config;
    // The longest of all timeouts, whatever the flow: what others write at the same time is the same.
    let timeout = config.tcp_timeout.max(config.tcp_transient_timeout).max(config.udp_timeout);
    let until = FlowFilter::until(now, timeout);
    // SAFETY: the verifier knows the element; one word is read or written.
    if let Some(entry) = unsafe { &mut *filter }.until.get_mut(entry)
        && *entry != until
    {
        *entry = until;
    }
}

/// Whether there is no flow between the addresses. Where that takes a look at the clock, `now` is what it said.
#[inline(always)]
pub(crate) fn have_no_flow(source: &Address, destination: &Address, now: &mut u64) -> bool {
    let (block, entry) = FlowFilter::place(source, destination);
    let Some(until) = FLOW_FILTER.get(block).and_then(|block| block.until.get(entry)).copied() else {
        return false;
    };
    if until == 0 {
        return true;
    }
    // SAFETY: the helper reads a clock.
    *now = unsafe { bpf_ktime_get_coarse_ns() };
    !FlowFilter::holds(until, *now)
}
