//! Real traffic through the programs at devices: no hooks at sockets, so every packet is translated.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::net::if_::if_nametoindex;
use shunt_ebpf_abi::{
    Config, Event, Flow, FlowKey, Frontend, Group, Interface, Verdict, address_flags, config_flags,
    endpoint_flags, frontend_flags, map, range_owner,
};
use shunt_ebpf_tests::packet::{self, ETHERNET, Packet};
use shunt_ebpf_tests::tun::Tun;
use shunt_ebpf_tests::{FORWARD, Loaded, MASQUERADE, Service, TCP, UDP, in_both_kernels, key};
use shunt_harness::lab::{Lab, Namespace, Outcome, Probe, TransferSpec};

/// The addresses of one family.
struct Family {
    node: IpAddr,
    client: IpAddr,
    pods: [IpAddr; 2],
    remote: IpAddr,
    vip: IpAddr,
    any: IpAddr,
    service_range: (IpAddr, u8),
    unallocated: IpAddr,
}

fn families() -> Result<[Family; 2]> {
    let ip = |text: &str| text.parse::<IpAddr>().context("address");
    Ok([
        Family {
            node: ip("192.168.0.2")?,
            client: ip("203.0.113.2")?,
            pods: [ip("10.180.0.1")?, ip("10.180.0.2")?],
            remote: ip("10.180.1.1")?,
            vip: ip("10.96.0.10")?,
            any: ip("0.0.0.0")?,
            service_range: (ip("10.96.0.0")?, 16),
            unallocated: ip("10.96.0.99")?,
        },
        Family {
            node: ip("fd00:192::2")?,
            client: ip("2001:db8::2")?,
            pods: [ip("fd00:180::1")?, ip("fd00:180::2")?],
            remote: ip("fd00:181::1")?,
            vip: ip("fd00:96::10")?,
            any: ip("::")?,
            service_range: (ip("fd00:96::")?, 112),
            unallocated: ip("fd00:96::99")?,
        },
    ])
}

fn lab() -> Result<Lab> {
    let families = families()?;
    let all = |of: fn(&Family) -> IpAddr| families.iter().map(of).collect::<Vec<_>>();
    let lab = Lab::builder()
        .node(all(|f| f.node))
        .client(all(|f| f.client))
        .pod("a", all(|f| f.pods[0]))
        .pod("b", all(|f| f.pods[1]))
        .remote_pod("elsewhere", "c", all(|f| f.remote))
        .build()?;
    for name in ["a", "b", "elsewhere"] {
        lab.pod(name)?.serve_ports([8080])?;
    }
    Ok(lab)
}

/// The programs at all devices of the lab's node, with what is known of the node.
fn attach(lab: &Lab) -> Result<Loaded> {
    let mut loaded = Loaded::new()?;
    let [v4, v6] = families()?;
    for family in [&v4, &v6] {
        loaded.set_address(family.node, address_flags::LOCAL | address_flags::NODE_PORT)?;
        loaded.set_address(family.vip, address_flags::CLUSTER_IP)?;
        let owner = range_owner::service_cidr(family.vip.is_ipv4());
        loaded.add_range(owner, family.service_range.0, family.service_range.1)?;
        for pod in family.pods {
            loaded.add_range(range_owner::pods(pod.is_ipv4()), pod, if pod.is_ipv4() { 32 } else { 128 })?;
        }
    }
    loaded.set_config(Config {
        flags: config_flags::SERVICE_CIDRS | config_flags::PODS_BY_RANGE_V4 | config_flags::PODS_BY_RANGE_V6,
        masquerade4: v4.node.into(),
        masquerade6: v6.node.into(),
        ..Config::DEFAULT
    })?;
    let links = ["client", "a", "b", "elsewhere"].map(|name| lab.link(name).context("a link"));
    lab.node().run(|| {
        for link in links {
            loaded.attach_device(link?)?;
        }
        loaded.set_interface(
            if_nametoindex("eth0")?,
            Interface { flags: 0, address4: v4.node.into(), address6: v6.node.into() },
        )
    })?;
    Ok(loaded)
}

/// TCP and UDP.
fn probes(to: SocketAddr) -> [Probe; 2] {
    [Probe::tcp(to), Probe::udp(to)]
}

/// Both reach this pod, which sees this peer.
fn assert_reached(from: &Namespace, to: SocketAddr, pod: &str, peer: IpAddr) -> Result<()> {
    for probe in probes(to) {
        let outcome = from.probe(probe.clone())?;
        let seen = (outcome.pod(), outcome.peer());
        assert_eq!(seen, (Some(pod), Some(peer)), "{probe} from {}: {outcome}", from.name());
    }
    Ok(())
}

/// Neither is answered.
fn assert_silent(from: &Namespace, to: SocketAddr) -> Result<()> {
    for probe in probes(to) {
        let outcome = from.probe(probe.clone())?;
        assert!(outcome.is_timeout(), "{probe} from {}: {outcome}", from.name());
    }
    Ok(())
}

/// Ten of them all reach this pod.
fn assert_stays(from: &Namespace, probe: &Probe, pod: &str, why: &str) -> Result<()> {
    for _ in 0..10 {
        assert_eq!(from.probe(probe.clone())?.pod(), Some(pod), "{why}");
    }
    Ok(())
}

fn socket(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

fn cluster_ips_node_ports_and_their_sources() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        for protocol in [TCP, UDP] {
            let near = loaded.add_service(&Service {
                cluster: family.pods.map(|p| (socket(p, 8080), true)).to_vec(),
                ..Service::new(protocol, [])
            })?;
            let far = loaded.add_service(&Service::new(protocol, [socket(family.remote, 8080)]))?;
            loaded.add_frontend(&near, socket(family.vip, 80), [FORWARD, MASQUERADE, MASQUERADE], 0)?;
            loaded.add_frontend(&far, socket(family.vip, 81), [FORWARD, MASQUERADE, MASQUERADE], 0)?;
            loaded.add_node_port(&near, family.any, 30080, [MASQUERADE; 3])?;
            loaded.add_node_port(&far, family.any, 30081, [MASQUERADE; 3])?;
            loaded.add_node_port(&near, family.any, 30082, [FORWARD; 3])?;
        }
        // Masqueraded on the way to pods of this node and of others, or not at all.
        for (port, to, seen, pods) in [
            (80, family.vip, family.node, vec!["a", "b"]),
            (81, family.vip, family.node, vec!["c"]),
            (30080, family.node, family.node, vec!["a", "b"]),
            (30081, family.node, family.node, vec!["c"]),
            (30082, family.node, family.client, vec!["a", "b"]),
        ] {
            for probe in probes(socket(to, port)) {
                let outcomes = lab.client().probe_all(vec![probe.clone(); 20])?;
                let mut reached: Vec<&str> = outcomes.iter().filter_map(Outcome::pod).collect();
                assert_eq!(reached.len(), 20, "{probe}: {}", outcomes[0]);
                reached.sort_unstable();
                reached.dedup();
                assert_eq!(reached, pods, "{probe}");
                assert!(outcomes.iter().all(|o| o.peer() == Some(seen)), "{probe}: {}", outcomes[0]);
            }
        }
        // From a pod that has no socket hook; among its endpoints is itself.
        for probe in probes(socket(family.vip, 80)) {
            for outcome in lab.pod("a")?.probe_all(vec![probe.clone(); 20])? {
                let seen = if outcome.pod() == Some("a") { family.node } else { family.pods[0] };
                assert_eq!(outcome.peer(), Some(seen), "{probe}: {outcome}");
            }
        }
        assert_reached(lab.pod("a")?, socket(family.vip, 81), "c", family.pods[0])?;
        // From a process of the node without a socket hook.
        for probe in probes(socket(family.vip, 81)).into_iter().chain(probes(socket(family.vip, 80))) {
            let outcome = lab.node().probe(probe.clone())?;
            assert_eq!(outcome.peer(), Some(family.node), "{probe}: {outcome}");
        }
        // What is none of our business.
        assert_reached(lab.pod("a")?, socket(family.remote, 8080), "c", family.pods[0])?;
    }
    Ok(())
}

fn refused_and_dropped() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        for protocol in [TCP, UDP] {
            let service = loaded.add_service(&Service::new(protocol, [socket(family.remote, 8080)]))?;
            loaded.add_frontend(&service, socket(family.vip, 80), [Verdict::REJECT; 3], 0)?;
            loaded.add_frontend(&service, socket(family.vip, 81), [Verdict::DROP; 3], 0)?;
            loaded.add_frontend(
                &service,
                socket(family.vip, 82),
                [FORWARD; 3],
                frontend_flags::SOURCE_RANGES,
            )?;
            loaded.add_range(service.id, family.pods[0], if family.vip.is_ipv4() { 32 } else { 128 })?;
        }
        let from = [lab.client(), lab.pod("a")?, lab.node()];
        for namespace in from {
            for probe in probes(socket(family.vip, 80)).into_iter().chain(probes(socket(family.vip, 99))) {
                let outcome = namespace.probe(probe.clone())?;
                let Outcome::Refused { icmp: Some(icmp), .. } = &outcome else {
                    bail!("{probe} from {}: {outcome}", namespace.name());
                };
                let expected = if family.vip.is_ipv4() { (3, 3) } else { (1, 4) };
                assert_eq!((icmp.kind, icmp.code), expected, "{probe}");
                assert_eq!(icmp.from, Some(family.vip), "{probe}");
            }
            assert_silent(namespace, socket(family.vip, 81))?;
            assert_silent(namespace, socket(family.unallocated, 80))?;
        }
        assert_reached(lab.pod("a")?, socket(family.vip, 82), "c", family.pods[0])?;
        for namespace in [lab.client(), lab.pod("b")?, lab.node()] {
            assert_silent(namespace, socket(family.vip, 82))?;
        }
    }
    assert!(loaded.events(Event::UnknownPort)? > 0);
    assert!(loaded.events(Event::Unallocated)? > 0);
    Ok(())
}

fn flows_stay_and_move_with_their_endpoints() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        let [a, b] = family.pods.map(|p| socket(p, 8080));
        let service = Service { cluster: vec![(a, true), (b, true)], ..Service::new(UDP, []) };
        let written = loaded.add_service(&service)?;
        loaded.add_frontend(&written, socket(family.vip, 80), [FORWARD; 3], 0)?;
        let probe = Probe::udp(socket(family.vip, 80)).from_port(40_000);
        let first = lab.client().probe(probe.clone())?.pod().context("an answer")?.to_owned();
        assert_stays(lab.client(), &probe, &first, "one flow, one endpoint")?;
        let address = if first == "a" { a } else { b };
        let id = written.endpoints[&address];
        // It terminates: out of the group, but serving.
        loaded.set_endpoint(id, address, written.id, endpoint_flags::SERVING)?;
        assert_stays(lab.client(), &probe, &first, "a terminating endpoint keeps it")?;
        // It is gone.
        loaded.set_endpoint(id, address, 0, 0)?;
        let other = if first == "a" { "b" } else { "a" };
        // The remaining slot still names it: chosen by chance, then looked up again, then the first slot.
        loaded.put_frontend(
            key(socket(family.vip, 80), UDP),
            Frontend {
                verdicts: [FORWARD; 3],
                cluster: Group { base: written.frontend.cluster.base + u32::from(first == "a"), count: 1 },
                ..written.frontend
            },
        )?;
        assert_stays(lab.client(), &probe, other, "a flow of a gone endpoint moves")?;
    }
    let flows: Vec<(FlowKey, Flow)> = loaded.dump(map::FLOWS)?;
    assert!(!flows.is_empty());
    assert!(loaded.events(Event::Repicked)? > 0);
    Ok(())
}

/// Writes a node port that leads to the remote pod, masqueraded.
fn far_node_port(loaded: &mut Loaded, family: &Family, protocol: u8) -> Result<SocketAddr> {
    let far = loaded.add_service(&Service::new(protocol, [socket(family.remote, 8080)]))?;
    loaded.add_node_port(&far, family.any, 30081, [MASQUERADE; 3])?;
    Ok(socket(family.node, 30081))
}

fn long_transfers_with_large_segments_and_a_narrow_way() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        let to = far_node_port(&mut loaded, &family, TCP)?;
        let transfer = || {
            let probe = Probe::tcp(to).timeout(Duration::from_secs(2));
            lab.client().transfer(&TransferSpec { probe, pace: None, limit: Some(20_000_000) })?.join()
        };
        // Links of a lab offload checksums and segmentation.
        assert_eq!(transfer()?.bytes, 20_000_000);
        // Beyond the node packets must be smaller. The client learns that from an error about the packet
        // that the node could not send on, if it speaks of the one that the client has sent.
        let version = if family.vip.is_ipv4() { "-4" } else { "-6" };
        let remote = family.remote.to_string();
        let route = lab.node().exec("ip", [version, "route", "show", &*remote], "")?;
        let mut change = vec![version, "route", "replace"];
        change.extend(route.split_whitespace().filter(|word| *word != "pref" && *word != "medium"));
        change.extend(["mtu", "1300"]);
        lab.node().exec("ip", &change, "")?;
        let before = loaded.events(Event::IcmpTranslated)?;
        assert_eq!(transfer()?.bytes, 20_000_000);
        assert!(loaded.events(Event::IcmpTranslated)? > before, "the way was not narrow");
    }
    Ok(())
}

fn datagrams_in_fragments() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        let to = far_node_port(&mut loaded, &family, UDP)?;
        let client = lab.client().run(|| Ok(UdpSocket::bind(socket(family.any, 0))?))?;
        client.set_read_timeout(Some(Duration::from_millis(500)))?;
        let mut question = b"who\n".to_vec();
        question.resize(1900, b'x');
        for _ in 0..10 {
            client.send_to(&question, to)?;
            let mut buffer = [0; 2048];
            let (length, from) = client.recv_from(&mut buffer)?;
            assert_eq!(from, to);
            assert!(String::from_utf8_lossy(&buffer[..length]).contains("pod=c "));
        }
    }
    Ok(())
}

fn session_affinity_is_of_the_source_address() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    for family in families()? {
        for protocol in [TCP, UDP] {
            let endpoints = [family.pods[0], family.pods[1], family.remote].map(|a| socket(a, 8080));
            let service = Service { affinity: 600, ..Service::new(protocol, endpoints) };
            let written = loaded.add_service(&service)?;
            loaded.add_frontend(&written, socket(family.vip, 80), [MASQUERADE; 3], 0)?;
            loaded.add_node_port(&written, family.any, 30080, [MASQUERADE; 3])?;
            let at = usize::from(protocol == UDP);
            let through =
                [socket(family.vip, 80), socket(family.node, 30080)].map(|to| probes(to)[at].clone());
            // All frontends of a Service port lead a client to the same endpoint.
            let mut reached: Vec<String> = Vec::new();
            for probe in &through {
                for outcome in lab.client().probe_all(vec![probe.clone(); 10])? {
                    reached.push(outcome.pod().with_context(|| format!("{probe}: {outcome}"))?.to_owned());
                }
            }
            reached.dedup();
            assert_eq!(reached.len(), 1, "{reached:?}");
        }
    }
    Ok(())
}

fn connections_that_netfilter_translates_go_on() -> Result<()> {
    let lab = lab()?;
    let [v4, _] = families()?;
    lab.node().nft(&format!(
        "table ip other {{
           chain in {{ type nat hook prerouting priority dstnat; ip daddr {0} tcp dport 30081 dnat to {1}:8080; }}
           chain out {{ type nat hook postrouting priority srcnat; ip daddr {1} masquerade; }}
         }}",
        v4.node, v4.remote,
    ))?;
    let probe = Probe::tcp(socket(v4.node, 30081)).timeout(Duration::from_secs(2));
    let mut old = lab.client().converse(&probe)?;
    assert_eq!(old.ask()?.pod, "c");
    let mut loaded = attach(&lab)?;
    let near = loaded.add_service(&Service::new(TCP, [socket(v4.pods[0], 8080)]))?;
    loaded.add_node_port(&near, v4.any, 30081, [MASQUERADE; 3])?;
    assert_eq!(old.ask()?.pod, "c", "begun before the programs were there");
    // Without its rules. Netfilter goes on as long as somebody has a chain of type nat and asks conntrack.
    lab.node().nft(
        "table ip third { chain in { type nat hook prerouting priority 0; ct state invalid counter; }; }
         delete table ip other",
    )?;
    assert_eq!(old.ask()?.pod, "c", "and after the rules are gone");
    assert_eq!(lab.client().probe(probe)?.pod(), Some("a"), "new ones meet the programs");
    assert_eq!(old.ask()?.pod, "c");
    Ok(())
}

fn clsact_where_there_is_no_tcx() -> Result<()> {
    let lab = lab()?;
    let mut loaded = Loaded::new()?;
    let links = ["client", "elsewhere"].map(|name| lab.link(name).context("a link"));
    for family in families()? {
        loaded.set_address(family.node, address_flags::LOCAL | address_flags::NODE_PORT)?;
        far_node_port(&mut loaded, &family, TCP)?;
        far_node_port(&mut loaded, &family, UDP)?;
    }
    let [v4, v6] = families()?;
    loaded.set_config(Config {
        masquerade4: v4.node.into(),
        masquerade6: v6.node.into(),
        ..Config::DEFAULT
    })?;
    lab.node().run(|| {
        for link in links {
            loaded.attach_device_clsact(link?)?;
        }
        Ok(())
    })?;
    for family in [v4, v6] {
        assert_reached(lab.client(), socket(family.node, 30081), "c", family.node)?;
    }
    Ok(())
}

fn devices_without_ethernet_headers() -> Result<()> {
    let lab = lab()?;
    let mut loaded = attach(&lab)?;
    let mut tun = lab.node().run(|| Tun::create("tun0"))?;
    lab.node().run(|| loaded.attach_device_l3("tun0"))?;
    lab.node().exec("ip", ["link", "set", "tun0", "up"], "")?;
    for family in families()? {
        let far =
            SocketAddr::new(if family.vip.is_ipv4() { "172.16.0.9" } else { "fd00:172::9" }.parse()?, 5000);
        lab.node().exec("ip", ["route", "add", &*far.ip().to_string(), "dev", "tun0"], "")?;
        let to = far_node_port(&mut loaded, &family, UDP)?;
        let question = Packet::new(far, to, UDP).payload(b"who\n").bytes();
        tun.send(&question[ETHERNET..])?;
        let answer = packet::read_ip(&tun.receive(is_udp)?, true)?;
        assert_eq!((answer.source, answer.destination), (to, far));

        let refused = socket(family.vip, 99);
        let question = Packet::new(far, refused, TCP);
        tun.send(&question.bytes()[ETHERNET..])?;
        let error = packet::read_ip(&tun.receive(is_error)?, true)?;
        let quoted = error.quoted.context("an error quotes")?;
        assert_eq!((error.source.ip(), quoted.source, quoted.destination), (family.vip, far, refused));
    }
    Ok(())
}

/// The protocol of an IP packet.
fn protocol(packet: &[u8]) -> u8 {
    packet[if packet[0] >> 4 == 4 { 9 } else { 6 }]
}

fn is_udp(packet: &[u8]) -> bool {
    protocol(packet) == UDP
}

fn is_error(packet: &[u8]) -> bool {
    protocol(packet) == 1 || protocol(packet) == 58 && packet[40] == 1
}

in_both_kernels!(
    cluster_ips_node_ports_and_their_sources,
    refused_and_dropped,
    flows_stay_and_move_with_their_endpoints,
    long_transfers_with_large_segments_and_a_narrow_way,
    datagrams_in_fragments,
    session_affinity_is_of_the_source_address,
    devices_without_ethernet_headers;
    here only:
    // The guest has no nf_tables for IP, and no way but clsact.
    connections_that_netfilter_translates_go_on,
    clsact_where_there_is_no_tcx,
);
