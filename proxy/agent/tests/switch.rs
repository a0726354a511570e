//! Iptables mode on a node that carries traffic: from and to ipvs mode nothing is refused or left behind; node ports on
//! loopback; counters. `dropin/modes.rs` has the other ways from mode to mode.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shunt_harness::lab::{ChildGuard, Lab, Probe, StormSpec, require_kernel};
use socket2::{Domain, Protocol, Socket, Type};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
const LONG: Duration = Duration::from_mins(1);

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples")
}

fn lab() -> Result<Lab> {
    let mut builder = Lab::builder()
        .node(["192.0.2.11".parse()?, "2001:db8::11".parse()?])
        .client(["198.51.100.20".parse()?]);
    for (pod, last) in [("pod-a", 11), ("pod-b", 12), ("pod-c", 13)] {
        builder = builder.pod(pod, [format!("10.244.1.{last}").parse()?]);
    }
    let lab = builder.build()?;
    for pod in ["pod-a", "pod-b", "pod-c"] {
        lab.pod(pod)?.serve_ports([8080, 8053, 8090, 8443])?;
    }
    Ok(lab)
}

/// Starts the agent; when this returns, both families are in sync.
fn start(lab: &Lab, arguments: &[&str]) -> Result<ChildGuard> {
    let mut command = Command::new(SHUNT);
    command.args(["run", "--hostname-override", "worker-1", "--cluster-cidr", "10.244.0.0/16"]);
    command.args(["--admin-socket", "", "--manifests"]).arg(examples()).args(arguments);
    let mut agent = lab.node().spawn(&command)?;
    let deadline = Instant::now() + LONG;
    loop {
        let log = agent.to_string();
        if log.matches("in sync with the kernel").count() >= 2 {
            return Ok(agent);
        }
        ensure!(agent.try_wait()?.is_none(), "ended: {log}");
        ensure!(Instant::now() < deadline, "never in sync: {log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// All that iptables and ipvs mode have in the kernel, in no order.
fn holdings(lab: &Lab) -> Result<BTreeSet<String>> {
    let run = |program: &str, args: &[&str]| lab.node().exec(program, args.iter().copied(), "");
    let mut all = BTreeSet::new();
    for tool in ["iptables", "ip6tables"] {
        let mut table = String::new();
        for line in run(&format!("{tool}-legacy-save"), &[])?.lines() {
            match line.chars().next() {
                Some('*') => line.clone_into(&mut table),
                Some(':') if !line.contains(" - [") => {}
                Some(':' | '-') => {
                    all.insert(format!("{tool} {table} {}", line.split(" [").next().unwrap_or(line)));
                }
                _ => {}
            }
        }
    }
    let others = [
        run("ipset", &["list", "-name"])?,
        run("ipvsadm", &["-Sn"])?,
        run("ip", &["-o", "address", "show"])?,
    ];
    let lines = others.iter().flat_map(|text| text.lines());
    // The index of a link depends on how many there were before it.
    all.extend(lines.map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest).to_owned()));
    all.retain(|line| !line.contains("scope link"));
    Ok(all)
}

/// These two have chains of the same names. Whichever came before, there is in the end what a start on a fresh
/// node makes, and nothing else.
fn iptables_and_ipvs() -> Result<()> {
    let mode = |name| ["--mode", name];
    let alone = |name| -> Result<BTreeSet<String>> {
        let lab = lab()?;
        let mut agent = start(&lab, &mode(name))?;
        let held = holdings(&lab)?;
        agent.stop()?;
        Ok(held)
    };
    let expected = BTreeMap::from([("iptables", alone("iptables")?), ("ipvs", alone("ipvs")?)]);
    ensure!(expected["iptables"].len() > 20 && expected["ipvs"].len() > 20, "{expected:?}");
    let lab = lab()?;
    let mut agent = start(&lab, &mode("iptables"))?;
    let storm = |to: &str| {
        let probe = Probe::tcp(to.parse()?).timeout(LONG);
        lab.client().storm(StormSpec { probe, rate: 20, duration: LONG * 5 })
    };
    let storms = [storm("10.96.0.10:80")?, storm("192.0.2.11:30080")?];
    for name in ["ipvs", "iptables", "ipvs", "iptables"] {
        std::thread::sleep(Duration::from_millis(300));
        agent.stop()?;
        agent = start(&lab, &mode(name))?;
        let deadline = Instant::now() + LONG;
        loop {
            let held = holdings(&lab)?;
            if held == expected[name] {
                break;
            }
            let differing: Vec<_> = held.symmetric_difference(&expected[name]).collect();
            ensure!(Instant::now() < deadline, "in {name} mode, left or missing: {differing:#?}\n{agent}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}");
        ensure!(report.failures.is_empty(), "{report}");
    }
    agent.stop()?;
    Ok(())
}

mod guest {
    #[test]
    fn iptables_and_ipvs_take_turns() {
        shunt_harness::guest::test_in_guest(module_path!(), "iptables_and_ipvs_take_turns", || {
            super::iptables_and_ipvs().unwrap();
        });
    }
}

/// Node ports on loopback: routed there only once others are kept out, and masqueraded.
#[test]
fn node_ports_answer_on_loopback_and_to_nobody_else() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab()?;
    let sysctl = || lab.node().exec("cat", ["/proc/sys/net/ipv4/conf/all/route_localnet"], "");
    let mut agent = start(&lab, &["--mode", "iptables"])?;
    ensure!(sysctl()?.trim() == "0", "route_localnet without need");
    agent.stop()?;
    let mut agent = start(&lab, &["--mode", "iptables", "--nodeport-addresses", "127.0.0.0/8,192.0.2.0/24"])?;
    ensure!(sysctl()?.trim() == "1", "route_localnet is off: {agent}");
    let rules = lab.node().exec("iptables-nft", ["-S", "KUBE-FIREWALL"], "")?;
    ensure!(rules.contains("! -s 127.0.0.0/8 -d 127.0.0.0/8"), "{rules}");
    for to in ["127.0.0.1:30080", "192.0.2.11:30080"] {
        let seen = lab.node().probe(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)))?;
        ensure!(seen.pod().is_some(), "{to}: {seen}");
    }
    agent.stop()?;
    let lab = self::lab()?;
    let sysctl = || lab.node().exec("cat", ["/proc/sys/net/ipv4/conf/all/route_localnet"], "");
    let mut agent = start(
        &lab,
        &["--mode", "iptables", "--nodeport-addresses", "all", "--iptables-localhost-nodeports=false"],
    )?;
    ensure!(sysctl()?.trim() == "0", "route_localnet although it is not wanted: {agent}");
    ensure!(lab.node().exec("iptables-nft", ["-S", "KUBE-FIREWALL"], "").is_err(), "nobody needs it");
    let seen = |to: &str| lab.node().probe(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)));
    ensure!(seen("127.0.0.1:30080")?.pod().is_none(), "loopback answers");
    ensure!(seen("192.0.2.11:30080")?.pod().is_some(), "the node's address does not");
    agent.stop()?;
    Ok(())
}

fn metric(text: &str, start: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(start))?;
    line.rsplit(' ').next()?.trim_end_matches(".0").parse().ok()
}

fn metrics(address: &str) -> Result<String> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Sends TCP answers (SYN and ACK) to nothing that was ever asked.
fn stray_answers(to: SocketAddr, count: u8) -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))?;
    for n in 0..count {
        // Ports, sequence numbers, length of the header and flags, window; nobody looks at the checksum.
        let header = [15, 160 + n, 31, 144, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x12, 4, 0, 0, 0, 0, 0];
        socket.send_to(&header, &to.into())?;
    }
    Ok(())
}

/// What `iptables` drops as INVALID and accepts on loopback is counted and shown; so are its rules.
#[test]
fn what_rules_count_is_shown() -> Result<()> {
    const ADDRESS: &str = "192.0.2.11:10249";
    if !require_kernel() {
        return Ok(());
    }
    for (flavour, tool) in [("legacy", "iptables-legacy"), ("nft", "iptables-nft")] {
        let lab = lab()?;
        let fixed: &[&str] =
            &["--mode", "iptables", "--nodeport-addresses", "all", "--metrics-bind-address", ADDRESS];
        let start = |more: &[&str]| start(&lab, &[fixed, &["--iptables-flavour", flavour], more].concat());
        let mut agent = start(&[])?;
        let read = || lab.node().run(|| metrics(ADDRESS));
        let invalid = "kubeproxy_iptables_ct_state_invalid_dropped_packets_total ";
        let loopback = "kubeproxy_iptables_localhost_nodeports_accepted_packets_total ";
        let text = read()?;
        ensure!(metric(&text, invalid) == Some(0) && metric(&text, loopback) == Some(0), "{text}");
        for table in ["filter", "nat"] {
            let labels = format!("{{ip_family=\"IPv4\",table=\"{table}\"}} ");
            for what in ["total", "last"] {
                let rules = metric(&text, &format!("kubeproxy_sync_proxy_rules_iptables_{what}{labels}"));
                ensure!(rules.is_some_and(|rules| rules > 5), "{table} {what}: {rules:?}");
            }
        }
        for family in ["IPv4", "IPv6"] {
            let name = "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total";
            ensure!(metric(&text, &format!("{name}{{ip_family=\"{family}\"}}")) == Some(0), "{text}");
        }
        for to in ["127.0.0.1:30080", "192.0.2.11:30080", "10.96.0.10:80", "127.0.0.1:30080"] {
            let seen = lab.node().probe(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)))?;
            ensure!(seen.pod().is_some(), "{to}: {seen}");
        }
        lab.client().run(|| stray_answers("10.244.1.11:0".parse()?, 3))?;
        let text = read()?;
        ensure!(metric(&text, loopback) == Some(2), "{text}");
        ensure!(metric(&text, invalid) == Some(3), "{:?}", metric(&text, invalid));
        agent.stop()?;
        let mut agent = start(&["--conntrack-tcp-be-liberal"])?;
        let rules = lab.node().exec(tool, ["-S", "KUBE-FORWARD"], "")?;
        ensure!(!rules.contains("INVALID"), "{rules}");
        agent.stop()?;
    }
    Ok(())
}
