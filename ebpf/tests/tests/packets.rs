//! Single packets through the programs by `BPF_PROG_TEST_RUN`: every byte of what comes out is looked at.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use shunt_ebpf_abi::{Config, Event, Flow, FlowKey, Verdict, address_flags, frontend_flags, map};
use shunt_ebpf_tests::packet::{self, ETHERNET, FIN, Packet, Seen, read};
use shunt_ebpf_tests::{FORWARD, Loaded, MASQUERADE, SCTP, Service, TCP, UDP, in_both_kernels};

/// `TC_ACT_UNSPEC`: the next program.
const NEXT: i32 = -1;
const DROPPED: i32 = 2;
const REDIRECTED: i32 = 7;

struct Family {
    node: IpAddr,
    client: SocketAddr,
    vip: SocketAddr,
    masqueraded: SocketAddr,
    refused: SocketAddr,
    dropped: SocketAddr,
    endpoint: SocketAddr,
    router: IpAddr,
}

fn families() -> Result<[Family; 2]> {
    let family = |a: [&str; 8]| -> Result<Family> {
        Ok(Family {
            node: a[0].parse()?,
            client: a[1].parse()?,
            vip: a[2].parse()?,
            masqueraded: a[3].parse()?,
            refused: a[4].parse()?,
            dropped: a[5].parse()?,
            endpoint: a[6].parse()?,
            router: a[7].parse()?,
        })
    };
    Ok([
        family([
            "192.168.0.2",
            "203.0.113.7:40001",
            "10.96.0.10:80",
            "10.96.0.10:81",
            "10.96.0.10:82",
            "10.96.0.10:83",
            "10.180.1.1:8080",
            "198.51.100.1",
        ])?,
        family([
            "fd00:192::2",
            "[2001:db8::7]:40001",
            "[fd00:96::10]:80",
            "[fd00:96::10]:81",
            "[fd00:96::10]:82",
            "[fd00:96::10]:83",
            "[fd00:181::1]:8080",
            "2001:db8:f::1",
        ])?,
    ])
}

fn loaded() -> Result<Loaded> {
    let mut loaded = Loaded::new()?;
    let families = families()?;
    loaded.set_config(Config {
        masquerade4: families[0].node.into(),
        masquerade6: families[1].node.into(),
        ..Config::DEFAULT
    })?;
    for family in &families {
        loaded.set_address(family.vip.ip(), address_flags::CLUSTER_IP)?;
        loaded.set_address(family.node, address_flags::LOCAL)?;
        for protocol in [TCP, UDP, SCTP] {
            let service = loaded.add_service(&Service::new(protocol, [family.endpoint]))?;
            loaded.add_frontend(&service, family.vip, [FORWARD; 3], 0)?;
            loaded.add_frontend(&service, family.masqueraded, [MASQUERADE; 3], 0)?;
            loaded.add_frontend(&service, family.refused, [Verdict::REJECT; 3], 0)?;
            loaded.add_frontend(&service, family.dropped, [Verdict::DROP; 3], 0)?;
        }
    }
    Ok(loaded)
}

/// What a program made of a packet, which it let go on.
fn pass(loaded: &mut Loaded, program: &str, bytes: &[u8]) -> Result<Vec<u8>> {
    let (action, out) = loaded.run(program, bytes)?;
    ensure!(action == NEXT, "{program} returned {action}");
    ensure!(out.len() == bytes.len(), "{program} made {} bytes of {}", out.len(), bytes.len());
    Ok(out)
}

fn ends(seen: &Seen) -> (SocketAddr, SocketAddr) {
    (seen.source, seen.destination)
}

/// Packets of a protocol that look different: sizes, options, extensions.
fn shapes(base: &Packet) -> Vec<Packet> {
    let odd = base.clone().payload(&[7; 1001]);
    let empty = base.clone().payload(&[]);
    let more = if base.source.is_ipv4() {
        Packet { options: vec![1, 1, 1, 1, 1, 1, 1, 0], ..base.clone() }
    } else {
        // Hop-by-hop, then destination options.
        let options = vec![60, 0, 1, 4, 0, 0, 0, 0, base.protocol, 0, 1, 4, 0, 0, 0, 0];
        Packet { options, extension: Some(0), ..base.clone() }
    };
    vec![base.clone(), odd, empty, more]
}

fn there_and_back() -> Result<()> {
    let mut loaded = loaded()?;
    for (n, family) in families()?.iter().enumerate() {
        for protocol in [TCP, UDP, SCTP] {
            let base = Packet::new(family.client, family.vip, protocol);
            for (i, shape) in shapes(&base).into_iter().enumerate() {
                let client = SocketAddr::new(family.client.ip(), 41_000 + u16::try_from(i)?);
                let sent = Packet { source: client, ..shape };
                let context = || format!("family {n}, protocol {protocol}, shape {i}");
                let onward = pass(&mut loaded, "ingress", &sent.bytes()).with_context(context)?;
                let seen = read(&onward).with_context(context)?;
                assert_eq!(ends(&seen), (client, family.endpoint), "{}", context());
                // The stack routes it; nothing more happens where it leaves.
                assert_eq!(pass(&mut loaded, "egress", &onward)?, onward);
                let answer = Packet { destination: family.endpoint, ..sent.clone() }.answer();
                assert_eq!(pass(&mut loaded, "ingress", &answer.bytes())?, answer.bytes());
                let back = pass(&mut loaded, "egress", &answer.bytes()).with_context(context)?;
                let seen = read(&back).with_context(context)?;
                assert_eq!(ends(&seen), (family.vip, client), "{}", context());
                // The payload is as it was.
                let carried = answer.transport().len() - answer.payload.len();
                assert_eq!(back[back.len() - answer.payload.len()..], answer.transport()[carried..]);
            }
        }
    }
    Ok(())
}

fn masqueraded_there_and_back() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        for protocol in [TCP, UDP, SCTP] {
            let mut ports = Vec::new();
            for port in 42_000..42_020 {
                let client = SocketAddr::new(family.client.ip(), port);
                let sent = Packet::new(client, family.masqueraded, protocol);
                let inside = pass(&mut loaded, "ingress", &sent.bytes())?;
                assert_eq!(ends(&read(&inside)?), (client, family.endpoint));
                let outside = pass(&mut loaded, "egress", &inside)?;
                let seen = read(&outside)?;
                assert_eq!((seen.source.ip(), seen.destination), (family.node, family.endpoint));
                assert!((1024..30_000).contains(&seen.source.port()), "{}", seen.source);
                assert!(!ports.contains(&seen.source.port()), "two flows with one port");
                ports.push(seen.source.port());
                // The next packet has the same port.
                let next = sent.clone().flags(if protocol == TCP { 16 } else { 10 });
                let inside = pass(&mut loaded, "ingress", &next.bytes())?;
                assert_eq!(ends(&read(&pass(&mut loaded, "egress", &inside)?)?), ends(&seen));

                let answer = Packet::new(seen.source, seen.destination, protocol).answer();
                let inside = pass(&mut loaded, "ingress", &answer.bytes())?;
                assert_eq!(ends(&read(&inside)?), (family.endpoint, client));
                let back = pass(&mut loaded, "egress", &inside)?;
                assert_eq!(ends(&read(&back)?), (family.masqueraded, client));
            }
        }
    }
    Ok(())
}

fn errors_reach_whom_they_are_for() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        for (protocol, quoted) in [(TCP, 8), (TCP, 52), (UDP, 8), (UDP, 40), (SCTP, 8), (SCTP, 44)] {
            let sent = Packet::new(family.client, family.masqueraded, protocol);
            let inside = pass(&mut loaded, "ingress", &sent.bytes())?;
            let outside = read(&pass(&mut loaded, "egress", &inside)?)?;
            let names =
                |seen: &Seen| (seen.source.ip(), seen.destination.ip(), seen.quoted.as_deref().map(ends));

            // A router beyond the node about what the node sent on.
            let beyond = Packet::new(outside.source, outside.destination, protocol);
            let error = pass(&mut loaded, "ingress", &beyond.error(family.router, quoted))?;
            let seen = read(&error)?;
            let middle = (family.client, family.endpoint);
            assert_eq!(names(&seen), (family.router, family.client.ip(), Some(middle)));
            let error = pass(&mut loaded, "egress", &error)?;
            let whole = (family.client, family.masqueraded);
            assert_eq!(names(&read(&error)?), (family.masqueraded.ip(), family.client.ip(), Some(whole)));

            // The client about an answer.
            let answer = sent.answer();
            let error = pass(&mut loaded, "ingress", &answer.error(family.client.ip(), quoted))?;
            let middle = (family.endpoint, family.client);
            assert_eq!(names(&read(&error)?), (family.client.ip(), family.endpoint.ip(), Some(middle)));
            let error = pass(&mut loaded, "egress", &error)?;
            let whole = (family.endpoint, outside.source);
            assert_eq!(names(&read(&error)?), (family.node, family.endpoint.ip(), Some(whole)));

            // About a packet that is none of ours.
            let other = Packet::new(SocketAddr::new(family.client.ip(), 5), family.endpoint, protocol);
            let error = other.error(family.router, quoted);
            assert_eq!(pass(&mut loaded, "ingress", &error)?, error);
        }
    }
    assert_eq!(loaded.events(Event::IcmpTranslated)?, 48);
    assert_eq!(loaded.events(Event::Malformed)?, 0);
    Ok(())
}

fn fragments_follow_the_first() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        let sent = Packet::new(family.client, family.vip, UDP).payload(&[9; 4000]);
        let fragments = sent.fragments(1480);
        assert_eq!(fragments.len(), 3);
        // A later one before the first goes on as it is.
        assert_eq!(pass(&mut loaded, "ingress", &fragments[1])?, fragments[1]);
        let mut transport = Vec::new();
        let header = if family.vip.is_ipv4() { 20 } else { 48 };
        for fragment in &fragments {
            let out = pass(&mut loaded, "ingress", fragment)?;
            let addresses = match family.endpoint.ip() {
                IpAddr::V4(a) => out[ETHERNET + 16..ETHERNET + 20] == a.octets(),
                IpAddr::V6(a) => out[ETHERNET + 24..ETHERNET + 40] == a.octets(),
            };
            assert!(addresses, "{out:02x?}");
            transport.extend(&out[ETHERNET + header..]);
            assert_eq!(pass(&mut loaded, "egress", &out)?, out);
        }
        packet::check_transport(family.client.ip(), family.endpoint.ip(), UDP, &transport)?;
        assert_eq!(transport[2..4], family.endpoint.port().to_be_bytes());
        // The answer in fragments.
        let answer = Packet { destination: family.endpoint, ..sent.clone() }.answer();
        let mut transport = Vec::new();
        for fragment in answer.fragments(1000) {
            transport.extend(&pass(&mut loaded, "egress", &fragment)?[ETHERNET + header..]);
        }
        packet::check_transport(family.vip.ip(), family.client.ip(), UDP, &transport)?;
        assert_eq!(transport[..2], family.vip.port().to_be_bytes());
    }
    Ok(())
}

fn refused_with_an_error_about_the_packet() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        let unknown = SocketAddr::new(family.vip.ip(), 99);
        for protocol in [TCP, UDP, SCTP] {
            for to in [family.refused, unknown] {
                for length in [0, 3, 900] {
                    let sent = Packet::new(family.client, to, protocol).payload(&vec![5; length]);
                    let (action, out) = loaded.run("ingress", &sent.bytes())?;
                    assert_eq!(action, REDIRECTED, "protocol {protocol}");
                    let seen = read(&out)?;
                    assert_eq!((seen.source.ip(), seen.destination.ip()), (to.ip(), family.client.ip()));
                    assert_eq!(seen.quoted.as_deref().map(ends), Some((family.client, to)));
                    let kind: [u8; 2] = if to.is_ipv4() { [3, 3] } else { [1, 4] };
                    let header = if to.is_ipv4() { 20 } else { 40 };
                    assert_eq!(out[ETHERNET + header..ETHERNET + header + 2], kind);
                    let frame = sent.bytes();
                    assert_eq!((&out[..6], &out[6..12]), (&frame[6..12], &frame[..6]), "sent back");
                }
            }
            let (action, _) =
                loaded.run("ingress", &Packet::new(family.client, family.dropped, protocol).bytes())?;
            assert_eq!(action, DROPPED);
        }
        // A packet without its checksum, as it comes from a socket of this machine: the field has the sum of
        // the pseudo header. When the kernel puts the checksum there, the error's own must fit.
        for protocol in [TCP, UDP] {
            let sent = Packet::new(family.client, family.refused, protocol).payload(&[3; 64]);
            let (header, at) =
                (if family.vip.is_ipv4() { 20 } else { 40 }, if protocol == TCP { 16 } else { 6 });
            let mut bytes = sent.bytes();
            let transport = &bytes[ETHERNET + header..];
            let mut blank = transport.to_vec();
            blank[at..at + 2].fill(0);
            let full = u16::from_be_bytes([transport[at], transport[at + 1]]);
            // What the checksum would be without the pseudo header gives away the sum of the latter.
            let pseudo = ones_sub(!full, sum(&blank));
            bytes[ETHERNET + header + at..][..2].copy_from_slice(&pseudo.to_be_bytes());
            let (action, mut out) = loaded.run("ingress", &bytes)?;
            assert_eq!(action, REDIRECTED);
            let quoted = ETHERNET + header + 8 + header;
            let filled = !sum(&out[quoted..]);
            out[quoted + at..][..2].copy_from_slice(&filled.to_be_bytes());
            read(&out).context("after the kernel has put a checksum where the quoted one is")?;
        }
    }
    Ok(())
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c.get(1).copied().unwrap_or(0)));
    let sum = words.sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn ones_sub(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(!b);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn a_udp_checksum_of_none_stays_none_and_none_comes_to_be() -> Result<()> {
    let mut loaded = loaded()?;
    let [v4, v6] = families()?;
    let mut bytes = Packet::new(v4.client, v4.vip, UDP).bytes();
    bytes[ETHERNET + 26..ETHERNET + 28].fill(0);
    let out = pass(&mut loaded, "ingress", &bytes)?;
    assert_eq!(out[ETHERNET + 26..ETHERNET + 28], [0, 0]);
    read(&out)?;
    for family in [v4, v6] {
        // A payload whose checksum is 0 after translation, which must be written as 0xffff.
        let probe = Packet::new(family.client, family.endpoint, UDP).payload(&[0, 0]).transport();
        let sent = Packet::new(family.client, family.vip, UDP).payload(&[probe[6], probe[7]]);
        let out = pass(&mut loaded, "ingress", &sent.bytes())?;
        read(&out)?;
        let header = if family.vip.is_ipv4() { 20 } else { 40 };
        assert_eq!(out[ETHERNET + header + 6..ETHERNET + header + 8], [0xff, 0xff]);
    }
    Ok(())
}

fn what_begins_no_flow_is_left_alone() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        // Flows that were there before the programs belong to somebody else.
        for packet in [
            Packet::new(family.client, family.vip, TCP).flags(16),
            Packet::new(family.client, family.vip, TCP).flags(18),
            Packet::new(family.client, family.vip, TCP).flags(FIN),
            Packet::new(family.client, family.vip, SCTP).flags(0),
            Packet::new(family.client, family.endpoint, TCP),
            Packet::new(family.client, SocketAddr::new(family.node, 22), TCP),
        ] {
            for program in ["ingress", "egress"] {
                assert_eq!(pass(&mut loaded, program, &packet.bytes())?, packet.bytes());
            }
        }
        // Cut off anywhere, nothing breaks; what is not an IP packet of ours comes out as it went in.
        for protocol in [TCP, UDP, SCTP] {
            let bytes = Packet::new(family.client, family.vip, protocol).bytes();
            for end in ETHERNET + 1..bytes.len() {
                for program in ["ingress", "egress"] {
                    // The kernel itself refuses some lengths.
                    if let Ok((action, _)) = loaded.run(program, &bytes[..end]) {
                        assert!([NEXT, DROPPED].contains(&action), "{program} returned {action} at {end}");
                    }
                }
            }
        }
    }
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6]);
    arp.extend([0; 46]);
    assert_eq!(pass(&mut loaded, "ingress", &arp)?, arp);
    Ok(())
}

fn closed_and_idle_flows_give_way() -> Result<()> {
    let mut loaded = loaded()?;
    let [family, _] = families()?;
    let sent = Packet::new(family.client, family.vip, TCP);
    pass(&mut loaded, "ingress", &sent.bytes())?;
    pass(&mut loaded, "ingress", &sent.clone().flags(16).bytes())?;
    let state = |loaded: &mut Loaded| -> Result<u8> {
        let flows: Vec<(FlowKey, Flow)> = loaded.dump(map::FLOWS)?;
        let flow = flows.iter().find(|(_, f)| f.flags & Flow::REPLY == 0).context("no flow")?;
        Ok(flow.1.state)
    };
    assert_eq!(state(&mut loaded)?, Flow::OPEN);
    pass(&mut loaded, "ingress", &sent.clone().flags(FIN).bytes())?;
    assert_eq!(state(&mut loaded)?, Flow::CLOSING);
    // The same client from the same port to another frontend: the old flow is over, its place is free.
    let other = Packet { destination: family.masqueraded, ..sent.clone() };
    pass(
        &mut loaded,
        "egress",
        &Packet { destination: family.endpoint, ..sent.clone() }.answer().flags(FIN).bytes(),
    )?;
    pass(&mut loaded, "ingress", &other.bytes())?;
    // While that one lives, a third one that would come out the same gets another source port.
    let inside = read(&pass(&mut loaded, "ingress", &sent.bytes())?)?;
    assert_eq!((inside.source.ip(), inside.destination), (family.client.ip(), family.endpoint));
    assert_ne!(inside.source.port(), family.client.port());
    let answer = Packet::new(inside.source, inside.destination, TCP).answer();
    let back = read(&pass(&mut loaded, "egress", &answer.bytes())?)?;
    assert_eq!(ends(&back), (family.vip, family.client));
    assert_eq!(loaded.events(Event::NoFlow)?, 0);
    // It was not seen for a day.
    for (key, flow) in loaded.dump::<FlowKey, Flow>(map::FLOWS)? {
        loaded.put(map::FLOWS, key, Flow { last_seen: 0, ..flow })?;
    }
    loaded.set_config(Config { tcp_transient_timeout: 0, tcp_timeout: 0, ..Config::DEFAULT })?;
    pass(&mut loaded, "ingress", &sent.bytes())?;
    Ok(())
}

fn maglev_gives_every_node_the_same_answer() -> Result<()> {
    for family in families()? {
        let endpoints: Vec<SocketAddr> =
            (0..10).map(|i| SocketAddr::new(family.endpoint.ip(), 9000 + i)).collect();
        let choices = |reversed: bool, seed: u32| -> Result<Vec<SocketAddr>> {
            let mut loaded = Loaded::new()?;
            let mut order = endpoints.clone();
            if reversed {
                order.reverse();
            }
            let service = loaded.add_service(&Service::new(TCP, order))?;
            loaded.add_frontend(&service, family.vip, [FORWARD; 3], frontend_flags::MAGLEV)?;
            loaded.set_maglev(&service, false, seed)?;
            let choose = |port: u16| {
                let client = SocketAddr::new(family.client.ip(), port);
                let out = pass(&mut loaded, "ingress", &Packet::new(client, family.vip, TCP).bytes())?;
                Ok(read(&out)?.destination)
            };
            (10_000..10_200).map(choose).collect()
        };
        let one = choices(false, 1)?;
        assert_eq!(one, choices(true, 1)?, "ids and slots differ, the choice does not");
        assert_ne!(one, choices(false, 2)?);
        let used = endpoints.iter().filter(|e| one.contains(e)).count();
        assert_eq!(used, 10);
    }
    Ok(())
}

/// The same client comes from the same port again, to a frontend that is not masqueraded.
fn a_flow_in_the_place_of_a_masqueraded_one_keeps_its_source() -> Result<()> {
    let mut loaded = loaded()?;
    for family in families()? {
        let sent = Packet::new(family.client, family.masqueraded, TCP);
        let inside = pass(&mut loaded, "ingress", &sent.bytes())?;
        let outside = read(&pass(&mut loaded, "egress", &inside)?)?;
        assert_eq!(outside.source.ip(), family.node);
        for (key, flow) in loaded.dump::<FlowKey, Flow>(map::FLOWS)? {
            loaded.put(map::FLOWS, key, Flow { state: Flow::CLOSING, ..flow })?;
        }
        let sent = Packet { destination: family.vip, ..sent };
        let inside = pass(&mut loaded, "ingress", &sent.bytes())?;
        let outside = read(&pass(&mut loaded, "egress", &inside)?)?;
        assert_eq!(ends(&outside), (family.client, family.endpoint));
    }
    Ok(())
}

in_both_kernels!(
    there_and_back,
    masqueraded_there_and_back,
    errors_reach_whom_they_are_for,
    fragments_follow_the_first,
    refused_with_an_error_about_the_packet,
    a_udp_checksum_of_none_stays_none_and_none_comes_to_be,
    what_begins_no_flow_is_left_alone,
    closed_and_idle_flows_give_way,
    a_flow_in_the_place_of_a_masqueraded_one_keeps_its_source,
    maglev_gives_every_node_the_same_answer,
);
