//! Operations: what a plan consists of.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipset_netlink::{Element, Entry};
use ipvs_netlink::{Destination, Service, ServiceKey};
use shunt_core::id::IpFamily;
use shunt_mode::Transaction;

use crate::layout::{LINK, SetName};
use crate::rules::Rules;
use crate::state::{Server, State};

/// One operation on the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Sets the kernel's settings for IPVS.
    Tune,
    /// Makes the dummy link.
    AddLink,
    /// Makes an empty set.
    CreateSet(IpFamily, SetName),
    /// Makes a set anew that is declared otherwise, with these elements.
    ReplaceSet(IpFamily, SetName, Vec<Element>),
    /// Deletes a set that no rule refers to.
    DestroySet(IpFamily, SetName),
    /// Makes our rules be these; the first ones are those that were there.
    SetRules(IpFamily, Rules, Rules),
    /// Makes a virtual server.
    AddServer(Service),
    /// Changes scheduler, flags or persistence of a virtual server.
    SetServer(Service),
    /// Deletes a virtual server with its destinations.
    DeleteServer(ServiceKey),
    /// Gives a virtual server a destination.
    AddDestination(ServiceKey, Destination),
    /// Gives a destination another weight: 0 to drain it, 1 to use it again.
    SetDestination(ServiceKey, Destination),
    /// Takes a drained destination away.
    DeleteDestination(ServiceKey, SocketAddr),
    /// Adds an element to a set, or gives it another mark.
    AddElement(IpFamily, SetName, Element),
    /// Takes an element from a set.
    DeleteElement(IpFamily, SetName, Entry),
    /// Puts an address on the dummy link.
    AddAddress(IpAddr),
    /// Takes an address from the dummy link.
    DeleteAddress(IpAddr),
}

/// As one would type it.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tune => f.write_str("sysctl net.ipv4.vs"),
            Self::AddLink => write!(f, "ip link add {LINK} type dummy"),
            Self::CreateSet(family, set) => write!(f, "ipset {}", set.declaration(*family)),
            Self::ReplaceSet(family, set, elements) => {
                write!(f, "ipset swap {} (anew, with {} elements)", set.name(*family), elements.len())
            }
            Self::DestroySet(family, set) => write!(f, "ipset destroy {}", set.name(*family)),
            Self::SetRules(family, _, rules) => {
                write!(f, "{}-restore --noflush", crate::skeleton::tool(*family))?;
                if rules.is_empty() { f.write_str(" (nothing is left)") } else { Ok(()) }
            }
            Self::AddServer(service) => write!(f, "ipvsadm -A {service}"),
            Self::SetServer(service) => write!(f, "ipvsadm -E {service}"),
            Self::DeleteServer(key) => write!(f, "ipvsadm -D {key}"),
            Self::AddDestination(key, destination) => write!(f, "ipvsadm -a {key} {destination}"),
            Self::SetDestination(key, destination) => write!(f, "ipvsadm -e {key} {destination}"),
            Self::DeleteDestination(key, address) => write!(f, "ipvsadm -d {key} -r {address}"),
            Self::AddElement(family, set, element) => {
                write!(f, "ipset add {} {element}", set.name(*family))
            }
            Self::DeleteElement(family, set, entry) => {
                write!(f, "ipset del {} {entry}", set.name(*family))
            }
            Self::AddAddress(address) => write!(f, "ip address add {address} dev {LINK}"),
            Self::DeleteAddress(address) => write!(f, "ip address del {address} dev {LINK}"),
        }
    }
}

/// What the kernel holds after a transaction.
pub fn advance(state: &mut State, transaction: &Transaction<Op>) {
    for op in &transaction.ops {
        step(state, op);
    }
}

/// What the kernel holds after an operation.
pub fn step(state: &mut State, op: &Op) {
    match op {
        Op::Tune => state.tuned = true,
        Op::AddLink => state.link = true,
        Op::CreateSet(_, set) => {
            state.sets.insert(*set, BTreeMap::new());
        }
        Op::ReplaceSet(_, set, elements) => {
            state.sets.insert(*set, elements.iter().map(|e| (e.entry, e.mark)).collect());
            state.misdeclared.remove(set);
        }
        Op::DestroySet(_, set) => {
            state.sets.remove(set);
            state.misdeclared.remove(set);
            state.forget_shared();
        }
        Op::SetRules(_, _, rules) => state.rules = rules.clone(),
        Op::AddServer(service) => {
            let server = Server { service: service.clone(), destinations: BTreeMap::new() };
            state.servers.insert(service.key, server);
        }
        Op::SetServer(service) => {
            if let Some(server) = state.servers.get_mut(&service.key) {
                server.service = service.clone();
            }
        }
        Op::DeleteServer(key) => {
            state.servers.remove(key);
        }
        Op::AddDestination(key, destination) | Op::SetDestination(key, destination) => {
            if let Some(server) = state.servers.get_mut(key) {
                server.destinations.insert(destination.address, *destination);
            }
        }
        Op::DeleteDestination(key, address) => {
            if let Some(server) = state.servers.get_mut(key) {
                server.destinations.remove(address);
            }
        }
        Op::AddElement(_, set, element) => {
            state.sets.entry(*set).or_default().insert(element.entry, element.mark);
        }
        Op::DeleteElement(_, set, entry) => {
            if let Some(elements) = state.sets.get_mut(set) {
                elements.remove(entry);
            }
        }
        Op::AddAddress(address) => {
            state.addresses.insert(*address);
        }
        Op::DeleteAddress(address) => {
            state.addresses.remove(address);
        }
    }
}
