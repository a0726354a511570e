//! What only ipvs mode has: VIPs that are addresses of the node, settings of the kernel, schedulers, source ports
//! that are used again. In a guest.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shunt_core::service::Scheduler;
use shunt_core::table::Change;
use shunt_harness::lab::{Namespace, StormSpec};
use shunt_mode::Backend as _;
use shunt_mode::driver::{Driver as _, ModeDriver};
use shunt_mode::sync::Step;
use shunt_mode_ipvs::Ipvs;
use shunt_mode_ipvs::drain::DEADLINE;
use shunt_mode_ipvs::kernel::{Linux, Options};
use shunt_suites::web::{FAMILY, NODE_IP, PODS, VIP, Web, probe};

/// A port of the node's own, which no Service has.
const HOST_PORT: u16 = 9999;
const HEALTH_PORT: u16 = 30999;

fn closed() {
    let web = Web::new();
    web.lab.node().serve_ports([HOST_PORT]).unwrap();
    let client = web.lab.client();
    assert!(client.probe(probe(NODE_IP, HOST_PORT)).unwrap().answer().is_some(), "the node itself answers");
    for from in [client, web.lab.node(), web.lab.pod("pod1").unwrap()] {
        assert!(from.probe(probe(VIP, HOST_PORT)).unwrap().is_refused(), "a port of the node on a VIP");
        assert!(from.probe(probe(VIP, 80)).unwrap().answer().is_some(), "the Service");
    }
}

fn health_checked() {
    let mut web = Web::new();
    let node = web.lab.node();
    node.serve_ports([HOST_PORT, HEALTH_PORT]).unwrap();
    node.exec("iptables", ["-A", "INPUT", "-i", "eth0", "-p", "tcp", "-j", "DROP"], "").unwrap();
    let ask = |web: &Web, address, port| {
        let probe = probe(address, port).timeout(Duration::from_secs(2));
        web.lab.client().probe(probe).unwrap()
    };
    assert!(ask(&web, NODE_IP, HEALTH_PORT).is_timeout());
    web.edit(|service| service.health_check_node_port = Some(HEALTH_PORT));
    web.sync();
    assert!(ask(&web, NODE_IP, HEALTH_PORT).answer().is_some(), "open though the node is closed");
    assert!(ask(&web, NODE_IP, HOST_PORT).is_timeout(), "no other port is");
    assert!(ask(&web, VIP, HEALTH_PORT).is_refused(), "a VIP has no such port");
    let rules = web.lab.node().exec("iptables-save", ["-t", "filter"], "").unwrap();
    assert!(rules.contains("--match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j ACCEPT"), "{rules}");
    // The order of the rules is part of it, and is mended.
    let order = |web: &Web| {
        let rules = web.lab.node().exec("iptables-save", ["-t", "filter"], "").unwrap();
        let at = |chain: &str| rules.lines().position(|l| l.starts_with("-A INPUT") && l.ends_with(chain));
        (at("KUBE-IPVS-FILTER").unwrap(), at("KUBE-NODE-PORT").unwrap())
    };
    let (filter, port) = order(&web);
    assert!(filter < port);
    let swapped = "rule=$(iptables -S INPUT | grep KUBE-NODE-PORT | sed 's/^-A INPUT//') && \
        eval iptables -D INPUT $rule && eval iptables -I INPUT $rule";
    web.lab.node().exec("sh", ["-c", swapped], "").unwrap();
    let (filter, port) = order(&web);
    assert!(port < filter);
    web.restart(Options::default());
    web.kernel.sync(web.cluster.table(FAMILY), &Change::everything()).unwrap();
    let (filter, port) = order(&web);
    assert!(filter < port);
    web.edit(|service| service.health_check_node_port = None);
    web.sync();
    assert!(ask(&web, NODE_IP, HEALTH_PORT).is_timeout());
    assert_eq!(web.kernel.backend.observe().unwrap(), web.kernel.mirror);
}

fn sysctl(node: &Namespace, name: &str) -> String {
    node.exec("cat", [format!("/proc/sys/{name}")], "").unwrap().trim().to_owned()
}

fn tuned() {
    let mut web = Web::new();
    let node = web.lab.node();
    for name in ["conntrack", "expire_nodest_conn", "expire_quiescent_template"] {
        assert_eq!(sysctl(node, &format!("net/ipv4/vs/{name}")), "1", "{name}");
    }
    // As the kernel has it: since 5.9 it no longer makes clients wait.
    assert_eq!(sysctl(node, "net/ipv4/vs/conn_reuse_mode"), "1");
    assert_eq!(sysctl(node, "net/ipv4/conf/all/arp_ignore"), "0");
    let tcp_fin = node.exec("ipvsadm", ["-l", "--timeout"], "").unwrap();
    let tcp_fin = tcp_fin.split_whitespace().rev().nth(1).unwrap().to_owned();
    for server in ["9.9.9.1:80", "9.9.8.1:80"] {
        node.exec("ipvsadm", ["-A", "-t", server, "-s", "rr"], "").unwrap();
    }

    node.set_sysctl("net/ipv4/ip_forward", "0").unwrap();
    let exclude_cidrs = vec!["9.9.9.0/24".parse().unwrap()];
    web.restart(Options {
        exclude_cidrs,
        strict_arp: true,
        tcp_timeout: 1000,
        tcp_fin_timeout: 0,
        udp_timeout: 77,
    });
    web.kernel.sync(web.cluster.table(FAMILY), &Change::everything()).unwrap();
    let node = web.lab.node();
    assert_eq!(sysctl(node, "net/ipv4/conf/all/arp_ignore"), "1");
    assert_eq!(sysctl(node, "net/ipv4/conf/all/arp_announce"), "2");
    assert_eq!(sysctl(node, "net/ipv4/ip_forward"), "1");
    let timeouts = node.exec("ipvsadm", ["-l", "--timeout"], "").unwrap();
    assert_eq!(timeouts.trim(), format!("Timeout (tcp tcpfin udp): 1000 {tcp_fin} 77"));
    let servers = node.exec("ipvsadm", ["-Sn"], "").unwrap();
    assert!(servers.contains("9.9.9.1:80"), "excluded: {servers}");
    assert!(!servers.contains("9.9.8.1:80"), "nobody wants it: {servers}");
    assert!(servers.contains("10.96.0.1:80"));
}

fn watched() {
    let mut web = Web::new();
    assert!(web.kernel.backend.intact().unwrap());
    for damage in [
        "ipvsadm -C",
        "ipvsadm -A -t 9.9.9.9:80 -s rr",
        "iptables -t nat -F KUBE-SERVICES",
        "iptables -F INPUT",
        "ip link del kube-ipvs0",
    ] {
        web.lab.node().exec("sh", ["-c", damage], "").unwrap();
        assert!(!web.kernel.backend.intact().unwrap(), "{damage}");
        web.kernel.mirror = web.kernel.backend.observe().unwrap();
        web.kernel.sync(web.cluster.table(FAMILY), &Change::everything()).unwrap();
        assert!(web.kernel.backend.intact().unwrap(), "after {damage}");
    }
    web.pods(&[3]);
    web.edit(|service| service.ports.truncate(1));
    web.sync();
    assert!(web.kernel.backend.intact().unwrap(), "our own changes are no damage");
}

fn scheduled() {
    let mut web = Web::new();
    // `modprobe` knows what the kernel can load.
    let has = |scheduler: &str| {
        let found = Command::new("modprobe").args(["-n", "-q", &format!("ip_vs_{scheduler}")]).status();
        found.unwrap().success()
    };
    let mut driver = web
        .lab
        .node()
        .run(|| Ok(ModeDriver::new(Ipvs::new(Linux::open(FAMILY, Options::default())?), FAMILY)))
        .unwrap();
    driver.sync(web.cluster.table(FAMILY), &Step::Resync).unwrap();
    let mut lacking = Vec::new();
    for scheduler in Scheduler::KNOWN {
        let flags = if scheduler == "mh" { [true, true, false] } else { [false; 3] };
        let wanted = Scheduler { name: scheduler.into(), flags };
        web.edit(|service| service.scheduler = Some(Arc::new(wanted)));
        let change = web.cluster.take_change(FAMILY);
        let synced = driver.sync(web.cluster.table(FAMILY), &Step::Apply(change));
        let served = if has(scheduler) {
            assert_eq!(synced.unwrap().problems, [""; 0], "{scheduler}");
            scheduler
        } else {
            let error = synced.unwrap_err().to_string();
            assert!(
                error.contains(&format!("no scheduler {scheduler} (module ip_vs_{scheduler})")),
                "{error}"
            );
            let report = driver.sync(web.cluster.table(FAMILY), &Step::Resync).unwrap();
            assert_eq!(report.problems.len(), 2, "one for each port: {:?}", report.problems);
            for problem in &report.problems {
                assert!(problem.starts_with("ns/web:"), "{problem}");
                assert!(problem.contains("service.scheduler") && problem.contains("rr instead"), "{problem}");
            }
            lacking.push(scheduler);
            "rr"
        };
        let servers = web.lab.node().exec("ipvsadm", ["-Sn"], "").unwrap();
        let flags = if served == "mh" { " -b mh-fallback,mh-port" } else { "" };
        let line = format!("-A -t 10.96.0.1:80 -s {served}{flags}");
        assert!(servers.lines().any(|l| l.trim_end() == line), "{line} in {servers}");
        for seen in web.lab.client().probe_all(vec![probe(VIP, 80); 4]).unwrap() {
            assert!(seen.answer().is_some(), "{scheduler}: {seen}");
        }
    }
    // What it has been asked for once, and does not have, is no obstacle to anything any more.
    web.edit(|service| service.scheduler = None);
    let change = web.cluster.take_change(FAMILY);
    assert_eq!(driver.sync(web.cluster.table(FAMILY), &Step::Apply(change)).unwrap().problems, [""; 0]);
    println!("schedulers that this kernel lacks: {lacking:?}");
    assert!(lacking.len() < 4 && !lacking.is_empty(), "{lacking:?}");
}

/// SYNs that were sent again in a namespace.
fn repeated(namespace: &Namespace) -> u64 {
    let text = namespace.exec("cat", ["/proc/self/net/netstat"], "").unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let (_, value) = names
        .split_whitespace()
        .zip(values.split_whitespace())
        .find(|(name, _)| *name == "TCPSynRetrans")
        .unwrap();
    value.parse().unwrap()
}

fn reused() {
    const PORTS: usize = 100;
    let mut web = Web::new();
    web.pods(&[1, 2, 3, 4]);
    // Every port is used again every two seconds, while IPVS remembers its last connection for two minutes.
    web.lab.client().set_sysctl("net/ipv4/ip_local_port_range", "20000 20099").unwrap();
    let storm = |web: &Web| {
        let spec = StormSpec { probe: probe(VIP, 80), rate: 60, duration: Duration::from_mins(2) };
        web.lab.client().storm(spec).unwrap()
    };
    let under_way = storm(&web);
    let begin = Instant::now();
    let mut changes = 0_u8;
    while begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(200));
        changes = changes.wrapping_add(1);
        // Three of four: each is away for a while, and comes back.
        let pods: Vec<u8> = (1..=PODS).filter(|n| n % PODS != changes / 2 % PODS).collect();
        web.pods(&pods);
    }
    let report = under_way.stop().unwrap();
    let remembered = web.lab.node().exec("cat", ["/proc/net/ip_vs_conn"], "").unwrap();
    let remembered =
        remembered.lines().filter(|line| line.contains("WAIT") || line.contains("CLOSE")).count();
    println!("{changes} changes, {remembered} remembered: {report}");
    assert!(report.failures.is_empty(), "{report}");
    assert!(report.attempted > 5 * PORTS as u64, "ports are used again: {report}");
    assert!(remembered > PORTS / 2, "they are used again while IPVS remembers: {remembered}");

    // Most of what is remembered is of endpoints that are gone now.
    web.pods(&[1]);
    let now = Instant::now();
    web.tend(now);
    web.tend(now + DEADLINE);
    let again = storm(&web);
    std::thread::sleep(Duration::from_secs(3));
    let after = again.stop().unwrap();
    let repeated = repeated(web.lab.client());
    println!("{repeated} SYNs sent again in all; with one endpoint: {after}");
    assert!(after.failures.is_empty(), "{after}");
    assert_eq!(after.replies.keys().collect::<Vec<_>>(), ["pod1"]);
    // A kernel that makes them wait does so with most of them. One that gets no CPU for a second repeats some.
    let all = report.attempted + after.attempted;
    assert!(repeated * 50 < all, "{repeated} of {all} had to wait a second");
}

/// Each in a guest of its own.
macro_rules! in_guest {
    ($($name:ident: $test:ident),* $(,)?) => {
        mod ipvs {
            $(#[test] fn $name() {
                shunt_harness::guest::test_in_guest(module_path!(), stringify!($name), super::$test);
            })*
        }
    };
}

in_guest!(
    ports_of_the_node_are_closed_on_vips: closed,
    health_check_ports_are_open_on_a_closed_node: health_checked,
    settings_of_the_kernel_and_servers_of_others: tuned,
    what_is_flushed_is_noticed: watched,
    every_scheduler_serves_or_is_named: scheduled,
    source_ports_are_used_again_while_endpoints_change: reused,
);
