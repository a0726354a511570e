//! Real packets through the real kernel, each case in namespaces of its own.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::Change;
use shunt_harness::cases::{self, Case, SourceKind};
use shunt_harness::guest::inside;
use shunt_harness::lab::{Lab, Namespace, Probe, StormSpec};
use shunt_mode::{Backend, rendered};
use shunt_suites::driver::{CaseRun, Cluster, Synced, adopt};
use shunt_suites::every_mode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{Step, context, steps};
use shunt_suites::town::Town;

/// Cases that run at the same time. They wait most of the time.
const WORKERS: usize = 6;

/// Believed and found are the same, and a process that starts now has nothing to do.
fn check_adoption<M: ModeUnderTest>(
    node: &Namespace,
    kernel: &mut Synced<M::Real>,
    cluster: &Cluster,
    family: IpFamily,
) -> Result<()> {
    let observed = kernel.backend.observe()?;
    ensure!(observed == kernel.mirror, "observed:\n{observed}\nbelieved:\n{}", kernel.mirror);
    let restarted = adopt::<M>(node, family)?;
    let plan = restarted.plan(cluster.table(family), &Change::everything());
    let ops = plan.transactions.iter().flat_map(|t| &t.ops);
    ensure!(ops.into_iter().all(M::is_garbage), "a restart would do\n{plan}");
    Ok(())
}

fn run_case<M: ModeUnderTest>(case: &Case, report: &Report) -> Result<()> {
    let town = Town::build(case, M::settle)?;
    let node = town.lab.node();
    M::foreign(node)?;
    let foreign = M::list(node)?;
    let mut kernels = Vec::new();
    for family in IpFamily::ALL {
        kernels.push((family, adopt::<M>(node, family)?));
    }
    let mut run = CaseRun::new(case, M::MODE);
    let mut first = true;
    while let Some(step) = run.next_step() {
        for (family, kernel) in &mut kernels {
            let mut change = run.cluster.take_change(*family);
            if case.restart_between_steps {
                *kernel = adopt::<M>(node, *family)?;
                change = Change::everything();
            }
            let plan = kernel.sync(run.cluster.table(*family), &change)?;
            report.ops.fetch_add(plan.len(), Ordering::Relaxed);
            check_adoption::<M>(node, kernel, &run.cluster, *family)?;
            if first || change.everything {
                let again = kernel.plan(run.cluster.table(*family), &Change::everything());
                ensure!(again.is_empty(), "left to do:\n{again}");
            }
        }
        first = false;
        M::list(node)?;
        for packet in step.packets.iter().filter(|p| p.modes.contains(&M::MODE)) {
            if let Some(missing) = M::lacks(&case.name, Some(&packet.name)) {
                println!("skipped: {} mode, {}, {}: {missing}", M::MODE, case.name, packet.name);
                continue;
            }
            let vip = (packet.source_kind == SourceKind::LbVip).then_some(packet.packet.source);
            if let Some(vip) = vip {
                // Such a packet is only sent by a node that has the address.
                town.lab.add_node_address(vip)?;
            }
            let sent = town.send(packet, run.cluster.has_affinity(&packet.packet));
            if let Some(vip) = vip {
                town.lab.remove_node_address(vip)?;
            }
            report.packets.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = sent {
                report.failed(format!("{}: {error:#}", step.describe(packet)));
            }
        }
    }
    for (_, kernel) in &mut kernels {
        kernel.backend.cleanup()?;
        kernel.backend.cleanup()?;
    }
    let left = M::list(node)?;
    ensure!(left == foreign, "after the clean-up:\n{left}\nbut it was\n{foreign}");
    Ok(())
}

#[derive(Default)]
struct Report {
    failures: Mutex<Vec<String>>,
    packets: AtomicUsize,
    ops: AtomicUsize,
}

impl Report {
    fn failed(&self, what: String) {
        self.failures.lock().unwrap().push(what);
    }
}

fn packets_meet_their_fate<M: ModeUnderTest>() {
    let cases = cases::all().unwrap();
    let cases: Vec<&Case> = cases.iter().filter(|case| case.modes.contains(&M::MODE)).collect();
    let (next, report) = (AtomicUsize::new(0), Report::default());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = run_case::<M>(case, &report) {
                        report.failed(format!("{}: {error:#}", case.name));
                    }
                }
            });
        }
    });
    let packets = report.packets.into_inner();
    println!("{packets} packets of {} cases, {} operations", cases.len(), report.ops.into_inner());
    let failures = report.failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(packets > 250, "only {packets} packets were sent");
}

/// The real kernel takes every plan that random clusters lead to, and holds afterwards what the mirror
/// says: transactions split at any place, maps that grow, changes one by one.
fn the_kernel_takes_random_plans<M: ModeUnderTest>() {
    let count = std::env::var("SHUNT_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let strategy = (context(), steps(10..60), 0..6_u8);
    let mut runner = TestRunner::default();
    let lab = Lab::builder().build().unwrap();
    let node = lab.node();
    let mut transactions = 0;
    for _ in 0..count {
        let (context, steps, tightness) = strategy.new_tree(&mut runner).unwrap().current();
        let mut cluster = Cluster::new(context);
        let mut kernels = IpFamily::ALL.map(|family| adopt::<M>(node, family).unwrap());
        for (i, step) in steps.iter().enumerate() {
            cluster.step(step);
            if i % 3 != 0 && i + 1 != steps.len() {
                continue;
            }
            for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
                let mut change = cluster.take_change(family);
                if i % 5 == 0 {
                    change = Change::everything();
                }
                let desired = M::Real::render(cluster.table(family), &change);
                let plan = M::plan_tight(&kernel.mirror, &desired, tightness);
                for transaction in &plan.transactions {
                    transactions += 1;
                    let done = kernel.apply(transaction);
                    assert!(done.is_ok(), "{done:?}\n{plan}\nfrom\n{}", kernel.mirror);
                }
                let observed = kernel.backend.observe().unwrap();
                assert!(
                    observed == kernel.mirror,
                    "after\n{plan}\nobserved:\n{observed}\nbelieved:\n{}",
                    kernel.mirror
                );
            }
        }
        M::list(node).unwrap();
        for kernel in &mut kernels {
            kernel.backend.cleanup().unwrap();
        }
        assert_eq!(M::list(node).unwrap(), "");
    }
    println!("{count} clusters, {transactions} transactions");
}

/// Whatever somebody does to our rules by hand, the next look at the kernel repairs.
fn damage_is_repaired<M: ModeUnderTest>() {
    let repair = |case: &Case, damage: &str| -> Result<()> {
        let lab = Lab::builder().build()?;
        let node = lab.node();
        let mut run = CaseRun::new(case, M::MODE);
        run.next_step().context("a step")?;
        let family = *case.steps[0].families().first().context("a family")?;
        let table = run.cluster.table(family);
        let mut kernel = adopt::<M>(node, family)?;
        kernel.sync(table, &Change::everything())?;
        M::damage(node, family, damage)?;
        let mut kernel = adopt::<M>(node, family)?;
        let want = rendered::<M::Real>(table);
        ensure!(kernel.mirror != want, "the damage is not seen");
        let plan = kernel.sync(table, &Change::everything())?;
        let observed = kernel.backend.observe()?;
        ensure!(M::is_repaired(&observed, &want), "after\n{plan}\nthere is\n{observed}\ninstead of\n{want}");
        Ok(())
    };
    let all = cases::all().unwrap();
    let mut failures = Vec::new();
    for (name, damage) in M::damages() {
        let case = all.iter().find(|case| case.name == *name).unwrap();
        if let Err(error) = repair(case, damage) {
            failures.push(anyhow!("{damage}: {error:#}").to_string());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Connections begin while endpoints come and go, while everything is looked at again, and while maps are
/// replaced by larger ones: none of them fails, and none waits for a second SYN.
fn no_connection_fails_while_endpoints_change<M: ModeUnderTest>() {
    connections_while_endpoints_change::<M>(false);
}

/// The same with session affinity, which is switched off and on now and then, and for which records
/// name endpoints that are gone.
fn no_connection_fails_while_affinity_changes<M: ModeUnderTest>() {
    connections_while_endpoints_change::<M>(true);
}

fn connections_while_endpoints_change<M: ModeUnderTest>(affinity: bool) {
    const PODS: u8 = 6;
    // Few operations a transaction where the order allows, and maps that start small.
    const MOST_TIGHT: u8 = 5;
    let pod = |n: u8| IpAddr::from([10, 180, 0, n]);
    let mut builder = Lab::builder().node(["192.168.0.2".parse().unwrap()]);
    builder = builder.client(["203.0.113.2".parse().unwrap()]);
    for n in 1..=PODS {
        builder = builder.pod(&format!("pod{n}"), [pod(n)]);
    }
    let lab = builder.build().unwrap();
    for n in 1..=PODS {
        lab.pod(&format!("pod{n}")).unwrap().serve_ports([8080]).unwrap();
    }
    let mut cluster = Cluster::new(Context::new(cases::NODE, Config::default()));
    cluster.step(&Step::Event(Event::Node(Node {
        name: cases::NODE.into(),
        addresses: vec!["192.168.0.2".parse().unwrap()],
        ..Node::default()
    })));
    let vip = "1.2.3.4".parse().unwrap();
    let mut web = service("web", "172.30.0.1".parse().unwrap(), Some(vip));
    web.affinity = affinity.then(|| Duration::from_mins(1));
    cluster.step(&Step::Event(Event::Service(web.clone())));
    cluster.step(&Step::Event(Event::Slice(slice("web", &[pod(1)]))));
    let family = IpFamily::V4;
    let mut kernel = adopt::<M>(lab.node(), family).unwrap();
    let change = cluster.take_change(family);
    let plan = M::plan_tight(&kernel.mirror, &M::Real::render(cluster.table(family), &change), MOST_TIGHT);
    plan.transactions.iter().try_for_each(|t| kernel.apply(t)).unwrap();

    // A packet that is lost is sent again after a second. A guest's only CPU is slow and shared by all: there, packets
    // are late without being lost, and fewer connections leave time for changes.
    let (rate, patience, pause, duration) = if inside() { (25, 30_000, 20, 8) } else { (300, 900, 0, 3) };
    let storms: Vec<_> = ["172.30.0.1:80", "192.168.0.2:3001", "1.2.3.4:80"]
        .into_iter()
        .map(|to| {
            let probe = Probe::tcp(to.parse().unwrap()).timeout(Duration::from_millis(patience));
            lab.client().storm(StormSpec { probe, rate, duration: Duration::from_mins(1) }).unwrap()
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(duration);
    let mut changes = 0_u32;
    while Instant::now() < end {
        thread::sleep(Duration::from_millis(pause));
        changes += 1;
        // A number with six bits, never zero, that looks random enough.
        let bits = (changes.wrapping_mul(2_654_435_761) >> 13) % 63 + 1;
        let chosen: Vec<IpAddr> = (1..=PODS).filter(|n| bits >> (n - 1) & 1 == 1).map(pod).collect();
        cluster.step(&Step::Event(Event::Slice(slice("web", &chosen))));
        if affinity && changes.is_multiple_of(50) {
            web.affinity = (!changes.is_multiple_of(100)).then(|| Duration::from_secs(changes.into()));
            cluster.step(&Step::Event(Event::Service(web.clone())));
        }
        if changes.is_multiple_of(4) && changes < 2000 {
            let [_, _, high, low] = changes.to_be_bytes();
            let name = format!("filler{changes}");
            cluster.step(&Step::Event(Event::Service(service(&name, [172, 31, high, low].into(), None))));
            cluster.step(&Step::Event(Event::Slice(slice(&name, &chosen))));
        }
        let mut change = cluster.take_change(family);
        if changes.is_multiple_of(10) {
            change = Change::everything();
        }
        let plan =
            M::plan_tight(&kernel.mirror, &M::Real::render(cluster.table(family), &change), MOST_TIGHT);
        for transaction in &plan.transactions {
            kernel.apply(transaction).unwrap();
        }
    }
    for storm in storms {
        let report = storm.stop().unwrap();
        println!("{changes} changes: {report}");
        assert!(report.failures.is_empty(), "{report}");
        assert_eq!(report.replies.len(), usize::from(PODS));
    }
}

fn service(name: &str, cluster_ip: IpAddr, vip: Option<IpAddr>) -> Service {
    let node_port = vip.map(|_| 3001);
    Service {
        name: NamespacedName::new("ns", name),
        created: 0,
        cluster_ips: vec![cluster_ip],
        external_ips: Vec::new(),
        load_balancer_ips: vip.into_iter().collect(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    }
}

fn slice(service: &str, addresses: &[IpAddr]) -> EndpointSlice {
    let endpoint = |address: &IpAddr| Endpoint {
        address: *address,
        conditions: Conditions::default(),
        node: Some(cases::NODE.into()),
        zone: None,
        hints: None,
        pod: None,
    };
    EndpointSlice {
        name: NamespacedName::new("ns", format!("{service}-1")),
        service: NamespacedName::new("ns", service),
        family: IpFamily::V4,
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses.iter().map(endpoint).collect(),
        last_change_trigger: None,
    }
}

every_mode!(in kernel:
    no_connection_fails_while_endpoints_change,
    no_connection_fails_while_affinity_changes,
    packets_meet_their_fate,
    the_kernel_takes_random_plans,
    damage_is_repaired
);
