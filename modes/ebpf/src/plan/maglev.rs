//! Which groups get which Maglev tables.

use shunt_ebpf_abi::{Config, Group, endpoint_flags, maglev};

use super::Planner;
use crate::op::Op;
use crate::render::{Member, Port};

impl Planner<'_> {
    /// Tables of a port with these endpoints. They stand in the order of address and port, which is the
    /// same on every node.
    pub(super) fn tables(&mut self, name: &str, service: u32, port: &Port, members: &[(u32, Member)]) {
        for (local, flag) in [(false, endpoint_flags::CLUSTER), (true, endpoint_flags::LOCAL)] {
            let group = Group::id(service, local);
            let held = self.observed.maglev().get(&group);
            let of_group = || members.iter().filter(|(_, member)| member.flags & flag != 0);
            let mut ids: Vec<u32> = of_group().map(|(id, _)| *id).collect();
            // Among one there is nothing to choose.
            if !port.maglev[usize::from(local)] || ids.len() < 2 {
                self.after.extend(held.map(|_| Op::SetMaglev(group, None)));
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
            self.before.push(Op::SetMaglev(group, Some(entries.collect())));
        }
    }

    /// A service id goes, and its tables with it.
    pub(super) fn no_tables(&mut self, service: u32) {
        let groups = [false, true].map(|local| Group::id(service, local));
        let held = groups.into_iter().filter(|group| self.observed.maglev().contains_key(group));
        self.after.extend(held.map(|group| Op::SetMaglev(group, None)));
    }
}
