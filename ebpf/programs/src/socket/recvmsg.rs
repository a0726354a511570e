//! `recvmsg(2)` and `recvfrom(2)` of UDP sockets: who answered is the frontend.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use super::{ALLOW, Call, Family, UDP};

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(context: SockAddrContext) -> i32 {
    Call::new(&context, Family::V4).restore(UDP);
    ALLOW
}

/// Also `::ffff:a.b.c.d`.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(context: SockAddrContext) -> i32 {
    Call::new(&context, Family::V6).restore(UDP);
    ALLOW
}
