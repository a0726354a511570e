//! What we own in the kernel, typed. Its `Display` is a file that `nft -f` loads.

pub(crate) mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nft_netlink::{BaseChain, Bytes, Element, ElementData, Verdict};
use shunt_core::id::IpFamily;
use shunt_core::table::{Change, Frontend, LocalEndpoint};
use shunt_mode::Usage;

use crate::affinity::{self, Affinity};
use crate::layout::{
    self, ChainKey, Class, Endpoint, KeyReader, LIST_MAX, List, POSTROUTING, SECOND_LIST_BASE, SetKey, TABLE,
};
use crate::ranges::range_between;
use crate::rules::{self, Rule};

/// A chain with its rules.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chain {
    /// Where it is hooked; `None` for a chain that only others lead to.
    pub base: Option<BaseChain>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// What the maps hold for one frontend.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Its class; `None` when only endpoints are left.
    pub class: Option<Class>,
    /// Slots of both lists. A hole is an element that is missing.
    pub slots: [Vec<Option<Endpoint>>; 2],
}

impl Held {
    /// The slots of a list.
    pub fn list(&self, list: List) -> &[Option<Endpoint>] {
        &self.slots[list as usize]
    }

    /// True when the maps hold nothing for the frontend.
    pub fn is_empty(&self) -> bool {
        self.class.is_none() && self.slots.iter().flatten().all(Option::is_none)
    }
}

/// An element of one of our sets that means nothing to us.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Stray {
    /// The set it is in.
    pub set: SetKey,
    /// Its key.
    pub key: Bytes,
    /// End of its range, for a range of a concatenation.
    pub key_end: Option<Bytes>,
    /// Whether it ends a range.
    pub interval_end: bool,
}

/// Everything that we own in the kernel, for one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// The family.
    pub family: IpFamily,
    /// Whether the table exists.
    pub exists: bool,
    /// Whether something in the table is declared in a way that cannot be mended in place.
    pub foreign: bool,
    /// Sets that exist and are declared as ours are.
    pub sets: BTreeSet<SetKey>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
    /// Elements of the map of classes.
    pub classes: BTreeSet<Class>,
    /// What the maps hold for each frontend.
    pub frontends: BTreeMap<Frontend, Held>,
    /// Addresses on which node ports answer.
    pub node_port_ips: BTreeSet<IpAddr>,
    /// Cluster IPs.
    pub cluster_ips: BTreeSet<IpAddr>,
    /// Ranges of cluster IPs.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Local endpoints.
    pub hairpins: BTreeSet<LocalEndpoint>,
    /// Frontends that only allowed sources may use.
    pub guarded: BTreeSet<Frontend>,
    /// Which sources those are.
    pub sources: BTreeMap<Frontend, BTreeSet<IpNet>>,
    /// Elements that mean nothing to us.
    pub strays: BTreeSet<Stray>,
    /// Endpoints in the sized map, holes not counted.
    pub endpoint_count: usize,
    /// What there is for Service ports with session affinity, by id.
    pub affinity: BTreeMap<u32, Affinity>,
    /// Their ids by name, as the names of chains say. More than one only if somebody made chains by hand.
    pub affinity_ids: BTreeMap<String, BTreeSet<u32>>,
}

impl State {
    /// Nothing at all.
    pub fn empty(family: IpFamily) -> Self {
        Self {
            family,
            exists: false,
            foreign: false,
            sets: BTreeSet::new(),
            chains: BTreeMap::new(),
            classes: BTreeSet::new(),
            frontends: BTreeMap::new(),
            node_port_ips: BTreeSet::new(),
            cluster_ips: BTreeSet::new(),
            service_cidrs: BTreeSet::new(),
            hairpins: BTreeSet::new(),
            guarded: BTreeSet::new(),
            sources: BTreeMap::new(),
            strays: BTreeSet::new(),
            endpoint_count: 0,
            affinity: BTreeMap::new(),
            affinity_ids: BTreeMap::new(),
        }
    }

    /// Capacity of the map of frontends that is in use; `None` when there is none.
    pub fn services_capacity(&self) -> Option<u32> {
        self.sets.iter().filter_map(|s| if let SetKey::Services(n) = s { Some(*n) } else { None }).max()
    }

    /// Capacity of the map of endpoints that is in use; `None` when there is none.
    pub fn endpoints_capacity(&self) -> Option<u32> {
        self.sets.iter().filter_map(|s| if let SetKey::Endpoints(n) = s { Some(*n) } else { None }).max()
    }

    /// Whether packets are led to frontends: then some may be on their way through the rules at any time.
    pub(crate) fn leads_packets(&self) -> bool {
        self.chains.iter().any(|(name, chain)| chain.base.is_some() && name != POSTROUTING)
    }

    /// How full the sized maps are.
    pub(crate) fn usage(&self) -> Vec<Usage> {
        // Node ports have a map of their own, without a limit.
        let services = self.frontends.keys().filter(|f| f.address.is_some()).count();
        let tables = [
            ("services", services, self.services_capacity()),
            ("endpoints", self.endpoint_count, self.endpoints_capacity()),
        ];
        tables
            .into_iter()
            .filter_map(|(table, entries, limit)| Some(Usage { table, entries, limit: limit? as usize }))
            .collect()
    }

    /// Whether there are node ports.
    pub fn has_node_ports(&self) -> bool {
        // A node port has no address, which sorts first.
        self.frontends.first_key_value().is_some_and(|(f, _)| f.address.is_none())
    }

    /// Sets or clears the class of a frontend.
    pub fn set_class(&mut self, frontend: Frontend, class: Option<Class>) {
        let held = &mut self.frontends.entry(frontend).or_default().class;
        let before = std::mem::replace(held, class);
        self.forget_if_empty(&frontend);
        if before != class {
            if let Some(Class::Affinity { id, legs }) = before {
                self.edit_affinity(id, |a| a.discount_frontend(legs));
            }
            if let Some(Class::Affinity { id, legs }) = class {
                self.edit_affinity(id, |a| a.count_frontend(legs));
            }
        }
    }

    /// Adds a chain without rules.
    pub fn add_chain(&mut self, name: String, base: Option<BaseChain>) {
        if let Some((id, port)) = affinity::read_chain_name(&name)
            && !self.chains.contains_key(&name)
        {
            self.affinity_ids.entry(port.to_owned()).or_default().insert(id);
            self.edit_affinity(id, |a| a.chains += 1);
        }
        self.chains.insert(name, Chain { base, rules: Vec::new() });
    }

    /// Removes a chain.
    pub fn remove_chain(&mut self, name: &str) {
        if self.chains.remove(name).is_none() {
            return;
        }
        let Some((id, port)) = affinity::read_chain_name(name) else { return };
        self.edit_affinity(id, |a| a.chains -= 1);
        let mut names = List::ALL.map(|list| affinity::chain_name(id, list, port)).into_iter();
        if names.any(|name| self.chains.contains_key(&name)) {
            return;
        }
        if let Some(ids) = self.affinity_ids.get_mut(port) {
            ids.remove(&id);
            if ids.is_empty() {
                self.affinity_ids.remove(port);
            }
        }
    }

    /// The id of a Service port with affinity. Of several it is the one that is in use.
    pub fn affinity_id(&self, port: &str) -> Option<u32> {
        let used = |id: &u32| self.affinity.get(id).is_some_and(|a| !a.frontends.is_empty());
        let ids = self.affinity_ids.get(port)?;
        ids.iter().copied().find(used).or_else(|| ids.first().copied())
    }

    /// Changes what there is for an id.
    pub fn edit_affinity(&mut self, id: u32, edit: impl FnOnce(&mut Affinity)) {
        let affinity = self.affinity.entry(id).or_default();
        edit(affinity);
        if affinity.is_empty() {
            self.affinity.remove(&id);
        }
    }

    /// Removes a set with its elements, as far as they are not those of a frontend.
    pub fn remove_set(&mut self, set: SetKey) {
        self.sets.remove(&set);
        let ids: Vec<u32> = match set {
            SetKey::AffinityEndpoints | SetKey::AffinitySlots => self.affinity.keys().copied().collect(),
            _ => Vec::new(),
        };
        for id in ids {
            self.edit_affinity(id, |a| match set {
                SetKey::AffinityEndpoints => a.endpoints.clear(),
                _ => a.slots = Default::default(),
            });
        }
    }

    /// The name of a chain. One that belongs to a Service port with affinity carries the name of that
    /// too, as far as the chain exists.
    pub fn chain_name(&self, chain: &ChainKey) -> String {
        let name = chain.to_string();
        if matches!(chain, ChainKey::Affinity { .. }) {
            let mut from = self.chains.range(name.clone()..);
            if let Some((found, _)) = from.next().filter(|(found, _)| found.starts_with(&name)) {
                return found.clone();
            }
        }
        name
    }

    /// Where a class leads.
    pub fn leads_to(&self, class: Class) -> Verdict {
        class.chain().map_or(Verdict::Drop, |chain| Verdict::Goto(self.chain_name(&chain)))
    }

    /// Sets or clears a slot of a frontend.
    pub fn set_slot(&mut self, frontend: Frontend, list: List, index: usize, to: Option<Endpoint>) {
        if index > LIST_MAX {
            return;
        }
        let slots = &mut self.frontends.entry(frontend).or_default().slots[list as usize];
        if index >= slots.len() && to.is_some() {
            slots.resize(index + 1, None);
        }
        if let Some(slot) = slots.get_mut(index) {
            if frontend.address.is_some() {
                self.endpoint_count += usize::from(to.is_some());
                self.endpoint_count -= usize::from(slot.is_some());
            }
            *slot = to;
        }
        while slots.last().is_some_and(Option::is_none) {
            slots.pop();
        }
        self.forget_if_empty(&frontend);
    }

    fn forget_if_empty(&mut self, frontend: &Frontend) {
        if self.frontends.get(frontend).is_some_and(Held::is_empty) {
            self.frontends.remove(frontend);
        }
    }

    /// Takes in an element as the kernel holds it. Ranges are not handled here: their elements mean
    /// something only together (see [`crate::ranges`]).
    pub fn insert(&mut self, set: SetKey, element: &Element) {
        if self.place(set, element).is_none() {
            self.strays.insert(Stray {
                set,
                key: element.key.clone(),
                key_end: element.key_end.clone(),
                interval_end: element.interval_end,
            });
        }
    }

    fn place(&mut self, set: SetKey, element: &Element) -> Option<()> {
        let family = self.family;
        let mut key = KeyReader::new(&element.key);
        let value = match &element.data {
            Some(ElementData::Value(value)) => Some(KeyReader::new(value)),
            _ => None,
        };
        match set {
            SetKey::Services(_) | SetKey::NodePorts => {
                let keyed = matches!(set, SetKey::Services(_)).then_some(family);
                let frontend = key.frontend(keyed)?;
                let class = Class::from_number(value?.number()?)?;
                self.set_class(frontend, Some(class));
            }
            SetKey::Endpoints(_) | SetKey::NodePortEndpoints => {
                let keyed = matches!(set, SetKey::Endpoints(_)).then_some(family);
                let frontend = key.frontend(keyed)?;
                let slot = key.number()?;
                let list = if slot >= SECOND_LIST_BASE { List::Second } else { List::First };
                let index = (slot - list.base()) as usize;
                let endpoint = value?.endpoint(family)?;
                // A slot far beyond the others was not written by us; it must not cost memory.
                let known = self.frontends.get(&frontend).map_or(0, |h| h.list(list).len());
                if index > known + LIST_MAX / 2 || index >= LIST_MAX {
                    return None;
                }
                self.set_slot(frontend, list, index, Some(endpoint));
            }
            SetKey::Classes => {
                let class = Class::from_number(key.number()?)?;
                if element.data != Some(ElementData::Verdict(self.leads_to(class))) {
                    return None;
                }
                self.classes.insert(class);
            }
            SetKey::NodePortIps => {
                self.node_port_ips.insert(key.address(family)?);
            }
            SetKey::ClusterIps => {
                self.cluster_ips.insert(key.address(family)?);
            }
            SetKey::Hairpin => {
                let (source, address) = (key.address(family)?, key.address(family)?);
                if source != address {
                    return None;
                }
                let (protocol, port) = (key.protocol()?, key.port()?);
                self.hairpins.insert(LocalEndpoint { address, protocol, port });
            }
            SetKey::Guarded => {
                self.guarded.insert(key.frontend(Some(family))?);
            }
            SetKey::SourceRanges => {
                let frontend = key.frontend(Some(family))?;
                let from = key.address(family)?;
                let mut end = KeyReader::new(element.key_end.as_ref()?);
                end.frontend(Some(family))?;
                let to = end.address(family)?;
                let range = range_between(from, to)?;
                self.sources.entry(frontend).or_default().insert(range);
            }
            SetKey::AffinityEndpoints => {
                let (id, list, number) = affinity::read_token_key(key.number()?)?;
                let endpoint = value?.endpoint(family)?;
                self.edit_affinity(id, |a| a.set_endpoint(list, number, Some(endpoint)));
            }
            SetKey::AffinitySlots => {
                let id = affinity::read_id_part(key.number()?)?;
                let (list, index) = list_of_slot(key.number()?);
                let (of, base, number) = affinity::read_token_key(value?.number()?)?;
                if of != id || base != List::First || index >= affinity::NUMBER_MAX {
                    return None;
                }
                self.edit_affinity(id, |a| a.set_slot(list, index, Some(number)));
            }
            // Records are nobody's business but the kernel's.
            SetKey::Affinity => {}
            SetKey::ServiceCidrs => return None,
        }
        Some(())
    }

    /// What a lookup in one of our sets gives: `None` for a miss, else the data, empty for sets.
    pub fn lookup(&self, set: SetKey, key: &[u8]) -> Option<ElementData> {
        let family = self.family;
        let mut reader = KeyReader::new(key);
        let found = ElementData::Value(Bytes::from(&[][..]));
        let value = |data: Bytes| ElementData::Value(data);
        match set {
            SetKey::Services(_) | SetKey::NodePorts => {
                let keyed = matches!(set, SetKey::Services(_)).then_some(family);
                let class = self.frontends.get(&reader.frontend(keyed)?)?.class?;
                Some(value(Bytes::from(&class.number().to_ne_bytes()[..])))
            }
            SetKey::Endpoints(_) | SetKey::NodePortEndpoints => {
                let keyed = matches!(set, SetKey::Endpoints(_)).then_some(family);
                let held = self.frontends.get(&reader.frontend(keyed)?)?;
                let slot = reader.number()?;
                let list = if slot >= SECOND_LIST_BASE { List::Second } else { List::First };
                let endpoint = held.list(list).get((slot - list.base()) as usize)?.as_ref()?;
                Some(value(layout::endpoint_data(endpoint)))
            }
            SetKey::Classes => {
                let class = Class::from_number(reader.number()?)?;
                self.classes.contains(&class).then(|| ElementData::Verdict(self.leads_to(class)))
            }
            SetKey::NodePortIps => self.node_port_ips.contains(&reader.address(family)?).then_some(found),
            SetKey::ClusterIps => self.cluster_ips.contains(&reader.address(family)?).then_some(found),
            SetKey::ServiceCidrs => {
                let address = reader.address(family)?;
                self.service_cidrs.iter().any(|r| r.contains(&address)).then_some(found)
            }
            SetKey::Hairpin => {
                let (source, address) = (reader.address(family)?, reader.address(family)?);
                let (protocol, port) = (reader.protocol()?, reader.port()?);
                let hairpin = LocalEndpoint { address, protocol, port };
                (source == address && self.hairpins.contains(&hairpin)).then_some(found)
            }
            SetKey::Guarded => self.guarded.contains(&reader.frontend(Some(family))?).then_some(found),
            SetKey::SourceRanges => {
                let ranges = self.sources.get(&reader.frontend(Some(family))?)?;
                let source = reader.address(family)?;
                ranges.iter().any(|r| r.contains(&source)).then_some(found)
            }
            SetKey::AffinityEndpoints => {
                let (id, list, number) = affinity::read_token_key(reader.number()?)?;
                let endpoint = self.affinity.get(&id)?.endpoints.get(&(list, number))?;
                Some(value(layout::endpoint_data(endpoint)))
            }
            SetKey::AffinitySlots => {
                let id = affinity::read_id_part(reader.number()?)?;
                let (list, index) = list_of_slot(reader.number()?);
                let number = *self.affinity.get(&id)?.slots[list as usize].get(index as usize)?;
                Some(value(layout::Key::default().number(affinity::token(id, number?)).done()))
            }
            // Not part of the state.
            SetKey::Affinity => None,
        }
    }

    /// Takes over the texts of rules that another state knows: the kernel keeps none.
    pub fn annotate(&mut self, with: &Self) {
        for (name, chain) in &mut self.chains {
            let Some(known) = with.chains.get(name) else { continue };
            for rule in &mut chain.rules {
                if let Some(same) = known.rules.iter().find(|k| *k == rule) {
                    rule.text.clone_from(&same.text);
                }
            }
        }
    }
}

impl State {
    /// Leaves only what a change touches, and the chains that it leads to.
    pub fn restrict(&mut self, only: &Change) {
        self.frontends.retain(|f, _| only.frontends.contains(f));
        self.guarded.retain(|f| only.frontends.contains(f));
        self.sources.retain(|f, _| only.frontends.contains(f));
        self.cluster_ips.retain(|a| only.cluster_ips.contains(a));
        self.hairpins.retain(|e| only.local_endpoints.contains(e));
        self.strays.clear();
        let classes: BTreeSet<Class> = self.frontends.values().filter_map(|h| h.class).collect();
        self.classes.retain(|c| classes.contains(c));
        let mut chains = BTreeSet::new();
        for chain in classes.iter().filter_map(|c| c.chain()) {
            chains.extend(rules::next_chains(&chain));
            chains.insert(chain);
        }
        let names: BTreeSet<String> = chains.iter().map(|chain| self.chain_name(chain)).collect();
        let ids: BTreeSet<u32> = classes
            .iter()
            .filter_map(|class| if let Class::Affinity { id, .. } = class { Some(*id) } else { None })
            .collect();
        self.affinity.retain(|id, _| ids.contains(id));
        self.affinity_ids.retain(|_, of| of.iter().any(|id| ids.contains(id)));
        self.chains.retain(|name, _| names.contains(name));
        self.service_cidrs.clear();
        if !self.has_node_ports() {
            self.node_port_ips.clear();
        }
        let empty: Vec<SetKey> =
            self.sets.iter().filter(|s| self.elements_text(**s).is_empty()).copied().collect();
        for set in empty.into_iter().filter(|set| *set != SetKey::Affinity || ids.is_empty()) {
            self.sets.remove(&set);
        }
    }

    /// The state for programs: elements of every set, rules of every chain.
    pub fn json(&self) -> serde_json::Value {
        let sets: serde_json::Map<String, serde_json::Value> =
            self.sets.iter().map(|s| (s.to_string(), self.elements_text(*s).into())).collect();
        let chains: serde_json::Map<String, serde_json::Value> = self
            .chains
            .iter()
            .map(|(name, chain)| {
                let hook = chain.base.map(|b| b.hook.to_string());
                let rules: Vec<String> = chain.rules.iter().map(ToString::to_string).collect();
                (name.clone(), serde_json::json!({ "hook": hook, "rules": rules }))
            })
            .collect();
        serde_json::json!({
            "family": self.family,
            "table": self.exists.then_some(TABLE),
            "sets": sets,
            "chains": chains,
        })
    }
}

/// List and index of a slot's number.
const fn list_of_slot(slot: u32) -> (List, u32) {
    let list = if slot >= SECOND_LIST_BASE { List::Second } else { List::First };
    (list, slot - list.base())
}
