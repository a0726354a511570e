//! A node, a client and a few pods of both families, and Services of one port, for what only ebpf mode has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Algorithm, Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_harness::cases;
use shunt_harness::lab::{Conversation, Lab, Namespace, Probe, Storm, StormReport, StormSpec};
use shunt_mode::Backend as _;
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::kernel::{Bpf, Options};

use crate::driver::{Cluster, Synced};
use crate::mode::{EbpfMode, ModeUnderTest as _};
use crate::random::Step;

/// The node's addresses.
pub const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 168, 0, 2));
/// The same of IPv6.
pub const NODE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x192, 0, 0, 0, 0, 0, 2));
/// The client's addresses.
pub const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 2));
/// The same of IPv6.
pub const CLIENT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

const fn is_v4(family: IpFamily) -> bool {
    matches!(family, IpFamily::V4)
}

/// The cluster IP of a Service.
pub fn cluster_ip(family: IpFamily, n: u8) -> IpAddr {
    if is_v4(family) { [172, 16, 0, n].into() } else { [0xfd00, 0x30, 0, 0, 0, 0, 0, u16::from(n)].into() }
}

/// Service `svc{n}` with its node port, which is 3000 and `n`.
pub fn service_of(family: IpFamily, n: u8, protocol: Protocol, algorithm: Option<Algorithm>) -> Step {
    Step::Event(Event::Service(Service {
        scheduler: None,
        algorithm,
        name: NamespacedName::new("ns", format!("svc{n}")),
        created: 0,
        cluster_ips: vec![cluster_ip(family, n)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort {
            name: "".into(),
            protocol,
            port: 80,
            node_port: Some(3000 + u16::from(n)),
        }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        health_check_node_port: None,
    }))
}

/// Its endpoints.
pub fn slice_of(family: IpFamily, n: u8, protocol: Protocol, endpoints: &[(IpAddr, Conditions)]) -> Step {
    Step::Event(Event::Slice(EndpointSlice {
        name: NamespacedName::new("ns", format!("svc{n}-1")),
        service: NamespacedName::new("ns", format!("svc{n}")),
        family,
        ports: vec![EndpointPort { name: "".into(), protocol, port: 8080 }],
        endpoints: endpoints
            .iter()
            .map(|(address, conditions)| Endpoint {
                pod: None,
                address: *address,
                conditions: *conditions,
                node: Some(cases::NODE.into()),
                zone: None,
                hints: None,
            })
            .collect(),
        last_change_trigger: None,
    }))
}

/// [`service_of`] IPv4.
pub fn service(n: u8, protocol: Protocol, algorithm: Option<Algorithm>) -> Step {
    service_of(IpFamily::V4, n, protocol, algorithm)
}

/// [`slice_of`] IPv4.
pub fn slice(n: u8, protocol: Protocol, endpoints: &[(IpAddr, Conditions)]) -> Step {
    slice_of(IpFamily::V4, n, protocol, endpoints)
}

/// Endpoints that are ready.
pub fn ready(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<(IpAddr, Conditions)> {
    addresses.into_iter().map(|address| (address, Conditions::default())).collect()
}

/// A cluster of the node alone.
pub fn cluster(config: Config) -> Cluster {
    let mut cluster = Cluster::new(Context::new(cases::NODE, config));
    let node = Node { name: cases::NODE.into(), addresses: vec![NODE, NODE6], ..Node::default() };
    cluster.step(&Step::Event(Event::Node(node)));
    cluster
}

/// The address of a pod, from 1.
pub fn pod(n: u8) -> IpAddr {
    pod_of(IpFamily::V4, n)
}

/// The same of a family.
pub fn pod_of(family: IpFamily, n: u8) -> IpAddr {
    if is_v4(family) { [10, 180, 0, n].into() } else { [0xfd00, 0x180, 0, 0, 0, 0, 0, u16::from(n)].into() }
}

/// A node with so many pods, each of which answers with its address of IPv4.
pub fn lab(pods: u8) -> Lab {
    let mut builder = Lab::builder().node([NODE, NODE6]).client([CLIENT, CLIENT6]);
    for n in 1..=pods {
        builder = builder.pod(&pod(n).to_string(), [pod(n), pod_of(IpFamily::V6, n)]);
    }
    let lab = builder.build().unwrap();
    for n in 1..=pods {
        lab.pod(&pod(n).to_string()).unwrap().serve_ports([8080]).unwrap();
    }
    EbpfMode::settle(&lab).unwrap();
    lab
}

/// A process that starts with these settings, for one family.
pub fn start_of(family: IpFamily, lab: &Lab, options: &Arc<Options>) -> Synced<Ebpf<Bpf>> {
    let start = || {
        let mut started = Synced::adopt(Ebpf::new(Bpf::open(family, options.clone())?))?;
        started.backend.make_ready()?;
        Ok(started)
    };
    lab.node().run(start).unwrap()
}

/// [`start_of`] IPv4.
pub fn start(lab: &Lab, options: &Arc<Options>) -> Synced<Ebpf<Bpf>> {
    start_of(IpFamily::V4, lab, options)
}

/// Targets of load of Service 1: at a device from outside, at sockets of the node.
pub fn targets(lab: &Lab) -> Vec<(&Namespace, SocketAddr)> {
    vec![
        (lab.client(), SocketAddr::new(NODE, 3001)),
        (lab.node(), SocketAddr::new(cluster_ip(IpFamily::V4, 1), 80)),
    ]
}

/// TCP connections to `targets`, `rate` a second to each, begin and go on while `work` is done, which is given those that
/// go on, and none breaks. Returns what became of those that began.
pub fn under_load(
    rate: u32,
    targets: &[(&Namespace, SocketAddr)],
    work: impl FnOnce(&mut [Conversation]),
) -> Vec<StormReport> {
    let probe = |to: &SocketAddr| Probe::tcp(*to).timeout(Duration::from_millis(900));
    let storms: Vec<_> = targets
        .iter()
        .map(|(from, to)| {
            let spec = StormSpec { probe: probe(to), rate, duration: Duration::from_mins(2) };
            from.storm(spec).unwrap()
        })
        .collect();
    let mut open: Vec<_> = targets.iter().map(|(from, to)| from.converse(&probe(to)).unwrap()).collect();
    let homes: Vec<String> = open.iter_mut().map(|c| c.ask().unwrap().pod).collect();
    work(&mut open);
    let now: Vec<_> = open.iter_mut().map(Conversation::ask).collect();
    // What became of the others says whether one connection is lost or nothing goes through.
    let of = |(storm, (_, to)): (Storm, &(&Namespace, SocketAddr))| {
        let report = storm.stop().unwrap();
        println!("to {to}: {report}");
        assert!(!report.replies.is_empty());
        report
    };
    let reports: Vec<_> = storms.into_iter().zip(targets).map(of).collect();
    for (((now, home), report), (_, to)) in now.into_iter().zip(homes).zip(&reports).zip(targets) {
        let pod = now.unwrap_or_else(|error| panic!("to {to}: the one that was open: {error}")).pod;
        assert_eq!(pod, home, "to {to}");
        assert!(report.failures.is_empty(), "to {to}: {report}");
    }
    reports
}
