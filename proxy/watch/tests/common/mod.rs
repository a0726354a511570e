//! What the tests of both sources share.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::panic)]

use std::time::Duration;

use serde_json::{Value, json};
use shunt_core::id::NamespacedName;
use shunt_core::store::{Event, Store};
use shunt_harness::apiserver::ApiServer;
use shunt_watch::{KubeOptions, Problem, Update, WatchError, watch_kube};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// Longer than anything takes that goes well.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn service(name: &str, ip: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80}]},
    })
}

pub fn slice(name: &str, service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|a| json!({"addresses": [a]})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080}], "endpoints": endpoints,
    })
}

pub fn node(name: &str, zone: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

pub fn cidr(name: &str, range: &str) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": name}, "spec": {"cidrs": [range]}})
}

pub fn named(name: &str) -> NamespacedName {
    NamespacedName::new("ns", name)
}

pub fn options(server: &ApiServer) -> KubeOptions {
    KubeOptions {
        master: Some(server.url()),
        backoff_min: Duration::from_millis(10),
        backoff_max: Duration::from_millis(200),
        response_timeout: Duration::from_millis(500),
        ..KubeOptions::new("me")
    }
}

/// A running source and all that it has said.
pub struct Source {
    pub rx: mpsc::Receiver<Update>,
    pub task: JoinHandle<Result<(), WatchError>>,
    pub store: Store,
    pub log: Vec<Update>,
}

impl Source {
    pub fn kube(options: KubeOptions) -> Self {
        Self::of(|tx| watch_kube(options, tx))
    }

    pub fn of<F>(source: impl FnOnce(mpsc::Sender<Update>) -> F) -> Self
    where
        F: Future<Output = Result<(), WatchError>> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(16);
        Self { rx, task: tokio::spawn(source(tx)), store: Store::default(), log: Vec::new() }
    }

    /// The next update that is not about contact.
    pub async fn next(&mut self) -> Update {
        loop {
            let Some(update) = self.receive(PATIENCE).await else {
                panic!("no update; so far: {:#?}", self.log)
            };
            if !matches!(update, Update::Contact(_)) {
                return update;
            }
        }
    }

    pub async fn receive(&mut self, patience: Duration) -> Option<Update> {
        let update = timeout(patience, self.rx.recv()).await.ok().flatten()?;
        if let Update::Event(event) = &update {
            self.store.apply(event.clone());
        }
        self.log.push(update.clone());
        Some(update)
    }

    /// Receives until `wanted`.
    pub async fn until(&mut self, what: &str, wanted: impl Fn(&Self) -> bool) {
        while !wanted(self) {
            let more = self.receive(PATIENCE).await.is_some();
            assert!(more, "waited for {what}; so far: {:#?}", self.log);
        }
    }

    pub async fn synced(&mut self) {
        self.until("Synced", |s| s.log.contains(&Update::Synced)).await;
    }

    /// Nothing but contact for a while.
    pub async fn quiet(&mut self) {
        let end = Instant::now() + Duration::from_millis(150);
        while let Some(update) = self.receive(end.saturating_duration_since(Instant::now())).await {
            assert!(matches!(update, Update::Contact(_)), "unexpected: {update:?}");
        }
    }

    pub fn problems(&self) -> Vec<&Problem> {
        self.log.iter().filter_map(|u| if let Update::Problem(p) = u { Some(p) } else { None }).collect()
    }

    pub fn events(&self) -> Vec<&Event> {
        self.log.iter().filter_map(|u| if let Update::Event(e) = u { Some(e) } else { None }).collect()
    }

    pub fn has(&self, name: &str) -> bool {
        self.store.service(&named(name)).is_some()
    }

    pub fn lost(&self) -> usize {
        self.log.iter().filter(|u| matches!(u, Update::Contact(c) if c.lost.is_some())).count()
    }

    pub fn endpoints(&self, service: &str) -> Vec<String> {
        let service = named(service);
        let slices = self.store.slices(&service);
        slices.flat_map(|s| s.endpoints.iter().map(|e| e.address.to_string())).collect()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.task.abort();
    }
}
