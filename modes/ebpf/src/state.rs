//! What the maps hold for one family, typed. Its `Display` has one map entry a line.

pub(crate) mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use shunt_core::id::IpFamily;
use shunt_core::table::{self, Change};
use shunt_ebpf_abi::{
    Address, Endpoint, FIRST_SERVICE_ID, Frontend, FrontendKey, Group, config_flags, range_owner, size,
};
use shunt_mode::Usage;

use crate::sizes::moved_frontend;

/// How much there is room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    /// Frontends of this family.
    pub frontends: u32,
    /// Service ids of both families are smaller.
    pub services: u32,
    /// Endpoint ids of both families are smaller.
    pub endpoints: u32,
    /// Slots of both families.
    pub slots: u32,
    /// Maglev tables of this family.
    pub maglev: u32,
    /// Addresses of this family of which something is known.
    pub addresses: u32,
    /// Ranges of this family.
    pub ranges: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            frontends: size::FRONTENDS,
            services: size::FRONTENDS,
            endpoints: size::ENDPOINTS,
            slots: size::SLOTS,
            maglev: size::MAGLEV,
            addresses: size::ADDRESSES,
            ranges: size::RANGES,
        }
    }
}

impl Sizes {
    /// The slots of a family: the first half of the map or the second.
    pub const fn slots_of(&self, family: IpFamily) -> std::ops::Range<u32> {
        let half = self.slots / 2;
        match family {
            IpFamily::V4 => 0..half,
            IpFamily::V6 => half..self.slots,
        }
    }
}

/// The lowest bit of the ids of a family.
pub const fn parity(family: IpFamily) -> u32 {
    match family {
        IpFamily::V4 => 0,
        IpFamily::V6 => 1,
    }
}

/// The ids of a family from one on: those of both families alternate.
pub fn ids_from(first: u32) -> impl Iterator<Item = u32> {
    (first..).step_by(2)
}

/// The bits of a family in the settings.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FamilyFlags {
    /// Node ports answer on every local address.
    pub all_local: u32,
    /// Local pods are known by address.
    pub pods_by_range: u32,
    /// Local pods are known by interface.
    pub pods_by_interface: u32,
    /// There are ranges of cluster IPs.
    pub service_cidrs: u32,
    /// New flows of the family are served.
    pub in_use: u32,
}

impl FamilyFlags {
    /// The bits of a family.
    pub const fn of(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self {
                all_local: config_flags::NODE_PORTS_ALL_LOCAL_V4,
                pods_by_range: config_flags::PODS_BY_RANGE_V4,
                pods_by_interface: config_flags::PODS_BY_INTERFACE_V4,
                service_cidrs: config_flags::SERVICE_CIDRS_V4,
                in_use: config_flags::IN_USE_V4,
            },
            IpFamily::V6 => Self {
                all_local: config_flags::NODE_PORTS_ALL_LOCAL_V6,
                pods_by_range: config_flags::PODS_BY_RANGE_V6,
                pods_by_interface: config_flags::PODS_BY_INTERFACE_V6,
                service_cidrs: config_flags::SERVICE_CIDRS_V6,
                in_use: config_flags::IN_USE_V6,
            },
        }
    }

    /// Those that follow from the forwarding table.
    pub const fn settings(&self) -> u32 {
        self.all_local | self.pods_by_range | self.pods_by_interface | self.service_cidrs
    }
}

/// What refers to a service id. There are as many as Services, and to most few things refer: a sorted vector has
/// less room to spare than a node of a set.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Users {
    /// Frontends, in ascending order.
    pub frontends: Vec<FrontendKey>,
    /// Ids of its endpoints, in ascending order.
    pub endpoints: Vec<u32>,
}

/// Adds to what is in ascending order.
fn insert<T: Ord>(to: &mut Vec<T>, value: T) {
    if let Err(at) = to.binary_search(&value) {
        if to.is_empty() {
            // Most Services have one frontend.
            to.reserve_exact(1);
        }
        to.insert(at, value);
    }
}

/// Removes from what is in ascending order.
fn remove<T: Ord>(from: &mut Vec<T>, value: &T) {
    if let Ok(at) = from.binary_search(value) {
        from.remove(at);
    }
}

/// Ids of one family: which are free.
#[derive(Clone, Debug, Default)]
struct Ids {
    /// Free ones below `end`.
    free: BTreeSet<u32>,
    /// All from here are free.
    end: u32,
}

impl Ids {
    fn take(&mut self, id: u32) {
        while self.end <= id {
            self.free.insert(self.end);
            self.end += 2;
        }
        self.free.remove(&id);
    }

    fn release(&mut self, id: u32) {
        self.free.insert(id);
    }

    /// Free ids, the smallest first.
    fn iter(&self, limit: u32) -> impl Iterator<Item = u32> {
        self.free.iter().copied().chain((self.end..limit).step_by(2)).take_while(move |id| *id < limit)
    }
}

/// Everything that we own in the maps, for one family.
#[derive(Clone, Debug)]
pub struct State {
    /// The family.
    pub family: IpFamily,
    /// How much there is room for.
    pub sizes: Sizes,
    /// Whether the programs are attached and the maps filled.
    pub installed: bool,
    /// The family's bits in the settings, as far as they follow from the table.
    pub flags: u32,
    /// By which interface local pods are known: `bridge NAME` or `prefix NAME`.
    pub pods: Option<Arc<str>>,
    /// Names of Service ports by service id.
    names: BTreeMap<u32, Arc<str>>,
    /// What is served where.
    frontends: BTreeMap<FrontendKey, Frontend>,
    /// Slots of the family, from its first one. Nothing follows the last used one.
    slots: Vec<u32>,
    /// Endpoints by half their id. An unused entry has a generation at most.
    endpoints: Vec<Endpoint>,
    /// What is known of single addresses, except whether they are local.
    pub addresses: BTreeMap<Address, u32>,
    /// Ranges by owner.
    ranges: BTreeMap<u32, BTreeSet<IpNet>>,
    /// Endpoints in Maglev tables, in ascending order, by [`Group::id`]. Ids, addresses and seed say what a table
    /// holds.
    maglev: BTreeMap<u32, Arc<[u32]>>,

    // What follows from the above.
    by_name: BTreeSet<(Arc<str>, u32)>,
    users: BTreeMap<u32, Users>,
    service_ids: Ids,
    endpoint_ids: Ids,
    /// Groups by first slot and count, with how many frontends have them.
    groups: BTreeMap<(u32, u32), u32>,
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.family == other.family
            && self.installed == other.installed
            && self.flags == other.flags
            && self.pods == other.pods
            && self.names == other.names
            && self.frontends == other.frontends
            && self.slots == other.slots
            && self.endpoints == other.endpoints
            && self.addresses == other.addresses
            && self.ranges == other.ranges
            && self.maglev == other.maglev
    }
}

impl Eq for State {}

impl State {
    /// Nothing at all, in maps of the usual sizes.
    pub fn empty(family: IpFamily) -> Self {
        Self {
            family,
            sizes: Sizes::default(),
            installed: false,
            flags: 0,
            pods: None,
            names: BTreeMap::new(),
            frontends: BTreeMap::new(),
            slots: Vec::new(),
            endpoints: Vec::new(),
            addresses: BTreeMap::new(),
            ranges: BTreeMap::new(),
            maglev: BTreeMap::new(),
            by_name: BTreeSet::new(),
            users: BTreeMap::new(),
            service_ids: Ids { free: BTreeSet::new(), end: FIRST_SERVICE_ID + parity(family) },
            endpoint_ids: Ids { free: BTreeSet::new(), end: 2 + parity(family) },
            groups: BTreeMap::new(),
        }
    }

    /// Whether the maps hold nothing of the family.
    pub fn is_empty(&self) -> bool {
        self.flags == 0
            && self.pods.is_none()
            && self.names.is_empty()
            && self.frontends.is_empty()
            && self.slots.is_empty()
            && self.users.is_empty()
            && self.addresses.is_empty()
            && self.ranges.is_empty()
            && self.maglev.is_empty()
    }

    /// Whether an address is of the family.
    pub fn owns_address(&self, address: &Address) -> bool {
        address.is_v4() == (self.family == IpFamily::V4)
    }

    /// Whether an id is of the family.
    pub const fn owns_id(&self, id: u32) -> bool {
        id & 1 == parity(self.family)
    }

    /// Whether a range's owner is of the family.
    pub const fn owns_range(&self, owner: u32) -> bool {
        // The owners below the service ids: IPv4 has 1 and 2, IPv6 has 3 and 4.
        if owner < FIRST_SERVICE_ID {
            matches!(self.family, IpFamily::V4) == (owner <= range_owner::SERVICE_CIDR_V4)
        } else {
            self.owns_id(owner)
        }
    }

    /// Names of Service ports by service id.
    pub const fn names(&self) -> &BTreeMap<u32, Arc<str>> {
        &self.names
    }

    /// The service id of a name: of several, the one with frontends.
    pub fn id_of(&self, name: &Arc<str>) -> Option<u32> {
        let ids = || {
            let from = self.by_name.range((name.clone(), 0)..);
            from.take_while(|(n, _)| n == name).map(|(_, id)| *id)
        };
        ids().find(|id| self.users(*id).is_some_and(|u| !u.frontends.is_empty())).or_else(|| ids().next())
    }

    /// What refers to a service id.
    pub fn users(&self, id: u32) -> Option<&Users> {
        self.users.get(&id)
    }

    /// Service ids that something refers to, named or not.
    pub fn used_ids(&self) -> BTreeSet<u32> {
        let owners = self.ranges.keys().copied().filter(|owner| *owner >= FIRST_SERVICE_ID);
        let hashing = self.maglev.keys().map(|group| group >> 1);
        self.names.keys().copied().chain(self.users.keys().copied()).chain(owners).chain(hashing).collect()
    }

    /// Service ids that are free, the smallest first.
    pub fn free_service_ids(&self) -> impl Iterator<Item = u32> {
        self.service_ids.iter(self.sizes.services)
    }

    /// Endpoint ids that are free, the smallest first.
    pub fn free_endpoint_ids(&self) -> impl Iterator<Item = u32> {
        self.endpoint_ids.iter(self.sizes.endpoints)
    }

    /// All frontends.
    pub const fn frontends(&self) -> &BTreeMap<FrontendKey, Frontend> {
        &self.frontends
    }

    /// The content of a slot; 0 for one that is empty or another family's.
    pub fn slot(&self, number: u32) -> u32 {
        let range = self.sizes.slots_of(self.family);
        number.checked_sub(range.start).and_then(|i| self.slots.get(i as usize)).copied().unwrap_or(0)
    }

    /// Numbers of used slots with what they hold.
    pub fn used_slots(&self) -> impl Iterator<Item = (u32, u32)> {
        let first = self.sizes.slots_of(self.family).start;
        (first..).zip(&self.slots).filter(|(_, id)| **id != 0).map(|(number, id)| (number, *id))
    }

    /// Groups by first slot and count.
    pub fn groups(&self) -> impl Iterator<Item = Group> {
        self.groups.keys().map(|(base, count)| Group { base: *base, count: *count })
    }

    /// An endpoint; an empty entry for an id that was never given away.
    pub fn endpoint(&self, id: u32) -> Endpoint {
        let entry = if self.owns_id(id) { self.endpoints.get(id as usize / 2) } else { None };
        entry.copied().unwrap_or_default()
    }

    /// All endpoints that have an owner, by id.
    pub fn endpoints(&self) -> impl Iterator<Item = (u32, &Endpoint)> {
        let ids = ids_from(parity(self.family));
        ids.zip(&self.endpoints).filter(|(_, endpoint)| endpoint.service != 0)
    }

    /// Ranges of an owner.
    pub fn ranges_of(&self, owner: u32) -> impl Iterator<Item = &IpNet> {
        self.ranges.get(&owner).into_iter().flatten()
    }

    /// All ranges.
    pub const fn ranges(&self) -> &BTreeMap<u32, BTreeSet<IpNet>> {
        &self.ranges
    }

    /// Sets or clears the name of a service id.
    pub fn set_name(&mut self, id: u32, to: Option<Arc<str>>) {
        if let Some(before) = self.names.remove(&id) {
            self.by_name.remove(&(before, id));
        }
        if let Some(name) = to {
            self.by_name.insert((name.clone(), id));
            self.names.insert(id, name);
        }
        self.settle(id);
    }

    /// Sets or removes a frontend.
    pub fn set_frontend(&mut self, key: FrontendKey, to: Option<Frontend>) {
        let before = match to {
            Some(to) => self.frontends.insert(key, to),
            None => self.frontends.remove(&key),
        };
        if let Some(frontend) = before {
            for group in [frontend.cluster, frontend.local] {
                if let Some(count) = self.groups.get_mut(&(group.base, group.count)) {
                    *count -= 1;
                    if *count == 0 {
                        self.groups.remove(&(group.base, group.count));
                    }
                }
            }
            if let Some(users) = self.users.get_mut(&frontend.service) {
                remove(&mut users.frontends, &key);
            }
            self.settle(frontend.service);
        }
        if let Some(frontend) = to {
            for group in [frontend.cluster, frontend.local] {
                if group.count > 0 {
                    *self.groups.entry((group.base, group.count)).or_default() += 1;
                }
            }
            insert(&mut self.users.entry(frontend.service).or_default().frontends, key);
            self.settle(frontend.service);
        }
    }

    /// What there is when the maps have become others with such sizes: the slots of IPv6 lie elsewhere, and what was
    /// remembered of endpoints that have no owner, and for which there is no room, is forgotten.
    pub fn resize(&mut self, sizes: Sizes) {
        let (from, to) = (self.sizes.slots, sizes.slots);
        self.sizes = sizes;
        let moved: Vec<_> =
            self.frontends.iter().map(|(key, held)| (*key, moved_frontend(held, from, to))).collect();
        for (key, frontend) in moved {
            self.set_frontend(key, Some(frontend));
        }
        let room = (sizes.endpoints + 1).saturating_sub(parity(self.family)) / 2;
        self.endpoints.truncate(room as usize);
        while self.endpoints.last() == Some(&Endpoint::default()) {
            self.endpoints.pop();
        }
    }

    /// Fills a slot.
    pub fn set_slot(&mut self, number: u32, id: u32) {
        let range = self.sizes.slots_of(self.family);
        if !range.contains(&number) {
            return;
        }
        let index = (number - range.start) as usize;
        if index >= self.slots.len() && id != 0 {
            self.slots.resize(index + 1, 0);
        }
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = id;
        }
        while self.slots.last() == Some(&0) {
            self.slots.pop();
        }
    }

    /// Fills an entry of the endpoints.
    pub fn set_endpoint(&mut self, id: u32, to: Endpoint) {
        if !self.owns_id(id) || id < 2 {
            return;
        }
        let index = id as usize / 2;
        if index >= self.endpoints.len() && to != Endpoint::default() {
            self.endpoints.resize(index + 1, Endpoint::default());
        }
        if let Some(entry) = self.endpoints.get_mut(index) {
            let before = std::mem::replace(entry, to);
            if before.service != to.service {
                if let Some(users) = self.users.get_mut(&before.service) {
                    remove(&mut users.endpoints, &id);
                    self.settle(before.service);
                }
                if to.service == 0 {
                    self.endpoint_ids.release(id);
                } else {
                    self.endpoint_ids.take(id);
                    insert(&mut self.users.entry(to.service).or_default().endpoints, id);
                    self.settle(to.service);
                }
            }
        }
        while self.endpoints.last() == Some(&Endpoint::default()) {
            self.endpoints.pop();
        }
    }

    /// Sets what is known of an address.
    pub fn set_address(&mut self, address: Address, flags: u32) {
        if flags == 0 {
            self.addresses.remove(&address);
        } else {
            self.addresses.insert(address, flags);
        }
    }

    /// Adds a range.
    pub fn add_range(&mut self, owner: u32, range: IpNet) {
        self.ranges.entry(owner).or_default().insert(range);
    }

    /// Removes a range.
    pub fn remove_range(&mut self, owner: u32, range: &IpNet) {
        if let Some(ranges) = self.ranges.get_mut(&owner) {
            ranges.remove(range);
            if ranges.is_empty() {
                self.ranges.remove(&owner);
            }
        }
    }

    /// Endpoints in Maglev tables by [`Group::id`].
    pub const fn maglev(&self) -> &BTreeMap<u32, Arc<[u32]>> {
        &self.maglev
    }

    /// Sets the endpoints of a group's Maglev table; without any there is none.
    pub fn set_maglev(&mut self, group: u32, mut ids: Vec<u32>) {
        if ids.is_empty() {
            self.maglev.remove(&group);
        } else {
            ids.sort_unstable();
            ids.dedup();
            self.maglev.insert(group, ids.into());
        }
    }

    /// How full the maps are, as far as this family may fill them.
    pub fn usage(&self) -> Vec<Usage> {
        let of = |table, entries, limit: u32| Usage { table, entries, limit: limit as usize };
        // Ids of the two families alternate; the first ones are never given away.
        vec![
            of("frontends", self.frontends.len(), self.sizes.frontends),
            of("services", self.names.len(), self.sizes.services.saturating_sub(FIRST_SERVICE_ID) / 2),
            of("endpoints", self.endpoints().count(), self.sizes.endpoints.saturating_sub(2) / 2),
            of("slots", self.used_slots().count(), self.sizes.slots / 2),
            of("maglev", self.maglev.len(), self.sizes.maglev),
        ]
    }

    /// Brings up to date what follows from what refers to a service id.
    fn settle(&mut self, id: u32) {
        if self.users.get(&id).is_some_and(|u| u.frontends.is_empty() && u.endpoints.is_empty()) {
            self.users.remove(&id);
        }
        // Others cannot be given away.
        if id >= FIRST_SERVICE_ID && self.owns_id(id) && id < self.sizes.services {
            if self.users.contains_key(&id) || self.names.contains_key(&id) {
                self.service_ids.take(id);
            } else if id < self.service_ids.end {
                self.service_ids.release(id);
            }
        }
    }

    /// Leaves only what a change touches.
    pub fn restrict(&mut self, only: &Change) {
        if only.everything {
            return;
        }
        let family = self.family;
        let keys: BTreeSet<FrontendKey> = only.frontends.iter().map(|f| frontend_key(f, family)).collect();
        let mut left = Self { sizes: self.sizes, installed: self.installed, ..Self::empty(family) };
        for (key, frontend) in self.frontends.iter().filter(|(key, _)| keys.contains(key)) {
            left.set_frontend(*key, Some(*frontend));
            left.set_name(frontend.service, self.names.get(&frontend.service).cloned());
            for range in self.ranges_of(frontend.service) {
                left.add_range(frontend.service, *range);
            }
            for local in [false, true] {
                let group = Group::id(frontend.service, local);
                if let Some(ids) = self.maglev.get(&group) {
                    left.maglev.insert(group, ids.clone());
                }
            }
            for group in [frontend.cluster, frontend.local] {
                for number in (group.base..).take(group.count as usize) {
                    left.set_slot(number, self.slot(number));
                }
            }
            let users = self.users.get(&frontend.service);
            for id in users.into_iter().flat_map(|u| &u.endpoints) {
                left.set_endpoint(*id, self.endpoint(*id));
            }
        }
        for address in only.cluster_ips.iter().map(|ip| Address::from(*ip)) {
            left.set_address(address, self.addresses.get(&address).copied().unwrap_or(0));
        }
        *self = left;
    }
}

/// The key of a frontend in a family's table.
pub fn frontend_key(frontend: &table::Frontend, family: IpFamily) -> FrontendKey {
    let address = match (frontend.address, family) {
        (Some(address), _) => Address::from(address),
        (None, IpFamily::V4) => Address::v4(0),
        (None, IpFamily::V6) => Address::ANY,
    };
    FrontendKey { address, port: frontend.port.to_be(), protocol: frontend.protocol.number(), reserved: 0 }
}
