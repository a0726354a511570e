//! The endpoint of a new flow: the one that the client had, or one by chance or by hash.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use shunt_ebpf_abi::lookup::{Tables as _, choose, hashed, is_member, maglev_entry};
use shunt_ebpf_abi::{Affinity, AffinityKey, Endpoint, Event, Frontend, FrontendKey, Tuple, frontend_flags};

use crate::maps::AFFINITY;
use crate::tables::{Kernel, event};
use crate::tc::Work;

/// Who asks.
pub(crate) struct Asker<'a> {
    /// Under which key the client's affinity is kept.
    pub(crate) affinity: &'a AffinityKey,
    /// The packet, where there is one: what a Maglev table hashes.
    pub(crate) tuple: Option<&'a Tuple>,
}

/// The endpoint of a new flow to `frontend`, with its id.
#[inline(always)]
pub(crate) fn pick(
    kernel: &Kernel,
    key: &FrontendKey,
    frontend: &Frontend,
    local: bool,
    asker: &Asker<'_>,
) -> Option<(u32, Endpoint)> {
    if frontend.affinity == 0 {
        return pick_anew(kernel, key, frontend, local, asker.tuple);
    }
    // SAFETY: the helper reads a clock.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    let record = AFFINITY.get_ptr_mut(asker.affinity);
    if let Some(record) = record
        && let Some(found) = recall(kernel, frontend, local, record, now)
    {
        return Some(found);
    }
    let (id, endpoint) = pick_anew(kernel, key, frontend, local, asker.tuple)?;
    let affinity = Affinity { last_used: now, endpoint: id, generation: endpoint.generation };
    // A stale record is replaced. Of two first flows at the same time, the second finds the record of
    // the first in the way, and follows it.
    let flags = if record.is_some() { BPF_ANY } else { BPF_NOEXIST };
    if AFFINITY.insert(asker.affinity, affinity, flags.into()).is_err()
        && let Some(record) = AFFINITY.get_ptr_mut(asker.affinity)
        && let Some(found) = recall(kernel, frontend, local, record, now)
    {
        return Some(found);
    }
    Some((id, endpoint))
}

/// What a record says, if it still holds; its time is renewed.
#[inline(always)]
fn recall(
    kernel: &Kernel,
    frontend: &Frontend,
    local: bool,
    record: *mut Affinity,
    now: u64,
) -> Option<(u32, Endpoint)> {
    // SAFETY: the verifier knows the element; at worst another CPU renews it at the same time.
    let Affinity { last_used, endpoint: id, generation } = unsafe { *record };
    if now.wrapping_sub(last_used) > u64::from(frontend.affinity) * 1_000_000_000 {
        return None;
    }
    let endpoint = kernel.endpoint(id)?;
    if endpoint.generation != generation || !is_member(&endpoint, frontend.service, local) {
        return None;
    }
    // SAFETY: as above.
    unsafe { (*record).last_used = now };
    Some((id, endpoint))
}

/// The same for a packet at tc: key, frontend and asker are in `work`, where the endpoint is put too. 0
/// when there is one.
#[inline(never)]
pub(crate) fn pick_by_packet(work: &mut Work, local: bool) -> u32 {
    let Some(kernel) = Kernel::open() else { return 1 };
    let asker = Asker { affinity: &work.affinity_key, tuple: Some(&work.key.tuple) };
    match pick(&kernel, &work.frontend_key, &work.frontend, local, &asker) {
        Some((id, endpoint)) => {
            work.endpoint_id = id;
            work.endpoint = endpoint;
            0
        }
        None => 1,
    }
}

#[inline(always)]
fn pick_anew(
    kernel: &Kernel,
    key: &FrontendKey,
    frontend: &Frontend,
    local: bool,
    tuple: Option<&Tuple>,
) -> Option<(u32, Endpoint)> {
    if let Some(tuple) = tuple
        && frontend.flags & frontend_flags::MAGLEV != 0
    {
        let entry = maglev_entry(kernel.config.maglev_seed, tuple, key.protocol);
        if let Some(found) = hashed(kernel, frontend, local, entry) {
            return Some(found);
        }
    }
    // SAFETY: the helper only makes a number.
    let random = unsafe { bpf_get_prandom_u32() };
    let found = choose(kernel, key, frontend, local, random);
    if found.is_none() {
        event(Event::NoEndpoint);
    }
    found
}
