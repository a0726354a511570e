//! ebpf mode with other settings than usual: consistent hashing, filters instead of links at devices, maps of
//! other sizes, under load.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use shunt_core::endpoint::Conditions;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::Config;
use shunt_core::service::{Algorithm, Service, ServicePort};
use shunt_core::store::Event;
use shunt_core::table::Change;
use shunt_core::walk::{Packet, walk};
use shunt_ebpf_abi::lookup::maglev_entry;
use shunt_ebpf_abi::{Group, MAGLEV_SIZE, MaglevTable, Tuple, maglev};
use shunt_harness::lab::{Probe, require_kernel};
use shunt_mode::{Backend as _, Plan};
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::fake::FakeKernel;
use shunt_mode_ebpf::kernel::{Bpf, Options};
use shunt_mode_ebpf::op::Op;
use shunt_mode_ebpf::state::State;
use shunt_suites::driver::Synced;
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::ebpf::small::{
    CLIENT, NODE, cluster, lab, pod, ready, service, slice, start, targets, under_load,
};
use shunt_suites::mode::{EbpfMode, ModeUnderTest as _};
use shunt_suites::random::Step;

const V4: IpFamily = IpFamily::V4;
/// What a table that a plan puts in place says: addresses, not ids.
fn table(plan: &Plan<Op>, state: &State, service: &str) -> Vec<IpAddr> {
    let (id, _) = state.names().iter().find(|(_, name)| name.contains(service)).unwrap();
    let wanted = Group::id(*id, false);
    let ops = plan.transactions.iter().flat_map(|t| &t.ops);
    let mut members = ops.filter_map(|op| match op {
        Op::SetMaglev(group, Some(members)) if *group == wanted => Some(members),
        _ => None,
    });
    let mut table: Box<MaglevTable> = vec![0; MAGLEV_SIZE].into_boxed_slice().try_into().unwrap();
    maglev::fill(&mut members.next_back().unwrap().to_vec(), &mut table);
    table.iter().map(|id| state.endpoint(*id).address.into()).collect()
}

/// Nodes that came to the same endpoints by different ways choose the same; an endpoint that goes moves few
/// flows of the others.
#[test]
fn tables_are_the_same_on_every_node() {
    let node = |history: &[Step]| {
        let mut cluster = cluster(Config { external_algorithm: Algorithm::Maglev, ..Config::default() });
        let mut kernel = Synced::adopt(Ebpf::new(FakeKernel::new(V4))).unwrap();
        let mut plan = Plan::default();
        for step in history {
            cluster.step(step);
            plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
        }
        table(&plan, &kernel.mirror, "svc1/")
    };
    let tcp = Protocol::Tcp;
    let (all, few) = (ready((1..=50).map(pod)), ready((30..=40).map(pod)));
    let mut backwards = all.clone();
    backwards.reverse();
    let one = node(&[service(1, tcp, None), slice(1, tcp, &all)]);
    // Another Service took the first ids; some of the endpoints were there before.
    let other = node(&[
        service(2, tcp, None),
        slice(2, tcp, &all),
        service(1, tcp, Some(Algorithm::Maglev)),
        slice(1, tcp, &few),
        slice(1, tcp, &backwards),
    ]);
    assert_eq!(one, other);
    let mut shares: BTreeMap<IpAddr, usize> = BTreeMap::new();
    for address in &one {
        *shares.entry(*address).or_default() += 1;
    }
    assert_eq!(shares.len(), 50);
    assert!(shares.values().all(|share| share.abs_diff(MAGLEV_SIZE / 50) <= 2), "{shares:?}");
    let without: Vec<_> = all.iter().copied().filter(|(address, _)| *address != pod(7)).collect();
    let less = node(&[service(1, tcp, None), slice(1, tcp, &all), slice(1, tcp, &without)]);
    let moved = one.iter().zip(&less).filter(|(a, b)| **a != pod(7) && a != b).count();
    println!("{moved} of {MAGLEV_SIZE} entries moved that need not");
    assert!(moved * 1000 < MAGLEV_SIZE * 25, "{moved}");
}

/// A Service behind a VIP for sources in a range, before and after all of it changes together.
fn turn(algorithm: Algorithm) -> [Vec<Step>; 2] {
    let vip = IpAddr::from([1, 2, 3, 4]);
    [(false, "10.0.0.0/8", 80, [1, 2]), (true, "203.0.113.2/32", 81, [2, 3])].map(
        |(masquerade_all, range, port, endpoints)| {
            let Step::Event(Event::Service(service)) = service(1, Protocol::Tcp, Some(algorithm)) else {
                unreachable!()
            };
            // One frontend stays, one comes, one goes.
            let ports = vec![ServicePort { port, ..service.ports[0].clone() }];
            vec![
                Step::Config(Config { masquerade_all, ..Config::default() }),
                Step::Event(Event::Service(Service {
                    load_balancer_ips: vec![vip],
                    source_ranges: vec![range.parse().unwrap()],
                    ports,
                    ..service
                })),
                slice(1, Protocol::Tcp, &ready(endpoints.map(pod))),
            ]
        },
    )
}

/// Endpoints, what is masqueraded and who may pass change together: after every operation a packet meets what was
/// or what will be.
#[test]
fn what_changes_together_is_met_together() {
    let packet = |source: IpAddr, destination: IpAddr, port: u16| Packet {
        source,
        interface: None,
        destination,
        port,
        protocol: Protocol::Tcp,
    };
    let vip = IpAddr::from([1, 2, 3, 4]);
    let insider = IpAddr::from([10, 1, 1, 1]);
    for algorithm in [Algorithm::Random, Algorithm::Maglev] {
        let mut cluster = cluster(Config::default());
        let [before, after] = turn(algorithm);
        cluster.steps(&before);
        let mut kernel = Synced::adopt(Ebpf::new(FakeKernel::new(V4))).unwrap();
        kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
        let old = cluster.table(V4).clone();
        cluster.steps(&after);
        let new = cluster.table(V4);
        let desired = Ebpf::<FakeKernel>::render(new, &Change::everything());
        let plan = EbpfMode::plan_tight(&kernel.mirror, &desired, 0);
        for transaction in &plan.transactions {
            kernel.apply(transaction).unwrap();
            for (source, destination, port) in
                [(insider, NODE, 3001), (CLIENT, NODE, 3001), (CLIENT, vip, 80), (insider, vip, 81)]
            {
                let packet = packet(source, destination, port);
                let (was, will) = (walk(&old, &packet).outcome, walk(new, &packet).outcome);
                let is = EbpfMode::trace(&kernel.mirror, &new.node().local_addresses, &packet).unwrap();
                assert!(is == was || is == will, "{packet}: {was}, then {will}, but {is}\n{plan}");
            }
        }
        let again = EbpfMode::plan_tight(&kernel.mirror, &desired, 0);
        assert!(again.is_empty(), "{again}");
    }
}

/// The same in the kernel: afterwards the maps hold what was planned, and nothing else.
#[test]
fn what_changes_together_is_written() {
    if !require_kernel() {
        return;
    }
    for algorithm in [Algorithm::Random, Algorithm::Maglev] {
        let lab = lab(3);
        let options = lab.node().run(place::options).unwrap();
        let mut kernel = start(&lab, &options);
        let mut cluster = cluster(Config::default());
        for steps in turn(algorithm) {
            cluster.steps(&steps);
            kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
            assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
        }
    }
}

/// Tables for which there is no room are named; those endpoints are chosen by chance.
#[test]
fn a_service_without_a_table_is_served_by_chance() {
    let mut fake = FakeKernel::new(V4);
    let sizes = shunt_mode_ebpf::state::Sizes { maglev: 1, ..fake.state().sizes };
    fake = fake.with_sizes(sizes);
    let mut kernel = Synced::adopt(Ebpf::new(fake)).unwrap();
    let mut cluster = cluster(Config { external_algorithm: Algorithm::Maglev, ..Config::default() });
    for n in 1..=2 {
        cluster.steps(&[service(n, Protocol::Tcp, None), slice(n, Protocol::Tcp, &ready([pod(1), pod(2)]))]);
    }
    let plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    assert_eq!(plan.problems.len(), 1, "{:?}", plan.problems);
    assert!(plan.problems[0].contains("svc2"), "{:?}", plan.problems);
    assert_eq!((kernel.mirror.maglev().len(), kernel.mirror.frontends().len()), (1, 4));
    // The first wants none any more.
    cluster.step(&service(1, Protocol::Tcp, Some(Algorithm::Random)));
    kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    let plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    assert!(plan.problems.is_empty(), "{:?}", plan.problems);
}

/// The kernel chooses what the table says, for each of the client's ports; a restart finds the tables.
#[test]
fn packets_from_outside_are_hashed() {
    if !require_kernel() {
        return;
    }
    let lab = lab(4);
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster(Config { external_algorithm: Algorithm::Maglev, ..Config::default() });
    let tcp = Protocol::Tcp;
    cluster.steps(&[service(1, tcp, None), slice(1, tcp, &ready((1..=4).map(pod)))]);
    let mut kernel = start(&lab, &options);
    let plan = kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
    assert!(start(&lab, &options).plan(cluster.table(V4), &Change::everything()).is_empty());
    let check = |table: &[IpAddr], ports: std::ops::Range<u16>| {
        let mut reached = BTreeSet::new();
        for port in ports {
            let to = SocketAddr::new(NODE, 3001);
            let tuple = Tuple {
                source: CLIENT.into(),
                destination: NODE.into(),
                source_port: port.to_be(),
                destination_port: to.port().to_be(),
            };
            let entry = maglev_entry(shunt_ebpf_abi::Config::DEFAULT.maglev_seed, &tuple, tcp.number());
            let wanted = table[entry as usize].to_string();
            let probe = Probe::tcp(to).from_port(port).timeout(Duration::from_secs(3));
            assert_eq!(lab.client().probe(probe).unwrap().pod(), Some(&*wanted), "from port {port}");
            reached.insert(wanted);
        }
        reached.len()
    };
    assert_eq!(check(&table(&plan, &kernel.mirror, "svc1/"), 20_000..20_040), 4);
    let counted = kernel.backend.counted().unwrap();
    let of: Vec<_> = counted.iter().map(|c| (c.port.to_string(), c.forwarded, c.rejected)).collect();
    assert_eq!(of, [("ns/svc1/tcp".to_owned(), 40, 0)]);
    let tables = Ebpf::<Bpf>::usage(&kernel.mirror);
    let used: Vec<_> = tables.iter().map(|u| (u.table, u.entries)).collect();
    assert_eq!(used, [("frontends", 2), ("services", 1), ("endpoints", 4), ("slots", 4), ("maglev", 1)]);
    assert_eq!((tables[4].limit, tables[2].limit), (4096, 16_382 / 2));
    // One goes.
    cluster.step(&slice(1, tcp, &ready((1..=3).map(pod))));
    let change = cluster.take_change(V4);
    let plan = kernel.sync(cluster.table(V4), &change).unwrap();
    assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
    assert_eq!(check(&table(&plan, &kernel.mirror, "svc1/"), 21_000..21_040), 3);
    // The Service wants chance.
    cluster.step(&service(1, tcp, Some(Algorithm::Random)));
    kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    assert!(kernel.mirror.maglev().is_empty());
    assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
    kernel.backend.cleanup().unwrap();
    assert!(!options.bpf_root.join("shunt").exists());
}

/// The way of kernels before 6.6: filters outlive the process, are adopted, replaced and removed, beside those
/// of others; and both ways lead into each other.
#[test]
fn filters_serve_where_there_are_no_links() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let links = lab.node().run(place::options).unwrap();
    let filters = Arc::new(Options { clsact: true, ..Options::clone(&links) });
    let mut cluster = cluster(Config::default());
    cluster.steps(&[service(1, Protocol::Tcp, None), slice(1, Protocol::Tcp, &ready([pod(1), pod(2)]))]);
    let table = cluster.table(V4).clone();
    let device = lab.link("client").unwrap();
    let tc = |arguments: &[&str]| lab.node().exec("tc", arguments, "").unwrap();
    // Somebody else's, which stays.
    tc(&["qdisc", "add", "dev", device, "clsact"]);
    let nothing = ["bpf", "bytecode", "1,6 0 0 0", "flowid", "1:1"];
    tc(&[&["filter", "add", "dev", device, "ingress", "prio", "7"], &nothing[..]].concat());
    let ours = || tc(&["filter", "show", "dev", device, "ingress"]).matches("shunt_ingress").count();

    let mut kernel = start(&lab, &filters);
    kernel.sync(&table, &Change::everything()).unwrap();
    assert_eq!(ours(), 1);
    under_load(100, &targets(&lab), |_| {
        for _ in 0..10 {
            let again = start(&lab, &filters);
            assert!(again.mirror.installed);
            assert!(again.plan(&table, &Change::everything()).is_empty());
        }
        for n in 0..5_u8 {
            let mut object = filters.object.to_vec();
            object.extend([n; 8]);
            let other = Arc::new(Options { object: Cow::Owned(object), ..Options::clone(&filters) });
            start(&lab, &other).sync(&table, &Change::everything()).unwrap();
            assert_eq!(ours(), 1);
        }
        start(&lab, &filters).sync(&table, &Change::everything()).unwrap();
    });
    // Removed by somebody: it is missed and comes back.
    tc(&["filter", "delete", "dev", device, "ingress", "prio", "1"]);
    let mut kernel = start(&lab, &filters);
    assert!(!kernel.mirror.installed);
    kernel.sync(&table, &Change::everything()).unwrap();
    assert_eq!(ours(), 1);
    start(&lab, &links).sync(&table, &Change::everything()).unwrap();
    assert_eq!(ours(), 0, "links take the place of filters");
    start(&lab, &filters).sync(&table, &Change::everything()).unwrap();
    assert_eq!(ours(), 1);
    kernel.backend.cleanup().unwrap();
    assert!(!filters.bpf_root.join("shunt").exists());
    let left = tc(&["filter", "show", "dev", device, "ingress"]);
    assert!(left.contains("bytecode") && !left.contains("shunt"), "{left}");
    // Disciplines that were ours went.
    assert_eq!(tc(&["qdisc", "show"]).matches("clsact").count(), 1);
}

/// A UDP flow stays with its endpoint while that terminates and serves, though new ones go
/// elsewhere; when it is gone the flow goes elsewhere, too.
#[test]
fn flows_stay_with_an_endpoint_that_terminates() {
    if !require_kernel() {
        return;
    }
    let lab = lab(2);
    let options = lab.node().run(place::options).unwrap();
    let mut cluster = cluster(Config::default());
    let udp = Protocol::Udp;
    cluster.steps(&[service(1, udp, None), slice(1, udp, &ready([pod(1), pod(2)]))]);
    let mut kernel = start(&lab, &options);
    kernel.sync(cluster.table(V4), &Change::everything()).unwrap();
    let outside = || Probe::udp(SocketAddr::new(NODE, 3001)).timeout(Duration::from_secs(2));
    let ask = |port| lab.client().probe(outside().from_port(port)).unwrap().pod().unwrap().to_owned();
    let home = ask(20_000);
    let old: IpAddr = home.parse().unwrap();
    let other = if old == pod(1) { pod(2) } else { pod(1) };
    let terminating = Conditions { ready: false, serving: true, terminating: true };
    let mut change = |kernel: &mut Synced<Ebpf<Bpf>>, endpoints: &[(IpAddr, Conditions)]| {
        cluster.step(&slice(1, udp, endpoints));
        let change = cluster.take_change(V4);
        kernel.sync(cluster.table(V4), &change).unwrap();
        assert_eq!(kernel.backend.observe().unwrap(), kernel.mirror);
    };
    change(&mut kernel, &[(old, terminating), (other, Conditions::default())]);
    assert_eq!(ask(20_000), home);
    for port in 20_001..20_010 {
        assert_eq!(ask(port), other.to_string(), "a new flow");
    }
    change(&mut kernel, &[(other, Conditions::default())]);
    assert_eq!(ask(20_000), other.to_string());
    kernel.backend.cleanup().unwrap();
}
