//! The lab itself, before anything is tested with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // Helpers of tests fail as tests do.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use shunt_harness::lab::{
    Lab, LabBuilder, Namespace, Outcome, Probe, Proto, StormSpec, TransferSpec, require_kernel,
};

fn ip(text: &str) -> IpAddr {
    text.parse().expect(text)
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

const NODE: [&str; 3] = ["192.168.0.2", "192.168.99.11", "fd00:192:168::2"];
const CLIENT: [&str; 4] = ["203.0.113.2", "203.0.113.77", "2001:db8::1", "2001:db8::77"];
const POD_A: [&str; 2] = ["10.180.0.1", "fd00:10:180::1"];
const POD_B: [&str; 2] = ["10.180.0.2", "fd00:10:180::2"];

fn describe() -> LabBuilder {
    Lab::builder()
        .node(NODE.map(ip))
        .client(CLIENT.map(ip))
        .pod("pod-a", POD_A.map(ip))
        .pod("pod-b", POD_B.map(ip))
        .remote("node-2", ["10.180.1.0/24", "fd00:10:180:1::/64"].map(|net| net.parse().expect(net)))
        .remote_pod("node-2", "pod-c", ["10.180.1.3", "fd00:10:180:1::3"].map(ip))
}

fn lab() -> Lab {
    let lab = describe().build().expect("lab");
    for namespace in lab.namespaces() {
        serve(namespace);
    }
    lab
}

fn serve(namespace: &Namespace) {
    namespace.serve_ports([80]).expect("serve");
    namespace.serve(["0.0.0.0", "::"].map(|any| (Proto::Sctp, at(any, 80)))).expect("serve");
}

/// Probes `to` from `from` and expects `pod` to answer, and to see the source address as it was sent.
fn reaches(from: &Namespace, source: &str, to: &str, pod: &str) {
    for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
        let probe = Probe::new(proto, at(to, 80)).from(ip(source));
        let outcome = from.probe(probe.clone()).expect("probe");
        let answer = outcome.answer().unwrap_or_else(|| panic!("{probe} in {}: {outcome}", from.name()));
        assert_eq!(
            (answer.pod.as_str(), answer.local, answer.peer.ip()),
            (pod, at(to, 80), ip(source)),
            "{probe}"
        );
    }
}

#[test]
fn everyone_reaches_everyone() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    let (node, client) = (lab.node(), lab.client());
    let (a, b, remote) = (lab.pod("pod-a").unwrap(), lab.pod("pod-b").unwrap(), lab.pod("node-2").unwrap());
    for family in 0..2 {
        let (pod_a, pod_b, pod_c) =
            (POD_A[family], POD_B[family], ["10.180.1.3", "fd00:10:180:1::3"][family]);
        let unnamed = ["10.180.1.200", "fd00:10:180:1::200"][family];
        let (near, far) = (NODE[family * 2], CLIENT[family * 2 + 1]);
        reaches(client, far, pod_a, "pod-a");
        reaches(client, far, pod_c, "pod-c");
        reaches(client, far, unnamed, "node-2");
        reaches(client, far, near, "node");
        reaches(a, pod_a, pod_b, "pod-b");
        reaches(a, pod_a, pod_a, "pod-a");
        reaches(a, pod_a, pod_c, "pod-c");
        reaches(a, pod_a, far, "client");
        reaches(b, pod_b, near, "node");
        reaches(node, near, pod_a, "pod-a");
        reaches(node, near, pod_c, "pod-c");
        reaches(node, near, far, "client");
        reaches(node, near, near, "node");
        reaches(remote, pod_c, pod_a, "pod-a");
        reaches(remote, unnamed, pod_a, "pod-a");
        reaches(remote, pod_c, far, "client");
    }
    reaches(node, "192.168.99.11", POD_A[0], "pod-a");
    reaches(node, "127.0.0.1", "127.0.0.1", "node");
    reaches(node, "::1", "::1", "node");
}

#[test]
fn the_first_address_is_the_default_source() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    for (from, to, source) in [
        (lab.node(), POD_A[0], NODE[0]),
        (lab.node(), POD_A[1], NODE[2]),
        (lab.client(), POD_A[0], CLIENT[0]),
        (lab.pod("pod-a").unwrap(), POD_B[1], POD_A[1]),
    ] {
        assert_eq!(from.probe(Probe::udp(at(to, 80))).unwrap().peer(), Some(ip(source)), "{to}");
    }
}

#[test]
fn refusal_and_silence_differ() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    lab.node()
        .nft(
            "table inet t {
               chain f { type filter hook forward priority 0;
                 th dport 81 drop
                 th dport 82 reject with icmpx admin-prohibited
                 tcp dport 83 reject with tcp reset
               }
               chain o { type filter hook output priority 0;
                 th dport 81 drop
                 th dport 82 reject with icmpx admin-prohibited
                 tcp dport 83 reject with tcp reset
               }
             }",
        )
        .unwrap();
    for pod in POD_A {
        let (closed, prohibited) = if ip(pod).is_ipv4() { ((3, 3), (3, 13)) } else { ((1, 4), (1, 1)) };
        for from in [lab.client(), lab.node()] {
            let ask = |proto, port| from.probe(Probe::new(proto, at(pod, port))).unwrap();
            assert_eq!(ask(Proto::Tcp, 79), Outcome::Refused { errno: Errno::ECONNREFUSED, icmp: None });
            assert_eq!(ask(Proto::Tcp, 83), Outcome::Refused { errno: Errno::ECONNREFUSED, icmp: None });
            for (proto, port, (kind, code)) in [
                (Proto::Udp, 79, closed),
                (Proto::Udp, 82, prohibited),
                (Proto::Tcp, 82, prohibited),
                (Proto::Sctp, 82, prohibited),
            ] {
                let outcome = ask(proto, port);
                let Outcome::Refused { errno, icmp: Some(icmp) } = &outcome else {
                    panic!("{} {proto} {pod} {port}: {outcome}", from.name());
                };
                assert_eq!((icmp.kind, icmp.code), (kind, code), "{proto} {port}");
                let expected = match (proto, port, ip(pod)) {
                    (_, 79, _) => Errno::ECONNREFUSED,
                    (_, _, IpAddr::V4(_)) => Errno::EHOSTUNREACH,
                    (_, _, IpAddr::V6(_)) => Errno::EACCES,
                };
                assert_eq!(*errno, expected, "{proto} {port}");
            }
            for proto in [Proto::Tcp, Proto::Udp, Proto::Sctp] {
                assert_eq!(from.probe(Probe::new(proto, at(pod, 81))).unwrap(), Outcome::Timeout);
            }
        }
    }
    // Nobody has this address, and nobody forwards in circles.
    assert_eq!(lab.client().probe(Probe::tcp(at("198.18.0.1", 80))).unwrap(), Outcome::Timeout);
}

#[test]
fn masquerading_shows() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    lab.node()
        .nft(
            "table inet t {
               chain d { type nat hook prerouting priority -100;
                 ip daddr 172.30.0.1 meta l4proto { tcp, sctp } th dport 443 dnat ip to 10.180.0.1:80
                 ip6 daddr fd00:172:30::1 meta l4proto { tcp, sctp } th dport 443 dnat ip6 to [fd00:10:180::1]:80
               }
               chain s { type nat hook postrouting priority 100; masquerade; }
             }",
        )
        .unwrap();
    for (service, pod, node) in [("172.30.0.1", POD_A[0], NODE[0]), ("fd00:172:30::1", POD_A[1], NODE[2])] {
        for from in [lab.client(), lab.pod("pod-b").unwrap(), lab.pod("pod-a").unwrap()] {
            for proto in [Proto::Tcp, Proto::Sctp] {
                let outcome = from.probe(Probe::new(proto, at(service, 443))).unwrap();
                let answer = outcome.answer().unwrap_or_else(|| panic!("{service} {proto}: {outcome}"));
                assert_eq!((answer.local, answer.peer.ip()), (at(pod, 80), ip(node)), "{}", from.name());
            }
        }
    }
}

#[test]
fn many_probes_at_once() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    let mut probes = Vec::new();
    for number in 0..50 {
        let proto = if number % 2 == 0 { Proto::Tcp } else { Proto::Udp };
        probes.push(Probe::new(proto, at(POD_A[0], 80)));
        probes.push(Probe::new(proto, at(POD_B[1], 80)).from(ip(CLIENT[2])));
        probes.push(Probe::new(proto, at("10.180.1.9", 9)));
        probes.push(Probe::new(proto, at("198.18.0.1", 80)));
    }
    let begin = Instant::now();
    let outcomes = lab.client().probe_all(probes).unwrap();
    eprintln!("200 probes: {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    for (number, outcome) in outcomes.iter().enumerate() {
        match number % 4 {
            0 => assert_eq!(outcome.pod(), Some("pod-a")),
            1 => assert_eq!(outcome.peer(), Some(ip(CLIENT[2]))),
            2 => assert!(outcome.is_refused(), "{outcome}"),
            _ => assert!(outcome.is_timeout(), "{outcome}"),
        }
    }
}

#[test]
fn topology_changes_while_running() {
    if !require_kernel() {
        return;
    }
    let mut lab = lab();
    let new = at("10.180.0.9", 80);
    assert!(lab.client().probe(Probe::tcp(new)).unwrap().is_timeout());
    serve(lab.add_pod("pod-new", &[new.ip(), ip("fd00:10:180::9")]).unwrap());
    reaches(lab.client(), CLIENT[0], "10.180.0.9", "pod-new");
    reaches(lab.node(), NODE[2], "fd00:10:180::9", "pod-new");
    lab.pod("pod-new").unwrap().stop_serving(Proto::Tcp, at("0.0.0.0", 80)).unwrap();
    assert!(lab.client().probe(Probe::tcp(new)).unwrap().is_refused());
    lab.remove("pod-new").unwrap();
    assert!(lab.client().probe(Probe::tcp(new)).unwrap().is_timeout());

    lab.add_node_address(ip("192.168.7.7")).unwrap();
    reaches(lab.client(), CLIENT[0], "192.168.7.7", "node");
    lab.remove_node_address(ip("192.168.7.7")).unwrap();
    assert!(lab.client().probe(Probe::tcp(at("192.168.7.7", 80))).unwrap().is_timeout());

    lab.add_address("pod-a", "10.180.0.33/32".parse().unwrap()).unwrap();
    reaches(lab.client(), CLIENT[0], "10.180.0.33", "pod-a");
    lab.remove_address("pod-a", ip("10.180.0.33")).unwrap();
    assert!(lab.client().probe(Probe::tcp(at("10.180.0.33", 80))).unwrap().is_timeout());
}

#[test]
fn a_source_must_be_owned() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    let probe = Probe::udp(at(POD_A[0], 80)).from(ip("198.51.100.1"));
    assert!(lab.client().probe(probe.clone()).is_err());
    // Sent, but answered to somebody else.
    let outcome = lab.client().probe(Probe { foreign: true, ..probe.clone() }).unwrap();
    assert!(outcome.is_timeout(), "{outcome}");
    lab.add_address("client", "198.51.100.0/24".parse().unwrap()).unwrap();
    assert_eq!(lab.client().probe(probe).unwrap().peer(), Some(ip("198.51.100.1")));
}

#[test]
fn storm_and_transfer() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    let spec = TransferSpec { probe: Probe::tcp(at(POD_A[1], 80)), pace: Some(4_000_000), limit: None };
    let transfer = lab.client().transfer(&spec).unwrap();
    let mut talk = lab.client().converse(&Probe::tcp(at(POD_A[0], 80))).unwrap();
    let spec = StormSpec { probe: Probe::tcp(at(POD_B[0], 80)), rate: 500, duration: Duration::from_secs(1) };
    let report = lab.client().storm(spec).unwrap().join().unwrap();
    eprintln!("{report}");
    assert!((450..=510).contains(&report.attempted), "{report}");
    assert_eq!((report.failures.len(), report.replies["pod-b"]), (0, report.attempted), "{report}");
    assert_eq!(talk.ask().unwrap().pod, "pod-a");
    assert_eq!(talk.ask().unwrap().peer, talk.stream().local_addr().unwrap());
    let report = transfer.stop().unwrap();
    assert!(report.bytes > 1_000_000, "{report:?}");

    // A storm and a transfer which fail say so.
    let spec =
        StormSpec { probe: Probe::tcp(at(POD_B[0], 9)), rate: 100, duration: Duration::from_millis(100) };
    let report = lab.client().storm(spec).unwrap().join().unwrap();
    assert_eq!(report.failures.len() as u64, report.attempted, "{report}");
    let spec = TransferSpec { probe: Probe::tcp(at(POD_A[1], 80)), pace: None, limit: None };
    let transfer = lab.client().transfer(&spec).unwrap();
    lab.node()
        .nft(
            "table inet t {
               chain f { type filter hook forward priority 0; tcp dport 80 reject with tcp reset; }
             }",
        )
        .unwrap();
    assert!(transfer.join().is_err());
}

#[test]
fn foreign_programs_run_inside() {
    if !require_kernel() {
        return;
    }
    let lab = lab();
    assert_eq!(lab.node().sysctl("net/ipv4/ip_forward").unwrap(), "1");
    lab.node().set_sysctl("net/ipv4/conf/all/route_localnet", "1").unwrap();
    assert_eq!(lab.node().sysctl("net/ipv4/conf/all/route_localnet").unwrap(), "1");

    let by_itself = lab.client().command("ip").args(["-br", "address"]).output().unwrap();
    assert!(String::from_utf8_lossy(&by_itself.stdout).contains("203.0.113.77"), "{by_itself:?}");
    assert!(lab.node().exec("ip", ["route"], "").unwrap().contains("10.180.0.1 dev"));
    let error = lab.node().nft("nonsense").unwrap_err();
    assert!(error.to_string().contains("nonsense"), "{error:#}");

    let mut sleep = Command::new("sh");
    sleep.args([
        "-c",
        "echo up; echo $GREETING >&2; trap 'echo bye; exit 3' TERM; while :; do sleep 0.01; done",
    ]);
    let mut child = lab.node().spawn(sleep.env("GREETING", "hello")).unwrap();
    child.wait_for("up", Duration::from_secs(5)).unwrap();
    child.wait_for("hello", Duration::from_secs(5)).unwrap();
    assert!(child.wait_for("never", Duration::from_millis(20)).is_err());
    assert_eq!(child.stop().unwrap().code(), Some(3));
    child.wait_for("bye", Duration::from_secs(1)).unwrap();
    assert!(lab.node().spawn(&Command::new("sleep")).is_ok());
}

#[test]
fn many_labs_in_parallel() {
    if !require_kernel() {
        return;
    }
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let begin = Instant::now();
                let lab = lab();
                eprintln!("lab of 5 namespaces, 8 at once: {:?}", begin.elapsed());
                reaches(lab.client(), CLIENT[0], POD_A[0], "pod-a");
                reaches(lab.client(), CLIENT[2], "fd00:10:180:1::3", "pod-c");
            });
        }
    });
}

#[test]
fn a_lab_is_quick() {
    if !require_kernel() {
        return;
    }
    let begin = Instant::now();
    let lab = describe().pod("pod-d", [ip("10.180.0.4")]).pod("pod-e", [ip("10.180.0.5")]).build().unwrap();
    let built = begin.elapsed();
    drop(lab);
    eprintln!("lab of 7 namespaces: {built:?}, dropped after {:?}", begin.elapsed());
    assert!(built < Duration::from_secs(2), "{built:?}");
}

/// The processes with a thread in the network namespace of this inode, and this process if it has a handle on it.
fn holders(inode: u64) -> Vec<String> {
    let same = |path: &Path| std::fs::metadata(path).is_ok_and(|file| file.ino() == inode);
    let list = |path: PathBuf| {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut holders = Vec::new();
    for process in list("/proc".into()) {
        for task in list(process.join("task")) {
            if same(&task.join("ns/net")) {
                holders.push(task.display().to_string());
            }
        }
    }
    holders
        .extend(list("/proc/self/fd".into()).iter().filter(|fd| same(fd)).map(|fd| fd.display().to_string()));
    holders
}

fn inodes(lab: &Lab) -> Vec<u64> {
    lab.namespaces().map(|namespace| std::fs::metadata(namespace.path()).unwrap().ino()).collect()
}

fn run_netns() -> Option<Vec<std::ffi::OsString>> {
    let mut names: Vec<_> =
        std::fs::read_dir("/run/netns").ok()?.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    Some(names)
}

fn machine_links() -> String {
    std::fs::read_to_string("/proc/thread-self/net/dev").unwrap()
}

/// Some namespaces end on another thread's time: wait for that, not for ever.
fn wait_for_nobody(inodes: &[u64]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let left: Vec<_> = inodes.iter().flat_map(|inode| holders(*inode)).collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "left behind: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn nothing_is_left_behind() {
    if !require_kernel() {
        return;
    }
    let names = run_netns();
    let built = |panics: bool| {
        let lab = describe().link_prefix("leak").build().unwrap();
        lab.pod("pod-a").unwrap().serve_ports([80]).unwrap();
        let _child = lab.node().spawn(Command::new("sleep").arg("1000")).unwrap();
        let inodes = inodes(&lab);
        assert!(inodes.iter().all(|inode| !holders(*inode).is_empty()));
        assert!(lab.link("pod-a").unwrap().starts_with("leak"));
        assert!(!machine_links().contains("leak"));
        if panics {
            std::panic::panic_any(inodes);
        }
        inodes
    };
    wait_for_nobody(&built(false));
    let panicked = std::panic::catch_unwind(|| built(true)).unwrap_err();
    wait_for_nobody(panicked.downcast_ref::<Vec<u64>>().unwrap());
    assert!(!machine_links().contains("leak"));
    assert_eq!(run_netns(), names);
}

/// Not a test: what `a_killed_process_leaves_nothing` runs and kills.
#[test]
#[ignore = "waits to be killed"]
fn helper_waits_to_be_killed() {
    if std::env::var_os("SHUNT_LAB_HELPER").is_none() {
        return;
    }
    let lab = lab();
    let _child = lab.node().spawn(Command::new("sleep").arg("1000")).unwrap();
    eprintln!("inodes {:?} ready", inodes(&lab));
    std::thread::sleep(Duration::from_mins(1));
}

#[test]
fn a_killed_process_leaves_nothing() {
    if !require_kernel() {
        return;
    }
    let lab = Lab::builder().build().unwrap();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper
        .args(["--exact", "helper_waits_to_be_killed", "--ignored", "--nocapture"])
        .env("SHUNT_LAB_HELPER", "1");
    let mut helper = lab.client().spawn(&helper).unwrap();
    helper.wait_for("ready", Duration::from_secs(10)).unwrap();
    let stderr = helper.stderr();
    let inodes: Vec<u64> = stderr
        .split_once("inodes [")
        .and_then(|(_, rest)| rest.split_once(']'))
        .map(|(inodes, _)| inodes.split(", ").map(|inode| inode.parse().unwrap()).collect())
        .unwrap();
    assert_eq!(inodes.len(), 5);
    // The node (its thread waits there for the child), the child; the pods' servers.
    assert!(inodes.iter().all(|inode| !holders(*inode).is_empty()), "{inodes:?}");
    helper.kill().unwrap();
    wait_for_nobody(&inodes);
}
