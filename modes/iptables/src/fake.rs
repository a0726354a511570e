//! A kernel in memory that refuses what the real one refuses, all or nothing.

use std::time::Duration;

use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Remedy, Transaction, Unsupported};
use xtables_tools::Table;

use crate::kernel::Kernel;
use crate::names;
use crate::op::{self, Op};
use crate::plan;
use crate::rule::Rule;
use crate::state::State;

/// The kernel in memory.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    state: State,
    /// From now on every commit after this many is refused.
    pub fail_after: Option<usize>,
    /// How often it was read as a whole.
    pub reads: usize,
}

impl FakeKernel {
    /// A kernel in which nothing of ours is.
    pub fn new(family: IpFamily) -> Self {
        Self { state: State::empty(family), fail_after: None, reads: 0 }
    }

    /// What it holds.
    pub const fn state(&self) -> &State {
        &self.state
    }

    fn check(&self, op: &Op, next: &State) -> Result<(), String> {
        let before = &self.state;
        match op {
            Op::CreateSet(_, name, _) if before.sets.contains_key(name) => {
                Err(format!("set {name}: it exists"))
            }
            Op::CreateSet(_, name, _) if name.len() > 31 => Err(format!("set {name}: the name is too long")),
            Op::DestroySet(name) if !before.sets.contains_key(name) => Err(format!("no set {name}")),
            Op::DestroySet(name) if all_rules(next).any(|(_, rule)| rule.sets().any(|set| set == name)) => {
                Err(format!("set {name} is in use by a kernel component"))
            }
            Op::AddElement(set, element) if before.holds(set, element) => {
                Err(format!("{element} is in {set} already"))
            }
            Op::AddElement(set, _) if !next.sets.contains_key(set) => Err(format!("no set {set}")),
            Op::DeleteElement(set, element) if !before.holds(set, element) => {
                Err(format!("{element} is not in {set}"))
            }
            Op::SetChain(_, name, _) if name.len() > 28 => Err(format!("chain name {name} is too long")),
            Op::DeleteChain(table, name) if !before.chains.contains_key(&(*table, name.clone())) => {
                Err(format!("no chain {name}"))
            }
            Op::SetHooks { table, builtin, from, .. } => {
                let held = before.hooks.get(&(*table, *builtin)).map_or(&[][..], Vec::as_slice);
                (held == from).then_some(()).ok_or_else(|| format!("hooks are {held:?}"))
            }
            Op::RouteLoopback if !next.loopback.is_guarded() => Err("loopback is open".to_owned()),
            _ => Ok(()),
        }
    }
}

fn all_rules(state: &State) -> impl Iterator<Item = (Table, &Rule)> {
    let of_hooks = state.hooks.iter().flat_map(|((table, _), rules)| rules.iter().map(move |r| (*table, r)));
    let of_chains =
        state.chains.iter().flat_map(|((table, _), rules)| rules.iter().map(move |r| (*table, r)));
    of_hooks.chain(of_chains)
}

/// Every chain and set that a rule names must be there.
fn check_whole(state: &State) -> Result<(), String> {
    for (table, rule) in all_rules(state) {
        if let Some(chain) = rule.leads_to()
            && !state.chains.contains_key(&(table, chain.clone()))
        {
            return Err(format!("{rule}: no such chain in {}", table.name()));
        }
        if let Some(set) = rule.sets().find(|set| !state.sets.contains_key(*set)) {
            return Err(format!("{rule}: set {set} does not exist"));
        }
    }
    Ok(())
}

impl Kernel for FakeKernel {
    fn probe(&mut self) -> Result<(), Unsupported> {
        Ok(())
    }

    fn route_loopback(&mut self) -> Result<(), KernelError> {
        self.state.loopback.routed = true;
        Ok(())
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.reads += 1;
        Ok(self.state.clone())
    }

    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        let refuse = |why: String| KernelError {
            context: "commit".to_owned(),
            source: why.into(),
            remedy: Remedy::Resync,
        };
        match &mut self.fail_after {
            Some(0) => return Err(refuse("broken on purpose".to_owned())),
            Some(left) => *left -= 1,
            None => {}
        }
        let mut next = self.state.clone();
        op::advance(&mut next, transaction);
        if let Some((_, other)) = next.chains.keys().find(|(table, name)| !names::is_ours(*table, name)) {
            return Err(refuse(format!("{other} is somebody else's")));
        }
        for op in &transaction.ops {
            self.check(op, &next).map_err(refuse)?;
        }
        check_whole(&next).map_err(refuse)?;
        self.state = next;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), KernelError> {
        let ops = plan::removal(&self.state);
        op::advance(&mut self.state, &Transaction { ops });
        Ok(())
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        Ok(true)
    }

    fn waited(&mut self) -> Duration {
        Duration::ZERO
    }
}
