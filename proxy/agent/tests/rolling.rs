//! Pods are replaced and the agent is restarted, while connections come in at 200 a second: none of them is refused,
//! reset or lost, and those that last go on.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{LONG, messages};
use serde_json::{Value, json};
use shunt_harness::apiserver::{ApiServer, ApiServerInside};
use shunt_harness::guest::{inside, test_in_guest};
use shunt_harness::lab::{
    ChildGuard, Conversation, Lab, Namespace, Probe, Proto, Storm, StormSpec, require_kernel,
};

const REPLICAS: usize = 2;
const PODS: usize = 6;
const PORT: u16 = 8080;
const VIPS: [&str; 2] = ["10.96.0.10", "fd00:96::a"];
const NODE: [&str; 2] = ["192.0.2.11", "2001:db8::11"];
const NODE_PORT: u16 = 30080;
/// What is under way when a change is programmed arrives within this.
const UNDER_WAY: Duration = Duration::from_millis(50);

/// As long as a connection may take: one whose first packet is lost takes a second, and a guest that gets no CPU is
/// late with everything.
fn patience() -> Duration {
    Duration::from_secs(if inside() { 30 } else { 5 })
}

/// Connections a second.
const RATE: u32 = 200;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn addresses(pod: usize) -> [IpAddr; 2] {
    [ip(&format!("10.244.1.{}", 10 + pod)), ip(&format!("fd00:244::{}", 10 + pod))]
}

fn name(pod: usize) -> String {
    format!("pod-{pod}")
}

/// A node, a client outside the cluster, one in a pod, and a Service whose pods take turns.
struct Cluster {
    lab: Lab,
    server: ApiServerInside,
    folder: tempfile::TempDir,
    mode: &'static str,
    agent: ChildGuard,
    /// The pods in service, oldest first.
    ready: VecDeque<usize>,
    next: usize,
}

impl Cluster {
    fn new(mode: &'static str) -> Result<Self> {
        let mut lab = Lab::builder()
            .node(NODE.map(ip))
            .client([ip("198.51.100.20"), ip("2001:db8:1::20")])
            .pod("shop", [ip("10.244.1.99"), ip("fd00:244::99")]);
        for pod in 0..PODS {
            lab = lab.pod(&name(pod), addresses(pod));
        }
        let lab = lab.build()?;
        for from in [lab.client(), lab.pod("shop")?] {
            // Few enough that every port is used again while the kernel still remembers its last connection.
            from.set_sysctl("net/ipv4/ip_local_port_range", "20000 20999")?;
        }
        let server = ApiServer::start_inside(lab.node())?;
        let internal = NODE.map(|address| json!({ "type": "InternalIP", "address": address }));
        server.put(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
            "status": { "addresses": internal },
        }));
        server.put(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": "web", "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": {
                "type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS, "ipFamilies": ["IPv4", "IPv6"],
                "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT }],
            },
        }));
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("kubeconfig"), server.kubeconfig())?;
        let ready: VecDeque<usize> = (0..REPLICAS).collect();
        for pod in &ready {
            lab.pod(&name(*pod))?.serve_ports([PORT])?;
        }
        publish(&server, &ready, None);
        let agent = start(&lab, &folder, mode)?;
        Ok(Self { lab, server, folder, mode, agent, ready, next: REPLICAS })
    }

    /// Replaces one pod, as a Deployment does: the new one is there before the old one begins to terminate, and that
    /// one accepts connections until nobody sends any. `meanwhile` sees to it that the change is programmed.
    fn replace(&mut self, meanwhile: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let new = self.next % PODS;
        self.next += 1;
        self.lab.pod(&name(new))?.serve_ports([PORT])?;
        let old = self.ready.pop_front().context("a pod in service")?;
        self.ready.push_back(new);
        meanwhile(self)?;
        sleep(UNDER_WAY);
        let pod = self.lab.pod(&name(old))?;
        for any in ["0.0.0.0", "::"] {
            for proto in [Proto::Tcp, Proto::Udp] {
                pod.stop_serving(proto, SocketAddr::new(ip(any), PORT))?;
            }
        }
        Ok(())
    }

    /// Publishes the pods in service, and the one that is terminating.
    fn publish(&self, terminating: usize) {
        publish(&self.server, &self.ready, Some(terminating));
    }

    /// The changes programmed so far, by family.
    fn programmed(&self) -> [usize; 2] {
        let changes = messages(&self.agent, "change programmed");
        ["IPv4", "IPv6"].map(|family| changes.iter().filter(|fields| fields["family"] == family).count())
    }

    fn rolling_update(&mut self) -> Result<()> {
        for _ in 0..REPLICAS {
            let old = *self.ready.front().context("a pod in service")?;
            self.replace(|cluster| {
                let before = cluster.programmed();
                cluster.publish(old);
                let deadline = Instant::now() + LONG;
                while cluster.programmed().iter().zip(before).any(|(now, before)| *now == before) {
                    ensure!(Instant::now() < deadline, "the change is not programmed: {}", cluster.agent);
                    sleep(Duration::from_millis(10));
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Restarts the agent; a pod is replaced while it is away.
    fn restart(&mut self, crash: bool) -> Result<()> {
        let old = *self.ready.front().context("a pod in service")?;
        self.replace(|cluster| {
            if crash {
                cluster.agent.kill()?;
            } else {
                cluster.agent.stop()?;
            }
            cluster.publish(old);
            sleep(UNDER_WAY);
            cluster.agent = start(&cluster.lab, &cluster.folder, cluster.mode)?;
            Ok(())
        })
    }

    /// Connections on all ways in.
    fn load(&self) -> Result<Vec<Storm>> {
        let shop = self.lab.pod("shop")?;
        let vip = VIPS.map(|vip| SocketAddr::new(ip(vip), 80));
        let node_port = SocketAddr::new(ip(NODE[0]), NODE_PORT);
        [
            (shop, vip[0], 30),
            (shop, vip[1], 25),
            (self.lab.client(), node_port, 25),
            (self.lab.node(), vip[0], 20),
        ]
        .into_iter()
        .map(|(from, to, percent)| storm(from, to, RATE * percent / 100))
        .collect()
    }

    fn converse(&self) -> Result<Talk> {
        let probe = Probe::tcp(SocketAddr::new(ip(VIPS[0]), 80)).timeout(patience());
        let mut conversation = self.lab.pod("shop")?.converse(&probe)?;
        let pod = conversation.ask()?.pod;
        Ok(Talk { conversation, pod })
    }
}

/// A connection that lasts.
struct Talk {
    conversation: Conversation,
    pod: String,
}

impl Talk {
    fn goes_on(&mut self) -> Result<()> {
        let answer =
            self.conversation.ask().with_context(|| format!("the connection to {} broke", self.pod))?;
        ensure!(answer.pod == self.pod, "{} answered instead of {}", answer.pod, self.pod);
        Ok(())
    }
}

fn start(lab: &Lab, folder: &tempfile::TempDir, mode: &str) -> Result<ChildGuard> {
    common::start(
        lab.node(),
        folder.path(),
        &["--cluster-cidr", "10.244.0.0/16,fd00:244::/64", "--mode", mode],
    )
}

fn storm(from: &Namespace, to: SocketAddr, rate: u32) -> Result<Storm> {
    from.storm(StormSpec {
        probe: Probe::tcp(to).timeout(patience()),
        rate,
        duration: Duration::from_mins(10),
    })
}

fn publish(server: &ApiServer, ready: &VecDeque<usize>, terminating: Option<usize>) {
    for (family, kind) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let endpoint = |pod: usize, terminating: bool| {
            json!({
                "addresses": [addresses(pod)[family]], "nodeName": "worker-1",
                "conditions": { "ready": !terminating, "serving": true, "terminating": terminating },
            })
        };
        let endpoints: Vec<Value> = ready
            .iter()
            .map(|pod| endpoint(*pod, false))
            .chain(terminating.map(|pod| endpoint(pod, true)))
            .collect();
        server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("web-{}", kind.to_lowercase()), "namespace": "demo",
                "labels": { "kubernetes.io/service-name": "web" },
            },
            "addressType": kind,
            "ports": [{ "name": "http", "port": PORT, "protocol": "TCP" }],
            "endpoints": endpoints,
        }));
    }
}

/// Ends the load: everybody was answered, at the promised rate, and each pod had its turn.
fn judge(storms: Vec<Storm>, took: Duration) -> Result<()> {
    let (mut attempted, mut failures, mut reached) = (0, Vec::new(), BTreeSet::new());
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}, longest {:?}", report.latencies.last());
        attempted += report.attempted;
        failures.extend(report.failures);
        reached.extend(report.replies.into_keys());
    }
    println!("{attempted} connections in {took:?}");
    ensure!(failures.is_empty(), "{} of {attempted} connections failed: {failures:?}", failures.len());
    ensure!(
        u128::from(attempted) * 1000 > u128::from(RATE * 9 / 10) * took.as_millis(),
        "only {attempted} connections in {took:?}"
    );
    ensure!(reached.len() == PODS, "only {reached:?} answered");
    Ok(())
}

fn rolling_updates(mode: &'static str) -> Result<()> {
    let mut cluster = Cluster::new(mode)?;
    let storms = cluster.load()?;
    let begin = Instant::now();
    for number in 0..100 {
        let mut talk = cluster.converse()?;
        cluster.rolling_update().with_context(|| format!("update {number}"))?;
        // Its pod has left the Service, but not the connection.
        talk.goes_on().with_context(|| format!("update {number}"))?;
    }
    judge(storms, begin.elapsed())
}

fn restarts(mode: &'static str) -> Result<()> {
    let mut cluster = Cluster::new(mode)?;
    let storms = cluster.load()?;
    let begin = Instant::now();
    let mut talk = cluster.converse()?;
    for number in 0..20 {
        // In turn as an update of the agent does it, and as the kernel does it when memory is short.
        cluster.restart(number % 2 == 1).with_context(|| format!("restart {number}"))?;
        talk.goes_on().with_context(|| format!("restart {number}"))?;
    }
    judge(storms, begin.elapsed())
}

mod ipvs {
    use super::*;

    #[test]
    fn no_connection_fails_during_rolling_updates() {
        test_in_guest(module_path!(), "no_connection_fails_during_rolling_updates", || {
            rolling_updates("ipvs").unwrap();
        });
    }

    #[test]
    fn no_connection_fails_during_restarts() {
        test_in_guest(module_path!(), "no_connection_fails_during_restarts", || restarts("ipvs").unwrap());
    }
}

mod nftables {
    use super::*;

    #[test]
    fn no_connection_fails_during_rolling_updates() -> Result<()> {
        if require_kernel() { rolling_updates("nftables") } else { Ok(()) }
    }

    #[test]
    fn no_connection_fails_during_restarts() -> Result<()> {
        if require_kernel() { restarts("nftables") } else { Ok(()) }
    }
}
