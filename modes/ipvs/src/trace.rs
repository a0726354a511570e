//! Walks a packet through a [`State`] as the kernel does: `mangle`, `nat`, routing, `filter`, IPVS,
//! `mangle` and `nat` on the way out.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ipset_netlink::{Entry, Kind};
use ipvs_netlink::ServiceKey;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::walk::{Outcome, Packet};
use xtables_tools::Table;

use crate::layout::{Place, SetName};
use crate::rules::{Match, Rule, RuleProtocol, Target};
use crate::state::State;

const JUMPS_MAX: usize = 16;

/// What becomes of the first packet of a connection under `state`. `local` are the addresses of the node.
///
/// # Errors
/// When a rule is none of those that we write, or a mark leaves the node.
pub fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
    let mut walker = Walker {
        state,
        local,
        source: packet.source,
        destination: SocketAddr::new(packet.destination, packet.port),
        protocol: packet.protocol,
        interface: packet.interface.as_deref().unwrap_or_default(),
        mark: 0,
        balanced: false,
    };
    match walker.hook(Table::Mangle, "PREROUTING")? {
        End::Drop => return Ok(Outcome::Drop),
        End::Reject | End::Masquerade => return Err(format!("{packet}: refused in mangle")),
        End::Continue | End::Return | End::Accept => {}
    }
    if matches!(walker.hook(Table::Nat, "PREROUTING")?, End::Drop | End::Reject | End::Masquerade) {
        return Err(format!("{packet}: an end in nat"));
    }
    if !walker.is_local(packet.destination) {
        // Routed on; IPVS only looks at what is for this node.
        return Ok(Outcome::None);
    }
    match walker.hook(Table::Filter, "INPUT")? {
        End::Drop => return Ok(Outcome::Drop),
        End::Reject => return Ok(Outcome::Reject),
        End::Continue | End::Return | End::Accept | End::Masquerade => {}
    }
    let Some(server) = walker.server() else { return Ok(Outcome::None) };
    let mut endpoints = Vec::new();
    for endpoint in server.serving() {
        let mut sent = Walker { destination: endpoint, balanced: true, ..walker.clone() };
        sent.hook(Table::Mangle, "POSTROUTING")?;
        let masquerade = sent.hook(Table::Nat, "POSTROUTING")? == End::Masquerade;
        if sent.mark != 0 {
            return Err(format!("{packet}: leaves with mark {:#x}", sent.mark));
        }
        endpoints.push((endpoint, masquerade));
    }
    // The kernel refuses what it has no destination for.
    if endpoints.is_empty() { Ok(Outcome::Reject) } else { Ok(Outcome::Forward(endpoints)) }
}

#[derive(Clone, Debug)]
struct Walker<'a> {
    state: &'a State,
    local: &'a BTreeSet<IpAddr>,
    source: IpAddr,
    destination: SocketAddr,
    protocol: Protocol,
    interface: &'a str,
    mark: u32,
    /// IPVS has chosen the destination.
    balanced: bool,
}

/// How a chain ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Continue,
    Return,
    Accept,
    Drop,
    Reject,
    Masquerade,
}

impl<'a> Walker<'a> {
    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address) || self.state.addresses.contains(&address)
    }

    /// The virtual server: one by mark comes first.
    fn server(&self) -> Option<&'a crate::state::Server> {
        let ipv6 = self.state.family == IpFamily::V6;
        let by_mark = ServiceKey::Mark { ipv6, mark: self.mark };
        self.state.servers.get(&by_mark).or_else(|| self.state.servers.get(&self.place().key()))
    }

    const fn place(&self) -> Place {
        Place { address: self.destination.ip(), protocol: self.protocol, port: self.destination.port() }
    }

    /// A chain of the kernel's.
    fn hook(&mut self, table: Table, name: &str) -> Result<End, String> {
        let state = self.state;
        self.rules(table, state.rules.hook(table, name), 0)
    }

    fn chain(&mut self, table: Table, name: &str, depth: usize) -> Result<End, String> {
        if depth > JUMPS_MAX {
            return Err("too many jumps".to_owned());
        }
        let state = self.state;
        let chain = state.rules.chain(table, name).ok_or_else(|| format!("no chain {name}"))?;
        self.rules(table, &chain.rules, depth)
    }

    fn rules(&mut self, table: Table, rules: &[Rule], depth: usize) -> Result<End, String> {
        for rule in rules {
            let mut matches = true;
            for condition in &rule.matches {
                matches = matches && self.matches(condition)?;
            }
            if !matches {
                continue;
            }
            let end = match &rule.target {
                Target::Jump(chain) => match self.chain(table, chain, depth + 1)? {
                    End::Return => End::Continue,
                    end => end,
                },
                // The end of a chain that was gone to is the end of the chain that it was gone to from.
                Target::Goto(chain) => match self.chain(table, chain, depth + 1)? {
                    End::Continue => End::Return,
                    end => end,
                },
                Target::Return => End::Return,
                Target::Accept => End::Accept,
                Target::Drop => End::Drop,
                Target::Reject => End::Reject,
                Target::Masquerade => End::Masquerade,
                Target::SetMark(value, mask) => {
                    self.mark = (self.mark & !mask) ^ value;
                    End::Continue
                }
                Target::MapMark(set, by) => {
                    self.map_mark(*set, by)?;
                    End::Continue
                }
                Target::Unknown(text) => return Err(format!("rule {text}")),
            };
            if end != End::Continue {
                return Ok(end);
            }
        }
        Ok(End::Continue)
    }

    fn map_mark(&mut self, set: SetName, by: &str) -> Result<(), String> {
        if by != "dst,dst" {
            return Err(format!("{set} by {by}"));
        }
        let elements = self.state.sets.get(&set).ok_or_else(|| format!("no set {set}"))?;
        if let Some(Some(mark)) = elements.get(&self.place().entry()) {
            self.mark = (self.mark & !mark.mask) ^ mark.value;
        }
        Ok(())
    }

    fn matches(&self, condition: &Match) -> Result<bool, String> {
        Ok(match condition {
            Match::Source(range) => range.contains(&self.source),
            Match::Interface(name) => match name.strip_suffix('+') {
                Some(prefix) => !self.interface.is_empty() && self.interface.starts_with(prefix),
                None => self.interface == name,
            },
            Match::Protocol(RuleProtocol::Transport(protocol)) => self.protocol == *protocol,
            Match::Protocol(RuleProtocol::Icmp) | Match::Established => false,
            Match::Set(set, by, positive) => self.in_set(*set, by)? == *positive,
            Match::SourceLocal => self.is_local(self.source),
            Match::DestinationNotLocal => !self.is_local(self.destination.ip()),
            Match::New | Match::Comment(_) => true,
            Match::Mark(value, mask, positive) => (self.mark & mask == *value) == *positive,
            Match::Ipvs(positive) => self.balanced == *positive,
        })
    }

    fn in_set(&self, set: SetName, by: &str) -> Result<bool, String> {
        let elements = self.state.sets.get(&set).ok_or_else(|| format!("no set {set}"))?;
        let (destination, port) = (self.destination.ip(), self.destination.port());
        let protocol = self.protocol.number();
        Ok(match (set.kind(), by) {
            (Kind::HashIp, "src") => elements.contains_key(&Entry::Ip(self.source)),
            (Kind::HashIp, "dst") => elements.contains_key(&Entry::Ip(destination)),
            (Kind::HashIpPort, "dst,dst") => elements.contains_key(&self.place().entry()),
            (Kind::HashIpPortIp, "dst,dst,src") => {
                elements.contains_key(&Entry::IpPortIp(destination, protocol, port, self.source))
            }
            (Kind::HashIpPortNet, "dst,dst,src") => {
                self.state.entries_at(set, &self.place()).iter().any(|entry| match entry {
                    Entry::IpPortNet(_, _, _, net, prefix) => contains(*net, *prefix, self.source),
                    _ => false,
                })
            }
            (Kind::HashNet, "dst") => elements.keys().any(|entry| match entry {
                Entry::Net(net, prefix) => contains(*net, *prefix, destination),
                _ => false,
            }),
            (Kind::BitmapPort, "dst") => elements.contains_key(&Entry::Port(port)),
            _ => return Err(format!("{set} by {by}")),
        })
    }
}

fn contains(net: IpAddr, prefix: u8, address: IpAddr) -> bool {
    IpNet::new(net, prefix).is_ok_and(|net| net.contains(&address))
}
