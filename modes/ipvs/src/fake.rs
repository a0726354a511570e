//! A kernel in memory that refuses what the real one refuses.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ipvs_netlink::ServiceKey;
use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Remedy, Transaction, Unsupported};
use xtables_tools::Table;

use crate::kernel::{Carried, Connections, Kernel};
use crate::layout::SetName;
use crate::op::{self, Op};
use crate::rules::{Match, Rules, Target};
use crate::state::State;

/// The kernel in memory.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    state: State,
    /// Transactions until one fails with `EIO`; `None` for never.
    pub fail_after: Option<usize>,
    /// Times that everything was read.
    pub reads: usize,
    /// Connections of destinations; those that are not listed have none.
    pub connections: BTreeMap<(ServiceKey, SocketAddr), u32>,
}

impl FakeKernel {
    /// A kernel in which the mode has never run.
    pub const fn new(family: IpFamily) -> Self {
        Self { state: State::empty(family), fail_after: None, reads: 0, connections: BTreeMap::new() }
    }

    /// What it holds.
    pub const fn state(&self) -> &State {
        &self.state
    }
}

fn refused(why: String, remedy: Remedy) -> KernelError {
    KernelError { context: "carry out".to_owned(), source: why.into(), remedy }
}

impl Kernel for FakeKernel {
    fn probe(&mut self) -> Result<(), Unsupported> {
        Ok(())
    }

    fn load_tables(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn tune(&mut self) -> Result<(), KernelError> {
        self.state.tuned = true;
        Ok(())
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.reads += 1;
        Ok(self.state.clone())
    }

    fn carry_out(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        if let Some(left) = &mut self.fail_after {
            if *left == 0 {
                return Err(refused("I/O error".to_owned(), Remedy::Retry));
            }
            *left -= 1;
        }
        // What comes after a refused operation is carried out all the same.
        let mut failed = None;
        for op in &transaction.ops {
            match check(&self.state, op) {
                Ok(()) => op::step(&mut self.state, op),
                Err(why) => {
                    failed.get_or_insert(refused(format!("{op}: {why}"), Remedy::Resync));
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn connections(&mut self, keys: &[ServiceKey]) -> Result<Connections, KernelError> {
        let of = self.connections.iter().filter(|((key, _), _)| keys.contains(key));
        Ok(of.map(|(at, count)| (*at, *count)).collect())
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        Ok(true)
    }

    fn carried(&mut self) -> Result<Option<Carried>, KernelError> {
        Ok(None)
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn remove_everything(&mut self) -> Result<(), KernelError> {
        self.state = State::empty(self.state.family);
        Ok(())
    }
}

/// The sets that rules refer to.
fn referred(rules: &Rules) -> impl Iterator<Item = SetName> {
    rules.chains.iter().chain(&rules.hooks).flat_map(|chain| &chain.rules).flat_map(|rule| {
        let target = match &rule.target {
            Target::MapMark(set, _) => Some(*set),
            _ => None,
        };
        let matches = rule.matches.iter().filter_map(|m| match m {
            Match::Set(set, ..) => Some(*set),
            _ => None,
        });
        matches.chain(target)
    })
}

/// What the kernel checks at each operation.
fn check(state: &State, op: &Op) -> Result<(), String> {
    let must = |ok: bool, why: &str| if ok { Ok(()) } else { Err(why.to_owned()) };
    let (exists, missing) = ("File exists", "No such file or directory");
    match op {
        Op::Tune => Ok(()),
        Op::AddLink => must(!state.link, exists),
        Op::CreateSet(_, set) => must(!state.sets.contains_key(set), exists),
        Op::ReplaceSet(_, set, _) => must(state.sets.contains_key(set), missing),
        Op::DestroySet(_, set) => {
            must(state.sets.contains_key(set), missing)?;
            must(!referred(&state.rules).any(|s| s == *set), "the set is referenced")
        }
        Op::SetRules(_, was, rules) => {
            must(*was == state.rules, "not the rules that are there")?;
            must(referred(rules).all(|set| state.sets.contains_key(&set)), "no such set")?;
            let all = rules.chains.iter().chain(&rules.hooks);
            let leads = |table: Table, target: &Target| match target {
                Target::Jump(chain) | Target::Goto(chain) => rules.chain(table, chain).is_some(),
                _ => true,
            };
            let sound = all.into_iter().all(|c| c.rules.iter().all(|r| leads(c.table, &r.target)));
            must(sound, "no such chain")
        }
        Op::AddServer(service) => must(!state.servers.contains_key(&service.key), exists),
        Op::SetServer(service) => must(state.servers.contains_key(&service.key), "No such process"),
        Op::DeleteServer(key) => must(state.servers.contains_key(key), "No such process"),
        Op::AddDestination(key, destination) => {
            let server = state.servers.get(key).ok_or("No such process")?;
            must(!server.destinations.contains_key(&destination.address), exists)
        }
        Op::SetDestination(key, destination) => {
            let server = state.servers.get(key).ok_or("No such process")?;
            must(server.destinations.contains_key(&destination.address), missing)
        }
        Op::DeleteDestination(key, address) => {
            let server = state.servers.get(key).ok_or("No such process")?;
            must(server.destinations.contains_key(address), missing)
        }
        // The kernel itself takes the same element twice; here it would be a mirror that is wrong.
        Op::AddElement(_, set, element) => {
            let elements = state.sets.get(set).ok_or(missing)?;
            must(element.entry.kind() == set.kind(), "an element of another type")?;
            must(elements.get(&element.entry) != Some(&element.mark), exists)
        }
        Op::DeleteElement(_, set, entry) => must(state.holds(*set, entry), missing),
        Op::AddAddress(address) => {
            must(state.link, "No such device")?;
            must(!state.addresses.contains(address), exists)
        }
        Op::DeleteAddress(address) => {
            must(state.addresses.contains(address), "Cannot assign requested address")
        }
    }
}
