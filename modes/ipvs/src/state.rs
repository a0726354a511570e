//! Everything that the mode owns in the kernel, typed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipset_netlink::{Element, Entry, Mark};
use ipvs_netlink::{Destination, Service, ServiceKey};
use shunt_core::id::IpFamily;
use shunt_core::table::Change;

use crate::layout::{LINK, Place, SetName};
use crate::rules::Rules;

/// A virtual server with its destinations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    /// Scheduler, flags and persistence.
    pub service: Service,
    /// Destinations. Those of weight 0 get no new connections: they are drained.
    pub destinations: BTreeMap<SocketAddr, Destination>,
}

impl Server {
    /// Destinations that get new connections.
    pub fn serving(&self) -> impl Iterator<Item = SocketAddr> {
        self.destinations.values().filter(|d| d.weight > 0).map(|d| d.address)
    }
}

/// Elements of a set, with their marks.
pub type Elements = BTreeMap<Entry, Option<Mark>>;

/// What the mode owns of one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// The family.
    pub family: IpFamily,
    /// Whether the kernel's settings for IPVS are as the mode needs them.
    pub tuned: bool,
    /// Schedulers that the kernel was asked for and does not have.
    pub lacking: BTreeSet<String>,
    /// Whether the dummy link exists.
    pub link: bool,
    /// Addresses on the dummy link.
    pub addresses: BTreeSet<IpAddr>,
    /// Virtual servers.
    pub servers: BTreeMap<ServiceKey, Server>,
    /// Sets.
    pub sets: BTreeMap<SetName, Elements>,
    /// Those of them that are declared otherwise than we would.
    pub misdeclared: BTreeSet<SetName>,
    /// Rules.
    pub rules: Rules,
}

impl State {
    /// A kernel in which the mode has never run.
    pub const fn empty(family: IpFamily) -> Self {
        Self {
            family,
            tuned: false,
            lacking: BTreeSet::new(),
            link: false,
            addresses: BTreeSet::new(),
            servers: BTreeMap::new(),
            sets: BTreeMap::new(),
            misdeclared: BTreeSet::new(),
            rules: Rules { chains: Vec::new(), hooks: Vec::new() },
        }
    }

    /// Link and settings belong to both families. Without sets the mode does nothing in this one, and
    /// what the other has made is none of its business.
    pub fn forget_shared(&mut self) {
        if self.sets.is_empty() {
            self.link = false;
            self.tuned = false;
        }
    }

    /// Whether a set holds an entry.
    pub fn holds(&self, set: SetName, entry: &Entry) -> bool {
        self.sets.get(&set).is_some_and(|elements| elements.contains_key(entry))
    }

    /// Whether a virtual server is ours rather than somebody else's beside it. By address they bear no names: sets name
    /// the places, and the link their addresses.
    pub fn names(&self, key: &ServiceKey) -> bool {
        const SETS: [SetName; 4] =
            [SetName::ClusterIp, SetName::ExternalIp, SetName::ExternalIpLocal, SetName::LoadBalancer];
        // Those by mark belong to places in sets; the mark says whose they are.
        let Some(place) = Place::of(key) else { return !self.sets.is_empty() };
        let is_node_port = SetName::node_ports(place.protocol).into_iter().any(|set| {
            let entries = [place.entry(), Entry::Port(place.port)];
            entries.iter().any(|entry| entry.kind() == set.kind() && self.holds(set, entry))
        });
        self.addresses.contains(&place.address)
            || is_node_port
            || SETS.iter().any(|set| self.holds(*set, &place.entry()))
    }

    /// The mark for pods and the node at a place.
    pub fn mark(&self, place: &Place) -> Option<Mark> {
        self.sets.get(&SetName::Fwmark)?.get(&place.entry()).copied().flatten()
    }

    /// Entries of a set that begin with a place.
    pub fn entries_at(&self, set: SetName, place: &Place) -> Vec<Entry> {
        let Some(elements) = self.sets.get(&set) else { return Vec::new() };
        let Place { address, protocol, port } = *place;
        let first = match (set.kind(), address) {
            (ipset_netlink::Kind::HashIpPortNet, IpAddr::V4(_)) => {
                Entry::IpPortNet(address, protocol.number(), port, [0; 4].into(), 0)
            }
            (ipset_netlink::Kind::HashIpPortNet, IpAddr::V6(_)) => {
                Entry::IpPortNet(address, protocol.number(), port, [0_u16; 8].into(), 0)
            }
            (ipset_netlink::Kind::HashIpPortIp, IpAddr::V4(_)) => {
                Entry::IpPortIp(address, protocol.number(), port, [0; 4].into())
            }
            (ipset_netlink::Kind::HashIpPortIp, IpAddr::V6(_)) => {
                Entry::IpPortIp(address, protocol.number(), port, [0_u16; 8].into())
            }
            _ => place.entry(),
        };
        let at = |entry: &&Entry| Place::of_entry(entry) == Some(*place);
        elements.range(first..).map(|(entry, _)| entry).take_while(at).copied().collect()
    }

    /// Leaves only what `only` touches.
    pub fn restrict(&mut self, only: &Change) {
        if only.everything {
            return;
        }
        let node_port = |place: &Place| {
            let any =
                shunt_core::table::Frontend { address: None, protocol: place.protocol, port: place.port };
            only.frontends.contains(&any)
        };
        let touched = |place: &Place| {
            let exact = shunt_core::table::Frontend {
                address: Some(place.address),
                protocol: place.protocol,
                port: place.port,
            };
            only.frontends.contains(&exact) || node_port(place)
        };
        let marks: BTreeSet<u32> = self
            .sets
            .get(&SetName::Fwmark)
            .into_iter()
            .flatten()
            .filter(|(entry, _)| Place::of_entry(entry).is_some_and(|p| touched(&p)))
            .filter_map(|(_, mark)| mark.map(|m| m.value))
            .collect();
        self.servers.retain(|key, _| match key {
            ServiceKey::Mark { mark, .. } => {
                // With and without the masquerade bit.
                marks.iter().any(|m| (mark ^ m).count_ones() <= 1 && mark & m == *m)
            }
            ServiceKey::Address { .. } => Place::of(key).is_some_and(|p| touched(&p)),
        });
        let addresses: BTreeSet<IpAddr> = only.frontends.iter().filter_map(|f| f.address).collect();
        let wanted = |a: &IpAddr| addresses.contains(a) || only.cluster_ips.contains(a);
        self.addresses.retain(wanted);
        for (set, elements) in &mut self.sets {
            elements.retain(|entry, _| match (set, entry) {
                (SetName::LoopBack, Entry::IpPortIp(address, protocol, port, _)) => only
                    .local_endpoints
                    .iter()
                    .any(|e| e.address == *address && e.port == *port && e.protocol.number() == *protocol),
                (_, Entry::Ip(address)) => wanted(address),
                (_, Entry::Net(..)) => false,
                (SetName::HealthCheckNodePort, Entry::Port(port)) => {
                    only.health_check_node_ports.contains(port)
                }
                (set, Entry::Port(port)) => only.frontends.iter().any(|f| {
                    f.address.is_none() && f.port == *port && SetName::node_ports(f.protocol).contains(set)
                }),
                (_, entry) => Place::of_entry(entry).is_some_and(|p| touched(&p)),
            });
        }
        self.sets.retain(|_, elements| !elements.is_empty());
        self.rules = Rules::default();
    }

    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        let servers: Vec<_> = self
            .servers
            .values()
            .map(|server| {
                let destinations: Vec<_> = server
                    .destinations
                    .values()
                    .map(|d| serde_json::json!({ "address": d.address, "weight": d.weight }))
                    .collect();
                serde_json::json!({
                    "service": server.service.key.to_string(),
                    "scheduler": server.service.scheduler,
                    "persistence": server.service.persistence.map(|p| p.timeout),
                    "destinations": destinations,
                })
            })
            .collect();
        let sets: serde_json::Map<String, serde_json::Value> = self
            .sets
            .iter()
            .map(|(set, elements)| {
                let elements: Vec<String> = elements
                    .iter()
                    .map(|(entry, mark)| Element { entry: *entry, mark: *mark }.to_string())
                    .collect();
                (set.name(self.family), elements.into())
            })
            .collect();
        serde_json::json!({
            "family": self.family.to_string(),
            "addresses": self.addresses,
            "servers": servers,
            "sets": sets,
            "rules": self.rules.text(self.family).lines().collect::<Vec<_>>(),
        })
    }
}

/// What `ip address`, `ipvsadm -Sn`, `ipset save` and `iptables-save` print of what is ours, one after
/// the other, each headed by its name.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = match self.family {
            IpFamily::V4 => "ip -4",
            IpFamily::V6 => "ip -6",
        };
        if !self.addresses.is_empty() {
            writeln!(f, "# {ip} address show dev {LINK}")?;
            for address in &self.addresses {
                writeln!(f, "{address}")?;
            }
        }
        if !self.servers.is_empty() {
            writeln!(f, "# ipvsadm -Sn")?;
            for server in self.servers.values() {
                writeln!(f, "-A {}", server.service)?;
                for destination in server.destinations.values() {
                    writeln!(f, "-a {} {destination}", server.service.key)?;
                }
            }
        }
        if !self.sets.is_empty() {
            writeln!(f, "# ipset save")?;
            for (set, elements) in &self.sets {
                if self.misdeclared.contains(set) {
                    writeln!(f, "# {} is declared otherwise", set.name(self.family))?;
                }
                writeln!(f, "{}", set.declaration(self.family))?;
                for (entry, mark) in elements {
                    let element = Element { entry: *entry, mark: *mark };
                    writeln!(f, "add {} {element}", set.name(self.family))?;
                }
            }
        }
        if !self.rules.is_empty() {
            writeln!(f, "# {}-save", crate::skeleton::tool(self.family))?;
            f.write_str(&self.rules.text(self.family))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use shunt_core::id::Protocol;

    use super::*;

    #[test]
    fn virtual_servers_without_place_or_address_belong_to_others() {
        let at = |address: &str, port| {
            Place { address: address.parse().unwrap(), protocol: Protocol::Tcp, port }.key()
        };
        let mark = ServiceKey::Mark { ipv6: false, mark: crate::layout::mark(1, 14) };
        let mut state = State::empty(IpFamily::V4);
        for key in [at("10.96.0.1", 443), at("192.0.2.11", 30080), mark] {
            assert!(!state.names(&key), "{key}");
        }
        state.addresses.insert("10.96.0.1".parse().unwrap());
        state.sets.insert(SetName::NodePortTcp, [(Entry::Port(30080), None)].into());
        let Some(place) = Place::of(&at("10.96.0.2", 53)) else { panic!() };
        state.sets.insert(SetName::ClusterIp, [(place.entry(), None)].into());
        for key in [at("10.96.0.1", 443), at("192.0.2.11", 30080), at("10.96.0.2", 53), mark] {
            assert!(state.names(&key), "{key}");
        }
        for key in [at("10.96.0.2", 54), at("192.0.2.11", 30081)] {
            assert!(!state.names(&key), "{key}");
        }
        let other = Place { protocol: Protocol::Udp, ..place }.key();
        assert!(!state.names(&other));
    }
}
