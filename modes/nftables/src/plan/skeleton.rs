//! What the rules depend on, once a plan is carried out.

use std::collections::BTreeMap;

use shunt_core::table::{Frontend, NodePortMatch};

use crate::layout::{Endpoint, List};
use crate::render::{Desired, Dispatch};
use crate::rules::{NodePorts, Skeleton};
use crate::state::{Held, State};

use super::{Limits, edit_slots};

/// What the rules depend on, once the plan is carried out.
pub(super) fn skeleton(observed: &State, desired: &Desired, limits: &Limits) -> Skeleton {
    let (services, endpoints) = room(observed, desired);
    let node_ports = if desired.everything { false } else { keeps_node_ports(observed, desired) };
    let node_ports = node_ports || desired.frontends.iter().any(|(f, d)| f.address.is_none() && d.is_some());
    let some_guard = |map: &BTreeMap<Frontend, Option<Dispatch>>| {
        map.values().flatten().any(|dispatch| dispatch.guard.is_some())
    };
    let guards = some_guard(&desired.frontends)
        || (!desired.everything && observed.guarded.iter().any(|f| !desired.frontends.contains_key(f)));
    let hairpins = desired.hairpins.values().any(|wanted| *wanted)
        || (!desired.everything && observed.hairpins.iter().any(|h| !desired.hairpins.contains_key(h)));
    Skeleton {
        family: observed.family,
        local_detector: desired.node.local_detector.clone(),
        mark: 1_u32.wrapping_shl(u32::from(desired.node.masquerade_bit)),
        services: capacity(observed.services_capacity(), limits.services, services),
        endpoints: capacity(observed.endpoints_capacity(), limits.endpoints, endpoints),
        node_ports: node_ports.then_some(match desired.node.node_ports {
            NodePortMatch::AllLocal => NodePorts::AllLocal,
            NodePortMatch::Addresses(_) => NodePorts::Set,
        }),
        guards,
        hairpins,
        service_cidrs: !desired.service_cidrs.is_empty(),
    }
}

/// How many elements the sized maps must have room for. What a transaction deletes makes no room for
/// what it adds: the kernel counts the former off when it commits and the latter when it is asked.
fn room(observed: &State, desired: &Desired) -> (usize, usize) {
    let nothing = Held::default();
    let with_address = |f: &Frontend| f.address.is_some();
    let node_ports = observed.frontends.keys().take_while(|f| !with_address(f)).count();
    let (mut services, mut endpoints) = (observed.frontends.len() - node_ports, observed.endpoint_count);
    for (frontend, dispatch) in desired.frontends.iter().filter(|(f, _)| with_address(f)) {
        let Some(dispatch) = dispatch else { continue };
        let held = observed.frontends.get(frontend).unwrap_or(&nothing);
        services += usize::from(held.class != Some(dispatch.class));
        for list in List::ALL {
            let slots = edit_slots(held.list(list), &endpoints_of(dispatch, list), false);
            endpoints += slots.iter().filter(|(_, _, to)| to.is_some()).count();
        }
    }
    (services, endpoints)
}

pub(super) fn endpoints_of(dispatch: &Dispatch, list: List) -> Vec<Endpoint> {
    dispatch.list(list).iter().map(|t| Endpoint { address: t.address, port: t.port }).collect()
}

fn keeps_node_ports(observed: &State, desired: &Desired) -> bool {
    // Node ports have no address and sort first.
    observed.frontends.keys().take_while(|f| f.address.is_none()).any(|f| !desired.frontends.contains_key(f))
}

/// Keeps a capacity that suffices, else takes the next one that leaves room to grow.
fn capacity(held: Option<u32>, least: u32, count: usize) -> u32 {
    let mut capacity = held.unwrap_or(least);
    while (capacity as usize) < count {
        capacity = capacity.saturating_mul(2);
    }
    capacity
}
