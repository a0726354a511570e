//! Which endpoints a Service port may choose, and why the others are left out.
//!
//! Follows kube-proxy's `CategorizeEndpoints` (pkg/proxy/topology.go), KEP-1669 (terminating
//! endpoints), KEP-2433 and KEP-3015 (topology hints).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::Context;
use crate::endpoint::{Conditions, EndpointSlice, Hints};
use crate::id::{IpFamily, Protocol};
use crate::service::TrafficPolicy;
use crate::table::{EndpointGroup, Target};

/// An endpoint of one Service port, merged from the slices.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Address and port, and whether it runs on this node.
    pub target: Target,
    /// Its conditions.
    pub conditions: Conditions,
    /// Its topology hints.
    pub hints: Option<Arc<Hints>>,
}

impl Candidate {
    const fn serving_terminating(&self) -> bool {
        self.conditions.serving && self.conditions.terminating
    }
}

/// Which endpoints are preferred because of topology hints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topology {
    /// Hints are absent or do not cover every ready endpoint, or none is for this place.
    Ignored,
    /// Those meant for this node.
    PreferSameNode,
    /// Those meant for this node's zone.
    PreferSameZone,
}

/// Why an endpoint is not chosen under a policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeftOut {
    /// Not ready, and not both serving and terminating.
    NotReady,
    /// Terminating while ready endpoints exist.
    Terminating,
    /// Its hints are for other nodes.
    OtherNode,
    /// Its hints are for other zones.
    OtherZone,
    /// It does not run on this node, which the Local policy asks for.
    NotLocal,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::Terminating => "terminating, while ready endpoints exist",
            Self::OtherNode => "its topology hint is for another node",
            Self::OtherZone => "its topology hint is for another zone",
            Self::NotLocal => "not on this node (traffic policy Local)",
        })
    }
}

/// Endpoints of a Service port by traffic policy.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Usable {
    /// For the Cluster policy, if it is used.
    pub cluster: Option<EndpointGroup>,
    /// For the Local policy, if it is used.
    pub local: Option<EndpointGroup>,
    /// Whether any usable endpoint exists anywhere.
    pub any: bool,
}

impl Usable {
    /// Candidates that terminate and still serve, but get no new flows.
    pub fn terminating(&self, candidates: &[Candidate]) -> EndpointGroup {
        let chosen = self.chosen();
        let left = candidates.iter().filter(|c| c.serving_terminating() && !chosen.contains(&c.target));
        left.map(|c| c.target).collect()
    }

    /// Candidates that get no new flows, but for those that are known as terminating.
    pub fn unused(&self, candidates: &[Candidate], terminating: &EndpointGroup) -> EndpointGroup {
        let mut used = self.chosen();
        used.extend(terminating.iter().copied());
        candidates.iter().map(|c| c.target).filter(|target| !used.contains(target)).collect()
    }

    fn chosen(&self) -> BTreeSet<Target> {
        [&self.cluster, &self.local].into_iter().flatten().flat_map(|group| group.iter().copied()).collect()
    }
}

/// Merges the slices of a Service into the endpoints of one port, sorted by address and port.
///
/// An address and port that stands in several slices counts once; the better condition wins:
/// not terminating, then ready, then serving, then local.
pub fn merge<'a>(
    slices: impl IntoIterator<Item = &'a Arc<EndpointSlice>>,
    family: IpFamily,
    port_name: &str,
    protocol: Protocol,
    node: &str,
) -> Vec<Candidate> {
    let mut found: BTreeMap<(IpAddr, u16), Candidate> = BTreeMap::new();
    for slice in slices {
        if slice.family != family {
            continue;
        }
        for port in slice.ports.iter().filter(|p| *p.name == *port_name && p.protocol == protocol) {
            for endpoint in &slice.endpoints {
                let candidate = Candidate {
                    target: Target {
                        address: endpoint.address,
                        port: port.port,
                        local: endpoint.node.as_deref() == Some(node),
                    },
                    conditions: endpoint.conditions,
                    hints: endpoint.hints.clone(),
                };
                let rank = |c: &Candidate| {
                    (!c.conditions.terminating, c.conditions.ready, c.conditions.serving, c.target.local)
                };
                let hints = |c: &Candidate| c.hints.clone();
                found
                    .entry((endpoint.address, port.port))
                    .and_modify(|kept| {
                        if (rank(&candidate), hints(&candidate)) > (rank(kept), hints(kept)) {
                            *kept = candidate.clone();
                        }
                    })
                    .or_insert(candidate);
            }
        }
    }
    found.into_values().collect()
}

/// How topology hints are to be used: only the ready endpoints are asked, and only if every one of
/// them has hints and at least one is for this node or zone.
pub fn topology(candidates: &[Candidate], node: &str, zone: Option<&str>) -> Topology {
    let mut ready = candidates.iter().filter(|c| c.conditions.ready).peekable();
    if ready.peek().is_none() {
        return Topology::Ignored;
    }
    let (mut all_nodes, mut this_node, mut all_zones, mut this_zone) = (true, false, true, false);
    for candidate in ready {
        let hints = candidate.hints.as_deref();
        let nodes = hints.map(|h| h.nodes.as_slice()).unwrap_or_default();
        let zones = hints.map(|h| h.zones.as_slice()).unwrap_or_default();
        all_nodes &= !nodes.is_empty();
        all_zones &= !zones.is_empty();
        this_node |= nodes.iter().any(|n| **n == *node);
        this_zone |= zone.is_some_and(|zone| zones.iter().any(|z| **z == *zone));
    }
    if all_nodes && this_node {
        Topology::PreferSameNode
    } else if all_zones && this_zone {
        Topology::PreferSameZone
    } else {
        Topology::Ignored
    }
}

/// Why each candidate is not chosen under a policy, in the order of the candidates; `None` for those
/// that are.
pub fn left_out(candidates: &[Candidate], policy: TrafficPolicy, context: &Context) -> Vec<Option<LeftOut>> {
    match policy {
        TrafficPolicy::Cluster => candidates.iter().map(cluster_filter(candidates, context)).collect(),
        TrafficPolicy::Local => candidates.iter().map(local_filter(candidates)).collect(),
    }
}

fn cluster_filter<'a>(
    candidates: &[Candidate],
    context: &'a Context,
) -> impl Fn(&Candidate) -> Option<LeftOut> + use<'a> {
    let node = &*context.node_name;
    let zone = context.zone.as_deref();
    let topology = topology(candidates, node, zone);
    // With hints in use at least one ready endpoint is for this place, so the preferred set is
    // empty only when nothing is ready at all.
    let any_ready = candidates.iter().any(|c| c.conditions.ready);
    move |candidate| {
        if !any_ready {
            return (!candidate.serving_terminating()).then_some(LeftOut::NotReady);
        }
        if !candidate.conditions.ready {
            let reason =
                if candidate.serving_terminating() { LeftOut::Terminating } else { LeftOut::NotReady };
            return Some(reason);
        }
        let hints = candidate.hints.as_deref();
        match topology {
            Topology::Ignored => None,
            Topology::PreferSameNode => {
                let here = hints.is_some_and(|h| h.nodes.iter().any(|n| **n == *node));
                (!here).then_some(LeftOut::OtherNode)
            }
            Topology::PreferSameZone => {
                let here = hints.is_some_and(|h| h.zones.iter().any(|z| Some(&**z) == zone));
                (!here).then_some(LeftOut::OtherZone)
            }
        }
    }
}

fn local_filter(candidates: &[Candidate]) -> impl Fn(&Candidate) -> Option<LeftOut> + use<> {
    let any_local_ready = candidates.iter().any(|c| c.target.local && c.conditions.ready);
    move |candidate| {
        if !candidate.target.local {
            return Some(LeftOut::NotLocal);
        }
        match (candidate.conditions.ready, candidate.serving_terminating(), any_local_ready) {
            (true, _, _) | (false, true, false) => None,
            (false, true, true) => Some(LeftOut::Terminating),
            (false, false, _) => Some(LeftOut::NotReady),
        }
    }
}

/// Sorts the endpoints of a Service port into the lists of the traffic policies in use.
pub fn categorize(
    candidates: &[Candidate],
    uses_cluster: bool,
    uses_local: bool,
    context: &Context,
) -> Usable {
    let mut usable = Usable::default();
    if uses_cluster {
        let left_out = cluster_filter(candidates, context);
        let list: EndpointGroup =
            candidates.iter().filter(|c| left_out(c).is_none()).map(|c| c.target).collect();
        usable.any = !list.is_empty();
        usable.cluster = Some(list);
    }
    if uses_local {
        let left_out = local_filter(candidates);
        usable.local = Some(candidates.iter().filter(|c| left_out(c).is_none()).map(|c| c.target).collect());
        usable.any |= candidates.iter().any(|c| c.conditions.ready || c.serving_terminating());
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An endpoint with hints for these nodes and zones, separated by commas; "-" for no hints at all.
    fn candidate(last: u8, ready: bool, nodes: &str, zones: &str) -> Candidate {
        let list = |text: &str| text.split(',').filter(|t| !t.is_empty()).map(Into::into).collect();
        let hints = (nodes != "-").then(|| Arc::new(Hints { nodes: list(nodes), zones: list(zones) }));
        Candidate {
            target: Target { address: IpAddr::from([10, 0, 0, last]), port: 80, local: false },
            conditions: Conditions { ready, ..Conditions::default() },
            hints,
        }
    }

    #[test]
    fn hints_count_only_if_every_ready_endpoint_has_them_and_one_is_for_here() {
        let here = ("here", Some("zone-a"));
        for (why, endpoints, (node, zone), expected) in [
            ("no endpoints", vec![], here, Topology::Ignored),
            ("no hints", vec![("-", "")], here, Topology::Ignored),
            ("for this node", vec![("here", ""), ("there", "")], here, Topology::PreferSameNode),
            ("one lacks node hints", vec![("here", ""), ("", "")], here, Topology::Ignored),
            ("the first lacks node hints", vec![("-", ""), ("here", "")], here, Topology::Ignored),
            ("all for other nodes", vec![("there", ""), ("where", "")], here, Topology::Ignored),
            ("for this zone", vec![("", "zone-a"), ("", "zone-b")], here, Topology::PreferSameZone),
            ("one of several zones", vec![("", "zone-b,zone-a")], here, Topology::PreferSameZone),
            ("one lacks zone hints", vec![("", "zone-a"), ("-", "")], here, Topology::Ignored),
            ("the first lacks zone hints", vec![("", ""), ("", "zone-a")], here, Topology::Ignored),
            ("all for other zones", vec![("", "zone-b"), ("", "zone-c")], here, Topology::Ignored),
            ("a node without a zone", vec![("", "zone-a")], ("here", None), Topology::Ignored),
            ("node before zone", vec![("here", "zone-a")], here, Topology::PreferSameNode),
            ("zone where nodes are others", vec![("there", "zone-a")], here, Topology::PreferSameZone),
        ] {
            let candidates: Vec<Candidate> =
                endpoints.iter().map(|(nodes, zones)| candidate(1, true, nodes, zones)).collect();
            assert_eq!(topology(&candidates, node, zone), expected, "{why}");
            // Endpoints that are not ready have no say.
            let mut with_unready = candidates;
            with_unready.push(candidate(2, false, "-", ""));
            assert_eq!(topology(&with_unready, node, zone), expected, "{why}, and one that is not ready");
        }
    }

    #[test]
    fn hinted_endpoints_are_the_only_ones_chosen() {
        let context =
            Context { zone: Some("zone-a".into()), ..Context::new("here", crate::node::Config::default()) };
        for (hints, expected) in [
            ([("here", ""), ("there", "")], [None, Some(LeftOut::OtherNode)]),
            ([("", "zone-a"), ("", "zone-b")], [None, Some(LeftOut::OtherZone)]),
            ([("-", ""), ("", "zone-b")], [None, None]),
        ] {
            let candidates: Vec<Candidate> =
                (1..).zip(hints).map(|(i, (nodes, zones))| candidate(i, true, nodes, zones)).collect();
            let left_out = cluster_filter(&candidates, &context);
            assert_eq!(candidates.iter().map(left_out).collect::<Vec<_>>(), expected, "{hints:?}");
        }
    }
}
