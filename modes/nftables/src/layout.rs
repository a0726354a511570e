//! Names, sets and keys: how the forwarding table lies in nftables.
//!
//! ```text
//!   services   : address . protocol . port          -> class       what to do for this frontend
//!   classes    : class                              -> goto chain  a few, shared by all Services
//!   endpoints  : address . protocol . port . slot   -> address . port
//! ```
//!
//! A class says how many endpoints there are and what happens to packets of each class of source.
//! It is data, not a verdict, because the kernel looks again at every element of every verdict map
//! of the table when one of them gains an element (`nft_table_validate`), which would make a change
//! cost what the cluster costs. The class passes from the first lookup to the second through
//! `meta priority`, because nft 1.0 and 1.1 abort on listing two lookups that are chained directly.
//! The priority is reset before the packet leaves; forwarding overwrites it anyway (`ip_forward`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nft_netlink::{BaseChain, Bytes, ChainType, FieldType, Hook, MapData, Set, SetFlags};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::{Frontend, LocalEndpoint};

use crate::affinity;

/// Name of our tables, one in family `ip` and one in `ip6`.
pub const TABLE: &str = "shunt";
/// Comment of our tables.
pub const TABLE_COMMENT: &str = "Kubernetes Services, written by shunt";

/// First slot of the endpoints of the second list (see [`List`]).
pub const SECOND_LIST_BASE: u32 = 1 << 20;
/// Most endpoints that one list can hold.
pub const LIST_MAX: usize = SECOND_LIST_BASE as usize - 1;

/// Which list of endpoints of a frontend: a class may choose from two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum List {
    /// The list that all frontends have.
    First,
    /// The node's own endpoints, where outsiders get only those.
    Second,
}

impl List {
    /// Both lists.
    pub const ALL: [Self; 2] = [Self::First, Self::Second];

    /// The slot number of the first endpoint of this list.
    pub const fn base(self) -> u32 {
        match self {
            Self::First => 0,
            Self::Second => SECOND_LIST_BASE,
        }
    }
}

/// What happens to packets of one class of source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Leg {
    /// Discarded.
    Drop,
    /// Sent to an endpoint of a list.
    Pick {
        /// The list.
        list: List,
        /// Whether the source is rewritten.
        masquerade: bool,
    },
}

impl Leg {
    const fn code(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Pick { list, masquerade } => 1 + 2 * (list as u32) + masquerade as u32,
        }
    }

    const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Drop,
            _ => Self::Pick {
                list: if code > 2 { List::Second } else { List::First },
                masquerade: code.is_multiple_of(2),
            },
        }
    }
}

/// What to do for a frontend, as one number that many frontends share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// Refuse.
    Reject,
    /// Discard.
    Drop,
    /// Choose an endpoint.
    Pick {
        /// Whether the frontend is a node port, keyed without an address.
        node_port: bool,
        /// What happens to packets from local pods, from this node, and from elsewhere.
        legs: [Leg; 3],
        /// Endpoints in each list; 0 for a list that no leg uses.
        counts: [u32; 2],
    },
    /// Send each client to the endpoint that it was sent to before. The first list is that of the
    /// Cluster policy, the second that of the Local policy.
    Affinity {
        /// The Service port.
        id: u32,
        /// What happens to packets from local pods, from this node, and from elsewhere.
        legs: [Leg; 3],
    },
}

const REJECT: u32 = 0x0100_0000;
const DROP: u32 = 0x0200_0000;
const FIRST_PICK: u32 = 0x03;
const LEG_CODES: u32 = 5 * 5 * 5;
const AFFINITY: u32 = 0xfd;

const fn code_of(legs: [Leg; 3]) -> u32 {
    legs[0].code() * 25 + legs[1].code() * 5 + legs[2].code()
}

const fn legs_of(code: u32) -> [Leg; 3] {
    [Leg::from_code(code / 25), Leg::from_code(code / 5 % 5), Leg::from_code(code % 5)]
}

impl Class {
    /// Most endpoints of each list where a class uses both.
    pub const SPLIT_MAX: usize = 0xfff;

    /// The number that stands for the class in the kernel.
    ///
    /// Shape: 8 bits of kind, then 24 bits of count, or 12 and 12 where both lists are used, or 17 bits
    /// of id and 7 bits of legs.
    pub const fn number(self) -> u32 {
        match self {
            Self::Reject => REJECT,
            Self::Drop => DROP,
            Self::Pick { node_port, legs, counts } => {
                let kind = FIRST_PICK + code_of(legs) + if node_port { LEG_CODES } else { 0 };
                let counts = if counts[1] == 0 { counts[0] } else { (counts[0] << 12) | (counts[1] & 0xfff) };
                (kind << 24) | (counts & 0x00ff_ffff)
            }
            Self::Affinity { id, legs } => (AFFINITY << 24) | ((id << 7) & 0x00ff_ff80) | code_of(legs),
        }
    }

    /// The class with this number; `None` if we never write such a number.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            REJECT => return Some(Self::Reject),
            DROP => return Some(Self::Drop),
            _ => {}
        }
        let kind = number >> 24;
        if kind == AFFINITY {
            let (id, code) = ((number >> 7) & 0x1_ffff, number & 0x7f);
            return if id != 0 && code < LEG_CODES {
                Some(Self::Affinity { id, legs: legs_of(code) })
            } else {
                None
            };
        }
        if kind < FIRST_PICK || kind >= FIRST_PICK + 2 * LEG_CODES {
            return None;
        }
        let node_port = kind - FIRST_PICK >= LEG_CODES;
        let legs = legs_of((kind - FIRST_PICK) % LEG_CODES);
        let second = uses(legs, List::Second);
        let low = number & 0x00ff_ffff;
        let counts = if second { [low >> 12, low & 0xfff] } else { [low, 0] };
        let class = Self::Pick { node_port, legs, counts };
        if class.number() == number { Some(class) } else { None }
    }

    /// How many endpoints of a list the class chooses from.
    pub const fn count(self, list: List) -> u32 {
        match self {
            Self::Reject | Self::Drop | Self::Affinity { .. } => 0,
            Self::Pick { counts, .. } => counts[list as usize],
        }
    }

    /// Classes of an id, from the first to the last that there may be.
    pub fn of_id(id: u32) -> std::ops::RangeInclusive<Self> {
        let last = Leg::Pick { list: List::Second, masquerade: true };
        Self::Affinity { id, legs: [Leg::Drop; 3] }..=Self::Affinity { id, legs: [last; 3] }
    }

    /// The chain that does it; `None` for [`Class::Drop`], which is a verdict of its own.
    pub fn chain(self) -> Option<ChainKey> {
        match self {
            Self::Reject => Some(ChainKey::Reject),
            Self::Drop => None,
            Self::Pick { node_port, legs, counts } => {
                let plain = Leg::Pick { list: List::First, masquerade: false };
                Some(if legs == [plain; 3] {
                    ChainKey::Pick { node_port, list: List::First, count: counts[0] }
                } else {
                    ChainKey::Class(self)
                })
            }
            Self::Affinity { id, legs } => {
                let plain = |list| [Leg::Pick { list, masquerade: false }; 3];
                let list = List::ALL.into_iter().find(|list| legs == plain(*list));
                Some(list.map_or(ChainKey::Class(self), |list| ChainKey::Affinity { id, list }))
            }
        }
    }
}

/// Whether some leg chooses from `list`.
pub const fn uses(legs: [Leg; 3], list: List) -> bool {
    let mut i = 0;
    while i < 3 {
        if let Leg::Pick { list: of, .. } = legs[i]
            && of as u8 == list as u8
        {
            return true;
        }
        i += 1;
    }
    false
}

impl fmt::Display for Class {
    /// As nft prints a `classid`: `major:minor` in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.number();
        write!(f, "{:x}:{:x}", number >> 16, number & 0xffff)
    }
}

/// A chain that classes lead to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ChainKey {
    /// Refuses.
    Reject,
    /// Tells the classes of source apart, marks for masquerade, goes on to a pick chain.
    Class(Class),
    /// Chooses one of `count` endpoints and translates.
    Pick {
        /// Whether the endpoints are those of a node port.
        node_port: bool,
        /// The list of endpoints.
        list: List,
        /// How many there are.
        count: u32,
    },
    /// Sends a client of a Service port where it was sent before, or chooses and remembers.
    Affinity {
        /// The Service port.
        id: u32,
        /// The list of endpoints.
        list: List,
    },
}

impl fmt::Display for ChainKey {
    /// Its name. The chains of a Service port with affinity also carry its name, see
    /// [`State::chain_name`](crate::state::State::chain_name).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = |node_port| if node_port { "node-port-" } else { "" };
        match *self {
            Self::Reject | Self::Class(Class::Reject | Class::Drop) => f.write_str("reject-all"),
            Self::Pick { node_port, list: List::First, count } => {
                write!(f, "{}pick-{count}", prefix(node_port))
            }
            Self::Pick { node_port, list: List::Second, count } => {
                write!(f, "{}pick-here-{count}", prefix(node_port))
            }
            Self::Affinity { id, list } => f.write_str(&affinity::chain_prefix(id, list)),
            Self::Class(class @ Class::Affinity { .. }) => write!(f, "class-{:08x}", class.number()),
            Self::Class(class @ Class::Pick { node_port, legs, counts: [first, second] }) => {
                let prefix = prefix(node_port);
                let pick = |list, masquerade| Leg::Pick { list, masquerade };
                let (plain, snat) = (pick(List::First, false), pick(List::First, true));
                let here = pick(List::Second, false);
                if legs == [snat; 3] {
                    write!(f, "{prefix}snat-{first}")
                } else if legs == [plain, snat, snat] {
                    write!(f, "{prefix}cluster-{first}")
                } else if legs == [plain, snat, here] || legs == [plain, snat, Leg::Drop] {
                    write!(f, "{prefix}local-{first}-{second}")
                } else {
                    write!(f, "class-{:08x}", class.number())
                }
            }
        }
    }
}

/// A fixed chain.
pub const SERVICES_CHAIN: &str = "services";
/// The base chain that masquerades.
pub const POSTROUTING: &str = "nat-postrouting";

/// Our base chains: name, hook, priority. All are of type nat, which sees the first packet of each
/// connection and nothing else.
pub fn base_chains() -> [(&'static str, BaseChain); 3] {
    let nat = |hook, priority| BaseChain { kind: ChainType::Nat, hook, priority };
    [
        ("nat-prerouting", nat(Hook::Prerouting, -100)),
        ("nat-output", nat(Hook::Output, -100)),
        (POSTROUTING, nat(Hook::Postrouting, 100)),
    ]
}

/// The sets of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SetKey {
    /// Frontends with an address, by class. Sized; the number is its capacity.
    Services(u32),
    /// Endpoints of those, by slot. Sized; the number is its capacity.
    Endpoints(u32),
    /// Node ports, by class.
    NodePorts,
    /// Endpoints of those, by slot.
    NodePortEndpoints,
    /// Classes and where they lead.
    Classes,
    /// Addresses on which node ports answer.
    NodePortIps,
    /// All cluster IPs: a port of theirs that no Service has is refused.
    ClusterIps,
    /// Ranges of cluster IPs: an address of theirs that no Service has is dropped.
    ServiceCidrs,
    /// Local endpoints, twice each: traffic from one to itself.
    Hairpin,
    /// Frontends that only some sources may use.
    Guarded,
    /// Which sources those are.
    SourceRanges,
    /// Which endpoint a client of a Service port was sent to. Rules write it; nobody else looks at it.
    Affinity,
    /// What the tokens in it mean.
    AffinityEndpoints,
    /// Endpoints of Service ports with affinity, by slot.
    AffinitySlots,
}

/// How many clients are remembered at most. The kernel takes 65,535 where nothing is said. Its hint for
/// the first size of the hash table has 16 bits: a multiple of 65,536 starts small.
pub const RECORDS_CAPACITY: u32 = 1 << 24;

/// Capacities of the sized sets where they start; they double.
pub const SERVICES_CAPACITY: u32 = 16_384;
/// See [`SERVICES_CAPACITY`].
pub const ENDPOINTS_CAPACITY: u32 = 65_536;

impl fmt::Display for SetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Services(SERVICES_CAPACITY) => f.write_str("services"),
            Self::Services(capacity) => write!(f, "services-{capacity}"),
            Self::Endpoints(ENDPOINTS_CAPACITY) => f.write_str("endpoints"),
            Self::Endpoints(capacity) => write!(f, "endpoints-{capacity}"),
            Self::NodePorts => f.write_str("node-ports"),
            Self::NodePortEndpoints => f.write_str("node-port-endpoints"),
            Self::Classes => f.write_str("classes"),
            Self::NodePortIps => f.write_str("node-port-ips"),
            Self::ClusterIps => f.write_str("cluster-ips"),
            Self::ServiceCidrs => f.write_str("service-cidrs"),
            Self::Hairpin => f.write_str("hairpin"),
            Self::Guarded => f.write_str("guarded"),
            Self::SourceRanges => f.write_str("source-ranges"),
            Self::Affinity => f.write_str("affinity"),
            Self::AffinityEndpoints => f.write_str("affinity-endpoints"),
            Self::AffinitySlots => f.write_str("affinity-slots"),
        }
    }
}

impl SetKey {
    /// The set with this name; `None` if it is none of ours.
    pub fn from_name(name: &str) -> Option<Self> {
        let fixed = [
            Self::Services(SERVICES_CAPACITY),
            Self::Endpoints(ENDPOINTS_CAPACITY),
            Self::NodePorts,
            Self::NodePortEndpoints,
            Self::Classes,
            Self::NodePortIps,
            Self::ClusterIps,
            Self::ServiceCidrs,
            Self::Hairpin,
            Self::Guarded,
            Self::SourceRanges,
            Self::Affinity,
            Self::AffinityEndpoints,
            Self::AffinitySlots,
        ];
        let number = |prefix| name.strip_prefix(prefix).and_then(|n: &str| n.parse().ok());
        fixed
            .into_iter()
            .find(|set| set.to_string() == name)
            .or_else(|| number("services-").map(Self::Services))
            .or_else(|| number("endpoints-").map(Self::Endpoints))
    }

    /// Sets that are there while some Service port has affinity.
    pub const AFFINITY: [Self; 3] = [Self::Affinity, Self::AffinityEndpoints, Self::AffinitySlots];

    /// All sets but those for affinity, given the capacities of the sized ones.
    pub const fn all(services: u32, endpoints: u32) -> [Self; 11] {
        [
            Self::Services(services),
            Self::Endpoints(endpoints),
            Self::NodePorts,
            Self::NodePortEndpoints,
            Self::Classes,
            Self::NodePortIps,
            Self::ClusterIps,
            Self::ServiceCidrs,
            Self::Hairpin,
            Self::Guarded,
            Self::SourceRanges,
        ]
    }

    /// How the set is declared for a family.
    pub fn declaration(self, family: IpFamily) -> Set {
        let address = address_type(family);
        let frontend = vec![address, FieldType::InetProto, FieldType::InetService];
        let with = |mut fields: Vec<FieldType>, last| {
            fields.push(last);
            fields
        };
        let node_port = vec![FieldType::InetProto, FieldType::InetService];
        let class = || MapData::Fields(vec![FieldType::ClassId]);
        let endpoint = || MapData::Fields(vec![address, FieldType::InetService]);
        let name = self.to_string();
        match self {
            Self::Services(capacity) => Set { size: Some(capacity), ..Set::map(name, frontend, class()) },
            Self::Endpoints(capacity) => {
                Set { size: Some(capacity), ..Set::map(name, with(frontend, FieldType::Mark), endpoint()) }
            }
            Self::NodePorts => Set::map(name, node_port, class()),
            Self::NodePortEndpoints => Set::map(name, with(node_port, FieldType::Mark), endpoint()),
            Self::Classes => Set::map(name, vec![FieldType::ClassId], MapData::Verdict),
            Self::NodePortIps | Self::ClusterIps => Set::new(name, vec![address]),
            Self::ServiceCidrs => Set { flags: SetFlags::INTERVAL, ..Set::new(name, vec![address]) },
            Self::Hairpin => {
                Set::new(name, vec![address, address, FieldType::InetProto, FieldType::InetService])
            }
            Self::Guarded => Set::new(name, frontend),
            Self::SourceRanges => {
                Set { flags: SetFlags::INTERVAL, ..Set::new(name, with(frontend, address)) }
            }
            Self::Affinity => Set {
                flags: SetFlags::DYNAMIC | SetFlags::TIMEOUT,
                size: Some(RECORDS_CAPACITY),
                // The other way round nft 1.0.6 cannot read the text of the rules.
                ..Set::map(name, vec![FieldType::ClassId, address], class())
            },
            Self::AffinityEndpoints => Set::map(name, vec![FieldType::ClassId], endpoint()),
            Self::AffinitySlots => Set::map(name, vec![FieldType::ClassId, FieldType::Mark], class()),
        }
    }
}

const fn address_type(family: IpFamily) -> FieldType {
    match family {
        IpFamily::V4 => FieldType::Ipv4Addr,
        IpFamily::V6 => FieldType::Ipv6Addr,
    }
}

/// Bytes of an address.
pub const fn address_len(family: IpFamily) -> usize {
    match family {
        IpFamily::V4 => 4,
        IpFamily::V6 => 16,
    }
}

/// Address and port of an endpoint.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Endpoint {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
}

/// Builds keys and data: fields one after the other, each padded to four bytes.
pub struct Key {
    bytes: [u8; 48],
    len: usize,
}

impl Default for Key {
    fn default() -> Self {
        Self { bytes: [0; 48], len: 0 }
    }
}

impl Key {
    fn field(mut self, field: &[u8]) -> Self {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len().next_multiple_of(4);
        self
    }

    /// An address, 4 or 16 bytes.
    #[must_use]
    pub fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => self.field(&a.octets()),
            IpAddr::V6(a) => self.field(&a.octets()),
        }
    }

    /// A protocol, one byte.
    #[must_use]
    pub fn protocol(self, protocol: Protocol) -> Self {
        self.field(&[protocol.number()])
    }

    /// A port, two bytes in network order.
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    /// A number in host order.
    #[must_use]
    pub fn number(self, number: u32) -> Self {
        self.field(&number.to_ne_bytes())
    }

    /// The finished key.
    pub fn done(self) -> Bytes {
        Bytes::from(&self.bytes[..self.len])
    }
}

/// Key of a frontend in its map of classes.
pub fn frontend_key(frontend: &Frontend) -> Key {
    let key = frontend.address.map_or_else(Key::default, |a| Key::default().address(a));
    key.protocol(frontend.protocol).port(frontend.port)
}

/// Key of an endpoint in its map.
pub fn slot_key(frontend: &Frontend, list: List, index: u32) -> Bytes {
    frontend_key(frontend).number(list.base() + index).done()
}

/// Data of an endpoint in its map.
pub fn endpoint_data(endpoint: &Endpoint) -> Bytes {
    Key::default().address(endpoint.address).port(endpoint.port).done()
}

/// Key of a hairpin.
pub fn hairpin_key(endpoint: &LocalEndpoint) -> Bytes {
    Key::default()
        .address(endpoint.address)
        .address(endpoint.address)
        .protocol(endpoint.protocol)
        .port(endpoint.port)
        .done()
}

/// Reads keys and data back.
pub struct KeyReader<'a>(&'a [u8]);

impl<'a> KeyReader<'a> {
    /// Reads from the start of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn field<const N: usize>(&mut self) -> Option<[u8; N]> {
        let field = self.0.get(..N)?.try_into().ok()?;
        self.0 = self.0.get(N.next_multiple_of(4)..).unwrap_or_default();
        Some(field)
    }

    /// An address of a family.
    pub fn address(&mut self, family: IpFamily) -> Option<IpAddr> {
        match family {
            IpFamily::V4 => self.field::<4>().map(|a| IpAddr::V4(Ipv4Addr::from(a))),
            IpFamily::V6 => self.field::<16>().map(|a| IpAddr::V6(Ipv6Addr::from(a))),
        }
    }

    /// A protocol that Services have.
    pub fn protocol(&mut self) -> Option<Protocol> {
        self.field::<1>().and_then(|[n]| Protocol::from_number(n))
    }

    /// A port.
    pub fn port(&mut self) -> Option<u16> {
        self.field().map(u16::from_be_bytes)
    }

    /// A number in host order.
    pub fn number(&mut self) -> Option<u32> {
        self.field().map(u32::from_ne_bytes)
    }

    /// A frontend; `family` is `None` for node ports, which have no address.
    pub fn frontend(&mut self, family: Option<IpFamily>) -> Option<Frontend> {
        let address = match family {
            Some(family) => Some(self.address(family)?),
            None => None,
        };
        Some(Frontend { address, protocol: self.protocol()?, port: self.port()? })
    }

    /// An endpoint.
    pub fn endpoint(&mut self, family: IpFamily) -> Option<Endpoint> {
        Some(Endpoint { address: self.address(family)?, port: self.port()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legs() -> impl Iterator<Item = Leg> + Clone {
        (0..5).map(Leg::from_code)
    }

    #[test]
    fn every_class_has_a_number_of_its_own_and_comes_back_from_it() {
        let mut seen = std::collections::BTreeMap::new();
        let mut names = std::collections::BTreeMap::new();
        let mut check = |class: Class| {
            assert_eq!(Class::from_number(class.number()), Some(class));
            assert_eq!(seen.insert(class.number(), class), None);
            if let Some(chain) = class.chain()
                && let Some(other) = names.insert(chain.to_string(), class)
            {
                panic!("{class:?} and {other:?} lead to the same chain {chain}");
            }
        };
        check(Class::Reject);
        check(Class::Drop);
        for id in [1, 0x1_ffff] {
            for code in 0..LEG_CODES {
                check(Class::Affinity { id, legs: legs_of(code) });
            }
        }
        for node_port in [false, true] {
            for a in legs() {
                for b in legs() {
                    for c in legs() {
                        let legs = [a, b, c];
                        let first = u32::from(uses(legs, List::First));
                        let second = u32::from(uses(legs, List::Second));
                        for (n, m) in [(7, 3), (4095, 4095), (10, 1)] {
                            if first + second == 0 {
                                continue;
                            }
                            check(Class::Pick { node_port, legs, counts: [n * first, m * second] });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn foreign_numbers_are_no_class() {
        for number in [0, 1, 0x0100_0001, 0xffff_ffff, 0xfd00_0000, 0xfd00_00ff] {
            assert_eq!(Class::from_number(number), None, "{number:x}");
        }
    }

    #[test]
    fn keys_are_read_back() {
        let frontend =
            Frontend { address: Some("2001:db8::1".parse().unwrap()), protocol: Protocol::Udp, port: 53 };
        let key = slot_key(&frontend, List::Second, 4);
        let mut reader = KeyReader::new(&key);
        assert_eq!(reader.frontend(Some(IpFamily::V6)), Some(frontend));
        assert_eq!(reader.number(), Some(SECOND_LIST_BASE + 4));
        assert_eq!(key.len(), 28);
    }

    #[test]
    fn sets_are_found_by_name() {
        for set in SetKey::all(SERVICES_CAPACITY, 262_144).into_iter().chain(SetKey::AFFINITY) {
            assert_eq!(SetKey::from_name(&set.to_string()), Some(set));
        }
        assert_eq!(SetKey::from_name("mine"), None);
    }
}
