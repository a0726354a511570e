//! What `iptables-restore` is told where the skeleton changes, never when a Service does.

use std::fmt::Write as _;

use shunt_core::id::IpFamily;

use crate::rules::{Chain, Rules, Table};

/// What leads from one set of rules to another. Each table changes at once.
pub(super) fn restore_text(family: IpFamily, was: &Rules, rules: &Rules) -> String {
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
        let gone: Vec<&Chain> = old.iter().filter(|c| !new.iter().any(|n| n.name == c.name)).collect();
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
        for chain in &gone {
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
        assert_eq!(restore_text(IpFamily::V4, &one, &one), "");
        assert_eq!(
            restore_text(IpFamily::V4, &none, &one),
            "*nat\n:KUBE-SERVICES - [0:0]\n-I PREROUTING -j KUBE-SERVICES\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n"
        );
        assert_eq!(
            restore_text(IpFamily::V4, &one, &other),
            "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j ACCEPT\nCOMMIT\n"
        );
        assert_eq!(
            restore_text(IpFamily::V4, &other, &none),
            "*nat\n:KUBE-SERVICES - [0:0]\n-D PREROUTING -j KUBE-SERVICES\n-X KUBE-SERVICES\nCOMMIT\n"
        );
    }
}
