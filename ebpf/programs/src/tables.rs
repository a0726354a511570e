//! The maps as the shared lookup reads them, and the counters.

use aya_ebpf::btf_maps::lpm_trie::Key;
use shunt_ebpf_abi::lookup::Tables;
use shunt_ebpf_abi::{
    Address, AddressFilter, Config, ENDPOINT_BLOCK, Endpoint, Event, Frontend, FrontendKey, RangeKey,
    SERVICE_BLOCK, ServiceCounters,
};

use crate::maps::{
    ADDRESS_FILTER, ADDRESSES, CONFIG, ENDPOINT_STATS, ENDPOINTS, EVENTS, FRONTENDS, MAGLEV, RANGES,
    SERVICE_BYTES, SERVICE_STATS, SLOTS,
};

/// The kernel's maps.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// Settings; their pointer stays valid, the map has one element.
    pub(crate) config: &'static Config,
}

impl Kernel {
    /// `None` never happens; the verifier does not know that.
    #[inline(always)]
    pub(crate) fn open() -> Option<Self> {
        // SAFETY: elements of arrays live as long as the map, which lives as long as the program.
        let config = unsafe { &*CONFIG.get_ptr(0)? };
        Some(Self { config })
    }
}

// Elements of hash maps are copied at once: the kernel reuses their memory when they are replaced. A program can be held up
// even then (an interrupt, a hypervisor), so where it matters the element says whose it is.
impl Tables for Kernel {
    #[inline(always)]
    fn may_know(&self, address: &Address) -> bool {
        let (word, bit) = AddressFilter::place(address);
        ADDRESS_FILTER.get(word).is_none_or(|bits| bits & bit != 0)
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        let tag = key.tag();
        for _ in 0..2 {
            let element = FRONTENDS.get_ptr(key)?;
            // SAFETY: the verifier knows the element. Volatile reads stay where they are, and what lies between them too.
            let (before, found, after) = unsafe {
                let said = &raw const (*element).tag;
                (said.read_volatile(), *element, said.read_volatile())
            };
            if before == after && (before == tag || before == 0) {
                return Some(found);
            }
        }
        None
    }

    #[inline(always)]
    fn address(&self, address: &Address) -> u32 {
        // SAFETY: see above.
        unsafe { ADDRESSES.get(address) }.copied().unwrap_or(0)
    }

    #[inline(always)]
    fn in_range(&self, owner: u32, address: &Address) -> bool {
        RANGES.get(&Key::new(RangeKey::FULL, RangeKey { owner, address: *address })).is_some()
    }

    #[inline(always)]
    fn slot(&self, number: u32) -> Option<u32> {
        SLOTS.get(number).copied()
    }

    #[inline(always)]
    fn endpoint(&self, id: u32) -> Option<Endpoint> {
        let element = ENDPOINTS.get_ptr(id)?;
        // SAFETY: the verifier knows the element. Volatile reads stay where they are, and what lies between them too.
        unsafe {
            let (service, generation) = (&raw const (*element).service, &raw const (*element).generation);
            let before = (service.read_volatile(), generation.read_volatile());
            let found = *element;
            let after = (service.read_volatile(), generation.read_volatile());
            if before.0 == after.0 && before.1 == after.1 { Some(found) } else { None }
        }
    }

    #[inline(always)]
    fn maglev(&self, group: u32, entry: u32) -> Option<u32> {
        // SAFETY: tables are never changed, and live until the program has ended.
        let table = unsafe { MAGLEV.get_value(&group, &0) }?;
        table.get(entry as usize).copied()
    }

    #[inline(always)]
    fn flags(&self) -> u32 {
        self.config.flags
    }
}

/// Counts an event.
#[inline(always)]
pub(crate) fn event(event: Event) {
    if let Some(count) = EVENTS.get_ptr_mut(event as u32) {
        // SAFETY: this CPU's element.
        unsafe { *count += 1 };
    }
}

/// What is counted of a Service.
#[derive(Clone, Copy)]
pub(crate) enum Counter {
    Rejected,
    Dropped,
}

#[inline(always)]
fn counters(service: u32) -> Option<&'static mut ServiceCounters> {
    // SAFETY: this CPU's element; arrays live as long as the program.
    let block = unsafe { &mut *SERVICE_STATS.get_ptr_mut(service / SERVICE_BLOCK)? };
    block.get_mut((service % SERVICE_BLOCK) as usize)
}

/// Counts what became of a packet that was not forwarded.
#[inline(always)]
pub(crate) fn count(service: u32, counter: Counter) {
    if let Some(counters) = counters(service) {
        match counter {
            Counter::Rejected => counters.rejected += 1,
            Counter::Dropped => counters.dropped += 1,
        }
    }
}

/// Counts a new flow of a Service and its endpoint.
#[inline(always)]
pub(crate) fn count_flow(service: u32, endpoint: u32) {
    if let Some(counters) = counters(service) {
        counters.forwarded += 1;
    }
    if let Some(block) = ENDPOINT_STATS.get_ptr_mut(endpoint / ENDPOINT_BLOCK)
        // SAFETY: as above.
        && let Some(count) = unsafe { &mut *block }.get_mut((endpoint % ENDPOINT_BLOCK) as usize)
    {
        *count += 1;
    }
}

/// Counts the bytes of a packet of a Service, to its client or from there.
#[inline(always)]
pub(crate) fn count_bytes(service: u32, response: bool, bytes: u32) {
    if let Some(block) = SERVICE_BYTES.get_ptr_mut(service / SERVICE_BLOCK)
        // SAFETY: as above.
        && let Some(counted) = unsafe { &mut *block }.get_mut((service % SERVICE_BLOCK) as usize)
    {
        if response {
            counted.response += u64::from(bytes);
        } else {
            counted.request += u64::from(bytes);
        }
    }
}
