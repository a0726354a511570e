//! What we own in the kernel, typed. Its `Display` is a file that `nft -f` loads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use nft_netlink::{BaseChain, Bytes, Element, ElementData, FieldType, MapData, Set, SetFlags, Verdict};
use shunt_core::id::IpFamily;
use shunt_core::table::{Change, Frontend, LocalEndpoint};

use crate::layout::{
    self, Class, Endpoint, KeyReader, LIST_MAX, List, SECOND_LIST_BASE, SetKey, TABLE, TABLE_COMMENT,
};
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

    /// Whether there are node ports.
    pub fn has_node_ports(&self) -> bool {
        // A node port has no address, which sorts first.
        self.frontends.first_key_value().is_some_and(|(f, _)| f.address.is_none())
    }

    /// Sets or clears the class of a frontend.
    pub fn set_class(&mut self, frontend: Frontend, class: Option<Class>) {
        self.frontends.entry(frontend).or_default().class = class;
        self.forget_if_empty(&frontend);
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
    /// something only together (see [`ranges_of`]).
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
                let leads_to = class.chain().map_or(Verdict::Drop, |c| Verdict::Goto(c.to_string()));
                if element.data != Some(ElementData::Verdict(leads_to)) {
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
                self.classes.contains(&class).then(|| {
                    ElementData::Verdict(
                        class.chain().map_or(Verdict::Drop, |c| Verdict::Goto(c.to_string())),
                    )
                })
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
        let names: BTreeSet<String> = chains.iter().map(ToString::to_string).collect();
        self.chains.retain(|name, _| names.contains(name));
        self.service_cidrs.clear();
        if !self.has_node_ports() {
            self.node_port_ips.clear();
        }
        let empty: Vec<SetKey> =
            self.sets.iter().filter(|s| self.elements_text(**s).is_empty()).copied().collect();
        for set in empty {
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

/// The range from `from` to `to`, if it is one prefix.
fn range_between(from: IpAddr, to: IpAddr) -> Option<IpNet> {
    let full = if from.is_ipv4() { 32 } else { 128 };
    (0..=full)
        .filter_map(|len| IpNet::new(from, len).ok())
        .find(|net| net.network() == from && net.broadcast() == to)
}

/// The elements that make up ranges of plain addresses: each range is a start and, unless it reaches
/// the last address, an end that is the first address after it.
pub fn range_elements(range: &IpNet) -> Vec<Element> {
    let key = |a: IpAddr| layout::Key::default().address(a).done();
    let mut elements = vec![Element::new(key(range.network()))];
    if let Some(end) = next_address(range.broadcast()) {
        elements.push(Element { interval_end: true, ..Element::new(key(end)) });
    }
    elements
}

fn next_address(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|a| IpAddr::V4(a.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|a| IpAddr::V6(a.into())),
    }
}

/// Reads ranges back from the elements of their set; the second list is what makes no sense.
pub fn ranges_of(family: IpFamily, elements: &[Element]) -> (BTreeSet<IpNet>, Vec<Element>) {
    let address = |e: &Element| KeyReader::new(&e.key).address(family);
    let mut sorted: Vec<(IpAddr, bool, &Element)> =
        elements.iter().filter_map(|e| Some((address(e)?, !e.interval_end, e))).collect();
    sorted.sort_by_key(|(address, start, _)| (*address, *start));
    let (mut ranges, mut strays) = (BTreeSet::new(), Vec::new());
    let mut open: Option<(IpAddr, &Element)> = None;
    for (at, is_start, element) in sorted {
        match (is_start, open.take()) {
            (true, before) => {
                strays.extend(before.map(|(_, e)| e.clone()));
                open = Some((at, element));
            }
            (false, Some((from, start))) => match previous_address(at).and_then(|to| range_between(from, to))
            {
                Some(range) => {
                    ranges.insert(range);
                }
                None => strays.extend([start.clone(), element.clone()]),
            },
            // The first element of the kernel's tree of ranges: "nothing before the first one".
            (false, None) if at.is_unspecified() => {}
            (false, None) => strays.push(element.clone()),
        }
    }
    if let Some((from, start)) = open {
        let last: IpAddr = match family {
            IpFamily::V4 => std::net::Ipv4Addr::BROADCAST.into(),
            IpFamily::V6 => std::net::Ipv6Addr::from(u128::MAX).into(),
        };
        match range_between(from, last) {
            Some(range) => {
                ranges.insert(range);
            }
            None => strays.push(start.clone()),
        }
    }
    (ranges, strays)
}

fn previous_address(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_sub(1).map(|a| IpAddr::V4(a.into())),
        IpAddr::V6(a) => u128::from(a).checked_sub(1).map(|a| IpAddr::V6(a.into())),
    }
}

/// A frontend as an element's key in nft's words.
pub(crate) fn frontend_text(frontend: &Frontend) -> String {
    match frontend.address {
        Some(address) => format!("{address} . {} . {}", frontend.protocol, frontend.port),
        None => format!("{} . {}", frontend.protocol, frontend.port),
    }
}

/// An endpoint as an element's data in nft's words.
pub(crate) fn endpoint_text(endpoint: &Endpoint) -> String {
    format!("{} . {}", endpoint.address, endpoint.port)
}

/// Where a class leads, in nft's words.
pub(crate) fn class_text(class: Class) -> String {
    class.chain().map_or_else(|| "drop".to_owned(), |chain| format!("goto {chain}"))
}

impl State {
    fn elements_text(&self, set: SetKey) -> Vec<String> {
        let wants_address = matches!(set, SetKey::Services(_) | SetKey::Endpoints(_));
        let frontends = || self.frontends.iter().filter(|(f, _)| f.address.is_some() == wants_address);
        match set {
            SetKey::Services(_) | SetKey::NodePorts => frontends()
                .filter_map(|(f, held)| Some(format!("{} : {}", frontend_text(f), held.class?)))
                .collect(),
            SetKey::Endpoints(_) | SetKey::NodePortEndpoints => frontends()
                .flat_map(|(f, held)| {
                    List::ALL.into_iter().flat_map(move |list| {
                        held.list(list).iter().enumerate().filter_map(move |(i, slot)| {
                            let slot = slot.as_ref()?;
                            let number = list.base() as usize + i;
                            Some(format!("{} . {number} : {}", frontend_text(f), endpoint_text(slot)))
                        })
                    })
                })
                .collect(),
            SetKey::Classes => self.classes.iter().map(|c| format!("{c} : {}", class_text(*c))).collect(),
            SetKey::NodePortIps => self.node_port_ips.iter().map(ToString::to_string).collect(),
            SetKey::ClusterIps => self.cluster_ips.iter().map(ToString::to_string).collect(),
            SetKey::ServiceCidrs => self.service_cidrs.iter().map(ToString::to_string).collect(),
            SetKey::Hairpin => self
                .hairpins
                .iter()
                .map(|h| format!("{0} . {0} . {1} . {2}", h.address, h.protocol, h.port))
                .collect(),
            SetKey::Guarded => self.guarded.iter().map(frontend_text).collect(),
            SetKey::SourceRanges => self
                .sources
                .iter()
                .flat_map(|(f, ranges)| ranges.iter().map(|r| format!("{} . {r}", frontend_text(f))))
                .collect(),
        }
    }
}

/// The type line of a set. A slot is declared by what makes it, which is how nft wants it where it
/// also is the key of a rule.
fn declaration_text(set: &Set, ip: &str) -> String {
    let words = |fields: &[FieldType]| {
        let words: Vec<String> = fields.iter().map(ToString::to_string).collect();
        words.join(" . ")
    };
    if set.key.last() == Some(&FieldType::Mark) {
        let address = if set.key.len() == 4 { format!("{ip} daddr . ") } else { String::new() };
        return format!(
            "typeof {address}meta l4proto . th dport . numgen random mod 65536 : {ip} daddr . th dport"
        );
    }
    match &set.data {
        None => format!("type {}", words(&set.key)),
        Some(MapData::Verdict) => format!("type {} : verdict", words(&set.key)),
        Some(MapData::Fields(data)) => format!("type {} : {}", words(&set.key), words(data)),
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = match self.family {
            IpFamily::V4 => "ip",
            IpFamily::V6 => "ip6",
        };
        if !self.exists {
            return writeln!(f, "# no table {ip} {TABLE}");
        }
        writeln!(f, "table {ip} {TABLE} {{")?;
        writeln!(f, "\tcomment \"{TABLE_COMMENT}\"")?;
        for set in &self.sets {
            let declaration = set.declaration(self.family);
            let word = if declaration.data.is_some() { "map" } else { "set" };
            writeln!(f, "\t{word} {set} {{\n\t\t{}", declaration_text(&declaration, ip))?;
            if declaration.flags.contains(SetFlags::INTERVAL) {
                writeln!(f, "\t\tflags interval")?;
            }
            if let Some(size) = declaration.size {
                writeln!(f, "\t\tsize {size}")?;
            }
            let elements = self.elements_text(*set);
            if !elements.is_empty() {
                writeln!(f, "\t\telements = {{\n\t\t\t{}\n\t\t}}", elements.join(",\n\t\t\t"))?;
            }
            writeln!(f, "\t}}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "\tchain {name} {{")?;
            if let Some(base) = &chain.base {
                writeln!(
                    f,
                    "\t\ttype {} hook {} priority {}; policy accept;",
                    base.kind, base.hook, base.priority
                )?;
            }
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        writeln!(f, "}}")?;
        for stray in &self.strays {
            writeln!(f, "# element of {} that is not ours: {}", stray.set, stray.key)?;
        }
        Ok(())
    }
}
