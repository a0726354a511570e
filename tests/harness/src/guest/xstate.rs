//! `ptrace(2)` for User-Mode Linux on processors whose registers take more room than it knows of.
//!
//! Linux 6.1's UML keeps 2,696 bytes of `NT_X86_XSTATE`: what AVX-512 needs. With AMX there are 11,008, and the machine's
//! kernel refuses to set a part (`xstateregs_set`), so that the guest's first process is killed. Loaded before the C
//! library, this sets what UML gives and leaves the rest as it is.
//!
//! A library of its own, made by `build.rs`: no module of this crate.
#![no_std]

use core::ffi::{c_char, c_int, c_long, c_void};

const GETREGSET: c_int = 0x4204;
const SETREGSET: c_int = 0x4205;
const NT_X86_XSTATE: usize = 0x202;
const RTLD_NEXT: *mut c_void = -1_isize as *mut c_void;

#[repr(C)]
struct Vector {
    base: *mut c_void,
    length: usize,
}

type Ptrace = unsafe extern "C" fn(c_int, c_int, *mut c_void, *mut c_void) -> c_long;

#[link(name = "c")]
unsafe extern "C" {
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// More than there is on any processor. UML's kernel has one thread that asks, and little stack.
static mut WHOLE: [u64; 8 << 10] = [0; 8 << 10];

/// See `ptrace(2)`.
///
/// # Safety
/// As of `ptrace(2)`; one thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ptrace(
    request: c_int,
    process: c_int,
    address: *mut c_void,
    data: *mut c_void,
) -> c_long {
    // SAFETY: the C library has a function of this name and type. `data` is a vector where register sets are meant, and
    // as many bytes as it says lie before the end of `WHOLE`, since the machine gave more.
    unsafe {
        let found = dlsym(RTLD_NEXT, c"ptrace".as_ptr());
        let ptrace = core::mem::transmute::<*mut c_void, Ptrace>(found);
        if request == SETREGSET && address as usize == NT_X86_XSTATE {
            let given = &*data.cast::<Vector>();
            let base = (&raw mut WHOLE).cast::<c_void>();
            let mut whole = Vector { base, length: size_of::<[u64; 8 << 10]>() };
            let all = (&raw mut whole).cast();
            if ptrace(GETREGSET, process, address, all) == 0 && whole.length > given.length {
                base.copy_from_nonoverlapping(given.base, given.length);
                return ptrace(request, process, address, all);
            }
        }
        ptrace(request, process, address, data)
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
