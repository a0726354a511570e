//! Operations on the table, as values: what each says in the words of nft, and what it does to a state.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use nft_netlink::BaseChain;
use shunt_core::id::IpFamily;
use shunt_core::table::{Frontend, LocalEndpoint};
use shunt_mode::Transaction;

use crate::affinity;
use crate::layout::{Class, Endpoint, List, SetKey, TABLE};
use crate::rules::Rule;
use crate::state::text::{choice_text, endpoint_text, frontend_text};
use crate::state::{State, Stray};

/// One operation on the table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Create the table.
    AddTable(IpFamily),
    /// Delete the table with everything in it.
    DeleteTable(IpFamily),
    /// Create a set.
    AddSet(SetKey),
    /// Delete a set.
    DeleteSet(SetKey),
    /// Create a chain.
    AddChain(String, Option<BaseChain>),
    /// Delete a chain.
    DeleteChain(String),
    /// Replace all rules of a chain.
    SetRules(String, Vec<Rule>),
    /// Add an element to the map of classes: a class and its chain, or none for "drop".
    AddClass(Class, Option<String>),
    /// Delete an element of the map of classes.
    DeleteClass(Class),
    /// Set, replace or delete the class of a frontend.
    SetClass {
        /// The map that it is in.
        set: SetKey,
        /// The frontend.
        frontend: Frontend,
        /// Its class until now.
        from: Option<Class>,
        /// Its class from now on.
        to: Option<Class>,
    },
    /// Set, replace or delete an endpoint of a frontend.
    SetSlot {
        /// The map that it is in.
        set: SetKey,
        /// The frontend.
        frontend: Frontend,
        /// Which of its lists.
        list: List,
        /// Position in the list.
        index: u32,
        /// The endpoint until now.
        from: Option<Endpoint>,
        /// The endpoint from now on.
        to: Option<Endpoint>,
    },
    /// Set, replace or delete what a token means.
    SetToken {
        /// The Service port.
        id: u32,
        /// The list for which it is asked.
        list: List,
        /// The number of the endpoint.
        number: u32,
        /// The endpoint until now.
        from: Option<Endpoint>,
        /// The endpoint from now on.
        to: Option<Endpoint>,
    },
    /// Set, replace or delete a slot of a Service port with affinity.
    SetChoice {
        /// The Service port.
        id: u32,
        /// Which of its lists.
        list: List,
        /// Position in the list.
        index: u32,
        /// Number of the endpoint until now.
        from: Option<u32>,
        /// Number of the endpoint from now on.
        to: Option<u32>,
    },
    /// Add an address to a set of addresses.
    AddAddress(SetKey, IpAddr),
    /// Delete an address from a set of addresses.
    DeleteAddress(SetKey, IpAddr),
    /// Add a range of cluster IPs.
    AddServiceCidr(IpNet),
    /// Delete a range of cluster IPs.
    DeleteServiceCidr(IpNet),
    /// Add a local endpoint.
    AddHairpin(LocalEndpoint),
    /// Delete a local endpoint.
    DeleteHairpin(LocalEndpoint),
    /// Guard a frontend: only allowed sources may use it.
    AddGuard(Frontend),
    /// Guard a frontend no more.
    DeleteGuard(Frontend),
    /// Allow a range of sources to use a guarded frontend.
    AddSource(Frontend, IpNet),
    /// Allow a range of sources no more.
    DeleteSource(Frontend, IpNet),
    /// Delete an element that is not ours.
    DeleteStray(Stray),
}

const fn ip(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "ip",
        IpFamily::V6 => "ip6",
    }
}

impl fmt::Display for Op {
    /// What it does, in the words of nft; the family is left out except for the table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddTable(family) => write!(f, "add table {} {TABLE}", ip(*family)),
            Self::DeleteTable(family) => write!(f, "delete table {} {TABLE}", ip(*family)),
            Self::AddSet(set) => write!(f, "add set {TABLE} {set}"),
            Self::DeleteSet(set) => write!(f, "delete set {TABLE} {set}"),
            Self::AddChain(name, None) => write!(f, "add chain {TABLE} {name}"),
            Self::AddChain(name, Some(base)) => write!(
                f,
                "add chain {TABLE} {name} {{ type {} hook {} priority {}; }}",
                base.kind, base.hook, base.priority
            ),
            Self::DeleteChain(name) => write!(f, "delete chain {TABLE} {name}"),
            Self::SetRules(name, rules) => {
                write!(f, "flush chain {TABLE} {name}")?;
                rules.iter().try_for_each(|rule| write!(f, "\nadd rule {TABLE} {name} {rule}"))
            }
            Self::AddClass(class, None) => write!(f, "add element {TABLE} classes {{ {class} : drop }}"),
            Self::AddClass(class, Some(chain)) => {
                write!(f, "add element {TABLE} classes {{ {class} : goto {chain} }}")
            }
            Self::DeleteClass(class) => write!(f, "delete element {TABLE} classes {{ {class} }}"),
            Self::SetClass { set, frontend, from, to } => {
                let key = frontend_text(frontend);
                replace(f, *set, &key, from.is_some(), to.map(|c| c.to_string()))
            }
            Self::SetSlot { set, frontend, list, index, from, to } => {
                let key = format!("{} . {}", frontend_text(frontend), list.base() + index);
                replace(f, *set, &key, from.is_some(), to.as_ref().map(endpoint_text))
            }
            Self::SetToken { id, list, number, from, to } => {
                let key = affinity::classid(affinity::token_key(*id, *list, *number));
                replace(f, SetKey::AffinityEndpoints, &key, from.is_some(), to.as_ref().map(endpoint_text))
            }
            Self::SetChoice { id, list, index, from, to } => {
                let key = choice_text(*id, *list, *index, None);
                let to = to.map(|number| affinity::classid(affinity::token(*id, number)));
                replace(f, SetKey::AffinitySlots, &key, from.is_some(), to)
            }
            Self::AddAddress(set, address) => write!(f, "add element {TABLE} {set} {{ {address} }}"),
            Self::DeleteAddress(set, address) => {
                write!(f, "delete element {TABLE} {set} {{ {address} }}")
            }
            Self::AddServiceCidr(range) => {
                write!(f, "add element {TABLE} service-cidrs {{ {range} }}")
            }
            Self::DeleteServiceCidr(range) => {
                write!(f, "delete element {TABLE} service-cidrs {{ {range} }}")
            }
            Self::AddHairpin(e) | Self::DeleteHairpin(e) => {
                let word = if matches!(self, Self::AddHairpin(_)) { "add" } else { "delete" };
                write!(
                    f,
                    "{word} element {TABLE} hairpin {{ {0} . {0} . {1} . {2} }}",
                    e.address, e.protocol, e.port
                )
            }
            Self::AddGuard(frontend) => {
                write!(f, "add element {TABLE} guarded {{ {} }}", frontend_text(frontend))
            }
            Self::DeleteGuard(frontend) => {
                write!(f, "delete element {TABLE} guarded {{ {} }}", frontend_text(frontend))
            }
            Self::AddSource(frontend, range) => {
                write!(f, "add element {TABLE} source-ranges {{ {} . {range} }}", frontend_text(frontend))
            }
            Self::DeleteSource(frontend, range) => {
                write!(f, "delete element {TABLE} source-ranges {{ {} . {range} }}", frontend_text(frontend))
            }
            Self::DeleteStray(stray) => {
                write!(f, "delete element {TABLE} {} {{ {} }} # not ours", stray.set, stray.key)
            }
        }
    }
}

fn replace(
    f: &mut fmt::Formatter<'_>,
    set: SetKey,
    key: &str,
    existed: bool,
    data: Option<String>,
) -> fmt::Result {
    if existed {
        write!(f, "delete element {TABLE} {set} {{ {key} }}")?;
    }
    if let Some(data) = data {
        let separator = if existed { "\n" } else { "" };
        write!(f, "{separator}add element {TABLE} {set} {{ {key} : {data} }}")?;
    }
    Ok(())
}
/// Carries out one operation on a state. Pure.
pub fn advance(state: &mut State, transaction: &Transaction<Op>) {
    for op in &transaction.ops {
        advance_one(state, op);
    }
}

fn advance_one(state: &mut State, op: &Op) {
    match op {
        Op::AddTable(_) => state.exists = true,
        Op::DeleteTable(_) => *state = State::empty(state.family),
        Op::AddSet(set) => {
            state.sets.insert(*set);
        }
        Op::DeleteSet(set) => state.remove_set(*set),
        Op::AddChain(name, base) => state.add_chain(name.clone(), *base),
        Op::DeleteChain(name) => state.remove_chain(name),
        Op::SetRules(name, rules) => {
            if let Some(chain) = state.chains.get_mut(name) {
                chain.rules.clone_from(rules);
            }
        }
        Op::AddClass(class, _) => {
            state.classes.insert(*class);
        }
        Op::DeleteClass(class) => {
            state.classes.remove(class);
        }
        Op::SetClass { frontend, to, .. } => state.set_class(*frontend, *to),
        Op::SetSlot { frontend, list, index, to, .. } => {
            state.set_slot(*frontend, *list, *index as usize, *to);
        }
        Op::SetToken { id, list, number, to, .. } => {
            state.edit_affinity(*id, |a| a.set_endpoint(*list, *number, *to));
        }
        Op::SetChoice { id, list, index, to, .. } => {
            state.edit_affinity(*id, |a| a.set_slot(*list, *index, *to));
        }
        Op::AddAddress(SetKey::NodePortIps, address) => {
            state.node_port_ips.insert(*address);
        }
        Op::DeleteAddress(SetKey::NodePortIps, address) => {
            state.node_port_ips.remove(address);
        }
        Op::AddAddress(_, address) => {
            state.cluster_ips.insert(*address);
        }
        Op::DeleteAddress(_, address) => {
            state.cluster_ips.remove(address);
        }
        Op::AddServiceCidr(range) => {
            state.service_cidrs.insert(*range);
        }
        Op::DeleteServiceCidr(range) => {
            state.service_cidrs.remove(range);
        }
        Op::AddHairpin(endpoint) => {
            state.hairpins.insert(*endpoint);
        }
        Op::DeleteHairpin(endpoint) => {
            state.hairpins.remove(endpoint);
        }
        Op::AddGuard(frontend) => {
            state.guarded.insert(*frontend);
        }
        Op::DeleteGuard(frontend) => {
            state.guarded.remove(frontend);
        }
        Op::AddSource(frontend, range) => {
            state.sources.entry(*frontend).or_default().insert(*range);
        }
        Op::DeleteSource(frontend, range) => {
            if let Some(ranges) = state.sources.get_mut(frontend) {
                ranges.remove(range);
                if ranges.is_empty() {
                    state.sources.remove(frontend);
                }
            }
        }
        Op::DeleteStray(stray) => {
            state.strays.remove(stray);
        }
    }
}
