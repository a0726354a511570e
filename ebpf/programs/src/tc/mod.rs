//! Hooks at devices: packets to Services from outside, from pods that bypass their socket hook, and from
//! the node where that hook left them alone. See `shunt_ebpf_abi::flow` for how translation is shared
//! between ingress and egress.
//!
//! ```text
//!   early::passes ─ no ─► packet::plain ─────► flow::look_up ─ known ─────────────────────► rewrite
//!        └─ yes ─► next program  └─► ::parse ─┘      └── unknown ─► decide ─► flow::open ───────┘
//!                                                                      └─► reject
//! ```

mod crc;
mod decide;
mod early;
mod egress;
mod flow;
mod frame;
mod icmp;
mod ingress;
mod packet;
mod reject;
mod rewrite;
mod work;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::TcContext;

use shunt_ebpf_abi::{Flow, FlowKey};

use crate::tables::count_bytes;
use frame::Skb;
use rewrite::rewrite;
pub(crate) use work::Work;

/// The next program, or the stack.
const NEXT: i32 = TC_ACT_UNSPEC;
const ETHERNET_HEADER: u32 = 14;
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// What becomes of a packet: what to do with it now, or that it goes through the table.
enum Begun {
    Done(i32),
    Unknown(&'static mut Work),
    Known(&'static mut Work),
}

/// The part that ingress and egress have in common.
#[inline(always)]
fn begin<const ETHERNET: bool>(context: &TcContext, hook: u8) -> Begun {
    let v4 = match context.skb.protocol() {
        IPV4 => true,
        IPV6 => false,
        _ => return Begun::Done(NEXT),
    };
    let skb = Skb(context.skb.skb);
    // SAFETY: the verifier knows the context.
    let may_begin = hook == FlowKey::INGRESS || unsafe { (*skb.0).ingress_ifindex } == 0;
    let mut now = 0;
    if early::passes::<ETHERNET>(skb, v4, may_begin, &mut now) {
        return Begun::Done(NEXT);
    }
    let Some(work) = work::work() else { return Begun::Done(NEXT) };
    work.l2 = if ETHERNET { ETHERNET_HEADER } else { 0 };
    work.key.hook = hook;
    // SAFETY: the verifier knows the context; the helper reads a clock.
    unsafe {
        work.ifindex = (*context.skb.skb).ifindex;
        work.now = if now == 0 { bpf_ktime_get_coarse_ns() } else { now };
    }
    if !(ETHERNET && packet::plain(skb, work, ETHERNET_HEADER, v4).is_some()) {
        match packet::parse(skb, work, v4) {
            packet::PORTS => {}
            packet::ERROR => {
                let failed = icmp::translate(skb, work) != 0;
                return Begun::Done(if failed { TC_ACT_SHOT } else { NEXT });
            }
            _ => return Begun::Done(NEXT),
        }
    }
    match flow::look_up(work) {
        flow::KNOWN => Begun::Known(work),
        flow::UNUSABLE => Begun::Done(TC_ACT_SHOT),
        _ if work.begins == 0 => Begun::Done(NEXT),
        _ if may_begin => Begun::Unknown(work),
        _ => {
            flow::give_way(work);
            Begun::Done(NEXT)
        }
    }
}

/// Gives a packet of a flow its tuple; 0 when that went well. Its bytes are counted where it meets the frontend: with
/// masquerade the packet meets two entries.
#[inline(always)]
fn forward(skb: Skb, work: &Work) -> u32 {
    let flags = work.flow.flags;
    let response = flags & Flow::REPLY != 0;
    let at_frontend = if response {
        work.key.hook == FlowKey::EGRESS || flags & Flow::FROM_NODE != 0
    } else {
        flags & Flow::MASQUERADE == 0
    };
    if at_frontend {
        // SAFETY: the verifier knows the context.
        let length = unsafe { (*skb.0).len };
        count_bytes(work.flow.service, response, length.wrapping_sub(work.l2));
    }
    rewrite(skb, work)
}
