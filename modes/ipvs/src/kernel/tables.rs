//! What `iptables-restore` is told where the skeleton changes, never when a Service does.

use std::fmt::Write as _;

use shunt_core::id::IpFamily;
use xtables_tools::{Held, Stays, Table};

use crate::rules::{Chain, Rules};

/// What leads from one set of rules to another. Each table changes at once. Chains that rules of others lead to stay.
pub(super) fn restore_text(family: IpFamily, was: &Rules, rules: &Rules, held: &Held) -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let of = |list: &'static str, rules: &Rules| -> Vec<Chain> {
            let chains = if list == "chains" { &rules.chains } else { &rules.hooks };
            chains.iter().filter(|c| c.table == table).cloned().collect()
        };
        let (old, new) = (of("chains", was), of("chains", rules));
        let (old_hooks, new_hooks) = (of("hooks", was), of("hooks", rules));
        if old == new && old_hooks == new_hooks {
            continue;
        }
        // Writing to a String does not fail.
        let _ = writeln!(text, "*{}", table.name());
        let stays = |chain: &Chain| held.stays(table, &chain.name);
        let gone = old.iter().filter(|c| !new.iter().any(|n| n.name == c.name));
        let gone: Vec<&Chain> = gone.filter(|c| stays(c) != Some(Stays::AsItIs)).collect();
        // Naming a chain makes it, or empties it.
        for chain in new.iter().chain(gone.iter().copied()) {
            let _ = writeln!(text, ":{} - [0:0]", chain.name);
        }
        for hook in old_hooks.iter().filter(|hook| !new_hooks.contains(hook)) {
            for rule in &hook.rules {
                let _ = writeln!(text, "-D {} {}", hook.name, rule.text(family));
            }
        }
        for hook in new_hooks.iter().filter(|hook| !old_hooks.contains(hook)) {
            // Each comes before the one that was put there last.
            for rule in hook.rules.iter().rev() {
                let _ = writeln!(text, "-I {} {}", hook.name, rule.text(family));
            }
        }
        for chain in &new {
            for rule in &chain.rules {
                let _ = writeln!(text, "-A {} {}", chain.name, rule.text(family));
            }
        }
        for chain in gone.iter().filter(|chain| stays(chain).is_none()) {
            let _ = writeln!(text, "-X {}", chain.name);
        }
        text.push_str("COMMIT\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::{Rule, Target};

    #[test]
    fn only_tables_that_differ_are_written_and_only_what_is_ours() {
        let rules = |target| Rules {
            chains: vec![Chain {
                table: Table::Nat,
                name: "KUBE-SERVICES".to_owned(),
                rules: vec![Rule::new([], target)],
            }],
            hooks: vec![Chain {
                table: Table::Nat,
                name: "PREROUTING".to_owned(),
                rules: vec![Rule::new([], Target::Jump("KUBE-SERVICES".to_owned()))],
            }],
        };
        let none = Rules::default();
        let (one, other) = (rules(Target::Return), rules(Target::Accept));
        let text = |was: &Rules, rules: &Rules| restore_text(IpFamily::V4, was, rules, &Held::default());
        assert_eq!(text(&one, &one), "");
        assert_eq!(
            text(&none, &one),
            "*nat\n:KUBE-SERVICES - [0:0]\n-I PREROUTING -j KUBE-SERVICES\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n"
        );
        assert_eq!(text(&one, &other), "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j ACCEPT\nCOMMIT\n");
        assert_eq!(
            text(&other, &none),
            "*nat\n:KUBE-SERVICES - [0:0]\n-D PREROUTING -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n"
        );
    }
    #[test]
    fn chains_that_others_lead_to_stay() {
        let text = "*nat\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-NODE-PORT - [0:0]\n:KUBE-SERVICES - [0:0]\n\
            -A OUTPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-NODE-PORT\n-A KUBE-NODE-PORT -j KUBE-MARK-MASQ\n\
            -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
            -A KUBE-HP-X -j KUBE-MARK-MASQ\n-A KUBE-HP-X -j KUBE-NODE-PORT\nCOMMIT\n";
        let (rules, held) = crate::parse::parse(IpFamily::V4, text);
        assert_eq!(
            restore_text(IpFamily::V4, &rules, &Rules::default(), &held),
            "*nat\n:KUBE-NODE-PORT - [0:0]\n:KUBE-SERVICES - [0:0]\n-D OUTPUT -j KUBE-SERVICES\n\
             -X KUBE-SERVICES\nCOMMIT\n"
        );
    }
}
