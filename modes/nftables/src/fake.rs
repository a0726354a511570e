//! A kernel in memory that refuses what the real one refuses, all or nothing.

use std::collections::{BTreeMap, BTreeSet};

use nft_netlink::{Expr, Verdict};
use shunt_core::id::IpFamily;
use shunt_core::table::Frontend;
use shunt_mode::{KernelError, Remedy, Transaction, Unsupported};

use crate::kernel::Kernel;
use crate::layout::{Class, Endpoint, List, SetKey};
use crate::op::{self, Op};
use crate::state::{Held, State};

/// The maps of frontends and endpoints, each with elements of its own. The mirror has one place for
/// a frontend; the kernel has two while a map is replaced by a larger one.
#[derive(Clone, Debug, Default)]
struct Maps {
    /// Elements as the kernel counts them: added ones at once, deleted ones when it commits.
    counts: BTreeMap<SetKey, u32>,
    classes: BTreeMap<(SetKey, Frontend), Class>,
    slots: BTreeMap<(SetKey, Frontend, List, u32), Endpoint>,
}

impl Maps {
    fn start(&mut self) {
        self.counts.clear();
        let sets = self.classes.keys().map(|(set, ..)| *set).chain(self.slots.keys().map(|(set, ..)| *set));
        sets.for_each(|set| *self.counts.entry(set).or_default() += 1);
    }

    fn count(&mut self, set: SetKey, added: bool) -> Result<(), String> {
        let count = self.counts.entry(set).or_default();
        *count += u32::from(added);
        match set {
            SetKey::Services(size) | SetKey::Endpoints(size) if *count > size => {
                Err("Too many open files in system: the map is full".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn carry_out(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::SetClass { set, frontend, from, to } => {
                self.count(
                    *set,
                    to.is_some() && (from.is_some() || !self.classes.contains_key(&(*set, *frontend))),
                )?;
                replace(&mut self.classes, (*set, *frontend), from.is_some(), *to)
            }
            Op::SetSlot { set, frontend, list, index, from, to } => {
                let key = (*set, *frontend, *list, *index);
                self.count(*set, to.is_some() && (from.is_some() || !self.slots.contains_key(&key)))?;
                replace(&mut self.slots, key, from.is_some(), *to)
            }
            Op::DeleteSet(gone) => {
                self.classes.retain(|(set, ..), _| set != gone);
                self.slots.retain(|(set, ..), _| set != gone);
                Ok(())
            }
            Op::DeleteTable(_) => {
                *self = Self::default();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What an observer finds.
    fn frontends(&self, family: IpFamily) -> BTreeMap<Frontend, Held> {
        let mut state = State::empty(family);
        for ((_, frontend), class) in &self.classes {
            state.set_class(*frontend, Some(*class));
        }
        for ((_, frontend, list, index), endpoint) in &self.slots {
            state.set_slot(*frontend, *list, *index as usize, Some(*endpoint));
        }
        state.frontends
    }
}

/// Deletes an element, adds one, or both, as the kernel does.
fn replace<K: Ord, V: PartialEq>(
    map: &mut BTreeMap<K, V>,
    key: K,
    delete: bool,
    add: Option<V>,
) -> Result<(), String> {
    if delete && map.remove(&key).is_none() {
        return Err("No such file or directory".to_owned());
    }
    match (add, map.get(&key)) {
        // The same element twice is fine; another one with its key is not.
        (Some(data), Some(held)) if data != *held => Err("File exists".to_owned()),
        (Some(data), _) => {
            map.insert(key, data);
            Ok(())
        }
        (None, _) => Ok(()),
    }
}

/// The kernel in memory.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    /// What it holds.
    state: State,
    maps: Maps,
    /// Commits until one fails with `EIO`; `None` for never.
    pub fail_after: Option<usize>,
    /// Transactions that were carried out.
    pub commits: usize,
    /// Times that the whole table was read.
    pub reads: usize,
}

impl FakeKernel {
    /// A kernel without our table.
    pub fn new(family: IpFamily) -> Self {
        Self { state: State::empty(family), maps: Maps::default(), fail_after: None, commits: 0, reads: 0 }
    }
}

impl FakeKernel {
    /// What it holds.
    pub const fn state(&self) -> &State {
        &self.state
    }
}

impl Kernel for FakeKernel {
    fn probe(&mut self) -> Result<(), Unsupported> {
        Ok(())
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.reads += 1;
        Ok(self.state.clone())
    }

    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        if let Some(left) = &mut self.fail_after {
            if *left == 0 {
                return Err(refused("I/O error".to_owned(), Remedy::Retry));
            }
            *left -= 1;
        }
        let mut next = self.state.clone();
        let mut maps = self.maps.clone();
        maps.start();
        for op in &transaction.ops {
            check(&next, op).map_err(|why| refused(format!("{op}: {why}"), Remedy::Resync))?;
            maps.carry_out(op).map_err(|why| refused(format!("{op}: {why}"), Remedy::Resync))?;
            op::advance(&mut next, &Transaction { ops: vec![op.clone()] });
        }
        // Not the kernel's doing: a mirror that is wrong would be refused later, or never be noticed.
        assert_eq!(next.frontends, maps.frontends(next.family), "the mirror is not what the maps hold");
        check_all(&next).map_err(|why| refused(why, Remedy::Resync))?;
        check_passing(&self.state, &next).map_err(|why| refused(why, Remedy::Resync))?;
        self.state = next;
        self.maps = maps;
        self.commits += 1;
        Ok(())
    }

    fn delete_table(&mut self) -> Result<(), KernelError> {
        self.state = State::empty(self.state.family);
        self.maps = Maps::default();
        Ok(())
    }
}

fn refused(why: String, remedy: Remedy) -> KernelError {
    KernelError { context: "commit".to_owned(), source: why.into(), remedy }
}

/// What the kernel checks at each operation: existing things cannot be made, missing ones cannot be
/// deleted.
fn check(state: &State, op: &Op) -> Result<(), String> {
    let must = |ok: bool, why: &str| if ok { Ok(()) } else { Err(why.to_owned()) };
    let (exists, missing) = ("File exists", "No such file or directory");
    let set_exists = |set: &SetKey| must(state.sets.contains(set), "no such set");
    match op {
        Op::AddTable(_) => must(!state.exists, exists),
        Op::DeleteTable(_) => must(state.exists || state.foreign, missing),
        Op::AddSet(set) => must(!state.sets.contains(set), exists),
        Op::DeleteSet(set) | Op::SetClass { to: None, set, .. } | Op::SetSlot { to: None, set, .. } => {
            set_exists(set)
        }
        Op::AddChain(name, _) => must(!state.chains.contains_key(name), exists),
        Op::DeleteChain(name) => {
            let Some(chain) = state.chains.get(name) else { return must(false, missing) };
            must(chain.rules.is_empty(), "chain has rules")?;
            let target = Verdict::Goto(name.clone());
            let in_rule = state
                .chains
                .values()
                .flat_map(|c| &c.rules)
                .flat_map(|r| &r.exprs)
                .any(|e| *e == Expr::ImmediateVerdict(target.clone()));
            let in_map = state.classes.iter().any(|c| state.leads_to(*c) == target);
            must(!in_rule && !in_map, "Device or resource busy")
        }
        Op::SetRules(name, _) => must(state.chains.contains_key(name), missing),
        Op::AddClass(class, chain) => {
            set_exists(&SetKey::Classes)?;
            must(!state.classes.contains(class), exists)?;
            must(chain.as_ref().is_none_or(|c| state.chains.contains_key(c)), "no such chain")?;
            // Not the kernel's doing: what is written here must be what is read back.
            let leads_to = chain.clone().map_or(Verdict::Drop, Verdict::Goto);
            must(state.leads_to(*class) == leads_to, "not the chain of this class")
        }
        Op::SetToken { id, list, number, from, to } => {
            set_exists(&SetKey::AffinityEndpoints)?;
            let held = state.affinity.get(id).and_then(|a| a.endpoints.get(&(*list, *number)));
            check_replace(held, from.as_ref(), to.as_ref())
        }
        Op::SetChoice { id, list, index, from, to } => {
            set_exists(&SetKey::AffinitySlots)?;
            let slots = state.affinity.get(id).map(|a| &a.slots[*list as usize]);
            let held = slots.and_then(|s| s.get(*index as usize)).and_then(Option::as_ref);
            check_replace(held, from.as_ref(), to.as_ref())
        }
        Op::DeleteClass(class) => must(state.classes.contains(class), missing),
        Op::SetClass { set, .. } => {
            set_exists(set)?;
            let moves = matches!(set, SetKey::Services(n) if Some(*n) < state.services_capacity());
            must(!moves, "written to the smaller of two maps")
        }
        Op::SetSlot { set, .. } => {
            set_exists(set)?;
            let moves = matches!(set, SetKey::Endpoints(n) if Some(*n) < state.endpoints_capacity());
            must(!moves, "written to the smaller of two maps")
        }
        Op::AddAddress(SetKey::NodePortIps, a) => must(!state.node_port_ips.contains(a), exists),
        Op::DeleteAddress(SetKey::NodePortIps, a) => must(state.node_port_ips.contains(a), missing),
        Op::AddAddress(_, a) => must(!state.cluster_ips.contains(a), exists),
        Op::DeleteAddress(_, a) => must(state.cluster_ips.contains(a), missing),
        Op::AddServiceCidr(r) => must(!state.service_cidrs.contains(r), exists),
        Op::DeleteServiceCidr(r) => must(state.service_cidrs.contains(r), missing),
        Op::AddHairpin(h) => must(!state.hairpins.contains(h), exists),
        Op::DeleteHairpin(h) => must(state.hairpins.contains(h), missing),
        Op::AddGuard(f) => must(!state.guarded.contains(f), exists),
        Op::DeleteGuard(f) => must(state.guarded.contains(f), missing),
        Op::AddSource(f, r) => must(state.sources.get(f).is_none_or(|g| !g.contains(r)), exists),
        Op::DeleteSource(f, r) => must(state.sources.get(f).is_some_and(|g| g.contains(r)), missing),
        Op::DeleteStray(stray) => must(state.strays.contains(stray), missing),
    }
}

/// An element is deleted, added, or both.
fn check_replace<T: PartialEq>(held: Option<&T>, from: Option<&T>, to: Option<&T>) -> Result<(), String> {
    match (held, from, to) {
        (None, Some(_), _) => Err("No such file or directory".to_owned()),
        (Some(held), None, Some(to)) if held != to => Err("File exists".to_owned()),
        _ => Ok(()),
    }
}

/// Not the kernel's doing: what packets meet that are on their way through the rules during a commit, which keep to
/// the rules as they were and look up elements as they are afterwards. Chains that are new are empty to them.
fn check_passing(before: &State, after: &State) -> Result<(), String> {
    if !before.leads_packets() || !after.exists {
        return Ok(());
    }
    for class in after.frontends.values().filter_map(|held| held.class) {
        if let Verdict::Goto(chain) = after.leads_to(class)
            && !before.chains.contains_key(&chain)
        {
            return Err(format!("class {class} is in use and leads to {chain}, which is new"));
        }
    }
    for (frontend, held) in &before.frontends {
        let Some(class) = held.class else { continue };
        if !after.classes.contains(&class) {
            return Err(format!("class {class} was in use, and is gone"));
        }
        let Some(now) = after.frontends.get(frontend) else { continue };
        let goes_on = matches!(now.class, Some(Class::Affinity { .. }))
            || List::ALL.iter().any(|list| !now.list(*list).is_empty());
        let emptied = List::ALL.iter().any(|list| now.list(*list).is_empty() && !held.list(*list).is_empty());
        if goes_on && emptied && now.class != held.class {
            return Err(format!("{frontend:?} changes class {class}, whose endpoints are gone"));
        }
    }
    let in_use = before.frontends.values().filter_map(|held| held.class);
    let mut passed: Vec<String> =
        in_use.filter_map(|class| Some(before.chain_name(&class.chain()?))).collect();
    passed
        .extend(before.chains.iter().filter(|(_, chain)| chain.base.is_some()).map(|(name, _)| name.clone()));
    let mut seen = BTreeSet::new();
    while let Some(name) = passed.pop() {
        let Some(chain) = before.chains.get(&name).filter(|_| seen.insert(name.clone())) else { continue };
        for expr in chain.rules.iter().flat_map(|rule| &rule.exprs) {
            match expr {
                Expr::ImmediateVerdict(Verdict::Goto(to) | Verdict::Jump(to)) => passed.push(to.clone()),
                Expr::Lookup { set, .. } | Expr::VerdictMap { set, .. } | Expr::Dynset { set, .. }
                    if !SetKey::from_name(set).is_some_and(|set| after.sets.contains(&set)) =>
                {
                    return Err(format!("{name} looked at set {set}, which is gone"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// What must hold after every transaction: rules and maps refer to what exists.
fn check_all(state: &State) -> Result<(), String> {
    for (name, chain) in &state.chains {
        for expr in chain.rules.iter().flat_map(|r| &r.exprs) {
            match expr {
                Expr::ImmediateVerdict(Verdict::Goto(to) | Verdict::Jump(to))
                    if !state.chains.contains_key(to) =>
                {
                    return Err(format!("{name}: leads to {to}, which does not exist"));
                }
                Expr::Lookup { set, .. } | Expr::VerdictMap { set, .. } | Expr::Dynset { set, .. }
                    if !SetKey::from_name(set).is_some_and(|set| state.sets.contains(&set)) =>
                {
                    return Err(format!("{name}: refers to set {set}, which does not exist"));
                }
                _ => {}
            }
        }
    }
    for (id, affinity) in &state.affinity {
        for (list, number) in affinity
            .slots
            .iter()
            .zip(List::ALL)
            .flat_map(|(slots, list)| slots.iter().flatten().map(move |number| (list, *number)))
        {
            if !affinity.endpoints.contains_key(&(list, number)) {
                return Err(format!("a slot of {id:x} holds {number}, which means nothing"));
            }
        }
    }
    let with_address = || state.frontends.iter().filter(|(f, _)| f.address.is_some());
    let endpoints: usize = with_address()
        .map(|(_, h)| List::ALL.map(|l| h.list(l).iter().flatten().count()).iter().sum::<usize>())
        .sum();
    if endpoints != state.endpoint_count {
        return Err(format!("{endpoints} endpoints, counted as {}", state.endpoint_count));
    }
    let used: BTreeSet<_> = state.frontends.values().filter_map(|h| h.class).collect();
    for class in used {
        if !state.classes.contains(&class) {
            return Err(format!("class {class} is used but leads nowhere"));
        }
    }
    Ok(())
}
