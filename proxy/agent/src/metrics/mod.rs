//! Metrics: kube-proxy's, under its names, labels and buckets (kubernetes 1.36,
//! `pkg/proxy/metrics/metrics.go`), and our own, which begin with `shunt_`.
//!
//! The run loop writes, a scrape reads; neither waits for the other.

mod flows;
mod process;
mod register;
pub(crate) mod slis;
pub(crate) mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use shunt_core::id::{IpFamily, ServicePortName};
use shunt_mode::Mode;
use shunt_mode::driver::Report;
use shunt_node::conntrack::Report as FlowsReport;
use shunt_node::health::Endpoint;
use shunt_watch::{Answered, Kind};

use crate::connections::Count;
use flows::ServiceFlows;
use process::{CountedPackets, Process};
use register::register_features;

/// From clients, and to them.
const DIRECTIONS: [&str; 2] = ["request", "response"];

/// One label with a value that is always there.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident, $key:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub(crate) struct $name(pub &'static str);

        impl EncodeLabelSet for $name {
            fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
                [($key, self.0)].encode(encoder)
            }
        }
    };
}

label!(/** `code`: HTTP status. */ Code, "code");
label!(/** `ip_family`: `IPv4` or `IPv6`. */ OfFamily, "ip_family");
label!(/** `kind` of an object. */ OfKind, "kind");

/// `ip_family` and another label.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct FamilyAnd(IpFamily, (&'static str, &'static str));

impl EncodeLabelSet for FamilyAnd {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        [("ip_family", family_name(self.0)), self.1].encode(encoder)
    }
}

/// A Service port, and perhaps another label.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct OfService(IpFamily, ServicePortName, Option<(&'static str, &'static str)>);

impl EncodeLabelSet for OfService {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        let Self(family, name, other) = self;
        [
            ("namespace", &*name.service.namespace),
            ("service", &*name.service.name),
            ("port", &*name.port),
            ("ip_family", family_name(*family)),
        ]
        .encode(encoder)?;
        // As the API writes it.
        [("protocol", name.protocol.to_string().to_uppercase())].encode(encoder)?;
        other.iter().try_for_each(|other| [*other].encode(encoder))
    }
}

/// An endpoint of a Service port.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct OfEndpoint(OfService, SocketAddr);

impl EncodeLabelSet for OfEndpoint {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder)?;
        [("endpoint", self.1.to_string())].encode(encoder)
    }
}

const fn family_name(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "IPv4",
        IpFamily::V6 => "IPv6",
    }
}

const fn of(family: IpFamily) -> OfFamily {
    OfFamily(family_name(family))
}

type FloatGauge = Gauge<f64, AtomicU64>;
type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// 1 ms, 2 ms, 4 ms ... 16.384 s.
fn sync_buckets() -> Histogram {
    Histogram::new((0..15).map(|n| 0.001 * f64::from(1 << n)))
}

/// A quarter of a second to five minutes: those of the network programming SLO.
fn programming_buckets() -> Histogram {
    let linear = |from: f64, step: f64, n: i32| (0..n).map(move |i| from + step * f64::from(i));
    Histogram::new(
        linear(0.25, 0.25, 2)
            .chain(linear(1.0, 1.0, 59))
            .chain(linear(60.0, 5.0, 12))
            .chain(linear(120.0, 30.0, 7)),
    )
}

/// 5 ms to a minute: those of client-go.
fn request_buckets() -> Histogram {
    Histogram::new([0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0])
}

/// 10 µs to about 5 s: phases of a sync are often shorter than a millisecond.
fn phase_buckets() -> Histogram {
    Histogram::new((0..10).map(|n| 0.00001 * f64::from(1 << (2 * n))))
}

/// All metrics.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Set whenever somebody reads them: what costs much is counted anew after that only.
    pub(crate) read: Arc<AtomicBool>,
    sync: Histograms<OfFamily>,
    full_sync: Histograms<OfFamily>,
    partial_sync: Histograms<OfFamily>,
    last_sync: Family<OfFamily, FloatGauge>,
    last_queued: Family<OfFamily, FloatGauge>,
    programming: Histograms<OfFamily>,
    endpoint_changes_pending: Gauge,
    endpoint_changes: Counter,
    service_changes_pending: Gauge,
    service_changes: Counter,
    no_local_endpoints: Family<FamilyAnd, Gauge>,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
    sync_failures: Family<OfFamily, Counter>,
    partial_failures: Family<OfFamily, Counter>,
    cleanup_failures: Family<OfFamily, Counter>,
    rules: Family<FamilyAnd, Gauge>,
    rules_written: Family<FamilyAnd, Gauge>,
    conntrack_sync: Histograms<OfFamily>,
    conntrack_deleted: Family<OfFamily, Counter>,
    requests: Family<[(&'static str, String); 3], Counter>,
    request_times: Histograms<[(&'static str, String); 2]>,
    phases: Histograms<FamilyAnd>,
    operations: Family<OfFamily, Counter>,
    drift: Family<OfFamily, Counter>,
    services: Family<OfFamily, Gauge>,
    table_entries: Family<FamilyAnd, Gauge>,
    table_capacity: Family<FamilyAnd, Gauge>,
    contact: Family<OfKind, FloatGauge>,
    connected: Family<OfKind, Gauge>,
    problems: Counter,
    not_programmed: Family<OfFamily, Gauge>,
    service_flows: ServiceFlows,
    endpoint_flows: Family<OfEndpoint, Counter>,
    service_connections: Family<OfService, Gauge>,
    service_bytes: Family<OfService, Gauge>,
    /// Which Service ports these two are shown for.
    service_names: Arc<Mutex<[BTreeSet<ServicePortName>; 2]>>,
}

impl Metrics {
    /// All metrics, and the registry from which they are read. `external_ips`: the feature gate `AllowServiceExternalIPs`.
    pub(crate) fn new(mode: Mode, external_ips: bool) -> (Self, Registry) {
        let histograms = |new: fn() -> Histogram| Family::new_with_constructor(new);
        let metrics = Self {
            // Whoever reads them first finds everything.
            read: Arc::new(AtomicBool::new(true)),
            sync: histograms(sync_buckets),
            full_sync: histograms(sync_buckets),
            partial_sync: histograms(sync_buckets),
            last_sync: Family::default(),
            last_queued: Family::default(),
            programming: histograms(programming_buckets),
            endpoint_changes_pending: Gauge::default(),
            endpoint_changes: Counter::default(),
            service_changes_pending: Gauge::default(),
            service_changes: Counter::default(),
            no_local_endpoints: Family::default(),
            healthz: Family::default(),
            livez: Family::default(),
            sync_failures: Family::default(),
            partial_failures: Family::default(),
            cleanup_failures: Family::default(),
            rules: Family::default(),
            rules_written: Family::default(),
            conntrack_sync: histograms(sync_buckets),
            conntrack_deleted: Family::default(),
            requests: Family::default(),
            request_times: Family::new_with_constructor(request_buckets),
            phases: Family::new_with_constructor(phase_buckets),
            operations: Family::default(),
            drift: Family::default(),
            services: Family::default(),
            table_entries: Family::default(),
            table_capacity: Family::default(),
            contact: Family::default(),
            connected: Family::default(),
            problems: Counter::default(),
            not_programmed: Family::default(),
            service_flows: ServiceFlows::default(),
            endpoint_flows: Family::default(),
            service_connections: Family::default(),
            service_bytes: Family::default(),
            service_names: Arc::default(),
        };
        let mut registry = Registry::default();
        metrics.register_kube_proxy(mode, &mut registry);
        metrics.register_own(mode, &mut registry);
        register_features(&mut registry, external_ips);
        registry.register_collector(Box::new(Process::default()));
        registry.register_collector(Box::new(CountedPackets(mode)));
        // What there is from the start is shown from the start.
        for family in IpFamily::ALL {
            drop(metrics.sync.get_or_create(&of(family)));
            drop(metrics.full_sync.get_or_create(&of(family)));
            drop(metrics.partial_sync.get_or_create(&of(family)));
            drop(metrics.programming.get_or_create(&of(family)));
            drop(metrics.drift.get_or_create(&of(family)));
            drop(metrics.sync_failures.get_or_create(&of(family)));
            drop(metrics.partial_failures.get_or_create(&of(family)));
            drop(metrics.cleanup_failures.get_or_create(&of(family)));
            drop(metrics.conntrack_sync.get_or_create(&of(family)));
            drop(metrics.conntrack_deleted.get_or_create(&of(family)));
            metrics.no_local_endpoints(family, [0, 0]);
        }
        (metrics, registry)
    }

    /// A sync of a family ended well.
    pub(crate) fn synced(&self, family: IpFamily, full: bool, report: &Report) {
        let total = report.observing + report.planning + report.applying;
        let which = if full { &self.full_sync } else { &self.partial_sync };
        self.sync.get_or_create(&of(family)).observe(total.as_secs_f64());
        which.get_or_create(&of(family)).observe(total.as_secs_f64());
        self.last_sync.get_or_create(&of(family)).set(now());
        let phases = [
            ("observe", report.observing),
            ("plan", report.planning),
            ("apply", report.applying),
            ("wait", report.waiting),
        ];
        for (phase, time) in phases {
            if time > Duration::ZERO {
                let phases = self.phases.get_or_create(&FamilyAnd(family, ("phase", phase)));
                phases.observe(time.as_secs_f64());
            }
        }
        self.operations.get_or_create(&of(family)).inc_by(report.operations as u64);
        let number = |n| i64::try_from(n).unwrap_or(i64::MAX);
        for rules in &report.rules {
            let labels = FamilyAnd(family, ("table", rules.table));
            self.rules.get_or_create(&labels).set(number(rules.total));
            self.rules_written.get_or_create(&labels).set(number(rules.written));
        }
    }

    /// A sync of a family failed; `partial` if it was one of a change.
    pub(crate) fn failed(&self, family: IpFamily, partial: bool) {
        self.sync_failures.get_or_create(&of(family)).inc();
        if partial {
            self.partial_failures.get_or_create(&of(family)).inc();
        }
    }

    /// A look at the kernel found this many differences that nobody asked for.
    pub(crate) fn drift(&self, family: IpFamily, operations: usize) {
        self.drift.get_or_create(&of(family)).inc_by(operations as u64);
    }

    /// Something waits for the next sync of a family.
    pub(crate) fn queued(&self, family: IpFamily) {
        self.last_queued.get_or_create(&of(family)).set(now());
    }

    /// Changes that were taken in and are not in the kernel yet.
    pub(crate) fn pending(&self, services: i64, endpoints: i64) {
        self.service_changes_pending.set(services);
        self.endpoint_changes_pending.set(endpoints);
    }

    /// A Service changed.
    pub(crate) fn service_change(&self) {
        self.service_changes.inc();
    }

    /// An `EndpointSlice` changed.
    pub(crate) fn endpoint_change(&self) {
        self.endpoint_changes.inc();
    }

    /// A change of endpoints that began at `trigger` (milliseconds since the epoch) is in the kernel.
    pub(crate) fn programmed(&self, family: IpFamily, trigger: i64) {
        let seconds = now() - std::time::Duration::from_millis(trigger.unsigned_abs()).as_secs_f64();
        self.programming.get_or_create(&of(family)).observe(seconds.max(0.0));
    }

    /// Ports with a Local policy and no local endpoint: internal, external.
    pub(crate) fn no_local_endpoints(&self, family: IpFamily, counts: [i64; 2]) {
        for (policy, count) in ["internal", "external"].into_iter().zip(counts) {
            self.no_local_endpoints.get_or_create(&FamilyAnd(family, ("traffic_policy", policy))).set(count);
        }
    }

    /// Size of the forwarding table.
    pub(crate) fn services(&self, family: IpFamily, count: usize) {
        self.services.get_or_create(&of(family)).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How full a table of the kernel is.
    pub(crate) fn table(&self, family: IpFamily, name: &'static str, entries: usize, limit: usize) {
        let labels = FamilyAnd(family, ("table", name));
        let number = |n| i64::try_from(n).unwrap_or(i64::MAX);
        self.table_entries.get_or_create(&labels).set(number(entries));
        self.table_capacity.get_or_create(&labels).set(number(limit));
    }

    /// The health server answered.
    pub(crate) fn health(&self, endpoint: Endpoint, ok: bool) {
        let family = match endpoint {
            Endpoint::Healthz => &self.healthz,
            Endpoint::Livez => &self.livez,
        };
        family.get_or_create(&Code(if ok { "200" } else { "503" })).inc();
    }

    /// Tracked flows were cleaned up.
    pub(crate) fn flows(&self, family: IpFamily, report: &FlowsReport, took: Duration) {
        self.conntrack_sync.get_or_create(&of(family)).observe(took.as_secs_f64());
        self.conntrack_deleted.get_or_create(&of(family)).inc_by(report.deleted_total());
    }

    /// The API server was heard from, or lost.
    pub(crate) fn contact(&self, kind: Kind, lost: bool) {
        self.connected.get_or_create(&OfKind(kind.name())).set(i64::from(!lost));
        if !lost {
            self.contact.get_or_create(&OfKind(kind.name())).set(now());
        }
    }

    /// Connections of a family, by Service port; of ports that are left out there are none.
    pub(crate) fn connections(&self, family: IpFamily, counts: &BTreeMap<ServicePortName, Count>) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let mut shown = self.shown(family);
        for (name, count) in counts {
            let set = |gauges: &Family<OfService, Gauge>, other, value| {
                gauges.get_or_create(&OfService(family, name.clone(), other)).set(number(value));
            };
            set(&self.service_connections, None, count.connections);
            set(&self.service_bytes, Some(("direction", "request")), count.bytes[0]);
            set(&self.service_bytes, Some(("direction", "response")), count.bytes[1]);
            shown.remove(name);
        }
        for name in shown {
            self.service_connections.remove(&OfService(family, name.clone(), None));
            for direction in DIRECTIONS {
                let direction = Some(("direction", direction));
                self.service_bytes.remove(&OfService(family, name.clone(), direction));
            }
        }
        if let Ok(mut all) = self.service_names.lock() {
            all[family as usize] = counts.keys().cloned().collect();
        }
    }

    /// Service ports of a family that have connections as far as was said.
    fn shown(&self, family: IpFamily) -> BTreeSet<ServicePortName> {
        self.service_names.lock().map(|all| all[family as usize].clone()).unwrap_or_default()
    }

    /// The API server answered, or not.
    pub(crate) fn answered(&self, answered: &Answered) {
        let Answered { method, host, status, took } = answered;
        let code = status.map_or_else(|| "<error>".to_owned(), |status| status.to_string());
        let of_request = [("code", code), ("method", method.clone()), ("host", host.clone())];
        self.requests.get_or_create(&of_request).inc();
        let of_time = [("verb", method.clone()), ("host", host.clone())];
        self.request_times.get_or_create(&of_time).observe(took.as_secs_f64());
    }

    /// So many things have no room in the kernel.
    pub(crate) fn not_programmed(&self, family: IpFamily, count: usize) {
        self.not_programmed.get_or_create(&of(family)).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// New flows to a Service port, forwarded, rejected and dropped, and bytes to it and from there since they were
    /// counted last.
    pub(crate) fn service_flows(
        &self,
        family: IpFamily,
        port: &ServicePortName,
        flows: [u64; 3],
        bytes: [u64; 2],
    ) {
        self.service_flows.add(family, port, flows, bytes);
    }

    /// A Service port is no more.
    pub(crate) fn no_service_flows(&self, family: IpFamily, port: &ServicePortName) {
        self.service_flows.remove(family, port);
    }

    /// New flows to an endpoint since they were counted last.
    pub(crate) fn endpoint_flows(
        &self,
        family: IpFamily,
        port: &ServicePortName,
        address: SocketAddr,
        flows: u64,
    ) {
        let labels = OfEndpoint(OfService(family, port.clone(), None), address);
        self.endpoint_flows.get_or_create(&labels).inc_by(flows);
    }

    /// An endpoint is no more.
    pub(crate) fn no_endpoint_flows(&self, family: IpFamily, port: &ServicePortName, address: SocketAddr) {
        self.endpoint_flows.remove(&OfEndpoint(OfService(family, port.clone(), None), address));
    }

    /// A field of an object cannot be used.
    pub(crate) fn problem(&self) {
        self.problems.inc();
    }
}

/// Seconds since the epoch.
pub(crate) fn now() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}
