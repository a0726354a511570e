//! Maps of ebpf mode that become others while connections are open: larger and smaller ones, and of other layouts; and
//! what is in them for longer than it should.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::Config;
use shunt_core::table::Change;
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Lab, Namespace, Probe, require_kernel};
use shunt_mode::Backend as _;
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::kernel::{Bpf, Options};
use shunt_mode_ebpf::sizes::Limits;
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::ebpf::small::{
    NODE, NODE6, cluster, cluster_ip, lab, pod, pod_of, ready, service_of, slice_of, start_of, under_load,
};

/// Room for the flows of a test: what is not used is forgotten first, also while it may be used again.
const FLOWS: u32 = 32_768;
const SMALL: Limits = Limits { frontends: 64, endpoints: 64, flows: FLOWS, clients: 1024, maglev: 8 };

fn with(options: &Options, limits: Limits) -> Arc<Options> {
    let Limits { frontends, endpoints, flows, clients, maglev } = limits;
    Arc::new(Options { frontends, endpoints, flows, clients, maglev, ..options.clone() })
}

/// Services 1 of TCP and 2 of UDP for IPv4, 3 and 4 for IPv6, of two pods each.
fn town() -> Cluster {
    let mut cluster = cluster(Config::default());
    for (n, family, protocol) in [
        (1, IpFamily::V4, Protocol::Tcp),
        (2, IpFamily::V4, Protocol::Udp),
        (3, IpFamily::V6, Protocol::Tcp),
        (4, IpFamily::V6, Protocol::Udp),
    ] {
        let endpoints = ready([1, 2].map(|n| pod_of(family, n)));
        cluster.steps(&[service_of(family, n, protocol, None), slice_of(family, n, protocol, &endpoints)]);
    }
    cluster
}

/// A process starts and does what there is to do; what the kernel then holds is what it should.
fn run(lab: &Lab, options: &Arc<Options>, cluster: &Cluster) -> [Synced<Ebpf<Bpf>>; 2] {
    // Both families are read before the first is written, as the agent does.
    let mut kernels = IpFamily::ALL.map(|family| start_of(family, lab, options));
    for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
        kernel.sync(cluster.table(family), &Change::everything()).unwrap();
    }
    for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
        assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror, "{family}");
        assert_eq!(kernel.mirror.installed, !cluster.table(family).is_empty());
        let again = kernel.plan(cluster.table(family), &Change::everything());
        assert!(again.is_empty(), "{family}: a restart would do\n{again}");
    }
    kernels
}

/// Limits of the maps that are there.
fn limits(kernels: &mut [Synced<Ebpf<Bpf>>; 2]) -> Limits {
    kernels[0].backend.kernel().held_limits().unwrap().unwrap()
}

/// A UDP socket of the node's own process that names the Service each time.
struct Asker {
    socket: UdpSocket,
    to: SocketAddr,
}

impl Asker {
    fn new(lab: &Lab, family: IpFamily, n: u8) -> Self {
        let any = if family == IpFamily::V4 { "0.0.0.0:0" } else { "[::]:0" };
        let socket = lab.node().run(|| Ok(UdpSocket::bind(any)?)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        Self { socket, to: SocketAddr::new(cluster_ip(family, n), 80) }
    }

    /// Which pod answers, as the Service.
    fn ask(&self, lab: &Lab) -> String {
        let ask = || {
            self.socket.send_to(b"who\n", self.to)?;
            let mut answer = [0; 2048];
            let (length, from) = self.socket.recv_from(&mut answer)?;
            assert_eq!(from, self.to, "who has answered");
            Ok(String::from_utf8_lossy(&answer[..length]).split(' ').next().unwrap_or_default().to_owned())
        };
        lab.node().run(ask).unwrap()
    }
}

/// Files under which programs are pinned; a program that is loaded anew gets another one.
fn pinned_programs(options: &Options) -> BTreeMap<OsString, u64> {
    let folder = options.bpf_root.join("shunt").join("programs");
    let files = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    files.map(|file| (file.file_name(), file.metadata().unwrap().ino())).collect()
}

/// At a start programs are loaded while the objects are on their way. They serve nobody before the first sync, which
/// takes them as they are; a process that ends before leaves what the next one takes.
#[test]
fn programs_are_loaded_ahead_of_the_first_sync() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = with(&lab.node().run(place::options).unwrap(), SMALL);
    let cluster = town();
    let table = cluster.table(IpFamily::V4);
    let target = SocketAddr::new(NODE, 3001);
    let serves = || lab.client().probe(Probe::tcp(target)).unwrap().pod().is_some();
    let mut kernel = start_of(IpFamily::V4, &lab, &options);
    assert!(kernel.backend.kernel().held_limits().unwrap().is_some());
    assert!(!kernel.backend.observe().unwrap().installed && !serves());
    let loaded = pinned_programs(&options);
    assert!(!loaded.is_empty());
    kernel.sync(table, &Change::everything()).unwrap();
    assert!(serves());
    assert_eq!(pinned_programs(&options), loaded);

    kernel.backend.cleanup().unwrap();
    assert!(!serves());
    drop(start_of(IpFamily::V4, &lab, &options));
    let mut kernel = start_of(IpFamily::V4, &lab, &options);
    assert!(!kernel.mirror.installed && !serves());
    kernel.sync(table, &Change::everything()).unwrap();
    assert!(serves());
    assert!(kernel.plan(table, &Change::everything()).is_empty());
}

/// Has connections to the targets come from the same ports again soon, while the flows before are still remembered.
fn few_ports(targets: &[(&Namespace, SocketAddr)]) {
    for (from, _) in targets {
        from.set_sysctl("net/ipv4/ip_local_port_range", "20000 20999").unwrap();
    }
}

/// Larger and smaller maps, of every kind, one after the other, while connections are opened and others are open: none
/// breaks or moves.
#[test]
fn maps_grow_and_shrink_under_load() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = lab.node().run(place::options).unwrap();
    let cluster = town();
    let mut kernels = run(&lab, &with(&options, SMALL), &cluster);
    assert_eq!(limits(&mut kernels), SMALL);
    let targets = [
        (lab.client(), SocketAddr::new(NODE, 3001)),
        (lab.client(), SocketAddr::new(NODE6, 3003)),
        (lab.pod("10.180.0.1").unwrap(), SocketAddr::new(cluster_ip(IpFamily::V4, 1), 80)),
        (lab.node(), SocketAddr::new(cluster_ip(IpFamily::V4, 1), 80)),
        (lab.node(), SocketAddr::new(cluster_ip(IpFamily::V6, 3), 80)),
    ];
    let askers: Vec<Asker> = [(IpFamily::V4, 2), (IpFamily::V6, 4)]
        .into_iter()
        .flat_map(|(f, n)| [(); 4].map(|()| Asker::new(&lab, f, n)))
        .collect();
    let from_outside = |node: IpAddr, service: u16, port: u16| {
        let probe = Probe::udp(SocketAddr::new(node, 3000 + service)).from_port(port);
        lab.client().probe(probe.timeout(Duration::from_secs(2))).unwrap().pod().unwrap().to_owned()
    };
    let homes = || -> Vec<String> {
        let of_askers = askers.iter().map(|asker| asker.ask(&lab));
        let outside =
            (20_000..20_006).flat_map(|port| [from_outside(NODE, 2, port), from_outside(NODE6, 4, port)]);
        of_askers.chain(outside).collect()
    };
    let first = homes();
    assert!(first.contains(&"pod=10.180.0.1".to_owned()) || first.contains(&"pod=10.180.0.2".to_owned()));
    few_ports(&targets);
    under_load(200, &targets, |_| {
        for limits_then in [
            Limits { flows: 2 * FLOWS, ..SMALL },
            Limits { frontends: 512, endpoints: 1000, flows: 2 * FLOWS, clients: 64, maglev: 4 },
            Limits { frontends: 512, endpoints: 100, flows: 2 * FLOWS, clients: 2048, maglev: 16 },
            Limits { frontends: 128, endpoints: 3000, flows: FLOWS / 2, clients: 2048, maglev: 16 },
            SMALL,
        ] {
            let mut kernels = run(&lab, &with(&options, limits_then), &cluster);
            assert_eq!(limits(&mut kernels), limits_then);
            assert_eq!(homes(), first, "after {limits_then:?}");
        }
    });
    run(&lab, &with(&options, SMALL), &cluster)[0].backend.cleanup().unwrap();
    assert!(!options.bpf_root.join("shunt").exists());
}

/// What does not fit into smaller maps keeps the ones that it has, is served, and is named.
#[test]
fn maps_that_are_in_use_do_not_become_too_small() {
    if !require_kernel() {
        return;
    }
    let lab = lab(1);
    let options = lab.node().run(place::options).unwrap();
    let services = |count: u8| {
        let mut cluster = cluster(Config::default());
        for n in 1..=count {
            // All but the first of the pods there are not.
            let pods = if n == 20 { 1..=1 } else { 1..=8 };
            cluster.steps(&[
                service_of(IpFamily::V4, n, Protocol::Tcp, None),
                slice_of(IpFamily::V4, n, Protocol::Tcp, &ready(pods.map(pod))),
            ]);
        }
        cluster
    };
    let cluster = services(20);
    let large = Limits { frontends: 256, endpoints: 1024, ..SMALL };
    run(&lab, &with(&options, large), &cluster);
    let small = Limits { frontends: 50, endpoints: 250, flows: 2048, ..SMALL };
    let mut kernels = run(&lab, &with(&options, small), &cluster);
    // Ids go up in steps of two from 16 and 2.
    let said: Vec<&str> = kernels[0].backend.kernel().refused_limits().collect();
    assert_eq!(
        said,
        [
            "--ebpf-endpoints-max (ebpf.endpointsMax) is 250, but what is there needs 307: the maps keep room for 1024",
            "--ebpf-frontends-max (ebpf.frontendsMax) is 50, but what is there needs 55: the maps keep room for 256",
        ]
    );
    assert_eq!(limits(&mut kernels), Limits { flows: 2048, ..large });
    let probe = Probe::tcp(SocketAddr::new(NODE, 3020)).timeout(Duration::from_secs(2));
    lab.client().probe(probe).unwrap().pod().unwrap();
    // With fewer Services there is room. Ids do not move.
    let fewer = services(5);
    run(&lab, &with(&options, large), &fewer);
    let mut kernels = run(&lab, &with(&options, small), &fewer);
    let said: Vec<String> = kernels[0].backend.kernel().refused_limits().map(str::to_owned).collect();
    assert_eq!((limits(&mut kernels), said), (small, Vec::new()));
    kernels[0].backend.cleanup().unwrap();
}

/// What the process of the next test is told: folder of the bpffs, cgroup, flows.
const CHANGES: &str = "SHUNT_TEST_CHANGES_MAPS";

/// The process that is killed, in the node's network namespace; nothing unless it is asked for.
#[test]
fn a_process_that_changes_maps() {
    let Ok(told) = std::env::var(CHANGES) else { return };
    let mut told = told.split(' ');
    let mut next = || told.next().unwrap();
    let (bpf_root, cgroup_root) = (next().into(), Some(next().into()));
    let options = Options { bpf_root, cgroup_root, ..Options::default() };
    let options = with(&options, Limits { flows: next().parse().unwrap(), ..SMALL });
    let cluster = town();
    for family in IpFamily::ALL {
        let mut kernel = Synced::adopt(Ebpf::new(Bpf::open(family, options.clone()).unwrap())).unwrap();
        // What a process before has left half-done is ended first, and read again.
        if kernel.sync(cluster.table(family), &Change::everything()).is_err() {
            kernel.mirror = kernel.backend.observe().unwrap();
            kernel.sync(cluster.table(family), &Change::everything()).unwrap();
        }
    }
    println!("done");
}

/// Processes are killed while they put maps of other sizes in the place of those in use, at any time: what was in use
/// goes on, and the next start goes on from there.
#[test]
fn a_crash_in_between_breaks_no_connection() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = lab.node().run(place::options).unwrap();
    let cluster = town();
    run(&lab, &with(&options, SMALL), &cluster);
    let targets = [
        (lab.client(), SocketAddr::new(NODE, 3001)),
        (lab.client(), SocketAddr::new(NODE6, 3003)),
        (lab.node(), SocketAddr::new(cluster_ip(IpFamily::V4, 1), 80)),
    ];
    let asker = Asker::new(&lab, IpFamily::V4, 2);
    let home = asker.ask(&lab);
    let folder = options.bpf_root.join("shunt");
    let cgroup = options.cgroup_root.as_ref().unwrap();
    let (mut killed, mut half_done) = (0, 0);
    few_ports(&targets);
    under_load(400, &targets, |_| {
        for n in 0..27_u32 {
            // Three processes are to make the same change; when the second one begins, at most the first has made it.
            let flows = if n / 3 % 2 == 0 { 2 * FLOWS } else { FLOWS };
            let mut process = lab.node().command(std::env::current_exe().unwrap());
            process.args(["--exact", "a_process_that_changes_maps", "--nocapture"]);
            process.env(CHANGES, format!("{} {} {flows}", options.bpf_root.display(), cgroup.display()));
            let mut process = process.stdout(std::process::Stdio::null()).spawn().unwrap();
            // One anywhere, one while maps are taken into use, which does not take long, and one goes on to its end.
            match n % 3 {
                0 => sleep(Duration::from_millis(10 + 20 * u64::from(n))),
                1 => {
                    while !folder.join("maps-next").exists() && process.try_wait().unwrap().is_none() {
                        sleep(Duration::from_micros(200));
                    }
                    sleep(Duration::from_millis(3 * u64::from(n)));
                }
                _ => drop(process.wait().unwrap()),
            }
            if process.try_wait().unwrap().is_none() {
                process.kill().unwrap();
                process.wait().unwrap();
                killed += 1;
            }
            half_done += u32::from(folder.join("maps-next").exists());
            assert_eq!(asker.ask(&lab), home, "after process {n}");
        }
        let kernels = IpFamily::ALL.map(|family| start_of(family, &lab, &with(&options, SMALL)));
        for (family, mut kernel) in IpFamily::ALL.into_iter().zip(kernels) {
            if kernel.sync(cluster.table(family), &Change::everything()).is_err() {
                kernel.mirror = kernel.backend.observe().unwrap();
                kernel.sync(cluster.table(family), &Change::everything()).unwrap();
            }
        }
        let mut kernels = run(&lab, &with(&options, SMALL), &cluster);
        assert_eq!(limits(&mut kernels), SMALL);
    });
    println!("{killed} processes were killed, {half_done} of them while maps were taken into use");
    assert!(killed > 0 && half_done > 0);
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
    run(&lab, &with(&options, SMALL), &cluster)[0].backend.cleanup().unwrap();
    assert!(!folder.exists());
}

/// Maps of another version of the agent, whose layout nobody here knows, make room for new ones: connections of sockets
/// go on, and new ones are served throughout.
#[test]
fn maps_of_another_layout_are_replaced() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = lab.node().run(place::options).unwrap();
    let (small, cluster) = (with(&options, SMALL), town());
    let targets = [(lab.node(), SocketAddr::new(cluster_ip(IpFamily::V4, 1), 80))];
    let served = || {
        for (node, service) in [(NODE, 3001), (NODE6, 3003)] {
            let probe = Probe::tcp(SocketAddr::new(node, service)).timeout(Duration::from_secs(2));
            assert!(lab.client().probe(probe).unwrap().pod().is_some());
        }
    };
    let maps = options.bpf_root.join("shunt/maps");
    for other_version in [true, false] {
        let mut kernels = run(&lab, &small, &cluster);
        served();
        under_load(100, &targets, |_| {
            let why = if other_version {
                kernels[0].backend.kernel().pretend("version 77 object 0123456789abcdef").unwrap();
                "the maps have layout version 77"
            } else {
                // Somebody who had other flows.
                std::fs::rename(maps.join("fragments"), maps.join("flows")).unwrap();
                "elements of map flows have 40+4 bytes, not 40+64"
            };
            assert_eq!(kernels[0].backend.kernel().foreign().unwrap().as_deref(), Some(why));
            run(&lab, &small, &cluster);
            served();
        });
        assert_eq!(kernels[0].backend.kernel().foreign().unwrap(), None);
    }
    run(&lab, &small, &cluster)[0].backend.cleanup().unwrap();
    assert!(!options.bpf_root.join("shunt").exists());
}

/// Memory for names comes bit by bit there, at the next tick.
#[test]
fn many_services_are_written_in_the_oldest_kernel() {
    test_in_guest(module_path!(), "many_services_are_written_in_the_oldest_kernel", || {
        let lab = lab(2);
        let options = lab.node().run(place::options).unwrap();
        let mut cluster = cluster(Config::default());
        for n in 1..=100 {
            let family = IpFamily::ALL[usize::from(n % 2)];
            let endpoints = ready([1, 2].map(|n| pod_of(family, n)));
            let service = service_of(family, n, Protocol::Tcp, None);
            cluster.steps(&[service, slice_of(family, n, Protocol::Tcp, &endpoints)]);
        }
        run(&lab, &options, &cluster);
    });
}

/// A connection that is open and quiet outlives many more short ones than there is room for, if those that are over are
/// swept; and the table is where that is decided: without it the connection is forgotten.
#[test]
fn short_connections_do_not_push_out_a_quiet_one() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = lab.node().run(place::options).unwrap();
    let options = with(&options, Limits { flows: 2048, ..SMALL });
    let options = Arc::new(Options { tcp_transient_timeout: 1, ..Options::clone(&options) });
    let cluster = town();
    let mut kernels = run(&lab, &options, &cluster);
    let to = Probe::tcp(SocketAddr::new(NODE, 3001)).timeout(Duration::from_secs(2));
    for swept in [true, false] {
        let mut quiet = lab.client().converse(&to).unwrap();
        quiet.ask().unwrap();
        for round in 0..8 {
            // Four entries each, nearly half of the table.
            for _ in 0..10 {
                let connections = lab.client().probe_all(vec![to.clone(); 20]).unwrap();
                let failed = connections.iter().find(|seen| seen.pod().is_none());
                assert!(failed.is_none(), "round {round}, swept {swept}: {failed:?}");
            }
            sleep(Duration::from_millis(1300));
            if swept {
                let Synced { backend, mirror } = &mut kernels[0];
                let mut due = Instant::now();
                for _ in 0..8 {
                    let began = due;
                    due = backend.ripen(mirror, began).unwrap().1.unwrap();
                    if due - began > Duration::from_secs(1) {
                        break;
                    }
                }
            }
        }
        let answer = quiet.ask();
        assert_eq!(answer.is_ok(), swept, "{answer:?}");
    }
    kernels[0].backend.cleanup().unwrap();
}

/// More connections from outside than there are ports for masqueraded ones, one after the other: those that are over give
/// theirs back long before they are forgotten.
#[test]
fn ports_of_connections_that_are_over_are_taken_again() {
    if !require_kernel() {
        return;
    }
    let lab = lab(1);
    // Leaves 2,076 ports.
    lab.node().set_sysctl("net/ipv4/ip_local_port_range", "3100 65535").unwrap();
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster(Config::default());
    let endpoints = ready([pod(1)]);
    cluster.steps(&[
        service_of(IpFamily::V4, 1, Protocol::Tcp, None),
        slice_of(IpFamily::V4, 1, Protocol::Tcp, &endpoints),
    ]);
    let mut kernels = run(&lab, &options, &cluster);
    let to = Probe::tcp(SocketAddr::new(NODE, 3001)).timeout(Duration::from_secs(2));
    let mut quiet = lab.client().converse(&to).unwrap();
    let peer = quiet.ask().unwrap().peer;
    assert!((1024..3100).contains(&peer.port()), "{peer}");
    for round in 0..50 {
        let connections = lab.client().probe_all(vec![to.clone(); 100]).unwrap();
        let failed = connections.iter().find(|seen| seen.pod().is_none());
        assert!(failed.is_none(), "round {round}: {failed:?}");
    }
    assert_eq!(quiet.ask().unwrap().peer, peer);
    kernels[0].backend.cleanup().unwrap();
}

/// What it takes to look through the table at rest, and through a full one.
#[test]
fn sweeping_costs_little() {
    if !require_kernel() {
        return;
    }
    let lab = lab(1);
    let options = lab.node().run(place::options).unwrap();
    let options = Arc::new(Options { flows: Options::default().flows, ..Options::clone(&options) });
    let mut kernels = run(&lab, &options, &town());
    let Synced { backend, mirror } = &mut kernels[0];
    let mut pass = |what: &str, flows: u32, seconds: u64| {
        backend.kernel().remember_flows(flows, seconds).unwrap();
        let (mut now, mut steps, mut longest) = (Instant::now(), 0, Duration::ZERO);
        let began = Instant::now();
        loop {
            let at = Instant::now();
            let next = backend.ripen(mirror, now).unwrap().1.unwrap();
            longest = longest.max(at.elapsed());
            steps += 1;
            if next - now > Duration::from_secs(1) {
                let (all, every) = (began.elapsed(), next - now);
                println!("{what}: {all:?} in {steps} steps, the longest {longest:?}, every {every:?}");
                break (all, longest);
            }
            now = next;
        }
    };
    assert!(pass("no flows", 0, 0).0 < Duration::from_millis(50));
    pass("200,000 flows", 200_000, 1);
    assert!(pass("200,000 flows whose time is over", 200_000, 600).1 < Duration::from_millis(200));
    assert!(pass("no flows", 0, 0).0 < Duration::from_millis(50));
    kernels[0].backend.cleanup().unwrap();
}
