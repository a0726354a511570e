//! `connect(2)`: TCP, and UDP sockets that keep to one peer.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use shunt_ebpf_abi::FrontendKey;

use super::{ALLOW, Call, Family, Route, TCP, UDP, deny, peer, route};
use crate::tables::Kernel;

#[cgroup_sock_addr(connect4)]
pub fn connect4(context: SockAddrContext) -> i32 {
    connect(&Call::new(&context, Family::V4))
}

/// Also `::ffff:a.b.c.d`.
#[cgroup_sock_addr(connect6)]
pub fn connect6(context: SockAddrContext) -> i32 {
    connect(&Call::new(&context, Family::V6))
}

#[inline(always)]
fn connect(call: &Call<'_>) -> i32 {
    let Some(kernel) = Kernel::open() else { return ALLOW };
    let key =
        FrontendKey { address: call.address(), port: call.port(), protocol: call.protocol(), reserved: 0 };
    if key.protocol != TCP && key.protocol != UDP {
        return ALLOW;
    }
    match route(&kernel, call, &key) {
        Route::Pass => ALLOW,
        Route::To(id, endpoint, service) => {
            peer::remember(call.cookie(), &key, id, &endpoint, service);
            call.set(&endpoint.address, endpoint.port);
            ALLOW
        }
        Route::Refuse(error) => deny(error),
    }
}
