//! What only ebpf mode has: programs that are adopted and replaced, maps of a size.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};
use object::{Object as _, ObjectSection as _, SectionKind};
use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::Change;
use shunt_core::walk::{Outcome, Packet};
use shunt_ebpf_abi::map;
use shunt_ebpf_tests::tun::Tun;
use shunt_harness::cases;
use shunt_harness::lab::{Lab, Probe, require_kernel};
use shunt_mode::{Backend, Transaction, rendered};
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::fake::FakeKernel;
use shunt_mode_ebpf::kernel::{Bpf, Options};
use shunt_mode_ebpf::op::Op;
use shunt_mode_ebpf::state::Sizes;
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::ebpf::small::under_load;
use shunt_suites::mode::{EbpfMode, ModeUnderTest};
use shunt_suites::random::Step;

const V4: IpFamily = IpFamily::V4;

fn service(n: u32, node_port: Option<u16>) -> Step {
    let [_, high, middle, low] = n.to_be_bytes();
    Step::Event(Event::Service(Service {
        scheduler: None,
        algorithm: None,
        name: NamespacedName::new("ns", format!("svc{n}")),
        created: 0,
        cluster_ips: vec![[172, 16 + high, middle, low].into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        health_check_node_port: None,
    }))
}

fn slice(n: u32, addresses: &[IpAddr]) -> Step {
    Step::Event(Event::Slice(EndpointSlice {
        name: NamespacedName::new("ns", format!("svc{n}-1")),
        service: NamespacedName::new("ns", format!("svc{n}")),
        family: V4,
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses
            .iter()
            .map(|address| Endpoint {
                pod: None,
                address: *address,
                conditions: Conditions::default(),
                node: Some(cases::NODE.into()),
                zone: None,
                hints: None,
            })
            .collect(),
        last_change_trigger: None,
    }))
}

fn cluster() -> Cluster {
    let mut cluster = Cluster::new(Context::new(cases::NODE, Config::default()));
    cluster.step(&Step::Event(Event::Node(Node {
        name: cases::NODE.into(),
        addresses: vec![[192, 168, 0, 2].into()],
        ..Node::default()
    })));
    cluster
}

fn start(lab: &Lab, options: &Arc<Options>) -> Synced<Ebpf<Bpf>> {
    lab.node().run(|| Ok(Synced::adopt(Ebpf::new(Bpf::open(V4, options.clone())?))?)).unwrap()
}

/// The programs as another compiler might have made them: constants are put into the lower halves of registers, which
/// clears the upper halves, wherever they were put into whole ones. Every program becomes another one to the kernel.
/// And it shows which build runs: a bind to a node port fails with `EACCES` instead of `EADDRINUSE`.
fn other_build(object: &[u8]) -> Vec<u8> {
    const LOAD: u8 = 0x18;
    const MOVE: u8 = 0xb7;
    const MOVE_LOWER_HALF: u8 = 0xb4;
    let constant = |n: i32| n.to_le_bytes();
    let (in_use, no_access) = (constant(-98), constant(-13));
    let mut other = object.to_vec();
    let file = object::File::parse(object).unwrap();
    let code = file.sections().filter(|section| section.kind() == SectionKind::Text);
    for (start, size) in code.filter_map(|section| section.file_range()) {
        // An instruction has 8 bytes: code, registers, 16 bits of offset, 32 of a constant. What holds the upper half of
        // a constant of 64 bits has no code.
        for instruction in other[start as usize..][..size as usize].chunks_exact_mut(8) {
            if instruction[0] == LOAD && instruction[4..] == in_use {
                instruction[4..].copy_from_slice(&no_access);
            } else if instruction[0] == MOVE && instruction[7] < 0x80 {
                instruction[0] = MOVE_LOWER_HALF;
            }
        }
    }
    other
}

/// What the kernel calls the instructions of each program that is pinned.
fn tags(options: &Options) -> BTreeMap<String, u64> {
    let programs = options.bpf_root.join("shunt/programs");
    let entries = std::fs::read_dir(&programs).unwrap().flatten();
    let tag = |path: &Path| shunt_ebpf_tests::tag(path).unwrap();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), tag(&entry.path()))).collect()
}

/// Processes start over and over on what is there, then with the programs of another build and of this one in turn:
/// connections that begin meanwhile succeed, those that are open stay, at sockets and at devices.
#[test]
fn no_connection_breaks_when_the_agent_starts_anew_or_is_replaced() {
    if !require_kernel() {
        return;
    }
    let pods: Vec<IpAddr> = (1..=4).map(|n| [10, 180, 0, n].into()).collect();
    let mut builder = Lab::builder().node([[192, 168, 0, 2].into()]).client([[203, 0, 113, 2].into()]);
    for pod in &pods {
        builder = builder.pod(&pod.to_string(), [*pod]);
    }
    let lab = builder.build().unwrap();
    for pod in &pods {
        lab.pod(&pod.to_string()).unwrap().serve_ports([8080]).unwrap();
    }
    EbpfMode::settle(&lab).unwrap();
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster();
    cluster.steps(&[service(1, Some(3001)), slice(1, &pods)]);
    let table = cluster.table(V4).clone();
    start(&lab, &options).sync(&table, &Change::everything()).unwrap();

    let target = |from, to: &str| (from, to.parse::<SocketAddr>().unwrap());
    let targets = [
        target(lab.client(), "192.168.0.2:3001"),
        target(lab.client(), "172.16.0.1:80"),
        target(lab.node(), "172.16.0.1:80"),
        target(lab.pod("10.180.0.1").unwrap(), "172.16.0.1:80"),
    ];
    let began = Instant::now();
    let reports = under_load(100, &targets, |open| {
        for _ in 0..50 {
            let again = start(&lab, &options);
            assert!(again.mirror.installed);
            let plan = again.plan(&table, &Change::everything());
            assert!(plan.is_empty(), "a restart would do\n{plan}");
        }
        println!("50 restarts until {:?}", began.elapsed());
        let refusal =
            || lab.node().run(|| Ok(TcpListener::bind("0.0.0.0:3001").err().map(|e| e.kind()))).unwrap();
        assert_eq!(refusal(), Some(ErrorKind::AddrInUse));
        let other = Cow::Owned(other_build(&options.object));
        let other = Arc::new(Options { object: other, ..Options::clone(&options) });
        let mut held = tags(&options);
        for n in 0..10_u8 {
            let (build, refused) = if n % 2 == 0 {
                (&other, ErrorKind::PermissionDenied)
            } else {
                (&options, ErrorKind::AddrInUse)
            };
            let mut upgraded = start(&lab, build);
            assert!(!upgraded.mirror.installed, "other programs are taken for the same");
            upgraded.sync(&table, &Change::everything()).unwrap();
            assert_eq!(upgraded.backend.observe().unwrap(), upgraded.mirror);
            let now = tags(&options);
            assert!(now.iter().all(|(name, tag)| held[name] != *tag), "the same: {held:?} and {now:?}");
            held = now;
            assert_eq!(refusal(), Some(refused), "the links have the programs of before");
            for conversation in &mut *open {
                conversation.ask().unwrap();
            }
        }
        println!("10 upgrades until {:?}", began.elapsed());
    });
    for report in reports {
        assert_eq!(report.replies.len(), pods.len());
    }
    start(&lab, &options).backend.cleanup().unwrap();
    // Nothing is left of it, and nothing is served any more.
    let root = options.bpf_root.join("shunt");
    assert!(!root.exists());
    let probe = Probe::tcp(targets[1].1).timeout(Duration::from_millis(900));
    let seen = lab.client().probe(probe).unwrap();
    assert!(seen.answer().is_none(), "{seen}");
}

/// A client, the node, and a pod that answers on port 8080.
fn one_pod() -> (Lab, IpAddr) {
    let pod: IpAddr = [10, 180, 0, 1].into();
    let lab = Lab::builder()
        .node([[192, 168, 0, 2].into()])
        .client([[203, 0, 113, 2].into()])
        .pod("pod", [pod])
        .build()
        .unwrap();
    lab.pod("pod").unwrap().serve_ports([8080]).unwrap();
    (lab, pod)
}

/// Flows that were written down by programs that know no filter go on under those that have one.
#[test]
fn flows_of_older_programs_go_on() {
    if !require_kernel() {
        return;
    }
    let (lab, pod) = one_pod();
    EbpfMode::settle(&lab).unwrap();
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster();
    cluster.steps(&[service(1, Some(3001)), slice(1, &[pod])]);
    start(&lab, &options).sync(cluster.table(V4), &Change::everything()).unwrap();
    let to = "192.168.0.2:3001".parse().unwrap();
    let probe = Probe::tcp(to).timeout(Duration::from_secs(2));
    let mut conversation = lab.client().converse(&probe).unwrap();
    conversation.ask().unwrap();
    // What an older version leaves behind.
    for filter in [map::FLOW_FILTER, map::ADDRESS_FILTER] {
        std::fs::remove_file(options.bpf_root.join("shunt/maps").join(filter)).unwrap();
    }
    let other = Cow::Owned(other_build(&options.object));
    let other = Arc::new(Options { object: other, ..Options::clone(&options) });
    let mut upgraded = start(&lab, &other);
    upgraded.sync(cluster.table(V4), &Change::everything()).unwrap();
    conversation.ask().unwrap();
    assert!(lab.client().probe(probe).unwrap().answer().is_some());
    upgraded.backend.cleanup().unwrap();
}

/// A device that comes is served when the agent hears of it.
#[test]
fn new_devices_are_served() {
    if !require_kernel() {
        return;
    }
    let (lab, pod) = one_pod();
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster();
    cluster.steps(&[service(1, Some(3001)), slice(1, &[pod])]);
    let mut kernel = start(&lab, &options);
    kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    let links = || std::fs::read_dir(options.bpf_root.join("shunt/links")).unwrap().count();
    let before = links();
    lab.node().exec("ip", ["link", "add", "veth7", "type", "veth", "peer", "name", "veth8"], "").unwrap();
    kernel.backend.refresh().unwrap();
    assert_eq!(links(), before + 4);
    lab.node().exec("ip", ["link", "delete", "veth7"], "").unwrap();
    kernel.backend.refresh().unwrap();
    assert_eq!(links(), before);
    // The first device without Ethernet headers brings programs of its own, and the next build brings others.
    let headerless = |options: &Options| tags(options).get("ingress_l3").copied();
    assert_eq!(headerless(&options), None);
    let tun = lab.node().run(|| Tun::create("tun0")).unwrap();
    kernel.backend.refresh().unwrap();
    assert_eq!(links(), before + 2);
    let held = headerless(&options);
    assert!(held.is_some());
    let other = Cow::Owned(other_build(&options.object));
    let other = Arc::new(Options { object: other, ..Options::clone(&options) });
    start(&lab, &other).sync(cluster.table(V4), &Change::everything()).unwrap();
    assert!(headerless(&options).is_some() && headerless(&options) != held);
    start(&lab, &options).sync(cluster.table(V4), &Change::everything()).unwrap();
    assert_eq!(headerless(&options), held);
    drop(tun);
    kernel.backend.refresh().unwrap();
    assert_eq!(links(), before);
    // An address that comes is known as the node's.
    lab.add_node_address([192, 168, 0, 9].into()).unwrap();
    kernel.backend.refresh().unwrap();
    assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
    kernel.backend.cleanup().unwrap();
}

/// Services for which there is no room are named and not served, the others are; room that comes is used.
#[test]
fn what_does_not_fit_is_named_and_left_out_as_a_whole() {
    let sizes = Sizes {
        frontends: 4,
        services: 16 + 2 * 8,
        endpoints: 2 * 7,
        slots: 64,
        maglev: 4,
        addresses: 5,
        ..Sizes::default()
    };
    let mut kernel = Synced::adopt(Ebpf::new(FakeKernel::new(V4).with_sizes(sizes))).unwrap();
    let mut cluster = cluster();
    let pod = |n: u8| -> IpAddr { [10, 180, 0, n].into() };
    for n in 1..=6 {
        cluster.steps(&[service(n, None), slice(n, &[pod(1), pod(2)])]);
    }
    let sync = |kernel: &mut Synced<Ebpf<FakeKernel>>, cluster: &Cluster| {
        let plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
        let answers = |n: u8| {
            let packet = Packet {
                source: [10, 1, 1, 1].into(),
                interface: None,
                destination: [172, 16, 0, n].into(),
                port: 80,
                protocol: Protocol::Tcp,
            };
            let local = &cluster.table(V4).node().local_addresses;
            match EbpfMode::trace(&kernel.mirror, local, &packet).unwrap() {
                Outcome::Forward(endpoints) => endpoints.len(),
                _ => 0,
            }
        };
        (plan.problems, (1..=6).map(answers).collect::<Vec<usize>>())
    };
    let (problems, served) = sync(&mut kernel, &cluster);
    assert_eq!(served, [2, 2, 2, 0, 0, 0]);
    let named = |name: &str| problems.iter().any(|p| p.contains(name));
    assert!(named("svc4") && named("172.16.0.5:80") && named("172.16.0.6:80"), "{problems:?}");
    assert!(!named("svc1") && !named("svc2") && !named("svc3"), "{problems:?}");
    // The first two go.
    for n in 1..=2 {
        cluster.step(&Step::Event(Event::ServiceGone(NamespacedName::new("ns", format!("svc{n}")))));
    }
    sync(&mut kernel, &cluster);
    let (problems, served) = sync(&mut kernel, &cluster);
    assert_eq!(served, [0, 0, 2, 2, 2, 0], "{problems:?}");
}

/// Time that the process has spent on processors: on a busy machine the only time that says something, if no other
/// test runs.
fn processor_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs());
    micros(usage.user_time()) + micros(usage.system_time())
}

/// Resident memory of the process, the most so far and now.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let lines = status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS"));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
}

/// What 10,000 Services with 10 endpoints each cost the kernel. The limits are far above what is measured
/// on an idle machine: `cargo test --release -p shunt-suites --test ebpf -- --nocapture scale`.
#[test]
fn scale() {
    const SERVICES: u32 = 10_000;
    if !require_kernel() {
        return;
    }
    let lab = Lab::builder().node([[192, 168, 0, 2].into()]).build().unwrap();
    let small = lab.node().run(place::options).unwrap();
    let default = Options::default();
    let (frontends, endpoints, flows) = (default.frontends, default.endpoints, default.flows);
    let options = Arc::new(Options { frontends, endpoints, flows, ..Options::clone(&small) });
    let mut cluster = cluster();
    let endpoints = |n: u32, first: u8| -> Vec<IpAddr> {
        let [_, _, high, low] = n.to_be_bytes();
        (first..first + 10).map(|e| [10 + e, high, low, 1].into()).collect()
    };
    for n in 1..=SERVICES {
        cluster.steps(&[service(n, None), slice(n, &endpoints(n, 0))]);
    }
    cluster.take_change(V4);
    let mut started = (Instant::now(), processor_time());
    let mut lap = |what: &str| {
        let now = (Instant::now(), processor_time());
        let (wall, processor) = (now.0 - started.0, now.1.saturating_sub(started.1));
        println!("{what}: {wall:?}, on processors {processor:?}; {}", memory());
        started = (Instant::now(), processor_time());
        processor
    };
    let mut kernel = start(&lab, &options);
    lap("observe nothing");
    let table = cluster.table(V4);
    let plan = kernel.plan(table, &Change::everything());
    lap(&format!("plan {} operations", plan.len()));
    kernel.backend.apply(&Transaction { ops: vec![Op::Install] }).unwrap();
    lap("make maps, load programs");
    for transaction in &plan.transactions {
        // Programs count as installed when they are attached: a second time they would be loaded again.
        let ops = transaction.ops.iter().filter(|op| **op != Op::Install).cloned().collect();
        kernel.backend.apply(&Transaction { ops }).unwrap();
    }
    let cold = lap("write and attach");
    for transaction in &plan.transactions {
        Ebpf::<Bpf>::advance(&mut kernel.mirror, transaction);
    }
    lap("update the mirror");
    let observed = kernel.backend.observe().unwrap();
    lap("observe everything");
    assert_eq!(observed, kernel.mirror);
    assert_eq!(kernel.mirror, rendered::<Ebpf<FakeKernel>>(table));
    let mut times = Vec::new();
    for n in 1..=200 {
        cluster.step(&slice(n * 37, &endpoints(n * 37, 1)));
        let change = cluster.take_change(V4);
        let began = Instant::now();
        kernel.sync(cluster.table(V4), &change).unwrap();
        times.push(began.elapsed());
    }
    times.sort();
    println!("one endpoint replaced: p50 {:?}, p99 {:?}", times[100], times[197]);
    println!("{}", memory());
    assert!(cold < Duration::from_secs(10) && times[100] < Duration::from_millis(20));
    kernel.backend.cleanup().unwrap();
}

/// What the kernel counts is what was sent.
#[test]
fn flows_are_counted() {
    if !require_kernel() {
        return;
    }
    let pod: IpAddr = [10, 180, 0, 1].into();
    let client: IpAddr = [203, 0, 113, 2].into();
    let lab =
        Lab::builder().node([[192, 168, 0, 2].into()]).client([client]).pod("pod", [pod]).build().unwrap();
    lab.pod("pod").unwrap().serve_ports([8080]).unwrap();
    EbpfMode::settle(&lab).unwrap();
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster();
    cluster.steps(&[service(1, Some(3001)), slice(1, &[pod]), service(2, None)]);
    let mut kernel = start(&lab, &options);
    kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    let ask = |namespace: &shunt_harness::lab::Namespace, to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        namespace.probe(Probe::tcp(to).timeout(Duration::from_secs(2))).unwrap()
    };
    for _ in 0..3 {
        assert!(ask(lab.node(), "172.16.0.1:80").answer().is_some());
        assert!(ask(lab.client(), "192.168.0.2:3001").answer().is_some());
    }
    assert!(ask(lab.node(), "172.16.0.2:80").is_refused());
    let counters = kernel.backend.kernel().counters().unwrap();
    let of = |name: &str| counters.iter().find(|(n, _)| n.contains(name)).map(|(_, c)| *c).unwrap();
    assert_eq!((of("svc1").forwarded, of("svc1").rejected), (6, 0));
    assert_eq!((of("svc2").forwarded, of("svc2").rejected), (0, 1));
    kernel.backend.cleanup().unwrap();
}

/// The maps of addresses and of source ranges are full sooner than that of frontends: what needs them is named and left
/// out as a whole, and nothing else is.
#[test]
fn maps_of_addresses_and_ranges_are_never_overfilled() {
    let sizes = Sizes { addresses: 3, ranges: 3, ..Sizes::default() };
    let mut kernel = Synced::adopt(Ebpf::new(FakeKernel::new(V4).with_sizes(sizes))).unwrap();
    let mut cluster = cluster();
    for n in 1..=4 {
        let Step::Event(Event::Service(mut guarded)) = service(n, None) else { unreachable!() };
        guarded.load_balancer_ips = vec![[1, 2, 3, n as u8].into()];
        guarded.source_ranges = vec!["203.0.113.0/25".parse().unwrap(), "198.51.100.0/24".parse().unwrap()];
        if n == 4 {
            guarded.source_ranges.clear();
        }
        cluster.steps(&[Step::Event(Event::Service(guarded)), slice(n, &[[10, 180, 0, 1].into()])]);
    }
    let plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    let problems = plan.problems;
    assert_eq!(
        problems,
        [
            "ns/svc2/tcp: not served: no room for its source ranges",
            "ns/svc3/tcp: not served: no room for its source ranges",
            "the map of addresses is full: 2 are not known as cluster IPs",
        ]
    );
    let names: Vec<&str> = kernel.mirror.names().values().map(|name| &**name).collect();
    assert_eq!(names, ["ns/svc1/tcp", "ns/svc4/tcp"]);
    assert_eq!(kernel.mirror.frontends().len(), 4);
    assert_eq!(kernel.mirror.ranges().values().map(std::collections::BTreeSet::len).sum::<usize>(), 2);
}
