use std::net::IpAddr;
use std::sync::Arc;

use super::*;
use crate::compile::Context;
use crate::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice, Hints, PodHash};
use crate::id::Protocol;
use crate::node::{Config, Node};
use crate::service::{Service, ServicePort};
use crate::store::Event;

const POD: &str = "10.244.1.1";
const NODE: &str = "192.0.2.11";
const CLIENT: &str = "203.0.113.5";

const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
const NOT_READY: Conditions = Conditions { ready: false, serving: false, terminating: false };
const TERMINATING: Conditions = Conditions { ready: false, serving: true, terminating: true };

fn service() -> Service {
    Service {
        name: NamespacedName::new("demo", "web"),
        created: 1,
        cluster_ips: vec!["10.96.0.10".parse().unwrap()],
        external_ips: Vec::new(),
        load_balancer_ips: vec!["198.51.100.80".parse().unwrap()],
        source_ranges: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: Some(30080),
        }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    }
}

/// An endpoint 10.244.0.`last`; odd ones run here.
fn endpoint(last: u8, conditions: Conditions) -> Endpoint {
    let node = if last % 2 == 1 { "worker-1" } else { "worker-2" };
    Endpoint {
        address: IpAddr::from([10, 244, 0, last]),
        conditions,
        node: Some(node.into()),
        zone: None,
        hints: None,
        pod: None,
    }
}

fn hinted(last: u8, zones: &[&str], nodes: &[&str]) -> Endpoint {
    let names = |list: &[&str]| list.iter().map(|n| Arc::from(*n)).collect();
    let hints = Hints { zones: names(zones), nodes: names(nodes) };
    Endpoint { hints: Some(Arc::new(hints)), ..endpoint(last, READY) }
}

fn slice(endpoints: Vec<Endpoint>) -> Event {
    Event::Slice(EndpointSlice {
        name: NamespacedName::new("demo", "web-1"),
        service: NamespacedName::new("demo", "web"),
        family: IpFamily::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
        last_change_trigger: None,
    })
}

struct World {
    services: Vec<Service>,
    endpoints: Vec<Endpoint>,
    config: Config,
}

impl World {
    fn new(endpoints: Vec<Endpoint>) -> Self {
        let detector = LocalDetector::Cidr(vec!["10.244.0.0/16".parse().unwrap()]);
        let config = Config { local_detector: detector, ..Config::default() };
        Self { services: vec![service()], endpoints, config }
    }

    fn with(mut self, change: impl FnOnce(&mut Service)) -> Self {
        change(&mut self.services[0]);
        self
    }

    fn configured(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    fn explain(&self, source: &str, to: &str) -> Explanation {
        let mut store = Store::default();
        for service in &self.services {
            store.apply(Event::Service(service.clone()));
        }
        store.apply(slice(self.endpoints.clone()));
        store.apply(Event::Node(Node {
            name: "worker-1".into(),
            zone: Some("zone-a".into()),
            addresses: vec![NODE.parse().unwrap(), "192.0.2.12".parse().unwrap()],
            ..Node::default()
        }));
        store.apply(Event::ServiceCidr("kubernetes".into(), vec!["10.96.0.0/16".parse().unwrap()]));
        let compiler = Compiler::full(Context::new("worker-1", self.config.clone()), &store);
        let to: std::net::SocketAddr = to.parse().unwrap();
        let packet = Packet {
            source: source.parse().unwrap(),
            interface: None,
            destination: to.ip(),
            port: to.port(),
            protocol: Protocol::Tcp,
        };
        let explanation = explain(&store, &compiler, &packet);
        agrees(&explanation);
        explanation
    }
}

/// What is explained is what the walker says, and it can be said in words.
fn agrees(explanation: &Explanation) {
    match &explanation.cause {
        Cause::Frontend(matched) => match (&matched.ruling, &explanation.outcome) {
            (Ruling::Forward { endpoints, .. }, Outcome::Forward(walked)) => {
                let explained: Vec<_> = endpoints
                    .iter()
                    .map(|c| (std::net::SocketAddr::new(c.target.address, c.target.port), c.masquerade))
                    .collect();
                assert_eq!(explained, *walked);
                assert!(endpoints.iter().all(|c| matched.left_out.iter().all(|(t, _)| *t != c.target)));
            }
            (Ruling::NoEndpoints, Outcome::Reject)
            | (Ruling::NoLocalEndpoints | Ruling::SourceRange(_), Outcome::Drop) => {}
            (ruling, outcome) => panic!("{ruling:?}, but {outcome}"),
        },
        Cause::UnknownPort { .. } => assert_eq!(explanation.outcome, Outcome::Reject),
        Cause::Unallocated { .. } => assert_eq!(explanation.outcome, Outcome::Drop),
        Cause::NodePortElsewhere { .. } | Cause::NoFrontend => {
            assert_eq!(explanation.outcome, Outcome::None);
        }
    }
    assert!(!explanation.reason().is_empty() && explanation.to_string().lines().count() > 2);
}

fn matched(explanation: &Explanation) -> &Matched {
    match &explanation.cause {
        Cause::Frontend(matched) => matched,
        other => panic!("{other:?}"),
    }
}

fn left_out(explanation: &Explanation) -> Vec<(String, LeftOut)> {
    matched(explanation).left_out.iter().map(|(t, r)| (t.to_string(), *r)).collect()
}

fn chosen(explanation: &Explanation) -> Vec<String> {
    Fate::from(&explanation.outcome).endpoints
}

fn source(explanation: &Explanation) -> Source {
    match &matched(explanation).ruling {
        Ruling::Forward { source, .. } => *source,
        other => panic!("{other:?}"),
    }
}

fn at(last: u8) -> String {
    format!("10.244.0.{last}:8080")
}

#[test]
fn not_ready_endpoints_are_left_out() {
    let e = World::new(vec![endpoint(1, READY), endpoint(2, NOT_READY)]).explain(POD, "10.96.0.10:80");
    assert_eq!(chosen(&e), [at(1)]);
    assert_eq!(left_out(&e), [(at(2), LeftOut::NotReady)]);
    assert!(e.reason().contains("left out: 10.244.0.2:8080: not ready"), "{}", e.reason());
}

#[test]
fn terminating_endpoints_are_left_out_while_ready_ones_exist() {
    let world = World::new(vec![endpoint(1, READY), endpoint(2, TERMINATING)]);
    let e = world.explain(POD, "10.96.0.10:80");
    assert_eq!(left_out(&e), [(at(2), LeftOut::Terminating)]);
    let world = World::new(vec![endpoint(1, NOT_READY), endpoint(2, TERMINATING)]);
    let e = world.explain(POD, "10.96.0.10:80");
    assert_eq!(chosen(&e), [at(2)]);
    assert_eq!(left_out(&e), [(at(1), LeftOut::NotReady)]);
}

#[test]
fn hints_leave_out_other_zones_and_other_nodes() {
    let zones = World::new(vec![hinted(1, &["zone-a"], &[]), hinted(2, &["zone-b"], &[])]);
    let e = zones.explain(POD, "10.96.0.10:80");
    assert_eq!(left_out(&e), [(at(2), LeftOut::OtherZone)]);
    let nodes =
        World::new(vec![hinted(1, &["zone-a"], &["worker-1"]), hinted(2, &["zone-a"], &["worker-2"])]);
    let e = nodes.explain(POD, "10.96.0.10:80");
    assert_eq!(left_out(&e), [(at(2), LeftOut::OtherNode)]);
    assert!(
        e.to_string().contains("left out    10.244.0.2:8080: its topology hint is for another node"),
        "{e}"
    );
}

#[test]
fn the_local_policy_leaves_out_what_is_not_here() {
    let world = World::new(vec![endpoint(1, READY), endpoint(2, READY), endpoint(3, TERMINATING)])
        .with(|s| s.internal_policy = TrafficPolicy::Local);
    let e = world.explain(POD, "10.96.0.10:80");
    assert_eq!(chosen(&e), [at(1)]);
    assert_eq!(left_out(&e), [(at(2), LeftOut::NotLocal), (at(3), LeftOut::Terminating)]);

    let world = World::new(vec![endpoint(2, READY), endpoint(3, NOT_READY)])
        .with(|s| s.internal_policy = TrafficPolicy::Local);
    let e = world.explain(POD, "10.96.0.10:80");
    assert_eq!(e.outcome, Outcome::Drop);
    assert_eq!(left_out(&e), [(at(2), LeftOut::NotLocal), (at(3), LeftOut::NotReady)]);
    assert!(e.reason().contains("internalTrafficPolicy is Local"), "{}", e.reason());
}

#[test]
fn without_usable_endpoints_it_is_refused() {
    let e = World::new(vec![endpoint(1, NOT_READY), endpoint(2, NOT_READY)]).explain(POD, "10.96.0.10:80");
    assert_eq!(e.outcome, Outcome::Reject);
    assert_eq!(left_out(&e), [(at(1), LeftOut::NotReady), (at(2), LeftOut::NotReady)]);
    let e = World::new(Vec::new()).explain(POD, "10.96.0.10:80");
    assert!(e.reason().contains("the Service has no endpoint"), "{}", e.reason());
}

#[test]
fn traffic_to_cluster_ips_is_masqueraded_from_off_cluster() {
    let world = World::new(vec![endpoint(1, READY)]);
    assert_eq!(source(&world.explain(POD, "10.96.0.10:80")), Source::Kept(Kept::Pod));
    for from in [CLIENT, NODE] {
        let e = world.explain(from, "10.96.0.10:80");
        assert_eq!(source(&e), Source::Masqueraded(Masquerade::OffCluster));
    }
    let all = World::new(vec![endpoint(1, READY)]).configured(|c| c.masquerade_all = true);
    assert_eq!(source(&all.explain(POD, "10.96.0.10:80")), Source::Masqueraded(Masquerade::All));
    let blind = World::new(vec![endpoint(1, READY)]).configured(|c| c.local_detector = LocalDetector::None);
    let e = blind.explain(CLIENT, "10.96.0.10:80");
    assert_eq!(source(&e), Source::Kept(Kept::NoDetector));
    assert!(e.to_string().contains("nothing is set to recognise pods by"), "{e}");
}

#[test]
fn traffic_to_external_addresses_is_masqueraded_under_the_cluster_policy() {
    let world = World::new(vec![endpoint(1, READY), endpoint(2, READY)]);
    for (from, to) in [(CLIENT, "192.0.2.11:30080"), (POD, "198.51.100.80:80"), (NODE, "198.51.100.80:80")] {
        let e = world.explain(from, to);
        assert_eq!(source(&e), Source::Masqueraded(Masquerade::ExternalCluster));
    }
}

#[test]
fn the_local_policy_keeps_sources_but_that_of_the_node() {
    let world = World::new(vec![endpoint(1, READY), endpoint(2, READY)])
        .with(|s| s.external_policy = TrafficPolicy::Local);
    let e = world.explain(CLIENT, "198.51.100.80:80");
    assert_eq!((source(&e), chosen(&e)), (Source::Kept(Kept::ExternalLocal), vec![at(1)]));
    assert_eq!(left_out(&e), [(at(2), LeftOut::NotLocal)]);
    let e = world.explain(POD, "198.51.100.80:80");
    assert_eq!((source(&e), chosen(&e)), (Source::Kept(Kept::PodUnderLocal), vec![at(1), at(2)]));
    assert!(e.reason().contains("Local, which does not bind pods"), "{}", e.reason());
    let e = world.explain(NODE, "198.51.100.80:80");
    assert_eq!(source(&e), Source::Masqueraded(Masquerade::NodeUnderLocal));
    assert!(e.reason().contains("Local, which does not bind the node itself"), "{}", e.reason());
}

#[test]
fn an_endpoint_that_reaches_itself_is_masqueraded() {
    let alone = World::new(vec![endpoint(1, READY)]).explain("10.244.0.1", "10.96.0.10:80");
    assert!(Fate::from(&alone.outcome).masquerade);
    assert!(alone.reason().contains("masquerade yes: 10.244.0.1:8080 meets its own packet"));
    let two = World::new(vec![endpoint(1, READY), endpoint(2, READY)]);
    let e = two.explain("10.244.0.1", "10.96.0.10:80");
    assert!(Fate::from(&e.outcome).masquerade);
    assert!(e.reason().contains("masquerade depends on the pick: yes if 10.244.0.1:8080"), "{}", e.reason());
    // The packet that leaves another node comes from there.
    let remote = two.explain("10.244.0.2", "10.96.0.10:80");
    assert!(!Fate::from(&remote.outcome).masquerade);
    // Masqueraded anyway, and a hairpin besides.
    let external = two.explain("10.244.0.1", "198.51.100.80:80");
    assert!(external.reason().contains("and 10.244.0.1:8080 would meet its own packet"));
}

#[test]
fn source_ranges_are_named() {
    let world = World::new(vec![endpoint(1, READY)])
        .with(|s| s.source_ranges = vec!["203.0.113.128/25".parse().unwrap()]);
    let e = world.explain(CLIENT, "198.51.100.80:80");
    assert_eq!(e.outcome, Outcome::Drop);
    assert!(e.reason().contains("loadBalancerSourceRanges (203.0.113.128/25)"), "{}", e.reason());
    assert_eq!(e.frontend().as_deref(), Some("198.51.100.80:80/tcp"));
    assert_eq!(world.explain("203.0.113.129", "198.51.100.80:80").class, SourceClass::Other);
}

#[test]
fn misses_say_what_there_is_instead() {
    let world = World::new(vec![endpoint(1, READY)]);
    let e = world.explain(POD, "10.96.0.10:81");
    assert_eq!(
        e.reason(),
        "a cluster IP of Service demo/web, which has no such port; it has 10.96.0.10:80/tcp"
    );
    assert_eq!(e.frontend(), None);
    let e = world.explain(POD, "10.96.0.99:80");
    assert!(e.reason().contains("10.96.0.0/16"), "{}", e.reason());
    let e = world.explain(CLIENT, "192.0.2.12:30080");
    assert_eq!(
        e.reason(),
        "30080/tcp is a node port of Service demo/web:http/tcp, but node ports answer only on 192.0.2.11 (nodePortAddresses)"
    );
    assert_eq!(world.explain(POD, "8.8.8.8:53").cause, Cause::NoFrontend);
    assert_eq!(world.explain(POD, "192.0.2.11:22").cause, Cause::NoFrontend);
}

#[test]
fn who_claims_a_frontend_in_vain_is_named() {
    let mut world = World::new(vec![endpoint(1, READY)]);
    let name = NamespacedName::new("demo", "thief");
    let cluster_ips = vec!["10.96.0.66".parse().unwrap()];
    world.services.push(Service { name: name.clone(), created: 2, cluster_ips, ..service() });
    let e = world.explain(CLIENT, "198.51.100.80:80");
    assert_eq!(matched(&e).service.service, NamespacedName::new("demo", "web"));
    assert_eq!(matched(&e).losers, [name]);
    assert!(e.to_string().contains("claimed by Service demo/thief, too"), "{e}");
    assert!(matched(&world.explain(CLIENT, "10.96.0.10:80")).losers.is_empty());
}

#[test]
fn affinity_is_mentioned() {
    let world = World::new(vec![endpoint(1, READY)]).with(|s| s.affinity = Some(Duration::from_hours(3)));
    assert!(world.explain(POD, "10.96.0.10:80").to_string().contains("in the last 10800 s"));
}

#[test]
fn which_pod_an_endpoint_is_has_no_say() {
    let named = |pods: [&str; 2]| {
        let endpoints = (1..).zip(pods);
        let named = |(last, pod)| Endpoint { pod: Some(PodHash::of(pod)), ..endpoint(last, READY) };
        slice(endpoints.map(named).collect())
    };
    let mut store = Store::default();
    store.apply(Event::Service(service()));
    store.apply(named(["web-0", "web-1"]));
    let mut compiler = Compiler::full(Context::new("worker-1", Config::default()), &store);
    let dirty = store.apply(named(["web-0", "web-2"]));
    let changes = compiler.update(&store, &dirty);
    assert!(changes.iter().all(crate::table::Change::is_empty), "{changes:?}");

    let [gone, new] = ["web-1", "web-2"].map(PodHash::of);
    let found = store.pods(&[gone, new].into());
    let expected = ((new, Arc::from("demo")), [IpAddr::from([10, 244, 0, 2])].into());
    assert_eq!(found, [expected].into());
    assert_eq!(size_of::<Endpoint>(), 72, "every endpoint of the cluster is kept");
}
