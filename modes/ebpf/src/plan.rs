//! From what was observed to what is desired. Pure.
//!
//! Operations come in phases, so that after each of them every packet meets a fate that is right before
//! or after the change:
//!
//! 1. what frontends will lead to: names, source ranges, endpoints, slots; settings that come;
//! 2. frontends that come or change, each by one write; addresses that come;
//! 3. frontends that go;
//! 4. what nothing leads to any more; settings that go.

mod groups;
mod maglev;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use shunt_ebpf_abi::{
    Address, Endpoint, FIRST_SERVICE_ID, Frontend, FrontendKey, Group, address_flags, endpoint_flags,
    range_owner,
};
use shunt_mode::Plan;

use crate::op::Op;
use crate::render::{Desired, Dispatch, Member, Port};
use crate::slots::Room;
use crate::state::{FamilyFlags, State, ids_from};

/// Operations that one transaction holds at most.
pub const TRANSACTION_MAX: usize = 65_536;

/// Endpoints that one operation fills at most.
const RUN_MAX: usize = 256;

/// Plans the way from `observed` to `desired`.
pub fn plan(observed: &State, desired: &Desired) -> Plan<Op> {
    plan_within(observed, desired, TRANSACTION_MAX)
}

/// [`plan`] with other transactions: tests choose short ones.
pub fn plan_within(observed: &State, desired: &Desired, transaction_max: usize) -> Plan<Op> {
    if !desired.active && !observed.installed && observed.is_empty() {
        return Plan::default();
    }
    let mut planner = Planner::new(observed, desired);
    planner.plan();
    let Planner { before, turn, remove, after, problems, .. } = planner;
    let mut plan = Plan { problems, ..Plan::default() };
    let (before, after) = (before.by_rank.into_iter().flatten(), after.by_rank.into_iter().flatten());
    let mut ops = before.chain(turn).chain(remove).chain(after).peekable();
    while ops.peek().is_some() {
        plan.push(ops.by_ref().take(transaction_max).collect());
    }
    plan
}

/// What is referred to comes first.
const fn rank_before(op: &Op) -> usize {
    match op {
        Op::Install => 0,
        Op::SetName(..) => 1,
        Op::AddRange(..) => 2,
        Op::SetEndpoints(..) => 3,
        Op::SetSlots(..) => 4,
        Op::SetMaglev(..) => 5,
        Op::SetPods(_) => 6,
        _ => 7,
    }
}

/// What refers to others goes first.
const fn rank_after(op: &Op) -> usize {
    match op {
        Op::SetPods(Some(_)) => 0,
        Op::SetFlags { .. } => 1,
        Op::SetPods(None) => 2,
        Op::SetMaglev(..) => 3,
        Op::SetSlots(..) => 4,
        Op::SetEndpoints(..) => 5,
        Op::SetAddress(..) => 6,
        Op::DeleteRange(..) => 7,
        Op::SetName(..) => 8,
        _ => 9,
    }
}

/// Operations of a phase. Those on one map lie side by side: they are one call.
struct Phase {
    rank: fn(&Op) -> usize,
    by_rank: [Vec<Op>; 10],
}

impl Phase {
    fn new(rank: fn(&Op) -> usize) -> Self {
        Self { rank, by_rank: Default::default() }
    }

    fn push(&mut self, op: Op) {
        if let Some(ops) = self.by_rank.get_mut((self.rank)(&op)) {
            ops.push(op);
        }
    }

    /// Fills an entry of the endpoints, by the operation before if that ends at the id before.
    fn set_endpoint(&mut self, id: u32, to: Endpoint) {
        let rank = (self.rank)(&Op::SetEndpoints(id, Vec::new()));
        match self.by_rank.get_mut(rank).and_then(|ops| ops.last_mut()) {
            Some(Op::SetEndpoints(first, endpoints))
                if endpoints.len() < RUN_MAX && ids_from(*first).nth(endpoints.len()) == Some(id) =>
            {
                endpoints.push(to);
            }
            _ => self.push(Op::SetEndpoints(id, vec![to])),
        }
    }
}

impl Extend<Op> for Phase {
    fn extend<T: IntoIterator<Item = Op>>(&mut self, ops: T) {
        ops.into_iter().for_each(|op| self.push(op));
    }
}

struct Planner<'a> {
    observed: &'a State,
    desired: &'a Desired,
    /// Phases.
    before: Phase,
    turn: Vec<Op>,
    remove: Vec<Op>,
    after: Phase,
    /// What cannot be done for want of room.
    problems: Vec<String>,
    /// Service ids and groups of the ports in question.
    placed: BTreeMap<Arc<str>, Placed>,
    free_services: Box<dyn Iterator<Item = u32> + 'a>,
    free_endpoints: Box<dyn Iterator<Item = u32> + 'a>,
    /// Maglev tables that there will be, before any goes.
    tables: usize,
    /// Room for groups, once somebody asked.
    room: Option<Room>,
    /// Node ports, some packets to which a frontend of its own will get.
    overtaken: BTreeSet<FrontendKey>,
    /// Ports that get packets which other ports have had.
    arriving: BTreeSet<&'a Arc<str>>,
    /// Service ids that ports have instead of others until now.
    moved: BTreeMap<u32, u32>,
    /// Slots of groups that stay in place; only where everything is looked at.
    kept: Room,
}

#[derive(Clone, Copy)]
struct Placed {
    id: u32,
    cluster: Group,
    local: Group,
}

const MEMBERSHIP: u16 = endpoint_flags::CLUSTER | endpoint_flags::LOCAL;

impl<'a> Planner<'a> {
    fn new(observed: &'a State, desired: &'a Desired) -> Self {
        let (mut overtaken, mut arriving) = (BTreeSet::new(), BTreeSet::new());
        for (key, to) in desired.frontends.iter().filter(|_| !observed.frontends().is_empty()) {
            let Some(Dispatch { port, .. }) = to else { continue };
            let node_port = key.node_port();
            match observed.frontends().get(key) {
                Some(held) if observed.names().get(&held.service) == Some(port) => {}
                None if !observed.frontends().contains_key(&node_port) => {}
                Some(_) => drop(arriving.insert(port)),
                None => {
                    arriving.insert(port);
                    overtaken.insert(node_port);
                }
            }
        }
        Self {
            observed,
            desired,
            before: Phase::new(rank_before),
            turn: Vec::new(),
            remove: Vec::new(),
            after: Phase::new(rank_after),
            problems: Vec::new(),
            placed: BTreeMap::new(),
            free_services: Box::new(observed.free_service_ids()),
            free_endpoints: Box::new(observed.free_endpoint_ids()),
            tables: observed.maglev().len(),
            room: None,
            overtaken,
            arriving,
            moved: BTreeMap::new(),
            kept: Room::new(observed.sizes.slots_of(observed.family), std::iter::empty()),
        }
    }

    fn plan(&mut self) {
        if self.desired.active && !self.observed.installed {
            self.before.push(Op::Install);
        }
        let ids = self.assign_ids();
        for (name, id) in &ids {
            let port = &self.desired.ports[*name];
            self.port(name, *id, port);
        }
        self.frontends();
        self.addresses();
        self.settings();
        self.local_endpoints();
        self.release();
        match (self.observed.installed, self.desired.active) {
            (false, true) => self.remove.push(Op::Attach),
            (true, false) => self.after.push(Op::Detach),
            _ => {}
        }
    }

    /// Ids of the ports in question: those that are held are kept if that may be, the others get the next
    /// free one.
    fn assign_ids(&mut self) -> BTreeMap<&'a Arc<str>, u32> {
        let mut ids = BTreeMap::new();
        let room = self.observed.sizes.ranges as usize;
        let mut ranges: usize = self.observed.ranges().values().map(BTreeSet::len).sum();
        for (name, port) in &self.desired.ports {
            let held = self.observed.id_of(name);
            let kept = held.filter(|id| self.may_keep(name, *id, port));
            match kept.or_else(|| self.free_services.next()).or(held) {
                Some(id) => {
                    let known = self.observed.ranges().get(&id);
                    let is_known = |range: &&IpNet| known.is_some_and(|known| known.contains(*range));
                    let come = port.ranges.len() - port.ranges.iter().filter(is_known).count();
                    if come > 0 && ranges + come > room {
                        self.problems.push(format!("{name}: not served: no room for its source ranges"));
                        continue;
                    }
                    ranges += come;
                    if let Some(held) = held.filter(|held| *held != id) {
                        self.moved.insert(id, held);
                    }
                    ids.insert(name, id);
                }
                None => self.problems.push(format!("{name}: not served: all service ids are taken")),
            }
        }
        ids
    }

    /// Whether the source ranges of a port may become others while frontends lead there. They are those of all its
    /// frontends, and meanwhile old and new ones let packets pass: at a frontend whose verdicts change, or that goes,
    /// that may be packets which are let pass neither before nor after. Then the port gets another id, and all
    /// that belongs to it is there anew before the first frontend turns to it.
    fn may_keep(&self, name: &Arc<str>, id: u32, port: &Port) -> bool {
        let held: BTreeSet<&IpNet> = self.observed.ranges_of(id).collect();
        held.is_empty()
            || port.ranges.is_empty()
            || held.iter().copied().eq(&port.ranges)
            || self.is_steady(name, id) && !self.arriving.contains(name)
    }

    fn port(&mut self, name: &'a Arc<str>, id: u32, port: &'a Port) {
        if self.observed.names().get(&id) != Some(name) {
            self.before.push(Op::SetName(id, Some(name.clone())));
        }
        self.ranges(id, &port.ranges);
        let members = self.endpoints(name, id, port);
        let ids_of = |flag| -> Vec<u32> {
            members.iter().filter(|(_, member)| member.flags & flag != 0).map(|(id, _)| *id).collect()
        };
        let steady = self.is_steady(name, id);
        let cluster = self.group(name, id, false, steady, &ids_of(endpoint_flags::CLUSTER));
        let local = self.group(name, id, true, steady, &ids_of(endpoint_flags::LOCAL));
        self.tables(name, id, port, steady, &members);
        self.placed.insert(name.clone(), Placed { id, cluster, local });
        if !self.desired.everything {
            self.empty_slots(&self.groups_of(id), &[cluster, local]);
        }
    }

    fn ranges(&mut self, owner: u32, wanted: &BTreeSet<IpNet>) {
        let held: BTreeSet<IpNet> = self.observed.ranges_of(owner).copied().collect();
        self.before.extend(wanted.difference(&held).map(|range| Op::AddRange(owner, *range)));
        self.after.extend(held.difference(wanted).map(|range| Op::DeleteRange(owner, *range)));
    }

    /// Endpoints of a port: those that there will be, by address and port, with their ids.
    fn endpoints(&mut self, name: &str, service: u32, port: &Port) -> Vec<(u32, Member)> {
        let held = self.observed.users(service).into_iter().flat_map(|u| &u.endpoints);
        let mut ids: BTreeMap<(Address, u16), u32> = BTreeMap::new();
        let mut gone = Vec::new();
        for id in held {
            let endpoint = self.observed.endpoint(*id);
            if let Some(other) = ids.insert((endpoint.address, endpoint.port), *id) {
                gone.push(other);
            }
        }
        let mut members = Vec::with_capacity(port.members.len());
        let mut left_out = 0;
        for member in &port.members {
            if let Some(id) = ids.remove(&(member.address, member.port)) {
                let endpoint = self.observed.endpoint(id);
                // It stays in the groups of which it was until no frontend leads there.
                let meanwhile = endpoint.flags & MEMBERSHIP | member.flags;
                if meanwhile != endpoint.flags {
                    self.before.set_endpoint(id, Endpoint { flags: meanwhile, ..endpoint });
                }
                if meanwhile != member.flags {
                    self.after.set_endpoint(id, Endpoint { flags: member.flags, ..endpoint });
                }
                members.push((id, *member));
            } else if let Some(id) = self.free_endpoints.next() {
                let used = self.observed.endpoint(id).generation;
                let endpoint = Endpoint {
                    address: member.address,
                    port: member.port,
                    flags: member.flags,
                    service,
                    generation: used.wrapping_add(1),
                    reserved: 0,
                };
                if used != 0 {
                    // Who still reads the entry must find either.
                    self.before.set_endpoint(id, Endpoint { service: 0, ..endpoint });
                }
                self.before.set_endpoint(id, endpoint);
                members.push((id, *member));
            } else {
                left_out += 1;
            }
        }
        if left_out > 0 {
            self.problems.push(format!("{name}: {left_out} endpoints left out: all endpoint ids are taken"));
        }
        gone.extend(ids.into_values());
        for id in gone {
            self.free(id);
        }
        members
    }

    fn free(&mut self, id: u32) {
        self.after.set_endpoint(id, Endpoint { service: 0, ..self.observed.endpoint(id) });
    }

    fn frontends(&mut self) {
        let room = self.observed.sizes.frontends as usize;
        let mut count = self.observed.frontends().len();
        let mut come = Vec::new();
        for (key, dispatch) in &self.desired.frontends {
            let held = self.observed.frontends().get(key);
            let to = dispatch.as_ref().and_then(|dispatch| self.frontend(key, dispatch));
            match (held, to) {
                (None, Some(_)) if count >= room => {
                    let port = dispatch.as_ref().map_or("", |dispatch| &*dispatch.port);
                    let key = crate::state::text::key_text(key);
                    self.problems.push(format!("{port}: {key} is not served: the map of frontends is full"));
                }
                (held, Some(to)) => {
                    count += usize::from(held.is_none());
                    if held.is_none() {
                        come.push(Op::SetFrontend(*key, Some(to)));
                    } else if held != Some(&to) {
                        self.turn.push(Op::SetFrontend(*key, Some(to)));
                    }
                }
                (Some(_), None) => self.remove.push(Op::SetFrontend(*key, None)),
                (None, None) => {}
            }
        }
        // Packets that they get from node ports meet the one or the other as it was.
        self.turn.splice(..0, come);
        if self.desired.everything {
            let strays = self.observed.frontends().keys().filter(|k| !self.desired.frontends.contains_key(k));
            self.remove.extend(strays.map(|key| Op::SetFrontend(*key, None)));
            return;
        }
        // Frontends of the same port that are not in question have the same groups.
        let desired = &self.desired.frontends;
        for Placed { id, cluster, local } in self.placed.values() {
            let held = self.moved.get(id).unwrap_or(id);
            let keys = self.observed.users(*held).into_iter().flat_map(|u| &u.frontends);
            for key in keys.filter(|key| !desired.contains_key(key)) {
                if let Some(held) = self.observed.frontends().get(key) {
                    let to = Frontend { service: *id, cluster: *cluster, local: *local, ..*held };
                    if to != *held {
                        self.turn.push(Op::SetFrontend(*key, Some(to)));
                    }
                }
            }
        }
    }

    fn frontend(&self, key: &FrontendKey, dispatch: &Dispatch) -> Option<Frontend> {
        let Placed { id, cluster, local } = *self.placed.get(&dispatch.port)?;
        Some(Frontend {
            service: id,
            affinity: dispatch.affinity,
            cluster,
            local,
            verdicts: dispatch.verdicts,
            flags: dispatch.flags,
            tag: key.tag(),
        })
    }

    fn addresses(&mut self) {
        let (observed, desired) = (&self.observed.addresses, &self.desired.addresses);
        let room = self.observed.sizes.addresses as usize;
        let (mut count, mut left_out) = (observed.len(), 0);
        let mut change = |address: &Address, from: u32, to: u32| {
            if from == 0 && to != 0 {
                if count >= room {
                    left_out += 1;
                    return;
                }
                count += 1;
            }
            if from | to != from {
                self.turn.push(Op::SetAddress(*address, from | to));
            }
            if from | to != to {
                self.after.push(Op::SetAddress(*address, to));
            }
        };
        // Node ports first: without the other bit only unknown ports are not refused.
        let (node_ports, others): (Vec<_>, Vec<_>) =
            desired.iter().partition(|(_, to)| **to & address_flags::NODE_PORT != 0);
        for (address, to) in node_ports.into_iter().chain(others) {
            change(address, observed.get(address).copied().unwrap_or(0), *to);
        }
        if self.desired.everything {
            for (address, from) in observed.iter().filter(|(address, _)| !desired.contains_key(address)) {
                change(address, *from, 0);
            }
        }
        if left_out > 0 {
            self.problems
                .push(format!("the map of addresses is full: {left_out} are not known as cluster IPs"));
        }
    }

    fn settings(&mut self) {
        let v4 = matches!(self.observed.family, shunt_core::id::IpFamily::V4);
        self.ranges(range_owner::pods(v4), &self.desired.pod_ranges);
        self.ranges(range_owner::service_cidr(v4), &self.desired.service_cidrs);
        let of = FamilyFlags::of(self.observed.family);
        let mask = of.settings();
        let pod_bits = of.pods_by_range | of.pods_by_interface;
        let (from, to) = (self.observed.flags, self.desired.flags);
        let early = self.tells_pods_apart();
        let mut flags = from;
        let mut set = |ops: &mut Phase, to: u32| {
            if flags != to {
                ops.push(Op::SetFlags { mask, to });
                flags = to;
            }
        };
        // Besides the way to tell local pods: what comes comes early, what goes goes late.
        let meanwhile = (from | to) & !pod_bits;
        let bits = if early { to } else { from };
        let pods = (self.observed.pods != self.desired.pods).then(|| Op::SetPods(self.desired.pods.clone()));
        // The name is there before it is asked for, and until it is asked for no more.
        let comes = self.desired.pods.is_some();
        if early && comes {
            self.before.extend(pods.clone());
        }
        set(&mut self.before, meanwhile | bits & pod_bits);
        if !early && comes {
            self.after.extend(pods.clone());
        }
        set(&mut self.after, to);
        if !comes {
            self.after.extend(pods);
        }
    }

    /// Whether frontends treat local pods better than others: then pods must be known before. Otherwise
    /// frontends change first, for they may have treated them better until now.
    fn tells_pods_apart(&self) -> bool {
        self.desired.frontends.values().flatten().any(|dispatch| {
            let [pod, _, other] = dispatch.verdicts;
            pod.is_forward() && !pod.masquerades() && other.is_forward() && other.masquerades()
        })
    }

    /// Endpoints of ports that are not in question may have come to this node or left it.
    fn local_endpoints(&mut self) {
        if self.desired.local_endpoints.is_empty() {
            return;
        }
        let wanted: Vec<(Address, u16, u8, bool)> = self
            .desired
            .local_endpoints
            .iter()
            .map(|(e, here)| (Address::from(e.address), e.port.to_be(), e.protocol.number(), *here))
            .collect();
        let in_question: BTreeSet<u32> = self.placed.values().map(|placed| placed.id).collect();
        for (id, endpoint) in self.observed.endpoints() {
            // Nearly always there are one or two to compare a hundred thousand with.
            let meets = |(address, port, _, _): &&(Address, u16, u8, bool)| {
                *port == endpoint.port && address.same(&endpoint.address)
            };
            let mut met = wanted.iter().filter(meets).peekable();
            if met.peek().is_none() || in_question.contains(&endpoint.service) {
                continue;
            }
            let users = self.observed.users(endpoint.service);
            let protocol = users.and_then(|u| u.frontends.first()).map_or(0, |key| key.protocol);
            let Some((_, _, _, here)) = met.find(|(_, _, of, _)| *of == protocol) else { continue };
            let flags = if *here {
                endpoint.flags | endpoint_flags::HERE
            } else {
                endpoint.flags & !endpoint_flags::HERE
            };
            if flags != endpoint.flags {
                self.before.set_endpoint(id, Endpoint { flags, ..*endpoint });
            }
        }
    }

    /// Gives back the ids that no frontend uses any more, and all that belongs to them.
    fn release(&mut self) {
        let in_question: BTreeSet<u32> = self.placed.values().map(|placed| placed.id).collect();
        let candidates: BTreeSet<u32> = if self.desired.everything {
            self.observed.used_ids()
        } else {
            let held = self.desired.frontends.keys().filter_map(|key| self.observed.frontends().get(key));
            held.map(|frontend| frontend.service).chain(self.moved.values().copied()).collect()
        };
        let moved: BTreeSet<u32> = self.moved.values().copied().collect();
        let stays = |key: &FrontendKey| !self.desired.everything && !self.desired.frontends.contains_key(key);
        let gone: Vec<u32> = candidates
            .into_iter()
            .filter(|id| !in_question.contains(id))
            .filter(|id| {
                moved.contains(id) || !self.observed.users(*id).is_some_and(|u| u.frontends.iter().any(stays))
            })
            .collect();
        for id in gone {
            if !self.desired.everything {
                self.empty_slots(&self.groups_of(id), &[]);
            }
            let endpoints = self.observed.users(id).into_iter().flat_map(|u| &u.endpoints);
            for endpoint in endpoints {
                self.free(*endpoint);
            }
            self.ranges(id, &BTreeSet::new());
            self.no_tables(id);
            if self.observed.names().contains_key(&id) {
                self.after.push(Op::SetName(id, None));
            }
        }
        if self.desired.everything {
            let groups = self.placed.values().flat_map(|p| [p.cluster, p.local]);
            let mut wanted: Vec<Group> = groups.filter(|group| group.count > 0).collect();
            wanted.sort_unstable();
            let is_wanted = |number: u32| {
                let at = wanted.partition_point(|group| group.base <= number);
                at.checked_sub(1).is_some_and(|at| number - wanted[at].base < wanted[at].count)
            };
            let slots: Vec<u32> =
                self.observed.used_slots().map(|(number, _)| number).filter(|n| !is_wanted(*n)).collect();
            self.empty(slots.into_iter());
            // Owners below the service ids that mean nothing to us are those of the other family.
            debug_assert!(self.observed.ranges().keys().all(|owner| self.observed.owns_range(*owner)));
            debug_assert!(self.placed.values().all(|placed| placed.id >= FIRST_SERVICE_ID));
        }
    }
}
