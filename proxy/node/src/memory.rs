//! How the process keeps memory.

/// Has large buffers, from 128 KiB on, go back to the kernel when they are freed. glibc begins like that, but keeps
/// buffers of a size that was freed once (`M_MMAP_THRESHOLD` in mallopt(3)): those of the first sync, the largest ever,
/// would stay as holes between what is needed. Other C libraries are left as they are.
pub fn return_large_buffers() {
    #[cfg(target_env = "gnu")]
    // SAFETY: says when the allocator asks the kernel for memory, and nothing about memory that is in use.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024);
    }
}
