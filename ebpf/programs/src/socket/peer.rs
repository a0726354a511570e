//! What connected sockets were promised: one write to a ring, where an entry of a hash table that evicts others took
//! twice as long as all the rest of `connect(2)`'s hook.

use shunt_ebpf_abi::{Address, Endpoint, FrontendKey, Peer};

use crate::maps::PEERS;

/// Remembers that the socket's peer at the endpoint is the frontend.
#[inline(always)]
pub(super) fn remember(cookie: u64, key: &FrontendKey, id: u32, endpoint: &Endpoint, service: u32) {
    let Some(peer) = PEERS.get_ptr_mut(Peer::place(cookie)) else { return };
    // SAFETY: the verifier knows the element. Somebody else writes it only for a socket that came a whole turn of the
    // ring earlier or later; whoever reads meanwhile finds another cookie, before or after.
    unsafe {
        (&raw mut (*peer).cookie).write_volatile(0);
        for word in 0..4 {
            (&raw mut (*peer).endpoint.0[word]).write_volatile(endpoint.address.0[word]);
            (&raw mut (*peer).frontend.0[word]).write_volatile(key.address.0[word]);
        }
        (&raw mut (*peer).endpoint_port).write_volatile(endpoint.port);
        (&raw mut (*peer).frontend_port).write_volatile(key.port);
        (&raw mut (*peer).service).write_volatile(service);
        (&raw mut (*peer).id).write_volatile(id);
        (&raw mut (*peer).generation).write_volatile(endpoint.generation);
        (&raw mut (*peer).protocol).write_volatile(key.protocol);
        (&raw mut (*peer).cookie).write_volatile(cookie);
    }
}

/// The frontend that the socket knows as what is at `address` and `port`.
#[inline(always)]
pub(super) fn recall(cookie: u64, address: &Address, port: u16) -> Option<(Address, u16)> {
    let peer = PEERS.get_ptr(Peer::place(cookie))?;
    // SAFETY: as above.
    unsafe {
        if (&raw const (*peer).cookie).read_volatile() != cookie {
            return None;
        }
        let (mut endpoint, mut frontend) = (Address::ANY, Address::ANY);
        for word in 0..4 {
            endpoint.0[word] = (&raw const (*peer).endpoint.0[word]).read_volatile();
            frontend.0[word] = (&raw const (*peer).frontend.0[word]).read_volatile();
        }
        let endpoint_port = (&raw const (*peer).endpoint_port).read_volatile();
        let frontend_port = (&raw const (*peer).frontend_port).read_volatile();
        let held = (&raw const (*peer).cookie).read_volatile() == cookie;
        (held && endpoint.same(address) && endpoint_port == port).then_some((frontend, frontend_port))
    }
}
