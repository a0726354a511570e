//! IPVS of a real kernel, in a guest that has it. Each test has a network namespace of its own.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ipvs_netlink::{
    Config, Destination, Error, Flags, Forwarding, Ipvs, NetlinkError, Persistence, Protocol, Service,
    ServiceKey,
};
use nix::sched::{CloneFlags, unshare};

const EEXIST: i32 = 17;
const ENOENT: i32 = 2;
const ESRCH: i32 = 3;

/// What the kernel has in a namespace of the test's thread.
fn open() -> Ipvs {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    // Without a local routing table the kernel takes no IPv4 destination.
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    Ipvs::open().unwrap()
}

fn key(address: &str, protocol: Protocol, port: u16) -> ServiceKey {
    ServiceKey::Address { address: address.parse().unwrap(), protocol, port }
}

fn socket(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// What `ipvsadm -Sn` prints, sorted.
fn saved() -> BTreeSet<String> {
    let output = Command::new("ipvsadm").arg("-Sn").output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().lines().map(|l| l.trim_end().to_owned()).collect()
}

fn services_of_every_kind_are_read_back_as_made() {
    let mut ipvs = open();
    let mut wanted = Vec::new();
    for address in ["10.96.0.10", "fd00:96::10"] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            wanted.push(Service::new(key(address, protocol, 80), "rr"));
        }
    }
    for (ipv6, mark) in [(false, 7), (true, 7), (false, 0x7fff_ffff)] {
        wanted.push(Service::new(ServiceKey::Mark { ipv6, mark }, "wrr"));
    }
    for (i, scheduler) in
        ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "mh", "fo", "ovf"]
            .iter()
            .enumerate()
    {
        let mut service = Service::new(key("10.96.0.11", Protocol::Tcp, 100 + i as u16), scheduler);
        if ["sh", "mh"].contains(scheduler) {
            service.flags.scheduler = [true, true, false];
        }
        wanted.push(service);
    }
    for (address, prefix) in [("10.96.0.12", 32), ("10.96.0.13", 24), ("fd00::12", 128), ("fd00::13", 64)] {
        let mut service = Service::new(key(address, Protocol::Tcp, 443), "rr");
        service.persistence = Some(Persistence { timeout: 10_800, prefix });
        wanted.push(service);
    }
    let mut one_packet = Service::new(key("10.96.0.14", Protocol::Udp, 53), "rr");
    one_packet.flags = Flags { one_packet: true, ..Flags::default() };
    wanted.push(one_packet);
    for flag in 0..3 {
        let mut service = Service::new(key("10.96.0.15", Protocol::Tcp, 200 + flag), "wrr");
        service.flags.scheduler[usize::from(flag)] = true;
        wanted.push(service);
    }
    let mut calls = Service::new(key("10.96.0.16", Protocol::Udp, 5060), "rr");
    calls.persistence = Some(Persistence { timeout: 60, prefix: 32 });
    calls.persistence_engine = Some(String::from("sip"));
    wanted.push(calls);

    let mut commands = ipvs.commands();
    for service in &wanted {
        commands.add_service(service);
    }
    assert_eq!(commands.len(), wanted.len());
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    let read: BTreeSet<Service> = ipvs.services().unwrap().into_iter().map(|e| e.service).collect();
    assert_eq!(read, wanted.iter().cloned().collect());
    let printed: BTreeSet<String> = wanted.iter().map(|s| format!("-A {s}")).collect();
    assert_eq!(saved(), printed);

    let mut commands = ipvs.commands();
    commands.flush();
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(ipvs.services().unwrap(), []);
}

fn a_refused_command_is_named_and_the_others_are_in_force() {
    let mut ipvs = open();
    let service = Service::new(key("10.96.0.10", Protocol::Tcp, 80), "rr");
    let other = Service::new(key("10.96.0.10", Protocol::Tcp, 81), "rr");
    let mut unknown = other.clone();
    unknown.key = key("10.96.0.10", Protocol::Tcp, 82);
    unknown.scheduler = String::from("nosuch");
    let mut commands = ipvs.commands();
    commands.add_service(&service);
    commands.add_service(&service);
    commands.add_service(&unknown);
    commands.delete_destination(&service.key, socket("10.0.0.1:80"));
    commands.add_service(&other);
    commands.delete_service(&key("10.96.0.99", Protocol::Tcp, 80));
    let refusals = ipvs.execute(&mut commands).unwrap();
    let refused: Vec<_> = refusals.iter().map(|r| (r.index, r.errno)).collect();
    assert_eq!(refused, [(1, EEXIST), (2, ENOENT), (3, ENOENT), (5, ESRCH)]);
    assert_eq!(ipvs.services().unwrap().len(), 2);
    // A batch whose last command is refused is answered like any other.
    let mut commands = ipvs.commands();
    commands.add_service(&service);
    assert_eq!(ipvs.execute(&mut commands).unwrap().len(), 1);
}

fn destinations_keep_what_they_are_given() {
    let mut ipvs = open();
    let v4 = key("10.96.0.10", Protocol::Tcp, 80);
    let v6 = key("fd00:96::10", Protocol::Udp, 53);
    let mark = ServiceKey::Mark { ipv6: false, mark: 0x4000 };
    let mut commands = ipvs.commands();
    for key in [v4, v6, mark] {
        commands.add_service(&Service::new(key, "wrr"));
    }
    let mut thresholds = Destination::new(socket("10.0.0.2:8080"), 3);
    thresholds.upper_threshold = 100;
    thresholds.lower_threshold = 50;
    let mut route = Destination::new(socket("10.0.0.3:80"), 1);
    route.forwarding = Forwarding::Route;
    let mut tunnel = Destination::new(socket("10.0.0.4:80"), 1);
    tunnel.forwarding = Forwarding::Tunnel;
    // Only a tunnel leads to the other family.
    let mut other_family = Destination::new(socket("[fd00::4]:80"), 1);
    other_family.forwarding = Forwarding::Tunnel;
    let of_v4 = [Destination::new(socket("10.0.0.1:8080"), 1), thresholds, route, tunnel, other_family];
    for d in &of_v4 {
        commands.add_destination(&v4, d);
    }
    let of_v6 =
        [Destination::new(socket("[fd00::1]:5353"), 1), Destination::new(socket("[fd00::2]:5353"), 0)];
    for d in &of_v6 {
        commands.add_destination(&v6, d);
    }
    let of_mark = [Destination::new(socket("10.0.0.1:0"), 1)];
    for d in &of_mark {
        commands.add_destination(&mark, d);
    }
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    let read = |ipvs: &mut Ipvs, key| -> BTreeSet<Destination> {
        ipvs.destinations(key).unwrap().into_iter().map(|e| e.destination).collect()
    };
    assert_eq!(read(&mut ipvs, &v4), of_v4.into());
    assert_eq!(read(&mut ipvs, &v6), of_v6.into());
    assert_eq!(read(&mut ipvs, &mark), of_mark.into());

    let drained = Destination { weight: 0, ..of_v4[0] };
    let mut commands = ipvs.commands();
    commands.set_destination(&v4, &drained);
    commands.delete_destination(&v4, of_v4[1].address);
    let mut changed = Destination { weight: u32::from(u16::MAX), ..of_v4[2] };
    changed.forwarding = Forwarding::Masquerade;
    changed.upper_threshold = 7;
    commands.set_destination(&v4, &changed);
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(read(&mut ipvs, &v4), [drained, changed, of_v4[3], of_v4[4]].into());
    let entry = ipvs.destinations(&v4).unwrap().remove(0);
    assert_eq!((entry.active, entry.inactive, entry.persistent, entry.stats.connections), (0, 0, 0, 0));
    // A service that is not there has none.
    assert_eq!(ipvs.destinations(&key("10.96.0.99", Protocol::Tcp, 80)).unwrap(), []);
}

fn what_is_carried_is_counted() {
    let mut ipvs = open();
    let address = "10.96.0.10";
    assert!(Command::new("ip").args(["address", "add", address, "dev", "lo"]).status().unwrap().success());
    let mut service = Service::new(key(address, Protocol::Udp, 5353), "rr");
    service.persistence = Some(Persistence { timeout: 60, prefix: 24 });
    let mut commands = ipvs.commands();
    commands.add_service(&service);
    // What is for the node itself is not translated.
    let mut local = Destination::new(socket("127.0.0.1:5353"), 1);
    local.forwarding = Forwarding::Local;
    commands.add_destination(&service.key, &local);
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(ipvs.destinations(&service.key).unwrap().remove(0).destination, local);

    let server = UdpSocket::bind((address, 5353)).unwrap();
    let client = UdpSocket::bind((address, 0)).unwrap();
    for _ in 0..3 {
        client.send_to(&[0; 100], (address, 5353)).unwrap();
        server.recv_from(&mut [0; 200]).unwrap();
    }
    // The kernel adds its counters up every two seconds.
    let wait_for = |ipvs: &mut Ipvs, connections: u64| {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            let of_service = ipvs.services().unwrap().remove(0).stats;
            let entry = ipvs.destinations(&service.key).unwrap().remove(0);
            if [of_service, entry.stats].iter().all(|stats| stats.connections == connections) {
                return (of_service, entry);
            }
            assert!(Instant::now() < deadline, "{of_service:?} {entry:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let (of_service, entry) = wait_for(&mut ipvs, 1);
    for stats in [of_service, entry.stats] {
        // With the headers of IP and UDP.
        assert_eq!((stats.packets_in, stats.bytes_in), (3, 3 * (20 + 8 + 100)), "{stats:?}");
    }
    assert_eq!((entry.active, entry.inactive, entry.persistent), (0, 1, 1));

    let mut commands = ipvs.commands();
    commands.zero(Some(&service.key));
    commands.zero(None);
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    let (of_service, entry) = wait_for(&mut ipvs, 0);
    assert_eq!((of_service.packets_in, entry.stats.bytes_in, entry.inactive), (0, 0, 1));
}

fn a_service_is_changed_in_place() {
    let mut ipvs = open();
    let mut service = Service::new(key("10.96.0.10", Protocol::Tcp, 80), "rr");
    let destination = Destination::new(socket("10.0.0.1:8080"), 1);
    let mut commands = ipvs.commands();
    commands.add_service(&service);
    commands.add_destination(&service.key, &destination);
    service.scheduler = String::from("mh");
    service.flags.scheduler = [false, true, false];
    service.persistence = Some(Persistence { timeout: 60, prefix: 32 });
    commands.set_service(&service);
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(ipvs.services().unwrap()[0].service, service);
    service = Service::new(service.key, "lc");
    let mut commands = ipvs.commands();
    commands.set_service(&service);
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(ipvs.services().unwrap()[0].service, service);
    assert_eq!(ipvs.destinations(&service.key).unwrap()[0].destination, destination);
}

fn timeouts_are_set_and_zero_leaves_them_alone() {
    let mut ipvs = open();
    let before = ipvs.config().unwrap();
    assert!(before.tcp > 0 && before.tcp_fin > 0 && before.udp > 0);
    ipvs.set_config(&Config { tcp: 1000, tcp_fin: 0, udp: 77 }).unwrap();
    assert_eq!(ipvs.config().unwrap(), Config { tcp: 1000, tcp_fin: before.tcp_fin, udp: 77 });
    let info = ipvs.info().unwrap();
    assert_eq!(info.version.0, 1);
    assert!(info.connection_table >= 256);
}

fn thousands_of_services_are_made_and_listed_at_once() {
    const SERVICES: u16 = 5000;
    let mut ipvs = open();
    let mut commands = ipvs.commands();
    for port in 1..=SERVICES {
        let service = Service::new(key("10.96.0.10", Protocol::Tcp, port), "rr");
        commands.add_service(&service);
        for n in 1..=3 {
            let address = SocketAddr::new(IpAddr::from([10, 0, 0, n]), port);
            commands.add_destination(&service.key, &Destination::new(address, 1));
        }
    }
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    assert_eq!(ipvs.services().unwrap().len(), usize::from(SERVICES));
    for port in [1, 777, SERVICES] {
        assert_eq!(ipvs.destinations(&key("10.96.0.10", Protocol::Tcp, port)).unwrap().len(), 3);
    }
    // More destinations than one message of a dump holds.
    let large = key("10.96.0.11", Protocol::Tcp, 80);
    let mut commands = ipvs.commands();
    commands.add_service(&Service::new(large, "rr"));
    for n in 0..SERVICES {
        let [high, low] = n.to_be_bytes();
        commands.add_destination(&large, &Destination::new((IpAddr::from([10, 1, high, low]), 80).into(), 1));
    }
    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
    let listed: BTreeSet<SocketAddr> =
        ipvs.destinations(&large).unwrap().into_iter().map(|e| e.destination.address).collect();
    assert_eq!(listed.len(), usize::from(SERVICES));
}

/// The guest's kernel has one table of services for all namespaces: many a single dump of 2,000 services is wrong here.
fn services_are_listed_as_they_are_while_another_namespace_changes() {
    const LONGEST: Duration = Duration::from_mins(1);
    let (began, is_over) = (Instant::now(), AtomicBool::new(false));
    let seen = thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut ipvs = open();
            let mut changes = 0_u64;
            while !is_over.load(Ordering::Relaxed) && began.elapsed() < LONGEST {
                let (mut add, mut flush) = (ipvs.commands(), ipvs.commands());
                for port in 1..=100 {
                    add.add_service(&Service::new(key("10.96.1.10", Protocol::Tcp, port), "rr"));
                }
                flush.flush();
                for mut commands in [add, flush] {
                    assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
                    changes += 1;
                    thread::sleep(Duration::from_micros(changes * 7919 % 40_000));
                }
            }
        });
        // One message of a dump, and many.
        let seen = [20, 2000].map(|count| {
            let mut ipvs = open();
            let wanted: Vec<_> = (1..=count).map(|port| key("10.96.0.10", Protocol::Tcp, port)).collect();
            let mut commands = ipvs.commands();
            for key in &wanted {
                commands.add_service(&Service::new(*key, "rr"));
            }
            assert_eq!(ipvs.execute(&mut commands).unwrap(), []);
            let (mut right, mut wrong, mut given_up) = (0, 0, 0);
            let end = Instant::now() + Duration::from_secs(4);
            while Instant::now() < end {
                match ipvs.services() {
                    Ok(listed) if listed.iter().map(|e| e.service.key).eq(wanted.iter().copied()) => {
                        right += 1;
                    }
                    Ok(_) => wrong += 1,
                    Err(Error::Netlink { source: NetlinkError::Interrupted, .. }) => given_up += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            println!("{count} services: {right} listings, {wrong} wrong, {given_up} given up");
            (right, wrong)
        });
        is_over.store(true, Ordering::Relaxed);
        other.join().unwrap();
        seen
    });
    let [(few, wrong_few), (many, wrong_many)] = seen;
    assert!(few > 0 && wrong_few == 0);
    // Two in a row may lack the same by chance.
    assert!(many > 0 && wrong_many * 20 <= many);
}

/// Each in a guest of its own.
macro_rules! in_guest {
    ($($test:ident),* $(,)?) => {
        mod guest {
            $(#[test] fn $test() {
                shunt_harness::guest::test_in_guest(module_path!(), stringify!($test), super::$test);
            })*
        }
    };
}

in_guest!(
    services_of_every_kind_are_read_back_as_made,
    a_refused_command_is_named_and_the_others_are_in_force,
    destinations_keep_what_they_are_given,
    what_is_carried_is_counted,
    a_service_is_changed_in_place,
    timeouts_are_set_and_zero_leaves_them_alone,
    thousands_of_services_are_made_and_listed_at_once,
    services_are_listed_as_they_are_while_another_namespace_changes,
);
