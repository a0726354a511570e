//! From the forwarding table to chains, leaves of trees and elements of sets. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use shunt_core::id::IpFamily;
use shunt_core::service::TrafficPolicy;
use shunt_core::table::{
    Change, ForwardingTable, Frontend, FrontendEntry, FrontendKind, LocalEndpoint, PortEntry, SourceClass,
    SourceRanges, Target as Endpoint, Verdict,
};

use crate::choice;
use crate::fixed::{self, ByRange, Chains, Hooks};
use crate::names::{self, Name};
use crate::rule::{Key, Match, Pool, Rule, Rules, Side, Target, comment};

/// With more frontends than this, rules do not say which Service they are for: a comment is 288 bytes, in caches and in
/// each change of the legacy flavour. kube-proxy leaves comments out beyond 1,000 endpoints
/// (`largeClusterEndpointsThreshold`).
pub const COMMENTED_MAX: usize = 1000;

/// What happens to packets of a frontend that are not translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Refused.
    Reject,
    /// Discarded.
    Drop,
}

/// What one frontend should get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dispatch {
    /// Where the nat table leads its packets, without the frontend's own conditions.
    pub leaf: Option<Rule>,
    /// What the filter table does with those that were not translated.
    pub refusal: Option<Refusal>,
    /// Sources that may use it; `None` for all.
    pub guard: Option<Arc<SourceRanges>>,
}

/// What the kernel should hold, for the part of the table that a change touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired {
    /// The family.
    pub family: IpFamily,
    /// Everything is listed below: what is not listed should not be there.
    pub everything: bool,
    /// False when the table asks for nothing at all: then no packet should meet a rule of ours.
    pub active: bool,
    /// Chains that do not depend on frontends; they are always all listed.
    pub fixed: Chains,
    /// Rules that stand before those, for each range in which there are addresses.
    pub by_range: ByRange,
    /// Rules after the tree of frontends: those that lead to the tree of node ports.
    pub node_ports: Vec<Rule>,
    /// Where the kernel enters our chains.
    pub hooks: Hooks,
    /// Whether the kernel is to route packets to loopback, guarded.
    pub loopback: bool,
    /// Frontends in question; `None` for one that should not be there.
    pub frontends: BTreeMap<Frontend, Option<Dispatch>>,
    /// Chains of Service ports to which frontends in question belong. Only those that a leaf leads to
    /// should be there.
    pub chains: BTreeMap<Name, Rules>,
    /// Cluster IPs in question, and whether they should be there.
    pub cluster_ips: BTreeMap<IpAddr, bool>,
    /// Local endpoints in question, and whether they should be there.
    pub hairpins: BTreeMap<LocalEndpoint, bool>,
}

/// What the kernel should hold for the part of `table` that `change` touches.
pub fn render(table: &ForwardingTable, change: &Change) -> Desired {
    let mut ports = Ports { table, done: HashSet::new(), chains: BTreeMap::new(), pool: Pool::default() };
    let (frontends, cluster_ips, hairpins) = if change.everything {
        (
            table
                .frontends()
                .map(|(port, entry)| (entry.frontend, Some(ports.dispatch(port, entry))))
                .collect(),
            table.cluster_ips().map(|ip| (ip, true)).collect(),
            table.local_endpoints().map(|e| (e, true)).collect(),
        )
    } else {
        let mut dispatch = |f: &Frontend| table.frontend(f).map(|(port, entry)| ports.dispatch(port, entry));
        (
            change.frontends.iter().map(|f| (*f, dispatch(f))).collect(),
            change.cluster_ips.iter().map(|ip| (*ip, table.is_cluster_ip(*ip))).collect(),
            change.local_endpoints.iter().map(|e| (*e, table.is_local_endpoint(e))).collect(),
        )
    };
    Desired {
        family: table.family(),
        everything: change.everything,
        active: !table.is_empty() || !table.service_cidrs().is_empty(),
        fixed: fixed::chains(table),
        by_range: fixed::by_range(table.family(), table.node()),
        node_ports: fixed::node_ports(table.family(), table.node(), names::NODE_PORTS),
        hooks: fixed::hooks(),
        loopback: table.node().localhost_node_ports,
        frontends,
        chains: ports.chains,
        cluster_ips,
        hairpins,
    }
}

/// Makes the chains of Service ports, each once.
struct Ports<'a> {
    table: &'a ForwardingTable,
    done: HashSet<(&'a str, &'a str, &'a str, u8)>,
    chains: BTreeMap<Name, Rules>,
    pool: Pool,
}

impl<'a> Ports<'a> {
    fn dispatch(&mut self, port: &'a PortEntry, entry: &FrontendEntry) -> Dispatch {
        let name = &port.name;
        let id = (&*name.service.namespace, &*name.service.name, &*name.port, name.protocol.number());
        let hash = names::port_hash(name);
        if self.done.insert(id) {
            PortChains::new(self.table, port, &hash).render(&mut self.chains, &mut self.pool);
        }
        let guard = entry.source_ranges.clone();
        let forwards =
            |v: &Verdict| matches!(v, Verdict::Forward { policy, .. } if !port.group(*policy).is_empty());
        let refusal = if entry.verdicts.iter().all(forwards) {
            None
        } else if entry.verdicts.contains(&Verdict::Reject) {
            Some(Refusal::Reject)
        } else {
            Some(Refusal::Drop)
        };
        let label = names::port_label(name);
        let leaf = if entry.verdicts.iter().any(forwards) {
            let what = match entry.kind {
                FrontendKind::ClusterIp => " cluster IP",
                FrontendKind::ExternalIp => " external IP",
                FrontendKind::LoadBalancer => " loadbalancer IP",
                FrontendKind::NodePort => "",
            };
            let chain = if guard.is_some() {
                format!("{}{hash}", names::GUARD)
            } else {
                entry_chain(self.table, port, entry, &hash)
            };
            Some(Rule::new(self.told(&format!("{label}{what}")), Target::Goto(chain.into())))
        } else {
            // Its packets must not be taken for those of a node port. Those of node ports end here anyway.
            let why = self.told(&format!("{label} has no endpoints"));
            let target = match entry.kind {
                FrontendKind::ClusterIp => Target::Goto(names::UNSERVED.into()),
                _ => Target::Accept,
            };
            entry.frontend.address.map(|_| Rule::new(why, target))
        };
        Dispatch { leaf, refusal, guard }
    }

    /// A comment, unless there are so many frontends that what comments cost is felt.
    fn told(&self, text: &str) -> Vec<Match> {
        if self.table.frontend_count() > COMMENTED_MAX { Vec::new() } else { vec![comment(text)] }
    }
}

/// The chain that packets of a frontend go to once they are allowed to.
fn entry_chain(table: &ForwardingTable, port: &PortEntry, entry: &FrontendEntry, hash: &str) -> String {
    if entry.kind != FrontendKind::ClusterIp {
        return format!("{}{hash}", names::EXTERNAL);
    }
    match one_policy(table, entry.verdicts, port) {
        Some(policy) => format!("{}{hash}", policy_prefix(policy)),
        None => format!("{}{hash}", names::INTERNAL),
    }
}

const fn policy_prefix(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => names::CLUSTER,
        TrafficPolicy::Local => names::LOCAL,
    }
}

/// The policy by which all classes of source choose an endpoint, where those that are masqueraded are marked before
/// they come to the tree ([`fixed::off_cluster`]).
fn one_policy(table: &ForwardingTable, verdicts: [Verdict; 3], port: &PortEntry) -> Option<TrafficPolicy> {
    let Verdict::Forward { policy, .. } = verdicts[0] else { return None };
    if port.group(policy).is_empty() {
        return None;
    }
    let node = table.node();
    let outside = fixed::off_cluster(node).is_some();
    let as_marked = [node.masquerade_all, outside, outside];
    let same = |(verdict, masquerade)| verdict == Verdict::Forward { policy, masquerade };
    verdicts.into_iter().zip(as_marked).all(same).then_some(policy)
}

/// The chains of one Service port.
struct PortChains<'a> {
    table: &'a ForwardingTable,
    /// Ports of this name: one, unless the API server was not asked.
    ports: Vec<&'a PortEntry>,
    port: &'a PortEntry,
    hash: &'a str,
}

impl<'a> PortChains<'a> {
    fn new(table: &'a ForwardingTable, port: &'a PortEntry, hash: &'a str) -> Self {
        let service = table.service(&port.name.service);
        let ports: Vec<_> =
            service.into_iter().flat_map(|s| &s.ports).filter(|p| p.name == port.name).collect();
        Self { table, ports, port, hash }
    }

    fn group(&self, policy: TrafficPolicy) -> &'a [Endpoint] {
        self.ports.iter().map(|p| p.group(policy)).find(|g| !g.is_empty()).unwrap_or_default()
    }

    fn entries(&self) -> impl Iterator<Item = (&'a PortEntry, &'a FrontendEntry)> {
        self.ports.iter().flat_map(|port| port.frontends.iter().map(move |entry| (*port, entry)))
    }

    fn name(&self, prefix: &str) -> Name {
        format!("{prefix}{}", self.hash).into()
    }

    fn render(&self, chains: &mut BTreeMap<Name, Rules>, pool: &mut Pool) {
        for policy in [TrafficPolicy::Cluster, TrafficPolicy::Local] {
            let endpoints = self.group(policy);
            if !endpoints.is_empty() {
                self.endpoints(policy, endpoints, chains, pool);
            }
        }
        for (port, entry) in self.entries() {
            let chain = entry_chain(self.table, port, entry, self.hash);
            // The frontends that share this chain have the same verdicts: the Service's policies make them.
            if (chain.starts_with(names::EXTERNAL) || chain.starts_with(names::INTERNAL))
                && !chains.contains_key(&*chain)
            {
                let rules = self.by_source(entry.verdicts);
                chains.insert(chain.into(), rules.into());
            }
        }
        self.guards(chains);
    }

    /// The chain of a policy, which chooses an endpoint.
    fn endpoints(
        &self,
        policy: TrafficPolicy,
        endpoints: &[Endpoint],
        chains: &mut BTreeMap<Name, Rules>,
        pool: &mut Pool,
    ) {
        let name = self.name(policy_prefix(policy));
        let mut rules = Vec::new();
        let sockets: Vec<SocketAddr> = endpoints.iter().map(|e| SocketAddr::new(e.address, e.port)).collect();
        let protocol = Match::Protocol(self.port.name.protocol);
        if let Some(timeout) = self.port.affinity {
            let chain = |to: SocketAddr| names::endpoint(&self.port.name, to);
            for to in &sockets {
                let known = Match::Set(false, chain(*to), Key::Source);
                rules.push(Rule::new(vec![known], Target::Goto(chain(*to))));
                chains
                    .entry(chain(*to))
                    .or_insert_with(|| endpoint_chain(&chain(*to), *to, protocol.clone(), timeout));
            }
            let mut send = |to: SocketAddr, matches| Rule::new(matches, Target::Goto(chain(to)));
            rules.extend(choice::rules(&name, &sockets, &mut send, chains));
        } else {
            let mut send = |to: SocketAddr, mut matches: Vec<Match>| {
                matches.push(protocol.clone());
                pool.share(Rule::new(matches, Target::Dnat(to.ip(), to.port())))
            };
            rules.extend(choice::rules(&name, &sockets, &mut send, chains));
        }
        chains.insert(name, rules.into());
    }

    /// Rules that treat each class of source as its verdict says.
    fn by_source(&self, verdicts: [Verdict; 3]) -> Vec<Rule> {
        let mut rules = Vec::new();
        let uniform = verdicts[0] == verdicts[1] && verdicts[1] == verdicts[2];
        for class in SourceClass::ALL {
            let conditions: Vec<Vec<Match>> = match class {
                _ if uniform => vec![Vec::new()],
                SourceClass::Pod => {
                    fixed::pods(self.table.node(), false).into_iter().map(|m| vec![m]).collect()
                }
                SourceClass::Node => vec![vec![Match::Local(false, Side::Source)]],
                SourceClass::Other => vec![Vec::new()],
            };
            for condition in conditions {
                rules.extend(self.leg(verdicts[class as usize], condition));
            }
            if uniform {
                break;
            }
        }
        rules
    }

    fn leg(&self, verdict: Verdict, condition: Vec<Match>) -> Vec<Rule> {
        match verdict {
            Verdict::Forward { policy, masquerade } if !self.group(policy).is_empty() => {
                let mark = Rule::new(condition.clone(), Target::Jump(names::MARK_MASQ.into()));
                let go = Rule::new(condition, Target::Goto(self.name(policy_prefix(policy))));
                masquerade.then_some(mark).into_iter().chain([go]).collect()
            }
            // The filter table sees to the rest.
            _ => vec![Rule::new(condition, Target::Accept)],
        }
    }

    /// The chain that lets only allowed sources pass.
    fn guards(&self, chains: &mut BTreeMap<Name, Rules>) {
        let mut rules = Vec::new();
        for (port, entry) in self.entries() {
            let (Some(guard), Some(vip)) = (&entry.source_ranges, entry.frontend.address) else { continue };
            let to = Target::Goto(entry_chain(self.table, port, entry, self.hash).into());
            for range in &guard.ranges {
                rules.push(Rule::new(vec![Match::Source(false, *range)], to.clone()));
            }
            if guard.allow_vip_source {
                let vip = IpNet::from(vip);
                let matches = vec![Match::Source(false, vip), Match::Destination(false, vip)];
                rules.push(Rule::new(matches, to));
            }
        }
        if rules.is_empty() {
            return;
        }
        let mut seen = BTreeSet::new();
        rules.retain(|rule| seen.insert(rule.to_string()));
        let why = format!("other traffic will be dropped by {}", names::PROXY_FIREWALL);
        rules.push(Rule::new(vec![comment(&why)], Target::Accept));
        chains.insert(self.name(names::GUARD), rules.into());
    }
}

/// The chain of an endpoint with session affinity: remembers the client, or for longer.
fn endpoint_chain(name: &Name, to: SocketAddr, protocol: Match, timeout: Duration) -> Rules {
    // What ipset can hold at most.
    let seconds = timeout.as_secs().clamp(1, 2_147_483) as u32;
    let send = Rule::new(vec![protocol], Target::Dnat(to.ip(), to.port()));
    [Rule::always(Target::AddSource(name.clone(), seconds)), send].into()
}
