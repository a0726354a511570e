//! From an `EndpointSlice` event at the API server until packets go to the new endpoint.
//!
//! ```text
//!   put(slice: A -> B) at t0 ──> program ──> kernel
//!   connect to the Service, again and again: refused by A ... accepted by B: t1
//! ```
//!
//! The Services that change are a hundred among all others. Each has one endpoint: one of a pair of
//! addresses of which one refuses connections and the other accepts them, so that the next connection tells
//! which one it met.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use super::Plan;
use crate::agent::{Agent, Api, Program};
use crate::bed::Bed;
use crate::cluster::{Cluster, Service};
use crate::load::silent_listener;

/// Services that change.
const PROBES: u8 = 100;
/// Port of their endpoints.
const PORT: u16 = 8090;
/// After so long a change counts as lost.
const PATIENCE: Duration = Duration::from_mins(1);
/// Services that change at once.
const BURST: usize = 1_000;

/// Changes at one rate.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Rate {
    /// Changes a second.
    pub per_second: u32,
    /// Changes measured.
    pub changes: u64,
    /// Event to kernel, ms: 50th, 90th, 99th percentile, longest.
    pub ms: [f64; 4],
    /// Processor time of 1,000 changes, tools included, s.
    pub cpu_s_per_1000: f64,
}

/// Changes among so many Services.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Churn {
    /// Which program.
    pub subject: String,
    /// Number of Services besides those that change.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// By rate.
    pub rates: Vec<Rate>,
    /// 1,000 Services change at once: until the last one is in the kernel, ms.
    pub burst_ms: f64,
    /// Processor time while nothing happens, ms a second.
    pub idle_ms_per_s: f64,
    /// How often the whole kernel state was read during all these changes; only Shunt says so.
    pub full_reads: Option<usize>,
}

fn frontend(probe: u8) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(10, 96, 250, probe + 1), 80)
}

fn endpoint(probe: u8, accepts: bool) -> Ipv4Addr {
    Ipv4Addr::new(10, 107, u8::from(accepts), probe + 1)
}

fn slice(probe: u8, accepts: bool) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("probe-{probe}-abcde"), "namespace": "probes",
            "labels": { "kubernetes.io/service-name": format!("probe-{probe}") },
        },
        "addressType": "IPv4",
        "ports": [{ "name": "http", "port": PORT, "protocol": "TCP" }],
        "endpoints": [{
            "addresses": [endpoint(probe, accepts)],
            "conditions": { "ready": true, "serving": true, "terminating": false },
            "nodeName": "node-7",
        }],
    })
}

/// The cluster with the Services that will change.
pub(super) fn with_probes(mut cluster: Cluster) -> Cluster {
    for probe in 0..PROBES {
        let address = *frontend(probe).ip();
        cluster.objects.push(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": format!("probe-{probe}"), "namespace": "probes" },
            "spec": {
                "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "type": "ClusterIP",
                "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": PORT }],
            },
        }));
        cluster.objects.push(slice(probe, true));
        cluster.services.push(Service {
            name: format!("probes/probe-{probe}"),
            frontend: frontend(probe),
            node_port: None,
            endpoints: vec![SocketAddrV4::new(endpoint(probe, true), PORT)],
        });
    }
    cluster
}

/// The endpoints that accept.
pub(super) struct Probes<'b> {
    bed: &'b Bed,
    _listeners: Vec<Socket>,
}

impl<'b> Probes<'b> {
    pub(super) fn new(bed: &'b Bed) -> Result<Self> {
        let listeners = bed.pods()?.run(|| {
            (0..PROBES)
                .map(|probe| Ok(silent_listener(SocketAddrV4::new(endpoint(probe, true), PORT))?))
                .collect()
        })?;
        Ok(Self { bed, _listeners: listeners })
    }

    pub(super) fn measure(
        &self,
        plan: &Plan,
        program: &Program,
        agent: &Agent,
        api: &Api,
        cluster: &Cluster,
    ) -> Result<Churn> {
        // A mode that works on sockets must see those of the probes.
        let mut accepting = [true; PROBES as usize];
        let mut rates = Vec::new();
        let reads = agent.full_reads();
        for &per_second in &plan.rates {
            let changes = (plan.duration.as_secs_f64() * f64::from(per_second)).ceil() as u32;
            let before = agent.cpu()?;
            let times = self.bed.as_pod(|| run(api, &mut accepting, per_second, changes.max(5)))?;
            let used = agent.cpu()?.saturating_sub(before);
            let at = |share: f64| times.value_at_quantile(share) as f64 / 1e3;
            rates.push(Rate {
                per_second,
                changes: times.len(),
                ms: [at(0.5), at(0.9), at(0.99), times.max() as f64 / 1e3],
                cpu_s_per_1000: used.as_secs_f64() * 1e3 / times.len() as f64,
            });
        }
        let burst = self.bed.as_pod(|| burst(api, &mut accepting, cluster))?;
        std::thread::sleep(plan.rest);
        let (idle, before) = (Instant::now(), run_time(agent.id())?);
        std::thread::sleep(3 * plan.rest);
        let used = run_time(agent.id())?.saturating_sub(before);
        Ok(Churn {
            subject: program.name(),
            services: cluster.shape.services,
            endpoints: cluster.shape.endpoints,
            rates,
            burst_ms: burst.as_secs_f64() * 1e3,
            idle_ms_per_s: used.as_secs_f64() * 1e3 / idle.elapsed().as_secs_f64(),
            full_reads: matches!(program, Program::Shunt { .. }).then(|| agent.full_reads() - reads),
        })
    }
}

/// Changes that are on their way: since when, and what the endpoint will do.
type Waiting = BTreeMap<u8, (Instant, bool)>;

/// Changes Services at a steady rate, whether or not earlier changes have arrived.
fn run(api: &Api, accepting: &mut [bool], per_second: u32, changes: u32) -> Result<Histogram<u64>> {
    let mut times = Histogram::new_with_bounds(1, 600_000_000, 3)?;
    let interval = Duration::from_secs(1) / per_second;
    let mut waiting = Waiting::new();
    let (start, mut sent) = (Instant::now(), 0);
    while sent < changes || !waiting.is_empty() {
        let due = start + interval * sent;
        if sent < changes && Instant::now() >= due {
            // Spread over all probes; one that is still on its way is passed over.
            let next = (0..PROBES).map(|i| ((sent * 37 + u32::from(i)) % u32::from(PROBES)) as u8);
            if let Some(probe) = next.into_iter().find(|probe| !waiting.contains_key(probe)) {
                let accepts = !accepting[usize::from(probe)];
                let object = slice(probe, accepts);
                // From when it was due: a change that came late because of the one before is late.
                waiting.insert(probe, (due, accepts));
                api.server().put(object);
                accepting[usize::from(probe)] = accepts;
                sent += 1;
            }
        }
        for time in arrived(&mut waiting)? {
            times.saturating_record(time.as_micros() as u64);
        }
        pause(&waiting, (sent < changes).then(|| start + interval * sent));
    }
    Ok(times)
}

/// Changes many Services with one call; the time until the last of the probes among them has changed.
fn burst(api: &Api, accepting: &mut [bool], cluster: &Cluster) -> Result<Duration> {
    let ordinary = cluster
        .objects
        .iter()
        .filter(|object| object["kind"] == "EndpointSlice" && object["metadata"]["namespace"] != "probes");
    let mut objects: Vec<Value> = ordinary.take(BURST - usize::from(PROBES)).cloned().collect();
    for (i, object) in objects.iter_mut().enumerate() {
        object["endpoints"][0]["addresses"][0] =
            IpAddr::from([10, 106, (i / 250) as u8, (i % 250) as u8]).to_string().into();
    }
    let mut waiting = Waiting::new();
    let started = Instant::now();
    for probe in 0..PROBES {
        let accepts = !accepting[usize::from(probe)];
        accepting[usize::from(probe)] = accepts;
        objects.push(slice(probe, accepts));
        waiting.insert(probe, (started, accepts));
    }
    let started = Instant::now();
    api.server().put_all(objects);
    while !waiting.is_empty() {
        arrived(&mut waiting)?;
        pause(&waiting, None);
    }
    Ok(started.elapsed())
}

/// Asks the Services that wait; takes out those that have changed, with their times.
fn arrived(waiting: &mut Waiting) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    let mut lost = None;
    waiting.retain(|probe, (since, accepts)| {
        if ask(*probe).is_ok_and(|accepted| accepted == Some(*accepts)) {
            times.push(since.elapsed());
            return false;
        }
        if since.elapsed() > PATIENCE {
            lost = Some(*probe);
        }
        true
    });
    ensure!(lost.is_none(), "the change of probe {} was not seen for {PATIENCE:?}", lost.unwrap_or_default());
    Ok(times)
}

/// Whether the endpoint behind a Service accepts; `None` when nobody answers at once. The kernel carries
/// both packets before `connect` returns.
fn ask(probe: u8) -> std::io::Result<Option<bool>> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_linger(Some(Duration::ZERO))?;
    let target = SockAddr::from(frontend(probe));
    for _ in 0..2 {
        match socket.connect(&target).map_err(|error| error.raw_os_error().map(Errno::from_raw)) {
            Ok(()) => return Ok(Some(true)),
            Err(Some(Errno::ECONNREFUSED)) => return Ok(Some(false)),
            Err(_) => {}
        }
    }
    Ok(None)
}

/// Rests a fiftieth of what the youngest change has waited, so that asking costs little of the time that is
/// measured; wakes early enough for the change that is due next.
fn pause(waiting: &Waiting, next: Option<Instant>) {
    /// By so much the kernel may oversleep.
    const SLACK: Duration = Duration::from_micros(150);
    let youngest = waiting.values().map(|(since, _)| since.elapsed()).min();
    let rest = youngest.map_or(Duration::from_millis(10), |waited| waited / 50);
    let left = next.map_or(rest, |next| next.saturating_duration_since(Instant::now()).saturating_sub(SLACK));
    match rest.min(left) {
        Duration::ZERO => std::hint::spin_loop(),
        rest => std::thread::sleep(rest),
    }
}

/// Time that all threads of a process have run.
fn run_time(id: u32) -> Result<Duration> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{id}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        sum += text.split_whitespace().next().unwrap_or_default().parse::<u64>()?;
    }
    Ok(Duration::from_nanos(sum))
}
