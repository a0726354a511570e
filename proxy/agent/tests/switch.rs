//! Iptables mode on a node that carries traffic: from and to ipvs mode nothing is refused or left behind; host ports of
//! others; node ports on loopback; counters; flavours; the lock. `dropin/modes.rs` has the other ways from mode to mode.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
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
    start_with(lab, &examples(), arguments, &[])
}

fn start_with(
    lab: &Lab,
    manifests: &Path,
    arguments: &[&str],
    environment: &[(&str, &Path)],
) -> Result<ChildGuard> {
    let mut command = Command::new(SHUNT);
    command.args(["run", "--hostname-override", "worker-1", "--cluster-cidr", "10.244.0.0/16"]);
    command.args(["--admin-socket", "", "--manifests"]).arg(manifests).args(arguments);
    command.envs(environment.iter().copied());
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

/// A node on which another program has a host port, and asks for masquerade as CRI-O and CNI plug-ins do.
fn lab_with_host_port(flavour: &str) -> Result<Lab> {
    let lab = lab()?;
    let rules =
        format!("*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-HP-X - [0:0]\n{}\nCOMMIT\n", HOST_PORT.join("\n"));
    lab.node().exec(&format!("iptables-{flavour}-restore"), ["--noflush"], &rules)?;
    Ok(lab)
}

const HOST_PORT: [&str; 3] = [
    "-A PREROUTING -d 192.0.2.11/32 -p tcp -m tcp --dport 18080 -j KUBE-HP-X",
    "-A KUBE-HP-X -s 198.51.100.20/32 -j KUBE-MARK-MASQ",
    "-A KUBE-HP-X -p tcp -j DNAT --to-destination 10.244.1.11:8080",
];

/// What is left in the nat table where Shunt has nothing there: the rules of the other program, and what they lead to.
fn only_host_port(lab: &Lab, flavour: &str) -> Result<()> {
    let nat = lab.node().exec(&format!("iptables-{flavour}-save"), ["-t", "nat"], "")?;
    let lines = || nat.lines().map(|line| line.split(" [").next().unwrap_or(line));
    for rule in HOST_PORT {
        ensure!(lines().any(|line| line == rule), "somebody else's rule is gone: {nat}");
    }
    let mut left: BTreeSet<&str> =
        lines().filter(|line| line.starts_with("-A") || line.ends_with(" -")).collect();
    left.retain(|line| !HOST_PORT.contains(line));
    let marks = "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000";
    ensure!(left == BTreeSet::from([marks, ":KUBE-HP-X -", ":KUBE-MARK-MASQ -"]), "left: {left:?}");
    Ok(())
}

/// Packets that the rules of ipvs mode dropped because nobody had the address that they were for.
fn strays(lab: &Lab) -> Result<u64> {
    let rules = lab.node().exec("iptables-legacy-save", ["--counters", "--table", "mangle"], "")?;
    let rule = rules.lines().find(|line| line.contains("KUBE-SERVICE-CIDR")).context("no such rule")?;
    let (packets, _) = rule.trim_start_matches('[').split_once(':').context("no counter")?;
    Ok(packets.parse()?)
}

/// These two have chains of the same names. Whichever came before, there is in the end what a start on a fresh
/// node makes, and nothing else.
fn iptables_and_ipvs() -> Result<()> {
    let mode = |name| ["--mode", name];
    let alone = |name| -> Result<BTreeSet<String>> {
        let lab = lab_with_host_port("legacy")?;
        let mut agent = start(&lab, &mode(name))?;
        let held = holdings(&lab)?;
        agent.stop()?;
        Ok(held)
    };
    let expected = BTreeMap::from([("iptables", alone("iptables")?), ("ipvs", alone("ipvs")?)]);
    ensure!(expected["iptables"].len() > 20 && expected["ipvs"].len() > 20, "{expected:?}");
    let lab = lab_with_host_port("legacy")?;
    let mut agent = start(&lab, &mode("iptables"))?;
    let storm = |to: &str, rate| {
        let probe = Probe::tcp(to.parse()?).timeout(LONG);
        lab.client().storm(StormSpec { probe, rate, duration: LONG * 5 })
    };
    let storms = [storm("10.96.0.10:80", 100)?, storm("192.0.2.11:30080", 20)?];
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
        ensure!(name != "ipvs" || strays(&lab)? == 0, "packets to VIPs that were not there");
    }
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}");
        ensure!(report.failures.is_empty(), "{report}");
    }
    agent.stop()?;
    for name in ["iptables", "ipvs"] {
        start(&lab, &mode(name))?.stop()?;
        lab.node().exec(SHUNT, ["cleanup"], "")?;
        only_host_port(&lab, "legacy").with_context(|| format!("after {name} mode"))?;
    }
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

/// Rules of others that lead to a chain of ours keep it. They work in every mode, for the mark means the same in all.
#[test]
fn host_ports_of_others_outlive_iptables_mode() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["legacy", "nft"] {
        let lab = lab_with_host_port(flavour)?;
        let peer = || {
            let probe = Probe::tcp("192.0.2.11:18080".parse()?).timeout(Duration::from_secs(10));
            lab.client().probe(probe)?.peer().context("no answer at the host port")
        };
        let arguments = ["--mode", "iptables", "--iptables-flavour", flavour];
        let mut agent = start(&lab, &arguments)?;
        let masqueraded = peer()?;
        ensure!(masqueraded != "198.51.100.20".parse::<IpAddr>()?, "{flavour}: not masqueraded");
        agent.stop()?;
        lab.node().exec(SHUNT, ["cleanup"], "")?;
        only_host_port(&lab, flavour).with_context(|| format!("{flavour}, cleaned up"))?;
        start(&lab, &arguments)?.stop()?;
        let mut agent = start(&lab, &["--mode", "nftables"])?;
        let deadline = Instant::now() + LONG;
        while let Err(error) = only_host_port(&lab, flavour) {
            ensure!(Instant::now() < deadline, "{flavour}, in nftables mode: {error}\n{agent}");
            std::thread::sleep(Duration::from_millis(50));
        }
        ensure!(peer()? == masqueraded, "{flavour}: not masqueraded in nftables mode");
        agent.stop()?;
    }
    Ok(())
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

/// Where nobody says which flavour, the kubelet's hint does, and the rules are nowhere else.
#[test]
fn the_kubelets_hint_says_which_flavour() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for (flavour, other, hint) in
        [("legacy", "nft", "KUBE-IPTABLES-HINT"), ("nft", "legacy", "KUBE-KUBELET-CANARY")]
    {
        let lab = lab()?;
        let hint = ["-t", "mangle", "-N", hint];
        lab.node().exec(&format!("iptables-{flavour}"), hint, "")?;
        let save = |flavour: &str| lab.node().exec(&format!("iptables-{flavour}-save"), [""; 0], "");
        let more = ["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"];
        lab.node().exec(&format!("iptables-{other}"), more, "")?;
        let mut agent = start(&lab, &["--mode", "iptables"])?;
        ensure!(save(flavour)?.contains(":KUBE-SERVICES"), "not in {flavour}: {agent}");
        ensure!(!save(other)?.contains("KUBE-SERVICES"), "in {other}: {agent}");
        agent.stop()?;
    }
    Ok(())
}

/// Traffic of Services passes a node that forwards nothing else.
#[test]
fn services_pass_a_node_that_forwards_nothing() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["legacy", "nft"] {
        let lab = lab()?;
        let seen = |to: &str| {
            let probe = Probe::tcp(to.parse()?).timeout(Duration::from_secs(3));
            Ok::<_, anyhow::Error>(lab.client().probe(probe)?.pod().is_some())
        };
        ensure!(seen("10.244.1.11:8080")?, "it forwards");
        lab.node().exec(&format!("iptables-{flavour}"), ["-P", "FORWARD", "DROP"], "")?;
        let mut agent = start(&lab, &["--mode", "iptables", "--iptables-flavour", flavour])?;
        for _ in 0..10 {
            ensure!(seen("192.0.2.11:30080")?, "{flavour}: a node port");
            ensure!(seen("10.96.0.10:80")?, "{flavour}: a cluster IP");
        }
        ensure!(!seen("10.244.1.11:8080")?, "{flavour}: it forwards everything");
        agent.stop()?;
    }
    Ok(())
}

const ONE_MORE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: one-more, namespace: default}\n\
    spec: {type: ClusterIP, clusterIP: 10.96.7.7, clusterIPs: [10.96.7.7], ports: [{port: 80, protocol: TCP}]}\n";

/// Others that hold the lock of the tables are waited for, and it is said for how long.
#[test]
fn the_lock_of_the_tables_is_waited_for() -> Result<()> {
    const ADDRESS: &str = "192.0.2.11:10249";
    if !require_kernel() {
        return Ok(());
    }
    let (lab, folder) = (lab()?, tempfile::tempdir()?);
    for file in std::fs::read_dir(examples())? {
        let file = file?;
        std::fs::copy(file.path(), folder.path().join(file.file_name()))?;
    }
    let locks = tempfile::tempdir()?;
    let path = locks.path().join("xtables.lock");
    let arguments = ["--mode", "iptables", "--iptables-flavour", "legacy", "--metrics-bind-address", ADDRESS];
    let mut agent = start_with(&lab, folder.path(), &arguments, &[("XTABLES_LOCKFILE", &path)])?;
    let rules = || lab.node().exec("iptables-legacy-save", ["-t", "nat"], "");
    let waited = || {
        let text = lab.node().run(|| metrics(ADDRESS))?;
        let name = "shunt_sync_phase_duration_seconds_sum{ip_family=\"IPv4\",phase=\"wait\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok::<_, anyhow::Error>(line.and_then(|value| value.parse::<f64>().ok()).unwrap_or_default())
    };
    let before = waited()?;
    let lock = std::fs::File::options().write(true).open(&path)?;
    lock.lock()?;
    std::fs::write(folder.path().join("90-one-more.yaml"), ONE_MORE)?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(!rules()?.contains("10.96.7.7"), "written although somebody has the lock");
    lock.unlock()?;
    let deadline = Instant::now() + LONG;
    while !rules()?.contains("10.96.7.7") || waited()? < before + 0.5 {
        ensure!(Instant::now() < deadline, "waited {} s: {agent}", waited()? - before);
        std::thread::sleep(Duration::from_millis(50));
    }
    agent.stop()?;
    Ok(())
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
