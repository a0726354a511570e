//! What becomes of a packet that begins a flow.

use shunt_ebpf_abi::lookup::{Found, Judgement, class, find, hairpin, judge, may_pass};
use shunt_ebpf_abi::{AffinityKey, Event, FlowKey, FrontendKey, Interface};

use super::flow::{give_way, open};
use super::work::Work;
use crate::maps::INTERFACES;
use crate::pick::pick_by_packet;
use crate::tables::{Counter, Kernel, count, count_flow, event};

/// None of our business.
pub(crate) const PASS: u32 = 0;
/// It is discarded.
pub(crate) const DROP: u32 = 1;
/// It is refused.
pub(crate) const REJECT: u32 = 2;
/// It becomes `work.to`.
pub(crate) const FORWARD: u32 = 3;

/// Asks the table, and writes the flow down.
#[inline(always)]
pub(crate) fn decide(work: &mut Work) -> u32 {
    match choose(work) {
        FORWARD if open(work) != 0 => DROP,
        FORWARD => {
            count_flow(work.frontend.service, work.endpoint_id);
            FORWARD
        }
        PASS => {
            give_way(work);
            PASS
        }
        other => other,
    }
}

/// Asks the table; the endpoint is in `work`.
#[inline(never)]
fn choose(work: &mut Work) -> u32 {
    let Some(kernel) = Kernel::open() else { return PASS };
    let tuple = &work.key.tuple;
    work.frontend_key = FrontendKey {
        address: tuple.destination,
        port: tuple.destination_port,
        protocol: work.key.protocol,
        reserved: 0,
    };
    match find(&kernel, &work.frontend_key) {
        Found::Frontend(frontend) => work.frontend = frontend,
        Found::UnknownPort => {
            event(Event::UnknownPort);
            return REJECT;
        }
        Found::Unallocated => {
            event(Event::Unallocated);
            return DROP;
        }
        Found::Nothing => return PASS,
    }
    let frontend = &work.frontend;
    if !may_pass(&kernel, frontend, &tuple.source, &tuple.destination) {
        count(frontend.service, Counter::Dropped);
        return DROP;
    }
    // SAFETY: read at once.
    let from_pod = work.key.hook == FlowKey::INGRESS
        && unsafe { INTERFACES.get(work.ifindex) }.is_some_and(|i| i.flags & Interface::POD != 0);
    match judge(frontend, class(&kernel, &tuple.source, from_pod)) {
        Judgement::Forward { local, masquerade } => {
            work.affinity_key =
                AffinityKey { client: tuple.source, netns: 0, service: frontend.service, reserved: 0 };
            if pick_by_packet(work, local) != 0 {
                return DROP;
            }
            work.masquerade = u32::from(masquerade || hairpin(&work.key.tuple.source, &work.endpoint));
            FORWARD
        }
        Judgement::Reject => {
            count(frontend.service, Counter::Rejected);
            REJECT
        }
        Judgement::Drop => {
            count(frontend.service, Counter::Dropped);
            DROP
        }
    }
}
