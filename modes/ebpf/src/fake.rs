//! A kernel in memory that refuses what the real one refuses, and what the rules of writing forbid
//! (`shunt_ebpf_abi`). Like the real one it carries out operations one by one.

use std::collections::BTreeSet;
use std::time::Instant;

use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_ebpf_abi::{Endpoint, FIRST_SERVICE_ID, Frontend, lookup};
use shunt_mode::{Counted, KernelError, Remains, Remedy, Unsupported};

use crate::kernel::Kernel;
use crate::op::Op;
use crate::state::State;

/// The kernel in memory.
#[derive(Clone, Debug)]
pub struct FakeKernel {
    state: State,
    /// Whether there are maps.
    installed: bool,
    /// Commits until one fails half-way with `EIO`; `None` for never.
    pub fail_after: Option<usize>,
    /// Times that all maps were read.
    pub reads: usize,
}

impl FakeKernel {
    /// A kernel without our maps.
    pub fn new(family: IpFamily) -> Self {
        Self { state: State::empty(family), installed: false, fail_after: None, reads: 0 }
    }

    /// What it holds.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// The same with other sizes.
    #[must_use]
    pub fn with_sizes(mut self, sizes: crate::state::Sizes) -> Self {
        self.state.sizes = sizes;
        self
    }

    fn step(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::Install => self.installed = true,
            _ if !self.installed => return Err(refused(op, "no such map")),
            _ => check(&self.state, op).map_err(|why| refused(op, &why))?,
        }
        op.carry_out(&mut self.state);
        Ok(())
    }
}

impl Kernel for FakeKernel {
    fn probe(&mut self) -> Result<(), Unsupported> {
        Ok(())
    }

    fn make_ready(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        self.reads += 1;
        Ok(self.state.clone())
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        if let Some(left) = &mut self.fail_after {
            if *left == 0 {
                let half = &ops[..ops.len() / 2];
                half.iter().try_for_each(|op| self.step(op))?;
                let (context, source) = ("write maps".to_owned(), "I/O error".into());
                return Err(KernelError { context, source, remedy: Remedy::Retry });
            }
            *left -= 1;
        }
        ops.iter().try_for_each(|op| self.step(op))
    }

    fn refresh(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn sweep(&mut self, _now: Instant) -> Result<Option<Instant>, KernelError> {
        Ok(None)
    }

    fn counted(&mut self) -> Result<Vec<Counted>, KernelError> {
        Ok(Vec::new())
    }

    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        Ok(None)
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn keep_off(&mut self, _: &[Tuple]) -> Result<(), KernelError> {
        Ok(())
    }

    fn remove(&mut self) -> Result<(), KernelError> {
        let sizes = self.state.sizes;
        self.state = State::empty(self.state.family);
        self.state.sizes = sizes;
        self.installed = false;
        Ok(())
    }
}

fn refused(op: &Op, why: &str) -> KernelError {
    KernelError { context: op.to_string(), source: why.to_owned().into(), remedy: Remedy::Resync }
}

fn must(ok: bool, why: &str) -> Result<(), String> {
    if ok { Ok(()) } else { Err(why.to_owned()) }
}

fn check(state: &State, op: &Op) -> Result<(), String> {
    match op {
        Op::Install | Op::Attach | Op::Detach | Op::SetPods(_) => Ok(()),
        Op::SetFlags { mask, to } => must(to & !mask == 0, "bits that are another's"),
        Op::SetName(id, Some(_)) => must(is_service_id(state, *id), "no service id of this family"),
        Op::SetName(id, None) => must(state.names().contains_key(id), "no such entry"),
        Op::SetFrontend(key, Some(to)) => {
            let full = state.frontends().len() >= state.sizes.frontends as usize;
            must(!full || state.frontends().contains_key(key), "the map is full")?;
            must(state.owns_address(&key.address), "another family's")?;
            must(to.tag == key.tag(), "another's tag")?;
            must(state.names().contains_key(&to.service), "a service id without a name")?;
            check_groups(state, to)
        }
        Op::SetFrontend(key, None) => must(state.frontends().contains_key(key), "no such entry"),
        Op::SetSlots(first, ids) => {
            let range = state.sizes.slots_of(state.family);
            let last = first + ids.len() as u32;
            must(range.start <= *first && last <= range.end, "slots of another family, or of none")?;
            let used = |id: &u32| state.endpoint(*id).service != 0;
            must(ids.iter().all(|id| *id == 0 || used(id)), "an id without an endpoint")?;
            // A slot that a frontend leads to may change, but not become empty.
            for (number, _) in (*first..).zip(ids).filter(|(_, id)| **id == 0) {
                must(!state.groups().any(|g| number.wrapping_sub(g.base) < g.count), "emptied while in use")?;
            }
            Ok(())
        }
        Op::SetEndpoints(..) => op.endpoints().try_for_each(|(id, to)| check_endpoint(state, id, &to)),
        Op::SetMaglev(group, None) => must(state.maglev().contains_key(group), "no such entry"),
        Op::SetMaglev(group, Some(members)) => {
            let (service, local) = (group >> 1, group & 1 != 0);
            let full = state.maglev().len() >= state.sizes.maglev as usize;
            must(!full || state.maglev().contains_key(group), "the map is full")?;
            must(is_service_id(state, service), "no service id of this family")?;
            let is_member = |id| lookup::is_member(&state.endpoint(id), service, local);
            must(members.iter().all(|m| is_member(m.id())), "an endpoint that is not of the group")
        }
        Op::SetAddress(address, to) => {
            let full = state.addresses.len() >= state.sizes.addresses as usize;
            must(!full || *to == 0 || state.addresses.contains_key(address), "the map is full")?;
            must(state.owns_address(address), "another family's")
        }
        Op::AddRange(owner, range) => {
            let count: usize = state.ranges().values().map(BTreeSet::len).sum();
            must(count < state.sizes.ranges as usize, "the map is full")?;
            must(state.owns_range(*owner), "another family's")?;
            must(range.trunc() == *range, "host bits are set")
        }
        Op::DeleteRange(owner, range) => must(state.ranges_of(*owner).any(|r| r == range), "no such entry"),
    }
}

/// An entry of the endpoints changes so that who reads it meanwhile finds what was right before or is after.
fn check_endpoint(state: &State, id: u32, to: &Endpoint) -> Result<(), String> {
    must(id >= 2 && state.owns_id(id) && id < state.sizes.endpoints, "no id of this family")?;
    let held = state.endpoint(id);
    match (held.service, to.service) {
        (0, 0) => must(to.generation == held.generation.wrapping_add(1), "not the next generation"),
        (0, service) => {
            must(is_service_id(state, service), "owner is no service id")?;
            let is_new = held == Endpoint::default() && to.generation == 1;
            must(is_new || Endpoint { service: 0, ..*to } == held, "filled together with its owner")
        }
        (_, 0) => {
            let before = Endpoint { service: held.service, flags: held.flags, ..*to };
            must(before == held, "changed when it loses its owner")?;
            let in_use: BTreeSet<u32> =
                state.used_slots().filter(|(_, held)| *held == id).map(|(number, _)| number).collect();
            let leads = |g: shunt_ebpf_abi::Group| in_use.range(g.base..g.base + g.count).next().is_some();
            must(!state.groups().any(leads), "freed while in use")
        }
        _ => must(Endpoint { flags: to.flags, ..held } == *to, "changed while in use"),
    }
}

const fn is_service_id(state: &State, id: u32) -> bool {
    id >= FIRST_SERVICE_ID && id < state.sizes.services && state.owns_id(id)
}

/// A frontend must lead to members of its groups only.
fn check_groups(state: &State, frontend: &Frontend) -> Result<(), String> {
    let range = state.sizes.slots_of(state.family);
    for (local, group) in [(false, frontend.cluster), (true, frontend.local)] {
        if group.count > 0 && !(range.start <= group.base && group.base + group.count <= range.end) {
            return Err("a group outside the slots".to_owned());
        }
        for number in group.base..group.base + group.count {
            let endpoint = state.endpoint(state.slot(number));
            if !lookup::is_member(&endpoint, frontend.service, local) {
                return Err(format!("slot {number} holds no endpoint of the group"));
            }
        }
    }
    Ok(())
}
