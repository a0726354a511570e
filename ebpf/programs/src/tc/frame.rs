//! Access to a packet, whatever holds it: today a socket buffer, later also a frame at XDP.

use aya_ebpf::bindings::{__sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::{bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes};

/// Bytes of a packet, and its checksums. Offsets count from its first byte.
pub(crate) trait Frame: Copy {
    /// Reads a value that any bytes make.
    fn read<T: Copy>(&self, offset: u32) -> Option<T>;
    /// Reads a value, `further` bytes after an offset that is a constant, straight from the packet. `None` where the
    /// packet does not lie in one piece up to there.
    fn peek<T: Copy>(&self, offset: u32, further: u32) -> Option<T>;
    /// Reads bytes into memory.
    fn load<T: Copy>(&self, offset: u32, to: &mut T, size: u32) -> Option<()>;
    /// Writes a value whose change a checksum inside the packet makes up for.
    fn write<T: Copy>(&self, offset: u32, value: &T) -> Option<()>;
    /// Writes an address of an IPv6 header: no checksum there makes up for it.
    fn write_address6(&self, offset: u32, value: &[u32; 4]) -> Option<()>;
    /// Mends the checksum of an IPv4 header for a changed word.
    fn mend_header(&self, offset: u32, from: u32, to: u32) -> Option<()>;
    /// Mends the checksum of a transport header for a changed word.
    fn mend_word(&self, offset: u32, from: u32, to: u32, flags: u64) -> Option<()>;
    /// Mends the checksum of a transport header by a difference (of `bpf_csum_diff`).
    fn mend(&self, offset: u32, difference: u32, flags: u64) -> Option<()>;
}

/// The changed word belongs to the pseudo header.
pub(crate) const PSEUDO: u64 = BPF_F_PSEUDO_HDR as u64;

/// A socket buffer.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Frame for Skb {
    #[inline(always)]
    fn read<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut value = core::mem::MaybeUninit::<T>::uninit();
        // SAFETY: the helper fills the value or fails.
        unsafe {
            let size = size_of::<T>() as u32;
            if bpf_skb_load_bytes(self.0.cast(), offset, value.as_mut_ptr().cast(), size) != 0 {
                return None;
            }
            Some(value.assume_init())
        }
    }

    #[inline(always)]
    fn peek<T: Copy>(&self, offset: u32, further: u32) -> Option<T> {
        // SAFETY: the verifier sees that what is read lies before the end. What follows an Ethernet header is read in
        // words, as the kernel's own code reads it: an unaligned read is compiled to one for each byte, and the compiler
        // takes this for the host's code, with no way to say what eBPF can read.
        unsafe {
            let start = (*self.0).data as usize + offset as usize + further as usize;
            if start + size_of::<T>() <= (*self.0).data_end as usize {
                let (start, words) = (start as *const T, (offset + further) & 3 == 2);
                return Some(if words || align_of::<T>() == 1 {
                    start.read()
                } else {
                    start.read_unaligned()
                });
            }
        }
        None
    }

    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32, to: &mut T, size: u32) -> Option<()> {
        if size as usize > size_of::<T>() {
            return None;
        }
        // SAFETY: there is room for what is asked for.
        done(unsafe { bpf_skb_load_bytes(self.0.cast(), offset, (&raw mut *to).cast(), size) })
    }

    #[inline(always)]
    fn write<T: Copy>(&self, offset: u32, value: &T) -> Option<()> {
        // SAFETY: the helper reads the value.
        done(unsafe {
            bpf_skb_store_bytes(self.0, offset, (&raw const *value).cast(), size_of::<T>() as u32, 0)
        })
    }

    #[inline(always)]
    fn write_address6(&self, offset: u32, value: &[u32; 4]) -> Option<()> {
        let flags = u64::from(BPF_F_RECOMPUTE_CSUM);
        // SAFETY: the helper reads the value.
        done(unsafe { bpf_skb_store_bytes(self.0, offset, value.as_ptr().cast(), 16, flags) })
    }

    #[inline(always)]
    fn mend_header(&self, offset: u32, from: u32, to: u32) -> Option<()> {
        // SAFETY: the helper checks the offset.
        done(unsafe { bpf_l3_csum_replace(self.0, offset, from.into(), to.into(), 4) })
    }

    #[inline(always)]
    fn mend_word(&self, offset: u32, from: u32, to: u32, flags: u64) -> Option<()> {
        // SAFETY: the helper checks the offset.
        done(unsafe { bpf_l4_csum_replace(self.0, offset, from.into(), to.into(), flags | 4) })
    }

    #[inline(always)]
    fn mend(&self, offset: u32, difference: u32, flags: u64) -> Option<()> {
        // SAFETY: the helper checks the offset.
        done(unsafe { bpf_l4_csum_replace(self.0, offset, 0, difference.into(), flags) })
    }
}

#[inline(always)]
const fn done(result: i64) -> Option<()> {
    if result == 0 { Some(()) } else { None }
}
