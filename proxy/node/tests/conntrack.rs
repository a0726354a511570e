//! ctnetlink on a real kernel, in network namespaces of its own.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter, Scope, Serving, StaleFlows, Tuple};
use shunt_core::table::{ForwardingTable, Frontend};
use shunt_harness::lab::{Lab, Probe, require_kernel};
use shunt_node::conntrack::{Connections, Conntrack, Dump, Fate, Netlink, clean};

const CLIENT: [&str; 2] = ["198.51.100.20", "2001:db8:1::20"];

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// A node that tracks what it forwards to addresses that take everything.
fn lab(rules: &str) -> Result<Lab> {
    let lab = Lab::builder()
        .node([ip("192.0.2.11"), ip("2001:db8::11")])
        .client(CLIENT.map(ip))
        .remote("sink", ["10.99.0.0/16".parse()?, "fd00:99::/64".parse()?])
        .build()?;
    lab.node().nft(&format!(
        "table inet t {{\n chain z {{\n type filter hook prerouting priority raw\n {rules}\n }}\n \
         chain c {{\n type filter hook prerouting priority 0\n ct state new counter\n }}\n }}"
    ))?;
    Ok(lab)
}

/// Sends one datagram from the client to each of these.
fn send(lab: &Lab, to: impl IntoIterator<Item = SocketAddr> + Send) -> Result<()> {
    lab.client().run(|| {
        let v4 = UdpSocket::bind((ip(CLIENT[0]), 40_000))?;
        let v6 = UdpSocket::bind((ip(CLIENT[1]), 40_000))?;
        for to in to {
            let socket = if to.is_ipv4() { &v4 } else { &v6 };
            socket.send_to(b"hello", to).with_context(|| format!("send to {to}"))?;
        }
        Ok(())
    })
}

fn filter(family: IpFamily, address: Option<&str>, port: Option<u16>) -> FlowFilter {
    FlowFilter { family, protocol: Protocol::Udp, address: address.map(ip), port }
}

fn dump(lab: &Lab, filter: &FlowFilter) -> Result<(BTreeSet<Flow>, Dump)> {
    lab.node().run(|| {
        let mut flows = BTreeSet::new();
        let dump = Netlink::open()?.dump(filter, &mut |flow| {
            flows.insert(flow);
        })?;
        Ok((flows, dump))
    })
}

#[test]
fn the_kernel_filters_and_deletes_one_flow_at_a_time() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab("")?;
    for (family, prefix) in [(IpFamily::V4, "10.99.0."), (IpFamily::V6, "fd00:99::")] {
        let to = |host: u8, port| SocketAddr::new(ip(&format!("{prefix}{host}")), port);
        send(&lab, (1..=10).flat_map(|host| (1..=10).map(move |port| to(host, port))))?;
        let three = format!("{prefix}3");
        for (address, port, expected) in [
            (None, None, 100),
            (Some(&*three), None, 10),
            (None, Some(4), 10),
            (Some(&*three), Some(4), 1),
            (Some("198.51.100.99"), Some(4), 0),
        ] {
            if address.is_some_and(|a| IpFamily::of(ip(a)) != family) {
                continue;
            }
            let filter = filter(family, address, port);
            let (flows, how) = dump(&lab, &filter)?;
            let asked = flows.iter().filter(|f| filter.matches(f)).count();
            assert_eq!((asked, how), (expected, Dump { received: flows.len() as u64, ..Dump::default() }));
            // IPv6 addresses cannot be left to the kernel.
            let all = if port.is_some() { 10 } else { 100 };
            let received = if family == IpFamily::V6 { all } else { expected };
            assert_eq!(flows.len(), received, "{filter}");
        }
        let (flows, _) = dump(&lab, &filter(family, Some(&three), Some(4)))?;
        let flow = *flows.iter().find(|f| f.original.destination == to(3, 4)).context("one flow")?;
        assert_eq!(flow.reply.source, to(3, 4));
        assert_eq!(flow.original.source.port(), 40_000);
        assert_eq!(flow.zone, 0);
        // A later flow with the same addresses has another number.
        let other = Flow { id: flow.id.map(|id| id ^ 1), ..flow };
        let fates = lab.node().run(|| Ok(Netlink::open()?.delete(&[other, flow, flow])?))?;
        assert_eq!(fates, [Fate::Gone, Fate::Deleted, Fate::Gone]);
        assert_eq!(dump(&lab, &filter(family, None, None))?.1.received, 99);
    }
    Ok(())
}

#[test]
fn flows_of_other_zones_are_found_and_deleted_in_their_zone() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab(
        "udp dport 7 ct zone set 7\n udp dport 8 ct original zone set 8\n udp dport 9 ct reply zone set 9",
    )?;
    send(&lab, (6..=9).map(|port| SocketAddr::new(ip("10.99.0.1"), port)))?;
    let (flows, _) = dump(&lab, &filter(IpFamily::V4, None, None))?;
    let zones: Vec<(u16, u16)> = flows.iter().map(|f| (f.original.destination.port(), f.zone)).collect();
    assert_eq!(zones, [(6, 0), (7, 7), (8, 8), (9, 0)]);
    let flows: Vec<Flow> = flows.into_iter().collect();
    let fates = lab.node().run(|| Ok(Netlink::open()?.delete(&flows)?))?;
    assert_eq!(fates, [Fate::Deleted; 4]);
    Ok(())
}

#[test]
fn among_many_flows_only_stale_ones_go() -> Result<()> {
    const OTHERS: u32 = 20_000;
    const STALE: u16 = 2_000;
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab("")?;
    let others = (0..OTHERS).map(|n| SocketAddr::new(IpAddr::from((0x0a63_0000 | n).to_be_bytes()), 53));
    send(&lab, others)?;
    lab.client().run(|| {
        for port in 0..STALE {
            let socket = UdpSocket::bind((ip(CLIENT[0]), 20_000 + port))?;
            socket.send_to(b"hello", (ip("10.99.200.1"), 53))?;
        }
        Ok(())
    })?;
    let (flows, how) = dump(&lab, &filter(IpFamily::V4, None, None))?;
    assert!(flows.len() >= (OTHERS + u32::from(STALE)) as usize - 1, "{how:?}");

    // Nobody translated them, as before a Service has endpoints.
    let stale = stale_service("10.99.200.1");
    let (report, took) = lab.node().run(|| {
        let mut netlink = Netlink::open()?;
        let started = Instant::now();
        Ok((clean(&mut netlink, &stale), started.elapsed()))
    })?;
    assert!(report.error.is_none(), "{report:?}");
    assert_eq!(report.deleted_total(), u64::from(STALE));
    assert_eq!((report.received, report.dumps), (u64::from(STALE), 1), "the kernel did not filter");
    let (left, _) = dump(&lab, &filter(IpFamily::V4, None, None))?;
    assert_eq!(left.len(), flows.len() - usize::from(STALE));

    let time = |filter: &FlowFilter| -> Result<_> {
        lab.node().run(|| {
            let mut netlink = Netlink::open()?;
            let started = Instant::now();
            let dump = netlink.dump(filter, &mut |_| {})?;
            Ok((dump.received, started.elapsed()))
        })
    };
    eprintln!("deleted {STALE} of {} in {took:?}", flows.len());
    eprintln!("filtered: {:?}", time(&filter(IpFamily::V4, Some("10.99.200.1"), Some(53)))?);
    eprintln!("all UDP: {:?}", time(&filter(IpFamily::V4, None, None))?);
    Ok(())
}

/// A Service without endpoints.
fn stale_service(cluster_ip: &str) -> StaleFlows {
    use shunt_core::compile::{Compiler, Context};
    use shunt_core::id::NamespacedName;
    use shunt_core::node::Config;
    use shunt_core::service::{Service, ServicePort, TrafficPolicy};
    use shunt_core::store::{Event, Store};

    let mut store = Store::default();
    store.apply(Event::Service(Service {
        name: NamespacedName::new("demo", "dns"),
        created: 0,
        cluster_ips: vec![ip(cluster_ip)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Udp, port: 53, node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    }));
    let compiler = Compiler::full(Context::new("worker-1", Config::default()), &store);
    let table: &ForwardingTable = compiler.table(IpFamily::V4);
    let frontend = Frontend { address: Some(ip(cluster_ip)), protocol: Protocol::Udp, port: 53 };
    StaleFlows::new(table, &Serving::full(IpFamily::V4, &store), &Scope::Frontends([frontend].into()))
}

/// A connection from before conntrack looked is none that it knows: its end is invalid, anything else new. Entered ahead
/// it is neither.
#[test]
fn connections_that_are_entered_are_neither_new_nor_invalid() -> Result<()> {
    const COUNTERS: &str = "table inet t {
        counter new { }
        counter invalid { }
        counter established { }
        chain c {
            type filter hook forward priority 0
            tcp dport 8080 ct state new counter name new
            tcp dport 8080 ct state invalid counter name invalid
            tcp dport 8080 ct state established counter name established
        }
    }";
    if !require_kernel() {
        return Ok(());
    }
    let lab = Lab::builder()
        .node([ip("192.0.2.11")])
        .client([ip(CLIENT[0])])
        .pod("pod-a", [ip("10.244.1.11")])
        .build()?;
    lab.pod("pod-a")?.serve_ports([8080])?;
    let node = lab.node();
    let counted = |name: &str| -> Result<u64> {
        let text = node.exec("nft", ["list", "counter", "inet", "t", name], "")?;
        let packets = text.split_once("packets ").and_then(|(_, rest)| rest.split(' ').next());
        Ok(packets.context("packets")?.parse()?)
    };
    let server: SocketAddr = "10.244.1.11:8080".parse()?;
    for enter in [false, true] {
        // Nobody asks for conntrack yet.
        let mut conversation = lab.client().converse(&Probe::tcp(server))?;
        conversation.ask()?;
        let source = conversation.stream().local_addr()?;
        node.nft(COUNTERS)?;
        let tuple = Tuple { source, destination: server };
        if enter {
            // Once more renews it.
            node.run(|| Ok(Netlink::open()?.enter(&[tuple], 60)?))?;
            node.run(|| Ok(Netlink::open()?.enter(&[tuple], 60)?))?;
            assert_eq!(node.run(|| Ok(Netlink::open()?.connections(IpFamily::V4)?))?, Connections::default());
        }
        drop(conversation);
        let states =
            || Ok::<_, anyhow::Error>([counted("new")?, counted("invalid")?, counted("established")?]);
        let deadline = Instant::now() + std::time::Duration::from_secs(10);
        while states()? == [0; 3] && Instant::now() < deadline {}
        let [new, invalid, established] = states()?;
        if enter {
            assert!(new == 0 && invalid == 0 && established > 0, "{new} {invalid} {established}");
        } else {
            assert!(invalid > 0, "{new} {invalid} {established}");
        }
        node.nft("delete table inet t")?;
    }
    Ok(())
}

#[test]
fn translated_connections_are_open_until_both_sides_have_closed() -> Result<()> {
    const RULES: &str = "table ip t {
        chain c {
            type nat hook prerouting priority dstnat
            ip daddr 192.0.2.11 tcp dport 80 dnat to 10.244.1.11:8080
        }
    }";
    if !require_kernel() {
        return Ok(());
    }
    let lab = Lab::builder()
        .node([ip("192.0.2.11")])
        .client([ip(CLIENT[0])])
        .pod("pod-a", [ip("10.244.1.11")])
        .build()?;
    lab.pod("pod-a")?.serve_ports([8080])?;
    let node = lab.node();
    node.nft(RULES)?;
    let connections = || node.run(|| Ok(Netlink::open()?.connections(IpFamily::V4)?));
    let mut conversation = lab.client().converse(&Probe::tcp("192.0.2.11:80".parse()?))?;
    conversation.ask()?;
    // Not translated, it does not count.
    let mut direct = lab.client().converse(&Probe::tcp("10.244.1.11:8080".parse()?))?;
    direct.ask()?;
    let Connections { open, closed } = connections()?;
    let ends: Vec<_> = open.iter().map(|flow| (flow.original.source, flow.reply.source)).collect();
    assert_eq!(ends, [(conversation.stream().local_addr()?, "10.244.1.11:8080".parse()?)]);
    assert_eq!(closed, []);
    drop((conversation, direct));
    let deadline = Instant::now() + std::time::Duration::from_secs(10);
    while !connections()?.open.is_empty() {
        assert!(Instant::now() < deadline, "{:?}", connections()?);
    }
    let closed = connections()?.closed;
    assert_eq!(closed.iter().map(|flow| flow.original).collect::<Vec<_>>(), [open[0].original]);
    node.run(move || Ok(Netlink::open()?.delete(&closed)?))?;
    assert_eq!(connections()?, Connections::default());
    Ok(())
}
