//! Random clusters out of small pools, so that things meet: the same addresses, ports and names come up
//! again and again in different roles.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice, Hints};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, LocalDetector, Node, NodePortAddresses};
use shunt_core::service::{Algorithm, Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::ForwardingTable;
use shunt_core::walk::Packet;

/// Something that happens to a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// An object comes, changes or goes.
    Event(Event),
    /// The proxy gets other settings.
    Config(Config),
    /// The node gets other addresses on its interfaces.
    Interfaces(BTreeSet<IpAddr>),
}

/// The node on which the proxy runs.
pub const NODE: &str = "test-node";

/// Addresses that have a meaning in some random cluster, IPv4 then IPv6.
const ADDRESSES: [&[&str]; 2] = [
    &[
        "172.30.0.1",
        "172.30.0.2",
        "172.30.0.3",
        "192.168.99.11",
        "192.168.99.22",
        "1.2.3.4",
        "1.2.3.5",
        "192.168.0.2",
        "192.168.1.2",
        "10.180.0.1",
        "10.180.0.2",
        "10.180.1.1",
        "10.180.1.2",
        "203.0.113.2",
        "203.0.113.130",
        "172.30.9.9",
        "127.0.0.1",
    ],
    &[
        "fd00:172:30::1",
        "fd00:172:30::2",
        "fd00:172:30::3",
        "2001:db8:99::11",
        "2001:db8:99::22",
        "2001:db8:1::4",
        "2001:db8:1::5",
        "2001:db8::2",
        "2001:db8::3",
        "fd00:10::1",
        "fd00:10::2",
        "fd00:10:1::1",
        "fd00:10:1::2",
        "2600::2",
        "2600::8002",
        "fd00:172:30::99",
        "::1",
    ],
];
const CLUSTER_IPS: std::ops::Range<usize> = 0..3;
const EXTERNAL_IPS: std::ops::Range<usize> = 3..6;
const VIPS: std::ops::Range<usize> = 4..7;
const NODE_IPS: std::ops::Range<usize> = 7..9;
const INTERFACE_IPS: std::ops::Range<usize> = 3..4;
// A pod on the host network has the node's address.
const ENDPOINTS: std::ops::Range<usize> = 8..13;

fn addresses(range: std::ops::Range<usize>) -> Vec<IpAddr> {
    ADDRESSES.iter().flat_map(|of_family| &of_family[range.clone()]).map(|a| a.parse().unwrap()).collect()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn some_of<T: Clone + std::fmt::Debug + 'static>(all: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    let most = all.len().min(3);
    subsequence(all, 0..=most)
}

fn name(kind: &'static str, count: u32) -> impl Strategy<Value = NamespacedName> {
    (0..count).prop_map(move |n| NamespacedName::new("ns", format!("{kind}{n}")))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![6 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)]
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local])
}

fn port_name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![3 => Just(Arc::from("a")), 1 => Just(Arc::from("b"))]
}

fn service() -> impl Strategy<Value = Service> {
    let port = (port_name(), protocol(), select(vec![80_u16, 53]), option::of(select(vec![3001_u16, 3002])))
        .prop_map(|(name, protocol, port, node_port)| ServicePort { name, protocol, port, node_port });
    let cluster_ips =
        (option::weighted(0.9, CLUSTER_IPS), option::weighted(0.6, CLUSTER_IPS)).prop_map(|(v4, v6)| {
            [v4, v6]
                .iter()
                .zip(ADDRESSES)
                .filter_map(|(index, pool)| Some(pool[(*index)?].parse().unwrap()))
                .collect::<Vec<IpAddr>>()
        });
    let ranges = nets(&[
        "203.0.113.0/25",
        "203.0.113.128/25",
        "203.0.113.2/32",
        "10.0.0.0/8",
        "192.168.0.0/24",
        "1.2.3.4/30",
        "2600::/120",
        "2001:db8::/64",
        "0.0.0.0/0",
        "::/0",
    ]);
    (
        (name("svc", 4), 0..3_i64, cluster_ips),
        (some_of(addresses(EXTERNAL_IPS)), some_of(addresses(VIPS))),
        prop_oneof![2 => Just(Vec::new()), 1 => some_of(ranges)],
        // The API server lets no name appear twice.
        vec(port, 1..3).prop_map(|mut ports| {
            let mut seen = BTreeSet::new();
            ports.retain(|p| seen.insert((p.name.clone(), p.protocol)));
            ports
        }),
        (policy(), policy(), option::weighted(0.5, select(vec![10_u64, 10_800])), algorithm()),
    )
        .prop_map(
            |(
                (name, created, cluster_ips),
                (external_ips, load_balancer_ips),
                source_ranges,
                ports,
                rest,
            )| {
                let (internal_policy, external_policy, affinity, algorithm) = rest;
                Service {
                    name,
                    created,
                    cluster_ips,
                    external_ips,
                    load_balancer_ips,
                    source_ranges,
                    ports,
                    internal_policy,
                    external_policy,
                    affinity: affinity.map(Duration::from_secs),
                    scheduler: None,
                    algorithm,
                    health_check_node_port: None,
                }
            },
        )
}

fn algorithm() -> impl Strategy<Value = Option<Algorithm>> {
    select(vec![None, Some(Algorithm::Random), Some(Algorithm::Maglev)])
}

fn hints() -> impl Strategy<Value = Option<Arc<Hints>>> {
    let zones = some_of(vec![Arc::from("zone-a"), Arc::from("zone-b")]);
    let nodes = some_of(vec![Arc::from(NODE), Arc::from("other-node")]);
    option::weighted(0.3, (zones, nodes).prop_map(|(zones, nodes)| Arc::new(Hints { zones, nodes })))
}

fn endpoint(family: IpFamily) -> impl Strategy<Value = Endpoint> {
    let conditions = prop_oneof![
        4 => Just(Conditions::default()),
        1 => (any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(ready, serving, terminating)| Conditions { ready, serving, terminating }),
    ];
    let node = select(vec![None, Some(Arc::from(NODE)), Some(Arc::from("other-node"))]);
    (ENDPOINTS, conditions, node, hints()).prop_map(move |(index, conditions, node, hints)| Endpoint {
        address: ADDRESSES[family as usize][index].parse().unwrap(),
        conditions,
        node,
        zone: None,
        hints,
        pod: None,
    })
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    select(IpFamily::ALL.to_vec()).prop_flat_map(|family| {
        let port = (port_name(), protocol(), select(vec![80_u16, 8080]))
            .prop_map(|(name, protocol, port)| EndpointPort { name, protocol, port });
        (name("slice", 12), name("svc", 4), vec(port, 2..5), vec(endpoint(family), 0..5)).prop_map(
            move |(name, service, ports, endpoints)| EndpointSlice {
                name,
                service,
                family,
                ports,
                endpoints,
                last_change_trigger: None,
            },
        )
    })
}

fn node() -> impl Strategy<Value = Node> {
    let zone = select(vec![None, Some(Arc::from("zone-a")), Some(Arc::from("zone-b"))]);
    (zone, some_of(addresses(NODE_IPS)).prop_shuffle(), any::<bool>()).prop_map(
        |(zone, addresses, eligible)| Node {
            name: NODE.into(),
            zone,
            addresses,
            pod_cidrs: Vec::new(),
            eligible,
        },
    )
}

fn config() -> impl Strategy<Value = Config> {
    let detector = prop_oneof![
        Just(LocalDetector::None),
        Just(LocalDetector::Cidr(nets(&["10.180.0.0/24"]))),
        Just(LocalDetector::Cidr(nets(&["10.0.0.0/8", "fd00:10::/64"]))),
        Just(LocalDetector::BridgeInterface("cni0".into())),
        Just(LocalDetector::InterfaceNamePrefix("veth".into())),
    ];
    let node_ports = prop_oneof![
        2 => Just(NodePortAddresses::Primary),
        1 => Just(NodePortAddresses::All),
        1 => Just(NodePortAddresses::Ranges(nets(&["192.168.0.0/24"]))),
        1 => Just(NodePortAddresses::Ranges(nets(&["192.168.0.0/16", "2001:db8::/64"]))),
        1 => Just(NodePortAddresses::Ranges(nets(&["10.0.0.0/8", "::/0"]))),
        1 => Just(NodePortAddresses::PrimaryAnd(nets(&["192.168.0.0/16"]))),
    ];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (flags, select(vec![14_u8, 5]), detector, node_ports, algorithm()).prop_map(
        |(flags, masquerade_bit, local_detector, node_port_addresses, algorithm)| {
            let (masquerade_all, external_ips, keep_listed) = flags;
            Config {
                masquerade_all,
                masquerade_bit,
                local_detector,
                node_port_addresses,
                allow_external_ips: external_ips,
                scheduler: None,
                external_algorithm: algorithm.unwrap_or_default(),
                localhost_node_ports: false,
                drop_invalid: false,
                keep_listed,
            }
        },
    )
}

/// A node with random settings.
pub fn context() -> impl Strategy<Value = Context> {
    config().prop_map(|config| Context::new(NODE, config))
}

/// Something random that happens.
pub fn step() -> impl Strategy<Value = Step> {
    let cidrs = some_of(nets(&["172.30.0.0/16", "172.30.0.0/24", "fd00:172:30::/112", "1.2.3.0/24"]));
    let cidr = || (0..2_u32).prop_map(|n| Arc::from(format!("cidr{n}")));
    prop_oneof![
        8 => service().prop_map(|s| Step::Event(Event::Service(s))),
        24 => slice().prop_map(|s| Step::Event(Event::Slice(s))),
        2 => name("svc", 4).prop_map(|n| Step::Event(Event::ServiceGone(n))),
        4 => name("slice", 12).prop_map(|n| Step::Event(Event::SliceGone(n))),
        3 => node().prop_map(|n| Step::Event(Event::Node(n))),
        1 => Just(Step::Event(Event::NodeGone)),
        1 => (cidr(), cidrs).prop_map(|(n, ranges)| Step::Event(Event::ServiceCidr(n, ranges))),
        1 => cidr().prop_map(|n| Step::Event(Event::ServiceCidrGone(n))),
        1 => config().prop_map(Step::Config),
        1 => btree_set(select(addresses(INTERFACE_IPS)), 0..2).prop_map(Step::Interfaces),
    ]
}

/// Random steps: a cluster, when taken one after the other.
pub fn steps(count: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = Vec<Step>> {
    vec(step(), count)
}

/// A random packet; the second number says at which of a table's frontends it is aimed, if at any.
fn packet() -> impl Strategy<Value = (Packet, Option<usize>)> {
    let address = || 0..ADDRESSES[0].len();
    let interface = select(vec![None, Some("cni0"), Some("veth12"), Some("eth0")]);
    let port = select(vec![80_u16, 53, 3001, 3002, 8080, 9]);
    let aim = option::weighted(0.6, 0..1000_usize);
    (select(vec![0_usize, 0, 1]), address(), address(), port, protocol(), interface, aim).prop_map(
        |(family, source, destination, port, protocol, interface, aim)| {
            let packet = Packet {
                source: ADDRESSES[family][source].parse().unwrap(),
                interface: interface.map(str::to_owned),
                destination: ADDRESSES[family][destination].parse().unwrap(),
                port,
                protocol,
            };
            (packet, aim)
        },
    )
}

/// Random packets that know what is worth being asked for once they see a table.
#[derive(Clone, Debug)]
pub struct Packets(Vec<(Packet, Option<usize>)>);

impl Packets {
    /// The packets of the table's family, some of them aimed at the table's frontends.
    pub fn aimed(&self, table: &ForwardingTable) -> Vec<Packet> {
        let frontends: Vec<_> = table.frontends().map(|(_, entry)| entry.frontend).collect();
        let of_family = self.0.iter().filter(|(p, _)| IpFamily::of(p.source) == table.family());
        of_family
            .map(|(packet, aim)| {
                let at = aim.and_then(|n| frontends.get(n.checked_rem(frontends.len())?));
                match at {
                    None => packet.clone(),
                    Some(at) => Packet {
                        destination: at.address.unwrap_or_else(|| {
                            ADDRESSES[table.family() as usize][NODE_IPS.start].parse().unwrap()
                        }),
                        port: at.port,
                        protocol: at.protocol,
                        ..packet.clone()
                    },
                }
            })
            .collect()
    }
}

/// Random packets.
pub fn packets(count: usize) -> impl Strategy<Value = Packets> {
    vec(packet(), count).prop_map(Packets)
}
