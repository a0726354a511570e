//! From what was observed to what is desired. Pure.
//!
//! IPVS and sets know no transactions: operations take effect one by one, so their order must keep every
//! prefix safe. It is given by [`Phase`]: what is referred to is made first; a place has its virtual server
//! and its guards before its address is there; destinations are added before others are drained; what
//! guards a place goes last.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ipset_netlink::{Element, Entry, Mark};
use ipvs_netlink::{Destination, Service, ServiceKey};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::LocalEndpoint;
use shunt_mode::Plan;
use xtables_tools::Table;

use crate::layout::{self, Place, SetName};
use crate::op::Op;
use crate::render::{Desired, Wanted};
use crate::rules::Rules;
use crate::scheduler;
use crate::skeleton::{closing_vips, skeleton};
use crate::state::State;

/// Operations that are handed to the kernel together at most.
const TRANSACTION_MAX: usize = 8192;

/// Destinations that serve have this weight: Kubernetes knows no others.
const WEIGHT: u32 = 1;

/// When an operation is due, relative to others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    Prepare,
    Sets,
    Rules,
    /// Source ranges before what asks for them.
    AddSources,
    /// Guards, and what is masqueraded more than before.
    AddGuards,
    /// Virtual servers by mark, then what leads to them.
    MarkServers,
    AddMarks,
    Servers,
    /// What is dropped, once pods and the node have a server of their own.
    AddDrops,
    /// Destinations that get no new connections any more.
    Drain,
    /// Sources that may from now on use what serves them no more.
    AddLateSources,
    /// Sources that may no longer use what stays guarded.
    DeleteEarlySources,
    /// What is masqueraded less than before; known ports.
    AddPlaces,
    /// VIPs whose other ports are closed, before they are there.
    AddVips,
    /// Their other ports, where the rules of iptables mode translate.
    CloseVips,
    AddAddresses,
    /// Rules where those of iptables mode translate until then: from now on VIPs must be there.
    TakeOver,
    DeleteAddresses,
    DeleteVips,
    DeletePlaces,
    DeleteDrops,
    DeleteMarks,
    DeleteServers,
    DeleteMarkServers,
    DeleteGuards,
    DeleteSources,
    /// Rules, then the sets that they refer to.
    DeleteRules,
    DeleteSets,
}

/// When elements of a set are added and deleted.
const fn phases(set: SetName) -> (Phase, Phase) {
    match set {
        SetName::LoadBalancerSourceCidr | SetName::LoadBalancerSourceIp => {
            (Phase::AddSources, Phase::DeleteSources)
        }
        SetName::LoadBalancerFw | SetName::LoopBack => (Phase::AddGuards, Phase::DeleteGuards),
        SetName::ExternalIp
        | SetName::LoadBalancer
        | SetName::NodePortTcp
        | SetName::NodePortUdp
        | SetName::NodePortSctp
        | SetName::NodePortIps => (Phase::AddGuards, Phase::DeletePlaces),
        // Being in one of these takes the masquerade away.
        SetName::LoadBalancerLocal
        | SetName::NodePortLocalTcp
        | SetName::NodePortLocalUdp
        | SetName::NodePortLocalSctp => (Phase::AddPlaces, Phase::AddGuards),
        SetName::ExternalIpLocal
        | SetName::ClusterIp
        | SetName::ServiceCidr
        | SetName::HealthCheckNodePort => (Phase::AddPlaces, Phase::DeletePlaces),
        SetName::Fwmark => (Phase::AddMarks, Phase::DeleteMarks),
        SetName::NoLocal => (Phase::AddDrops, Phase::DeleteDrops),
        SetName::IpvsIps => (Phase::AddVips, Phase::DeleteVips),
    }
}

/// Sets in which a place is or is not, as a whole.
const PLACE_SETS: [SetName; 9] = [
    SetName::ClusterIp,
    SetName::ExternalIp,
    SetName::ExternalIpLocal,
    SetName::LoadBalancer,
    SetName::LoadBalancerLocal,
    SetName::LoadBalancerFw,
    SetName::NodePortSctp,
    SetName::NodePortLocalSctp,
    SetName::NoLocal,
];

/// Plans the way from `observed` to `desired`.
pub fn plan(observed: &State, desired: &Desired) -> Plan<Op> {
    plan_within(observed, desired, TRANSACTION_MAX)
}

/// [`plan`] with at most so many operations a transaction.
pub fn plan_within(observed: &State, desired: &Desired, most: usize) -> Plan<Op> {
    let family = desired.family;
    let mut planner = Planner {
        observed,
        desired,
        family,
        ops: Vec::new(),
        marks_used: None,
        next_mark: 1,
        marks_kept: BTreeSet::new(),
        marks_gone: BTreeSet::new(),
        problems: BTreeSet::new(),
    };
    if desired.active {
        planner.prepare();
        planner.places();
        planner.vanished_marks();
        planner.others();
    } else {
        planner.tear_down();
    }
    let mut ops = planner.ops;
    ops.sort_by_key(|(phase, _)| *phase);
    let mut plan = Plan { problems: planner.problems.into_iter().collect(), ..Plan::default() };
    let mut ops = ops.into_iter().map(|(_, op)| op).peekable();
    while ops.peek().is_some() {
        plan.push(ops.by_ref().take(most.max(1)).collect());
    }
    plan
}

struct Planner<'a> {
    observed: &'a State,
    desired: &'a Desired,
    family: IpFamily,
    ops: Vec<(Phase, Op)>,
    /// Ids of marks that are given away, once somebody asks.
    marks_used: Option<BTreeSet<u32>>,
    /// Where to look for one that is free.
    next_mark: u32,
    /// Virtual servers by mark that places have in the end.
    marks_kept: BTreeSet<ServiceKey>,
    /// Those that places have no more.
    marks_gone: BTreeSet<ServiceKey>,
    /// What cannot be had.
    problems: BTreeSet<String>,
}

impl Planner<'_> {
    fn push(&mut self, phase: Phase, op: Op) {
        self.ops.push((phase, op));
    }

    /// What everything else builds on.
    fn prepare(&mut self) {
        if !self.observed.tuned {
            self.push(Phase::Prepare, Op::Tune);
        }
        if !self.observed.link {
            self.push(Phase::Prepare, Op::AddLink);
        }
        for set in SetName::ALL {
            if self.observed.misdeclared.contains(&set) {
                let held = self.observed.sets.get(&set).into_iter().flatten();
                let kept = held.map(|(entry, mark)| Element { entry: *entry, mark: *mark }).collect();
                self.push(Phase::Sets, Op::ReplaceSet(self.family, set, kept));
            } else if !self.observed.sets.contains_key(&set) {
                self.push(Phase::Sets, Op::CreateSet(self.family, set));
            }
        }
        // Few, and missing after the table was empty.
        let rules = skeleton(&self.desired.node);
        if self.observed.rules != rules {
            let observed = &self.observed.rules;
            // Rules without sets are those of iptables mode: what they translate must find its virtual server.
            let taken_over =
                self.observed.sets.is_empty() && observed.chain(Table::Nat, "KUBE-SERVICES").is_some();
            if taken_over {
                let closing = closing_vips(observed, &rules);
                self.push(Phase::CloseVips, Op::SetRules(self.family, observed.clone(), closing.clone()));
                self.push(Phase::TakeOver, Op::SetRules(self.family, closing, rules));
            } else {
                self.push(Phase::Rules, Op::SetRules(self.family, observed.clone(), rules));
            }
        }
        let node_port_ips = self.desired.node.node_port_addresses().into_iter().map(Entry::Ip).collect();
        self.whole(SetName::NodePortIps, &node_port_ips);
        let cidrs = self.desired.service_cidrs.iter();
        let cidrs = cidrs.map(|range| Entry::Net(range.network(), range.prefix_len())).collect();
        self.whole(SetName::ServiceCidr, &cidrs);
    }

    /// Makes a set hold these entries and no others.
    fn whole(&mut self, set: SetName, wanted: &BTreeSet<Entry>) {
        for entry in wanted {
            self.element(set, *entry, true);
        }
        for entry in self.observed.sets.get(&set).into_iter().flat_map(|held| held.keys()) {
            self.element(set, *entry, wanted.contains(entry));
        }
    }

    fn tear_down(&mut self) {
        let observed = self.observed;
        for address in &observed.addresses {
            self.push(Phase::DeleteAddresses, Op::DeleteAddress(*address));
        }
        for key in observed.servers.keys() {
            self.push(Phase::DeleteServers, Op::DeleteServer(*key));
        }
        if !observed.rules.is_empty() {
            let op = Op::SetRules(self.family, observed.rules.clone(), Rules::default());
            self.push(Phase::DeleteRules, op);
        }
        for set in observed.sets.keys() {
            self.push(Phase::DeleteSets, Op::DestroySet(self.family, *set));
        }
    }

    fn places(&mut self) {
        let desired = self.desired;
        for (place, wanted) in &desired.places {
            self.place(place, wanted.as_ref());
        }
        if !desired.everything {
            return;
        }
        let mut vanished: BTreeSet<Place> = BTreeSet::new();
        vanished.extend(self.observed.servers.keys().filter_map(Place::of));
        for set in PLACE_SETS.iter().chain(&[
            SetName::Fwmark,
            SetName::LoadBalancerSourceCidr,
            SetName::LoadBalancerSourceIp,
        ]) {
            let elements = self.observed.sets.get(set).into_iter().flatten();
            vanished.extend(elements.filter_map(|(entry, _)| Place::of_entry(entry)));
        }
        for place in vanished.iter().filter(|place| !desired.places.contains_key(place)) {
            self.place(place, None);
        }
        self.stray_entries();
    }

    /// Virtual servers by marks that no place has any more.
    fn vanished_marks(&mut self) {
        let all = || self.observed.servers.keys().filter(|key| matches!(key, ServiceKey::Mark { .. }));
        let gone: Vec<ServiceKey> = if self.desired.everything {
            all().filter(|key| !self.marks_kept.contains(key)).copied().collect()
        } else {
            let gone = self.marks_gone.difference(&self.marks_kept);
            gone.filter(|key| self.observed.servers.contains_key(key)).copied().collect()
        };
        for key in gone {
            self.push(Phase::DeleteMarkServers, Op::DeleteServer(key));
        }
    }

    /// Elements of protocols that no place has.
    fn stray_entries(&mut self) {
        for (set, elements) in &self.observed.sets {
            if matches!(set.kind(), ipset_netlink::Kind::HashIp | ipset_netlink::Kind::HashNet)
                || set.kind() == ipset_netlink::Kind::BitmapPort
                || *set == SetName::LoopBack
            {
                continue;
            }
            for entry in elements.keys().filter(|e| Place::of_entry(e).is_none()) {
                self.push(phases(*set).1, Op::DeleteElement(self.family, *set, *entry));
            }
        }
    }

    fn place(&mut self, place: &Place, wanted: Option<&Wanted>) {
        let entry = place.entry();
        for set in PLACE_SETS {
            let should = wanted.is_some_and(|w| w.sets.contains(&set));
            self.element(set, entry, should);
        }
        self.guard(place, wanted);
        self.marked(place, wanted);
        let key = place.key();
        match wanted {
            Some(wanted) => {
                self.server(wanted, &wanted.service, &wanted.destinations, Phase::Servers);
            }
            None if self.observed.servers.contains_key(&key) => {
                self.push(Phase::DeleteServers, Op::DeleteServer(key));
            }
            None => {}
        }
    }

    fn element(&mut self, set: SetName, entry: Entry, should: bool) {
        match (should, self.observed.holds(set, &entry)) {
            (true, false) => {
                self.push(phases(set).0, Op::AddElement(self.family, set, entry.into()));
            }
            (false, true) => {
                self.push(phases(set).1, Op::DeleteElement(self.family, set, entry));
            }
            _ => {}
        }
    }

    fn guard(&mut self, place: &Place, wanted: Option<&Wanted>) {
        let Place { address, protocol, port } = *place;
        let guard = wanted.and_then(|w| w.guard.as_ref());
        let ranges = guard.iter().flat_map(|g| &g.ranges).map(|range| {
            Entry::IpPortNet(address, protocol.number(), port, range.network(), range.prefix_len())
        });
        let itself = guard.is_some_and(|g| g.allow_vip_source);
        let itself = itself.then_some(Entry::IpPortIp(address, protocol.number(), port, address));
        // Of those that were kept out so far, none may get through to what is drained.
        let late = self.observed.holds(SetName::LoadBalancerFw, &place.entry())
            && wanted.is_some_and(|w| w.destinations.is_empty());
        let sources: [(SetName, BTreeSet<Entry>); 2] = [
            (SetName::LoadBalancerSourceCidr, ranges.collect()),
            (SetName::LoadBalancerSourceIp, itself.into_iter().collect()),
        ];
        for (set, entries) in sources {
            let held = self.observed.entries_at(set, place);
            for entry in held.iter().filter(|entry| !entries.contains(entry)) {
                // Before anything is open to them that was not: it may become another Service's.
                let phase = if guard.is_some() { Phase::DeleteEarlySources } else { phases(set).1 };
                self.push(phase, Op::DeleteElement(self.family, set, *entry));
            }
            for entry in entries.iter().filter(|entry| !held.contains(entry)) {
                let phase = if late { Phase::AddLateSources } else { phases(set).0 };
                self.push(phase, Op::AddElement(self.family, set, (*entry).into()));
            }
        }
    }

    /// The second virtual server of a place, for pods and for the node. Packets of the node are marked
    /// for masquerading as well, so that there is one for each.
    fn marked(&mut self, place: &Place, wanted: Option<&Wanted>) {
        let bit = self.desired.node.masquerade_bit;
        let held = self.observed.mark(place);
        let sound = held.filter(|m| m.mask == u32::MAX && layout::mark_id(m.value, bit).is_some());
        let sound = sound.filter(|m| m.value & (1 << bit) == 0);
        let inside = wanted.and_then(|w| Some((w, w.inside.as_ref()?)));
        let Some((wanted, destinations)) = inside else {
            if self.observed.holds(SetName::Fwmark, &place.entry()) {
                let op = Op::DeleteElement(self.family, SetName::Fwmark, place.entry());
                self.push(Phase::DeleteMarks, op);
            }
            let gone = held.map(|m| self.mark_keys(m.value));
            self.marks_gone.extend(gone.into_iter().flatten());
            return;
        };
        let value = sound.map_or_else(|| layout::mark(self.new_mark(), bit), |m| m.value);
        for key in self.mark_keys(value) {
            self.marks_kept.insert(key);
            let service = Service { key, ..wanted.inside_service() };
            self.server(wanted, &service, destinations, Phase::MarkServers);
        }
        if held.is_none_or(|m| (m.value, m.mask) != (value, u32::MAX)) {
            let mark = Some(Mark { value, mask: u32::MAX });
            let element = Element { entry: place.entry(), mark };
            self.push(Phase::AddMarks, Op::AddElement(self.family, SetName::Fwmark, element));
            let gone = held.map(|m| self.mark_keys(m.value));
            self.marks_gone.extend(gone.into_iter().flatten());
        }
    }

    /// The virtual servers of a mark: packets of pods have it as it is, those of the node with the
    /// masquerade bit.
    fn mark_keys(&self, value: u32) -> [ServiceKey; 2] {
        let ipv6 = self.family == IpFamily::V6;
        [value, value | 1 << self.desired.node.masquerade_bit].map(|mark| ServiceKey::Mark { ipv6, mark })
    }

    /// The smallest id that no mark has, neither in the kernel nor in this plan. Virtual servers that no
    /// place leads to are no obstacle where everything is looked at: they go, or become this one.
    fn new_mark(&mut self) -> u32 {
        let bit = self.desired.node.masquerade_bit;
        let (observed, everything) = (self.observed, self.desired.everything);
        let used = self.marks_used.get_or_insert_with(|| {
            let elements = observed.sets.get(&SetName::Fwmark).into_iter().flatten();
            let of_places = elements.filter_map(|(_, mark)| layout::mark_id(mark.as_ref()?.value, bit));
            let of_servers = observed.servers.keys().filter(|_| !everything).filter_map(|key| match key {
                ServiceKey::Mark { mark, .. } => layout::mark_id(*mark, bit),
                ServiceKey::Address { .. } => None,
            });
            of_places.chain(of_servers).collect()
        });
        while used.contains(&self.next_mark) && self.next_mark < layout::ID_MAX {
            self.next_mark += 1;
        }
        used.insert(self.next_mark);
        self.next_mark
    }

    /// The service with a scheduler that the kernel has.
    fn scheduled(&mut self, of: &Wanted, service: &Service) -> Service {
        let available = scheduler::available(service, &self.observed.lacking);
        if available.scheduler != service.scheduler {
            let asked = if service.scheduler == of.service.scheduler {
                "metadata.annotations[kube-router.io/service.scheduler] or ipvs.scheduler"
            } else {
                "spec.sessionAffinity with spec.externalTrafficPolicy"
            };
            let missing = scheduler::missing(&service.scheduler);
            let (owner, instead) = (&of.owner, &available.scheduler);
            self.problems.insert(format!("{owner}: {missing}, which {asked} asks for: {instead} instead"));
        }
        available
    }

    /// A virtual server and its destinations. Those that are not wanted any more are drained; whoever
    /// looks after them deletes them once their connections have ended.
    fn server(&mut self, of: &Wanted, service: &Service, wanted: &BTreeSet<SocketAddr>, phase: Phase) {
        let key = service.key;
        let service = &self.scheduled(of, service);
        let held = self.observed.servers.get(&key);
        match held {
            None => self.push(phase, Op::AddServer(service.clone())),
            Some(held) if held.service != *service => {
                self.push(phase, Op::SetServer(service.clone()));
            }
            Some(_) => {}
        }
        for address in wanted {
            let destination = Destination::new(*address, WEIGHT);
            match held.and_then(|h| h.destinations.get(address)) {
                None => self.push(phase, Op::AddDestination(key, destination)),
                Some(held) if *held != destination => {
                    self.push(phase, Op::SetDestination(key, destination));
                }
                Some(_) => {}
            }
        }
        let gone = held.into_iter().flat_map(|h| h.destinations.values());
        let gone = gone.filter(|d| !wanted.contains(&d.address) && d.weight > 0);
        for destination in gone.copied().collect::<Vec<_>>() {
            let drained = Destination { weight: 0, ..destination };
            self.push(Phase::Drain, Op::SetDestination(key, drained));
        }
    }

    /// What belongs to no place.
    fn others(&mut self) {
        let (observed, desired) = (self.observed, self.desired);
        for (address, should) in &desired.addresses {
            self.element(SetName::IpvsIps, Entry::Ip(*address), *should);
            match (*should, observed.addresses.contains(address)) {
                (true, false) => self.push(Phase::AddAddresses, Op::AddAddress(*address)),
                (false, true) => self.push(Phase::DeleteAddresses, Op::DeleteAddress(*address)),
                _ => {}
            }
        }
        for ((protocol, port), wanted) in &desired.node_ports {
            let [all, local] = SetName::node_ports(*protocol);
            self.element(all, Entry::Port(*port), wanted.is_some());
            self.element(local, Entry::Port(*port), *wanted == Some(true));
        }
        for (port, should) in &desired.health_checks {
            self.element(SetName::HealthCheckNodePort, Entry::Port(*port), *should);
        }
        for (endpoint, should) in &desired.loopbacks {
            self.element(SetName::LoopBack, loopback(endpoint), *should);
        }
        if !desired.everything {
            return;
        }
        for address in observed.addresses.iter().filter(|a| !desired.addresses.contains_key(a)) {
            self.push(Phase::DeleteAddresses, Op::DeleteAddress(*address));
        }
        let ports = |protocol, only_local: bool| -> BTreeSet<Entry> {
            let of = desired.node_ports.iter().filter(|((p, _), _)| *p == protocol);
            let of = of.filter(|(_, local)| if only_local { **local == Some(true) } else { local.is_some() });
            of.map(|((_, port), _)| Entry::Port(*port)).collect()
        };
        let vips = desired.addresses.iter().filter(|(_, should)| **should);
        let loopbacks = desired.loopbacks.iter().filter(|(_, should)| **should);
        let health_checks = desired.health_checks.iter().filter(|(_, should)| **should);
        let whole: [(SetName, BTreeSet<Entry>); 7] = [
            (SetName::IpvsIps, vips.map(|(a, _)| Entry::Ip(*a)).collect()),
            (SetName::HealthCheckNodePort, health_checks.map(|(port, _)| Entry::Port(*port)).collect()),
            (SetName::LoopBack, loopbacks.map(|(e, _)| loopback(e)).collect()),
            (SetName::NodePortTcp, ports(Protocol::Tcp, false)),
            (SetName::NodePortLocalTcp, ports(Protocol::Tcp, true)),
            (SetName::NodePortUdp, ports(Protocol::Udp, false)),
            (SetName::NodePortLocalUdp, ports(Protocol::Udp, true)),
        ];
        for (set, wanted) in whole {
            for entry in observed.sets.get(&set).into_iter().flat_map(|held| held.keys()) {
                // What is listed as unwanted was seen to above.
                let listed = match (set, entry) {
                    (SetName::IpvsIps, Entry::Ip(address)) => desired.addresses.contains_key(address),
                    (SetName::NodePortTcp | SetName::NodePortLocalTcp, Entry::Port(port)) => {
                        desired.node_ports.contains_key(&(Protocol::Tcp, *port))
                    }
                    (SetName::NodePortUdp | SetName::NodePortLocalUdp, Entry::Port(port)) => {
                        desired.node_ports.contains_key(&(Protocol::Udp, *port))
                    }
                    _ => false,
                };
                if !listed && !wanted.contains(entry) {
                    self.push(phases(set).1, Op::DeleteElement(self.family, set, *entry));
                }
            }
        }
    }
}

const fn loopback(endpoint: &LocalEndpoint) -> Entry {
    Entry::IpPortIp(endpoint.address, endpoint.protocol.number(), endpoint.port, endpoint.address)
}

#[cfg(test)]
mod tests;
