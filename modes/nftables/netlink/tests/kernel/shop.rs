//! A table that uses everything there is: sets, chains, and rules with every expression.

use std::net::Ipv6Addr;
use std::time::Duration;

use nft_netlink::*;

pub(crate) const TABLE: TableId<'static> = TableId::new(Family::Ip, "shop");

pub(crate) fn r(index: u8) -> Register {
    Register::new(index).unwrap()
}

pub(crate) fn lookup(set: &str, sreg: u8, dreg: u8) -> Expr {
    Expr::Lookup { set: set.into(), sreg: r(sreg), dreg: Some(r(dreg)), invert: false }
}

pub(crate) fn meta(key: MetaKey, dreg: u8) -> Expr {
    Expr::Meta { key, dreg: r(dreg) }
}

pub(crate) fn payload(base: PayloadBase, offset: u32, len: u32, dreg: u8) -> Expr {
    Expr::Payload { base, offset, len, dreg: r(dreg) }
}

pub(crate) fn cmp(sreg: u8, data: impl Into<Bytes>) -> Expr {
    Expr::Cmp { op: CmpOp::Eq, sreg: r(sreg), data: data.into() }
}

/// `ip daddr . meta l4proto . th dport` into the first three registers.
pub(crate) fn service_key() -> Vec<Expr> {
    vec![
        payload(PayloadBase::Network, 16, 4, 0),
        meta(MetaKey::L4Proto, 1),
        payload(PayloadBase::Transport, 2, 2, 2),
    ]
}

pub(crate) fn dnat(addr: u8, port: u8) -> Expr {
    Expr::Nat {
        kind: NatKind::Dnat,
        family: Family::Ip,
        addr: r(addr),
        port: Some(r(port)),
        flags: NatFlags::default(),
    }
}

pub(crate) fn key3(address: [u8; 4], protocol: u8, port: u16) -> Bytes {
    Bytes::concat([&address[..], &[protocol], &port.to_be_bytes()])
}

pub(crate) fn key4(address: [u8; 4], protocol: u8, port: u16, index: u32) -> Bytes {
    let mut key = key3(address, protocol, port);
    key.push_field(&index.to_ne_bytes());
    key
}

pub(crate) fn endpoint(address: [u8; 4], port: u16) -> Bytes {
    Bytes::concat([&address[..], &port.to_be_bytes()])
}

pub(crate) fn number(n: u32) -> Bytes {
    n.to_ne_bytes().into()
}

pub(crate) const SERVICE: [FieldType; 3] =
    [FieldType::Ipv4Addr, FieldType::InetProto, FieldType::InetService];

pub(crate) fn sets() -> Vec<Set> {
    use FieldType::{ClassId, InetService, Ipv4Addr, Mark};
    let with = |flags, set: Set| Set { flags, ..set };
    let mut endpoint_key = SERVICE.to_vec();
    endpoint_key.push(Mark);
    vec![
        Set { comment: Some("every address".into()), ..Set::new("cluster-ips", vec![Ipv4Addr]) },
        Set { size: Some(1000), ..Set::map("services", SERVICE.to_vec(), MapData::Fields(vec![ClassId])) },
        Set::map("classes", vec![ClassId], MapData::Verdict),
        Set {
            size: Some(10_000),
            ..Set::map("endpoints", endpoint_key, MapData::Fields(vec![Ipv4Addr, InetService]))
        },
        Set::map("actions", SERVICE.to_vec(), MapData::Verdict),
        with(SetFlags::INTERVAL, Set::new("nets", vec![Ipv4Addr])),
        with(SetFlags::INTERVAL, Set::map("net-ports", vec![Ipv4Addr, InetService], MapData::Verdict)),
        Set {
            timeout: Some(Duration::from_hours(3)),
            size: Some(30_000),
            ..with(
                SetFlags::TIMEOUT | SetFlags::DYNAMIC,
                Set::map("affinity", vec![Ipv4Addr, Ipv4Addr], MapData::Fields(vec![Ipv4Addr, InetService])),
            )
        },
        Set {
            size: Some(30_000),
            ..with(SetFlags::TIMEOUT | SetFlags::DYNAMIC, Set::new("seen", vec![Ipv4Addr]))
        },
        with(SetFlags::CONSTANT, Set::new("constant", vec![InetService])),
        Set::new("interfaces", vec![FieldType::IfName]),
        Set::new("six", vec![FieldType::Ipv6Addr]),
    ]
}

pub(crate) fn elements() -> Vec<(&'static str, Vec<Element>)> {
    let range =
        |from: [u8; 4], to: [u8; 4]| [Element::new(from), Element { interval_end: true, ..Element::new(to) }];
    vec![
        ("cluster-ips", vec![Element::new([10, 0, 0, 1]), Element::new([10, 0, 0, 10])]),
        ("services", vec![Element::value(key3([10, 0, 0, 1], 6, 80), number(3))]),
        (
            "classes",
            vec![
                Element::verdict(number(3), Verdict::Goto("dispatch-3".into())),
                Element::verdict(number(9), Verdict::Jump("all".into())),
            ],
        ),
        (
            "endpoints",
            (0..3)
                .map(|i| {
                    Element::value(key4([10, 0, 0, 1], 6, 80, i), endpoint([192, 168, 0, i as u8], 8080))
                })
                .collect(),
        ),
        (
            "actions",
            vec![
                Element::verdict(key3([10, 0, 0, 2], 17, 53), Verdict::Drop),
                Element::verdict(key3([10, 0, 0, 3], 17, 53), Verdict::Accept),
                Element::verdict(key3([10, 0, 0, 4], 17, 53), Verdict::Return),
                Element::verdict(key3([10, 0, 0, 5], 17, 53), Verdict::Continue),
            ],
        ),
        ("nets", [range([10, 1, 0, 0], [10, 2, 0, 0]), range([10, 4, 0, 0], [10, 5, 0, 0])].concat()),
        (
            "net-ports",
            vec![Element {
                key_end: Some(Bytes::concat([&[10, 1, 255, 255][..], &[0, 90]])),
                ..Element::verdict(Bytes::concat([&[10, 1, 0, 0][..], &[0, 80]]), Verdict::Drop)
            }],
        ),
        ("seen", vec![Element { timeout: Some(Duration::from_mins(1)), ..Element::new([10, 9, 0, 1]) }]),
        ("constant", vec![Element::new(443_u16.to_be_bytes())]),
        ("interfaces", vec![Element::new(*b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0")]),
        ("six", vec![Element::new("fd00::1".parse::<Ipv6Addr>().unwrap().octets())]),
    ]
}

pub(crate) fn chains() -> Vec<Chain> {
    vec![
        Chain::base("nat-prerouting", ChainType::Nat, Hook::Prerouting, -100),
        Chain::base("nat-output", ChainType::Nat, Hook::Output, -100),
        Chain::base("nat-postrouting", ChainType::Nat, Hook::Postrouting, 100),
        Chain::base("filter-forward", ChainType::Filter, Hook::Forward, -110),
        Chain::base("filter-input", ChainType::Filter, Hook::Input, 0),
        Chain::base("route-output", ChainType::Route, Hook::Output, -150),
        Chain::regular("dispatch-3"),
        Chain::regular("all"),
        Chain::regular("refuse"),
    ]
}

pub(crate) fn chain(name: &str, rules: Vec<Vec<Expr>>) -> Vec<Rule> {
    rules.into_iter().map(|exprs| Rule::new(name, exprs)).collect()
}

/// Rules that together use every expression.
pub(crate) fn rules() -> Vec<Rule> {
    let verdict = Expr::ImmediateVerdict;
    let mut dispatch = service_key();
    dispatch.extend([
        Expr::Numgen { dreg: r(3), modulus: 3, offset: 0, random: true },
        lookup("endpoints", 0, 0),
        dnat(0, 1),
    ]);
    let mut by_class = service_key();
    by_class.extend([
        lookup("services", 0, 0),
        Expr::MetaSet { key: MetaKey::Priority, sreg: r(0) },
        meta(MetaKey::Priority, 0),
        Expr::VerdictMap { set: "classes".into(), sreg: r(0) },
    ]);
    let mut by_verdict = service_key();
    by_verdict.push(Expr::VerdictMap { set: "actions".into(), sreg: r(0) });
    let saddr = |dreg| payload(PayloadBase::Network, 12, 4, dreg);
    let daddr = |dreg| payload(PayloadBase::Network, 16, 4, dreg);
    let masked = |mask: u32| Expr::Bitwise { sreg: r(0), dreg: r(0), mask: number(mask), xor: number(0) };

    let mut rules = chain("dispatch-3", vec![dispatch]);
    rules.extend(chain(
        "nat-prerouting",
        vec![
            by_class,
            by_verdict,
            vec![
                daddr(0),
                Expr::Lookup { set: "cluster-ips".into(), sreg: r(0), dreg: None, invert: false },
                Expr::Reject(RejectKind::IcmpUnreach(3)),
            ],
            vec![saddr(0), daddr(1), lookup("affinity", 0, 0), dnat(0, 1)],
        ],
    ));
    rules.extend(chain("nat-output", vec![vec![verdict(Verdict::Jump("all".into()))]]));
    rules.extend(chain(
        "nat-postrouting",
        vec![
            vec![
                meta(MetaKey::Mark, 0),
                masked(0x4000),
                cmp(0, number(0x4000)),
                Expr::Masquerade { flags: NatFlags::FULLY_RANDOM },
            ],
            vec![
                Expr::Counter(CounterValue { packets: 7, bytes: 700 }),
                Expr::Masquerade { flags: NatFlags::default() },
            ],
            vec![
                Expr::Immediate { dreg: r(0), data: [192, 0, 2, 1].into() },
                Expr::Nat {
                    kind: NatKind::Snat,
                    family: Family::Ip,
                    addr: r(0),
                    port: None,
                    flags: NatFlags::RANDOM | NatFlags::PERSISTENT,
                },
            ],
        ],
    ));
    rules.extend(chain(
        "filter-forward",
        vec![
            vec![
                Expr::Ct { key: CtKey::State, direction: None, dreg: r(0) },
                masked(1),
                Expr::Cmp { op: CmpOp::Neq, sreg: r(0), data: number(0) },
                verdict(Verdict::Drop),
            ],
            vec![
                Expr::Ct { key: CtKey::Status, direction: None, dreg: r(0) },
                masked(32),
                Expr::Cmp { op: CmpOp::Neq, sreg: r(0), data: number(0) },
                Expr::Ct { key: CtKey::ProtoDst, direction: Some(CtDirection::Original), dreg: r(4) },
                cmp(4, 80_u16.to_be_bytes()),
                Expr::Ct { key: CtKey::DstIp, direction: Some(CtDirection::Original), dreg: r(8) },
                cmp(8, [10, 0, 0, 1]),
                verdict(Verdict::Accept),
            ],
            vec![meta(MetaKey::L4Proto, 0), cmp(0, [6]), Expr::Reject(RejectKind::TcpReset)],
            vec![
                Expr::Fib { result: FibResult::AddrType, flags: FibFlags::SADDR, dreg: r(0) },
                cmp(0, number(2)),
                Expr::Immediate { dreg: r(0), data: number(0x8000) },
                Expr::CtSet { key: CtKey::Mark, sreg: r(0) },
                verdict(Verdict::Return),
            ],
            vec![
                saddr(0),
                Expr::Lookup { set: "nets".into(), sreg: r(0), dreg: None, invert: true },
                verdict(Verdict::Goto("refuse".into())),
            ],
            vec![
                saddr(0),
                payload(PayloadBase::Transport, 2, 2, 1),
                Expr::VerdictMap { set: "net-ports".into(), sreg: r(0) },
            ],
            vec![
                saddr(0),
                Expr::Dynset { set: "seen".into(), op: DynsetOp::Add, key: r(0), data: None, timeout: None },
            ],
            vec![
                saddr(0),
                Expr::Dynset {
                    set: "seen".into(),
                    op: DynsetOp::Delete,
                    key: r(0),
                    data: None,
                    timeout: None,
                },
            ],
        ],
    ));
    rules.extend(chain(
        "all",
        vec![
            vec![
                saddr(0),
                daddr(1),
                Expr::Immediate { dreg: r(4), data: [192, 168, 0, 1].into() },
                Expr::Immediate { dreg: r(5), data: 8080_u16.to_be_bytes().into() },
                Expr::Dynset {
                    set: "affinity".into(),
                    op: DynsetOp::Update,
                    key: r(0),
                    data: Some(r(4)),
                    timeout: Some(Duration::from_mins(1)),
                },
            ],
            vec![
                meta(MetaKey::IifName, 0),
                cmp(0, *b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
                Expr::Immediate { dreg: r(0), data: number(1) },
                Expr::MetaSet { key: MetaKey::Mark, sreg: r(0) },
            ],
            vec![
                meta(MetaKey::Mark, 0),
                Expr::Byteorder { sreg: r(0), dreg: r(0), op: ByteorderOp::Hton, len: 4, size: 4 },
                Expr::Cmp { op: CmpOp::Lt, sreg: r(0), data: 16_u32.to_be_bytes().into() },
                verdict(Verdict::Continue),
            ],
            vec![
                Expr::Immediate { dreg: r(0), data: [1].into() },
                Expr::MetaSet { key: MetaKey::NfTrace, sreg: r(0) },
            ],
        ],
    ));
    rules.push(
        Rule::new("refuse", vec![Expr::Reject(RejectKind::IcmpUnreach(1))]).with_comment("says the owner"),
    );
    rules
}

pub(crate) fn everything() -> Batch {
    let mut batch = Batch::new();
    batch.add_table(TABLE, Some("a table"));
    for chain in chains() {
        batch.add_chain(TABLE, &chain);
    }
    for set in sets() {
        batch.add_set(TABLE, &set);
    }
    for (set, elements) in elements() {
        batch.add_elements(TABLE, set, elements);
    }
    for rule in rules() {
        batch.add_rule(TABLE, &rule);
    }
    batch
}
