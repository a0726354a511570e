//! API objects to the types of `shunt-core`: pure, and lenient field by field.
//!
//! The rules are kube-proxy's and the API's own defaults. Where a field cannot be used, the rest
//! of the object is, and a [`Problem`] says so; where dropping a field would open or empty a
//! Service, the answer is the closed one, or the object as it was.

use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use shunt_core::id::NamespacedName;
use shunt_core::store::Event;

use crate::intern::Interner;
use crate::kind::Kind;
use crate::problem::Problem;
use crate::wire;

mod node;
mod service;
mod slice;
#[cfg(test)]
mod tests;

/// What one object says.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Converted {
    /// Whose object it is; `None` for one without a usable name and for other nodes' Node objects.
    pub name: Option<NamespacedName>,
    /// The object, or that it is not (or no longer) ours. `None` when it cannot be told what the
    /// object says: whatever was known of it before should stay.
    pub event: Option<Event>,
    /// Fields that cannot be used.
    pub problems: Vec<Problem>,
}

/// Turns objects into events. Keeps strings that objects share, and nothing else.
#[derive(Debug)]
pub struct Converter {
    interner: Interner,
    node_name: Option<Arc<str>>,
    default_namespace: &'static str,
}

impl Converter {
    /// For objects of an API server; `node_name` tells which Node is ours.
    pub fn new(node_name: &str) -> Self {
        Self { interner: Interner::default(), node_name: Some(node_name.into()), default_namespace: "" }
    }

    /// For manifests: objects without a namespace are in `default`, as `kubectl apply` puts them;
    /// without a node name, every Node is ours.
    pub fn for_manifests(node_name: Option<&str>) -> Self {
        let node_name = node_name.map(Into::into);
        Self { interner: Interner::default(), node_name, default_namespace: "default" }
    }

    /// Converts the JSON text of an object. The resource version comes along for the watch.
    pub(crate) fn text(&mut self, kind: Kind, json: &str) -> (Converted, String) {
        fn read<'t, T: Deserialize<'t>>(
            me: &mut Converter,
            kind: Kind,
            json: &'t str,
            convert: fn(&mut Converter, &T, &mut Report) -> Event,
            meta: fn(&T) -> &wire::Meta<'_>,
        ) -> (Converted, String) {
            match serde_json::from_str::<T>(json) {
                Ok(object) => {
                    let version = meta(&object).resource_version.to_string();
                    (me.judge(kind, &object, convert, meta, Report::default(), false), version)
                }
                // Not even JSON: the caller knows only that, since RawValue has checked the syntax.
                Err(_) => match serde_json::from_str::<Value>(json) {
                    Ok(value) => {
                        let version = value
                            .pointer("/metadata/resourceVersion")
                            .and_then(Value::as_str)
                            .map(str::to_owned);
                        (me.value(kind, value), version.unwrap_or_default())
                    }
                    Err(error) => (nameless(kind, &error.to_string()), String::new()),
                },
            }
        }
        match kind {
            Kind::Service => read::<wire::Service<'_>>(self, kind, json, Self::service, |o| &o.metadata),
            Kind::EndpointSlice => read::<wire::Slice<'_>>(self, kind, json, Self::slice, |o| &o.metadata),
            Kind::Node => read::<wire::Node<'_>>(self, kind, json, Self::node, |o| &o.metadata),
            Kind::ServiceCidr => {
                read::<wire::ServiceCidr<'_>>(self, kind, json, Self::service_cidr, |o| &o.metadata)
            }
        }
    }

    /// Converts an object.
    pub fn value(&mut self, kind: Kind, mut object: Value) -> Converted {
        fn check<'v, T: Deserialize<'v>>(object: &'v Value) -> wire::Check {
            serde_path_to_error::deserialize::<_, T>(object).map(drop)
        }
        fn read<'v, T: Deserialize<'v>>(
            me: &mut Converter,
            kind: Kind,
            object: &'v Value,
            unfit: Vec<wire::Unfit>,
            convert: fn(&mut Converter, &T, &mut Report) -> Event,
            meta: fn(&T) -> &wire::Meta<'_>,
        ) -> Converted {
            let mut report = Report::default();
            let vital = unfit.iter().any(|u| u.vital);
            for u in unfit {
                report.add(u.field, u.message);
            }
            match T::deserialize(object) {
                Ok(object) => me.judge(kind, &object, convert, meta, report, vital),
                Err(error) => nameless(kind, &error.to_string()),
            }
        }
        match kind {
            Kind::Service => {
                let unfit = wire::repair(&mut object, |v| check::<wire::Service<'_>>(v));
                read::<wire::Service<'_>>(self, kind, &object, unfit, Self::service, |o| &o.metadata)
            }
            Kind::EndpointSlice => {
                let unfit = wire::repair(&mut object, |v| check::<wire::Slice<'_>>(v));
                read::<wire::Slice<'_>>(self, kind, &object, unfit, Self::slice, |o| &o.metadata)
            }
            Kind::Node => {
                let unfit = wire::repair(&mut object, |v| check::<wire::Node<'_>>(v));
                read::<wire::Node<'_>>(self, kind, &object, unfit, Self::node, |o| &o.metadata)
            }
            Kind::ServiceCidr => {
                let unfit = wire::repair(&mut object, |v| check::<wire::ServiceCidr<'_>>(v));
                read::<wire::ServiceCidr<'_>>(self, kind, &object, unfit, Self::service_cidr, |o| &o.metadata)
            }
        }
    }

    fn judge<T>(
        &mut self,
        kind: Kind,
        object: &T,
        convert: fn(&mut Self, &T, &mut Report) -> Event,
        meta: fn(&T) -> &wire::Meta<'_>,
        mut report: Report,
        vital: bool,
    ) -> Converted {
        let meta = meta(object);
        if kind == Kind::Node && self.node_name.as_deref().is_some_and(|own| *own != *meta.name) {
            return Converted::default();
        }
        let name = self.name(kind, meta);
        if name.is_none() {
            report.add("metadata.name", "missing: object ignored");
        }
        let event = match &name {
            Some(_) if !vital => Some(convert(self, object, &mut report)),
            Some(_) => {
                report.add("", "too much of it cannot be read: it stays as it was known before");
                None
            }
            None => None,
        };
        let shown = name.as_ref().map_or_else(|| "?".to_owned(), ToString::to_string);
        Converted { name, event, problems: report.problems(kind, &shown) }
    }

    fn name(&mut self, kind: Kind, meta: &wire::Meta<'_>) -> Option<NamespacedName> {
        if meta.name.is_empty() {
            return None;
        }
        let namespace = match (kind.namespaced(), &*meta.namespace) {
            (false, _) => "",
            (true, "") => self.default_namespace,
            (true, namespace) => namespace,
        };
        Some(NamespacedName { namespace: self.interner.text(namespace), name: (&*meta.name).into() })
    }

    fn own_name(&mut self, kind: Kind, meta: &wire::Meta<'_>) -> NamespacedName {
        self.name(kind, meta).unwrap_or_else(|| NamespacedName::new("", ""))
    }
}

fn nameless(kind: Kind, message: &str) -> Converted {
    let mut report = Report::default();
    report.add("", message);
    Converted { name: None, event: None, problems: report.problems(kind, "?") }
}

/// Collects what is wrong with one object, without its name.
#[derive(Default)]
struct Report(Vec<(String, String)>);

impl Report {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push((field.into(), message.into()));
    }

    fn problems(self, kind: Kind, name: &str) -> Vec<Problem> {
        let problem = |(field, message)| Problem { kind: kind.name(), name: name.to_owned(), field, message };
        self.0.into_iter().map(problem).collect()
    }
}

/// A port number of the API: absent or 0 is none, anything but 1 to 65535 a problem.
fn port(value: Option<i64>, field: impl FnOnce() -> String, report: &mut Report) -> Option<u16> {
    let value = value.unwrap_or(0);
    match u16::try_from(value) {
        Ok(0) => None,
        Ok(port) => Some(port),
        Err(_) => {
            report.add(field(), format!("{value} is not a port number: ignored"));
            None
        }
    }
}

/// A protocol of the API; absent means TCP.
fn protocol(
    value: Option<&wire::Text<'_>>,
    field: impl FnOnce() -> String,
    report: &mut Report,
) -> Option<shunt_core::id::Protocol> {
    match value.map(|text| &**text) {
        None | Some("") => Some(shunt_core::id::Protocol::Tcp),
        Some(text) => {
            text.parse().map_err(|error| report.add(field(), format!("{error}: port ignored"))).ok()
        }
    }
}

/// A time of the API (RFC 3339).
fn time(value: Option<&wire::Text<'_>>, field: &str, report: &mut Report) -> Option<Timestamp> {
    let text = value?;
    text.parse()
        .map_err(|error| report.add(field, format!("{:?} is not a time ({error}): ignored", &**text)))
        .ok()
}
