//! What becomes of a packet under a state, by the lookup that the programs run. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use shunt_core::walk::{Outcome, Packet};
use shunt_ebpf_abi::lookup::{
    Found, Judgement, Tables, choose, class, find, hairpin, hashed, judge, may_pass,
};
use shunt_ebpf_abi::{Address, Endpoint, Frontend, FrontendKey, Group, address_flags};

use crate::state::{FamilyFlags, State};

/// A state as the programs see it: its maps, and what the kernel knows of the node.
#[derive(Clone, Copy, Debug)]
pub struct Walked<'a> {
    state: &'a State,
    local: &'a BTreeSet<IpAddr>,
}

impl Tables for Walked<'_> {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        self.state.frontends().get(key).copied()
    }

    fn address(&self, address: &Address) -> u32 {
        let flags = self.state.addresses.get(address).copied().unwrap_or(0);
        flags | if self.local.contains(&IpAddr::from(*address)) { address_flags::LOCAL } else { 0 }
    }

    fn in_range(&self, owner: u32, address: &Address) -> bool {
        let address = IpAddr::from(*address);
        self.state.ranges_of(owner).any(|range: &IpNet| range.contains(&address))
    }

    fn slot(&self, number: u32) -> Option<u32> {
        (number < self.state.sizes.slots).then(|| self.state.slot(number))
    }

    fn endpoint(&self, id: u32) -> Option<Endpoint> {
        (id < self.state.sizes.endpoints).then(|| self.state.endpoint(id))
    }

    /// Every endpoint of a table once: which entry a packet falls in depends on ports that are not given.
    fn maglev(&self, group: u32, entry: u32) -> Option<u32> {
        self.state.maglev().get(&group)?.get(entry as usize).copied()
    }

    fn flags(&self) -> u32 {
        let in_use = if self.state.installed { FamilyFlags::of(self.state.family).in_use } else { 0 };
        self.state.flags | in_use
    }
}

/// Whether only local pods send by an interface, as [`State::pods`] says.
fn is_pod_interface(pods: Option<&str>, interface: Option<&str>) -> bool {
    match (pods.and_then(|pods| pods.split_once(' ')), interface) {
        (Some(("bridge", name)), Some(interface)) => interface == name,
        (Some(("prefix", prefix)), Some(interface)) => interface.starts_with(prefix),
        _ => false,
    }
}

/// What becomes of a packet. The error says what in the state cannot be followed.
pub fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
    let tables = Walked { state, local };
    let (source, destination) = (Address::from(packet.source), Address::from(packet.destination));
    if !state.owns_address(&destination) {
        return Err(format!("{packet}: not of {}", state.family));
    }
    let key = FrontendKey {
        address: destination,
        port: packet.port.to_be(),
        protocol: packet.protocol.number(),
        reserved: 0,
    };
    let frontend = match find(&tables, &key) {
        Found::Frontend(frontend) => frontend,
        Found::UnknownPort => return Ok(Outcome::Reject),
        Found::Unallocated => return Ok(Outcome::Drop),
        Found::Nothing => return Ok(Outcome::None),
    };
    if !may_pass(&tables, &frontend, &source, &destination) {
        return Ok(Outcome::Drop);
    }
    let pod_interface = is_pod_interface(state.pods.as_deref(), packet.interface.as_deref());
    match judge(&frontend, class(&tables, &source, pod_interface)) {
        Judgement::Reject => Ok(Outcome::Reject),
        Judgement::Drop => Ok(Outcome::Drop),
        Judgement::Forward { local, masquerade } => {
            let mut endpoints = BTreeMap::new();
            for chosen in choices(&tables, &key, &frontend, local) {
                let Some((_, endpoint)) = chosen else { return Ok(Outcome::Drop) };
                let to = SocketAddr::new(endpoint.address.into(), u16::from_be(endpoint.port));
                endpoints.insert(to, masquerade || hairpin(&source, &endpoint));
            }
            if endpoints.is_empty() {
                return Ok(Outcome::Drop);
            }
            Ok(Outcome::Forward(endpoints.into_iter().collect()))
        }
    }
}

/// What a packet may be given: by hash what is in the table, by chance what is in the slots.
fn choices(
    tables: &Walked<'_>,
    key: &FrontendKey,
    frontend: &Frontend,
    local: bool,
) -> Vec<Option<(u32, Endpoint)>> {
    let table = Group::id(frontend.service, local);
    let entries = tables.state.maglev().get(&table).map_or(0, |ids| ids.len() as u32);
    let by_hash: Vec<_> = (0..entries).map(|entry| hashed(tables, frontend, local, entry)).collect();
    if !by_hash.is_empty() && by_hash.iter().all(Option::is_some) {
        return by_hash;
    }
    let count = frontend.group(local).count;
    let by_chance = (0..count).map(|slot| choose(tables, key, frontend, local, random_for(slot, count)));
    by_hash.into_iter().flatten().map(Some).chain(by_chance).collect()
}

/// A random number that leads to a slot.
fn random_for(slot: u32, count: u32) -> u32 {
    let first = (u64::from(slot) << 32).div_ceil(u64::from(count.max(1)));
    u32::try_from(first).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use shunt_ebpf_abi::lookup::scale;

    use super::*;

    #[test]
    fn every_slot_is_met() {
        for count in [1, 2, 3, 7, 100, 4097, u32::MAX] {
            for slot in (0..count).step_by((count as usize / 100).max(1)).chain([count - 1]) {
                assert_eq!(scale(random_for(slot, count), count), slot, "of {count}");
            }
        }
    }
}
