//! ipvs mode against the kernel's own tool, and against itself with few Services: ratios of one run, in a
//! guest.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::Config;
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::Change;
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Lab, Namespace, Probe, StormSpec};
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::mode::IpvsMode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{NODE, Step};

const FEW: u32 = 10;
const SERVICES: u32 = 10_000;
const ENDPOINTS: u8 = 10;
/// Pairs of measurements with few Services and with many.
const PAIRS: usize = 31;
const FAMILY: IpFamily = IpFamily::V4;
/// The Service that connections go to: the only one whose endpoint answers.
const POD: [u8; 4] = [10, 180, 0, 1];

type Real = <IpvsMode as ModeUnderTest>::Real;

fn vip(n: u32) -> IpAddr {
    let [_, _, high, low] = n.to_be_bytes();
    [10, 96, high, low].into()
}

fn service(n: u32) -> Step {
    Step::Event(Event::Service(Service {
        name: NamespacedName::new("ns", format!("svc{n}")),
        created: 0,
        cluster_ips: vec![vip(n)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    }))
}

fn slice(n: u32, addresses: impl IntoIterator<Item = IpAddr>) -> Step {
    Step::Event(Event::Slice(EndpointSlice {
        name: NamespacedName::new("ns", format!("svc{n}-1")),
        service: NamespacedName::new("ns", format!("svc{n}")),
        family: FAMILY,
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: addresses
            .into_iter()
            .map(|address| Endpoint {
                pod: None,
                address,
                conditions: Conditions::default(),
                node: None,
                zone: None,
                hints: None,
            })
            .collect(),
        last_change_trigger: None,
    }))
}

fn endpoints(n: u32, count: u8) -> impl Iterator<Item = IpAddr> {
    let [_, _, high, low] = n.to_be_bytes();
    (0..count).map(move |k| [100, high, low, k + 1].into())
}

fn adopt(node: &Namespace) -> Synced<Real> {
    node.run(|| Ok(Synced::adopt(IpvsMode::real(FAMILY)?)?)).unwrap()
}

fn ratio(one: Duration, other: Duration) -> f64 {
    one.as_secs_f64() / other.as_secs_f64()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// A node with Services, the first of which has an endpoint that answers.
struct Town {
    lab: Lab,
    cluster: Cluster,
    kernel: Synced<Real>,
}

impl Town {
    fn new(services: u32) -> Self {
        let lab = Lab::builder()
            .node(["192.168.0.2".parse().unwrap()])
            .client(["203.0.113.2".parse().unwrap()])
            .pod("pod", [POD.into()])
            .build()
            .unwrap();
        lab.pod("pod").unwrap().serve_ports([8080]).unwrap();
        let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
        cluster.step(&service(0));
        cluster.step(&slice(0, [POD.into()]));
        for n in 1..services {
            cluster.step(&service(n));
            cluster.step(&slice(n, endpoints(n, ENDPOINTS)));
        }
        cluster.take_change(FAMILY);
        let kernel = adopt(lab.node());
        Self { lab, cluster, kernel }
    }

    /// Everything at once, into a kernel that holds nothing.
    fn cold_sync(&mut self) -> (Duration, usize) {
        let started = Instant::now();
        let plan = self.kernel.sync(self.cluster.table(FAMILY), &Change::everything()).unwrap();
        (started.elapsed(), plan.len())
    }

    /// How long a connection takes, as the median of a few.
    fn first_connection(&self) -> Duration {
        let probe = Probe::tcp((vip(0), 80).into()).timeout(Duration::from_secs(5));
        let storm = StormSpec { probe, rate: 100, duration: Duration::from_millis(250) };
        let report = self.lab.client().storm(storm).unwrap().join().unwrap();
        assert!(report.failures.is_empty(), "{report}");
        median(report.latencies)
    }
}

fn speed() {
    let mut town = Town::new(SERVICES);
    let (cold, operations) = town.cold_sync();
    println!("cold sync of {SERVICES} x {ENDPOINTS}: {cold:?}, {operations} operations");
    let Town { lab, mut cluster, mut kernel } = town;
    let node = lab.node();

    let mut times = Vec::new();
    for round in 0..40_u32 {
        let count = if round % 2 == 0 { ENDPOINTS + 1 } else { ENDPOINTS };
        cluster.step(&slice(77, endpoints(77, count)));
        let change = cluster.take_change(FAMILY);
        let started = Instant::now();
        let plan = kernel.sync(cluster.table(FAMILY), &change).unwrap();
        times.push(started.elapsed());
        assert_eq!(plan.len(), 1, "{plan}");
    }
    let change = median(times);

    // The same virtual servers by the kernel's own tool, in another namespace.
    let saved = node.exec("ipvsadm", ["-Sn"], "").unwrap();
    let other = lab.pod("pod").unwrap();
    let started = Instant::now();
    other.exec("ipvsadm", ["-R"], &saved).unwrap();
    let tool = started.elapsed();
    let held = other.exec("ipvsadm", ["-Sn"], "").unwrap();
    assert_eq!(held.lines().count(), saved.lines().count());
    let mut times = Vec::new();
    for n in 0..40 {
        let real = format!("101.0.0.{}:8080", n + 1);
        let started = Instant::now();
        other.exec("ipvsadm", ["-a", "-t", "10.96.0.77:80", "-r", &real, "-m"], "").unwrap();
        times.push(started.elapsed());
    }
    let process = median(times);

    println!("ipvsadm -R of the same: {tool:?}; ratio {:.2} (at most 0.5)", ratio(cold, tool));
    println!(
        "one endpoint: {change:?}, ipvsadm -a: {process:?}; ratio {:.2} (at most 1)",
        ratio(change, process)
    );
    assert!(ratio(cold, tool) <= 0.5, "cold sync");
    assert!(ratio(change, process) <= 1.0, "one endpoint");
}

fn first_connections() {
    let (mut small, mut large) = (Town::new(FEW), Town::new(SERVICES));
    small.cold_sync();
    large.cold_sync();
    // Other work on the machine comes and goes: what is compared is what was measured side by side, in turns.
    let mut pairs: Vec<[Duration; 2]> = (0..PAIRS)
        .map(|round| {
            let first = round % 2 == 0;
            let [one, other] = if first { [&small, &large] } else { [&large, &small] };
            let times = [one, other].map(Town::first_connection);
            if first { times } else { [times[1], times[0]] }
        })
        .collect();
    pairs.sort_by(|a, b| ratio(a[1], a[0]).total_cmp(&ratio(b[1], b[0])));
    let [few, many] = pairs[pairs.len() / 2];
    println!("first connection p50: {few:?} and {many:?}; ratio {:.2} (at most 1.25)", ratio(many, few));
    let [low, high] = [PAIRS / 4, PAIRS * 3 / 4].map(|i| ratio(pairs[i][1], pairs[i][0]));
    println!("half of {PAIRS} pairs are between {low:.2} and {high:.2}");
    assert!(ratio(many, few) <= 1.25, "first connections");
}

mod ipvs {
    use super::*;

    #[test]
    fn is_fast_beside_the_kernels_own_tool() {
        test_in_guest(module_path!(), "is_fast_beside_the_kernels_own_tool", speed);
    }

    #[test]
    fn first_connections_do_not_depend_on_the_number_of_services() {
        let name = "first_connections_do_not_depend_on_the_number_of_services";
        test_in_guest(module_path!(), name, first_connections);
    }
}
