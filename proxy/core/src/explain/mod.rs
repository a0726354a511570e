//! Where a packet goes and why: the answer of [`walk`] with the frontend that matched, the policy
//! that was applied, the endpoints that may be chosen, why the others are left out, and why the
//! source is rewritten or kept.
//!
//! Decides nothing: what becomes of the packet is what [`walk`] says, and why an endpoint is left
//! out is what the compiler says ([`endpoints::left_out`]). `print.rs` has the words.

mod print;
#[cfg(test)]
mod tests;

use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::compile::Compiler;
use crate::compile::endpoints::{self, LeftOut};
use crate::id::{IpFamily, NamespacedName, ServicePortName};
use crate::node::LocalDetector;
use crate::service::TrafficPolicy;
use crate::store::Store;
use crate::table::{
    ForwardingTable, Frontend, FrontendEntry, FrontendKind, NodePortMatch, PortEntry, SourceClass,
    SourceRanges, Target, Verdict,
};
use crate::walk::{Outcome, Packet, frontend_of, source_class, walk};

/// What becomes of a packet, and everything that decided it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Explanation {
    /// The packet.
    pub packet: Packet,
    /// What becomes of it.
    pub outcome: Outcome,
    /// What its source is to this node.
    pub class: SourceClass,
    /// How local pods are recognised, which decides the class.
    pub detector: LocalDetector,
    /// What decided.
    pub cause: Cause,
}

/// What decided about a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Cause {
    /// A frontend of a Service.
    Frontend(Box<Matched>),
    /// Its destination is a cluster IP, and its port is none of that Service's.
    UnknownPort {
        /// The Services that have this cluster IP.
        services: Vec<NamespacedName>,
        /// Their frontends at this address.
        frontends: Vec<Frontend>,
    },
    /// Its destination is in a range of cluster IPs, and no Service has it.
    Unallocated {
        /// The range.
        range: IpNet,
    },
    /// Its port is a node port, and its destination no address on which node ports answer.
    NodePortElsewhere {
        /// Whose node port it is.
        service: ServicePortName,
        /// The node port.
        frontend: Frontend,
        /// Where node ports answer.
        addresses: NodePortMatch,
    },
    /// No Service has its destination.
    NoFrontend,
}

/// The frontend that a packet is for and what follows from it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Matched {
    /// The Service port.
    pub service: ServicePortName,
    /// The frontend.
    pub frontend: Frontend,
    /// What the frontend is.
    pub kind: FrontendKind,
    /// The Service's traffic policy for this kind of frontend.
    pub policy: TrafficPolicy,
    /// What the table does with it.
    pub ruling: Ruling,
    /// Endpoints of the Service port that may not be chosen, and why.
    pub left_out: Vec<(Target, LeftOut)>,
    /// For how long a client stays with the endpoint that it was given.
    pub affinity: Option<Duration>,
    /// Other Services that claim the same frontend, in vain.
    pub losers: Vec<NamespacedName>,
}

/// What the table does with a packet for a frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ruling {
    /// The source is not in the Service's `loadBalancerSourceRanges`: dropped.
    SourceRange(SourceRanges),
    /// No endpoint is usable, neither here nor elsewhere: refused.
    NoEndpoints,
    /// Usable endpoints exist, but none on this node, and the policy is Local: dropped.
    NoLocalEndpoints,
    /// Translated to one of the endpoints.
    Forward {
        /// Under which policy endpoints are chosen. The Cluster one although the Service's is Local
        /// for pods and for the node itself, which are short-circuited.
        policy: TrafficPolicy,
        /// Whether the source is rewritten whichever endpoint is chosen, and why.
        source: Source,
        /// Endpoints that may be chosen, all with the same probability.
        endpoints: Vec<Choice>,
    },
}

/// An endpoint that may be chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The endpoint.
    pub target: Target,
    /// Whether the source is rewritten if this one is chosen.
    pub masquerade: bool,
    /// Whether it would meet its own packet: then the source is rewritten in any case.
    pub hairpin: bool,
}

/// Whether a packet's source is rewritten to an address of this node, hairpins apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// It is.
    Masqueraded(Masquerade),
    /// It stays.
    Kept(Kept),
}

/// Why a source is rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Masquerade {
    /// Everything that goes to a cluster IP is (`masqueradeAll`).
    All,
    /// The packet goes to a cluster IP and does not come from a pod.
    OffCluster,
    /// The packet comes in from outside for a Service whose external policy is Cluster.
    ExternalCluster,
    /// The node itself uses an external address of a Service whose external policy is Local.
    NodeUnderLocal,
}

/// Why a source stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kept {
    /// It is a pod, to which answers find their way.
    Pod,
    /// It is a pod; it is short-circuited under an external policy of Local.
    PodUnderLocal,
    /// Nothing tells what is a pod and what is off-cluster, so nothing is taken for off-cluster.
    NoDetector,
    /// The external policy is Local, which keeps clients' addresses.
    ExternalLocal,
}

/// The verdict alone, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    /// Translated to an endpoint.
    Forward,
    /// Silently discarded.
    Drop,
    /// Refused with an error to the client.
    Reject,
    /// Not the proxy's business.
    None,
}

/// What becomes of a packet, for programs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Fate {
    /// What becomes of it.
    pub verdict: VerdictKind,
    /// Endpoints that may be chosen, sorted as texts.
    pub endpoints: Vec<String>,
    /// Whether the source is rewritten for any of them.
    pub masquerade: bool,
}

impl From<&Outcome> for Fate {
    fn from(outcome: &Outcome) -> Self {
        let of = |verdict| Self { verdict, endpoints: Vec::new(), masquerade: false };
        match outcome {
            Outcome::Forward(list) => {
                let mut endpoints: Vec<String> = list.iter().map(|(e, _)| e.to_string()).collect();
                endpoints.sort_unstable();
                let masquerade = list.iter().any(|(_, masquerade)| *masquerade);
                Self { verdict: VerdictKind::Forward, endpoints, masquerade }
            }
            Outcome::Reject => of(VerdictKind::Reject),
            Outcome::Drop => of(VerdictKind::Drop),
            Outcome::None => of(VerdictKind::None),
        }
    }
}

/// Says what becomes of a packet and why.
///
/// `compiler` is what was made of `store`; the packet's destination says which family's table is
/// asked.
pub fn explain(store: &Store, compiler: &Compiler, packet: &Packet) -> Explanation {
    let table = compiler.table(IpFamily::of(packet.destination));
    let class = source_class(table, packet);
    let cause = match frontend_of(table, packet) {
        Some((port, entry)) => {
            Cause::Frontend(Box::new(matched(store, compiler, table, packet, class, port, entry)))
        }
        None => missed(table, packet),
    };
    Explanation {
        packet: packet.clone(),
        outcome: walk(table, packet).outcome,
        class,
        detector: table.node().local_detector.clone(),
        cause,
    }
}

fn matched(
    store: &Store,
    compiler: &Compiler,
    table: &ForwardingTable,
    packet: &Packet,
    class: SourceClass,
    port: &PortEntry,
    entry: &FrontendEntry,
) -> Matched {
    let policy = match (store.service(&port.name.service), entry.kind) {
        (Some(service), FrontendKind::ClusterIp) => service.internal_policy,
        (Some(service), _) => service.external_policy,
        (None, _) => TrafficPolicy::Cluster,
    };
    let ruling = ruling(table, packet, class, policy, port, entry);
    // Under which policy an endpoint had to qualify.
    let chosen_by = match &ruling {
        Ruling::SourceRange(_) => None,
        Ruling::NoEndpoints => Some(TrafficPolicy::Cluster),
        Ruling::NoLocalEndpoints => Some(TrafficPolicy::Local),
        Ruling::Forward { policy, .. } => Some(*policy),
    };
    let left_out = chosen_by.map(|policy| left_out(store, compiler, table.family(), port, policy));
    let conflicts = table.conflicts_of(&port.name.service).into_iter();
    let mut losers: Vec<NamespacedName> = conflicts
        .filter(|c| c.frontend == entry.frontend && c.loser != port.name.service)
        .map(|c| c.loser)
        .collect();
    losers.sort_unstable();
    losers.dedup();
    Matched {
        service: port.name.clone(),
        frontend: entry.frontend,
        kind: entry.kind,
        policy,
        ruling,
        left_out: left_out.unwrap_or_default(),
        affinity: port.affinity,
        losers,
    }
}

fn ruling(
    table: &ForwardingTable,
    packet: &Packet,
    class: SourceClass,
    policy: TrafficPolicy,
    port: &PortEntry,
    entry: &FrontendEntry,
) -> Ruling {
    if let Some(guard) = &entry.source_ranges
        && !guard.allow(packet.source, packet.destination)
    {
        return Ruling::SourceRange((**guard).clone());
    }
    match entry.verdict(class) {
        Verdict::Reject => Ruling::NoEndpoints,
        Verdict::Drop => Ruling::NoLocalEndpoints,
        Verdict::Forward { policy: chosen_by, masquerade } => {
            let internal = entry.kind == FrontendKind::ClusterIp;
            let source = match (masquerade, internal) {
                (true, true) if table.node().masquerade_all => Source::Masqueraded(Masquerade::All),
                (true, true) => Source::Masqueraded(Masquerade::OffCluster),
                (true, false) if policy == TrafficPolicy::Local => {
                    Source::Masqueraded(Masquerade::NodeUnderLocal)
                }
                (true, false) => Source::Masqueraded(Masquerade::ExternalCluster),
                (false, true) if class == SourceClass::Pod => Source::Kept(Kept::Pod),
                (false, true) => Source::Kept(Kept::NoDetector),
                (false, false) if class == SourceClass::Pod => Source::Kept(Kept::PodUnderLocal),
                (false, false) => Source::Kept(Kept::ExternalLocal),
            };
            let endpoints = port.group(chosen_by).iter().map(|target| {
                let hairpin = crate::walk::hairpin(table, packet, target);
                Choice { target: *target, masquerade: masquerade || hairpin, hairpin }
            });
            Ruling::Forward { policy: chosen_by, source, endpoints: endpoints.collect() }
        }
    }
}

fn left_out(
    store: &Store,
    compiler: &Compiler,
    family: IpFamily,
    port: &PortEntry,
    policy: TrafficPolicy,
) -> Vec<(Target, LeftOut)> {
    let context = compiler.context();
    let name = &port.name;
    let slices = store.slices(&name.service);
    let candidates = endpoints::merge(slices, family, &name.port, name.protocol, &context.node_name);
    let reasons = endpoints::left_out(&candidates, policy, context);
    candidates.iter().zip(reasons).filter_map(|(c, reason)| Some((c.target, reason?))).collect()
}

fn missed(table: &ForwardingTable, packet: &Packet) -> Cause {
    let destination = packet.destination;
    let node = table.node();
    let node_port = Frontend { address: None, protocol: packet.protocol, port: packet.port };
    if node.is_local(destination) {
        return match table.frontend(&node_port) {
            Some((port, entry)) => Cause::NodePortElsewhere {
                service: port.name.clone(),
                frontend: entry.frontend,
                addresses: node.node_ports.clone(),
            },
            None => Cause::NoFrontend,
        };
    }
    if table.is_cluster_ip(destination) {
        let services = table.services().filter(|s| s.cluster_ip == destination);
        let frontends = table.frontends().map(|(_, entry)| entry.frontend);
        return Cause::UnknownPort {
            services: services.map(|s| s.name.clone()).collect(),
            frontends: frontends.filter(|f| f.address == Some(destination)).collect(),
        };
    }
    match table.service_cidrs().iter().find(|r| r.contains(&destination)) {
        Some(range) => Cause::Unallocated { range: *range },
        None => Cause::NoFrontend,
    }
}
