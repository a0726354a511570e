//! `healthCheckNodePort`: a server for each Service with `externalTrafficPolicy: Local`, by which load
//! balancers learn whether this node has endpoints (kubernetes 1.36,
//! `pkg/proxy/healthcheck/service_health.go`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::header::HeaderValue;
use shunt_core::health::HealthCheck;
use shunt_core::id::NamespacedName;

use super::{Health, JSON};
use crate::http::{Answer, Handler, Server, StatusCode, answer};

/// A port that could not be opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceHealthError {
    /// The Service.
    pub service: NamespacedName,
    /// Its port.
    pub port: u16,
    /// Why not.
    pub reason: String,
}

/// One Service: its count of endpoints, and its servers by where they listen.
#[derive(Debug, Default)]
struct Check {
    endpoints: Arc<AtomicUsize>,
    servers: BTreeMap<SocketAddr, Server>,
}

/// The servers of all Services, for one family.
#[derive(Debug)]
pub struct ServiceHealth {
    health: Health,
    checks: BTreeMap<NamespacedName, Check>,
}

impl ServiceHealth {
    /// No servers yet.
    pub const fn new(health: Health) -> Self {
        Self { health, checks: BTreeMap::new() }
    }

    /// Makes the servers be those of `desired`, listening on `addresses`; those that are right already
    /// go on undisturbed. What cannot be opened is answered, and tried again with the next call.
    pub fn sync(
        &mut self,
        desired: &BTreeMap<NamespacedName, HealthCheck>,
        addresses: &BTreeSet<IpAddr>,
    ) -> Vec<ServiceHealthError> {
        self.checks.retain(|name, _| desired.contains_key(name));
        let wanted = |check: &HealthCheck| -> BTreeSet<SocketAddr> {
            addresses.iter().map(|a| SocketAddr::new(*a, check.port)).collect()
        };
        // Close before opening: a port may have moved from one Service to another.
        for (name, check) in &mut self.checks {
            let wanted = desired.get(name).map(wanted).unwrap_or_default();
            check.servers.retain(|address, _| wanted.contains(address));
        }
        let mut errors = Vec::new();
        for (name, wants) in desired {
            let check = self.checks.entry(name.clone()).or_default();
            check.endpoints.store(wants.endpoints, Ordering::Relaxed);
            for address in wanted(wants) {
                if check.servers.contains_key(&address) {
                    continue;
                }
                match Server::start(address, handler(name, &check.endpoints, &self.health)) {
                    Ok(server) => {
                        check.servers.insert(address, server);
                    }
                    Err(error) => errors.push(ServiceHealthError {
                        service: name.clone(),
                        port: wants.port,
                        reason: format!("listen {address}: {error}"),
                    }),
                }
            }
        }
        errors
    }
}

fn handler(name: &NamespacedName, endpoints: &Arc<AtomicUsize>, health: &Health) -> Handler {
    let (name, endpoints, health) = (name.clone(), endpoints.clone(), health.clone());
    Arc::new(move |_| respond(&name, endpoints.load(Ordering::Relaxed), health.report().healthy))
}

fn respond(name: &NamespacedName, endpoints: usize, healthy: bool) -> Answer {
    let status = if endpoints > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
        name.namespace, name.name
    );
    let mut answer = answer(status, JSON, body);
    answer.headers_mut().insert("X-Load-Balancing-Endpoint-Weight", HeaderValue::from(endpoints));
    answer
}
