//! Hooks at sockets: a process that talks to a Service talks to an endpoint from the start.
//!
//! A Service without endpoints refuses with `ECONNREFUSED`: what a process gets where the refusal comes
//! as an ICMP error. What would be dropped, and what depends on a source address that is not chosen
//! yet, goes on as it is: tc sees the packets. The node's own packets to its own addresses leave by no
//! device; what of them would be dropped fails with `EPERM`, like a packet that a firewall drops on its way out.

mod bind;
mod connect;
mod getpeername;
mod peer;
mod recvmsg;
mod sendmsg;
mod source;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_ANY, bpf_sock_addr};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::programs::SockAddrContext;
use shunt_ebpf_abi::lookup::{Class, Found, Judgement, find, is_local, judge, may_pass};
use shunt_ebpf_abi::{
    Address, AffinityKey, Endpoint, Event, FrontendKey, SocketKey, SocketRecord, config_flags, frontend_flags,
};

use crate::maps::SOCKETS;
use crate::pick::{Asker, pick};
use crate::tables::{Counter, Kernel, count, count_flow, event};

/// The system call goes on.
pub(crate) const ALLOW: i32 = 1;
/// It fails with the error that was set.
const DENY: i32 = 0;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

const EPERM: i32 = 1;
const ECONNREFUSED: i32 = 111;
const EADDRINUSE: i32 = 98;

/// Families of the address in the hook's context: the last digit of its name.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// A socket's system call with an address.
pub(crate) struct Call<'a> {
    context: &'a SockAddrContext,
    family: Family,
}

impl<'a> Call<'a> {
    #[inline(always)]
    pub(crate) const fn new(context: &'a SockAddrContext, family: Family) -> Self {
        Self { context, family }
    }

    #[inline(always)]
    const fn raw(&self) -> *mut bpf_sock_addr {
        self.context.sock_addr
    }

    /// The address that the process gave, or is about to be given.
    #[inline(always)]
    fn address(&self) -> Address {
        // SAFETY: the verifier knows the context; words are read one by one, as it asks.
        unsafe {
            match self.family {
                Family::V4 => Address::v4((&raw const (*self.raw()).user_ip4).read_volatile()),
                Family::V6 => Address([
                    (&raw const (*self.raw()).user_ip6[0]).read_volatile(),
                    (&raw const (*self.raw()).user_ip6[1]).read_volatile(),
                    (&raw const (*self.raw()).user_ip6[2]).read_volatile(),
                    (&raw const (*self.raw()).user_ip6[3]).read_volatile(),
                ]),
            }
        }
    }

    #[inline(always)]
    fn port(&self) -> u16 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).user_port).read_volatile() as u16 }
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.raw()).protocol).read_volatile() as u8 }
    }

    #[inline(always)]
    fn set(&self, address: &Address, port: u16) {
        // SAFETY: as above.
        unsafe {
            match self.family {
                Family::V4 => (&raw mut (*self.raw()).user_ip4).write_volatile(address.word4()),
                Family::V6 => {
                    (&raw mut (*self.raw()).user_ip6[0]).write_volatile(address.0[0]);
                    (&raw mut (*self.raw()).user_ip6[1]).write_volatile(address.0[1]);
                    (&raw mut (*self.raw()).user_ip6[2]).write_volatile(address.0[2]);
                    (&raw mut (*self.raw()).user_ip6[3]).write_volatile(address.0[3]);
                }
            }
            (&raw mut (*self.raw()).user_port).write_volatile(u32::from(port));
        }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the context is the hook's own.
        unsafe { bpf_get_socket_cookie(self.context.as_ptr()) }
    }

    #[inline(always)]
    fn netns(&self) -> u64 {
        // SAFETY: the context is the hook's own.
        unsafe { bpf_get_netns_cookie(self.context.as_ptr()) }
    }

    /// Tells the process that `address` and `port` are those of the frontend that it knows.
    #[inline(always)]
    pub(crate) fn restore(&self, protocol: u8) {
        let (cookie, address, port) = (self.cookie(), self.address(), self.port());
        if let Some((frontend, frontend_port)) = peer::recall(cookie, &address, port) {
            self.set(&frontend, frontend_port);
            return;
        }
        let key = SocketKey { cookie, address, port, direction: SocketKey::REVERSE, protocol, reserved: 0 };
        // SAFETY: copied at once.
        if let Some(record) = unsafe { SOCKETS.get(key) }.copied() {
            self.set(&record.address, record.port);
        }
    }
}

/// Fails the system call with an error.
#[inline(always)]
fn deny(error: i32) -> i32 {
    // SAFETY: sets what the system call returns.
    unsafe { bpf_set_retval(-error) };
    DENY
}

/// The class of a process: all of the node's own namespace are the node, all others local pods, where
/// there is a way to tell those at all.
#[inline(always)]
fn class(kernel: &Kernel, netns: u64, address: &Address) -> Class {
    let by_range =
        if address.is_v4() { config_flags::PODS_BY_RANGE_V4 } else { config_flags::PODS_BY_RANGE_V6 };
    if netns == kernel.config.host_netns {
        Class::Node
    } else if kernel.config.flags & (by_range | config_flags::PODS_BY_INTERFACE) != 0 {
        Class::Pod
    } else {
        Class::Other
    }
}

/// Where a socket's traffic to an address goes.
pub(crate) enum Route {
    /// As it is.
    Pass,
    /// To an endpoint.
    To(u32, Endpoint, u32),
    /// Nowhere: the process is told so with this error.
    Refuse(i32),
}

/// Asks the table where new traffic to `key` goes.
#[inline(always)]
pub(crate) fn route(kernel: &Kernel, call: &Call<'_>, key: &FrontendKey) -> Route {
    let netns = call.netns();
    // A pod's loopback is its own.
    if key.address.is_loopback() && netns != kernel.config.host_netns {
        return Route::Pass;
    }
    let frontend = match find(kernel, key) {
        Found::Frontend(frontend) => frontend,
        Found::UnknownPort => {
            event(Event::UnknownPort);
            return Route::Refuse(ECONNREFUSED);
        }
        Found::Unallocated | Found::Nothing => return Route::Pass,
    };
    let on_node = netns == kernel.config.host_netns;
    if frontend.flags & frontend_flags::SOURCE_RANGES != 0 {
        let source = call.source(kernel, on_node, &key.address);
        if source.is_unspecified() {
            return Route::Pass;
        }
        if !may_pass(kernel, &frontend, &source, &key.address) {
            return dropped(kernel, on_node, key, frontend.service);
        }
    }
    match judge(&frontend, class(kernel, netns, &key.address)) {
        Judgement::Forward { local, masquerade } => {
            let affinity =
                AffinityKey { client: Address::ANY, netns, service: frontend.service, reserved: 0 };
            match pick(kernel, key, &frontend, local, &Asker { affinity: &affinity, tuple: None }) {
                Some((id, endpoint)) => {
                    count_flow(frontend.service, id);
                    if masquerade && on_node {
                        source::masquerade(kernel, call, key, id, &endpoint, frontend.service);
                    }
                    Route::To(id, endpoint, frontend.service)
                }
                None => Route::Pass,
            }
        }
        Judgement::Reject => {
            count(frontend.service, Counter::Rejected);
            Route::Refuse(ECONNREFUSED)
        }
        Judgement::Drop => dropped(kernel, on_node, key, frontend.service),
    }
}

/// Where that goes which is to be dropped: on, if tc will see it.
#[inline(always)]
fn dropped(kernel: &Kernel, on_node: bool, key: &FrontendKey, service: u32) -> Route {
    if on_node && is_local(kernel, &key.address) {
        count(service, Counter::Dropped);
        Route::Refuse(EPERM)
    } else {
        Route::Pass
    }
}

/// Remembers that what comes from the endpoint comes from the frontend.
#[inline(always)]
pub(crate) fn remember_reverse(cookie: u64, key: &FrontendKey, id: u32, endpoint: &Endpoint, service: u32) {
    let reverse = SocketKey {
        cookie,
        address: endpoint.address,
        port: endpoint.port,
        direction: SocketKey::REVERSE,
        protocol: key.protocol,
        reserved: 0,
    };
    let record = SocketRecord {
        address: key.address,
        port: key.port,
        reserved: 0,
        service,
        endpoint: id,
        generation: endpoint.generation,
    };
    let _ = SOCKETS.insert(reverse, record, BPF_ANY.into());
}
