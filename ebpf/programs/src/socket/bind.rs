//! `bind(2)` of the node's own processes: a node port answers for a Service, so nobody may wait there in
//! vain.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use shunt_ebpf_abi::lookup::Tables as _;
use shunt_ebpf_abi::{Event, FrontendKey, address_flags, config_flags};

use super::{ALLOW, Call, EADDRINUSE, Family, deny};
use crate::tables::{Kernel, event};

#[cgroup_sock_addr(bind4)]
pub fn bind4(context: SockAddrContext) -> i32 {
    bind(&Call::new(&context, Family::V4))
}

/// Also `::ffff:a.b.c.d`.
#[cgroup_sock_addr(bind6)]
pub fn bind6(context: SockAddrContext) -> i32 {
    bind(&Call::new(&context, Family::V6))
}

#[inline(always)]
fn bind(call: &Call<'_>) -> i32 {
    let Some(kernel) = Kernel::open() else { return ALLOW };
    if kernel.config.flags & config_flags::PROTECT_NODE_PORTS == 0 || call.netns() != kernel.config.host_netns
    {
        return ALLOW;
    }
    let key =
        FrontendKey { address: call.address(), port: call.port(), protocol: call.protocol(), reserved: 0 };
    if kernel.frontend(&key.node_port()).is_none() {
        return ALLOW;
    }
    let all_local = if key.address.is_v4() {
        config_flags::NODE_PORTS_ALL_LOCAL_V4
    } else {
        config_flags::NODE_PORTS_ALL_LOCAL_V6
    };
    let address = kernel.address(&key.address);
    let serves = key.address.is_unspecified()
        || address & address_flags::NODE_PORT != 0
        || kernel.config.flags & all_local != 0 && address & address_flags::LOCAL != 0;
    if !serves {
        return ALLOW;
    }
    event(Event::BindRefused);
    deny(EADDRINUSE)
}
