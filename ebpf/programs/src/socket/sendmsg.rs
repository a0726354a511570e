//! `sendmsg(2)` and `sendto(2)` of UDP sockets that name the peer each time. A socket stays with its
//! endpoint of each frontend as long as that serves.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use shunt_ebpf_abi::lookup::{Tables as _, is_serving};
use shunt_ebpf_abi::{Event, FrontendKey, SocketKey, SocketRecord};

use super::{ALLOW, Call, Family, Route, UDP, deny, remember_reverse, route};
use crate::maps::SOCKETS;
use crate::tables::{Kernel, event};

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(context: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&context, Family::V4))
}

/// Also `::ffff:a.b.c.d`.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(context: SockAddrContext) -> i32 {
    sendmsg(&Call::new(&context, Family::V6))
}

#[inline(always)]
fn sendmsg(call: &Call<'_>) -> i32 {
    let Some(kernel) = Kernel::open() else { return ALLOW };
    let key = FrontendKey { address: call.address(), port: call.port(), protocol: UDP, reserved: 0 };
    let forward = SocketKey {
        cookie: call.cookie(),
        address: key.address,
        port: key.port,
        direction: SocketKey::FORWARD,
        protocol: UDP,
        reserved: 0,
    };
    // SAFETY: copied at once.
    if let Some(record) = unsafe { SOCKETS.get(forward) }.copied() {
        let serving = kernel.endpoint(record.endpoint);
        if serving.is_some_and(|e| is_serving(&e, record.service, record.generation)) {
            call.set(&record.address, record.port);
            return ALLOW;
        }
        event(Event::Repicked);
        let _ = SOCKETS.remove(forward);
    }
    match route(&kernel, call, &key) {
        Route::Pass => ALLOW,
        Route::To(id, endpoint, service) => {
            let record = SocketRecord {
                address: endpoint.address,
                port: endpoint.port,
                reserved: 0,
                service,
                endpoint: id,
                generation: endpoint.generation,
            };
            let _ = SOCKETS.insert(forward, record, BPF_ANY.into());
            remember_reverse(forward.cookie, &key, id, &endpoint, service);
            call.set(&endpoint.address, endpoint.port);
            ALLOW
        }
        Route::Refuse(error) => deny(error),
    }
}
