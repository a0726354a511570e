//! The filter in front of the connection table, and what is counted of flows.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use anyhow::{Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use shunt_ebpf_abi::{Config, Flow, FlowFilter, FlowKey, ServiceBytes, address_flags, config_flags, map};
use shunt_ebpf_tests::packet::{ACK, ETHERNET, FIN, Packet, SYN, read};
use shunt_ebpf_tests::{FORWARD, Loaded, MASQUERADE, Service, TCP, UDP, Written, in_both_kernels};

/// `TC_ACT_UNSPEC`: the next program.
const NEXT: i32 = -1;
const SECOND: u64 = 1_000_000_000;

struct Family {
    node: IpAddr,
    client: SocketAddr,
    vip: SocketAddr,
    masqueraded: SocketAddr,
    endpoint: SocketAddr,
}

fn families() -> Result<[Family; 2]> {
    let family = |a: [&str; 5]| -> Result<Family> {
        Ok(Family {
            node: a[0].parse()?,
            client: a[1].parse()?,
            vip: a[2].parse()?,
            masqueraded: a[3].parse()?,
            endpoint: a[4].parse()?,
        })
    };
    Ok([
        family(["192.168.0.2", "203.0.113.7:40001", "10.96.0.10:80", "10.96.0.10:81", "10.180.1.1:8080"])?,
        family([
            "fd00:192::2",
            "[2001:db8::7]:40001",
            "[fd00:96::10]:80",
            "[fd00:96::10]:81",
            "[fd00:181::1]:8080",
        ])?,
    ])
}

fn config(family: &Family) -> Config {
    let mut config = Config::DEFAULT;
    *(if family.node.is_ipv4() { &mut config.masquerade4 } else { &mut config.masquerade6 }) =
        family.node.into();
    config
}

fn loaded(family: &Family, protocol: u8) -> Result<(Loaded, Written)> {
    let mut loaded = Loaded::new()?;
    loaded.set_config(config(family))?;
    loaded.set_address(family.vip.ip(), address_flags::CLUSTER_IP)?;
    loaded.set_address(family.node, address_flags::LOCAL)?;
    let service = loaded.add_service(&Service::new(protocol, [family.endpoint]))?;
    loaded.add_frontend(&service, family.vip, [FORWARD; 3], 0)?;
    loaded.add_frontend(&service, family.masqueraded, [MASQUERADE; 3], 0)?;
    Ok((loaded, service))
}

fn pass(loaded: &mut Loaded, program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let (action, out) = loaded.run(program, bytes)?;
    ensure!(action == NEXT, "{program} returned {action}");
    Ok(out)
}

fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec().unsigned_abs() * SECOND + now.tv_nsec().unsigned_abs())
}

/// A masqueraded flow at its four places: the program, and the packet that it meets.
fn four_places(loaded: &mut Loaded, family: &Family) -> Result<[(&'static str, Packet); 4]> {
    let sent = Packet::new(family.client, family.masqueraded, TCP);
    let inside = pass(loaded, "ingress", &sent.bytes())?;
    let outside = read(&pass(loaded, "egress", &inside)?)?;
    let sent = sent.flags(ACK);
    let onward = Packet { destination: family.endpoint, ..sent.clone() };
    let answer = Packet::new(outside.source, outside.destination, TCP).answer();
    let back = onward.answer();
    Ok([("ingress", sent), ("egress", onward), ("ingress", answer), ("egress", back)])
}

fn what_the_filter_does_not_know_is_left_alone() -> Result<()> {
    for family in families()? {
        let (mut loaded, _) = loaded(&family, TCP)?;
        for (program, packet) in four_places(&mut loaded, &family)? {
            let bytes = packet.bytes();
            assert_ne!(pass(&mut loaded, program, &bytes)?, bytes, "{program}");
            let held = loaded.flow_filter()?;
            loaded.fill_flow_filter(0)?;
            assert_eq!(pass(&mut loaded, program, &bytes)?, bytes, "{program}");
            // So the mode fills it when it puts its programs over the flows of others.
            loaded.fill_flow_filter(FlowFilter::until(now()?, 0))?;
            assert_ne!(pass(&mut loaded, program, &bytes)?, bytes, "{program}");
            // Its time is over.
            let past = FlowFilter::until(now()?, 0).wrapping_sub(3);
            loaded.fill_flow_filter(past)?;
            assert_eq!(pass(&mut loaded, program, &bytes)?, bytes, "{program}");
            loaded.set_flow_filter(&held)?;
        }
    }
    Ok(())
}

fn a_flow_that_goes_on_is_kept_in_the_filter() -> Result<()> {
    for family in families()? {
        let (mut loaded, _) = loaded(&family, TCP)?;
        let places = four_places(&mut loaded, &family)?;
        let (client, node, endpoint) = (family.client.ip(), family.node, family.endpoint.ip());
        let (before, between, after) =
            ((client, family.masqueraded.ip()), (client, endpoint), (node, endpoint));
        // There, onward, and back in the same way.
        let known = [[before, between], [between, after], [after, between], [between, before]];
        for ((program, packet), known) in places.into_iter().zip(known) {
            loaded.fill_flow_filter(FlowFilter::until(now()?, 0))?;
            for (key, flow) in loaded.dump::<FlowKey, Flow>(map::FLOWS)? {
                loaded.put(map::FLOWS, key, Flow { last_seen: 0, ..flow })?;
            }
            pass(&mut loaded, program, &packet.bytes())?;
            let filter = loaded.flow_filter()?;
            let in_time = now()? + (u64::from(Config::DEFAULT.tcp_timeout) - 1) * SECOND;
            let holds = |(a, b): (IpAddr, IpAddr)| {
                let (block, entry) = FlowFilter::place(&a.into(), &b.into());
                FlowFilter::holds(filter[block as usize].until[entry], in_time)
            };
            for pair in [before, between, after, (client, family.vip.ip()), (client, node)] {
                assert_eq!(holds(pair), known.contains(&pair), "{program}, {pair:?}");
            }
        }
    }
    Ok(())
}

fn bytes_are_counted_once_a_packet() -> Result<()> {
    for family in families()? {
        for (protocol, to) in
            [(TCP, family.vip), (TCP, family.masqueraded), (UDP, family.vip), (UDP, family.masqueraded)]
        {
            let (mut loaded, service) = loaded(&family, protocol)?;
            let sent = Packet::new(family.client, to, protocol);
            let mut expected = ServiceBytes::default();
            for size in [0, 700, 1000] {
                let sent = sent.clone().payload(&vec![1; size]);
                let bytes = sent.bytes();
                let inside = pass(&mut loaded, "ingress", &bytes)?;
                let outside = read(&pass(&mut loaded, "egress", &inside)?)?;
                expected.request += u64::try_from(bytes.len() - ETHERNET)?;
                let answer = Packet::new(outside.source, outside.destination, protocol).answer();
                let inside = pass(&mut loaded, "ingress", &answer.bytes())?;
                pass(&mut loaded, "egress", &inside)?;
                expected.response += u64::try_from(answer.bytes().len() - ETHERNET)?;
                assert_eq!(loaded.service_bytes(service.id)?, expected, "to {to}, {size} bytes");
            }
            // What is no flow's is nobody's.
            let other = Packet::new(family.client, family.endpoint, protocol).flags(ACK).bytes();
            pass(&mut loaded, "ingress", &other)?;
            assert_eq!(loaded.service_bytes(service.id)?, expected);
        }
    }
    Ok(())
}

/// What is loaded where only these ports are for masqueraded flows.
fn loaded_with_ports(family: &Family, ports: Range<u16>) -> Result<Loaded> {
    let (mut loaded, _) = loaded(family, TCP)?;
    let (masquerade_port_min, masquerade_port_max) = (ports.start, ports.end - 1);
    loaded.set_config(Config { masquerade_port_min, masquerade_port_max, ..config(family) })?;
    Ok(loaded)
}

fn masqueraded_flows_find_the_ports_that_are_left() -> Result<()> {
    const PORTS: Range<u16> = 20_000..21_000;
    for family in families()? {
        let mut loaded = loaded_with_ports(&family, PORTS)?;
        let mut taken = BTreeSet::new();
        // Four fifths of them, all to one endpoint.
        for port in 0..800 {
            let client = SocketAddr::new(family.client.ip(), 40_000 + port);
            let inside = pass(&mut loaded, "ingress", &Packet::new(client, family.masqueraded, TCP).bytes())?;
            let outside = read(&pass(&mut loaded, "egress", &inside)?)?;
            let source = outside.source;
            assert!(source.ip() == family.node && PORTS.contains(&source.port()), "{source}");
            assert!(taken.insert(source.port()), "{source} is another flow's");
        }
    }
    Ok(())
}

fn ports_are_given_back_when_both_sides_have_ended() -> Result<()> {
    for family in families()? {
        let mut loaded = loaded_with_ports(&family, 20_000..20_003)?;
        // The source of a client's packet when it leaves, unless it is dropped.
        let send = |loaded: &mut Loaded, port: u16, flags: u8| -> Result<Option<SocketAddr>> {
            let client = SocketAddr::new(family.client.ip(), port);
            let sent = Packet::new(client, family.masqueraded, TCP).flags(flags).bytes();
            let inside = pass(loaded, "ingress", &sent)?;
            let (action, outside) = loaded.run("egress", &inside)?;
            if action == NEXT { Ok(Some(read(&outside)?.source)) } else { Ok(None) }
        };
        for client in 1..=3 {
            ensure!(send(&mut loaded, client, SYN)?.is_some(), "there are three ports");
        }
        let Some(first) = send(&mut loaded, 1, ACK)? else { bail!("the first flow goes on") };
        for (ended, flags) in [("nothing", ACK), ("the client's side", FIN)] {
            send(&mut loaded, 1, flags)?;
            assert_eq!(send(&mut loaded, 4, SYN)?, None, "{ended} has ended");
        }
        let answer = |flags| Packet::new(family.endpoint, first, TCP).flags(flags).bytes();
        assert_ne!(pass(&mut loaded, "ingress", &answer(FIN))?, answer(FIN));
        assert_eq!(send(&mut loaded, 4, SYN)?, Some(first));
        // Answers are the new client's.
        let answered = read(&pass(&mut loaded, "ingress", &answer(ACK))?)?;
        assert_eq!(answered.destination, SocketAddr::new(family.client.ip(), 4));
        // What the first client may still send is not taken for the new one's.
        let client = SocketAddr::new(family.client.ip(), 1);
        assert_eq!(send(&mut loaded, 1, ACK)?, Some(client));
        // The new one goes on, and so do the others.
        assert_eq!(send(&mut loaded, 5, SYN)?, None);
        for client in 2..=4 {
            assert!(send(&mut loaded, client, ACK)?.is_some());
        }
    }
    Ok(())
}

/// Other connections with the ends of a masqueraded flow: by which hooks their first packet, others, and answers pass.
fn others(places: &[(&'static str, Packet); 4]) -> [Vec<(&'static str, Packet)>; 2] {
    let connection = |hooks: [&'static str; 2], first: Packet| {
        let other = first.clone().flags(ACK);
        let packets = [first.clone(), other.clone(), first.answer(), other.answer()];
        packets.into_iter().flat_map(|p| hooks.map(|hook| (hook, p.clone()))).collect()
    };
    let [_, (_, onward), (_, answer), _] = places;
    let new = |source, destination| Packet::new(source, destination, TCP);
    [
        // The client's, to the endpoint itself.
        connection(["ingress", "egress"], new(onward.source, onward.destination)),
        // One that others have masqueraded like that.
        connection(["egress", "ingress"], new(answer.destination, answer.source)),
    ]
}

fn what_is_left_of_a_flow_touches_no_other() -> Result<()> {
    for family in families()? {
        for other in 0..2 {
            let (mut loaded, _) = loaded(&family, TCP)?;
            let places = four_places(&mut loaded, &family)?;
            let packets = others(&places).into_iter().nth(other).unwrap_or_default();
            let touched = |loaded: &mut Loaded| -> Result<usize> {
                let mut touched = 0;
                for (program, packet) in &packets {
                    let bytes = packet.bytes();
                    touched += usize::from(pass(loaded, program, &bytes)? != bytes);
                }
                Ok(touched)
            };
            // While it goes on its packets cannot be told from the others.
            assert_ne!(touched(&mut loaded)?, 0, "{other}");
            for (program, packet) in &places {
                let bytes = packet.clone().flags(FIN).bytes();
                assert_ne!(pass(&mut loaded, program, &bytes)?, bytes, "{program}");
            }
            assert_eq!(touched(&mut loaded)?, 0, "{other}");
        }
    }
    Ok(())
}

fn only_families_in_use_are_served() -> Result<()> {
    for family in families()? {
        let (mut loaded, _) = loaded(&family, TCP)?;
        let [(_, known), ..] = four_places(&mut loaded, &family)?;
        let new = Packet::new(family.client, family.vip, TCP).bytes();
        let (own, other) =
            (config_flags::in_use(family.node.is_ipv4()), config_flags::in_use(!family.node.is_ipv4()));
        loaded.set_config_as_is(Config { flags: other, ..config(&family) })?;
        assert_eq!(pass(&mut loaded, "ingress", &new)?, new);
        // What began before goes on, until it is over and its client begins anew.
        assert_ne!(pass(&mut loaded, "ingress", &known.bytes())?, known.bytes());
        let end = known.clone().flags(FIN).bytes();
        assert_ne!(pass(&mut loaded, "ingress", &end)?, end);
        for packet in [known.clone().flags(SYN), known.clone()] {
            let bytes = packet.bytes();
            assert_eq!(pass(&mut loaded, "ingress", &bytes)?, bytes);
        }
        loaded.set_config_as_is(Config { flags: own, ..config(&family) })?;
        assert_ne!(pass(&mut loaded, "ingress", &new)?, new);
    }
    Ok(())
}

in_both_kernels!(
    what_is_left_of_a_flow_touches_no_other,
    only_families_in_use_are_served,
    masqueraded_flows_find_the_ports_that_are_left,
    ports_are_given_back_when_both_sides_have_ended,
    what_the_filter_does_not_know_is_left_alone,
    a_flow_that_goes_on_is_kept_in_the_filter,
    bytes_are_counted_once_a_packet,
);
