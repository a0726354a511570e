//! A lab with the addresses of a case: what its packets come from and where they may end.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shunt_core::id::Protocol;
use shunt_core::store::Event;
use shunt_core::walk::Outcome;
use shunt_harness::cases::{self, Case, CasePacket, SourceKind};
use shunt_harness::lab::{Icmp, Lab, Namespace, Outcome as Seen, Probe, Proto};

/// Most probes for one packet: with two endpoints, one is missed once in 2^47 runs.
const PROBES_MAX: usize = 48;
const OTHER_NODE: &str = "other-node";

/// A case's lab.
#[derive(Debug)]
pub struct Town {
    /// The namespaces.
    pub lab: Lab,
    node_ips: Vec<IpAddr>,
    /// Whether refusals meet processes of the node, and those in a cgroup, at their sockets, without a packet.
    refused_at_sockets: bool,
    /// Which namespace an address that is not the node's belongs to.
    homes: BTreeMap<IpAddr, Home>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Home {
    Client,
    Pod,
    Remote,
}

impl Town {
    /// Builds the lab of a case: all endpoints of all steps answer, the node's own in namespaces of
    /// their own. `settle` prepares the lab for a mode, see [`ModeUnderTest::settle`].
    ///
    /// [`ModeUnderTest::settle`]: crate::mode::ModeUnderTest::settle
    pub fn build(case: &Case, settle: impl FnOnce(&Lab) -> Result<bool>) -> Result<Self> {
        let mut homes: BTreeMap<IpAddr, Home> = BTreeMap::new();
        let mut ports: BTreeMap<IpAddr, BTreeSet<u16>> = BTreeMap::new();
        let slices = case.steps.iter().flat_map(|s| &s.objects).filter_map(|event| match event {
            Event::Slice(slice) => Some(slice),
            _ => None,
        });
        for slice in slices {
            for endpoint in &slice.endpoints {
                let here = endpoint.node.as_deref() == Some(cases::NODE);
                let home = homes.entry(endpoint.address).or_insert(Home::Remote);
                if here {
                    *home = Home::Pod;
                }
                ports.entry(endpoint.address).or_default().extend(slice.ports.iter().map(|p| p.port));
            }
        }
        for packet in case.steps.iter().flat_map(|s| &s.packets) {
            let home = match packet.source_kind {
                SourceKind::Pod => Home::Pod,
                SourceKind::External => Home::Client,
                SourceKind::Node | SourceKind::LbVip | SourceKind::Loopback => continue,
            };
            homes.entry(packet.packet.source).or_insert(home);
        }
        let mut builder = Lab::builder().node(case.node_ips.iter().copied());
        for (address, home) in &homes {
            let name = address.to_string();
            builder = match home {
                Home::Client => builder.client([*address]),
                Home::Pod => builder.pod(&name, [*address]),
                Home::Remote => builder.remote_pod(OTHER_NODE, &name, [*address]),
            };
        }
        let lab = builder.build()?;
        let refused_at_sockets = settle(&lab)?;
        let town = Self { lab, node_ips: case.node_ips.clone(), refused_at_sockets, homes };
        for (address, ports) in ports {
            let servers = ports.into_iter().flat_map(|port| {
                [Proto::Tcp, Proto::Udp, Proto::Sctp].map(|proto| (proto, SocketAddr::new(address, port)))
            });
            town.home(address)?.serve(servers)?;
        }
        Ok(town)
    }

    /// The namespaces of pods on the node.
    pub fn pods(&self) -> Result<Vec<&Namespace>> {
        let here = self.homes.iter().filter(|(_, home)| **home == Home::Pod);
        here.map(|(address, _)| self.lab.pod(&address.to_string())).collect()
    }

    /// Whether a packet comes from a pod on the node.
    pub fn is_from_pod(&self, packet: &CasePacket) -> bool {
        packet.source_kind == SourceKind::Pod && self.homes.get(&packet.packet.source) == Some(&Home::Pod)
    }

    fn home(&self, address: IpAddr) -> Result<&Namespace> {
        match self.homes.get(&address).with_context(|| format!("nobody lives at {address}"))? {
            Home::Client => Ok(self.lab.client()),
            Home::Pod => self.lab.pod(&address.to_string()),
            Home::Remote => self.lab.pod(OTHER_NODE),
        }
    }

    /// Sends a packet until it is clear what becomes of it; an error says what is not as expected. With
    /// `affinity`, all go to one and the same of the endpoints.
    pub fn send(&self, packet: &CasePacket, affinity: bool) -> Result<()> {
        let (source, destination) = (packet.packet.source, packet.packet.destination);
        let on_node =
            matches!(packet.source_kind, SourceKind::Node | SourceKind::LbVip | SourceKind::Loopback);
        let namespace = if on_node { self.lab.node() } else { self.home(source)? };
        let proto = match packet.packet.protocol {
            Protocol::Tcp => Proto::Tcp,
            Protocol::Udp => Proto::Udp,
            Protocol::Sctp => Proto::Sctp,
        };
        let to = SocketAddr::new(destination, packet.packet.port);
        let probe = Probe::new(proto, to).from(source);
        match &packet.expect {
            Outcome::Forward(endpoints) => {
                let probe = probe.timeout(Duration::from_secs(2));
                let wanted: BTreeSet<SocketAddr> = endpoints.iter().map(|(e, _)| *e).collect();
                let mut reached = BTreeSet::new();
                let mut sent = 0;
                let most = if affinity { 8 } else { PROBES_MAX };
                while reached != wanted && sent < most {
                    let count = if wanted.len() == 1 { 1 } else { 4 * wanted.len() };
                    sent += count;
                    for seen in namespace.probe_all(vec![probe.clone(); count])? {
                        reached.insert(self.judge_answer(packet, endpoints, &seen)?);
                    }
                }
                if affinity {
                    ensure!(reached.len() == 1, "one client reached {reached:?}");
                    return Ok(());
                }
                ensure!(reached == wanted, "reached only {reached:?} of {wanted:?} in {sent} tries");
            }
            Outcome::Reject => {
                let seen = namespace.probe(probe)?;
                let at_socket = on_node || namespace.cgroup().is_some();
                if at_socket && self.refused_at_sockets && seen.is_refused() {
                    return Ok(());
                }
                let icmp = match &seen {
                    Seen::Refused { icmp: Some(Icmp { kind, code, .. }), .. } => Some((*kind, *code)),
                    _ => None,
                };
                let unreachable = if destination.is_ipv4() { (3, 3) } else { (1, 4) };
                ensure!(icmp == Some(unreachable), "not refused as port unreachable: {seen}");
            }
            Outcome::Drop => {
                let seen = namespace.probe(probe)?;
                ensure!(seen.is_timeout(), "not dropped: {seen}");
            }
            Outcome::None => {
                let seen = namespace.probe(probe)?;
                // A closed port of the node itself, or of whoever has the address.
                let reset = matches!(seen, Seen::Refused { icmp: None, .. });
                let is_node = self.node_ips.contains(&destination);
                ensure!(seen.is_timeout() || reset || is_node && seen.is_refused(), "not left alone: {seen}");
            }
        }
        Ok(())
    }

    fn judge_answer(
        &self,
        packet: &CasePacket,
        endpoints: &[(SocketAddr, bool)],
        seen: &Seen,
    ) -> Result<SocketAddr> {
        let answer = seen.answer().with_context(|| format!("not forwarded: {seen}"))?;
        let masquerade = endpoints.iter().find(|(e, _)| *e == answer.local).map(|(_, m)| *m);
        let masquerade = masquerade.with_context(|| format!("not one of {endpoints:?}: {seen}"))?;
        let peer = answer.peer.ip();
        let from_node = self.node_ips.contains(&peer);
        let as_it_was = peer == packet.packet.source;
        ensure!(if masquerade { from_node } else { as_it_was }, "masquerade {masquerade}, but {seen}");
        Ok(answer.local)
    }
}
