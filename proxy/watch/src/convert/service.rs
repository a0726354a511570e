//! Services.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use shunt_core::id::IpFamily;
use shunt_core::service::{
    ANNOTATION_ALGORITHM, ANNOTATION_CILIUM_ALGORITHM, Algorithm, Scheduler, Service, ServicePort,
    TrafficPolicy,
};
use shunt_core::store::Event;

use super::{Converter, Report, port, protocol, time};
use crate::address::{parse_ip, parse_net};
use crate::kind::Kind;
use crate::wire;

/// `sessionAffinityConfig.clientIP.timeoutSeconds` where it is absent: three hours.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// The longest that the API allows: a day.
const LONGEST_AFFINITY_SECONDS: u32 = 86_400;

impl Converter {
    pub(super) fn service(&mut self, object: &wire::Service<'_>, report: &mut Report) -> Event {
        let meta = &object.metadata;
        let spec = &object.spec;
        let name = self.own_name(Kind::Service, meta);
        let listed = || spec.cluster_ips.iter().flatten().map(|ip| &**ip).find(|ip| !ip.is_empty());
        let first = Some(&*spec.cluster_ip).filter(|ip| !ip.is_empty()).or_else(listed);
        // Another proxy's, headless, or a CNAME: nothing of it is ours, nor of what it was before.
        if meta.labels.other_proxy
            || meta.labels.headless
            || first.is_none_or(|ip| ip == "None")
            || &*spec.type_ == "ExternalName"
        {
            return Event::ServiceGone(name);
        }

        let created = time(meta.creation_timestamp.as_ref(), "metadata.creationTimestamp", report);
        let external_policy =
            policy(spec.external_traffic_policy.as_ref(), "spec.externalTrafficPolicy", report);
        // The API allocates this port for these Services only; kube-proxy looks at nothing else.
        let health_checked = &*spec.type_ == "LoadBalancer" && external_policy == TrafficPolicy::Local;
        Event::Service(Service {
            name,
            created: created.map_or(0, jiff::Timestamp::as_second),
            cluster_ips: cluster_ips(spec, report),
            external_ips: addresses(&spec.external_ips, "spec.externalIPs", report),
            load_balancer_ips: load_balancer_ips(&object.status, report),
            source_ranges: source_ranges(&spec.load_balancer_source_ranges, report),
            ports: self.service_ports(spec, report),
            internal_policy: policy(
                spec.internal_traffic_policy.as_ref(),
                "spec.internalTrafficPolicy",
                report,
            ),
            external_policy,
            affinity: affinity(spec, report),
            scheduler: scheduler(&meta.annotations, report),
            algorithm: algorithm(&meta.annotations, report),
            health_check_node_port: if health_checked {
                port(spec.health_check_node_port, || "spec.healthCheckNodePort".to_owned(), report)
            } else {
                None
            },
        })
    }

    fn service_ports(&mut self, spec: &wire::ServiceSpec<'_>, report: &mut Report) -> Vec<ServicePort> {
        let ports = spec.ports.iter().enumerate().filter_map(|(i, p)| Some((i, p.as_ref()?)));
        ports
            .filter_map(|(i, p)| {
                let field = |name: &str| format!("spec.ports[{i}].{name}");
                let protocol = protocol(p.protocol.as_ref(), || field("protocol"), report)?;
                if p.port.unwrap_or(0) == 0 {
                    report.add(field("port"), "missing or 0: port ignored");
                    return None;
                }
                Some(ServicePort {
                    name: self.interner.text(&p.name),
                    protocol,
                    port: port(p.port, || field("port"), report)?,
                    node_port: port(p.node_port, || field("nodePort"), report),
                })
            })
            .collect()
    }
}

/// `clusterIPs`, or `clusterIP` where an old object (or a hand-written one) has only that.
fn cluster_ips(spec: &wire::ServiceSpec<'_>, report: &mut Report) -> Vec<IpAddr> {
    if spec.cluster_ips.iter().flatten().all(|ip| ip.is_empty()) {
        return parse_ip(&spec.cluster_ip).map_or_else(
            || {
                report.add("spec.clusterIP", not_an_address(&spec.cluster_ip));
                Vec::new()
            },
            |ip| vec![ip],
        );
    }
    let mut ips: Vec<IpAddr> = Vec::with_capacity(spec.cluster_ips.len());
    for (i, text) in spec.cluster_ips.iter().enumerate() {
        let Some(text) = text else { continue };
        match parse_ip(text) {
            None => report.add(format!("spec.clusterIPs[{i}]"), not_an_address(text)),
            Some(ip) if ips.iter().any(|other| IpFamily::of(*other) == IpFamily::of(ip)) => report.add(
                format!("spec.clusterIPs[{i}]"),
                format!("{ip} is a second {} address: ignored", IpFamily::of(ip)),
            ),
            Some(ip) => ips.push(ip),
        }
    }
    ips
}

/// How IPVS should choose among endpoints: kube-router's annotations, so that moving is easy. A name that
/// no kernel knows would be refused there, with everything that goes with it.
fn scheduler(annotations: &wire::Annotations<'_>, report: &mut Report) -> Option<Arc<Scheduler>> {
    let name = annotations.scheduler.as_ref().map(|text| text.trim()).filter(|name| !name.is_empty())?;
    let Some(known) = Scheduler::KNOWN.into_iter().find(|known| *known == name) else {
        let field = "metadata.annotations[kube-router.io/service.scheduler]";
        report.add(field, format!("{name:?} is no scheduler of IPVS: ignored"));
        return None;
    };
    let mut flags = [false; 3];
    let words = annotations.scheduler_flags.as_ref().map_or("", |text| &**text);
    for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match Scheduler::flag(word) {
            Some(flag) => flags[flag] = true,
            None => report.add(
                "metadata.annotations[kube-router.io/service.schedflags]",
                format!("{word:?} is no flag of a scheduler: ignored"),
            ),
        }
    }
    Some(Arc::new(Scheduler { name: known.into(), flags }))
}

/// How endpoints should be chosen: by our annotation, else by Cilium's, so that moving is easy.
fn algorithm(annotations: &wire::Annotations<'_>, report: &mut Report) -> Option<Algorithm> {
    let ours = (ANNOTATION_ALGORITHM, &annotations.algorithm);
    let cilium = (ANNOTATION_CILIUM_ALGORITHM, &annotations.cilium_algorithm);
    [ours, cilium].into_iter().find_map(|(name, text)| match text.as_deref().map(str::trim)? {
        "random" => Some(Algorithm::Random),
        "maglev" => Some(Algorithm::Maglev),
        "" => None,
        other => {
            let message = format!("{other:?} is neither random nor maglev: ignored");
            report.add(format!("metadata.annotations[{name}]"), message);
            None
        }
    })
}

/// VIPs of the load balancer. A hostname is not ours to answer for; with `ipMode: Proxy` traffic
/// has to leave for the load balancer.
fn load_balancer_ips(status: &wire::ServiceStatus<'_>, report: &mut Report) -> Vec<IpAddr> {
    let entries = status.load_balancer.ingress.iter().enumerate();
    entries
        .filter_map(|(i, entry)| {
            let entry = entry.as_ref()?;
            let vip = entry.ip_mode.as_ref().is_none_or(|mode| &**mode == "VIP");
            if entry.ip.is_empty() || !vip {
                return None;
            }
            let ip = parse_ip(&entry.ip);
            if ip.is_none() {
                report.add(format!("status.loadBalancer.ingress[{i}].ip"), not_an_address(&entry.ip));
            }
            ip
        })
        .collect()
}

/// Source ranges. A range that cannot be read must not open what it was meant to close: where no
/// readable one is left of a family that it may have been of, one that matches nobody stands in.
fn source_ranges(texts: &wire::List<wire::Text<'_>>, report: &mut Report) -> Vec<IpNet> {
    let mut ranges: Vec<IpNet> = Vec::with_capacity(texts.len());
    let mut bad = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let trimmed = text.as_ref().map_or("", |text| text.trim());
        match parse_net(trimmed) {
            Some(range) => ranges.push(range),
            None => bad.push((i, trimmed)),
        }
    }
    let has = |family: IpFamily, ranges: &[IpNet]| ranges.iter().any(|r| IpFamily::of(r.addr()) == family);
    let given = ranges.clone();
    for (i, text) in bad {
        let mut closed = Vec::new();
        for (family, nobody) in [
            (IpFamily::V4, IpNet::from(IpAddr::from([255; 4]))),
            (IpFamily::V6, IpNet::from(IpAddr::from([0; 16]))),
        ] {
            let may_be = match family {
                IpFamily::V4 => !text.contains(':'),
                IpFamily::V6 => text.contains(':') || !text.contains('.'),
            };
            if may_be && !has(family, &given) {
                closed.push(family.to_string());
                if !ranges.contains(&nobody) {
                    ranges.push(nobody);
                }
            }
        }
        let consequence = if closed.is_empty() {
            String::new()
        } else {
            format!(
                "; no other range is left, so nobody may reach the {} load balancer addresses",
                closed.join(" and ")
            )
        };
        report.add(
            format!("spec.loadBalancerSourceRanges[{i}]"),
            format!("{text:?} is not an IP range: ignored{consequence}"),
        );
    }
    ranges
}

fn affinity(spec: &wire::ServiceSpec<'_>, report: &mut Report) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            report
                .add("spec.sessionAffinity", format!("{other:?} is neither ClientIP nor None: no affinity"));
            return None;
        }
    }
    let seconds = match spec.session_affinity_config.client_ip.timeout_seconds {
        None => DEFAULT_AFFINITY_SECONDS,
        Some(given) => {
            if let Ok(seconds @ 1..=LONGEST_AFFINITY_SECONDS) = u32::try_from(given) {
                seconds
            } else {
                report.add(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    format!(
                        "{given} is not 1 to {LONGEST_AFFINITY_SECONDS}: {DEFAULT_AFFINITY_SECONDS} used"
                    ),
                );
                DEFAULT_AFFINITY_SECONDS
            }
        }
    };
    Some(Duration::from_secs(seconds.into()))
}

fn policy(text: Option<&wire::Text<'_>>, field: &str, report: &mut Report) -> TrafficPolicy {
    match text.map(|text| &**text) {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            report.add(field, format!("{other:?} is neither Cluster nor Local: Cluster used"));
            TrafficPolicy::Cluster
        }
    }
}

fn addresses(texts: &wire::List<wire::Text<'_>>, field: &str, report: &mut Report) -> Vec<IpAddr> {
    let texts = texts.iter().enumerate().filter_map(|(i, text)| Some((i, text.as_ref()?)));
    texts
        .filter_map(|(i, text)| {
            let ip = parse_ip(text);
            if ip.is_none() {
                report.add(format!("{field}[{i}]"), not_an_address(text));
            }
            ip
        })
        .collect()
}

pub(super) fn not_an_address(text: &str) -> String {
    format!("{text:?} is not an IP address: ignored")
}
