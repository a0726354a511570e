//! System calls that aya does not offer: elements of maps in batches or as memory, and another program under a
//! link that stays. The only unsafe code of the mode.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aya::Pod;
use aya::maps::MapData;
use shunt_ebpf_abi::RangeKey;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_MAP_UPDATE_BATCH: libc::c_long = 26;
const BPF_MAP_DELETE_BATCH: libc::c_long = 27;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// Gives memory that is free back to the kernel: threads keep what they had for a moment otherwise.
pub(super) fn return_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: frees nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// `bpf(2)` with a part of `union bpf_attr`.
fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a prefix of `union bpf_attr` of the length given, and outlives the call; the
    // callers see to it that its pointers lead to buffers of the lengths that the kernel takes them to
    // have.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens what is pinned at a path: a map, a program or a link.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Attr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    owned(bpf(BPF_OBJ_GET, &mut attr)?)
}

/// Puts a program under a link in place of the one there: no packet meets neither.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: i32,
        program: i32,
        flags: u32,
        old_program: u32,
    }
    let mut attr = Attr { link: link.as_raw_fd(), program: program.as_raw_fd(), flags: 0, old_program: 0 };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Takes a link off what it is at, at once. One that was taken off already, because its device is gone, stays so.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: i32,
    }
    bpf(BPF_LINK_DETACH, &mut Attr { link: link.as_raw_fd() }).map(drop)
}

/// Whether programs can be linked to devices (TCX). Asked with a device that there is not, so that nothing
/// happens.
pub(super) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    const BPF_TCX_INGRESS: u32 = 46;
    #[repr(C)]
    struct Attr {
        program: i32,
        device: i32,
        attach_type: u32,
        flags: u32,
    }
    let program = program.as_raw_fd();
    let mut attr = Attr { program, device: i32::MAX, attach_type: BPF_TCX_INGRESS, flags: 0 };
    let refused = bpf(BPF_LINK_CREATE, &mut attr).err().and_then(|error| error.raw_os_error());
    refused == Some(libc::ENODEV)
}

/// The cookie of the calling thread's network namespace (`SO_NETNS_COOKIE`).
pub(super) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket =
        std::net::UdpSocket::bind(("127.0.0.1", 0)).or_else(|_| std::net::UdpSocket::bind(("0.0.0.0", 0)))?;
    let (mut cookie, mut len) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the buffer is as long as `len` says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut len,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// A key of a map of ranges: the length of the prefix, then what it is a prefix of.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Prefix {
    /// Bits of the key that count.
    pub(super) length: u32,
    /// The key.
    pub(super) key: RangeKey,
}

// SAFETY: repr(C), Copy, of integers only, without padding.
unsafe impl Pod for Prefix {}

const _: () = assert!(size_of::<Prefix>() == 24);

#[repr(C)]
#[derive(Default)]
struct Element {
    map: i32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct Batch {
    from: u64,
    reached: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: i32,
    element_flags: u64,
    flags: u64,
}

/// A map, read and written in batches.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    map: MapData,
    types: PhantomData<fn() -> (K, V)>,
}

/// Elements that one call writes at most.
pub(super) const BATCH: usize = 16_384;

/// Where elements are not allocated beforehand, the kernel keeps memory at hand for a few (`bpf_mem_alloc`, since Linux 6.1),
/// gets more in an interrupt or at the next tick, and refuses more elements until then.
const REST: Duration = Duration::from_millis(2);
/// How often in a row that is waited for.
const RESTS: u32 = 50;

/// Bytes that one call reads, about.
const READ: usize = 256 << 10;

impl<K: Pod + Default, V: Pod + Default> Table<K, V> {
    /// Checks that keys and values have the sizes of the types.
    pub(super) fn new(map: MapData) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        let (key, value) = (size_of::<K>(), size_of::<V>());
        if (info.key_size() as usize, info.value_size() as usize) != (key, value) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "its elements are of {}+{} bytes, not {key}+{value}",
                    info.key_size(),
                    info.value_size()
                ),
            ));
        }
        Ok(Self { map, types: PhantomData })
    }

    /// Number of elements that it has room for.
    pub(super) fn size(&self) -> io::Result<u32> {
        Ok(self.map.info().map_err(io::Error::other)?.max_entries())
    }

    fn batch(&self, count: usize) -> Batch {
        Batch { map: self.map.fd().as_fd().as_raw_fd(), count: count as u32, ..Batch::default() }
    }

    /// Writes elements, in order.
    pub(super) fn update(&self, keys: &[K], values: &[V]) -> io::Result<()> {
        let (end, mut next, mut rests) = (keys.len().min(values.len()), 0, 0);
        while next < end {
            let some = next..end.min(next + BATCH);
            let mut attr = self.batch(some.len());
            (attr.keys, attr.values) =
                (keys[some.clone()].as_ptr() as u64, values[some.clone()].as_ptr() as u64);
            match bpf(BPF_MAP_UPDATE_BATCH, &mut attr) {
                Ok(_) => next = some.end,
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && rests < RESTS => {
                    // It says how many it wrote, unless it had not even begun.
                    let written = attr.count as usize;
                    next += if written < some.len() { written } else { 0 };
                    rests += 1;
                    std::thread::sleep(REST);
                }
                Err(error) => return Err(error),
            }
            if next > some.start {
                rests = 0;
            }
        }
        Ok(())
    }

    /// Writes an element unless there is one with that key; whether there was none.
    pub(super) fn insert_new(&self, key: K, value: V) -> io::Result<bool> {
        #[repr(C)]
        struct Attr {
            map: i32,
            reserved: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        const BPF_NOEXIST: u64 = 1;
        let mut attr = Attr {
            map: self.map.fd().as_fd().as_raw_fd(),
            reserved: 0,
            key: (&raw const key) as u64,
            value: (&raw const value) as u64,
            flags: BPF_NOEXIST,
        };
        match bpf(BPF_MAP_UPDATE_ELEM, &mut attr) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// Deletes elements, in order.
    pub(super) fn delete(&self, keys: &[K]) -> io::Result<()> {
        for keys in keys.chunks(BATCH) {
            let mut attr = self.batch(keys.len());
            attr.keys = keys.as_ptr() as u64;
            bpf(BPF_MAP_DELETE_BATCH, &mut attr)?;
        }
        Ok(())
    }

    /// Reads all elements, in the map's own order.
    pub(super) fn read(&self, mut each: impl FnMut(K, V)) -> io::Result<()> {
        let mut reader = Reader::new(READ / (size_of::<K>() + size_of::<V>()).max(1));
        loop {
            let (elements, end) = reader.next(self)?;
            elements.for_each(|(key, value)| each(key, value));
            if end {
                return Ok(());
            }
        }
    }

    fn element(&self, key: &K) -> Element {
        let key = std::ptr::from_ref(key) as u64;
        Element { map: self.map.fd().as_fd().as_raw_fd(), key, ..Element::default() }
    }

    /// The value of a key. No use in the sense of least recently used.
    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::default();
        let mut attr = Element { value: std::ptr::from_mut(&mut value) as u64, ..self.element(key) };
        match bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes one element.
    pub(super) fn set(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = Element { value: std::ptr::from_ref(value) as u64, ..self.element(key) };
        bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
    }

    /// Deletes one element, if it is there.
    pub(super) fn remove(&self, key: &K) -> io::Result<()> {
        match bpf(BPF_MAP_DELETE_ELEM, &mut self.element(key)) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }
}

/// Reads a map in parts.
#[derive(Debug)]
pub(super) struct Reader<K, V> {
    keys: Vec<K>,
    values: Vec<V>,
    /// The kernel's mark of how far it came: a key, or a number.
    mark: Vec<u64>,
    begun: bool,
}

impl<K: Pod + Default, V: Pod + Default> Reader<K, V> {
    /// A reader at the start, of so many elements at a time.
    pub(super) fn new(batch: usize) -> Self {
        Self {
            keys: vec![K::default(); batch],
            values: vec![V::default(); batch],
            mark: vec![0; size_of::<K>().div_ceil(8).max(1)],
            begun: false,
        }
    }

    /// The next elements, and whether they are the last: the reader is then at the start again.
    pub(super) fn next(&mut self, table: &Table<K, V>) -> io::Result<(impl Iterator<Item = (K, V)>, bool)> {
        let mut attr = table.batch(self.keys.len());
        attr.from = if self.begun { self.mark.as_ptr() as u64 } else { 0 };
        attr.reached = self.mark.as_mut_ptr() as u64;
        (attr.keys, attr.values) = (self.keys.as_mut_ptr() as u64, self.values.as_mut_ptr() as u64);
        let end = match bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        self.begun = !end;
        let elements = self.keys.iter().copied().zip(self.values.iter().copied());
        Ok((elements.take(attr.count as usize), end))
    }
}

const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Bytes of an array that are mapped at a time: what is mapped counts as the process's memory.
const WINDOW: usize = 1 << 20;

impl<V: Pod + Default> Table<u32, V> {
    /// From one element to the next.
    const STRIDE: usize = {
        let stride = size_of::<V>().next_multiple_of(8);
        assert!(WINDOW.is_multiple_of(stride));
        stride
    };

    /// [`Table::read`] of an array, as memory where the map was made for that.
    pub(super) fn read_array(&self, mut each: impl FnMut(u32, V)) -> io::Result<()> {
        let info = self.map.info().map_err(io::Error::other)?;
        if info.map_flags() & BPF_F_MMAPABLE == 0 {
            return self.read(each);
        }
        let per_window = (WINDOW / Self::STRIDE) as u32;
        for first in (0..info.max_entries()).step_by(per_window as usize) {
            let count = per_window.min(info.max_entries() - first);
            let (start, len) = (first as usize * Self::STRIDE, count as usize * Self::STRIDE);
            let window = Window::map(&self.map, start, len, libc::PROT_READ)?;
            for n in 0..count {
                // SAFETY: the element lies in the window, which is aligned to pages, and any bits are a value of the
                // type. Nobody but an agent writes it.
                let value = unsafe { window.start.add(n as usize * Self::STRIDE).cast::<V>().read() };
                each(first + n, value);
            }
        }
        Ok(())
    }
}

impl Table<u32, u64> {
    /// Sets bits of the words of an array that was made to be mapped. What others set at the same time is set too.
    pub(super) fn set_bits(&self, places: impl Iterator<Item = (u32, u64)>) -> io::Result<()> {
        let mut places = places.peekable();
        if places.peek().is_none() {
            return Ok(());
        }
        let words = self.size()?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let window = Window::map(&self.map, 0, words as usize * size_of::<u64>(), access)?;
        for (word, bit) in places.filter(|(word, _)| *word < words) {
            // SAFETY: the word lies in the window, which is aligned to pages and can be written.
            let word = unsafe { AtomicU64::from_ptr(window.start.cast::<u64>().add(word as usize)) };
            word.fetch_or(bit, Ordering::Release);
        }
        Ok(())
    }
}

/// A part of an array as memory.
struct Window {
    start: *mut libc::c_void,
    len: usize,
}

impl Window {
    fn map(map: &MapData, offset: usize, len: usize, access: libc::c_int) -> io::Result<Self> {
        let fd = map.fd().as_fd().as_raw_fd();
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping touches no memory of ours.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.len) };
    }
}
