//! `getpeername(2)`: the peer is the frontend that the process connected to.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use super::{ALLOW, Call, Family};

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(context: SockAddrContext) -> i32 {
    let call = Call::new(&context, Family::V4);
    call.restore(call.protocol());
    ALLOW
}

/// Also `::ffff:a.b.c.d`.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(context: SockAddrContext) -> i32 {
    let call = Call::new(&context, Family::V6);
    call.restore(call.protocol());
    ALLOW
}
