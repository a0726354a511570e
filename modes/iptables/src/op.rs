//! Operations, as values: what each says in the words of the tools, and what it does to a state.

use std::collections::BTreeSet;
use std::fmt;

use shunt_core::id::IpFamily;
use shunt_mode::{RuleCount, Transaction};
use xtables_tools::{Builtin, Held, Stays, Table};

use crate::fixed::anti_martian;
use crate::names::{self, Name};
use crate::rule::{Match, Rule, Rules, Uncounted};
use crate::sets::{Element, Kind};
use crate::state::{Loopback, Set, State};

/// One operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Make a set.
    CreateSet(IpFamily, Name, Kind),
    /// Remove a set.
    DestroySet(Name),
    /// Add an element to a set.
    AddElement(Name, Element),
    /// Remove an element from a set.
    DeleteElement(Name, Element),
    /// Make a chain with these rules, or give them to a chain that there is.
    SetChain(Table, Name, Rules),
    /// Remove a chain; one that rules of others lead to stays, without rules of ours.
    DeleteChain(Table, Name),
    /// Lead packets to our chains: before all other rules of a chain of the kernel's.
    SetHooks {
        /// The table.
        table: Table,
        /// The chain of the kernel's.
        builtin: Builtin,
        /// What leads to our chains until now.
        from: Vec<Rule>,
        /// What leads to them from now on.
        to: Vec<Rule>,
    },
    /// Keep others from talking to loopback; what of it there is.
    GuardLoopback(Loopback),
    /// Let the kernel route packets to loopback.
    RouteLoopback,
}

/// What an operation is about. Those of one kind are carried out together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum About {
    /// Sets, by netlink.
    Sets,
    /// Rules, by `iptables-restore`.
    Rules,
    /// A setting of the kernel.
    Setting,
}

impl Op {
    /// What it is about.
    pub const fn about(&self) -> About {
        match self {
            Self::CreateSet(..) | Self::DestroySet(_) | Self::AddElement(..) | Self::DeleteElement(..) => {
                About::Sets
            }
            Self::SetChain(..) | Self::DeleteChain(..) | Self::SetHooks { .. } | Self::GuardLoopback(_) => {
                About::Rules
            }
            Self::RouteLoopback => About::Setting,
        }
    }

    const fn table(&self) -> Option<Table> {
        match self {
            Self::SetChain(table, ..) | Self::DeleteChain(table, _) | Self::SetHooks { table, .. } => {
                Some(*table)
            }
            Self::GuardLoopback(_) => Some(Table::Filter),
            _ => None,
        }
    }
}

impl fmt::Display for Op {
    /// What it does, in the words of `ipset` and `iptables`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateSet(family, name, kind) => kind.declaration(*family, name).fmt(f),
            Self::DestroySet(name) => write!(f, "destroy {name}"),
            Self::AddElement(set, element) => write!(f, "add {set} {element}"),
            Self::DeleteElement(set, element) => write!(f, "del {set} {element}"),
            Self::SetChain(table, name, rules) => {
                write!(f, "-t {} -F {name}", table.name())?;
                rules.iter().try_for_each(|rule| write!(f, "\n-t {} -A {name} {rule}", table.name()))
            }
            Self::DeleteChain(table, name) => write!(f, "-t {} -X {name}", table.name()),
            Self::SetHooks { table, builtin, from, to } => {
                let (table, builtin) = (table.name(), builtin.name());
                let gone = from.iter().map(|rule| format!("-t {table} -D {builtin} {rule}"));
                let come = to
                    .iter()
                    .enumerate()
                    .map(|(i, rule)| format!("-t {table} -I {builtin} {} {rule}", i + 1));
                f.write_str(&gone.chain(come).collect::<Vec<_>>().join("\n"))
            }
            Self::GuardLoopback(_) => write!(f, "-t filter -A {} {}", names::FIREWALL, anti_martian()),
            Self::RouteLoopback => f.write_str("sysctl net.ipv4.conf.all.route_localnet=1"),
        }
    }
}

/// Whether rules of an operation count.
pub fn counts(op: &Op) -> bool {
    let counted = |rule: &Rule| rule.matches.iter().any(|m| matches!(m, Match::Counted(_)));
    matches!(op, Op::SetChain(_, _, rules) if rules.iter().any(counted))
}

/// What `iptables-restore --noflush` is given for operations on tables, in order of the tables; those that need
/// nothing are left out. Each table changes at once. It is written while the tool reads it: all rules of a large
/// cluster are many megabytes.
#[derive(Clone, Copy, Debug)]
pub struct Script<'a> {
    /// The operations.
    pub ops: &'a [Op],
    /// The tables; operations on others are left out.
    pub tables: &'a [Table],
    /// Whether rules count; otherwise they do the same and count nothing.
    pub counting: bool,
    /// Chains that rules of others lead to.
    pub held: &'a Held,
}

impl<'a> Script<'a> {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        !self.tables.iter().any(|table| self.of(*table).next().is_some())
    }

    /// Whether anything counts.
    pub fn counts(&self) -> bool {
        self.counting && self.tables.iter().any(|table| self.of(*table).any(counts))
    }

    fn of(self, table: Table) -> impl Iterator<Item = &'a Op> {
        self.ops.iter().filter(move |op| op.table() == Some(table))
    }

    fn stays(&self, table: Table, chain: &str) -> Option<Stays> {
        self.held.stays(table, chain)
    }

    /// Makes chains; this empties those that there are.
    fn declare(&self, f: &mut fmt::Formatter<'_>, table: Table) -> fmt::Result {
        let mut declared = BTreeSet::new();
        for op in self.of(table) {
            let name = match op {
                Op::DeleteChain(_, name) if self.stays(table, name) == Some(Stays::AsItIs) => continue,
                Op::SetChain(_, name, _) | Op::DeleteChain(_, name) => name,
                Op::GuardLoopback(held) if !held.chain => names::FIREWALL,
                _ => continue,
            };
            if declared.insert(name) {
                writeln!(f, ":{name} - [0:0]")?;
            }
        }
        Ok(())
    }

    fn fill(&self, f: &mut fmt::Formatter<'_>, op: &Op) -> fmt::Result {
        match op {
            Op::SetHooks { builtin, from, to, .. } => {
                let builtin = builtin.name();
                from.iter().try_for_each(|rule| writeln!(f, "-D {builtin} {rule}"))?;
                let mut to = to.iter().enumerate();
                to.try_for_each(|(i, rule)| writeln!(f, "-I {builtin} {} {rule}", i + 1))
            }
            Op::SetChain(_, name, rules) if self.counting => {
                rules.iter().try_for_each(|rule| writeln!(f, "-A {name} {rule}"))
            }
            Op::SetChain(_, name, rules) => {
                rules.iter().try_for_each(|rule| writeln!(f, "-A {name} {}", Uncounted(rule)))
            }
            Op::GuardLoopback(held) => {
                if !held.rule {
                    writeln!(f, "-A {} {}", names::FIREWALL, anti_martian())?;
                }
                let hooks = held.hooked.into_iter().zip([Builtin::Input, Builtin::Output]);
                for (_, builtin) in hooks.filter(|(hooked, _)| !hooked) {
                    writeln!(f, "-I {} -j {}", builtin.name(), names::FIREWALL)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Script<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for table in self.tables.iter().copied().filter(|table| self.of(*table).next().is_some()) {
            writeln!(f, "*{}", table.name())?;
            self.declare(f, table)?;
            self.of(table).try_for_each(|op| self.fill(f, op))?;
            for op in self.of(table) {
                if let Op::DeleteChain(_, name) = op
                    && self.stays(table, name).is_none()
                {
                    writeln!(f, "-X {name}")?;
                }
            }
            f.write_str("COMMIT\n")?;
        }
        Ok(())
    }
}

/// Counts the rules of ours in each table, and those that transactions wrote. Hooks are no rules of ours.
pub fn count(state: &State, written: &[Transaction<Op>]) -> Vec<RuleCount> {
    let of = |table: Table| {
        let total =
            state.chains.iter().filter(|((of, _), _)| *of == table).map(|(_, rules)| rules.len()).sum();
        let written = written.iter().flat_map(|transaction| &transaction.ops);
        let written = written.filter_map(|op| match op {
            Op::SetChain(of, _, rules) if *of == table => Some(rules.len()),
            _ => None,
        });
        RuleCount { table: table.name(), total, written: written.sum() }
    };
    vec![of(Table::Filter), of(Table::Nat)]
}

/// Carries out a transaction on a state. Pure.
pub fn advance(state: &mut State, transaction: &Transaction<Op>) {
    for op in &transaction.ops {
        advance_one(state, op);
    }
}

fn advance_one(state: &mut State, op: &Op) {
    match op {
        Op::CreateSet(_, name, kind) => {
            state.sets.insert(name.clone(), Set { kind: Some(*kind), elements: BTreeSet::new() });
        }
        Op::DestroySet(name) => {
            state.sets.remove(name);
        }
        Op::AddElement(set, element) => {
            if let Some(set) = state.sets.get_mut(set) {
                set.elements.insert(*element);
            }
        }
        Op::DeleteElement(set, element) => {
            if let Some(set) = state.sets.get_mut(set) {
                set.elements.remove(element);
            }
        }
        Op::SetChain(table, name, rules) => {
            state.chains.insert((*table, name.clone()), rules.clone());
        }
        Op::DeleteChain(table, name) => {
            state.chains.remove(&(*table, name.clone()));
        }
        Op::SetHooks { table, builtin, to, .. } => {
            if to.is_empty() {
                state.hooks.remove(&(*table, *builtin));
            } else {
                state.hooks.insert((*table, *builtin), to.clone());
            }
        }
        Op::GuardLoopback(_) => {
            state.loopback =
                Loopback { chain: true, rule: true, hooked: [true; 2], routed: state.loopback.routed };
        }
        Op::RouteLoopback => state.loopback.routed = true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::removal;

    fn script(ops: &[Op], held: &Held) -> String {
        Script { ops, tables: &Table::ALL, counting: true, held }.to_string()
    }

    /// CRI-O and the CNI plug-in for host ports lead to `KUBE-MARK-MASQ`.
    #[test]
    fn what_rules_of_others_lead_to_is_not_removed() {
        let text = "*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n-A KUBE-FORWARD -j ACCEPT\nCOMMIT\n\
            *nat\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
            -A PREROUTING -m limit --limit 1/min -j KUBE-SERVICES\n-A POSTROUTING -s 10.9.0.0/16 -j KUBE-MARK-MASQ\n\
            -A KUBE-SERVICES -j KUBE-SVC-X\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
            -A KUBE-SVC-X -j KUBE-MARK-MASQ\n-A KUBE-SVC-X -j DNAT --to-destination 10.0.0.1:80\n\
            -A KUBE-HP-X -s 10.244.0.7/32 -j KUBE-MARK-MASQ\n-A KUBE-HP-X -j KUBE-SVC-X\nCOMMIT\n";
        let mut state = State::empty(IpFamily::V4);
        let held = state.read_rules(text);
        assert_eq!(
            script(&removal(&state), &held),
            "*filter\n:KUBE-FORWARD - [0:0]\n-D FORWARD -j KUBE-FORWARD\n-X KUBE-FORWARD\nCOMMIT\n\
             *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
             -D PREROUTING -m limit --limit 1/min -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n"
        );
        let left = "*nat\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SVC-X - [0:0]\n\
            -A POSTROUTING -s 10.9.0.0/16 -j KUBE-MARK-MASQ\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
            -A KUBE-HP-X -s 10.244.0.7/32 -j KUBE-MARK-MASQ\n-A KUBE-HP-X -j KUBE-SVC-X\nCOMMIT\n";
        let mut state = State::empty(IpFamily::V4);
        state.read_rules(left);
        assert_eq!(state, State::empty(IpFamily::V4), "what is left is theirs");
        state.read_rules(
            "*nat\n:KUBE-SVC-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-HP-X -j KUBE-MARK-MASQ\nCOMMIT\n",
        );
        assert!(
            state.chains.keys().map(|(_, name)| &**name).eq(["KUBE-SVC-X"]),
            "nobody leads there any more"
        );
    }
}
