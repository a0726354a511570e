use std::net::{IpAddr, SocketAddr};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::test_runner::RngSeed;

use super::*;
use crate::compile::{Compiler, Context};
use crate::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use crate::id::NamespacedName;
use crate::node::{Config, NodePortAddresses};
use crate::service::{Service, ServicePort};
use crate::store::{Event, Store};

const NODE: &str = "192.0.2.11";
const OTHER_NODE_ADDRESS: &str = "192.0.2.12";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn service(name: &str, cluster_ip: &str, protocols: &[Protocol], node_port: Option<u16>) -> Service {
    Service {
        name: NamespacedName::new("demo", name),
        created: 0,
        cluster_ips: vec![ip(cluster_ip)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: protocols
            .iter()
            .map(|protocol| ServicePort {
                name: format!("dns-{protocol}").into(),
                protocol: *protocol,
                port: 53,
                node_port,
            })
            .collect(),
        internal_policy: crate::service::TrafficPolicy::Cluster,
        external_policy: crate::service::TrafficPolicy::Cluster,
        affinity: None,
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    }
}

fn slice(service: &str, endpoints: &[(&str, Conditions)]) -> EndpointSlice {
    EndpointSlice {
        name: NamespacedName::new("demo", format!("{service}-1")),
        service: NamespacedName::new("demo", service),
        family: IpFamily::V4,
        ports: [Protocol::Udp, Protocol::Tcp, Protocol::Sctp]
            .map(|protocol| EndpointPort { name: format!("dns-{protocol}").into(), protocol, port: 5353 })
            .into(),
        endpoints: endpoints
            .iter()
            .map(|(address, conditions)| Endpoint {
                address: ip(address),
                conditions: *conditions,
                node: None,
                zone: None,
                hints: None,
                pod: None,
            })
            .collect(),
        last_change_trigger: None,
    }
}

const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
const TERMINATING: Conditions = Conditions { ready: false, serving: true, terminating: true };
const DEAD: Conditions = Conditions { ready: false, serving: false, terminating: true };
const EARLY: Conditions = Conditions { ready: true, serving: false, terminating: false };

/// A proxy without a kernel.
struct Proxy {
    store: Store,
    compiler: Compiler,
    serving: Serving,
}

impl Proxy {
    fn new(config: Config) -> Self {
        let mut context = Context::new("test-node", config);
        context.node_addresses = vec![ip(NODE)];
        context.interface_addresses = [ip(NODE), ip(OTHER_NODE_ADDRESS), ip("127.0.0.1")].into();
        let store = Store::default();
        Self {
            compiler: Compiler::full(context, &store),
            serving: Serving::full(IpFamily::V4, &store),
            store,
        }
    }

    fn table(&self) -> &ForwardingTable {
        self.compiler.table(IpFamily::V4)
    }

    /// Takes in a change; whose flows are to be looked at.
    fn apply(&mut self, event: Event) -> Scope {
        let dirty = self.store.apply(event);
        let [change, _] = self.compiler.update(&self.store, &dirty);
        let mut frontends = change.frontends;
        for name in &dirty.services {
            frontends.extend(self.serving.update(name, &self.store, self.compiler.table(IpFamily::V4)));
        }
        Scope::Frontends(frontends)
    }

    fn stale(&self, scope: &Scope) -> StaleFlows {
        StaleFlows::new(self.table(), &self.serving, scope)
    }
}

fn flow(protocol: Protocol, destination: &str, endpoint: &str) -> Flow {
    let (source, destination) = (socket("198.51.100.20:40000"), socket(destination));
    Flow {
        protocol,
        original: Tuple { source, destination },
        reply: Tuple { source: socket(endpoint), destination: source },
        zone: 0,
        id: Some(7),
    }
}

fn udp(destination: &str, endpoint: &str) -> Flow {
    flow(Protocol::Udp, destination, endpoint)
}

fn goes(stale: &StaleFlows, flow: &Flow) -> bool {
    let goes = stale.judge(flow).is_some();
    let asked = stale.filters(8).iter().filter(|f| f.matches(flow)).count();
    assert!(asked <= 1 && (!goes || asked == 1), "{flow}: {:?}", stale.filters(8));
    goes
}

#[test]
fn flows_stay_as_long_as_their_endpoint_serves() {
    let mut proxy = Proxy::new(Config::default());
    proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp, Protocol::Tcp], None)));
    let scope = proxy.apply(Event::Slice(slice(
        "dns",
        &[("10.244.1.1", READY), ("10.244.1.2", TERMINATING), ("10.244.1.3", DEAD), ("10.244.1.4", EARLY)],
    )));
    let stale = proxy.stale(&scope);
    for (endpoint, expected) in [
        ("10.244.1.1:5353", false),
        ("10.244.1.2:5353", false),
        ("10.244.1.3:5353", true),
        ("10.244.1.4:5353", false),
        ("10.244.1.1:53", true),
        ("10.244.9.9:5353", true),
        // Not translated: sent before the Service had an endpoint.
        ("10.96.0.10:53", true),
    ] {
        assert_eq!(goes(&stale, &udp("10.96.0.10:53", endpoint)), expected, "{endpoint}");
        assert!(!goes(&stale, &flow(Protocol::Tcp, "10.96.0.10:53", endpoint)));
        assert!(!goes(&stale, &udp("10.96.0.11:53", endpoint)));
        assert!(!goes(&stale, &udp("10.96.0.10:54", endpoint)));
    }
    let elsewhere = Flow { zone: 3, ..udp("10.96.0.10:53", "10.96.0.10:53") };
    assert!(!goes(&stale, &elsewhere), "another zone's packets have not met the Service");
    assert!(goes(&stale, &Flow { zone: 3, ..udp("10.96.0.10:53", "10.244.1.3:5353") }));
    assert_eq!(
        stale.judge(&udp("10.96.0.10:53", "10.244.1.3:5353")).unwrap().to_string(),
        "demo/dns:dns-udp/udp"
    );
}

#[test]
fn an_endpoint_that_goes_after_terminating_is_noticed() {
    let mut proxy = Proxy::new(Config::default());
    proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp], Some(30053))));
    proxy.apply(Event::Slice(slice("dns", &[("10.244.1.1", READY), ("10.244.1.2", TERMINATING)])));
    let scope = proxy.apply(Event::Slice(slice("dns", &[("10.244.1.1", READY)])));
    assert!(goes(&proxy.stale(&scope), &udp("10.96.0.10:53", "10.244.1.2:5353")));
    assert!(goes(&proxy.stale(&scope), &udp("192.0.2.11:30053", "10.244.1.2:5353")));
    // Nothing changed: nothing to look at.
    assert!(proxy.apply(Event::Slice(slice("dns", &[("10.244.1.1", READY)]))).is_empty());
}

#[test]
fn without_endpoints_all_flows_go_and_without_service_those_that_were_ours() {
    let mut proxy = Proxy::new(Config::default());
    proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp, Protocol::Sctp], None)));
    proxy.apply(Event::Slice(slice("dns", &[("10.244.1.1", READY)])));
    let scope = proxy.apply(Event::Slice(slice("dns", &[])));
    for protocol in [Protocol::Udp, Protocol::Sctp] {
        assert!(goes(&proxy.stale(&scope), &flow(protocol, "10.96.0.10:53", "10.244.1.1:5353")));
        assert!(goes(&proxy.stale(&scope), &flow(protocol, "10.96.0.10:53", "10.96.0.10:53")));
    }
    let scope = proxy.apply(Event::ServiceGone(NamespacedName::new("demo", "dns")));
    let stale = proxy.stale(&scope);
    assert!(goes(&stale, &udp("10.96.0.10:53", "10.244.1.1:5353")));
    assert!(!goes(&stale, &udp("10.96.0.10:53", "10.96.0.10:53")));
    let rule = stale.judge(&udp("10.96.0.10:53", "10.244.1.1:5353")).unwrap();
    assert_eq!(rule.to_string(), "a Service that is gone");
}

#[test]
fn node_ports_are_matched_by_address_and_port() {
    for (addresses, others) in [(NodePortAddresses::Primary, false), (NodePortAddresses::All, true)] {
        let mut proxy = Proxy::new(Config { node_port_addresses: addresses, ..Config::default() });
        let scope = proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp], Some(30053))));
        let stale = proxy.stale(&scope);
        assert!(goes(&stale, &udp("192.0.2.11:30053", "10.244.1.1:5353")));
        assert_eq!(goes(&stale, &udp("192.0.2.12:30053", "10.244.1.1:5353")), others);
        // Somebody else's flow to the same port.
        assert!(!goes(&stale, &udp("203.0.113.9:30053", "203.0.113.9:30053")));
        assert!(!goes(&stale, &udp("127.0.0.1:30053", "127.0.0.1:30053")));

        // An external IP on the node takes precedence over the node port.
        let mut other = service("other", "10.96.0.20", &[Protocol::Udp], None);
        other.external_ips = vec![ip(NODE)];
        other.ports[0].port = 30053;
        proxy.apply(Event::Slice(slice("other", &[("10.244.1.9", READY)])));
        proxy.apply(Event::Service(other));
        let stale = proxy.stale(&scope);
        assert!(!goes(&stale, &udp("192.0.2.11:30053", "10.244.1.9:5353")));
        assert!(!goes(&stale, &udp("192.0.2.11:30053", "10.244.1.1:5353")), "not in question here");
        assert!(goes(&proxy.stale(&Scope::All), &udp("192.0.2.11:30053", "10.244.1.1:5353")));
    }
}

#[test]
fn few_filters_are_exact_and_many_are_one() {
    let mut proxy = Proxy::new(Config { node_port_addresses: NodePortAddresses::All, ..Config::default() });
    let texts = |proxy: &Proxy, most: usize| -> Vec<String> {
        proxy.stale(&Scope::All).filters(most).iter().map(ToString::to_string).collect()
    };
    assert!(texts(&proxy, 8).is_empty() && proxy.stale(&Scope::All).is_empty());
    proxy.apply(Event::Service(service("tcp", "10.96.0.9", &[Protocol::Tcp], None)));
    assert!(proxy.stale(&Scope::All).is_empty());
    proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp, Protocol::Sctp], None)));
    assert_eq!(texts(&proxy, 8), ["IPv4 udp to 10.96.0.10:53", "IPv4 sctp to 10.96.0.10:53"]);
    let mut two = service("two", "10.96.0.11", &[Protocol::Udp, Protocol::Udp], None);
    two.ports[1].port = 54;
    proxy.apply(Event::Service(two));
    assert_eq!(
        texts(&proxy, 8),
        ["IPv4 udp to 10.96.0.10:53", "IPv4 udp to 10.96.0.11", "IPv4 sctp to 10.96.0.10:53"]
    );
    assert_eq!(texts(&proxy, 2), ["IPv4 udp to *", "IPv4 sctp to *"]);
    let mut proxy = Proxy::new(Config { node_port_addresses: NodePortAddresses::All, ..Config::default() });
    proxy.apply(Event::Service(service("dns", "10.96.0.10", &[Protocol::Udp], Some(30053))));
    assert_eq!(texts(&proxy, 2), ["IPv4 udp to *:53", "IPv4 udp to *:30053"]);
}

#[test]
fn ipv6_is_not_filtered_by_address() {
    let frontend =
        |address: &str, port| Frontend { address: Some(ip(address)), protocol: Protocol::Udp, port };
    let texts = |frontends: &[Frontend]| -> Vec<String> {
        let scope = Scope::Frontends(frontends.iter().copied().collect());
        let stale = StaleFlows::new(&ForwardingTable::new(IpFamily::V6), &Serving::new(IpFamily::V6), &scope);
        stale.filters(2).iter().map(ToString::to_string).collect()
    };
    let frontends = [frontend("fd00::1", 53), frontend("fd00::2", 53), frontend("fd00::2", 54)];
    assert_eq!(texts(&frontends[..2]), ["IPv6 udp to *:53"]);
    assert_eq!(texts(&frontends), ["IPv6 udp to *:53", "IPv6 udp to *:54"]);
}

#[test]
fn scopes_add_up() {
    let frontend = |port| Frontend { address: None, protocol: Protocol::Udp, port };
    let mut scope = Scope::default();
    assert!(scope.is_empty());
    scope.merge(Scope::Frontends([frontend(1)].into()));
    scope.merge(Scope::Frontends([frontend(2)].into()));
    assert_eq!(scope, Scope::Frontends([frontend(1), frontend(2)].into()));
    scope.merge(Scope::All);
    scope.merge(Scope::Frontends([frontend(3)].into()));
    assert_eq!(scope, Scope::All);
}

const NAMES: [&str; 2] = ["a", "b"];
const POOL: [&str; 3] = ["10.244.1.1", "10.244.1.2", "10.244.1.3"];

fn random_event() -> impl Strategy<Value = Event> {
    let random_service = (
        select(&NAMES[..]),
        select(vec!["10.96.0.10", "10.96.0.11"]),
        subsequence(vec![Protocol::Udp, Protocol::Tcp, Protocol::Sctp], 1..=3),
        select(vec![None, Some(53), Some(30053)]),
        subsequence(vec![NODE, OTHER_NODE_ADDRESS, "203.0.113.9"], 0..=2),
        0..2_i64,
    )
        .prop_map(|(name, cluster_ip, protocols, node_port, externals, created)| {
            let mut service = service(name, cluster_ip, &protocols, node_port);
            service.external_ips = externals.into_iter().map(ip).collect();
            service.created = created;
            service.external_policy = if created == 0 {
                crate::service::TrafficPolicy::Local
            } else {
                crate::service::TrafficPolicy::Cluster
            };
            Event::Service(service)
        });
    let endpoint = (select(&POOL[..]), select(vec![READY, TERMINATING, DEAD, EARLY]));
    let random_slice = (select(&NAMES[..]), vec(endpoint, 0..4))
        .prop_map(|(name, endpoints)| Event::Slice(slice(name, &endpoints)));
    prop_oneof![
        4 => random_slice,
        2 => random_service,
        1 => select(&NAMES[..]).prop_map(|n| Event::ServiceGone(NamespacedName::new("demo", n))),
        1 => select(&NAMES[..]).prop_map(|n| Event::SliceGone(NamespacedName::new("demo", format!("{n}-1")))),
    ]
}

/// Every flow that could be there.
fn all_flows() -> Vec<Flow> {
    let mut flows = Vec::new();
    for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Sctp] {
        for address in ["10.96.0.10", "10.96.0.11", NODE, OTHER_NODE_ADDRESS, "203.0.113.9", "203.0.113.10"] {
            for port in [53, 30053] {
                let destination = format!("{address}:{port}");
                flows.push(flow(protocol, &destination, &destination));
                for endpoint in POOL {
                    flows.push(flow(protocol, &destination, &format!("{endpoint}:5353")));
                }
            }
        }
    }
    flows
}

/// The same question asked the slow way.
fn should_go(proxy: &Proxy, flow: &Flow) -> bool {
    expected(proxy, flow).unwrap_or(false)
}

/// `None` for destinations that are nobody's.
fn expected(proxy: &Proxy, flow: &Flow) -> Option<bool> {
    let destination = flow.original.destination;
    let exact =
        Frontend { address: Some(destination.ip()), protocol: flow.protocol, port: destination.port() };
    let table = proxy.table();
    let held = table.frontend(&exact).or_else(|| {
        let serves = table.node().serves_node_ports(destination.ip());
        serves.then(|| table.frontend(&Frontend { address: None, ..exact })).flatten()
    });
    let (port, _) = held?;
    let serves = proxy.store.slices(&port.name.service).any(|slice| {
        slice.endpoints.iter().any(|e| {
            e.address == flow.reply.source.ip()
                && flow.reply.source.port() == 5353
                && (e.conditions.serving || e.conditions.ready)
        })
    });
    Some(flow.protocol != Protocol::Tcp && !serves)
}

proptest! {
    // The same clusters each time: a red run is the change's doing.
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(0),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn looking_at_what_changed_finds_what_looking_at_everything_finds(
        events in vec(random_event(), 0..30), everywhere in any::<bool>(), most in 1..12_usize
    ) {
        let node_port_addresses = if everywhere { NodePortAddresses::All } else { NodePortAddresses::Primary };
        let mut proxy = Proxy::new(Config { node_port_addresses, ..Config::default() });
        for event in events {
            let before = proxy.stale(&Scope::All);
            // All flows that are not stale before the change.
            let flows: Vec<Flow> = all_flows().into_iter().filter(|f| before.judge(f).is_none()).collect();
            let scope = proxy.apply(event);
            prop_assert_eq!(&proxy.serving, &Serving::full(IpFamily::V4, &proxy.store));
            let (some, all) = (proxy.stale(&scope), proxy.stale(&Scope::All));
            for flow in &flows {
                let goes = some.judge(flow).is_some();
                prop_assert_eq!(all.judge(flow).is_some(), should_go(&proxy, flow), "{}", flow);
                prop_assert!(goes || all.judge(flow).is_none(), "missed {flow}");
                let gone = expected(&proxy, flow).is_none() && flow.is_translated();
                prop_assert!(!goes || gone || all.judge(flow).is_some(), "hit {flow}");
                for stale in [&some, &all] {
                    let asked = stale.filters(most).iter().filter(|f| f.matches(flow)).count();
                    prop_assert!(asked <= 1 && (asked == 1 || stale.judge(flow).is_none()));
                    prop_assert!(stale.filters(most).len() <= most.max(2));
                }
            }
        }
    }
}
