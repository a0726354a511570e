//! Chains that rules of others lead to. The kernel does not remove them, and a text for `iptables-restore` that
//! asks for it fails as a whole.

use std::collections::{BTreeMap, BTreeSet};

use crate::save::{Line, line, target, words};
use crate::tables::{Table, is_hook};

/// What becomes of such a chain when it is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stays {
    /// It stays as it is: there is nothing in it, or it only marks packets, as `KUBE-MARK-MASQ` does for CRI-O and the
    /// CNI plug-in for host ports. Other modes masquerade by that mark as well.
    AsItIs,
    /// It stays without its rules.
    Empty,
}

/// Chains that rules in chains of others lead to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Held(BTreeMap<Table, BTreeMap<String, Stays>>);

impl Held {
    /// Finds them in what `iptables-save` prints, by a test for chains that are ours.
    pub fn read(text: &str, is_ours: impl Fn(Table, &str) -> bool) -> Self {
        let mut reader = HeldReader::default();
        rules(text).for_each(|(table, chain, rule)| reader.rule(table, chain, rule, &is_ours));
        reader.finish()
    }

    /// What becomes of a chain when it is to go; `None` if nothing keeps it.
    pub fn stays(&self, table: Table, chain: &str) -> Option<Stays> {
        self.0.get(&table)?.get(chain).copied()
    }

    /// The chains that stay as they are. Unless rules of ours lead to them, they are not ours any more: nothing is
    /// left to take away.
    pub fn untouched(&self) -> BTreeSet<(Table, &str)> {
        let all = self
            .0
            .iter()
            .flat_map(|(table, chains)| chains.iter().map(|(name, stays)| (*table, name, *stays)));
        all.filter(|(.., stays)| *stays == Stays::AsItIs)
            .map(|(table, name, _)| (table, name.as_str()))
            .collect()
    }
}

/// Finds such chains rule by rule.
#[derive(Clone, Debug, Default)]
pub struct HeldReader {
    /// Chains of ours that rules of others lead to.
    held: BTreeSet<(Table, String)>,
    /// Chains of ours that do more than mark.
    full: BTreeSet<(Table, String)>,
    /// The last of those: its rules come one after the other.
    last: Option<(Table, String)>,
}

impl HeldReader {
    /// Takes in a rule of a chain, by a test for chains that are ours.
    pub fn rule(&mut self, table: Table, chain: &str, rule: &str, is_ours: &impl Fn(Table, &str) -> bool) {
        if !is_ours(table, chain) {
            let words = words(rule);
            let to = target(&words).filter(|to| is_ours(table, to) && !is_hook(chain, to));
            self.held.extend(to.map(|to| (table, to.to_owned())));
        } else if !rule.starts_with("-j MARK ")
            && self.last.as_ref().is_none_or(|(of, name)| *of != table || name != chain)
        {
            self.full.extend(self.last.replace((table, chain.to_owned())));
        }
    }

    /// The chains.
    pub fn finish(mut self) -> Held {
        self.full.extend(self.last);
        let mut held: BTreeMap<Table, BTreeMap<String, Stays>> = BTreeMap::new();
        for chain in self.held {
            let stays = if self.full.contains(&chain) { Stays::Empty } else { Stays::AsItIs };
            held.entry(chain.0).or_default().insert(chain.1, stays);
        }
        Held(held)
    }
}

/// The rules of all tables, with table and chain.
fn rules(text: &str) -> impl Iterator<Item = (Table, &str, &str)> {
    let mut table = None;
    text.lines().filter_map(line).filter_map(move |line| {
        match line {
            Line::Table(name) => table = Table::parse(name),
            Line::Rule(chain, rule) => return table.map(|table| (table, chain, rule)),
            Line::Chain(_) => {}
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_others_lead_to_stay_and_only_those_that_mark_keep_their_rules() {
        let text = "*filter\n:KUBE-FORWARD - [0:0]\n-A FORWARD -j KUBE-FORWARD\n-A KUBE-FORWARD -j ACCEPT\nCOMMIT\n\
            *nat\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-X - [0:0]\n\
            -A OUTPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-SVC-X\n\
            -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n-A KUBE-SVC-X -j KUBE-MARK-MASQ\n\
            -A KUBE-HP-X -s 10.244.0.7/32 -m comment --comment \"-j KUBE-SERVICES\" -j KUBE-MARK-MASQ\n\
            -A KUBE-HP-X -g KUBE-SVC-X\n-A KUBE-HP-X -j CNI-Y\n-A KUBE-HP-X\nCOMMIT\n*raw\n-A X -j KUBE-SERVICES\n";
        let ours = ["KUBE-FORWARD", "KUBE-MARK-MASQ", "KUBE-SERVICES", "KUBE-SVC-X"];
        let held = Held::read(text, |_, chain| ours.contains(&chain));
        let of = |chain| held.stays(Table::Nat, chain);
        assert_eq!(of("KUBE-MARK-MASQ"), Some(Stays::AsItIs));
        assert_eq!(of("KUBE-SVC-X"), Some(Stays::Empty));
        assert_eq!(of("KUBE-SERVICES"), None);
        assert_eq!(held.stays(Table::Filter, "KUBE-FORWARD"), None);
        assert_eq!(held.untouched(), [(Table::Nat, "KUBE-MARK-MASQ")].into());
        let text = "*nat\n-A POSTROUTING -s 10.9.0.0/16 -j KUBE-MARK-MASQ\nCOMMIT\n";
        let held = Held::read(text, |_, chain| ours.contains(&chain));
        assert_eq!(held.stays(Table::Nat, "KUBE-MARK-MASQ"), Some(Stays::AsItIs));
    }
}
