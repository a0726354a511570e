//! `/metrics/slis`: what the checks of `/healthz` on the metrics server gave (kubernetes 1.36,
//! `component-base/metrics/prometheus/slis`).

use std::sync::Mutex;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

type Labels<const N: usize> = [(&'static str, &'static str); N];
/// The check `ping`, which says that the server answers, and the page that asks for it.
const PING: Labels<2> = [("name", "ping"), ("type", "healthz")];

/// Results since the start, or since they were last reset.
#[derive(Debug, Default)]
pub(crate) struct Slis {
    results: Mutex<Results>,
}

#[derive(Clone, Debug, Default)]
struct Results {
    last: Family<Labels<2>, Gauge>,
    all: Family<Labels<3>, Counter>,
}

impl Slis {
    /// `/healthz` was asked for and answered.
    pub(crate) fn succeeded(&self) {
        if let Ok(results) = self.results.lock() {
            results.last.get_or_create(&PING).set(1);
            let [name, page] = PING;
            results.all.get_or_create(&[name, page, ("status", "success")]).inc();
        }
    }

    /// Forgets all results.
    pub(crate) fn reset(&self) {
        if let Ok(mut results) = self.results.lock() {
            *results = Results::default();
        }
    }

    /// As `OpenMetrics`; `None` if it cannot be written.
    pub(crate) fn text(&self) -> Option<String> {
        let results = self.results.lock().ok()?.clone();
        let mut registry = Registry::default();
        let r = registry.sub_registry_with_prefix("kubernetes");
        r.register("healthcheck", "This metric records the result of a single healthcheck", results.last);
        r.register("healthchecks", "This metric records the results of all healthcheck", results.all);
        let mut text = String::new();
        encode(&mut text, &registry).ok()?;
        Some(text)
    }
}
