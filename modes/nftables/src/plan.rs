//! From what was observed to what is desired, as transactions. Pure.

mod affinity;
mod skeleton;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use nft_netlink::BaseChain;
use shunt_core::table::Frontend;
use shunt_mode::Plan;

use crate::layout::{
    ChainKey, Class, ENDPOINTS_CAPACITY, List, POSTROUTING, SERVICES_CAPACITY, SERVICES_CHAIN, SetKey,
    base_chains,
};
use crate::op::Op;
use crate::render::{Desired, Dispatch};
use crate::rules::{self, Rule, Skeleton};
use crate::state::{Held, State};

use affinity::{PortPlan, affinity_in_question};
use skeleton::{endpoints_of, skeleton};

/// Operations that one transaction holds at most, unless a single frontend needs more. The kernel
/// holds the lock of all tables of the network namespace while it commits one.
pub const TRANSACTION_MAX: usize = 16_384;

/// Classes (with their chains) that are kept although nothing uses them: the next change of a number
/// of endpoints may want them again, and a restart after such changes has nothing to tidy up.
const SPARE_CLASSES: usize = 8;

/// Sizes that a plan keeps to. Only tests choose others than the default: small ones, so that plans
/// of small clusters take many transactions and their maps grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// See [`TRANSACTION_MAX`].
    pub transaction: usize,
    /// Capacity with which the map of frontends starts.
    pub services: u32,
    /// Capacity with which the map of endpoints starts.
    pub endpoints: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { transaction: TRANSACTION_MAX, services: SERVICES_CAPACITY, endpoints: ENDPOINTS_CAPACITY }
    }
}

/// Plans the way from `observed` to `desired`.
///
/// The order keeps every prefix safe: what is referred to is made first; a frontend changes within
/// one transaction; packets are led to our rules only once all frontends are there; what is not
/// needed any more goes last.
pub fn plan(observed: &State, desired: &Desired) -> Plan<Op> {
    plan_within(observed, desired, &Limits::default())
}

/// [`plan`] within other limits.
pub fn plan_within(observed: &State, desired: &Desired, limits: &Limits) -> Plan<Op> {
    if observed.foreign {
        return rebuild(observed, desired, limits);
    }
    if !desired.active {
        let mut plan = Plan::default();
        if observed.exists {
            plan.push(vec![Op::DeleteTable(observed.family)]);
        }
        return plan;
    }
    let ports = desired.affinity.keys().map(|port| &**port);
    let in_use = |id| observed.affinity.contains_key(&id);
    let ids = crate::affinity::assign_ids(ports, |port| observed.affinity_id(port), in_use);
    let with_ids = (!ids.is_empty()).then(|| desired.with_ids(&ids));
    Planner::new(observed, with_ids.as_ref().unwrap_or(desired), limits, &ids).plan()
}

/// A table that cannot be mended in place (declared differently, by another version say) is replaced
/// as a whole, in one transaction.
fn rebuild(observed: &State, desired: &Desired, limits: &Limits) -> Plan<Op> {
    let empty = State::empty(observed.family);
    let mut ops = vec![Op::DeleteTable(observed.family)];
    ops.extend(plan_within(&empty, desired, limits).transactions.into_iter().flat_map(|t| t.ops));
    let mut plan = Plan::default();
    plan.push(ops);
    plan
}

struct Planner<'a> {
    observed: &'a State,
    desired: &'a Desired,
    limits: &'a Limits,
    skeleton: Skeleton,
    /// What must be there, and nothing leads to yet. See [`Planner::transactions`].
    early: Vec<Op>,
    /// What must be there before the frontends change.
    before: Vec<Op>,
    /// Changes of frontends, each to stay within one transaction.
    frontends: Vec<Vec<Op>>,
    /// What leads packets to our rules, and everything else that comes after the frontends.
    after: Vec<Op>,
    /// Lists of endpoints that are given up. See [`Planner::transactions`].
    late: Vec<Op>,
    /// Chains that exist or will.
    chains: BTreeSet<ChainKey>,
    /// Classes that are needed, or kept.
    classes: BTreeSet<Class>,
    /// Whether a chain of a class gets other rules than it has.
    rewritten: bool,
    /// Maps that larger ones replace.
    replaced: Replaced,
    /// Service ports with affinity in question, by id.
    affinity: BTreeMap<u32, PortPlan<'a>>,
    /// Chains of those that stay.
    affinity_chains: BTreeSet<String>,
}

/// Maps that are full, as they are before the plan. Larger ones take over within one transaction.
#[derive(Clone, Copy, Default)]
struct Replaced {
    services: Option<SetKey>,
    endpoints: Option<SetKey>,
}

impl Replaced {
    const fn some(self) -> bool {
        self.services.is_some() || self.endpoints.is_some()
    }

    /// The maps that are replaced, as far as they hold this frontend.
    const fn of(self, frontend: &Frontend) -> Self {
        if frontend.address.is_some() { self } else { Self { services: None, endpoints: None } }
    }
}

impl<'a> Planner<'a> {
    fn new(
        observed: &'a State,
        desired: &'a Desired,
        limits: &'a Limits,
        ids: &BTreeMap<&'a str, u32>,
    ) -> Self {
        Self {
            affinity: affinity_in_question(observed, desired, ids),
            affinity_chains: BTreeSet::new(),
            observed,
            desired,
            limits,
            skeleton: skeleton(observed, desired, limits),
            early: Vec::new(),
            before: Vec::new(),
            frontends: Vec::new(),
            after: Vec::new(),
            late: Vec::new(),
            chains: BTreeSet::new(),
            classes: BTreeSet::new(),
            rewritten: false,
            replaced: Replaced::default(),
        }
    }

    fn plan(mut self) -> Plan<Op> {
        self.sets();
        self.base();
        self.classes();
        self.affinity();
        for (frontend, dispatch) in &self.desired.frontends {
            self.frontend(frontend, dispatch.as_ref());
        }
        let moves = self.a_frontend_moves();
        let ports = self.affinity.values_mut().map(|port| std::mem::take(&mut port.ops));
        let ports = ports.filter(|ops| !ops.is_empty());
        if moves {
            self.frontends.push(ports.flatten().collect());
        } else {
            self.frontends.extend(ports);
        }
        if self.desired.everything {
            self.vanished_frontends();
        } else if self.replaced.some() {
            self.move_frontends();
        }
        self.addresses();
        self.hooks();
        let mut garbage = std::mem::take(&mut self.late);
        if self.desired.everything {
            garbage.extend(self.garbage());
        }
        garbage.extend(self.affinity_garbage());
        let wanted = self.wanted_sets();
        let unwanted = self.observed.sets.iter().filter(|set| !wanted.contains(set));
        garbage.extend(unwanted.map(|set| Op::DeleteSet(*set)));
        self.transactions(garbage)
    }

    /// Everything in one transaction if it fits, else bounded ones in order, but for two things, as a packet
    /// may be on its way through the rules when a transaction is committed. It keeps to the rules as they were
    /// before, and looks up elements as they are after.
    ///
    /// New chains come first: to such a packet they are empty until the next commit, so that nothing may lead
    /// there before (`nf_tables_commit_chain` in the kernel's `net/netfilter/nf_tables_api.c`). Garbage goes
    /// last: a packet that was told its class must not find the class gone, nor the map or the list empty in which
    /// its rules look.
    fn transactions(self, garbage: Vec<Op>) -> Plan<Op> {
        let whole = self.must_stay_whole();
        let mut plan = Plan::default();
        push_bounded(&mut plan, self.early, self.limits.transaction);
        let mut ops = self.before;
        for frontend in self.frontends {
            if !whole && !ops.is_empty() && ops.len() + frontend.len() > self.limits.transaction {
                plan.push(std::mem::take(&mut ops));
            }
            ops.extend(frontend);
        }
        for op in self.after {
            // Hooks and removals are few except at scale: cut those as well.
            if !whole && ops.len() >= self.limits.transaction {
                plan.push(std::mem::take(&mut ops));
            }
            ops.push(op);
        }
        plan.push(ops);
        push_bounded(&mut plan, garbage, self.limits.transaction);
        plan
    }

    /// A map that grows is filled and put to use in one transaction, for rules and mirror know of one
    /// such map only. Those who set the mark and those who look at it change together. Chains that tell
    /// sources apart in another way change together with the classes of the frontends.
    fn must_stay_whole(&self) -> bool {
        let postrouting = rules::of_base_chain(&self.skeleton, POSTROUTING);
        let held = self.observed.chains.get(POSTROUTING);
        self.replaced.some()
            || self.rewritten
            || held.is_some_and(|chain| chain.rules.first() != postrouting.first())
    }

    fn wanted_sets(&self) -> Vec<SetKey> {
        let mut sets = SetKey::all(self.skeleton.services, self.skeleton.endpoints).to_vec();
        let not_in_question = || self.observed.affinity.keys().any(|id| !self.affinity.contains_key(id));
        if self.affinity.values().any(|port| !port.all_legs.is_empty()) || not_in_question() {
            sets.extend(SetKey::AFFINITY);
        }
        sets
    }

    /// Creates the table and missing sets.
    fn sets(&mut self) {
        if !self.observed.exists {
            self.before.push(Op::AddTable(self.observed.family));
        }
        if self.desired.everything {
            // They may sit where elements of ours belong.
            self.before.extend(self.observed.strays.iter().cloned().map(Op::DeleteStray));
        }
        let replaced = |held: Option<u32>, wanted| held.filter(|held| *held != wanted);
        self.replaced = Replaced {
            services: replaced(self.observed.services_capacity(), self.skeleton.services)
                .map(SetKey::Services),
            endpoints: replaced(self.observed.endpoints_capacity(), self.skeleton.endpoints)
                .map(SetKey::Endpoints),
        };
        for set in self.wanted_sets().into_iter().filter(|set| !self.observed.sets.contains(set)) {
            // New chains may look at any other.
            let replaces = match set {
                SetKey::Services(_) => self.replaced.services.is_some(),
                SetKey::Endpoints(_) => self.replaced.endpoints.is_some(),
                _ => false,
            };
            let ops =
                if self.observed.leads_packets() && !replaces { &mut self.early } else { &mut self.before };
            ops.push(Op::AddSet(set));
        }
    }

    /// Creates `chain` and what it leads to, unless it is there with the right rules.
    fn chain(&mut self, chain: ChainKey) {
        if !self.chains.insert(chain) {
            return;
        }
        for next in rules::next_chains(&chain) {
            self.chain(next);
        }
        let (name, rules) = (chain.to_string(), rules::of_chain(&self.skeleton, &chain));
        let held = self.observed.chains.get(&name);
        self.rewritten |= held.is_some_and(|held| held.rules != rules);
        if held.is_none() && self.observed.leads_packets() && self.replaced.some() {
            // Until the new maps are put to use, the old ones are there to be looked at.
            let of_old_maps = rules::of_chain(&self.with_old_maps(), &chain);
            if of_old_maps != rules {
                self.before.push(Op::SetRules(name.clone(), rules));
            }
            self.rules(&name, None, of_old_maps, false);
        } else {
            self.rules(&name, None, rules, false);
        }
    }

    /// The skeleton, with the maps that are replaced.
    fn with_old_maps(&self) -> Skeleton {
        let mut skeleton = self.skeleton.clone();
        if let Some(SetKey::Services(capacity)) = self.replaced.services {
            skeleton.services = capacity;
        }
        if let Some(SetKey::Endpoints(capacity)) = self.replaced.endpoints {
            skeleton.endpoints = capacity;
        }
        skeleton
    }

    fn rules(&mut self, name: &str, base: Option<BaseChain>, rules: Vec<Rule>, after: bool) {
        let ops = if after { &mut self.after } else { &mut self.before };
        set_rules(self.observed, &mut self.early, ops, name, base, rules);
    }

    fn base(&mut self) {
        self.chain(ChainKey::Reject);
        // Guards are up before the frontends that they guard, and until the last of those is gone.
        let loses_guards = !self.skeleton.guards && !self.observed.guarded.is_empty();
        let rules = rules::services(&self.skeleton);
        self.rules(SERVICES_CHAIN, None, rules, loses_guards);
    }

    fn classes(&mut self) {
        let mut wanted: BTreeSet<Class> =
            self.desired.frontends.values().flatten().map(|dispatch| dispatch.class).collect();
        if self.skeleton_differs_for_classes() {
            wanted.extend(self.observed.classes.iter().copied());
        }
        if self.desired.everything {
            let spare = self.observed.classes.difference(&wanted).copied();
            let spare: Vec<Class> = spare.filter(|c| !matches!(c, Class::Affinity { .. })).collect();
            if spare.len() <= SPARE_CLASSES {
                wanted.extend(spare);
            }
        }
        for class in wanted.iter().filter(|c| !matches!(c, Class::Affinity { .. })) {
            let chain = class.chain();
            if let Some(chain) = chain {
                self.chain(chain);
            }
            if !self.observed.classes.contains(class) {
                self.before.push(Op::AddClass(*class, chain.map(|c| c.to_string())));
            }
        }
        self.classes = wanted;
    }

    /// Whether chains of classes that are not in question may have to change as well.
    fn skeleton_differs_for_classes(&self) -> bool {
        !self.desired.everything && Some(self.skeleton.endpoints) != self.observed.endpoints_capacity()
    }

    fn frontend(&mut self, frontend: &Frontend, dispatch: Option<&Dispatch>) {
        let nothing = Held::default();
        let held = self.observed.frontends.get(frontend).unwrap_or(&nothing);
        let (services, endpoints) = self.maps_of(frontend);
        let to = dispatch.map(|d| d.class);
        // A new map is empty, and what is not wanted any more is taken out of the old one.
        let replaced = self.replaced.of(frontend);
        // Exactly as many as a new frontend needs: at the start there are as many of these as Services.
        let endpoints_wanted: usize =
            dispatch.map_or(0, |d| List::ALL.map(|list| d.list(list).len()).iter().sum());
        let goes_on = endpoints_wanted > 0 || matches!(to, Some(Class::Affinity { .. }));
        let mut ops = Vec::with_capacity(endpoints_wanted + 1);
        let mut removals = Vec::new();
        for list in List::ALL {
            let wanted = dispatch.map(|d| endpoints_of(d, list)).unwrap_or_default();
            let removals =
                if wanted.is_empty() && goes_on && held.class != to { &mut self.late } else { &mut removals };
            let slots = edit_slots(held.list(list), &wanted, replaced.endpoints.is_some());
            for (index, from, to) in slots {
                let slot = |set, from| Op::SetSlot { set, frontend: *frontend, list, index, from, to };
                match (to, replaced.endpoints) {
                    (Some(_), None) => ops.push(slot(endpoints, from)),
                    (Some(_), Some(_)) => ops.push(slot(endpoints, None)),
                    (None, old) => removals.push(slot(old.unwrap_or(endpoints), from)),
                }
            }
        }
        let class = |set, from| Op::SetClass { set, frontend: *frontend, from, to };
        match (to, replaced.services) {
            (Some(_), Some(_)) => ops.push(class(services, None)),
            (None, Some(old)) if held.class.is_some() => ops.push(class(old, held.class)),
            (_, None) if held.class != to => ops.push(class(services, held.class)),
            _ => {}
        }
        ops.extend(removals);
        self.guard(frontend, dispatch, &mut ops);
        match to {
            Some(Class::Affinity { id, .. }) => self.affinity.entry(id).or_default().ops.extend(ops),
            _ if !ops.is_empty() => self.frontends.push(ops),
            _ => {}
        }
    }

    const fn maps_of(&self, frontend: &Frontend) -> (SetKey, SetKey) {
        if frontend.address.is_some() {
            (SetKey::Services(self.skeleton.services), SetKey::Endpoints(self.skeleton.endpoints))
        } else {
            (SetKey::NodePorts, SetKey::NodePortEndpoints)
        }
    }

    fn guard(&self, frontend: &Frontend, dispatch: Option<&Dispatch>, ops: &mut Vec<Op>) {
        let none = BTreeSet::new();
        let guarded = self.observed.guarded.contains(frontend);
        let wanted = dispatch.and_then(|d| d.guard.as_deref());
        let mut ranges: BTreeSet<IpNet> = wanted.map(|g| g.ranges.clone()).unwrap_or_default();
        if let (Some(guard), Some(vip)) = (wanted, frontend.address)
            && guard.allow_vip_source
            && !guard.ranges.iter().any(|r| r.contains(&vip))
        {
            ranges.insert(IpNet::from(vip));
        }
        let held = self.observed.sources.get(frontend).unwrap_or(&none);
        ops.extend(held.difference(&ranges).map(|r| Op::DeleteSource(*frontend, *r)));
        ops.extend(ranges.difference(held).map(|r| Op::AddSource(*frontend, *r)));
        match (guarded, wanted.is_some()) {
            (false, true) => ops.push(Op::AddGuard(*frontend)),
            (true, false) => ops.push(Op::DeleteGuard(*frontend)),
            _ => {}
        }
    }

    fn vanished_frontends(&mut self) {
        let gone: Vec<Frontend> = self
            .observed
            .frontends
            .keys()
            .chain(&self.observed.guarded)
            .chain(self.observed.sources.keys())
            .filter(|f| !self.desired.frontends.contains_key(f))
            .copied()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        for frontend in gone {
            self.frontend(&frontend, None);
        }
    }

    /// Copies frontends that are not in question into a map that replaces a smaller one.
    fn move_frontends(&mut self) {
        for (frontend, held) in &self.observed.frontends {
            if frontend.address.is_none() || self.desired.frontends.contains_key(frontend) {
                continue;
            }
            let (services, endpoints) = self.maps_of(frontend);
            let mut ops = Vec::new();
            for list in List::ALL.into_iter().filter(|_| self.replaced.endpoints.is_some()) {
                ops.extend(held.list(list).iter().enumerate().filter(|(_, s)| s.is_some()).map(
                    |(index, slot)| Op::SetSlot {
                        set: endpoints,
                        frontend: *frontend,
                        list,
                        index: index as u32,
                        from: None,
                        to: *slot,
                    },
                ));
            }
            if self.replaced.services.is_some() && held.class.is_some() {
                ops.push(Op::SetClass { set: services, frontend: *frontend, from: None, to: held.class });
            }
            self.frontends.push(ops);
        }
    }

    fn addresses(&mut self) {
        let observed = self.observed;
        let toggle = |ops: &mut Vec<Op>, set, held: &BTreeSet<IpAddr>, address: IpAddr, wanted: bool| match (
            held.contains(&address),
            wanted,
        ) {
            (false, true) => ops.push(Op::AddAddress(set, address)),
            (true, false) => ops.push(Op::DeleteAddress(set, address)),
            _ => {}
        };
        for (address, wanted) in &self.desired.cluster_ips {
            toggle(&mut self.after, SetKey::ClusterIps, &observed.cluster_ips, *address, *wanted);
        }
        for (endpoint, wanted) in &self.desired.hairpins {
            match (observed.hairpins.contains(endpoint), *wanted) {
                (false, true) => self.before.push(Op::AddHairpin(*endpoint)),
                (true, false) => self.after.push(Op::DeleteHairpin(*endpoint)),
                _ => {}
            }
        }
        let node_port_ips = self.desired.node_port_ips();
        // The rule that looks at this set may take the place of one that does not.
        let added = node_port_ips.difference(&observed.node_port_ips);
        self.before.extend(added.map(|a| Op::AddAddress(SetKey::NodePortIps, *a)));
        let removed = observed.node_port_ips.difference(&node_port_ips);
        self.after.extend(removed.map(|a| Op::DeleteAddress(SetKey::NodePortIps, *a)));
        let ranges = &self.desired.service_cidrs;
        self.after.extend(observed.service_cidrs.difference(ranges).map(|r| Op::DeleteServiceCidr(*r)));
        self.after.extend(ranges.difference(&observed.service_cidrs).map(|r| Op::AddServiceCidr(*r)));
        if self.desired.everything {
            for address in &observed.cluster_ips {
                if !self.desired.cluster_ips.contains_key(address) {
                    self.after.push(Op::DeleteAddress(SetKey::ClusterIps, *address));
                }
            }
            for endpoint in &observed.hairpins {
                if !self.desired.hairpins.contains_key(endpoint) {
                    self.after.push(Op::DeleteHairpin(*endpoint));
                }
            }
        }
    }

    fn hooks(&mut self) {
        for (name, base) in base_chains() {
            let rules = rules::of_base_chain(&self.skeleton, name);
            // Hairpins are seen to before there are any, and until the last of them is gone.
            let loses_hairpins = !self.skeleton.hairpins && !self.observed.hairpins.is_empty();
            self.rules(name, Some(base), rules, name != POSTROUTING || loses_hairpins);
        }
    }

    /// Chains and classes that nothing uses any more, some spare ones excepted.
    fn garbage(&self) -> Vec<Op> {
        let stale = self.observed.classes.difference(&self.classes);
        let mut garbage: Vec<Op> = stale.map(|class| Op::DeleteClass(*class)).collect();
        let mut keep: BTreeSet<String> = self.chains.iter().map(ToString::to_string).collect();
        keep.insert(SERVICES_CHAIN.to_owned());
        keep.extend(self.affinity_chains.iter().cloned());
        keep.extend(base_chains().map(|(name, _)| name.to_owned()));
        let stale: Vec<&String> = self.observed.chains.keys().filter(|name| !keep.contains(*name)).collect();
        // Rules first: a chain that another one leads to cannot be deleted.
        garbage.extend(stale.iter().map(|name| Op::SetRules((*name).clone(), Vec::new())));
        garbage.extend(stale.iter().map(|name| Op::DeleteChain((*name).clone())));
        garbage
    }
}

/// Creates a chain or changes its rules, unless it is there with the right ones. What is created goes in
/// `early` if packets are about, unless it is a base chain, to which nothing leads.
fn set_rules(
    observed: &State,
    early: &mut Vec<Op>,
    ops: &mut Vec<Op>,
    name: &str,
    base: Option<BaseChain>,
    rules: Vec<Rule>,
) {
    let held = observed.chains.get(name);
    if held.is_some_and(|chain| chain.rules == rules) {
        return;
    }
    let ops = if held.is_none() && base.is_none() && observed.leads_packets() { early } else { ops };
    if held.is_none() {
        ops.push(Op::AddChain(name.to_owned(), base));
    }
    ops.push(Op::SetRules(name.to_owned(), rules));
}

fn push_bounded(plan: &mut Plan<Op>, ops: Vec<Op>, most: usize) {
    let mut ops = ops.into_iter().peekable();
    while ops.peek().is_some() {
        plan.push(ops.by_ref().take(most).collect());
    }
}

/// Which slots to change so that they hold exactly the wanted endpoints, without holes: endpoints
/// that stay keep their slots as far as the new number of slots allows. With `all`, every wanted
/// slot is named, changed or not.
fn edit_slots<T: Copy + Ord>(
    held: &[Option<T>],
    wanted: &[T],
    all: bool,
) -> Vec<(u32, Option<T>, Option<T>)> {
    let count = wanted.len();
    let unchanged = held.len() == count && held.iter().zip(wanted).all(|(h, w)| *h == Some(*w));
    if unchanged && !all {
        return Vec::new();
    }
    let mut missing: BTreeSet<T> = wanted.iter().copied().collect();
    let mut slots: Vec<Option<T>> = vec![None; count];
    for (slot, held) in slots.iter_mut().zip(held) {
        *slot = held.filter(|endpoint| missing.remove(endpoint));
    }
    let mut missing = missing.into_iter();
    for slot in slots.iter_mut().filter(|s| s.is_none()) {
        *slot = missing.next();
    }
    let longest = count.max(held.len());
    (0..longest)
        .map(|i| (i as u32, held.get(i).copied().flatten(), slots.get(i).copied().flatten()))
        .filter(|(_, from, to)| from != to || (all && to.is_some()))
        .collect()
}
