//! Packets that leave by a device: answers get the frontend's address back, masqueraded flows their
//! source. Packets of the node's own processes meet the table here.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_SHOT, bpf_fib_lookup as Route,
};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_redirect_neigh};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use shunt_ebpf_abi::{Flow, FlowKey};

use super::decide::{DROP, FORWARD, REJECT, decide};
use super::frame::Skb;
use super::reject::reject;
use super::work::{Work, zeroed};
use super::{Begun, NEXT, begin, forward};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// For devices with Ethernet headers.
#[classifier]
pub fn egress(context: TcContext) -> i32 {
    work::<true>(&context)
}

/// For devices without.
#[classifier]
pub fn egress_l3(context: TcContext) -> i32 {
    work::<false>(&context)
}

#[inline(always)]
fn work<const ETHERNET: bool>(context: &TcContext) -> i32 {
    let skb = Skb(context.skb.skb);
    let work = match begin::<ETHERNET>(context, FlowKey::EGRESS) {
        Begun::Done(action) => return action,
        Begun::Known(work) => work,
        Begun::Unknown(work) => match decide(work) {
            FORWARD => work,
            DROP => return TC_ACT_SHOT,
            REJECT => return reject(skb, work),
            _ => return NEXT,
        },
    };
    if forward(skb, work) != 0 {
        TC_ACT_SHOT
    } else if work.flow.flags & Flow::FROM_NODE != 0 {
        route(skb, work)
    } else {
        NEXT
    }
}

/// One of the node's own packets was routed to the frontend: it needs the endpoint's route.
#[inline(never)]
fn route(skb: Skb, work: &Work) -> i32 {
    // SAFETY: all bits zero are a value of it.
    let mut route: Route = unsafe { zeroed() };
    route.ifindex = work.ifindex;
    route.l4_protocol = work.layout.protocol;
    if work.layout.v4 {
        route.family = AF_INET;
        route.__bindgen_anon_3.ipv4_src = work.to.source.word4();
        route.__bindgen_anon_4.ipv4_dst = work.to.destination.word4();
    } else {
        route.family = AF_INET6;
        route.__bindgen_anon_3.ipv6_src = work.to.source.0;
        route.__bindgen_anon_4.ipv6_dst = work.to.destination.0;
    }
    // SAFETY: the helpers check what they are given.
    unsafe {
        let found = bpf_fib_lookup(skb.0.cast(), &raw mut route, size_of::<Route>() as i32, 0);
        if found == i64::from(BPF_FIB_LKUP_RET_SUCCESS) || found == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
            return bpf_redirect_neigh(route.ifindex, core::ptr::null_mut(), 0, 0) as i32;
        }
    }
    NEXT
}
