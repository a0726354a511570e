//! From what was observed to what is desired. Pure.
//!
//! ```text
//!   1 sets and elements come      nothing is refused that is translated
//!   2 new chains of Service ports nothing leads there yet
//!   3 everything that packets meet already, trees and hooks: at once
//!   4 chains, elements and sets that nothing uses any more go
//! ```

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use shunt_core::table::Frontend;
use shunt_mode::Plan;
use xtables_tools::Table;

use crate::cover::cover;
use crate::fixed;
use crate::names::{self, Name};
use crate::op::{About, Op, advance};
use crate::render::{Desired, Dispatch, Refusal};
use crate::rule::{Match, Rule, Rules, Target};
use crate::sets::{Element, Kind};
use crate::state::{State, find_leaf, reachable};
use crate::tree::{self, Leaves};

/// Plans the way from `observed` to `desired`, in one transaction.
pub fn plan(observed: &State, desired: &Desired) -> Plan<Op> {
    plan_within(observed, desired, usize::MAX)
}

/// [`plan`] with transactions of at most so many operations, unless they must stay together. Only tests
/// need such.
pub fn plan_within(observed: &State, desired: &Desired, limit: usize) -> Plan<Op> {
    let mut plan = Plan::default();
    let declared = |(name, set): (&Name, &crate::state::Set)| {
        set.kind.is_some() && set.kind == Kind::of(observed.family, name)
    };
    if !desired.active {
        plan.push(removal(observed));
    } else if desired.everything && !observed.sets.iter().all(declared) {
        // A set that is declared otherwise cannot be mended while rules look at it.
        let removal = removal(observed);
        let mut left = observed.clone();
        advance(&mut left, &shunt_mode::Transaction { ops: removal.clone() });
        plan.push(removal);
        for transaction in plan_within(&left, desired, limit).transactions {
            plan.push(transaction.ops);
        }
    } else {
        plan = Planner::new(observed, desired).plan(limit);
    }
    plan
}

/// What takes away everything of ours. The protection of loopback stays: it is the kubelet's as well.
pub fn removal(observed: &State) -> Vec<Op> {
    let hooks = observed.hooks.iter().map(|((table, builtin), rules)| Op::SetHooks {
        table: *table,
        builtin: *builtin,
        from: rules.clone(),
        to: Vec::new(),
    });
    let chains = observed.chains.keys().map(|(table, name)| Op::DeleteChain(*table, name.clone()));
    let sets = observed.sets.keys().map(|name| Op::DestroySet(name.clone()));
    hooks.chain(chains).chain(sets).collect()
}

struct Planner<'a> {
    observed: &'a State,
    desired: &'a Desired,
    /// What nothing leads to yet, each on its own.
    before: Vec<Op>,
    /// What packets meet.
    switch: Vec<Op>,
    /// What nothing uses any more, each on its own.
    after: Vec<Op>,
    /// Chains that should be there, where everything is in question.
    wanted: BTreeSet<(Table, Name)>,
    /// Chains that go.
    deleted: BTreeSet<(Table, Name)>,
}

impl<'a> Planner<'a> {
    const fn new(observed: &'a State, desired: &'a Desired) -> Self {
        Self {
            observed,
            desired,
            before: Vec::new(),
            switch: Vec::new(),
            after: Vec::new(),
            wanted: BTreeSet::new(),
            deleted: BTreeSet::new(),
        }
    }

    fn plan(mut self, limit: usize) -> Plan<Op> {
        self.elements();
        let (needed, gone) = self.service_chains();
        self.endpoint_sets(&needed, &gone);
        let of_address = |f: &Frontend| f.address.is_some();
        let [before, mut after] = self.off_cluster();
        after.extend_from_slice(&self.desired.node_ports);
        let leaves = self.tree(Table::Nat, names::SERVICES, &of_address, &leaf, [&before, &after]);
        self.tree(Table::Nat, names::NODE_PORTS, &|f| !of_address(f), &leaf, [&[]; 2]);
        self.tree(Table::Filter, names::EXTERNAL_SERVICES, &|f| !of_address(f), &refusal, [&[]; 2]);
        self.fixed(leaves.as_ref());
        self.mark_first();
        self.hooks();
        for name in gone {
            self.delete(Table::Nat, &name);
        }
        if self.desired.everything {
            let observed = self.observed;
            for (table, name) in observed.chains.keys() {
                if !self.wanted.contains(&(*table, name.clone())) {
                    self.delete(*table, name);
                }
            }
        }
        self.transactions(limit)
    }

    fn transactions(self, limit: usize) -> Plan<Op> {
        let mut plan = Plan::default();
        let mut ops: Vec<Op> = Vec::new();
        let each = |ops: Vec<Op>| ops.into_iter().map(|op| vec![op]);
        // Chains may lead to each other, and look at sets.
        let (chains, others) = self.after.into_iter().partition(|op| matches!(op, Op::DeleteChain(..)));
        for group in each(self.before).chain([self.switch, chains]).chain(each(others)) {
            if !ops.is_empty() && ops.len() + group.len() > limit {
                plan.push(std::mem::take(&mut ops));
            }
            ops.extend(group);
        }
        plan.push(ops);
        plan
    }

    /// Gives a chain its rules, unless it has them.
    fn chain(&mut self, table: Table, name: &Name, rules: &Rules) {
        let key = (table, name.clone());
        if self.observed.chains.get(&key).is_none_or(|held| !same(held, rules)) {
            self.switch.push(Op::SetChain(table, name.clone(), Rules::clone(rules)));
        }
        if self.desired.everything {
            self.wanted.insert(key);
        }
    }

    /// Chains that depend on Services by the ranges of addresses at most.
    fn fixed(&mut self, leaves: Option<&Leaves>) {
        let desired = self.desired;
        let frontends = match leaves {
            Some(leaves) => cover(leaves.keys().filter_map(|frontend| frontend.address)),
            None => self.ranges_held(),
        };
        let endpoints = cover(self.hairpins());
        for ((table, name), rules) in &desired.fixed {
            let first: Vec<Rule> = match (table, desired.by_range.frontends.get(name)) {
                (Table::Filter, Some(rule)) => frontends.iter().map(|range| rule.within(*range)).collect(),
                (Table::Nat, _) if &**name == names::POSTROUTING => {
                    let rule = &desired.by_range.endpoints;
                    let both = |range: &IpNet| rule.and(Match::Source(false, *range)).within(*range);
                    endpoints.iter().map(both).collect()
                }
                _ => Vec::new(),
            };
            if first.is_empty() {
                self.chain(*table, name, rules);
            } else {
                self.chain(*table, name, &first.iter().chain(&**rules).cloned().collect());
            }
        }
    }

    /// The ranges of frontends that rules name: each has one in this chain, which has no others.
    fn ranges_held(&self) -> Vec<IpNet> {
        self.observed
            .rules(Table::Filter, names::PROXY_FIREWALL)
            .iter()
            .filter_map(Rule::destination)
            .collect()
    }

    /// The rules before and after the tree that look after packets from outside of the cluster, each once for each range
    /// of cluster IPs.
    fn off_cluster(&self) -> [Vec<Rule>; 2] {
        let desired = self.desired;
        let Some(rules) = &desired.by_range.cluster_ips else { return Default::default() };
        let ranges = if desired.everything || !desired.cluster_ips.is_empty() {
            let held = self.left_in(names::CLUSTER_IPS).filter_map(|element| match element {
                Element::Address(address) => Some(address),
                _ => None,
            });
            let kept = held.filter(|ip| desired.cluster_ips.get(ip) != Some(&false));
            let come = desired.cluster_ips.iter().filter_map(|(ip, wanted)| wanted.then_some(ip));
            cover(kept.chain(come).copied().collect::<BTreeSet<IpAddr>>())
        } else {
            let held = self.observed.rules(Table::Nat, names::SERVICES).iter();
            held.filter(|held| held.target == rules[0].target).filter_map(Rule::destination).collect()
        };
        rules.each_ref().map(|rule| ranges.iter().map(|range| rule.within(*range)).collect())
    }

    /// The elements of a set that a change may leave there.
    fn left_in(&self, set: &str) -> impl Iterator<Item = &'a Element> + use<'a> {
        let set = self.observed.sets.get(&names::set(self.desired.family, set));
        set.filter(|_| !self.desired.everything).into_iter().flat_map(|set| &set.elements)
    }

    /// The addresses of local endpoints that may meet themselves, as desired.
    fn hairpins(&self) -> BTreeSet<IpAddr> {
        let desired = self.desired;
        let held = self.left_in(names::HAIRPIN).filter_map(|element| match element {
            Element::Hairpin(endpoint) => Some(endpoint),
            _ => None,
        });
        let kept = held.filter(|endpoint| desired.hairpins.get(endpoint) != Some(&false));
        let come = desired.hairpins.iter().filter_map(|(endpoint, wanted)| wanted.then_some(endpoint));
        kept.chain(come).map(|endpoint| endpoint.address).collect()
    }

    /// Chains of Service ports lead to the one that marks: if it is new, it comes before them.
    fn mark_first(&mut self) {
        let is_mark = |op: &Op| matches!(op, Op::SetChain(_, name, _) if &**name == names::MARK_MASQ);
        if !self.observed.chains.contains_key(&(Table::Nat, names::MARK_MASQ.into()))
            && let Some(at) = self.switch.iter().position(is_mark)
        {
            let op = self.switch.remove(at);
            // Among rules, so that all are one call of the tool.
            let first = self.before.iter().position(|op| op.about() == About::Rules);
            self.before.insert(first.unwrap_or(self.before.len()), op);
        }
    }

    fn delete(&mut self, table: Table, name: &Name) {
        if self.deleted.insert((table, name.clone())) {
            self.after.push(Op::DeleteChain(table, name.clone()));
        }
    }

    /// The sets that the filter table looks at.
    fn elements(&mut self) {
        let (observed, desired) = (self.observed, self.desired);
        let name = |set| names::set(desired.family, set);
        for set in fixed::sets(desired.family) {
            if !observed.sets.contains_key(&set)
                && let Some(kind) = Kind::of(desired.family, &set)
            {
                self.before.push(Op::CreateSet(desired.family, set, kind));
            }
        }
        let [reject, drop, guarded, sources] =
            [names::REJECT, names::DROP, names::GUARDED, names::SOURCES].map(name);
        let mut wanted: BTreeSet<(Name, Element)> = BTreeSet::new();
        let mut held: BTreeSet<(Name, Element)> = BTreeSet::new();
        for (frontend, dispatch) in &desired.frontends {
            let Some(element) = Element::frontend(frontend) else { continue };
            if !desired.everything {
                for set in [&reject, &drop, &guarded] {
                    held.extend(observed.holds(set, &element).then(|| (set.clone(), element)));
                }
                held.extend(sources_of(observed, &sources, frontend));
            }
            let Some(dispatch) = dispatch else { continue };
            match dispatch.refusal {
                Some(Refusal::Reject) => drop_into(&mut wanted, &reject, &element),
                Some(Refusal::Drop) => drop_into(&mut wanted, &drop, &element),
                None => {}
            }
            if let (Some(guard), Element::Frontend(address, protocol, port)) = (&dispatch.guard, &element) {
                drop_into(&mut wanted, &guarded, &element);
                let vip = guard.allow_vip_source.then(|| IpNet::from(*address));
                for range in guard.ranges.iter().copied().chain(vip) {
                    wanted.insert((sources.clone(), Element::Source(*address, *protocol, *port, range)));
                }
            }
        }
        let (cluster_ips, hairpin) = (name(names::CLUSTER_IPS), name(names::HAIRPIN));
        let others = desired
            .cluster_ips
            .iter()
            .map(|(ip, wanted)| (&cluster_ips, Element::Address(*ip), *wanted))
            .chain(desired.hairpins.iter().map(|(e, wanted)| (&hairpin, Element::Hairpin(*e), *wanted)));
        for (set, element, is_wanted) in others {
            held.extend(observed.holds(set, &element).then(|| (set.clone(), element)));
            if is_wanted {
                drop_into(&mut wanted, set, &element);
            }
        }
        if desired.everything {
            let all = observed.sets.iter().flat_map(|(set, s)| s.elements.iter().map(|e| (set.clone(), *e)));
            held.extend(all);
        }
        for (set, element) in wanted.difference(&held) {
            self.before.push(Op::AddElement(set.clone(), *element));
        }
        for (set, element) in held.difference(&wanted) {
            self.after.push(Op::DeleteElement(set.clone(), *element));
        }
    }

    /// Chains of Service ports: those that are needed, and those that are not any more.
    fn service_chains(&mut self) -> (BTreeSet<Name>, BTreeSet<Name>) {
        let (observed, desired) = (self.observed, self.desired);
        let mut needed = BTreeSet::new();
        let rules = |name: &str| desired.chains.get(name).map_or(&[][..], |rules| rules);
        for chain in desired.frontends.values().flatten().filter_map(|d| d.leaf.as_ref()?.leads_to()) {
            reachable(&rules, chain, &mut needed);
        }
        let mut new = Vec::new();
        for name in &needed {
            let Some(wanted) = desired.chains.get(name) else { continue };
            match observed.chains.get(&(Table::Nat, name.clone())) {
                Some(held) if held == wanted => {}
                Some(_) => self.switch.push(set_chain(name, wanted)),
                None => new.push((name, wanted)),
            }
            if desired.everything {
                self.wanted.insert((Table::Nat, name.clone()));
            }
        }
        // Those that others lead to come first.
        new.sort_by_key(|(name, _)| (rank(name), Reverse(name.len())));
        self.before.extend(new.into_iter().map(|(name, rules)| set_chain(name, rules)));
        if desired.everything {
            return (needed, BTreeSet::new());
        }
        let mut gone = BTreeSet::new();
        for frontend in desired.frontends.keys() {
            let root = if frontend.address.is_some() { names::SERVICES } else { names::NODE_PORTS };
            let leaf = find_leaf(observed, Table::Nat, root, frontend);
            if let Some(chain) = leaf.as_ref().and_then(Rule::leads_to) {
                observed.reachable(chain, &mut gone);
            }
        }
        gone.retain(|name| !needed.contains(name));
        if !gone.is_empty() {
            // Another frontend may lead to some of them.
            let ports: BTreeSet<&str> = gone.iter().filter_map(|name| names::hash_of(name)).collect();
            let mut used = BTreeSet::new();
            for (frontend, leaf) in leaves_of(observed, Table::Nat) {
                if let Some(chain) = leaf.leads_to()
                    && !desired.frontends.contains_key(&frontend)
                    && names::hash_of(chain).is_some_and(|port| ports.contains(port))
                {
                    observed.reachable(chain, &mut used);
                }
            }
            gone.retain(|name| !used.contains(name));
        }
        (needed, gone)
    }

    /// Sets of clients: one for each endpoint of a Service port with session affinity.
    fn endpoint_sets(&mut self, needed: &BTreeSet<Name>, gone: &BTreeSet<Name>) {
        let (observed, desired) = (self.observed, self.desired);
        let is_endpoint = |name: &&Name| name.starts_with(names::ENDPOINT);
        let missing = needed.iter().filter(is_endpoint).filter(|name| !observed.sets.contains_key(*name));
        let create = |name: &Name| Op::CreateSet(desired.family, name.clone(), Kind::Clients);
        self.before.splice(0..0, missing.map(create));
        let destroy = |name: &Name| Op::DestroySet(name.clone());
        if desired.everything {
            let stale = observed.sets.keys().filter(is_endpoint).filter(|name| !needed.contains(*name));
            self.after.extend(stale.map(destroy));
        } else {
            let stale = gone.iter().filter(is_endpoint).filter(|name| observed.sets.contains_key(*name));
            self.after.extend(stale.map(destroy));
        }
    }

    /// A dispatch tree, with the rules that stand before and after it in its root. Answers all its leaves, unless all
    /// stays the same.
    fn tree(
        &mut self,
        table: Table,
        root: &str,
        is_key: &dyn Fn(&Frontend) -> bool,
        leaf_of: &dyn Fn(&Dispatch) -> Option<Rule>,
        [before, after]: [&[Rule]; 2],
    ) -> Option<Leaves> {
        let (observed, desired) = (self.observed, self.desired);
        let edits: Vec<(&Frontend, Option<Rule>)> = desired
            .frontends
            .iter()
            .filter(|(frontend, _)| is_key(frontend))
            .map(|(frontend, dispatch)| (frontend, dispatch.as_ref().and_then(leaf_of)))
            .collect();
        // What is there may have comments, or none, from when there were fewer frontends, or more.
        let same_leaf = |(frontend, leaf): &(&Frontend, Option<Rule>)| {
            same(find_leaf(observed, table, root, frontend).as_slice(), leaf.as_slice())
        };
        let marks = |rule: &&Rule| rule.leads_to().is_some_and(|chain| &**chain == names::MARK_MASQ);
        let held = observed.chains.get(&(table, root.into()));
        let is_there = held.is_some_and(|held| held.iter().filter(marks).eq(before));
        if !desired.everything && is_there && edits.iter().all(same_leaf) {
            return None;
        }
        let mut leaves = Leaves::new();
        if !desired.everything {
            leaves.extend(leaves_of(observed, table).filter(|(frontend, _)| is_key(frontend)));
        }
        for (frontend, leaf) in edits {
            match leaf {
                Some(leaf) => drop(leaves.insert(*frontend, leaf)),
                None => drop(leaves.remove(frontend)),
            }
        }
        let (branches, nodes) = tree::build(&leaves);
        let rules: Rules = before.iter().chain(&branches).chain(after).cloned().collect();
        for (name, rules) in &nodes {
            self.chain(table, name, rules);
        }
        self.chain(table, &root.into(), &rules);
        if !desired.everything {
            let of_tree = |name: &Name| {
                names::is_tree(name) && tree::is_of_addresses(name) == (root == names::SERVICES)
            };
            let held = observed.chains.keys().filter(|(of, name)| *of == table && of_tree(name));
            for (_, name) in held.filter(|(_, name)| !nodes.contains_key(name)) {
                self.delete(table, name);
            }
        }
        Some(leaves)
    }

    fn hooks(&mut self) {
        let (observed, desired) = (self.observed, self.desired);
        let none = Vec::new();
        for (key, to) in &desired.hooks {
            let from = observed.hooks.get(key).unwrap_or(&none);
            if from != to {
                let (table, builtin) = *key;
                self.switch.push(Op::SetHooks { table, builtin, from: from.clone(), to: to.clone() });
            }
        }
        // Somebody's, or of another version.
        for (key, from) in observed.hooks.iter().filter(|(key, _)| !desired.hooks.contains_key(key)) {
            let (table, builtin) = *key;
            self.switch.push(Op::SetHooks { table, builtin, from: from.clone(), to: Vec::new() });
        }
        if desired.loopback {
            if !observed.loopback.is_guarded() {
                self.switch.push(Op::GuardLoopback(observed.loopback));
            }
            if !observed.loopback.routed {
                self.switch.push(Op::RouteLoopback);
            }
        }
    }
}

fn set_chain(name: &Name, rules: &Rules) -> Op {
    Op::SetChain(Table::Nat, name.clone(), Rules::clone(rules))
}

/// Whether chains do the same; those of a kernel that cannot count lack the counters.
fn same(held: &[Rule], wanted: &[Rule]) -> bool {
    held.len() == wanted.len() && held.iter().zip(wanted).all(|(held, wanted)| held.does_the_same(wanted))
}

fn leaf(dispatch: &Dispatch) -> Option<Rule> {
    dispatch.leaf.clone()
}

fn refusal(dispatch: &Dispatch) -> Option<Rule> {
    dispatch.refusal.map(|refusal| {
        Rule::always(match refusal {
            Refusal::Reject => Target::Reject,
            Refusal::Drop => Target::Drop,
        })
    })
}

fn drop_into(into: &mut BTreeSet<(Name, Element)>, set: &Name, element: &Element) {
    into.insert((set.clone(), *element));
}

/// Chains are made in this order: what leads to others comes after them.
fn rank(chain: &str) -> usize {
    let order = [names::ENDPOINT, names::CLUSTER, names::LOCAL, names::EXTERNAL, names::INTERNAL];
    order.iter().position(|prefix| chain.starts_with(prefix)).unwrap_or(order.len())
}

/// The leaves of all trees of a table.
fn leaves_of(state: &State, table: Table) -> impl Iterator<Item = (Frontend, Rule)> {
    let roots = [names::SERVICES, names::NODE_PORTS, names::EXTERNAL_SERVICES];
    state
        .chains
        .iter()
        .filter(move |((of, name), _)| {
            // In the filter table chains of these names hold something else.
            *of == table
                && (names::is_tree(name)
                    || roots.contains(&&**name)
                        && !(table == Table::Filter && &**name != names::EXTERNAL_SERVICES))
        })
        .flat_map(|(_, rules)| rules.iter().filter_map(tree::leaf))
}

/// The allowed sources of a frontend that a set holds.
fn sources_of<'a>(
    observed: &'a State,
    set: &'a Name,
    frontend: &Frontend,
) -> impl Iterator<Item = (Name, Element)> + use<'a> {
    let wanted = *frontend;
    // The least element of those that begin like the frontend.
    let from = frontend.address.map(|a| Element::Source(a, wanted.protocol, wanted.port, least_range()));
    let elements = observed.sets.get(set).map(|s| &s.elements);
    let range = elements.zip(from).map(|(elements, from)| elements.range(from..));
    range.into_iter().flatten().map_while(move |element| match element {
        Element::Source(a, protocol, port, _)
            if (Some(*a), *protocol, *port) == (wanted.address, wanted.protocol, wanted.port) =>
        {
            Some((set.clone(), *element))
        }
        _ => None,
    })
}

/// IPv4 sorts before IPv6, and short prefixes of the first address before all others.
fn least_range() -> ipnet::IpNet {
    ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::UNSPECIFIED, 0).into()
}
