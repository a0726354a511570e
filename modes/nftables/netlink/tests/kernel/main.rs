//! Against the running kernel, each test in a network namespace of its own.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests are tests")]

mod shop;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Instant;

use nft_netlink::*;
use nix::sched::{CloneFlags, unshare};
use shop::*;

/// Runs `test` on a thread in a new network namespace, which ends with the thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let ran = std::thread::spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {
            test();
            true
        }
        Err(_) if std::env::var_os("SHUNT_REQUIRE_KERNEL").is_none_or(|v| v != "1") => false,
        Err(e) => panic!("SHUNT_REQUIRE_KERNEL=1, but no network namespace can be made: {e}"),
    })
    .join()
    .unwrap();
    if !ran {
        println!("skipped: no privilege to make a network namespace");
    }
}

/// What nft(8) lists. `NFT` names another binary to try.
fn nft_list() -> String {
    let nft = std::env::var_os("NFT").unwrap_or_else(|| "nft".into());
    let output = Command::new(nft).args(["list", "ruleset"]).output().unwrap();
    assert!(
        output.status.success(),
        "nft list ruleset: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The elements, in order and without what only the kernel knows.
fn dump(socket: &mut Socket, table: TableId<'_>, set: &str) -> BTreeSet<Element> {
    let mut elements = BTreeSet::new();
    assert!(
        socket
            .dump_elements(table, set, |mut element| {
                element.expiration = None;
                elements.insert(element);
            })
            .unwrap()
    );
    elements
}

/// Rules without their handles, by chain.
fn dump_rules(socket: &mut Socket) -> Vec<Rule> {
    let mut rules = socket.dump_rules(TABLE, None).unwrap();
    for rule in &mut rules {
        assert!(rule.handle.take().is_some());
    }
    rules.sort_by(|a, b| a.chain.cmp(&b.chain));
    rules
}

#[test]
fn what_goes_in_comes_out() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        assert_eq!(socket.dump_tables(Family::Ip).unwrap(), []);
        assert_eq!(socket.dump_chains(TABLE).unwrap(), []);
        assert_eq!(socket.dump_rules(TABLE, None).unwrap(), []);
        assert_eq!(socket.dump_sets(TABLE).unwrap(), []);
        assert!(!socket.dump_elements(TABLE, "endpoints", |_| panic!()).unwrap());

        let batch = everything();
        socket.commit(&batch).unwrap();

        let table = Table { family: Family::Ip, name: "shop".into(), comment: Some("a table".into()) };
        assert_eq!(socket.dump_tables(Family::Ip).unwrap(), [table]);
        assert_eq!(socket.dump_tables(Family::Ip6).unwrap(), []);
        assert_eq!(socket.dump_chains(TABLE).unwrap(), chains());
        assert_eq!(
            socket.dump_sets(TABLE).unwrap().into_iter().collect::<BTreeSet<_>>(),
            sets().into_iter().collect()
        );
        for (set, elements) in elements() {
            assert_eq!(dump(&mut socket, TABLE, set), elements.into_iter().collect(), "{set}");
        }
        let mut expected = rules();
        expected.sort_by(|a, b| a.chain.cmp(&b.chain));
        let dumped = dump_rules(&mut socket);
        for (dumped, expected) in dumped.iter().zip(&expected) {
            assert_eq!(dumped, expected, "\n{dumped}\n{expected}");
        }
        assert_eq!(dumped.len(), expected.len());
        assert_eq!(socket.dump_rules(TABLE, Some("refuse")).unwrap().len(), 1);
        assert_eq!(socket.dump_rules(TABLE, Some("nowhere")).unwrap(), []);
        assert!(!socket.dump_elements(TABLE, "nothing", |_| panic!()).unwrap());

        let counters: Vec<_> = socket
            .dump_rules(TABLE, Some("nat-postrouting"))
            .unwrap()
            .into_iter()
            .flat_map(|rule| rule.exprs)
            .filter_map(|e| if let Expr::Counter(c) = e { Some((c.packets, c.bytes)) } else { None })
            .collect();
        assert_eq!(counters, [(7, 700)]);

        // Adding it all again is no error except for the rules, which are doubled.
        socket.commit(&batch).unwrap();
        assert_eq!(dump_rules(&mut socket).len(), 2 * expected.len());

        let mut batch = Batch::new();
        batch.delete_table(TABLE);
        socket.commit(&batch).unwrap();
        assert_eq!(socket.dump_tables(Family::Ip).unwrap(), []);
    });
}

#[test]
fn nft_prints_it() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        socket.commit(&everything()).unwrap();
        let listing = nft_list();
        for expected in [
            "comment \"a table\"",
            "comment \"every address\"",
            "type nat hook prerouting priority dstnat; policy accept;",
            "dnat ip to ip daddr . meta l4proto . th dport . numgen random mod 3 map @endpoints",
            "meta priority set ip daddr . meta l4proto . th dport map @services",
            "meta priority vmap @classes",
            "ip daddr . meta l4proto . th dport vmap @actions",
            "ip daddr @cluster-ips reject",
            "type classid : verdict",
            "type ipv4_addr . inet_proto . inet_service : classid",
            "type ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service",
            "10.0.0.1 . tcp . 80 . 0x00000002 : 192.168.0.2 . 8080",
            "10.0.0.1 . tcp . 80 : 0:3",
            "goto dispatch-3",
            "elements = { 10.1.0.0/16, 10.4.0.0/16 }",
            "10.1.0.0/16 . 80-90 : drop",
            "meta mark & 0x00004000 == 0x00004000 masquerade fully-random",
            "counter packets 7 bytes 700 masquerade",
            "snat to 192.0.2.1 random,persistent",
            "ct state invalid drop",
            "reject with tcp reset",
            "fib saddr type local ct mark set 0x00008000 return",
            "ip saddr != @nets goto refuse",
            "add @seen { ip saddr }",
            "delete @seen { ip saddr }",
            "update @affinity { ip saddr . ip daddr timeout 1m : 192.168.0.1 . 8080 }",
            "iifname \"lo\" meta mark set 0x00000001",
            "reject with icmp host-unreachable comment \"says the owner\"",
            "fd00::1",
            "timeout 3h",
        ] {
            assert!(listing.contains(expected), "missing {expected:?} in\n{listing}");
        }
    });
}

#[test]
fn one_bad_operation_undoes_all() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        batch.add_chain(TABLE, &Chain::regular("here"));
        batch.add_rule(TABLE, &Rule::new("nowhere", vec![]).with_comment("lost"));
        batch.add_chain(TABLE, &Chain::regular("there"));
        let error = socket.commit(&batch).unwrap_err();
        let refusal = error.first().unwrap();
        assert_eq!((refusal.index, refusal.errno), (Some(2), 2));
        assert_eq!(refusal.description, "add rule ip shop nowhere comment \"lost\"");
        assert!(refusal.attribute_offset.is_some());
        println!("{error}");
        assert_eq!(socket.dump_tables(Family::Ip).unwrap(), []);

        // The same socket goes on.
        socket.commit(&everything()).unwrap();

        // An element is found in a list.
        let mut batch = Batch::new();
        batch.delete_elements(
            TABLE,
            "cluster-ips",
            [[10, 0, 0, 1], [10, 9, 9, 9], [10, 0, 0, 10]].map(Element::new),
        );
        let error = socket.commit(&batch).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel refused operation 0 (delete element ip shop cluster-ips { 0x0a090909 } (2 of 3)): \
             No such file or directory (os error 2)"
        );
        assert_eq!(dump(&mut socket, TABLE, "cluster-ips").len(), 2);

        // Loops are found when the transaction is validated.
        let mut batch = Batch::new();
        batch.add_rule(TABLE, &Rule::new("all", vec![Expr::ImmediateVerdict(Verdict::Jump("all".into()))]));
        let error = socket.commit(&batch).unwrap_err();
        let errno = nix::errno::Errno::from_raw(error.first().unwrap().errno);
        assert!(matches!(errno, nix::errno::Errno::EMLINK | nix::errno::Errno::ELOOP), "{errno}");
        println!("{error}");
    });
}

#[test]
fn data_is_replaced_in_one_transaction() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        socket.commit(&everything()).unwrap();
        let new = Element::value(key4([10, 0, 0, 1], 6, 80, 0), endpoint([192, 168, 7, 7], 9090));

        let mut batch = Batch::new();
        batch.add_elements(TABLE, "endpoints", [&new]);
        let error = socket.commit(&batch).unwrap_err();
        assert_eq!(error.first().unwrap().errno, nix::errno::Errno::EEXIST as i32);

        let mut batch = Batch::new();
        batch.delete_elements(TABLE, "endpoints", [&new]);
        batch.add_elements(TABLE, "endpoints", [&new]);
        socket.commit(&batch).unwrap();
        let elements = dump(&mut socket, TABLE, "endpoints");
        assert_eq!(elements.len(), 3);
        assert!(elements.contains(&new));
    });
}

#[test]
fn rules_in_their_places() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        let rule = |comment: &str| Rule::new("c", vec![]).with_comment(comment);
        let comments = |socket: &mut Socket| -> String {
            let mut all = String::new();
            for rule in socket.dump_rules(TABLE, Some("c")).unwrap() {
                let _ = write!(all, "{} ", rule.comment.unwrap());
            }
            all
        };
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        batch.add_chain(TABLE, &Chain::regular("c"));
        batch.add_rule(TABLE, &rule("2"));
        batch.add_rule(TABLE, &rule("3"));
        batch.insert_rule(TABLE, &rule("1"));
        socket.commit(&batch).unwrap();
        assert_eq!(comments(&mut socket), "1 2 3 ");

        let handles: Vec<_> =
            socket.dump_rules(TABLE, None).unwrap().into_iter().map(|rule| rule.handle.unwrap()).collect();
        let mut batch = Batch::new();
        batch.replace_rule(TABLE, handles[1], &rule("two"));
        batch.delete_rule(TABLE, "c", handles[2]);
        socket.commit(&batch).unwrap();
        assert_eq!(comments(&mut socket), "1 two ");

        let mut batch = Batch::new();
        batch.flush_chain(TABLE, "c");
        socket.commit(&batch).unwrap();
        assert_eq!(comments(&mut socket), "");

        let mut batch = Batch::new();
        batch.delete_chain(TABLE, "c");
        socket.commit(&batch).unwrap();
        assert_eq!(socket.dump_chains(TABLE).unwrap(), []);
    });
}

#[test]
fn sets_are_emptied_and_deleted() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        batch.add_set(TABLE, &Set::new("s", vec![FieldType::Ipv4Addr]));
        batch.add_elements(TABLE, "s", (0..5000_u32).map(|i| Element::new(i.to_be_bytes())));
        socket.commit(&batch).unwrap();
        // The kernel still reorganises the table of a set whose size is not declared: what is dumped
        // meanwhile may be less.
        let complete = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            dump(&mut socket, TABLE, "s").len() == 5000
        });
        assert!(complete);

        let mut batch = Batch::new();
        batch.flush_set(TABLE, "s");
        socket.commit(&batch).unwrap();
        assert!(dump(&mut socket, TABLE, "s").is_empty());

        let mut batch = Batch::new();
        batch.delete_set(TABLE, "s");
        socket.commit(&batch).unwrap();
        assert!(socket.dump_sets(TABLE).unwrap().is_empty());
    });
}

#[test]
fn foreign_changes_are_noticed() {
    in_namespace(|| {
        let (mut ours, mut theirs) = (Socket::new().unwrap(), Socket::new().unwrap());
        let generation = ours.generation().unwrap();
        let mut batch = Batch::at_generation(generation);
        batch.add_table(TABLE, None);
        ours.commit(&batch).unwrap();
        assert_eq!(ours.generation().unwrap(), generation + 1);

        let mut foreign = Batch::new();
        foreign.add_table(TableId::new(Family::Ip6, "theirs"), None);
        theirs.commit(&foreign).unwrap();

        let mut batch = Batch::at_generation(generation + 1);
        batch.add_chain(TABLE, &Chain::regular("c"));
        let error = ours.commit(&batch).unwrap_err();
        assert!(
            matches!(error, CommitError::GenerationChanged { expected } if expected == generation + 1),
            "{error}"
        );
        assert_eq!(ours.dump_chains(TABLE).unwrap(), []);
    });
}

#[test]
fn foreign_rules_are_no_error() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        let script = "table ip shop {
            set cards { type ether_addr; elements = { 02:00:00:00:00:01 comment \"mine\" }; }
            chain c {
                type filter hook input priority 0;
                tcp dport { 80, 443 } limit rate 5/second burst 3 packets log prefix \"x\" accept
                ip dscp set cs1 quota over 25 mbytes
                ip saddr 10.0.0.0-10.0.0.9 ct count over 5 drop
            }
        }";
        let status = Command::new("nft").arg(script).status().unwrap();
        assert!(status.success());
        let rules = socket.dump_rules(TABLE, None).unwrap();
        assert_eq!(rules.len(), 3);
        let unknown = |rule: &Rule| rule.exprs.iter().filter(|e| matches!(e, Expr::Unknown { .. })).count();
        assert!(rules.iter().all(|rule| unknown(rule) > 0), "{rules:?}");
        assert_eq!(socket.dump_sets(TABLE).unwrap().len(), 2);
        assert_eq!(dump(&mut socket, TABLE, "cards").len(), 1);
        // And they can be put back as they are.
        let mut batch = Batch::new();
        batch.flush_chain(TABLE, "c");
        for rule in rules.iter().skip(1) {
            batch.add_rule(TABLE, rule);
        }
        socket.commit(&batch).unwrap();
        let again: Vec<_> =
            socket.dump_rules(TABLE, None).unwrap().into_iter().map(|rule| rule.exprs).collect();
        assert_eq!(again.len(), 2);
        assert_eq!(again[1], rules[2].exprs);
    });
}

#[test]
fn ipv6() {
    in_namespace(|| {
        const TABLE: TableId<'static> = TableId::new(Family::Ip6, "shop");
        let key = |address: &str, index: u32| {
            let address: Ipv6Addr = address.parse().unwrap();
            Bytes::concat([&address.octets()[..], &[6], &80_u16.to_be_bytes(), &index.to_ne_bytes()])
        };
        let value = |address: &str| {
            let address: Ipv6Addr = address.parse().unwrap();
            Bytes::concat([&address.octets()[..], &8080_u16.to_be_bytes()])
        };
        let set = Set {
            size: Some(100),
            ..Set::map(
                "endpoints",
                vec![FieldType::Ipv6Addr, FieldType::InetProto, FieldType::InetService, FieldType::Mark],
                MapData::Fields(vec![FieldType::Ipv6Addr, FieldType::InetService]),
            )
        };
        let elements = [
            Element::value(key("fd00::1", 0), value("fd01::1")),
            Element::value(key("fd00::1", 1), value("fd01::2")),
        ];
        let rule = Rule::new(
            "c",
            vec![
                payload(PayloadBase::Network, 24, 16, 0),
                meta(MetaKey::L4Proto, 4),
                payload(PayloadBase::Transport, 2, 2, 5),
                Expr::Numgen { dreg: r(6), modulus: 2, offset: 0, random: true },
                lookup("endpoints", 0, 0),
                Expr::Nat {
                    kind: NatKind::Dnat,
                    family: Family::Ip6,
                    addr: r(0),
                    port: Some(r(4)),
                    flags: NatFlags::default(),
                },
            ],
        );
        let prefix = Rule::new(
            "c",
            vec![
                payload(PayloadBase::Network, 8, 16, 0),
                Expr::Bitwise {
                    sreg: r(0),
                    dreg: r(0),
                    mask: Bytes::from([[0xff; 8], [0; 8]].concat()),
                    xor: [0; 16].into(),
                },
                cmp(0, "fd00::".parse::<Ipv6Addr>().unwrap().octets()),
                Expr::Reject(RejectKind::IcmpUnreach(4)),
            ],
        );
        let mut socket = Socket::new().unwrap();
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        batch.add_chain(TABLE, &Chain::base("c", ChainType::Nat, Hook::Prerouting, -100));
        batch.add_set(TABLE, &set);
        batch.add_elements(TABLE, "endpoints", &elements);
        batch.add_rule(TABLE, &rule);
        batch.add_rule(TABLE, &prefix);
        socket.commit(&batch).unwrap();

        assert_eq!(socket.dump_sets(TABLE).unwrap(), [set]);
        assert_eq!(dump(&mut socket, TABLE, "endpoints"), elements.into());
        let rules: Vec<_> =
            socket.dump_rules(TABLE, None).unwrap().into_iter().map(|rule| rule.exprs).collect();
        assert_eq!(rules, [rule.exprs, prefix.exprs]);
        let listing = nft_list();
        for expected in [
            "dnat ip6 to ip6 daddr . meta l4proto . th dport . numgen random mod 2 map @endpoints",
            "fd00::1 . tcp . 80 . 0x00000001 : fd01::2 . 8080",
            "ip6 saddr fd00::/64 reject",
        ] {
            assert!(listing.contains(expected), "missing {expected:?} in\n{listing}");
        }
    });
}

#[test]
fn a_flood_of_refusals() {
    in_namespace(|| {
        let mut socket = Socket::new().unwrap();
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        for i in 0..100_000 {
            batch.delete_chain(TABLE, &format!("chain-{i}"));
        }
        let error = socket.commit(&batch).unwrap_err();
        let refusal = error.first().unwrap();
        assert_eq!((refusal.index, refusal.errno), (Some(1), 2));
        assert_eq!(refusal.description, "delete chain ip shop chain-0");
        println!("{error}");
        // The socket is not confused by answers left over.
        assert_eq!(socket.dump_tables(Family::Ip).unwrap(), []);
        let mut batch = Batch::new();
        batch.add_table(TABLE, None);
        socket.commit(&batch).unwrap();
        socket.generation().unwrap();
    });
}

#[test]
fn a_hundred_thousand_elements() {
    in_namespace(|| {
        const COUNT: u32 = 100_000;
        let mut socket = Socket::new().unwrap();
        let map = |size| {
            let mut key = SERVICE.to_vec();
            key.push(FieldType::Mark);
            Set {
                size,
                ..Set::map(
                    "endpoints",
                    key,
                    MapData::Fields(vec![FieldType::Ipv4Addr, FieldType::InetService]),
                )
            }
        };
        let element = |i: u32| {
            let address = Ipv4Addr::from(0x0a00_0000 + i / 10).octets();
            Element::value(
                key4(address, 6, 80, i % 10),
                endpoint(Ipv4Addr::from(0x0b00_0000 + i).octets(), 8080),
            )
        };
        for size in [Some(COUNT), None] {
            let start = Instant::now();
            let mut batch = Batch::new();
            batch.add_table(TABLE, None);
            batch.delete_table(TABLE);
            batch.add_table(TABLE, None);
            batch.add_set(TABLE, &map(size));
            batch.add_elements(TABLE, "endpoints", (0..COUNT).map(element));
            let encoded = start.elapsed();
            let start = Instant::now();
            socket.commit(&batch).unwrap();
            let committed = start.elapsed();
            let start = Instant::now();
            let mut seen = 0;
            socket
                .dump_elements(TABLE, "endpoints", |element| seen += u32::from(element.data.is_some()))
                .unwrap();
            assert_eq!(seen, COUNT);
            println!(
                "{COUNT} elements, declared size {size:?}: {} bytes, encoded in {encoded:?}, committed in \
                 {committed:?}, dumped in {:?}",
                batch.as_bytes().len(),
                start.elapsed()
            );
        }
        let expected: BTreeSet<_> = (0..COUNT).map(element).collect();
        assert_eq!(dump(&mut socket, TABLE, "endpoints"), expected);

        let changes = 1000;
        let start = Instant::now();
        for i in 0..changes {
            let changed = Element::value(element(i).key, endpoint([1, 2, 3, 4], i as u16));
            let mut batch = Batch::new();
            batch.delete_elements(TABLE, "endpoints", [&changed]);
            batch.add_elements(TABLE, "endpoints", [&changed]);
            socket.commit(&batch).unwrap();
        }
        println!("one of them replaced in {:?}", start.elapsed() / changes);
    });
}
