//! Rules, by `iptables-save` and `iptables-restore`: read where everything is read, written where the
//! skeleton changes, never when a Service does.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use shunt_core::id::IpFamily;

use crate::parse::parse;
use crate::rules::{Chain, Rules, Table};
use crate::skeleton::tool;

/// Chains by which the kubelet says in which of the two flavours it writes its rules.
const HINTS: [&str; 2] = [":KUBE-IPTABLES-HINT", ":KUBE-KUBELET-CANARY"];

/// Whether the tools are there.
pub(super) fn is_installed(family: IpFamily) -> bool {
    let name = format!("{}-restore", tool(family));
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(&name).exists())
}

/// Which tools to use: they are the same as long as the process runs.
#[derive(Clone, Debug)]
pub(super) struct Tool(String);

impl Tool {
    /// Finds them in the calling thread's network namespace.
    pub(super) fn find(family: IpFamily) -> Self {
        Self(flavour(family))
    }

    /// Our rules as they are.
    pub(super) fn save(&self, family: IpFamily) -> io::Result<Rules> {
        save(family, &self.0)
    }

    /// Makes rules so.
    pub(super) fn restore(&self, text: &str) -> io::Result<()> {
        restore(&self.0, text)
    }
}

/// The flavour in which the kubelet left its hint, or the system's own.
fn flavour(family: IpFamily) -> String {
    let plain = tool(family);
    // Looking at a table of the legacy flavour would make it.
    let names = match family {
        IpFamily::V4 => "/proc/net/ip_tables_names",
        IpFamily::V6 => "/proc/net/ip6_tables_names",
    };
    let legacy = std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|n| n == "mangle"));
    for flavour in ["nft", "legacy"] {
        if flavour == "legacy" && !legacy {
            continue;
        }
        let name = format!("{plain}-{flavour}");
        let saved = Command::new(format!("{name}-save")).args(["-t", "mangle"]).output();
        let hinted = saved.is_ok_and(|output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().any(|line| HINTS.iter().any(|hint| line.starts_with(hint)))
        });
        if hinted {
            return name;
        }
    }
    plain.to_owned()
}

fn failed(name: &str, output: &std::process::Output) -> io::Error {
    let words = String::from_utf8_lossy(&output.stderr);
    io::Error::other(format!("{name}: {}", words.trim()))
}

fn save(family: IpFamily, tool: &str) -> io::Result<Rules> {
    let name = format!("{tool}-save");
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{name}: {error}"));
    let output = Command::new(&name).stdin(Stdio::null()).output().map_err(named)?;
    if !output.status.success() {
        return Err(failed(&name, &output));
    }
    Ok(parse(family, &String::from_utf8_lossy(&output.stdout)))
}

fn restore(tool: &str, text: &str) -> io::Result<()> {
    let name = format!("{tool}-restore");
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{name}: {error}"));
    let mut child = Command::new(&name)
        .args(["--noflush", "-w", "5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(named)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).map_err(named)?;
    }
    let output = child.wait_with_output().map_err(named)?;
    if output.status.success() { Ok(()) } else { Err(failed(&name, &output)) }
}

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
