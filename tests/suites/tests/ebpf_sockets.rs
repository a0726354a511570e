//! Pods that meet the programs at their sockets: each in a network namespace and in a cgroup of its own below the one
//! that the programs are attached to, as containers are.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, LocalDetector, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::walk::Outcome;
use shunt_harness::cases::{self, Case};
use shunt_harness::lab::{Lab, Namespace, Outcome as Seen, Probe, require_kernel};
use shunt_mode::Backend;
use shunt_suites::driver::{CaseRun, Cluster, Synced, adopt};
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::{EbpfMode, ModeUnderTest};
use shunt_suites::random::Step;
use shunt_suites::town::Town;

/// Cases that run at the same time. They wait most of the time.
const WORKERS: usize = 6;

type Kernel = Synced<<EbpfMode as ModeUnderTest>::Real>;

fn run_case(case: &Case, packets: &AtomicUsize) -> Result<Vec<String>> {
    let town = Town::build(case, EbpfMode::settle)?;
    place::settle_pods(&town.lab, town.pods()?)?;
    let mut kernels = Vec::new();
    for family in IpFamily::ALL {
        kernels.push((family, adopt::<EbpfMode>(town.lab.node(), family)?));
    }
    let mut failures = Vec::new();
    let mut run = CaseRun::new(case, EbpfMode::MODE);
    while let Some(step) = run.next_step() {
        for (family, kernel) in &mut kernels {
            let change = run.cluster.take_change(*family);
            kernel.sync(run.cluster.table(*family), &change)?;
        }
        let of_pods =
            step.packets.iter().filter(|p| p.modes.contains(&EbpfMode::MODE) && town.is_from_pod(p));
        for packet in of_pods {
            packets.fetch_add(1, Ordering::Relaxed);
            let affinity = run.cluster.has_affinity(&packet.packet);
            let mut packet = packet.clone();
            // The programs at sockets know TCP and UDP. What a pod sends to an endpoint from the start has the pod's
            // own address, and answers find their way back without the node's help.
            if let Outcome::Forward(endpoints) = &mut packet.expect
                && packet.packet.protocol != Protocol::Sctp
            {
                for (_, masquerade) in endpoints {
                    *masquerade = false;
                }
            }
            if let Err(error) = town.send(&packet, affinity) {
                failures.push(format!("{}: {error:#}", step.describe(&packet)));
            }
        }
    }
    for (_, kernel) in &mut kernels {
        kernel.backend.cleanup()?;
    }
    Ok(failures)
}

#[test]
fn packets_of_the_cases_from_pods_meet_their_fate_at_sockets() {
    if !require_kernel() {
        return;
    }
    let cases = cases::all().unwrap();
    let cases: Vec<&Case> = cases.iter().filter(|case| case.modes.contains(&EbpfMode::MODE)).collect();
    let (next, packets, failures) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let failed =
                        run_case(case, &packets).unwrap_or_else(|e| vec![format!("{}: {e:#}", case.name)]);
                    failures.lock().unwrap().extend(failed);
                }
            });
        }
    });
    let (packets, failures) = (packets.into_inner(), failures.into_inner().unwrap());
    println!("{packets} packets");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(packets > 100, "only {packets} packets were sent");
}

/// The addresses of one family.
struct Family {
    id: IpFamily,
    node: IpAddr,
    pods: [IpAddr; 2],
    asker: IpAddr,
    cluster_ip: IpAddr,
    external_ip: IpAddr,
    load_balancer: IpAddr,
    empty: IpAddr,
}

fn families() -> [Family; 2] {
    let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
    [
        Family {
            id: IpFamily::V4,
            node: ip("192.168.0.2"),
            pods: [ip("10.180.0.1"), ip("10.180.0.2")],
            asker: ip("10.180.0.3"),
            cluster_ip: ip("172.30.0.1"),
            external_ip: ip("192.168.99.11"),
            load_balancer: ip("1.2.3.4"),
            empty: ip("172.30.0.2"),
        },
        Family {
            id: IpFamily::V6,
            node: ip("fd00:192::2"),
            pods: [ip("fd00:180::1"), ip("fd00:180::2")],
            asker: ip("fd00:180::3"),
            cluster_ip: ip("fd00:30::1"),
            external_ip: ip("fd00:99::11"),
            load_balancer: ip("fd00:99::4"),
            empty: ip("fd00:30::2"),
        },
    ]
}

/// Services `web` with endpoints and `empty` without, of one family. `web` is for sources of `ranges`, if there are any.
fn objects(family: &Family, ranges: &[IpNet]) -> Vec<Step> {
    let suffix = if family.id == IpFamily::V4 { "4" } else { "6" };
    let service = |name: &str, cluster_ip: IpAddr, outside: bool| {
        let port = |name: &str, protocol, node_port: u16| ServicePort {
            name: name.into(),
            protocol,
            port: 80,
            node_port: outside.then_some(node_port),
        };
        let others = |address: IpAddr| if outside { vec![address] } else { Vec::new() };
        Step::Event(Event::Service(Service {
            name: NamespacedName::new("ns", format!("{name}{suffix}")),
            created: 0,
            cluster_ips: vec![cluster_ip],
            external_ips: others(family.external_ip),
            load_balancer_ips: others(family.load_balancer),
            source_ranges: if outside { ranges.to_vec() } else { Vec::new() },
            ports: vec![port("t", Protocol::Tcp, 30080), port("u", Protocol::Udp, 30080)],
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            scheduler: None,
            algorithm: None,
            health_check_node_port: None,
        }))
    };
    let port = |name: &str, protocol| EndpointPort { name: name.into(), protocol, port: 8080 };
    let slice = Step::Event(Event::Slice(EndpointSlice {
        name: NamespacedName::new("ns", format!("web{suffix}-1")),
        service: NamespacedName::new("ns", format!("web{suffix}")),
        family: family.id,
        ports: vec![port("t", Protocol::Tcp), port("u", Protocol::Udp)],
        endpoints: family
            .pods
            .iter()
            .map(|address| Endpoint {
                address: *address,
                conditions: Conditions::default(),
                node: Some(cases::NODE.into()),
                zone: None,
                hints: None,
                pod: None,
            })
            .collect(),
        last_change_trigger: None,
    }));
    vec![service("web", family.cluster_ip, true), service("empty", family.empty, false), slice]
}

/// The endpoints `a` and `b`, the client `asker` in a cgroup of its own, and both Services, with sources of
/// `ranges` that may ask for `web`.
fn lab(ranges: &[IpNet]) -> Result<(Lab, Vec<Kernel>)> {
    let families = families();
    let all = |of: fn(&Family) -> IpAddr| families.iter().map(of).collect::<Vec<_>>();
    let lab = Lab::builder()
        .node(all(|f| f.node))
        .pod("a", all(|f| f.pods[0]))
        .pod("b", all(|f| f.pods[1]))
        .pod("asker", all(|f| f.asker))
        .build()?;
    for name in ["a", "b"] {
        lab.pod(name)?.serve_ports([8080])?;
    }
    EbpfMode::settle(&lab)?;
    place::settle_pods(&lab, [lab.pod("asker")?])?;
    let pods = ["10.180.0.0/16", "fd00:180::/64"].map(|range| range.parse().unwrap());
    let config = Config { local_detector: LocalDetector::Cidr(pods.into()), ..Config::default() };
    let mut cluster = Cluster::new(Context::new(cases::NODE, config));
    cluster.step(&Step::Event(Event::Node(Node {
        name: cases::NODE.into(),
        addresses: all(|f| f.node),
        ..Node::default()
    })));
    for family in &families {
        cluster.steps(&objects(family, ranges));
    }
    let mut kernels = Vec::new();
    for family in IpFamily::ALL {
        let mut kernel = adopt::<EbpfMode>(lab.node(), family)?;
        let change = cluster.take_change(family);
        kernel.sync(cluster.table(family), &change)?;
        kernels.push(kernel);
    }
    Ok((lab, kernels))
}

fn remove(kernels: Vec<Kernel>) {
    for mut kernel in kernels {
        kernel.backend.cleanup().unwrap();
    }
}

/// Which pod answers a TCP connection, as whom the client sees it, and as whom it sees the client.
fn ask_tcp(to: SocketAddr) -> Result<(String, SocketAddr)> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("TCP to {to}"))?;
    let peer = stream.peer_addr()?;
    stream.write_all(b"who\n")?;
    let mut answer = vec![0; 2048];
    let length = stream.read(&mut answer)?;
    Ok((String::from_utf8_lossy(&answer[..length]).into_owned(), peer))
}

/// The same by UDP, from a socket that names the peer each time.
fn ask_udp(socket: &UdpSocket, to: SocketAddr) -> Result<(String, SocketAddr)> {
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send_to(b"who\n", to).with_context(|| format!("UDP to {to}"))?;
    let mut answer = [0; 2048];
    let (length, from) = socket.recv_from(&mut answer).with_context(|| format!("an answer of {to}"))?;
    Ok((String::from_utf8_lossy(&answer[..length]).into_owned(), from))
}

/// Everything that the calling thread can ask of a family, with the addresses written as `write` says.
fn ask_everything(family: &Family, write: fn(IpAddr) -> IpAddr) -> Result<()> {
    let socket = |address: IpAddr, port| SocketAddr::new(write(address), port);
    let targets = [
        socket(family.cluster_ip, 80),
        socket(family.external_ip, 80),
        socket(family.load_balancer, 80),
        socket(family.node, 30080),
    ];
    let any = if targets[0].is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    for to in targets {
        let mut reached = BTreeSet::new();
        let mut note = |(answer, peer): (String, SocketAddr)| -> Result<()> {
            ensure!(peer == to, "the peer of {to} looks like {peer}");
            let from = format!("peer={}", SocketAddr::new(family.asker, 0)).trim_end_matches('0').to_owned();
            ensure!(answer.contains(&from), "{to} sees somebody else than {from}: {answer}");
            reached.extend(answer.split(' ').next().map(str::to_owned));
            Ok(())
        };
        for _ in 0..20 {
            note(ask_tcp(to)?)?;
            note(ask_udp(&UdpSocket::bind(any)?, to)?)?;
        }
        // A socket that keeps to one peer.
        let connected = UdpSocket::bind(any)?;
        connected.connect(to)?;
        ensure!(connected.peer_addr()? == to, "connected to {:?}", connected.peer_addr());
        ensure!(reached == BTreeSet::from(["pod=a".to_owned(), "pod=b".to_owned()]), "{to}: {reached:?}");
    }
    // Two peers of one socket are told apart.
    let unconnected = UdpSocket::bind(any)?;
    for to in targets {
        ensure!(ask_udp(&unconnected, to)?.1 == to, "{to}");
    }
    let refused = socket(family.empty, 80);
    let error = TcpStream::connect(refused).err().map(|error| error.kind());
    ensure!(error == Some(ErrorKind::ConnectionRefused), "TCP to {refused}: {error:?}");
    let error = unconnected.send_to(b"who\n", refused).err().map(|error| error.kind());
    ensure!(error == Some(ErrorKind::ConnectionRefused), "UDP to {refused}: {error:?}");
    Ok(())
}

const fn plain(address: IpAddr) -> IpAddr {
    address
}

/// As sockets of IPv6 name addresses of IPv4.
fn mapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
        IpAddr::V6(_) => address,
    }
}

/// At devices all but the first of the targets would be masqueraded: that the endpoints see the pod's own address
/// shows who has served it.
#[test]
fn a_pod_talks_to_endpoints_and_sees_services() {
    if !require_kernel() {
        return;
    }
    let (lab, kernels) = lab(&[]).unwrap();
    let asker = lab.pod("asker").unwrap();
    for family in &families() {
        asker.run(|| ask_everything(family, plain)).unwrap();
    }
    asker.run(|| ask_everything(&families()[0], mapped)).unwrap();
    remove(kernels);
}

/// Containers have cgroup namespaces: what they are in looks like the root to them.
#[test]
fn a_pod_with_a_cgroup_namespace_is_served() {
    if !require_kernel() {
        return;
    }
    let (lab, kernels) = lab(&[]).unwrap();
    let in_namespace = || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWCGROUP)?;
        let own = std::fs::read_to_string("/proc/thread-self/cgroup")?;
        ensure!(own.lines().any(|line| line == "0::/"), "not a cgroup namespace of its own: {own}");
        families().iter().try_for_each(|family| ask_everything(family, plain))
    };
    lab.pod("asker").unwrap().run(in_namespace).unwrap();
    remove(kernels);
}

/// What the node's own process asks of a load balancer's address, bound to `source` where there is one.
fn ask_from(node: &Namespace, source: Option<IpAddr>, to: SocketAddr) -> Result<[Seen; 2]> {
    let from = |probe: Probe| source.map_or_else(|| probe.clone(), |source| probe.clone().from(source));
    let timeout = Duration::from_secs(2);
    let [tcp, udp] = [Probe::tcp(to), Probe::udp(to)].map(|probe| from(probe).timeout(timeout));
    Ok([node.probe(tcp)?, node.probe(udp)?])
}

/// Some clouds' agents give the load balancer's address to a device of the node: packets to it leave by none, and the
/// source ranges are asked where the socket is.
#[test]
fn the_node_asks_for_a_guarded_address_that_it_has_itself() {
    if !require_kernel() {
        return;
    }
    let node_ranges: Vec<IpNet> = families().iter().map(|family| family.node.into()).collect();
    let other_ranges: Vec<IpNet> = families().iter().map(|family| family.asker.into()).collect();
    for (ranges, served) in [(node_ranges, true), (other_ranges, false)] {
        let (lab, mut kernels) = lab(&ranges).unwrap();
        let ip = |words: &str| lab.node().exec("ip", words.split(' '), "").unwrap();
        ip("link add vips index 900 type veth peer name unused");
        for family in families() {
            ip(&format!("address add {} dev vips nodad", IpNet::from(family.load_balancer)));
        }
        for kernel in &mut kernels {
            kernel.backend.refresh().unwrap();
        }
        for family in families() {
            let to = SocketAddr::new(family.load_balancer, 80);
            for source in [None, Some(family.load_balancer)] {
                for outcome in ask_from(lab.node(), source, to).unwrap() {
                    if served {
                        // Endpoints of other nodes could not answer the load balancer's address.
                        assert_eq!(outcome.peer(), Some(family.node), "{to} from {source:?}: {outcome}");
                    } else {
                        let refused = matches!(&outcome, Seen::Refused { errno: Errno::EPERM, .. });
                        assert!(refused, "{to} from {source:?}: {outcome}");
                    }
                }
            }
        }
        remove(kernels);
    }
}
