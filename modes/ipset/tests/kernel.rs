//! Sets of a real kernel, in a guest that has it. Each test has a network namespace of its own.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use ipset_netlink::{Commands, Element, Entry, Family, Ipset, Kind, Mark, Set};
use netlink_requests::Socket;
use netlink_requests::protocols::NETLINK_NETFILTER;
use nix::sched::{CloneFlags, unshare};

/// What the kernel has in a namespace of the test's thread.
fn open() -> Ipset {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    Ipset::open().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn set(name: &str, kind: Kind, family: Family) -> Set {
    let bitmap = kind == Kind::BitmapPort;
    Set {
        name: name.to_owned(),
        kind,
        family: (!bitmap).then_some(family),
        max_elements: if bitmap { 0 } else { 1 << 20 },
        timeout: None,
        marks: false,
    }
}

/// What `ipset save` prints, sorted, without the options that the kernel chooses.
fn saved() -> BTreeSet<String> {
    let output = Command::new("ipset").arg("save").output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split(" bucketsize").next().unwrap().to_owned()).collect()
}

fn elements(kind: Kind, family: Family) -> Vec<Element> {
    let (a, b, net, prefix) = match family {
        Family::Inet => (ip("10.96.0.1"), ip("10.0.0.7"), ip("192.168.0.0"), 16),
        Family::Inet6 => (ip("fd00::1"), ip("fd01::7"), ip("fd02::"), 64),
    };
    let whole = if family == Family::Inet { 32 } else { 128 };
    let entries = match kind {
        Kind::HashIp => vec![Entry::Ip(a), Entry::Ip(b)],
        Kind::HashIpPort => {
            vec![Entry::IpPort(a, 6, 80), Entry::IpPort(a, 17, 80), Entry::IpPort(b, 132, 65_535)]
        }
        Kind::HashIpPortIp => vec![Entry::IpPortIp(a, 6, 80, a), Entry::IpPortIp(a, 6, 80, b)],
        Kind::HashIpPortNet => {
            vec![Entry::IpPortNet(a, 6, 80, net, prefix), Entry::IpPortNet(a, 6, 80, b, whole)]
        }
        Kind::HashNet => vec![Entry::Net(net, prefix), Entry::Net(b, whole)],
        Kind::BitmapPort => vec![Entry::Port(0), Entry::Port(30_080), Entry::Port(65_535)],
    };
    entries.into_iter().map(Element::from).collect()
}

fn sets_of_every_kind_are_read_back_as_made() {
    let mut ipset = open();
    let mut commands = Commands::default();
    let mut made = Vec::new();
    let mut printed = BTreeSet::new();
    for (n, kind) in Kind::ALL.into_iter().enumerate() {
        for family in [Family::Inet, Family::Inet6] {
            let set = set(&format!("set-{n}-{family:?}"), kind, family);
            commands.create(&set);
            printed.insert(set.to_string());
            let elements = elements(kind, family);
            for element in &elements {
                commands.add(&set.name, element);
                printed.insert(format!("add {} {element}", set.name));
            }
            made.push((set, elements.into_iter().collect::<BTreeSet<_>>()));
        }
    }
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    let listed = ipset.list(None).unwrap();
    let read: BTreeSet<_> = listed
        .into_iter()
        .map(|l| (l.set.unwrap(), l.elements.into_iter().collect::<BTreeSet<_>>()))
        .collect();
    assert_eq!(read, made.iter().cloned().collect());
    assert_eq!(saved(), printed);

    let mut commands = Commands::default();
    for (set, elements) in &made {
        commands.delete(&set.name, elements.first().unwrap());
    }
    commands.flush(&made[0].0.name);
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    for (n, (set, elements)) in made.iter().enumerate() {
        let left = ipset.list(Some(&set.name)).unwrap().remove(0).elements.len();
        assert_eq!(left, if n == 0 { 0 } else { elements.len() - 1 }, "{set}");
    }
    let mut commands = Commands::default();
    for (set, _) in &made {
        commands.destroy(&set.name);
    }
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    assert_eq!(ipset.list(None).unwrap(), []);
    assert_eq!(ipset.list(Some("set-0-Inet")).unwrap(), []);
}

fn marks_are_kept_and_replaced() {
    let mut ipset = open();
    let set = Set { marks: true, ..set("marks", Kind::HashIpPort, Family::Inet) };
    let element = |value| Element {
        entry: Entry::IpPort(ip("10.96.0.1"), 6, 80),
        mark: Some(Mark { value, mask: u32::MAX }),
    };
    let mut commands = Commands::default();
    commands.create(&set);
    commands.add("marks", &element(0x5e00_0001));
    commands.add("marks", &element(0x5e00_0002));
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    let listed = ipset.list(Some("marks")).unwrap().remove(0);
    assert_eq!((listed.set, listed.elements), (Some(set), vec![element(0x5e00_0002)]));
    let mut commands = Commands::default();
    commands.delete("marks", &element(0x5e00_0002));
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    assert_eq!(ipset.list(Some("marks")).unwrap().remove(0).elements, []);
}

fn elements_are_forgotten_where_the_set_says_so() {
    let mut ipset = open();
    let set = Set { timeout: Some(10_800), ..set("clients", Kind::HashIp, Family::Inet6) };
    let mut commands = Commands::default();
    commands.create(&set);
    commands.add("clients", &Entry::Ip(ip("fd00::1")).into());
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    assert!(saved().contains(&set.to_string()), "{:?}", saved());
    let listed = ipset.list(Some("clients")).unwrap().remove(0);
    assert_eq!(listed.set.as_ref(), Some(&set));
    assert_eq!(listed.elements, [Entry::Ip(ip("fd00::1")).into()]);
    let declared = ipset.declarations().unwrap();
    assert_eq!(declared.len(), 1);
    assert_eq!((&declared[0].set, declared[0].family), (&Some(set), Some(Family::Inet6)));
    assert_eq!(declared[0].elements, []);
}

fn sets_change_places_and_refusals_are_named() {
    let mut ipset = open();
    let [one, two] = ["one", "two"].map(|name| set(name, Kind::HashIp, Family::Inet));
    let other = set("other", Kind::HashNet, Family::Inet);
    let mut commands = Commands::default();
    commands.create(&one);
    commands.create(&two);
    commands.create(&two);
    commands.create(&other);
    commands.add("one", &Entry::Ip(ip("10.0.0.1")).into());
    // Adding twice and deleting what is not there are no errors.
    commands.add("one", &Entry::Ip(ip("10.0.0.1")).into());
    commands.delete("two", &Entry::Ip(ip("10.0.0.1")).into());
    commands.swap("one", "two");
    commands.swap("one", "nosuch");
    commands.add("nosuch", &Entry::Ip(ip("10.0.0.1")).into());
    let refused = ipset.execute(&mut commands).unwrap();
    assert_eq!(refused.iter().map(|r| r.index).collect::<Vec<_>>(), [2, 8, 9]);
    assert_eq!(ipset.list(Some("one")).unwrap()[0].elements, []);
    assert_eq!(ipset.list(Some("two")).unwrap()[0].elements.len(), 1);
}

fn large_sets_are_listed_whole() {
    const ELEMENTS: u32 = 50_000;
    let mut ipset = open();
    let set = set("large", Kind::HashIpPort, Family::Inet);
    let mut commands = Commands::default();
    commands.create(&set);
    let element = |n: u32| Element::from(Entry::IpPort(Ipv4Addr::from(0x0a60_0000 + n).into(), 6, 80));
    for n in 0..ELEMENTS {
        commands.add("large", &element(n));
    }
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    let listed = ipset.list(Some("large")).unwrap().remove(0);
    assert_eq!(listed.elements.into_iter().collect::<BTreeSet<_>>(), (0..ELEMENTS).map(element).collect());
}

/// Has another thread list a set, which uses it, for as long as what is handed out is kept.
fn in_use_by_a_list() -> (mpsc::Sender<()>, JoinHandle<()>) {
    const LIST: u16 = 6 << 8 | 7;
    let ((release, released), (begin, begun)) = (mpsc::channel::<()>(), mpsc::channel());
    let lists = std::thread::spawn(move || {
        let start = |w: &mut netlink_requests::Writer| {
            w.header(&[2, 0, 0, 0]);
            w.attribute(1, &[6]);
        };
        let mut socket = Socket::open(NETLINK_NETFILTER).unwrap();
        let listed = socket.dump(LIST, start, |_| {
            let _ = begin.send(());
            let _ = released.recv();
            Ok(())
        });
        listed.unwrap();
    });
    begun.recv().unwrap();
    (release, lists)
}

fn a_set_that_is_in_use_for_a_moment_is_deleted_after_that() {
    let mut ipset = open();
    let mut commands = Commands::default();
    commands.create(&set("large", Kind::HashIp, Family::Inet));
    // More than a list hands out at once.
    for n in 0..50_000 {
        commands.add("large", &Entry::Ip(Ipv4Addr::from(0x0a60_0000 + n).into()).into());
    }
    assert_eq!(ipset.execute(&mut commands).unwrap(), []);
    let mut commands = Commands::default();
    commands.create(&set("other", Kind::HashIp, Family::Inet));
    commands.destroy("large");
    commands.create(&set("other", Kind::HashIp, Family::Inet));
    commands.destroy("other");

    let (release, lists) = in_use_by_a_list();
    let refused = ipset.execute(&mut commands).unwrap();
    assert_eq!(refused.iter().map(|r| r.index).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(ipset_netlink::explain(&refused[0]), "the set is in use");
    drop(release);
    lists.join().unwrap();

    let (release, lists) = in_use_by_a_list();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(release);
    });
    let refused = ipset.execute(&mut commands).unwrap();
    assert_eq!(refused.iter().map(|r| r.index).collect::<Vec<_>>(), [2]);
    later.join().unwrap();
    lists.join().unwrap();
    assert_eq!(ipset.list(None).unwrap(), []);
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
    sets_of_every_kind_are_read_back_as_made,
    marks_are_kept_and_replaced,
    elements_are_forgotten_where_the_set_says_so,
    sets_change_places_and_refusals_are_named,
    large_sets_are_listed_whole,
    a_set_that_is_in_use_for_a_moment_is_deleted_after_that,
);
