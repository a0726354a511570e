//! What the programs cost: nanoseconds of one run, everything in the processor's caches.
//!
//!     cargo bench -p shunt-ebpf-tests --bench programs --profile dev
//!     cargo bench -p shunt-ebpf-tests --bench programs --profile dev -- ingress 'of a flow'
//!
//! Programs at devices are run by `BPF_PROG_TEST_RUN` over one packet; where that is rewritten, a second entry of
//! the connection table turns it back, so that each run does the same. Programs at sockets, which the kernel runs for
//! sockets only, are timed by the kernel (`BPF_ENABLE_STATS`, which takes some 20 ns of each run itself) while sockets
//! of a pod connect. Root is needed; nothing but namespaces and a cgroup of the tool's own is touched.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context, Result};
use aya::programs::{CgroupSockAddr, TestRun as _, TestRunOptions};
use aya::sys::{Stats, enable_stats};
use shunt_ebpf_abi::{Config, Flow, FlowKey, address_flags, config_flags, map, range_owner};
use shunt_ebpf_tests::cgroup::Cgroup;
use shunt_ebpf_tests::packet::{ACK, ETHERNET, Packet};
use shunt_ebpf_tests::{FORWARD, Loaded, MASQUERADE, Service, TCP, UDP};
use shunt_harness::lab::{Lab, require_kernel};

const RUNS: u32 = 200_000;
const ROUNDS: usize = 5;
const SOCKETS: usize = 40_000;

fn main() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for family in [
        [
            "192.168.0.2",
            "203.0.113.7:40001",
            "10.96.0.10:80",
            "10.96.0.10:81",
            "10.180.1.1:8080",
            "10.180.1.2:40001",
        ],
        [
            "fd00:192::2",
            "[2001:db8::7]:40001",
            "[fd00:96::10]:80",
            "[fd00:96::10]:81",
            "[fd00:180::1]:8080",
            "[fd00:180::2]:40001",
        ],
    ] {
        devices(family)?;
    }
    if std::env::args().skip(1).all(|argument| argument == "--bench" || "connect".contains(&*argument)) {
        sockets()?;
    }
    Ok(())
}

/// One line of the result: the least of the rounds.
fn time(loaded: &mut Loaded, what: &str, program: &str, packet: &[u8], from: u32) -> Result<()> {
    // Arguments say what the lines are to have in them; cargo adds one of its own.
    let line = format!("{program} {what}");
    if !std::env::args().skip(1).filter(|argument| argument != "--bench").all(|part| line.contains(&part)) {
        return Ok(());
    }
    // struct __sk_buff up to ifindex: the packet came in by this device.
    let mut context = [0; 44];
    context[36..40].copy_from_slice(&from.to_ne_bytes());
    let program_run = loaded.classifier(program)?;
    let mut best = u128::MAX;
    for _ in 0..ROUNDS {
        let mut out = vec![0; packet.len() + 256];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.repeat = RUNS;
        best = best.min(program_run.test_run(options).with_context(|| what.to_owned())?.duration.as_nanos());
    }
    println!("{best:>6} ns  {program:<8} {what}");
    Ok(())
}

fn devices([node, client, vip, masqueraded, endpoint, pod]: [&str; 6]) -> Result<()> {
    let node: IpAddr = node.parse()?;
    let parse = |text: &str| text.parse::<SocketAddr>();
    let (client, vip, masqueraded) = (parse(client)?, parse(vip)?, parse(masqueraded)?);
    let (endpoint, pod) = (parse(endpoint)?, parse(pod)?);
    let v4 = node.is_ipv4();
    let mut loaded = Loaded::new()?;
    let service_cidrs = if v4 { config_flags::SERVICE_CIDRS_V4 } else { config_flags::SERVICE_CIDRS_V6 };
    let pods = if v4 { config_flags::PODS_BY_RANGE_V4 } else { config_flags::PODS_BY_RANGE_V6 };
    let mut config = Config { flags: service_cidrs | pods, ..Config::DEFAULT };
    (if v4 { &mut config.masquerade4 } else { &mut config.masquerade6 }).0 =
        shunt_ebpf_abi::Address::from(node).0;
    loaded.set_config(config)?;
    loaded.add_range(range_owner::service_cidr(v4), vip.ip(), if v4 { 16 } else { 112 })?;
    loaded.add_range(range_owner::pods(v4), pod.ip(), if v4 { 16 } else { 64 })?;
    loaded.set_address(vip.ip(), address_flags::CLUSTER_IP)?;
    loaded.set_address(node, address_flags::LOCAL)?;
    for protocol in [TCP, UDP] {
        let service = loaded.add_service(&Service::new(protocol, [endpoint]))?;
        loaded.add_frontend(&service, vip, [FORWARD; 3], 0)?;
        loaded.add_frontend(&service, masqueraded, [MASQUERADE; 3], 0)?;
    }
    println!("{}", if v4 { "IPv4" } else { "IPv6" });
    for (protocol, name) in [(TCP, "TCP"), (UDP, "UDP")] {
        let packet = Packet::new(pod, endpoint, protocol);
        if protocol == TCP {
            time(&mut loaded, "SYN between pods", "ingress", &packet.bytes(), 0)?;
            time(&mut loaded, "SYN between pods", "egress", &packet.bytes(), 1)?;
        }
        let packet = packet.flags(ACK);
        time(&mut loaded, &format!("{name} between pods"), "ingress", &packet.bytes(), 0)?;
        time(&mut loaded, &format!("{name} between pods"), "egress", &packet.bytes(), 1)?;
    }
    for (protocol, name) in [(TCP, "TCP"), (UDP, "UDP")] {
        // From here on the endpoint has flows with the client.
        let sent = Packet::new(client, masqueraded, protocol);
        let (_, inside) = loaded.run("ingress", &sent.bytes())?;
        loaded.run("egress", &inside)?;
        for (key, flow) in loaded.dump::<FlowKey, Flow>(map::FLOWS)? {
            let back = FlowKey { tuple: flow.tuple, ..key };
            loaded.put(map::FLOWS, back, Flow { tuple: key.tuple, ..flow })?;
        }
        let sent = sent.flags(ACK);
        time(&mut loaded, &format!("{name} of a flow, to its endpoint"), "ingress", &sent.bytes(), 0)?;
        let onward = Packet { destination: endpoint, ..sent };
        time(&mut loaded, &format!("{name} of a flow, masqueraded"), "egress", &onward.bytes(), 1)?;
        let other = Packet { source: SocketAddr::new(client.ip(), 50_000), ..onward };
        let what = format!("{name} of a client with flows, of none of them");
        time(&mut loaded, &what, "ingress", &other.bytes(), 0)?;
        time(&mut loaded, &what, "egress", &other.bytes(), 1)?;
    }
    let mut echo = Packet::new(pod, endpoint, UDP).bytes();
    // The protocol says ICMP, whatever the checksum says.
    echo[if v4 { ETHERNET + 9 } else { ETHERNET + 6 }] = if v4 { 1 } else { 58 };
    time(&mut loaded, "ICMP between pods", "ingress", &echo, 0)
}

fn sockets() -> Result<()> {
    let lab = Lab::builder()
        .node(["192.168.0.2".parse()?, "fd00:192::2".parse()?])
        .client(["203.0.113.2".parse()?, "2001:db8::2".parse()?])
        .pod("asker", ["10.180.0.3".parse()?, "fd00:180::3".parse()?])
        .build()?;
    let cgroup = Cgroup::enter()?;
    println!("sockets, BPF_ENABLE_STATS");
    for (vip, endpoint, name) in [
        ("10.96.0.10:80", "10.180.0.1:8080", "connect4"),
        ("[fd00:96::10]:80", "[fd00:180::1]:8080", "connect6"),
    ] {
        let mut loaded = Loaded::new()?;
        let (vip, endpoint): (SocketAddr, SocketAddr) = (vip.parse()?, endpoint.parse()?);
        let service = loaded.add_service(&Service::new(UDP, [endpoint]))?;
        loaded.add_frontend(&service, vip, [FORWARD; 3], 0)?;
        loaded.attach_sockets(&cgroup.open()?)?;
        for (what, to) in [("to a Service", vip), ("to a pod", endpoint)] {
            let mut best = u64::MAX;
            for _ in 0..ROUNDS {
                let before = spent(&mut loaded, name)?;
                let stats = enable_stats(Stats::RunTime)?;
                lab.pod("asker")?.run(|| connect(to))?;
                drop(stats);
                let after = spent(&mut loaded, name)?;
                best = best.min((after.0 - before.0) / (after.1 - before.1).max(1));
            }
            println!("{best:>6} ns  {name:<8} {what}");
        }
    }
    Ok(())
}

/// Sockets of UDP that connect to an address; no packet is sent.
fn connect(to: SocketAddr) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
    for _ in 0..SOCKETS {
        UdpSocket::bind((any, 0))?.connect(to)?;
    }
    Ok(())
}

/// Nanoseconds and runs of a program so far.
fn spent(loaded: &mut Loaded, name: &str) -> Result<(u64, u64)> {
    let program: &mut CgroupSockAddr =
        loaded.ebpf().program_mut(name).with_context(|| name.to_owned())?.try_into()?;
    let info = program.info()?;
    Ok((u64::try_from(info.run_time().as_nanos())?, info.run_count()))
}
