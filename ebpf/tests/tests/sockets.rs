//! Processes in a cgroup of the test's own: the hooks at sockets alone, no device has a program.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use shunt_ebpf_abi::{
    Address, Config, Event, Frontend, Group, SocketKey, SocketRecord, Verdict, address_flags, config_flags,
    endpoint_flags, frontend_flags, map,
};
use shunt_ebpf_tests::cgroup::{Cgroup, netns_cookie, socket_cookie};
use shunt_ebpf_tests::{FORWARD, Loaded, Service, TCP, UDP, in_both_kernels, key};
use shunt_harness::lab::{Lab, Namespace, Outcome, Probe};

const PATIENCE: Duration = Duration::from_millis(300);

fn socket(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse()?, port))
}

/// All tests of this file share the process, which is in one cgroup: one at a time.
fn alone() -> Result<(MutexGuard<'static, ()>, Cgroup)> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((guard, Cgroup::enter()?))
}

/// Pods a and b of both families, with servers, and a node.
fn lab() -> Result<Lab> {
    let lab = Lab::builder()
        .node(["192.168.0.2".parse()?, "fd00:192::2".parse()?])
        .client(["203.0.113.2".parse()?, "2001:db8::2".parse()?])
        .pod("a", ["10.180.0.1".parse()?, "fd00:180::1".parse()?])
        .pod("b", ["10.180.0.2".parse()?, "fd00:180::2".parse()?])
        .pod("asker", ["10.180.0.3".parse()?, "fd00:180::3".parse()?])
        .build()?;
    for name in ["a", "b"] {
        lab.pod(name)?.serve_ports([8080])?;
    }
    Ok(lab)
}

fn attach(lab: &Lab, cgroup: &Cgroup, flags: u32) -> Result<Loaded> {
    let mut loaded = Loaded::new()?;
    let host_netns = lab.node().run(netns_cookie)?;
    loaded.set_config(Config {
        host_netns,
        flags: flags | config_flags::PODS_BY_RANGE_V4 | config_flags::PODS_BY_RANGE_V6,
        ..Config::DEFAULT
    })?;
    loaded.set_address("10.96.0.10".parse()?, address_flags::CLUSTER_IP)?;
    loaded.set_address("fd00:96::10".parse()?, address_flags::CLUSTER_IP)?;
    for node in ["192.168.0.2", "fd00:192::2"] {
        loaded.set_address(node.parse()?, address_flags::LOCAL | address_flags::NODE_PORT)?;
    }
    loaded.attach_sockets(&cgroup.open()?)?;
    Ok(loaded)
}

/// A question through an unconnected UDP socket, and who answered.
fn ask_unconnected(socket: &UdpSocket, to: SocketAddr) -> Result<(String, SocketAddr)> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to(b"who\n", to)?;
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

fn pods(namespace: &Namespace, probe: &Probe) -> Result<BTreeSet<String>> {
    // A guest kernel without hardware virtualisation takes its time.
    let outcomes = namespace.probe_all(vec![probe.clone().timeout(Duration::from_secs(3)); 20])?;
    outcomes.iter().map(|o| Ok(o.pod().with_context(|| format!("{probe}: {o}"))?.to_owned())).collect()
}

const FAMILIES: [(&str, &str, &str, &str, &str); 2] = [
    ("10.96.0.10", "10.180.0.1", "10.180.0.2", "192.168.0.2", "0.0.0.0"),
    ("fd00:96::10", "fd00:180::1", "fd00:180::2", "fd00:192::2", "::"),
];

fn connections_go_to_endpoints_and_look_as_if_to_the_frontend() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, 0)?;
    let both = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
    for (vip, a, b, node, any) in FAMILIES {
        let endpoints = [socket(a, 8080)?, socket(b, 8080)?];
        for protocol in [TCP, UDP] {
            let service = loaded.add_service(&Service::new(protocol, endpoints))?;
            loaded.add_frontend(&service, socket(vip, 80)?, [FORWARD; 3], 0)?;
            loaded.add_node_port(&service, any.parse()?, 30080, [FORWARD; 3])?;
            let before = loaded.service_stats(service.id)?.forwarded;
            for to in [socket(vip, 80)?, socket(node, 30080)?] {
                let probe = if protocol == TCP { Probe::tcp(to) } else { Probe::udp(to) };
                assert_eq!(pods(lab.pod("asker")?, &probe)?, both, "{probe} from a pod");
                assert_eq!(pods(lab.node(), &probe)?, both, "{probe} from the node");
            }
            assert_eq!(loaded.service_stats(service.id)?.forwarded - before, 80);
            let of_endpoints: u64 =
                service.endpoints.values().map(|id| loaded.endpoint_stats(*id)).sum::<Result<_>>()?;
            assert_eq!(of_endpoints, 80);
        }
        lab.pod("asker")?.run(|| {
            let to = socket(vip, 80)?;
            assert_eq!(TcpStream::connect(to)?.peer_addr()?, to);
            let bound = UdpSocket::bind(socket(any, 0)?)?;
            bound.connect(to)?;
            assert_eq!(bound.peer_addr()?, to);
            Ok(())
        })?;
        // A pod that chooses itself needs no device.
        let service = loaded.add_service(&Service::new(TCP, [socket(a, 8080)?]))?;
        loaded.add_frontend(&service, socket(vip, 81)?, [FORWARD; 3], 0)?;
        let outcome = lab.pod("a")?.probe(Probe::tcp(socket(vip, 81)?))?;
        assert_eq!((outcome.pod(), outcome.peer()), (Some("a"), Some(a.parse()?)), "{outcome}");
    }
    // IPv4 through a socket of IPv6.
    lab.pod("asker")?.run(|| {
        let mapped: Ipv6Addr = "::ffff:10.96.0.10".parse()?;
        let to = SocketAddr::new(mapped.into(), 80);
        assert_eq!(TcpStream::connect(to)?.peer_addr()?, to);
        let unconnected = UdpSocket::bind("[::]:0")?;
        assert_eq!(ask_unconnected(&unconnected, to)?.1, to);
        Ok(())
    })
}

fn a_connected_socket_is_remembered_until_others_take_its_place() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, 0)?;
    for (vip, a, ..) in FAMILIES {
        let (to, endpoint) = (socket(vip, 80)?, socket(a, 8080)?);
        let mut written = Vec::new();
        for protocol in [TCP, UDP] {
            let service = loaded.add_service(&Service::new(protocol, [endpoint]))?;
            loaded.add_frontend(&service, to, [FORWARD; 3], 0)?;
            written.push(service);
        }
        let (tcp, udp) = lab.pod("asker")?.run(|| {
            let udp = UdpSocket::bind((if to.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?;
            udp.connect(to)?;
            Ok((TcpStream::connect(to)?, udp))
        })?;
        for (cookie, protocol, service) in
            [(socket_cookie(&tcp)?, TCP, &written[0]), (socket_cookie(&udp)?, UDP, &written[1])]
        {
            let peer = loaded.peer(cookie)?.context("no record")?;
            let of = |address: Address, port: u16| SocketAddr::new(address.into(), u16::from_be(port));
            assert_eq!(of(peer.frontend, peer.frontend_port), to);
            assert_eq!(of(peer.endpoint, peer.endpoint_port), endpoint);
            assert_eq!((peer.protocol, peer.service), (protocol, service.id));
            assert_eq!((peer.id, peer.generation), (service.endpoints[&endpoint], 1));
        }
        assert_eq!((tcp.peer_addr()?, udp.peer_addr()?), (to, to));
        // The same socket connects elsewhere.
        let direct = socket(a, 8081)?;
        lab.pod("asker")?.run(|| Ok(udp.connect(direct)?))?;
        assert_eq!(udp.peer_addr()?, direct);
        // As many sockets have come as there are places.
        loaded.forget_peer(socket_cookie(&tcp)?)?;
        assert_eq!(tcp.peer_addr()?, endpoint);
    }
    Ok(())
}

fn an_unconnected_socket_stays_with_its_endpoint_while_that_serves() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, 0)?;
    for (vip, a, b, _, any) in FAMILIES {
        let [a, b] = [socket(a, 8080)?, socket(b, 8080)?];
        let service = loaded.add_service(&Service::new(UDP, [a, b]))?;
        loaded.add_frontend(&service, socket(vip, 80)?, [FORWARD; 3], 0)?;
        loaded.add_frontend(&service, socket(vip, 81)?, [FORWARD; 3], 0)?;
        let client = lab.pod("asker")?.run(|| Ok(UdpSocket::bind(socket(any, 0)?)?))?;
        let to = socket(vip, 80)?;
        let (first, from) = ask_unconnected(&client, to)?;
        assert_eq!(from, to, "the answer comes from the frontend");
        for _ in 0..10 {
            assert_eq!(ask_unconnected(&client, to)?.0, first, "one socket, one endpoint");
        }
        // The same socket and another frontend, which may lead to the same endpoint.
        let other = socket(vip, 81)?;
        assert_eq!(ask_unconnected(&client, other)?.1, other);

        let at_a = first.contains("pod=a ");
        let gone = service.endpoints[if at_a { &a } else { &b }];
        let slot = service.frontend.cluster.base + u32::from(at_a);
        let cluster = Group { base: slot, count: 1 };
        loaded
            .put_frontend(key(to, UDP), Frontend { cluster, verdicts: [FORWARD; 3], ..service.frontend })?;
        loaded.set_endpoint(gone, if at_a { a } else { b }, service.id, endpoint_flags::SERVING)?;
        assert_eq!(ask_unconnected(&client, to)?.0, first, "a terminating endpoint keeps it");
        loaded.set_endpoint(gone, if at_a { a } else { b }, 0, 0)?;
        let (second, from) = ask_unconnected(&client, to)?;
        assert_ne!(second, first, "the endpoint is gone");
        assert_eq!(from, to);
    }
    assert_eq!(loaded.events(Event::Repicked)?, 2);
    let records: Vec<(SocketKey, SocketRecord)> = loaded.dump(map::SOCKETS)?;
    assert!(records.iter().any(|(k, _)| k.direction == SocketKey::REVERSE));
    Ok(())
}

fn refused_left_alone_and_protected() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, config_flags::PROTECT_NODE_PORTS)?;
    for (vip, a, _, node, any) in FAMILIES {
        for protocol in [TCP, UDP] {
            let service = loaded.add_service(&Service::new(protocol, [socket(a, 8080)?]))?;
            loaded.add_frontend(&service, socket(vip, 80)?, [Verdict::REJECT; 3], 0)?;
            loaded.add_frontend(&service, socket(vip, 81)?, [Verdict::DROP; 3], 0)?;
            // Who may come is a matter of the source, which tc knows.
            loaded.add_frontend(&service, socket(vip, 82)?, [FORWARD; 3], frontend_flags::SOURCE_RANGES)?;
            // The node itself is refused, pods are served.
            let verdicts = [FORWARD, Verdict::REJECT, Verdict::DROP];
            loaded.add_frontend(&service, socket(vip, 83)?, verdicts, 0)?;
            loaded.add_node_port(&service, any.parse()?, 30080, [FORWARD; 3])?;
        }
        for namespace in [lab.pod("asker")?, lab.node()] {
            // 99: an unknown port of a cluster IP.
            for port in [80, 99] {
                for probe in [Probe::tcp(socket(vip, port)?), Probe::udp(socket(vip, port)?)] {
                    let outcome = namespace.probe(probe.clone())?;
                    let refused = matches!(&outcome, Outcome::Refused { errno, icmp: None }
                        if *errno == nix::errno::Errno::ECONNREFUSED);
                    assert!(refused, "{probe} from {}: {outcome}", namespace.name());
                }
            }
            namespace.run(|| {
                let unconnected = UdpSocket::bind(socket(any, 0)?)?;
                let error = unconnected.send_to(b"x", socket(vip, 80)?).err().map(|e| e.kind());
                assert_eq!(error, Some(ErrorKind::ConnectionRefused));
                Ok(())
            })?;
            for port in [81, 82] {
                let outcome = namespace.probe(Probe::tcp(socket(vip, port)?))?;
                assert!(outcome.pod().is_none(), "{port} from {}: {outcome}", namespace.name());
            }
        }
        assert_eq!(lab.pod("asker")?.probe(Probe::tcp(socket(vip, 83)?))?.pod(), Some("a"));
        assert!(lab.node().probe(Probe::tcp(socket(vip, 83)?))?.is_refused());

        let bind = |address: &str, port: u16| -> Result<Option<ErrorKind>> {
            let (tcp, udp) =
                (TcpListener::bind(socket(address, port)?), UdpSocket::bind(socket(address, port)?));
            assert_eq!(
                tcp.as_ref().err().map(std::io::Error::kind),
                udp.as_ref().err().map(std::io::Error::kind)
            );
            Ok(tcp.err().map(|e| e.kind()))
        };
        let loopback = if any == "::" { "::1" } else { "127.0.0.1" };
        lab.node().run(|| {
            assert_eq!(bind(any, 30080)?, Some(ErrorKind::AddrInUse));
            assert_eq!(bind(node, 30080)?, Some(ErrorKind::AddrInUse));
            assert_eq!(bind(loopback, 30080)?, None);
            assert_eq!(bind(any, 30081)?, None);
            assert_eq!(bind(any, 0)?, None);
            Ok(())
        })?;
        lab.pod("asker")?.run(|| {
            assert_eq!(bind(any, 30080)?, None);
            Ok(())
        })?;
    }
    assert_eq!(loaded.events(Event::BindRefused)?, 8);
    Ok(())
}

fn session_affinity_is_of_the_network_namespace() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, 0)?;
    for (vip, a, b, ..) in FAMILIES {
        let [a, b] = [socket(a, 8080)?, socket(b, 8080)?];
        let service = Service { affinity: 1, ..Service::new(TCP, [a, b]) };
        let written = loaded.add_service(&service)?;
        let to = socket(vip, 80)?;
        loaded.add_frontend(&written, to, [FORWARD; 3], 0)?;
        let probe = Probe::tcp(to);
        let client = lab.pod("asker")?;
        let first = pods(client, &probe)?;
        assert_eq!(first.len(), 1, "one client, one endpoint: {first:?}");
        // Each connection renews it.
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(600));
            assert_eq!(pods(client, &probe)?, first);
        }
        // It ends when nothing has come for that long: sooner or later a renewal goes elsewhere. Chance keeps one of a
        // thousand tests at the same endpoint ten times in a row.
        let mut reached = BTreeSet::new();
        for _ in 0..40 {
            std::thread::sleep(Duration::from_millis(1100));
            reached.extend(client.probe(probe.clone())?.pod().map(str::to_owned));
            if reached.len() == 2 {
                break;
            }
        }
        assert_eq!(reached.len(), 2, "it never ends");
        // The endpoint leaves the group: its record does not hold, even while it serves.
        let now = pods(client, &probe)?;
        let at_a = now.contains("a");
        let leaving = if at_a { a } else { b };
        loaded.set_endpoint(written.endpoints[&leaving], leaving, written.id, endpoint_flags::SERVING)?;
        let slot = written.frontend.cluster.base + u32::from(at_a);
        let cluster = Group { base: slot, count: 1 };
        loaded
            .put_frontend(key(to, TCP), Frontend { cluster, verdicts: [FORWARD; 3], ..written.frontend })?;
        assert_ne!(pods(client, &probe)?, now);
    }
    Ok(())
}

fn loopback_of_a_pod_is_its_own() -> Result<()> {
    let (_guard, cgroup) = alone()?;
    let lab = lab()?;
    let mut loaded = attach(&lab, &cgroup, 0)?;
    for (_, a, _, _, any) in FAMILIES {
        let loopback = if any == "::" { "::1" } else { "127.0.0.1" };
        let address: IpAddr = loopback.parse()?;
        loaded.set_address(address, address_flags::NODE_PORT)?;
        let service = loaded.add_service(&Service::new(TCP, [socket(a, 8080)?]))?;
        loaded.add_node_port(&service, any.parse()?, 30080, [FORWARD; 3])?;
        let probe = Probe::tcp(SocketAddr::new(address, 30080));
        assert_eq!(lab.node().probe(probe.clone())?.pod(), Some("a"));
        assert!(lab.pod("asker")?.probe(probe)?.is_refused());
    }
    Ok(())
}

in_both_kernels!(
    a_connected_socket_is_remembered_until_others_take_its_place,
    connections_go_to_endpoints_and_look_as_if_to_the_frontend,
    an_unconnected_socket_stays_with_its_endpoint_while_that_serves,
    refused_left_alone_and_protected,
    session_affinity_is_of_the_network_namespace,
    loopback_of_a_pod_is_its_own,
);
