//! What only ipvs mode has: endpoints that are drained, and VIPs that are addresses of the node. In a guest.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::Change;
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Lab, Probe};
use shunt_mode::Backend as _;
use shunt_mode_ipvs::drain::DEADLINE;
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::mode::IpvsMode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{NODE, Step};

const FAMILY: IpFamily = IpFamily::V4;
const NODE_IP: [u8; 4] = [192, 168, 0, 2];
const VIP: [u8; 4] = [10, 96, 0, 1];
/// A port of the node's own, which no Service has.
const HOST_PORT: u16 = 9999;

type Real = <IpvsMode as ModeUnderTest>::Real;

fn pod(n: u8) -> IpAddr {
    [10, 180, 0, n].into()
}

struct Town {
    lab: Lab,
    cluster: Cluster,
    kernel: Synced<Real>,
}

impl Town {
    fn new() -> Self {
        let mut builder = Lab::builder().node([NODE_IP.into()]).client(["203.0.113.2".parse().unwrap()]);
        for n in 1..=2 {
            builder = builder.pod(&format!("pod{n}"), [pod(n)]);
        }
        let lab = builder.build().unwrap();
        for n in 1..=2 {
            lab.pod(&format!("pod{n}")).unwrap().serve_ports([8080]).unwrap();
        }
        lab.node().serve_ports([HOST_PORT]).unwrap();
        let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
        let addresses = vec![NODE_IP.into()];
        cluster.step(&Step::Event(Event::Node(Node { name: NODE.into(), addresses, ..Node::default() })));
        cluster.step(&Step::Event(Event::Service(Service {
            name: NamespacedName::new("ns", "web"),
            created: 0,
            cluster_ips: vec![VIP.into()],
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
        })));
        let kernel = adopt(&lab);
        let mut town = Self { lab, cluster, kernel };
        town.pods(&[1, 2]);
        town
    }

    fn pods(&mut self, pods: &[u8]) {
        let endpoint = |n: &u8| Endpoint {
            pod: None,
            address: pod(*n),
            conditions: Conditions::default(),
            node: Some(NODE.into()),
            zone: None,
            hints: None,
        };
        self.cluster.step(&Step::Event(Event::Slice(EndpointSlice {
            name: NamespacedName::new("ns", "web-1"),
            service: NamespacedName::new("ns", "web"),
            family: FAMILY,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: pods.iter().map(endpoint).collect(),
            last_change_trigger: None,
        })));
        let change = self.cluster.take_change(FAMILY);
        self.kernel.sync(self.cluster.table(FAMILY), &change).unwrap();
    }

    /// Weights of the destinations, as the kernel has them.
    fn weights(&mut self) -> Vec<(SocketAddr, u32)> {
        let state = self.kernel.backend.observe().unwrap();
        assert_eq!(state, self.kernel.mirror);
        let servers = state.servers.values().flat_map(|s| s.destinations.values());
        servers.map(|d| (d.address, d.weight)).collect()
    }

    fn tend(&mut self, now: Instant) {
        let (plan, _) = self.kernel.backend.ripen(&self.kernel.mirror, now).unwrap();
        for transaction in &plan.transactions {
            self.kernel.apply(transaction).unwrap();
        }
    }
}

fn adopt(lab: &Lab) -> Synced<Real> {
    lab.node().run(|| Ok(Synced::adopt(IpvsMode::real(FAMILY)?)?)).unwrap()
}

fn drained() {
    let mut town = Town::new();
    let at = |n| SocketAddr::new(pod(n), 8080);
    let probe = Probe::tcp((VIP, 80).into()).timeout(Duration::from_secs(10));
    let mut talk = town.lab.client().converse(&probe).unwrap();
    let home = talk.ask().unwrap().pod;
    let (gone, stays) = if home == "pod1" { (1, 2) } else { (2, 1) };
    town.pods(&[stays]);
    let mut drained = vec![(at(gone), 0), (at(stays), 1)];
    drained.sort_unstable();
    assert_eq!(town.weights(), drained);
    for seen in town.lab.client().probe_all(vec![probe.clone(); 10]).unwrap() {
        assert_eq!(seen.pod(), Some(format!("pod{stays}").as_str()));
    }
    assert_eq!(talk.ask().unwrap().pod, home, "its connection goes on");

    // Another process takes over: it finds nothing to do, and deletes nothing that is in use.
    town.kernel = adopt(&town.lab);
    let plan = town.kernel.plan(town.cluster.table(FAMILY), &Change::everything());
    assert!(plan.is_empty(), "{plan}");
    let now = Instant::now();
    town.tend(now);
    town.tend(now + DEADLINE / 2);
    assert_eq!(town.weights(), drained);
    assert_eq!(talk.ask().unwrap().pod, home);

    // It comes back.
    town.pods(&[1, 2]);
    assert_eq!(town.weights(), [(at(1), 1), (at(2), 1)]);
    assert_eq!(talk.ask().unwrap().pod, home);

    // It goes for good: past the deadline it is deleted whoever is still there.
    town.pods(&[stays]);
    town.tend(now + DEADLINE);
    town.tend(now + 2 * DEADLINE + Duration::from_secs(1));
    assert_eq!(town.weights(), [(at(stays), 1)]);

    // One without connections goes at the second look.
    town.pods(&[1, 2]);
    town.pods(&[stays]);
    assert_eq!(town.weights(), drained);
    town.tend(now);
    town.tend(now + Duration::from_secs(10));
    assert_eq!(town.weights(), [(at(stays), 1)]);
}

fn closed() {
    let town = Town::new();
    let probe = |address: [u8; 4], port| Probe::tcp((address, port).into()).timeout(Duration::from_secs(10));
    let client = town.lab.client();
    assert!(client.probe(probe(NODE_IP, HOST_PORT)).unwrap().answer().is_some(), "the node itself answers");
    for from in [client, town.lab.node(), town.lab.pod("pod1").unwrap()] {
        assert!(from.probe(probe(VIP, HOST_PORT)).unwrap().is_refused(), "a port of the node on a VIP");
        assert!(from.probe(probe(VIP, 80)).unwrap().answer().is_some(), "the Service");
    }
}

mod ipvs {
    use super::*;

    #[test]
    fn removed_endpoints_are_drained() {
        test_in_guest(module_path!(), "removed_endpoints_are_drained", drained);
    }

    #[test]
    fn ports_of_the_node_are_closed_on_vips() {
        test_in_guest(module_path!(), "ports_of_the_node_are_closed_on_vips", closed);
    }
}
