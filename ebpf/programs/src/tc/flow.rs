//! The connection table.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use shunt_ebpf_abi::lookup::{Tables as _, is_serving, scale};
use shunt_ebpf_abi::{Address, Event, Flow, FlowKey};

use super::packet::{TCP, UDP};
use super::work::{Work, copy};
use crate::filter::mark;
use crate::maps::{FLOWS, INTERFACES};
use crate::tables::{Kernel, event};

const SECOND: u64 = 1_000_000_000;
/// How many ports are tried for a flow whose own one is taken.
const PORT_TRIES: u32 = 8;
/// How many ports are tried for a masqueraded flow: many at one endpoint may share few ports
/// (`ip_local_port_range` leaves 9,000 of them on some nodes), and of half that are taken eight in a row are
/// hit once in 256 connections.
const MASQUERADE_TRIES: u32 = 48;
/// How many of these leave a port alone that a flow had until a moment ago: its endpoint, if it ended the connection, may
/// keep the client waiting for a second (`TCP_TIMEWAIT_LEN`, 60 s).
const CAUTIOUS_TRIES: u32 = 16;
const TIME_WAIT: u64 = 60 * SECOND;

/// The packet's flow has an entry.
pub(crate) const KNOWN: u32 = 0;
/// It has none, or one that does not count any more.
pub(crate) const UNKNOWN: u32 = 1;
/// It has one that cannot be used.
pub(crate) const UNUSABLE: u32 = 2;

/// Looks the packet's flow up; `work.to` is what its entry makes of it.
#[inline(never)]
pub(crate) fn look_up(work: &mut Work) -> u32 {
    let found = FLOWS.get_ptr_mut(&work.key);
    work.held = u32::from(found.is_some());
    let Some(flow) = found else { return UNKNOWN };
    // SAFETY: the verifier knows the element; other CPUs write its time and state only, and of two that
    // give the same flow a source the later wins.
    let flow = unsafe { &mut *flow };
    let Some(kernel) = Kernel::open() else { return UNKNOWN };
    if begins_anew(&kernel, work, flow) {
        return UNKNOWN;
    }
    if work.begins != 0
        && work.layout.protocol != UDP
        && flow.flags & Flow::MASQUERADE != 0
        && is_over(&kernel, work, flow)
    {
        // One of ours was written down anew where the packet came in.
        return UNKNOWN;
    }
    if flow.flags & Flow::MASQUERADE != 0 && flow.masquerade_port == 0 && masquerade(&kernel, work, flow) != 0
    {
        return UNUSABLE;
    }
    see(&kernel, work, flow);
    copy(&mut work.to, &flow.tuple);
    work.flow.flags = flow.flags;
    work.flow.service = flow.service;
    KNOWN
}

/// Whether a packet that may begin a flow does so although there is an entry: that flow is over, or its
/// endpoint is gone and the flow can do without it.
#[inline(always)]
fn begins_anew(kernel: &Kernel, work: &Work, flow: &Flow) -> bool {
    if work.begins == 0 || flow.flags & (Flow::REPLY | Flow::MASQUERADE) != 0 {
        return false;
    }
    if is_over(kernel, work, flow) {
        return true;
    }
    if work.layout.protocol == TCP && flow.state != Flow::OPENING {
        return false;
    }
    let serving = kernel.endpoint(flow.endpoint);
    let gone = !serving.is_some_and(|e| is_serving(&e, flow.service, flow.generation));
    if gone {
        event(Event::Repicked);
    }
    gone
}

/// Whether another flow may take the place of this one.
#[inline(always)]
fn is_over(kernel: &Kernel, work: &Work, flow: &Flow) -> bool {
    flow.state == Flow::CLOSING || flow.is_forgotten(work.layout.protocol, kernel.config, work.now)
}

/// A flow that is none of ours begins. What is left of others that are over must translate neither what follows nor the
/// answers to it.
#[inline(never)]
pub(crate) fn give_way(work: &mut Work) {
    if work.layout.protocol == UDP {
        return;
    }
    let Some(kernel) = Kernel::open() else { return };
    if work.held != 0 {
        // If it counted, then it would be one of ours.
        let _ = FLOWS.remove(&work.key);
    }
    work.flow_key = FlowKey { tuple: work.key.tuple.reversed(), hook: 1 - work.key.hook, ..work.key };
    if let Some(other) = FLOWS.get_ptr(&work.flow_key) {
        // SAFETY: the verifier knows the element, and it is only read.
        if is_over(&kernel, work, unsafe { &*other }) {
            let _ = FLOWS.remove(&work.flow_key);
        }
    }
}

/// Notes a packet of a flow. Now and then the other direction's entry is looked up, so that the table's
/// eviction takes it for one in use, and the filter is told that the flow goes on.
#[inline(always)]
fn see(kernel: &Kernel, work: &mut Work, flow: &mut Flow) {
    if work.ends != 0 {
        flow.state = Flow::CLOSING;
    } else if flow.state == Flow::OPENING && (work.begins == 0 || work.layout.protocol == UDP) {
        flow.state = Flow::OPEN;
    }
    if work.now.wrapping_sub(flow.last_seen) > SECOND {
        flow.last_seen = work.now;
        work.flow_key = FlowKey { tuple: flow.tuple.reversed(), hook: 1 - work.key.hook, ..work.key };
        let _ = FLOWS.get_ptr(&work.flow_key);
        for tuple in [&work.key.tuple, &flow.tuple] {
            mark(kernel, tuple, work.now);
        }
    }
}

/// Writes down a new flow to `work.endpoint`, answers' direction first; `work.to` is what it makes of the
/// packet. 0 when that went well.
#[inline(never)]
pub(crate) fn open(work: &mut Work) -> u32 {
    let Some(kernel) = Kernel::open() else { return 1 };
    let from_node = work.key.hook == FlowKey::EGRESS;
    work.to = work.key.tuple;
    work.to.destination = work.endpoint.address;
    work.to.destination_port = work.endpoint.port;
    for tuple in [&work.key.tuple, &work.to] {
        mark(&kernel, tuple, work.now);
    }
    work.flow.last_seen = work.now;
    work.flow.tuple = work.key.tuple.reversed();
    work.flow.service = work.frontend.service;
    work.flow.endpoint = work.endpoint_id;
    work.flow.generation = work.endpoint.generation;
    let of_node = if from_node { Flow::FROM_NODE } else { 0 };
    work.flow.flags = Flow::REPLY | of_node;
    work.flow.state = Flow::OPENING;
    // Nothing else writes what is reserved: the map was made of zeroes.
    work.flow.masquerade_port = 0;
    work.flow_key = FlowKey { tuple: work.to.reversed(), hook: 1 - work.key.hook, ..work.key };
    if !claim(&kernel, work) {
        event(Event::NoFlow);
        return 1;
    }
    work.flow.tuple = work.to;
    if work.masquerade != 0 && !from_node {
        work.flow.flags = Flow::MASQUERADE;
        work.flow_key.tuple = work.to;
        if FLOWS.insert(&work.flow_key, &work.flow, BPF_ANY.into()).is_err() {
            event(Event::NoFlow);
            return 1;
        }
    }
    work.flow.flags = of_node;
    if FLOWS.insert(&work.key, &work.flow, BPF_ANY.into()).is_err() {
        event(Event::NoFlow);
        return 1;
    }
    0
}

/// Writes down the direction of answers. Another flow may have the same two ends: the same client from the
/// same port to another frontend with this endpoint. Then this one gets another source port.
#[inline(always)]
fn claim(kernel: &Kernel, work: &mut Work) -> bool {
    for _ in 0..PORT_TRIES {
        if FLOWS.insert(&work.flow_key, &work.flow, BPF_NOEXIST.into()).is_ok() {
            return true;
        }
        if let Some(other) = FLOWS.get_ptr(&work.flow_key) {
            // SAFETY: the verifier knows the element, and it is only read.
            let other = unsafe { &*other };
            let same = other.tuple.destination_port == work.flow.tuple.destination_port
                && other.tuple.source_port == work.flow.tuple.source_port
                && other.tuple.source.same(&work.flow.tuple.source);
            if same || is_over(kernel, work, other) {
                let claimed = FLOWS.insert(&work.flow_key, &work.flow, BPF_ANY.into()).is_ok();
                if work.key.hook == FlowKey::INGRESS {
                    // The old flow may have been masqueraded, and this one not.
                    work.flow_key.tuple = work.to;
                    let _ = FLOWS.remove(&work.flow_key);
                }
                return claimed;
            }
        }
        // SAFETY: the helper only makes a number.
        let random = unsafe { bpf_get_prandom_u32() };
        work.to.source_port = (1024 + scale(random, 64_512) as u16).to_be();
        work.flow_key.tuple.destination_port = work.to.source_port;
    }
    false
}

/// Gives a masqueraded flow its source when its first packet leaves: an address of the device, and a port
/// that no other flow to the same endpoint has. 0 when there is one.
#[inline(always)]
fn masquerade(kernel: &Kernel, work: &mut Work, flow: &mut Flow) -> u32 {
    let source = node_address(kernel, work.ifindex, work.layout.v4);
    if source.is_unspecified() {
        event(Event::NoPort);
        return 1;
    }
    let min = kernel.config.masquerade_port_min;
    let range = u32::from(kernel.config.masquerade_port_max.wrapping_sub(min)) + 1;
    work.flow_key = FlowKey { tuple: work.key.tuple.reversed(), hook: FlowKey::INGRESS, ..work.key };
    work.flow.last_seen = work.now;
    work.flow.tuple = work.flow_key.tuple;
    work.flow.service = flow.service;
    work.flow.endpoint = flow.endpoint;
    work.flow.generation = flow.generation;
    work.flow.flags = Flow::REPLY;
    work.flow.state = Flow::OPENING;
    work.flow.masquerade_port = 0;
    work.flow_key.tuple.destination = source;
    mark(kernel, &work.flow_key.tuple, work.now);
    for attempt in 0..MASQUERADE_TRIES {
        // SAFETY: the helper only makes a number.
        let random = unsafe { bpf_get_prandom_u32() };
        let port = (min.wrapping_add(scale(random, range) as u16)).to_be();
        work.flow_key.tuple.destination_port = port;
        let rest = if attempt < CAUTIOUS_TRIES { TIME_WAIT } else { 0 };
        if FLOWS.insert(&work.flow_key, &work.flow, BPF_NOEXIST.into()).is_ok()
            || give_back(kernel, work, rest)
                && FLOWS.insert(&work.flow_key, &work.flow, BPF_ANY.into()).is_ok()
        {
            flow.tuple.source = source;
            flow.tuple.source_port = port;
            flow.masquerade_port = port;
            return 0;
        }
    }
    event(Event::NoPort);
    1
}

/// Takes the port of `work.flow_key` from the flow that has it, if that has ended in both directions and was not seen for
/// `rest`. Whether it may be written down for another one.
#[inline(always)]
fn give_back(kernel: &Kernel, work: &mut Work, rest: u64) -> bool {
    let Some(answers) = FLOWS.get_ptr(&work.flow_key) else { return false };
    // SAFETY: the verifier knows the element, and it is only read.
    let answers = unsafe { &*answers };
    if !is_over(kernel, work, answers) || work.now.saturating_sub(answers.last_seen) < rest {
        return false;
    }
    work.rival_key = FlowKey { tuple: answers.tuple.reversed(), hook: FlowKey::EGRESS, ..work.key };
    let Some(onward) = FLOWS.get_ptr(&work.rival_key) else { return true };
    // SAFETY: as above.
    let onward = unsafe { &*onward };
    // Unless the client has begun another one with another port.
    if onward.masquerade_port == work.flow_key.tuple.destination_port {
        if !is_over(kernel, work, onward) {
            return false;
        }
        // Whoever sweeps the table would take it for a part of the flow that has the port next.
        let _ = FLOWS.remove(&work.rival_key);
    }
    true
}

/// The address that packets leaving by a device are masqueraded as.
#[inline(always)]
fn node_address(kernel: &Kernel, ifindex: u32, v4: bool) -> Address {
    // SAFETY: read at once.
    if let Some(interface) = unsafe { INTERFACES.get(ifindex) } {
        let address = if v4 { interface.address4 } else { interface.address6 };
        if !address.is_unspecified() {
            return address;
        }
    }
    if v4 { kernel.config.masquerade4 } else { kernel.config.masquerade6 }
}
