//! `EndpointSlice`s.

use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice, Hints, PodHash};
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::store::Event;

use super::service::not_an_address;
use super::{Converter, Report, port, protocol, time};
use crate::address::parse_ip;
use crate::kind::Kind;
use crate::wire;

impl Converter {
    pub(super) fn slice(&mut self, object: &wire::Slice<'_>, report: &mut Report) -> Event {
        let meta = &object.metadata;
        let name = self.own_name(Kind::EndpointSlice, meta);
        if meta.labels.headless {
            return Event::SliceGone(name);
        }
        let family = match &*object.address_type {
            "IPv4" => IpFamily::V4,
            "IPv6" => IpFamily::V6,
            "FQDN" => return Event::SliceGone(name),
            other => {
                report.add("addressType", format!("{other:?} is none of IPv4, IPv6, FQDN: slice ignored"));
                return Event::SliceGone(name);
            }
        };
        let Some(service) = meta.labels.service.as_ref().filter(|service| !service.is_empty()) else {
            report.add("metadata.labels[kubernetes.io/service-name]", "missing: slice ignored");
            return Event::SliceGone(name);
        };
        let trigger = meta.annotations.last_change_trigger.as_ref();
        let trigger =
            time(trigger, "metadata.annotations[endpoints.kubernetes.io/last-change-trigger-time]", report);
        Event::Slice(EndpointSlice {
            service: NamespacedName { namespace: name.namespace.clone(), name: self.interner.text(service) },
            ports: self.endpoint_ports(object, report),
            endpoints: self.endpoints(object, &name.namespace, family, report),
            name,
            family,
            last_change_trigger: trigger.map(jiff::Timestamp::as_millisecond),
        })
    }

    fn endpoint_ports(&mut self, object: &wire::Slice<'_>, report: &mut Report) -> Vec<EndpointPort> {
        let ports = object.ports.iter().enumerate().filter_map(|(i, p)| Some((i, p.as_ref()?)));
        ports
            .filter_map(|(i, p)| {
                let field = |name: &str| format!("ports[{i}].{name}");
                // The API means "all ports" by an absent number. No Service port can be matched
                // with that, so kube-proxy leaves it out, as well as 0.
                if p.port.unwrap_or(0) == 0 {
                    report.add(field("port"), "missing or 0: port ignored");
                    return None;
                }
                Some(EndpointPort {
                    // An absent name is "" after the API server's defaulting; manifests have
                    // not been through that.
                    name: self.interner.text(&p.name),
                    protocol: protocol(p.protocol.as_ref(), || field("protocol"), report)?,
                    port: port(p.port, || field("port"), report)?,
                })
            })
            .collect()
    }

    fn endpoints(
        &mut self,
        object: &wire::Slice<'_>,
        namespace: &str,
        family: IpFamily,
        report: &mut Report,
    ) -> Vec<Endpoint> {
        let mut endpoints = Vec::with_capacity(object.endpoints.len());
        for (i, endpoint) in object.endpoints.iter().enumerate() {
            let Some(endpoint) = endpoint else { continue };
            // Only the first address counts; consumers treat the others as the same endpoint.
            let Some(Some(text)) = endpoint.addresses.first() else { continue };
            let field = || format!("endpoints[{i}].addresses[0]");
            let Some(address) = parse_ip(text) else {
                report.add(field(), not_an_address(text));
                continue;
            };
            if IpFamily::of(address) != family {
                report.add(field(), format!("{address} is not an {family} address: ignored"));
                continue;
            }
            let default = Conditions::default();
            let given = &endpoint.conditions;
            endpoints.push(Endpoint {
                address,
                conditions: Conditions {
                    ready: given.ready.unwrap_or(default.ready),
                    serving: given.serving.unwrap_or(default.serving),
                    terminating: given.terminating.unwrap_or(default.terminating),
                },
                node: self.named(endpoint.node_name.as_ref()),
                zone: self.named(endpoint.zone.as_ref()),
                hints: self.hints(&endpoint.hints),
                pod: pod(&endpoint.target_ref, namespace),
            });
        }
        endpoints
    }

    fn named(&mut self, text: Option<&wire::Text<'_>>) -> Option<std::sync::Arc<str>> {
        text.filter(|text| !text.is_empty()).map(|text| self.interner.text(text))
    }

    fn hints(&mut self, hints: &wire::Hints<'_>) -> Option<std::sync::Arc<Hints>> {
        let mut names = |list: &wire::List<wire::Named<'_>>| -> Vec<_> {
            list.iter().flatten().map(|named| self.interner.text(&named.name)).collect()
        };
        let hints = Hints { zones: names(&hints.for_zones), nodes: names(&hints.for_nodes) };
        (hints != Hints::default()).then(|| self.interner.hints(hints))
    }
}

/// The pod that is referred to, unless it is in another namespace than the slice: no controller writes that.
fn pod(target: &wire::TargetRef<'_>, namespace: &str) -> Option<PodHash> {
    let here = target.namespace.is_empty() || *target.namespace == *namespace;
    (&*target.kind == "Pod" && here && !target.name.is_empty()).then(|| PodHash::of(&target.name))
}
