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

mod class;
mod key;

use std::fmt;

use nft_netlink::{BaseChain, ChainType, FieldType, Hook, MapData, Set, SetFlags};
use shunt_core::id::IpFamily;

use crate::affinity;

pub use class::{Class, LIST_MAX, Leg, List, SECOND_LIST_BASE, uses};
pub use key::{Endpoint, Key, KeyReader, endpoint_data, frontend_key, hairpin_key, slot_key};

/// Name of our tables, one in family `ip` and one in `ip6`.
pub const TABLE: &str = "shunt";
/// Comment of our tables.
pub const TABLE_COMMENT: &str = "Kubernetes Services, written by shunt";

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_found_by_name() {
        for set in SetKey::all(SERVICES_CAPACITY, 262_144).into_iter().chain(SetKey::AFFINITY) {
            assert_eq!(SetKey::from_name(&set.to_string()), Some(set));
        }
        assert_eq!(SetKey::from_name("mine"), None);
    }
}
