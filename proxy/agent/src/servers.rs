//! The servers of health and metrics: started, and tried again every five seconds where a port is taken.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::anyhow;
use prometheus_client::registry::Registry;
use shunt_config::KubeProxyConfiguration;
use shunt_mode::Mode;
use shunt_node::health::Health;
use shunt_node::http::{Answer, Handler, Method, Server, StatusCode, answer, header, not_found};
use shunt_watch::{EventType, Notice, Regarding};
use tokio::sync::mpsc;

use crate::metrics::Metrics;
use crate::metrics::slis::Slis;
use crate::metrics::text::{OPENMETRICS, TEXT, classic};
use crate::settings::Settings;

/// Time between two tries to bind a port.
const RETRY: Duration = Duration::from_secs(5);
const PLAIN: &str = "text/plain; charset=utf-8";

/// Starts both servers in tasks of their own. Where binding must not fail, `failed` hears of it.
pub(crate) fn start(
    settings: &Settings,
    configuration: &KubeProxyConfiguration,
    health: &Health,
    metrics: &Metrics,
    registry: Registry,
    events: &mpsc::Sender<Notice>,
    failed: &mpsc::Sender<anyhow::Error>,
) -> Vec<tokio::task::JoinHandle<()>> {
    let counted = metrics.clone();
    let healthz = health.handler(move |endpoint, status| counted.health(endpoint, status == StatusCode::OK));
    let pages = Pages {
        registry,
        read: metrics.read.clone(),
        slis: Slis::default(),
        mode: settings.mode,
        configz: serde_json::json!({ "kubeproxy.config.k8s.io": configuration }).to_string(),
    };
    let pages: Handler = Arc::new(move |request| {
        let accept = request.headers().get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let reset = request.method() == Method::DELETE;
        pages.answer(request.uri().path(), request.uri().query().unwrap_or_default(), accept, reset)
    });
    let hard = settings.bind_address_hard_fail.then(|| failed.clone());
    let servers = [
        (settings.healthz_bind_address, healthz, "healthz", "FailedToStartProxierHealthcheck"),
        (settings.metrics_bind_address, pages, "metrics", "FailedToStartMetricServer"),
    ];
    servers
        .into_iter()
        .filter_map(|(address, handler, name, reason)| {
            let task = keep(address?, handler, name, reason, events.clone(), hard.clone());
            Some(tokio::spawn(task))
        })
        .collect()
}

/// Listens until it is aborted.
async fn keep(
    address: SocketAddr,
    handler: Handler,
    name: &'static str,
    reason: &'static str,
    events: mpsc::Sender<Notice>,
    hard: Option<mpsc::Sender<anyhow::Error>>,
) {
    let mut told = false;
    let _server = loop {
        let error = match Server::start(address, handler.clone()) {
            Ok(server) => break server,
            Err(error) => error,
        };
        let note = format!("failed to start {name} server on {address}: {error}");
        if let Some(hard) = hard {
            // Whoever listens ends the process.
            let _ = hard.send(anyhow!(note)).await;
            return;
        }
        if !told {
            told = true;
            tracing::error!("{note}; trying again every {RETRY:?}");
            // Nobody may be there to send it, or too much to send.
            let _ = events.try_send(Notice {
                regarding: Regarding::Node,
                event_type: EventType::Warning,
                reason,
                action: "StartKubeProxy",
                note,
            });
        }
        tokio::time::sleep(RETRY).await;
    };
    tracing::debug!(%address, "{name} server listens");
    std::future::pending::<()>().await;
}

/// What the metrics server shows.
struct Pages {
    registry: Registry,
    /// Set when they are read.
    read: Arc<AtomicBool>,
    slis: Slis,
    mode: Mode,
    configz: String,
}

impl Pages {
    fn answer(&self, path: &str, query: &str, accept: &str, reset: bool) -> Answer {
        match path {
            "/metrics" => {
                let mut text = String::new();
                let written = prometheus_client::encoding::text::encode(&mut text, &self.registry);
                self.read.store(true, Ordering::Relaxed);
                metrics(written.is_ok().then_some(text), accept)
            }
            "/metrics/slis" if reset => {
                self.slis.reset();
                answer(StatusCode::OK, PLAIN, "metrics reset\n")
            }
            "/metrics/slis" => metrics(self.slis.text(), accept),
            "/proxyMode" => answer(StatusCode::OK, PLAIN, self.mode.name()),
            "/configz" => answer(StatusCode::OK, "application/json", self.configz.clone()),
            "/healthz" | "/healthz/ping" => {
                self.slis.succeeded();
                let verbose = query.split('&').any(|q| q == "verbose" || q.starts_with("verbose="));
                let all =
                    if path == "/healthz" && verbose { "[+]ping ok\nhealthz check passed\n" } else { "ok" };
                answer(StatusCode::OK, PLAIN, all)
            }
            _ => not_found(),
        }
    }
}

/// What was written as `OpenMetrics`, in the format that is accepted.
fn metrics(text: Option<String>, accept: &str) -> Answer {
    let Some(text) = text else {
        return answer(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "metrics cannot be written\n");
    };
    if accept.contains("application/openmetrics-text") {
        answer(StatusCode::OK, OPENMETRICS, text)
    } else {
        answer(StatusCode::OK, TEXT, classic(&text))
    }
}
