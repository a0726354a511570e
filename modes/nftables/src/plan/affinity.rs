//! The plan for Service ports with session affinity.

use std::collections::{BTreeMap, BTreeSet};

use crate::affinity::{self, Affinity};
use crate::layout::{ChainKey, Class, Endpoint, Leg, List, uses};
use crate::op::Op;
use crate::render::{AffinityPort, Desired};
use crate::rules::{self, AffinityRules};
use crate::state::State;

use super::{Planner, edit_slots, set_rules};

/// What is planned for a Service port with affinity.
#[derive(Default)]
pub(super) struct PortPlan<'a> {
    /// What it should get; `None` if none of its frontends gets anything now.
    pub(super) wanted: Option<(&'a str, &'a AffinityPort)>,
    /// Legs of frontends in question as they will be.
    pub(super) legs: BTreeSet<[Leg; 3]>,
    /// Legs of frontends in question as they are, and of how many.
    pub(super) given_up: BTreeMap<[Leg; 3], usize>,
    /// Legs that some frontend will have, in question or not.
    pub(super) all_legs: BTreeSet<[Leg; 3]>,
    /// The change of the port and of its frontends, to stay within one transaction.
    pub(super) ops: Vec<Op>,
}

impl Planner<'_> {
    /// Everything about Service ports with affinity that comes with their frontends.
    pub(super) fn affinity(&mut self) {
        for (id, port) in &mut self.affinity {
            let Some((name, wanted)) = port.wanted else { continue };
            let nothing = Affinity::default();
            let held = self.observed.affinity.get(id).unwrap_or(&nothing);
            let lists =
                port.used_lists().map(|(list, used)| if used { targets(wanted, list) } else { Vec::new() });
            // The node's own first: they are few, and must not fall off the end.
            let numbers = held.number(&[&*lists[1], &*lists[0]].concat());
            let of = AffinityRules { id: *id, protocol: wanted.protocol, timeout: wanted.timeout };
            for (list, used) in port.used_lists() {
                if !used {
                    continue;
                }
                let list_numbers: BTreeSet<u32> =
                    lists[list as usize].iter().filter_map(|e| numbers.get(e)).copied().collect();
                let chain = affinity::chain_name(*id, list, name);
                let rules = rules::affinity(&self.skeleton, of, list, list_numbers.len() as u32);
                set_rules(self.observed, &mut self.early, &mut port.ops, &chain, None, rules);
                self.affinity_chains.insert(chain);
                let tokens =
                    lists[list as usize].iter().filter_map(|e| Some((*numbers.get(e)?, *e))).collect();
                port.ops.extend(edit_tokens(*id, list, held, &tokens));
                let list_numbers: Vec<u32> = list_numbers.into_iter().collect();
                let slots = edit_slots(&held.slots[list as usize], &list_numbers, false);
                let slot = |(index, from, to)| Op::SetChoice { id: *id, list, index, from, to };
                port.ops.extend(slots.into_iter().map(slot));
            }
            let mut classes = Vec::new();
            for legs in &port.legs {
                let class = Class::Affinity { id: *id, legs: *legs };
                let chain = match class.chain() {
                    Some(ChainKey::Affinity { id, list }) => affinity::chain_name(id, list, name),
                    other => {
                        let chain = other.map(|c| c.to_string()).unwrap_or_default();
                        let rules = rules::affinity_class(&self.skeleton, *id, name, *legs);
                        let known = self.observed.chains.get(&chain);
                        self.rewritten |= known.is_some_and(|held| held.rules != rules);
                        set_rules(self.observed, &mut self.early, &mut port.ops, &chain, None, rules);
                        self.affinity_chains.insert(chain.clone());
                        chain
                    }
                };
                if !self.observed.classes.contains(&class) {
                    classes.push(Op::AddClass(class, Some(chain)));
                }
            }
            port.ops.extend(classes);
        }
    }

    /// Whether a frontend goes from one Service port with affinity to another, which happens when two
    /// Services claim it. Then neither must change before the frontend is where it belongs.
    pub(super) fn a_frontend_moves(&self) -> bool {
        let id_of = |class| if let Some(Class::Affinity { id, .. }) = class { Some(id) } else { None };
        !self.affinity.is_empty()
            && self.desired.frontends.iter().any(|(frontend, dispatch)| {
                let held = id_of(self.observed.frontends.get(frontend).and_then(|held| held.class));
                let wanted = id_of(dispatch.as_ref().map(|d| d.class));
                held.is_some() && wanted.is_some() && held != wanted
            })
    }

    /// What Service ports with affinity do not need any more. Chains and classes are only seen to where
    /// [`Self::garbage`] does not see to all of them.
    pub(super) fn affinity_garbage(&self) -> Vec<Op> {
        let mut garbage = Vec::new();
        let nothing = Affinity::default();
        for (id, port) in &self.affinity {
            let held = self.observed.affinity.get(id).unwrap_or(&nothing);
            let unused = port.used_lists().into_iter().filter(|(_, used)| !used).map(|(list, _)| list);
            if !self.desired.everything {
                let mut chains = Vec::new();
                for class in self.observed.classes.range(Class::of_id(*id)) {
                    if let Class::Affinity { legs, .. } = class
                        && !port.all_legs.contains(legs)
                    {
                        garbage.push(Op::DeleteClass(*class));
                        chains.extend(class.chain());
                    }
                }
                // Chains of classes first: they lead to the others.
                chains.retain(|chain| matches!(chain, ChainKey::Class(_)));
                chains.extend(unused.clone().map(|list| ChainKey::Affinity { id: *id, list }));
                let names = chains.iter().map(|chain| self.observed.chain_name(chain));
                let names: Vec<String> = names.filter(|n| self.observed.chains.contains_key(n)).collect();
                garbage.extend(names.iter().map(|name| Op::SetRules(name.clone(), Vec::new())));
                garbage.extend(names.into_iter().map(Op::DeleteChain));
            }
            for list in unused {
                let slots = edit_slots(&held.slots[list as usize], &[], false);
                let slot = |(index, from, to)| Op::SetChoice { id: *id, list, index, from, to };
                garbage.extend(slots.into_iter().map(slot));
                garbage.extend(edit_tokens(*id, list, held, &BTreeMap::new()));
            }
        }
        garbage
    }
}

impl PortPlan<'_> {
    /// Both lists, and whether some frontend will use them.
    pub(super) fn used_lists(&self) -> [(List, bool); 2] {
        List::ALL.map(|list| (list, self.all_legs.iter().any(|legs| uses(*legs, list))))
    }
}

/// Service ports with affinity that frontends in question have, or will have.
pub(super) fn affinity_in_question<'a>(
    observed: &State,
    desired: &'a Desired,
    ids: &BTreeMap<&'a str, u32>,
) -> BTreeMap<u32, PortPlan<'a>> {
    let mut ports: BTreeMap<u32, PortPlan<'a>> = BTreeMap::new();
    for (name, wanted) in &desired.affinity {
        if let Some(id) = ids.get(&**name) {
            ports.entry(*id).or_default().wanted = Some((&**name, wanted));
        }
    }
    if ports.is_empty() && observed.affinity.is_empty() {
        return ports;
    }
    for (frontend, dispatch) in &desired.frontends {
        if let Some(Class::Affinity { id, legs }) = dispatch.as_ref().map(|d| d.class) {
            ports.entry(id).or_default().legs.insert(legs);
        }
        if let Some(Class::Affinity { id, legs }) = observed.frontends.get(frontend).and_then(|h| h.class) {
            *ports.entry(id).or_default().given_up.entry(legs).or_default() += 1;
        }
    }
    if desired.everything {
        for id in observed.affinity.keys() {
            ports.entry(*id).or_default();
        }
    }
    for (id, port) in &mut ports {
        port.all_legs.clone_from(&port.legs);
        if let Some(held) = observed.affinity.get(id).filter(|_| !desired.everything) {
            let left = held.frontends.iter().filter(|(legs, n)| port.given_up.get(*legs) != Some(*n));
            port.all_legs.extend(left.map(|(legs, _)| *legs));
        }
    }
    ports
}

fn targets(port: &AffinityPort, list: List) -> Vec<Endpoint> {
    let targets = port.lists[list as usize].iter();
    targets.map(|t| Endpoint { address: t.address, port: t.port }).collect()
}

/// Which tokens to change so that a list knows exactly the wanted ones.
fn edit_tokens(id: u32, list: List, held: &Affinity, wanted: &BTreeMap<u32, Endpoint>) -> Vec<Op> {
    let held: BTreeMap<u32, Endpoint> =
        held.endpoints.range((list, 0)..=(list, u32::MAX)).map(|((_, number), e)| (*number, *e)).collect();
    let numbers: BTreeSet<u32> = held.keys().chain(wanted.keys()).copied().collect();
    numbers
        .into_iter()
        .map(|number| (number, held.get(&number).copied(), wanted.get(&number).copied()))
        .filter(|(_, from, to)| from != to)
        .map(|(number, from, to)| Op::SetToken { id, list, number, from, to })
        .collect()
}
