//! Which groups get which Maglev tables.

use shunt_ebpf_abi::{Config, Group, endpoint_flags, maglev};

use super::Planner;
use crate::op::Op;
use crate::render::{Member, Port};

impl Planner<'_> {
    /// Tables of a port with these endpoints. They stand in the order of address and port, which is the
    /// same on every node.
    ///
    /// Where frontends turn to other verdicts (not `steady`), a table that changes is away meanwhile, and chance
    /// chooses: one table cannot be right for both.
    pub(super) fn tables(
        &mut self,
        name: &str,
        service: u32,
        port: &Port,
        steady: bool,
        members: &[(u32, Member)],
    ) {
        for (local, flag) in [(false, endpoint_flags::CLUSTER), (true, endpoint_flags::LOCAL)] {
            let group = Group::id(service, local);
            let held = self.observed.maglev().get(&group);
            let of_group = || members.iter().filter(|(_, member)| member.flags & flag != 0);
            let mut ids: Vec<u32> = of_group().map(|(id, _)| *id).collect();
            // Among one there is nothing to choose.
            if !port.maglev[usize::from(local)] || ids.len() < 2 {
                // Early: a frontend that comes from another port must not meet it. Slots say where to go.
                self.before.extend(held.map(|_| Op::SetMaglev(group, None)));
                continue;
            }
            ids.sort_unstable();
            match held {
                // An id keeps its address as long as it is in a table.
                Some(held) if **held == *ids => continue,
                Some(_) => {}
                None if self.tables >= self.observed.sizes.maglev as usize => {
                    self.problems
                        .push(format!("{name}: endpoints are chosen by chance: no room for a Maglev table"));
                    continue;
                }
                None => self.tables += 1,
            }
            let entries = of_group().map(|(id, member)| {
                maglev::Member::new(Config::DEFAULT.maglev_seed, *id, &member.address, member.port)
            });
            let set = Op::SetMaglev(group, Some(entries.collect()));
            if steady {
                self.before.push(set);
            } else {
                self.before.extend(held.map(|_| Op::SetMaglev(group, None)));
                self.after.push(set);
            }
        }
    }

    /// A service id goes, and its tables with it.
    pub(super) fn no_tables(&mut self, service: u32) {
        let groups = [false, true].map(|local| Group::id(service, local));
        let held = groups.into_iter().filter(|group| self.observed.maglev().contains_key(group));
        self.after.extend(held.map(|group| Op::SetMaglev(group, None)));
    }
}
