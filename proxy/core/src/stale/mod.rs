//! Which tracked flows outlived the endpoint that they lead to.
//!
//! ```text
//!   ForwardingTable ┐
//!   Serving         ┼──> StaleFlows ──filters──> (what to ask the kernel for)
//!   Scope           ┘        └──judge(flow)──> None: it stays; Some(rule): it goes
//! ```
//!
//! The kernel chooses an endpoint for the first packet of a flow and remembers the choice as long as
//! packets come. TCP notices a dead peer and connects anew; a UDP client that never stops sending is
//! bound to the dead endpoint for ever, and an SCTP association that comes back from the same port
//! finds the old choice. So, for these two, the memory has to go when the endpoint does.
//!
//! Nothing in here is about new flows: those are the modes' business. Start reading at
//! [`StaleFlows::judge`], then [`Serving`].

mod flow;
mod serving;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

pub use flow::{Flow, FlowFilter, Tuple};
pub use serving::{Endpoints, Serving};

use crate::id::{IpFamily, Protocol, ServicePortName};
use crate::table::{ForwardingTable, Frontend};

/// Whether flows of a protocol outlive their endpoint.
pub const fn is_cleaned(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Udp | Protocol::Sctp => true,
        Protocol::Tcp => false,
    }
}

/// Whose flows to look at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Those of every frontend.
    All,
    /// Those of these frontends, which may be gone.
    Frontends(BTreeSet<Frontend>),
}

impl Scope {
    /// True when there is nothing to look at.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Frontends(frontends) if frontends.is_empty())
    }

    /// Adds what another scope looks at.
    pub fn merge(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::Frontends(mine), Self::Frontends(more)) => mine.extend(more),
            (_, other) => {
                if other == Self::All {
                    *self = Self::All;
                }
            }
        }
    }
}

impl Default for Scope {
    fn default() -> Self {
        Self::Frontends(BTreeSet::new())
    }
}

/// What may become of the flows to one frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The Service port that holds the frontend; `None` when nobody does any more.
    pub holder: Option<ServicePortName>,
    /// Endpoints whose flows stay.
    endpoints: Endpoints,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.holder {
            Some(holder) => write!(f, "{holder}"),
            None => f.write_str("a Service that is gone"),
        }
    }
}

impl Rule {
    /// Whether a flow to the frontend goes.
    fn is_stale(&self, flow: &Flow) -> bool {
        let serving = self.endpoints.contains(&flow.reply.source);
        // Not translated: it was there before the Service was, or while it had no endpoint. It would
        // be treated otherwise today, unless there is no Service any more to treat it. Only in the
        // default zone is that for the Service to say: in other zones a CNI plugin tracks packets
        // that have not met the Service yet.
        let none_of_ours = !flow.is_translated() && (self.holder.is_none() || flow.zone != 0);
        !serving && !none_of_ours
    }
}

/// The flows that go, as rules by what they were sent to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StaleFlows {
    family: IpFamily,
    /// `None` stands for a frontend that takes precedence over a node port and is not in question.
    exact: BTreeMap<(Protocol, SocketAddr), Option<Rule>>,
    node_ports: BTreeMap<(Protocol, u16), Rule>,
    /// Where node ports answer.
    node_addresses: BTreeSet<IpAddr>,
}

impl StaleFlows {
    /// The rules for a part of the table. `serving` belongs to the same family and the same objects.
    pub fn new(table: &ForwardingTable, serving: &Serving, scope: &Scope) -> Self {
        let mut stale = Self {
            family: table.family(),
            exact: BTreeMap::new(),
            node_ports: BTreeMap::new(),
            node_addresses: BTreeSet::new(),
        };
        match scope {
            Scope::All => {
                for frontend in
                    serving.services().filter_map(|name| table.service(name)).flat_map(|service| {
                        service
                            .ports
                            .iter()
                            .flat_map(|port| port.frontends.iter().map(|entry| entry.frontend))
                    })
                {
                    stale.insert(table, serving, frontend);
                }
            }
            Scope::Frontends(frontends) => {
                for frontend in frontends {
                    stale.insert(table, serving, *frontend);
                }
            }
        }
        stale.guard_precedence(table);
        stale
    }

    fn insert(&mut self, table: &ForwardingTable, serving: &Serving, frontend: Frontend) {
        if !is_cleaned(frontend.protocol) {
            return;
        }
        // Where an external IP of the node was, a node port may answer now.
        let node_port = || {
            let serves = frontend.address.is_some_and(|a| table.node().serves_node_ports(a));
            serves.then(|| table.frontend(&Frontend { address: None, ..frontend })).flatten()
        };
        let holder = table.frontend(&frontend).or_else(node_port).map(|(port, _)| port.name.clone());
        let endpoints = holder.as_ref().and_then(|holder| serving.endpoints(holder)).unwrap_or_default();
        let rule = Rule { holder, endpoints };
        match frontend.address {
            Some(address) => {
                let destination = SocketAddr::new(address, frontend.port);
                self.exact.insert((frontend.protocol, destination), Some(rule));
            }
            None => {
                self.node_ports.insert((frontend.protocol, frontend.port), rule);
            }
        }
    }

    /// An external IP may be an address of the node, and its port a node port of another Service.
    fn guard_precedence(&mut self, table: &ForwardingTable) {
        if self.node_ports.is_empty() {
            return;
        }
        self.node_addresses = table.node().node_port_addresses();
        for (protocol, port) in self.node_ports.keys() {
            for address in &self.node_addresses {
                let exact = Frontend { address: Some(*address), protocol: *protocol, port: *port };
                if table.frontend(&exact).is_some() {
                    self.exact.entry((*protocol, SocketAddr::new(*address, *port))).or_insert(None);
                }
            }
        }
    }

    /// The family.
    pub const fn family(&self) -> IpFamily {
        self.family
    }

    /// True when no flow can be stale.
    pub fn is_empty(&self) -> bool {
        self.exact.values().all(Option::is_none)
            && (self.node_ports.is_empty() || self.node_addresses.is_empty())
    }

    /// The rule by which a flow goes; `None` when it stays.
    pub fn judge(&self, flow: &Flow) -> Option<&Rule> {
        let destination = flow.original.destination;
        let rule = match self.exact.get(&(flow.protocol, destination)) {
            Some(rule) => rule.as_ref()?,
            None if self.node_addresses.contains(&destination.ip()) => {
                self.node_ports.get(&(flow.protocol, destination.port()))?
            }
            None => return None,
        };
        rule.is_stale(flow).then_some(rule)
    }

    /// What to ask the kernel for: at most `most` filters (but one for each protocol), none of which
    /// finds what another one does, and which together find every flow that [`StaleFlows::judge`]
    /// has a rule for. The kernel walks its whole table for each of them.
    pub fn filters(&self, most: usize) -> Vec<FlowFilter> {
        let mut by_address: BTreeMap<(Protocol, IpAddr), BTreeSet<u16>> = BTreeMap::new();
        for ((protocol, destination), rule) in &self.exact {
            if rule.is_some() {
                by_address.entry((*protocol, destination.ip())).or_default().insert(destination.port());
            }
        }
        for (protocol, port) in self.node_ports.keys() {
            for address in &self.node_addresses {
                by_address.entry((*protocol, *address)).or_default().insert(*port);
            }
        }
        let filter = |protocol: &Protocol, address, port| FlowFilter {
            family: self.family,
            protocol: *protocol,
            address,
            port,
        };
        let one = |ports: &BTreeSet<u16>| ports.first().copied().filter(|_| ports.len() == 1);
        // The kernel's filter compares IPv6 addresses the wrong way round, from 5.8 to 6.18 at least:
        // it leaves out exactly what is asked for. There ports must do.
        if self.family == IpFamily::V4 && by_address.len() <= most {
            return by_address
                .iter()
                .map(|((protocol, address), ports)| filter(protocol, Some(*address), one(ports)))
                .collect();
        }
        let protocols: BTreeSet<Protocol> = by_address.keys().map(|(protocol, _)| *protocol).collect();
        let ports: BTreeSet<(Protocol, u16)> = by_address
            .iter()
            .flat_map(|((protocol, _), ports)| ports.iter().map(|port| (*protocol, *port)))
            .collect();
        // Many addresses, few ports: a node port on a node with many addresses, or DNS everywhere.
        if ports.len() <= most {
            return ports.iter().map(|(protocol, port)| filter(protocol, None, Some(*port))).collect();
        }
        protocols.iter().map(|protocol| filter(protocol, None, None)).collect()
    }
}

#[cfg(test)]
mod tests;
