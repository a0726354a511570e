//! iptables mode in both flavours, as the suites see it.

use anyhow::{Context as _, Result};
use shunt_core::id::IpFamily;
use shunt_harness::lab::Namespace;
use shunt_mode::{KernelError, Plan};
use shunt_mode_iptables::Iptables;
use shunt_mode_iptables::fake::FakeKernel;
use shunt_mode_iptables::kernel::Tools;
use shunt_mode_iptables::op::Op;
use shunt_mode_iptables::render::Desired;
use shunt_mode_iptables::state::State;
use xtables_tools::Flavour;

use super::ModeUnderTest;

/// What others have in the tables.
const FOREIGN: &str = "*filter
:KUBE-FIREWALL - [0:0]
:KUBE-ROUTER-FORWARD - [0:0]
:cali-INPUT - [0:0]
-A INPUT -m comment --comment \"KUBE-SERVICES is not meant\" -j cali-INPUT
-A INPUT -p icmp -j ACCEPT
-A FORWARD -s 10.9.9.0/24 -j KUBE-ROUTER-FORWARD
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-ROUTER-FORWARD -m limit --limit 3/min -j LOG --log-prefix \"a \\\"b\\\" \"
-A cali-INPUT -j RETURN
COMMIT
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
-A PREROUTING -i lo -j TTL --ttl-set 64
COMMIT
*nat
:CNI-HOSTPORT-DNAT - [0:0]
:KUBE-HP-X - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -s 10.9.9.0/24 ! -d 10.9.9.0/24 -j MASQUERADE
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 18080 -j DNAT --to-destination 10.9.9.9:80
-A KUBE-HP-X -s 10.9.9.0/24 -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
";

fn of_family(family: IpFamily, tool: &str) -> String {
    match family {
        IpFamily::V4 => format!("iptables-{tool}"),
        IpFamily::V6 => format!("ip6tables-{tool}"),
    }
}

fn for_family(family: IpFamily, text: &str) -> String {
    match family {
        IpFamily::V4 => text.to_owned(),
        IpFamily::V6 => text
            .replace("10.9.9.0/24", "fd00:9::/64")
            .replace("10.9.9.9:80", "[fd00:9::9]:80")
            .replace("-p icmp ", "-p icmpv6 ")
            .replace("TTL --ttl-set", "HL --hl-set"),
    }
}

/// What a tool prints, without what changes by itself, and without tables in which nothing is.
fn normal(text: &str) -> String {
    let mut normal = String::new();
    for table in text.split_inclusive("COMMIT\n") {
        let lines = table.lines().filter(|line| !line.starts_with('#'));
        let lines: Vec<&str> = lines.map(|line| line.split(" [").next().unwrap_or(line)).collect();
        let says_something =
            |line: &&str| line.starts_with("-A") || line.starts_with(':') && line.ends_with(" -");
        if lines.iter().any(says_something) {
            normal += &(lines.join("\n") + "\n");
        }
    }
    normal
}

fn list(namespace: &Namespace) -> Result<String> {
    let mut text = String::new();
    for flavour in Flavour::ALL {
        for family in IpFamily::ALL {
            let found = namespace.exec(&of_family(family, &format!("{flavour}-save")), [""; 0], "")?;
            let found = normal(&found);
            if !found.is_empty() {
                text.extend([flavour.name(), " ", &family.to_string(), "\n", &found]);
            }
        }
    }
    for line in namespace.exec("ipset", ["save"], "")?.lines() {
        text += line.split(" initval").next().unwrap_or(line);
        text.push('\n');
    }
    Ok(text)
}

/// The parts of a text: for which family, sets, rules.
fn parts(text: &str) -> Vec<(IpFamily, String, String)> {
    let (mut parts, mut sets, mut rules) = (Vec::new(), String::new(), None);
    for line in text.lines().chain(["# ipset restore"]) {
        let family = if line == "# iptables-restore --noflush" {
            Some(IpFamily::V4)
        } else if line == "# ip6tables-restore --noflush" {
            Some(IpFamily::V6)
        } else {
            None
        };
        if line == "# ipset restore" {
            if let Some((family, rules)) = rules.take() {
                parts.push((family, std::mem::take(&mut sets), rules));
            }
        } else if let Some(family) = family {
            rules = Some((family, String::new()));
        } else {
            let part = rules.as_mut().map_or(&mut sets, |(_, rules)| rules);
            *part += line;
            part.push('\n');
        }
    }
    parts
}

fn check_text(namespace: &Namespace, flavour: Flavour, text: &str) -> Result<()> {
    let parts = parts(text);
    anyhow::ensure!(text.trim().is_empty() == parts.is_empty(), "nothing to check in\n{text}");
    for (family, sets, rules) in parts {
        namespace.exec("ipset", ["restore"], &sets)?;
        let tool = of_family(family, &format!("{flavour}-restore"));
        namespace.exec(&tool, ["--noflush", "--test", "--wait"], &rules)?;
        namespace.exec("ipset", ["destroy"], "")?;
    }
    Ok(())
}

fn affinity_sets(namespace: &Namespace, family: IpFamily) -> Result<(Vec<String>, usize)> {
    let family = match family {
        IpFamily::V4 => " inet ",
        IpFamily::V6 => " inet6 ",
    };
    let text = namespace.exec("ipset", ["save"], "")?;
    let created = text.lines().filter(|l| l.starts_with("create KUBE-SEP-") && l.contains(family));
    let names: Vec<String> = created.filter_map(|l| l.split(' ').nth(1).map(str::to_owned)).collect();
    let is_ours = |line: &&str| names.iter().any(|name| line.starts_with(&format!("add {name} ")));
    let records = text.lines().filter(is_ours).count();
    Ok((names, records))
}

fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()> {
    let (sets, _) = affinity_sets(namespace, family)?;
    let set = sets.first().context("a set of clients")?;
    let element = |n: usize| match family {
        IpFamily::V4 => format!("add {set} 11.{}.{}.{} timeout 3600\n", n >> 16, (n >> 8) & 255, n & 255),
        IpFamily::V6 => format!("add {set} 2a00::{n:x} timeout 3600\n"),
    };
    namespace.exec("ipset", ["restore"], &(0..count).map(element).collect::<String>()).map(drop)
}

const DAMAGES: &[(&str, &str)] = &[
    ("008-etp-local", "*nat\n-F\nCOMMIT"),
    ("008-etp-local", "*filter\n-F\nCOMMIT"),
    ("008-etp-local", "*nat\n-F\n-X\nCOMMIT\n*filter\n-F\n-X\nCOMMIT\n*mangle\n-F\n-X\nCOMMIT"),
    ("008-etp-local", "*mangle\n-F\n-X\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-SERVICES\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-MARK-MASQ\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-POSTROUTING\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-NODEPORTS\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT"),
    ("008-etp-local", "*nat\n-F KUBE-EXT-XPGD46QRK7WJZT7O\nCOMMIT"),
    ("008-etp-local", "*nat\n-D PREROUTING 1\nCOMMIT"),
    (
        "008-etp-local",
        "*nat\n-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\nCOMMIT",
    ),
    ("008-etp-local", "*filter\n-D INPUT 1\nCOMMIT"),
    ("008-etp-local", "*filter\n-I FORWARD -j KUBE-SERVICES\nCOMMIT"),
    ("008-etp-local", "*nat\n-I KUBE-SERVICES -d 172.30.0.41/32 -j ACCEPT\nCOMMIT"),
    ("008-etp-local", "*nat\n-I KUBE-SERVICES -m limit --limit 1/min -j RETURN\nCOMMIT"),
    ("008-etp-local", "*nat\n-N KUBE-SVC-AAAAAAAAAAAAAAAA\n-A KUBE-SVC-AAAAAAAAAAAAAAAA -j RETURN\nCOMMIT"),
    ("008-etp-local", "*nat\n-N KUBE-SEP-AAAAAAAAAAAAAAAA\nCOMMIT"),
    ("008-etp-local", "*nat\n-N SHUNT-0A600000-15\nCOMMIT"),
    (
        "008-etp-local",
        "*filter\n-N KUBE-EXTERNAL-SERVICES-X\n-F KUBE-SERVICES\n-X KUBE-EXTERNAL-SERVICES-X\nCOMMIT",
    ),
    ("008-etp-local", "flush SHUNT-CLUSTER-IPS"),
    ("008-etp-local", "flush SHUNT-HAIRPIN"),
    ("008-etp-local", "add SHUNT-CLUSTER-IPS 9.9.9.9"),
    ("008-etp-local", "add SHUNT-REJECT 9.9.9.9,tcp:80"),
    ("008-etp-local", "add SHUNT-HAIRPIN 9.9.9.9,tcp:80,8.8.8.8"),
    ("008-etp-local", "create KUBE-SEP-AAAAAAAAAAAAAAAA hash:ip maxelem 4194304 timeout 10800"),
    ("001-no-endpoints-reject", "flush SHUNT-REJECT"),
    ("001-no-endpoints-reject", "*filter\n-F KUBE-EXTERNAL-SERVICES\nCOMMIT"),
    ("003-loadbalancer-source-ranges", "flush SHUNT-GUARDED"),
    ("003-loadbalancer-source-ranges", "flush SHUNT-SOURCES"),
    ("003-loadbalancer-source-ranges", "add SHUNT-SOURCES 1.2.3.4,tcp:80,9.9.9.0/25"),
    ("003-loadbalancer-source-ranges", "*filter\n-F KUBE-PROXY-FIREWALL\nCOMMIT"),
    ("006-nodeport-v6-primary", "*nat\n-F\nCOMMIT"),
    ("006-nodeport-v6-primary", "flush SHUNT-6-CLUSTER-IPS"),
    ("044-session-affinity", "*nat\n-F\n-X\nCOMMIT"),
    ("008-etp-local", "*filter\n-F\nCOMMIT\ndestroy SHUNT-REJECT\ncreate SHUNT-REJECT hash:ip family inet"),
];

fn damage(namespace: &Namespace, flavour: Flavour, family: IpFamily, script: &str) -> Result<()> {
    let is_of_sets =
        |line: &&str| ["flush ", "add ", "create ", "destroy "].iter().any(|w| line.starts_with(w));
    let (sets, rules): (Vec<&str>, Vec<&str>) = script.lines().partition(is_of_sets);
    if !rules.is_empty() {
        let tool = of_family(family, &format!("{flavour}-restore"));
        namespace.exec(&tool, ["--noflush", "--wait"], &(rules.join("\n") + "\n"))?;
    }
    if !sets.is_empty() {
        namespace.exec("ipset", ["restore"], &(sets.join("\n") + "\n"))?;
    }
    Ok(())
}

macro_rules! flavoured {
    ($(#[$doc:meta])* $mode:ident, $flavour:expr) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $mode;

        impl ModeUnderTest for $mode {
            type State = State;
            type Desired = Desired;
            type Op = Op;
            type Fake = Iptables<FakeKernel>;
            type Real = Iptables<Tools>;

            const OPS_PER_ENDPOINT: usize = 8;

            fn fake(family: IpFamily) -> Self::Fake {
                Iptables::new(FakeKernel::new(family))
            }

            fn real(family: IpFamily) -> Result<Self::Real, KernelError> {
                Tools::open(family, Some($flavour)).map(Iptables::new)
            }

            fn held(fake: &mut Self::Fake) -> State {
                fake.kernel().state().clone()
            }

            fn fail_after(fake: &mut Self::Fake, commits: Option<usize>) {
                fake.kernel().fail_after = commits;
            }

            fn reads(fake: &mut Self::Fake) -> usize {
                fake.kernel().reads
            }

            fn plan_tight(observed: &State, desired: &Desired, tightness: u8) -> Plan<Op> {
                let limit = [usize::MAX, 1, usize::MAX, 2, 3, 5][usize::from(tightness).min(5)];
                shunt_mode_iptables::plan::plan_within(observed, desired, limit)
            }

            fn is_garbage(_op: &Op) -> bool {
                false
            }

            fn check_text(namespace: &Namespace, text: &str) -> Result<()> {
                check_text(namespace, $flavour, text)
            }

            fn list(namespace: &Namespace) -> Result<String> {
                list(namespace)
            }

            fn foreign(namespace: &Namespace) -> Result<()> {
                for family in IpFamily::ALL {
                    let tool = of_family(family, &format!("{}-restore", $flavour));
                    namespace.exec(&tool, ["--noflush", "--wait"], &for_family(family, FOREIGN))?;
                }
                namespace.exec("ipset", ["create", "theirs", "hash:ip"], "").map(drop)
            }

            fn damages() -> &'static [(&'static str, &'static str)] {
                DAMAGES
            }

            fn damage(namespace: &Namespace, family: IpFamily, script: &str) -> Result<()> {
                damage(namespace, $flavour, family, script)
            }

            fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize> {
                Ok(affinity_sets(namespace, family)?.1)
            }

            fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()> {
                add_affinity_records(namespace, family, count)
            }

            fn lacks(_case: &str, _packet: Option<&str>) -> Option<&'static str> {
                None
            }
        }
    };
}

flavoured!(
    /// iptables mode by `iptables-legacy`.
    IptablesLegacy,
    Flavour::Legacy
);
flavoured!(
    /// iptables mode by `iptables-nft`.
    IptablesNft,
    Flavour::Nft
);
