//! The node's own Node, and `ServiceCIDR`s.

use ipnet::IpNet;
use shunt_core::node::{Node, TAINT_TO_BE_DELETED};
use shunt_core::store::Event;

use super::service::not_an_address;
use super::{Converter, Report};
use crate::address::{parse_ip, parse_net};
use crate::kind::Kind;
use crate::wire;

impl Converter {
    pub(super) fn node(&mut self, object: &wire::Node<'_>, report: &mut Report) -> Event {
        let meta = &object.metadata;
        let mut addresses = Vec::new();
        for wanted in ["InternalIP", "ExternalIP"] {
            for (i, address) in object.status.addresses.iter().enumerate() {
                let Some(address) = address.as_ref().filter(|a| &*a.type_ == wanted) else { continue };
                match parse_ip(&address.address) {
                    Some(ip) => addresses.push(ip),
                    None => {
                        report
                            .add(format!("status.addresses[{i}].address"), not_an_address(&address.address));
                    }
                }
            }
        }
        let pod_cidrs = if object.spec.pod_cidrs.iter().flatten().next().is_some() {
            ranges(&object.spec.pod_cidrs, "spec.podCIDRs", report)
        } else if object.spec.pod_cidr.is_empty() {
            Vec::new()
        } else {
            ranges(&vec![Some(object.spec.pod_cidr.clone())], "spec.podCIDR", report)
        };
        let tainted = object.spec.taints.iter().flatten().any(|taint| &*taint.key == TAINT_TO_BE_DELETED);
        let zone = meta.labels.zone.as_ref().filter(|zone| !zone.is_empty());
        Event::Node(Node {
            name: self.interner.text(&meta.name),
            zone: zone.map(|zone| self.interner.text(zone)),
            addresses,
            pod_cidrs,
            eligible: meta.deletion_timestamp.is_none() && !tainted,
        })
    }

    pub(super) fn service_cidr(&mut self, object: &wire::ServiceCidr<'_>, report: &mut Report) -> Event {
        let name = self.own_name(Kind::ServiceCidr, &object.metadata).name;
        Event::ServiceCidr(name, ranges(&object.spec.cidrs, "spec.cidrs", report))
    }
}

fn ranges(texts: &wire::List<wire::Text<'_>>, field: &str, report: &mut Report) -> Vec<IpNet> {
    let mut ranges = Vec::with_capacity(texts.len());
    for (i, text) in texts.iter().enumerate() {
        let Some(text) = text else { continue };
        match parse_net(text) {
            Some(range) => ranges.push(range),
            None => report.add(format!("{field}[{i}]"), format!("{:?} is not an IP range: ignored", &**text)),
        }
    }
    ranges
}
