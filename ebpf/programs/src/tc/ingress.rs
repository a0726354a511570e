//! Packets that come in by a device.

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use shunt_ebpf_abi::FlowKey;

use super::decide::{DROP, FORWARD, REJECT, decide};
use super::frame::Skb;
use super::reject::reject;
use super::{Begun, NEXT, begin, forward};

/// For devices with Ethernet headers.
#[classifier]
pub fn ingress(context: TcContext) -> i32 {
    work::<true>(&context)
}

/// For devices without.
#[classifier]
pub fn ingress_l3(context: TcContext) -> i32 {
    work::<false>(&context)
}

#[inline(always)]
fn work<const ETHERNET: bool>(context: &TcContext) -> i32 {
    let skb = Skb(context.skb.skb);
    let work = match begin::<ETHERNET>(context, FlowKey::INGRESS) {
        Begun::Done(action) => return action,
        Begun::Known(work) => work,
        Begun::Unknown(work) => match decide(work) {
            FORWARD => work,
            DROP => return TC_ACT_SHOT,
            REJECT => return reject(skb, work),
            _ => return NEXT,
        },
    };
    if forward(skb, work) == 0 { NEXT } else { TC_ACT_SHOT }
}
