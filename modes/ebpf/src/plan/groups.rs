//! Where the endpoints of a port lie among the slots.

use std::collections::BTreeSet;
use std::sync::Arc;

use shunt_ebpf_abi::Group;

use super::Planner;
use crate::op::Op;
use crate::slots::{Room, extent};

impl Planner<'_> {
    /// Groups that frontends of a service id have.
    pub(super) fn groups_of(&self, id: u32) -> BTreeSet<Group> {
        let keys = self.observed.users(id).into_iter().flat_map(|u| &u.frontends);
        let frontends = keys.filter_map(|key| self.observed.frontends().get(key));
        frontends.flat_map(|f| [f.cluster, f.local]).filter(|group| group.count > 0).collect()
    }

    /// Whether frontends go on as they are, but for where their endpoints lie: what one of them leads to may
    /// then change by itself. Otherwise the new endpoints would for a moment be met with the old verdicts, or the
    /// old ones with the new, and they have to lie elsewhere until the frontend turns.
    pub(super) fn is_steady(&self, name: &Arc<str>, service: u32) -> bool {
        let mut keys = self.observed.users(service).into_iter().flat_map(|u| &u.frontends);
        keys.all(|key| {
            let stays = match self.desired.frontends.get(key) {
                None => !self.desired.everything,
                Some(None) => false,
                Some(Some(dispatch)) => {
                    let held = self.observed.frontends().get(key);
                    dispatch.port == *name && held.is_some_and(|held| held.verdicts == dispatch.verdicts)
                }
            };
            stays && !self.overtaken.contains(key)
        })
    }

    /// Where a port's endpoints of a policy lie and will lie.
    pub(super) fn group(
        &mut self,
        name: &str,
        service: u32,
        local: bool,
        steady: bool,
        wanted: &[u32],
    ) -> Group {
        let Ok(count) = u32::try_from(wanted.len()) else { return Group::default() };
        if count == 0 {
            return Group::default();
        }
        let held = self.group_in_place(service, local).map(|held| (held, self.edits(held, wanted)));
        let unseen = |(held, edits): &(Group, Vec<(u32, Vec<u32>)>)| {
            edits.iter().all(|(first, _)| first - held.base >= held.count)
        };
        // Room goes before order.
        let stays = held.as_ref().is_some_and(|held| steady || unseen(held));
        for in_place in [stays, !stays] {
            if in_place {
                if let Some((held, edits)) = &held
                    && self.grow_in_place(*held, count)
                {
                    let edits = edits.iter().cloned().map(|(first, ids)| Op::SetSlots(first, ids));
                    self.before.extend(edits);
                    return self.keep(Group { base: held.base, count });
                }
            } else if let Some(base) = self.room().allocate(count) {
                self.before.push(Op::SetSlots(base, wanted.to_vec()));
                return self.keep(Group { base, count });
            }
        }
        let mut fits = count / 2;
        while fits > 0 {
            if let Some(base) = self.room().allocate(fits) {
                let left_out = count - fits;
                self.problems.push(format!("{name}: {left_out} endpoints left out: no room for slots"));
                self.before.push(Op::SetSlots(base, wanted.iter().copied().take(fits as usize).collect()));
                return self.keep(Group { base, count: fits });
            }
            fits /= 2;
        }
        self.problems.push(format!("{name}: no endpoint is served: no room for slots"));
        Group::default()
    }

    fn keep(&mut self, group: Group) -> Group {
        if self.desired.everything {
            self.kept.take(extent(group));
        }
        group
    }

    /// The group of a policy as it is now, if it may stay where it is.
    fn group_in_place(&self, service: u32, local: bool) -> Option<Group> {
        let frontends = self.observed.users(service)?.frontends.iter();
        let mut groups = frontends.filter_map(|key| Some(self.observed.frontends().get(key)?.group(local)));
        let group = groups.find(|group| group.count > 0)?;
        let range = self.observed.sizes.slots_of(self.observed.family);
        let slots = extent(group);
        let inside = range.start <= slots.start && slots.end <= range.end;
        let alone = !self.desired.everything || self.kept.is_free(&slots);
        (inside && alone).then_some(group)
    }

    /// Whether a group can have so many slots where it is. Takes the room.
    fn grow_in_place(&mut self, held: Group, count: u32) -> bool {
        let (now, then) = (extent(held), extent(Group { count, ..held }));
        if then.end <= now.end {
            return true;
        }
        let size = then.end - then.start;
        let more = now.end..then.end;
        if !held.base.is_multiple_of(size)
            || !self.room().is_free(&more)
            || self.desired.everything && !self.kept.is_free(&more)
        {
            return false;
        }
        self.room().take(more);
        true
    }

    fn room(&mut self) -> &mut Room {
        let observed = self.observed;
        self.room.get_or_insert_with(|| {
            // What slots hold that belong to no group was written by a plan that broke off.
            let used = observed.used_slots().map(|(number, _)| number..number + 1);
            let range = observed.sizes.slots_of(observed.family);
            Room::new(range, observed.groups().map(extent).chain(used))
        })
    }

    /// What to write to the slots of a group so that they hold these ids: those that stay keep their slots, others
    /// fill the gaps.
    fn edits(&self, held: Group, wanted: &[u32]) -> Vec<(u32, Vec<u32>)> {
        let mut missing: BTreeSet<u32> = wanted.iter().copied().collect();
        let slots: Vec<(u32, Option<u32>)> = (held.base..)
            .take(wanted.len())
            .map(|number| {
                let id = (number - held.base < held.count).then(|| self.observed.slot(number));
                (number, id.filter(|id| missing.remove(id)))
            })
            .collect();
        let mut missing = missing.into_iter();
        let mut edits: Vec<(u32, Vec<u32>)> = Vec::new();
        for (number, slot) in slots {
            let id = slot.or_else(|| missing.next()).unwrap_or(0);
            if id == self.observed.slot(number) {
                continue;
            }
            match edits.last_mut() {
                Some((first, ids)) if *first + ids.len() as u32 == number => ids.push(id),
                _ => edits.push((number, vec![id])),
            }
        }
        edits
    }

    /// Empties the slots of groups that are not those of others.
    pub(super) fn empty_slots(&mut self, groups: &BTreeSet<Group>, but: &[Group]) {
        let kept = |number: u32| but.iter().any(|g| number.wrapping_sub(g.base) < g.count);
        let range = self.observed.sizes.slots_of(self.observed.family);
        let slots: BTreeSet<u32> = groups
            .iter()
            .flat_map(|g| (g.base..).take(g.count as usize).take_while(|number| range.contains(number)))
            .filter(|number| !kept(*number) && self.observed.slot(*number) != 0)
            .collect();
        self.empty(slots.into_iter());
    }

    pub(super) fn empty(&mut self, slots: impl Iterator<Item = u32>) {
        let mut run: Option<(u32, usize)> = None;
        for number in slots {
            run = match run {
                Some((first, len)) if first + len as u32 == number => Some((first, len + 1)),
                Some((first, len)) => {
                    self.after.push(Op::SetSlots(first, vec![0; len]));
                    Some((number, 1))
                }
                None => Some((number, 1)),
            };
        }
        if let Some((first, len)) = run {
            self.after.push(Op::SetSlots(first, vec![0; len]));
        }
    }
}
