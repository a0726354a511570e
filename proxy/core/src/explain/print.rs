//! Explanations in words.

use std::fmt;

use super::{Cause, Choice, Explanation, Kept, Masquerade, Matched, Ruling, Source};
use crate::compile::endpoints::LeftOut;
use crate::node::LocalDetector;
use crate::service::TrafficPolicy;
use crate::table::{FrontendKind, NodePortMatch, SourceClass, Target};
use crate::walk::Outcome;

impl fmt::Display for Masquerade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "masquerade-all is set",
            Self::OffCluster => "the source is no pod of the cluster, and answers must come back this way",
            Self::ExternalCluster => {
                "external traffic under externalTrafficPolicy Cluster, whose answers must come back this way"
            }
            Self::NodeUnderLocal => {
                "the node itself under externalTrafficPolicy Local may be sent to any endpoint"
            }
        })
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod | Self::PodUnderLocal => "the source is a pod of the cluster",
            Self::NoDetector => {
                "nothing tells pods from off-cluster sources (no clusterCIDR or other local detector)"
            }
            Self::ExternalLocal => "externalTrafficPolicy Local keeps the client's address",
        })
    }
}

/// Items with commas between them.
struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

fn place(target: &Target) -> String {
    if target.local { format!("{target} (here)") } else { target.to_string() }
}

const fn policy_field(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "internalTrafficPolicy",
        FrontendKind::ExternalIp | FrontendKind::LoadBalancer | FrontendKind::NodePort => {
            "externalTrafficPolicy"
        }
    }
}

const fn policy_name(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    }
}

impl Matched {
    /// The frontend and whose it is.
    fn frontend_text(&self) -> String {
        format!("{} {} of Service {}", self.kind, self.frontend, self.service)
    }

    /// The policy, and where it is bent.
    fn policy_text(&self, class: SourceClass) -> String {
        let policy = format!("{} {}", policy_field(self.kind), policy_name(self.policy));
        match (self.policy, &self.ruling) {
            (TrafficPolicy::Local, Ruling::Forward { policy: TrafficPolicy::Cluster, .. }) => {
                let who = if class == SourceClass::Pod { "pods" } else { "the node itself" };
                format!("{policy}, which does not bind {who}: any endpoint of the cluster")
            }
            _ => policy,
        }
    }

    /// Whether the source is rewritten, and why.
    fn source_text(&self) -> Option<String> {
        let Ruling::Forward { source, endpoints, .. } = &self.ruling else { return None };
        let mine: Vec<&Choice> = endpoints.iter().filter(|c| c.hairpin).collect();
        Some(match (source, mine.first()) {
            (Source::Masqueraded(why), None) => format!("yes: {why}"),
            (Source::Masqueraded(why), Some(own)) => {
                format!("yes: {why}; and {} would meet its own packet (hairpin)", own.target)
            }
            (Source::Kept(why), None) => format!("no: {why}"),
            (Source::Kept(_), Some(own)) if endpoints.len() == 1 => {
                format!("yes: {} meets its own packet (hairpin)", own.target)
            }
            (Source::Kept(why), Some(own)) => format!(
                "depends on the pick: yes if {} is chosen, which meets its own packet (hairpin); otherwise no: {why}",
                own.target
            ),
        })
    }

    /// Endpoints that are left out, by reason, each as `endpoints: reason`.
    fn left_out_texts(&self) -> Vec<String> {
        const ALL: [LeftOut; 5] = [
            LeftOut::NotReady,
            LeftOut::Terminating,
            LeftOut::OtherNode,
            LeftOut::OtherZone,
            LeftOut::NotLocal,
        ];
        ALL.iter()
            .filter_map(|reason| {
                let of: Vec<String> =
                    self.left_out.iter().filter(|(_, r)| r == reason).map(|(t, _)| place(t)).collect();
                (!of.is_empty()).then(|| format!("{}: {reason}", List(&of)))
            })
            .collect()
    }

    /// Why a packet for this frontend is not forwarded.
    fn refusal(&self) -> Option<String> {
        match &self.ruling {
            Ruling::SourceRange(guard) => {
                let ranges: Vec<_> = guard.ranges.iter().collect();
                Some(format!("the source is not in loadBalancerSourceRanges ({})", List(&ranges)))
            }
            Ruling::NoEndpoints if self.left_out.is_empty() => Some("the Service has no endpoint".to_owned()),
            Ruling::NoEndpoints => Some("no endpoint of the Service is usable".to_owned()),
            Ruling::NoLocalEndpoints => {
                Some(format!("no endpoint on this node is usable, and {} is Local", policy_field(self.kind)))
            }
            Ruling::Forward { .. } => None,
        }
    }
}

impl Cause {
    /// Why a packet that matched no frontend is treated as it is.
    fn miss(&self) -> Option<String> {
        Some(match self {
            Self::Frontend(_) => return None,
            Self::UnknownPort { services, frontends } => format!(
                "a cluster IP of Service {}, which has no such port; it has {}",
                List(services),
                if frontends.is_empty() { "none".to_owned() } else { List(frontends).to_string() }
            ),
            Self::Unallocated { range } => {
                format!("in the range of cluster IPs {range}, but no Service has this address")
            }
            Self::NodePortElsewhere { service, frontend, addresses } => {
                let answer = match addresses {
                    NodePortMatch::AllLocal => "on all addresses of the node but loopback".to_owned(),
                    NodePortMatch::Addresses(a) if a.is_empty() => "nowhere".to_owned(),
                    NodePortMatch::Addresses(a) => {
                        format!("only on {}", List(&a.iter().collect::<Vec<_>>()))
                    }
                };
                format!(
                    "{}/{} is a node port of Service {service}, but node ports answer {answer} (nodePortAddresses)",
                    frontend.port, frontend.protocol
                )
            }
            Self::NoFrontend => "no Service has this address, port and protocol".to_owned(),
        })
    }
}

impl Explanation {
    /// The frontend that matched, if any: `address:port/protocol`, or `node:port/protocol`.
    pub fn frontend(&self) -> Option<String> {
        match &self.cause {
            Cause::Frontend(matched) => Some(matched.frontend.to_string()),
            _ => None,
        }
    }

    /// Everything that decided, in one line.
    pub fn reason(&self) -> String {
        let Cause::Frontend(matched) = &self.cause else {
            return self.cause.miss().unwrap_or_default();
        };
        let mut parts = vec![matched.frontend_text()];
        parts.extend(matched.refusal());
        if !matches!(matched.ruling, Ruling::SourceRange(_)) {
            parts.push(matched.policy_text(self.class));
        }
        if let Some(text) = matched.source_text() {
            parts.push(format!("masquerade {text}"));
        }
        let left_out = matched.left_out_texts();
        if !left_out.is_empty() {
            parts.push(format!("left out: {}", left_out.join("; ")));
        }
        parts.join("; ")
    }

    /// What the source is to this node, and what tells.
    fn class_text(&self) -> String {
        let detector = match &self.detector {
            LocalDetector::None => None,
            LocalDetector::Cidr(ranges) => Some(("inside", "outside of", List(ranges).to_string())),
            LocalDetector::BridgeInterface(name) => {
                Some(("came in by", "did not come in by", name.to_string()))
            }
            LocalDetector::InterfaceNamePrefix(name) => {
                Some(("came in by", "did not come in by", format!("{name}*")))
            }
        };
        match (self.class, detector) {
            (SourceClass::Pod, Some((inside, _, what))) => format!("a pod: {inside} {what}"),
            (SourceClass::Pod, None) => "a pod".to_owned(),
            (SourceClass::Node, _) => "this node: one of its addresses".to_owned(),
            (SourceClass::Other, Some((_, outside, what))) => {
                format!("off-cluster: {outside} {what}, and no address of this node")
            }
            (SourceClass::Other, None) => {
                "unknown: no address of this node, and nothing is set to recognise pods by (clusterCIDR)"
                    .to_owned()
            }
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match &self.outcome {
            Outcome::Forward(endpoints) if endpoints.len() == 1 => "forward".to_owned(),
            Outcome::Forward(endpoints) => format!("forward to one of {} endpoints", endpoints.len()),
            Outcome::Reject => "reject: the client gets an error".to_owned(),
            Outcome::Drop => "drop: the client gets no answer".to_owned(),
            Outcome::None => "none: the packet is left alone".to_owned(),
        };
        writeln!(f, "{}: {verdict}", self.packet)?;
        let mut line = |name: &str, text: &str| writeln!(f, "  {name:<11} {text}");
        line("source", &self.class_text())?;
        let Cause::Frontend(matched) = &self.cause else {
            return line("because", &self.cause.miss().unwrap_or_default());
        };
        line("frontend", &matched.frontend_text())?;
        for loser in &matched.losers {
            line("", &format!("claimed by Service {loser}, too, which does not get it"))?;
        }
        if let Some(text) = matched.refusal() {
            line("because", &text)?;
        }
        if !matches!(matched.ruling, Ruling::SourceRange(_)) {
            line("policy", &matched.policy_text(self.class))?;
        }
        if let Ruling::Forward { endpoints, .. } = &matched.ruling {
            let list: Vec<String> = endpoints.iter().map(|c| place(&c.target)).collect();
            line("endpoints", &List(&list).to_string())?;
        }
        for (i, text) in matched.left_out_texts().iter().enumerate() {
            line(if i == 0 { "left out" } else { "" }, text)?;
        }
        if let Some(text) = matched.source_text() {
            line("masquerade", &text)?;
        }
        if let (Some(timeout), Ruling::Forward { .. }) = (matched.affinity, &matched.ruling) {
            line(
                "affinity",
                &format!(
                    "a client that was given an endpoint in the last {} s gets it again",
                    timeout.as_secs()
                ),
            )?;
        }
        Ok(())
    }
}
