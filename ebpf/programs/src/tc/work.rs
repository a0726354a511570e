//! What is known of the packet at hand. It lies in a map, since a program has 512 bytes of stack: one
//! element a CPU, and programs at devices do not interrupt each other on a CPU.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use shunt_ebpf_abi::{AffinityKey, Endpoint, Flow, FlowKey, FragmentKey, Frontend, FrontendKey, Tuple};

/// Where in a packet things are.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    /// The IP header.
    pub(crate) l3: u32,
    /// What comes after it and its extensions.
    pub(crate) l4: u32,
    /// Bytes from there to the end, as the header says.
    pub(crate) length: u32,
    pub(crate) v4: bool,
    /// The transport header is missing: a later fragment.
    pub(crate) later: bool,
    /// A fragment at all.
    pub(crate) part: bool,
    pub(crate) protocol: u8,
    /// Checksum of the IPv4 header, as in the packet.
    pub(crate) checksum: u16,
    /// The two bytes before that, time to live and protocol.
    pub(crate) before: u16,
}

/// See above.
#[repr(C)]
pub(crate) struct Work {
    pub(crate) now: u64,
    /// Length of the header before the IP header.
    pub(crate) l2: u32,
    pub(crate) ifindex: u32,
    pub(crate) layout: Layout,
    /// It may begin a flow: TCP with SYN alone, SCTP with INIT, any UDP.
    pub(crate) begins: u32,
    /// It ends a flow in this direction.
    pub(crate) ends: u32,
    /// Its tuple, protocol and hook.
    pub(crate) key: FlowKey,
    /// There is an entry for it, even if it does not count any more.
    pub(crate) held: u32,
    /// The tuple that it becomes.
    pub(crate) to: Tuple,
    pub(crate) fragment: FragmentKey,
    // For new flows.
    pub(crate) frontend_key: FrontendKey,
    pub(crate) frontend: Frontend,
    pub(crate) endpoint: Endpoint,
    pub(crate) endpoint_id: u32,
    pub(crate) masquerade: u32,
    pub(crate) affinity_key: AffinityKey,
    pub(crate) flow_key: FlowKey,
    pub(crate) flow: Flow,
    /// Of another flow, whose port this one may take.
    pub(crate) rival_key: FlowKey,
    // For errors.
    pub(crate) inner: Layout,
    pub(crate) inner_part: FragmentKey,
    pub(crate) inner_key: FlowKey,
    pub(crate) sent: Tuple,
    pub(crate) quote: [u32; 15],
}

#[btf_map(name = "work")]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

/// This CPU's element. `None` never happens; the verifier does not know that.
#[inline(always)]
pub(crate) fn work() -> Option<&'static mut Work> {
    // SAFETY: see above.
    Some(unsafe { &mut *WORK.get_ptr_mut(0)? })
}

/// Copies a tuple word by word: as a whole the compiler leaves it to `memmove`, byte by byte.
#[inline(always)]
pub(crate) fn copy(to: &mut Tuple, from: &Tuple) {
    let (to, from) = ((&raw mut *to).cast::<u32>(), (&raw const *from).cast::<u32>());
    for word in 0..size_of::<Tuple>() / 4 {
        // SAFETY: both have so many words.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
    }
}

/// A value of zeroes, written word by word: the compiler leaves it to `memset` otherwise, which it then
/// compiles into a call of itself.
///
/// # Safety
/// All bits zero must be a value of the type, and its size a multiple of 8.
#[inline(always)]
pub(crate) unsafe fn zeroed<T>() -> T {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    for word in 0..size_of::<T>() / 8 {
        // SAFETY: inside the value.
        unsafe { value.as_mut_ptr().cast::<u64>().add(word).write_volatile(0) };
    }
    // SAFETY: the caller says so.
    unsafe { value.assume_init() }
}
