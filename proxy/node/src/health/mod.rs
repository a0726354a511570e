//! Is the proxy well, and may load balancers send traffic here? kube-proxy's answers, byte for byte.
//!
//! ```text
//!   run loop ──queued, updated, node──> Health ──> /healthz, /livez
//!                                         │
//!   run loop ──checks of Services──> ServiceHealth ──> one server for each healthCheckNodePort
//! ```
//!
//! Health is judged when it is asked for: a run loop that hangs cannot hide it. Start reading at
//! [`state`], then [`service`].

pub mod service;
pub mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use shunt_core::id::IpFamily;

use crate::http::{Answer, Handler, StatusCode, answer, not_found};
use state::{Report, State};

/// Type of all health answers.
pub(crate) const JSON: &str = "application/json";

/// The health of the proxy, shared by the run loop, which tells, and the servers, which ask.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<Mutex<State>>,
}

impl Health {
    /// A proxy that is starting; it is ill when an update waits for `timeout`.
    pub fn new(timeout: Duration) -> Self {
        Self { state: Arc::new(Mutex::new(State::new(timeout))) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when a family's kernel lacks something; `None` when it is up to date.
    pub fn waiting(&self, family: IpFamily, since: Option<Instant>) {
        self.state().waiting(family, since);
    }

    /// A family's kernel was brought up to date.
    pub fn updated(&self, family: IpFamily) {
        self.state().updated(family, Timestamp::now());
    }

    /// Whether this node may get traffic from load balancers; not while its Node is unknown.
    pub fn node(&self, eligible: bool) {
        self.state().node_eligible = eligible;
    }

    /// How it is now.
    pub fn report(&self) -> Report {
        self.state().report(Instant::now(), Timestamp::now())
    }

    /// What answers at `healthzBindAddress`; `count` is told path and status of each answer.
    pub fn handler(&self, count: impl Fn(Endpoint, StatusCode) + Send + Sync + 'static) -> Handler {
        let health = self.clone();
        Arc::new(move |request| {
            let endpoint = match request.uri().path() {
                "/healthz" => Endpoint::Healthz,
                "/livez" => Endpoint::Livez,
                _ => return not_found(),
            };
            let (status, answer) = respond(&health.report(), endpoint);
            count(endpoint, status);
            answer
        })
    }
}

/// What can be asked of the health server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// `/healthz`: proxy and node.
    Healthz,
    /// `/livez`: the proxy alone.
    Livez,
}

fn respond(report: &Report, endpoint: Endpoint) -> (StatusCode, Answer) {
    let (healthy, body) = match endpoint {
        Endpoint::Healthz => (report.healthy && report.node_eligible, report.healthz()),
        Endpoint::Livez => (report.healthy, report.livez()),
    };
    let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, answer(status, JSON, body))
}
