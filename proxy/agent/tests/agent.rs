//! The binary, as an operator meets it: over a real list and watch, on a real kernel, in network
//! namespaces of its own.

mod common;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::{LONG, SHUNT, messages};
use serde_json::{Value, json};
use shunt_harness::apiserver::{ApiServer, ApiServerInside, Resource};
use shunt_harness::lab::{ChildGuard, Lab, Probe, Proto, StormSpec, TransferSpec, require_kernel};

const VIP: &str = "10.96.0.10:80";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples")
}

/// A node with three pods, a client, and an API server inside the node's namespace.
struct Cluster {
    lab: Lab,
    server: ApiServerInside,
    folder: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Result<Self> {
        let address = |text: &str| text.parse::<IpAddr>();
        let lab = Lab::builder()
            .node([address("192.0.2.11")?, address("2001:db8::11")?])
            .client([address("198.51.100.20")?])
            .pod("pod-a", [address("10.244.1.11")?])
            .pod("pod-b", [address("10.244.1.12")?])
            .pod("pod-c", [address("10.244.1.13")?])
            .build()?;
        for pod in ["pod-a", "pod-b", "pod-c"] {
            lab.pod(pod)?.serve_ports([8080])?;
        }
        let server = ApiServer::start_inside(lab.node())?;
        server.put(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
        }));
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join("kubeconfig"), server.kubeconfig())?;
        let cluster = Self { lab, server, folder };
        cluster.server.put(service("web", "10.96.0.10", 30080));
        cluster.endpoints("web", &["10.244.1.11", "10.244.1.12"]);
        Ok(cluster)
    }

    fn endpoints(&self, service: &str, addresses: &[&str]) {
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|a| json!({ "addresses": [a], "conditions": { "ready": true }, "nodeName": "worker-1" }))
            .collect();
        self.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{service}-1"), "namespace": "demo",
                "labels": { "kubernetes.io/service-name": service },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
            "endpoints": endpoints,
        }));
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("shunt.sock")
    }

    /// Starts the agent; it is in sync for both families when this returns.
    fn start(&self) -> Result<ChildGuard> {
        common::start(self.lab.node(), self.folder.path(), &["--cluster-cidr", "10.244.0.0/16"])
    }

    fn shunt(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.lab.node().command(SHUNT);
        Ok(command.args(arguments).output()?)
    }

    fn dump(&self, arguments: &[&str]) -> Result<String> {
        let socket = self.socket();
        let mut all = vec!["dump"];
        all.extend(arguments);
        all.extend(["--admin-socket", socket.to_str().context("path")?]);
        let output = self.shunt(&all)?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Waits until connections to an address reach exactly these pods.
    fn reach(&self, address: &str, pods: &[&str]) -> Result<()> {
        let probe = Probe::tcp(address.parse::<SocketAddr>()?);
        let deadline = Instant::now() + LONG;
        loop {
            let reached = self.lab.client().pods_reached(&probe, 25);
            if reached.as_ref().is_ok_and(|r| r.iter().map(String::as_str).eq(pods.iter().copied())) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{address} reaches {reached:?}, not {pods:?}");
        }
    }
}

fn service(name: &str, cluster_ip: &str, node_port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "NodePort", "clusterIP": cluster_ip, "clusterIPs": [cluster_ip],
            "ipFamilies": ["IPv4"],
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": node_port }],
        },
    })
}

fn operations(agent: &ChildGuard) -> u64 {
    messages(agent, "in sync with the kernel").iter().filter_map(|fields| fields["operations"].as_u64()).sum()
}

#[test]
fn follows_the_api_server() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start()?;
    cluster.reach(VIP, &["pod-a", "pod-b"])?;
    cluster.reach("192.0.2.11:30080", &["pod-a", "pod-b"])?;

    cluster.endpoints("web", &["10.244.1.13"]);
    cluster.reach(VIP, &["pod-c"])?;

    // A malformed object is reported by name and field; what is sound goes on.
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "bad", "namespace": "demo" },
        "spec": { "clusterIP": "10.96.0.300", "clusterIPs": ["10.96.0.300"], "ports": "none" },
    }));
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "open", "namespace": "demo" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.40", "clusterIPs": ["10.96.0.40", "fd00::40"],
            "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }, { "ip": "2001:db8:2::1" }] } },
    }));
    cluster.server.put(service("shop", "10.96.0.20", 30081));
    cluster.endpoints("shop", &["10.244.1.11"]);
    cluster.reach("10.96.0.20:80", &["pod-a"])?;
    let log = agent.stderr();
    assert!(log.contains("Service demo/bad") && log.contains("spec.clusterIPs[0]"), "{log}");
    assert!(log.contains("Service demo/open: spec.loadBalancerSourceRanges has no IPv6 range"), "{log}");

    // The API server goes away: rules stay. Changes that were missed meanwhile are made up for.
    cluster.server.refuse_connections();
    cluster.reach(VIP, &["pod-c"])?;
    cluster.endpoints("web", &["10.244.1.11"]);
    cluster.server.delete(Resource::Services, "demo", "shop");
    cluster.server.expire_history();
    cluster.server.clear_faults();
    cluster.reach(VIP, &["pod-a"])?;
    let deadline = Instant::now() + LONG;
    while cluster.lab.client().probe(Probe::tcp("10.96.0.20:80".parse()?))?.pod().is_some() {
        ensure!(Instant::now() < deadline, "a Service that was deleted meanwhile is still there: {agent}");
    }

    assert!(agent.stop()?.success());
    cluster.reach(VIP, &["pod-a"])
}

#[test]
fn a_restart_loses_no_connection_and_writes_nothing() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start()?;
    let destination: SocketAddr = VIP.parse()?;
    let probe = Probe::tcp(destination).timeout(Duration::from_secs(3));
    let node = cluster.lab.pod("pod-c")?;
    let storm =
        node.storm(StormSpec { probe: probe.clone(), rate: 500, duration: Duration::from_mins(1) })?;
    let transfer = cluster.lab.client().transfer(&TransferSpec { probe, pace: None, limit: None })?;
    let before = transfer.bytes();
    for round in 0..5 {
        std::thread::sleep(Duration::from_millis(300));
        // In turn as an update does it, and as the kernel does it when memory is short.
        if round % 2 == 0 {
            agent.stop()?;
        } else {
            agent.kill()?;
        }
        std::thread::sleep(Duration::from_millis(100));
        agent = cluster.start()?;
        assert_eq!(operations(&agent), 0, "a restart wrote to the kernel: {agent}");
    }
    // Changes under load lose nothing either.
    for endpoints in [&["10.244.1.11"][..], &["10.244.1.11", "10.244.1.12"], &["10.244.1.12"]] {
        cluster.endpoints("web", endpoints);
        std::thread::sleep(Duration::from_millis(200));
    }
    let during = transfer.bytes();
    let report = storm.stop()?;
    assert!(report.attempted > 500, "{report}");
    assert!(report.failures.is_empty(), "{report}");
    assert!(during > before, "the transfer stood still");
    transfer.stop()?;
    Ok(())
}

#[test]
fn a_start_mends_what_is_wrong_in_the_kernel() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start()?;
    agent.stop()?;
    let node = cluster.lab.node();
    node.nft(
        "table ip foreign {\n chain c {\n type filter hook input priority 5\n counter\n }\n }\n\
         delete element ip shunt services { 10.96.0.10 . tcp . 80 }\n\
         add element ip shunt services { 10.96.0.99 . tcp . 80 : 1234:5 }\n\
         add element ip shunt cluster-ips { 10.96.0.99 }\n\
         flush chain ip shunt services\n\
         add chain ip shunt intruder\n",
    )?;
    let before = node.exec("nft", ["-s", "list", "table", "ip", "foreign"], "")?;
    let agent = cluster.start()?;
    assert!(operations(&agent) > 0);
    cluster.reach(VIP, &["pod-a", "pod-b"])?;
    let ruleset = node.exec("nft", ["list", "table", "ip", "shunt"], "")?;
    assert!(!ruleset.contains("10.96.0.99") && !ruleset.contains("intruder"), "{ruleset}");
    assert_eq!(node.exec("nft", ["-s", "list", "table", "ip", "foreign"], "")?, before);
    assert!(cluster.dump(&["--stage", "plan"])?.lines().all(|l| l == "# nothing to do"));
    Ok(())
}

#[test]
fn dumps_what_it_does_and_cleans_up() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let agent = cluster.start()?;
    let table = cluster.dump(&[])?;
    assert!(
        table.contains("service demo/web:http/tcp") && table.contains("10.244.1.12:8080 (here)"),
        "{table}"
    );
    let json: Value = serde_json::from_str(&cluster.dump(&["-o", "json"])?)?;
    assert_eq!(json["IPv4"]["ports"][0]["service"], "demo/web");
    let state = cluster.dump(&["--stage", "state"])?;
    let kernel = cluster.dump(&["--stage", "kernel"])?;
    assert_eq!(state, kernel);
    let alone = cluster.dump(&["--stage", "kernel", "--service", "demo/web", "-o", "json"])?;
    let alone: Value = serde_json::from_str(&alone)?;
    assert_eq!(alone["IPv4"]["sets"]["cluster-ips"], json!(["10.96.0.10"]));
    let missing = cluster.dump(&["--service", "demo/nothing"]).unwrap_err().to_string();
    assert!(missing.contains("no Service demo/nothing is served here"), "{missing}");

    drop(agent);
    // Without an agent the kernel still answers.
    let direct = cluster.shunt(&["dump", "--stage", "kernel", "--admin-socket", "/nowhere"])?;
    assert!(String::from_utf8(direct.stdout)?.contains("10.96.0.10 . tcp . 80"));
    let lost = cluster.shunt(&["dump", "--admin-socket", "/nowhere"])?;
    assert_eq!(lost.status.code(), Some(1));
    assert!(String::from_utf8(lost.stderr)?.contains("--manifests PATH --node NAME"));

    cluster.lab.node().nft("table ip keep {\n set s {\n type ipv4_addr\n }\n }")?;
    for _ in 0..2 {
        assert!(cluster.shunt(&["cleanup"])?.status.success());
        let ruleset = cluster.lab.node().exec("nft", ["list", "tables"], "")?;
        assert_eq!(ruleset.trim(), "table ip keep");
    }
    Ok(())
}

#[test]
fn explains_from_the_table_and_from_the_kernel() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let agent = cluster.start()?;
    let socket = cluster.socket();
    let explain = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let socket = socket.to_str().context("path")?;
        let output = cluster.shunt(&[&["explain", "--admin-socket", socket], arguments].concat())?;
        let [stdout, stderr] = [output.stdout, output.stderr].map(String::from_utf8);
        Ok((output.status.code(), stdout?, stderr?))
    };
    let (code, text, error) = explain(&["--from", "external", "--to", "192.0.2.11:30080"])?;
    assert_eq!(code, Some(0), "{text}{error}");
    assert!(text.contains("NodePort node:30080/tcp of Service demo/web:http/tcp"), "{text}");
    let (code, text, error) = explain(&["--from", "node", "--to", VIP, "--mode", "nftables"])?;
    assert_eq!(code, Some(0), "{text}{error}");
    let forward = "forward 10.244.1.11:8080 (masqueraded) 10.244.1.12:8080 (masqueraded)";
    assert_eq!(text.matches(forward).count(), 2, "{text}");

    // Somebody takes away an element: the table does not know, the kernel does.
    let service = "10.96.0.10 . tcp . 80";
    cluster.lab.node().nft(&format!("delete element ip shunt services {{ {service} }}"))?;
    let (code, text, _) = explain(&["--from", "10.244.1.13", "--to", VIP, "--mode", "nftables"])?;
    assert_eq!(code, Some(3), "{text}");
    assert!(
        text.contains("DIFFERS     verdict: forward by the table, reject by the rules of nftables"),
        "{text}"
    );
    let (code, text, error) =
        explain(&["--from", "10.244.1.13", "--to", VIP, "--mode", "nftables", "-o", "json"])?;
    assert_eq!(
        (code, error.contains("forward by the table, reject by the rules")),
        (Some(3), true),
        "{error}"
    );
    let entries: Value = serde_json::from_str(&text)?;
    assert_eq!((&entries[0]["verdict"], &entries[0]["masquerade"]), (&json!("reject"), &json!(false)));
    assert_eq!(explain(&["--from", "10.244.1.13", "--to", VIP])?.0, Some(0));

    for (arguments, expected) in [
        (&["--mode", "ipvs"][..], "the running agent is in nftables mode, not ipvs"),
        (&["--cluster-cidr", "10.0.0.0/8"], "need --manifests"),
        (&["--mode", "frog"], "unknown mode \"frog\""),
    ] {
        let (code, _, error) = explain(&[&["--from", "node", "--to", VIP], arguments].concat())?;
        assert_eq!((code, error.contains(expected)), (Some(1), true), "{error}");
    }
    drop(agent);
    Ok(())
}

fn offline(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(SHUNT).args(arguments).output()?)
}

#[test]
fn examples_compile_offline() -> Result<()> {
    let examples = examples();
    let examples = examples.to_str().context("path")?;
    let dump = offline(&["dump", "--manifests", examples, "--node", "worker-1"])?;
    let text = String::from_utf8(dump.stdout)?;
    assert!(dump.status.success() && dump.stderr.is_empty(), "{}", String::from_utf8_lossy(&dump.stderr));
    assert!(text.contains("LoadBalancer 203.0.113.80:443/tcp") && !text.contains("database"), "{text}");
    for stage in ["state", "plan"] {
        let dump = offline(&[
            "dump",
            "--manifests",
            examples,
            "--node",
            "worker-1",
            "--stage",
            stage,
            "-o",
            "json",
        ])?;
        let value: Value = serde_json::from_slice(&dump.stdout)?;
        assert!(value["IPv6"].is_object(), "{value}");
    }
    Ok(())
}

#[test]
fn errors_say_what_where_and_what_to_do() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("config.yaml");
    std::fs::write(
        &config,
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCIDR: 10.0.0.0/40\n",
    )?;
    let config = config.to_str().context("path")?;
    for (arguments, expected) in [
        (
            &["run", "--mode", "frog", "--manifests", "/"][..],
            "Invalid value: \"frog\": must be auto, ebpf, iptables, ipvs, nftables",
        ),
        (
            &["run", "--config", config],
            "ClusterCIDRs[0]: Invalid value: \"10.0.0.0/40\": must be a valid CIDR block",
        ),
        (&["run", "--config", "/nowhere"], "/nowhere"),
        (&["dump", "--manifests", "/nowhere", "--node", "n"], "/nowhere"),
        (&["run", "--config", "/nowhere", "--admin-socket", ""], "/nowhere"),
    ] {
        let output = offline(arguments)?;
        let error = String::from_utf8(output.stderr)?;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
    Ok(())
}

#[test]
fn called_as_kube_proxy_it_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let name = folder.path().join("kube-proxy");
    std::os::unix::fs::symlink(SHUNT, &name)?;
    let output = Command::new(&name).args(["--help"]).output()?;
    let help = String::from_utf8(output.stdout)?;
    assert!(help.contains("--cluster-cidr") && help.contains("--proxy-mode"), "{help}");
    let output = Command::new(&name).args(["--version"]).output()?;
    assert_eq!(String::from_utf8(output.stdout)?, concat!("shunt ", env!("CARGO_PKG_VERSION"), "\n"));
    Ok(())
}

#[test]
fn sctp_packets_reach_their_endpoint() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut both = service("amf", "10.96.0.60", 30082);
    both["spec"]["ports"] = json!([
        { "name": "n2", "port": 38412, "protocol": "SCTP", "nodePort": 30082 },
        { "name": "web", "port": 38412, "protocol": "TCP" },
    ]);
    cluster.server.put(both);
    // The same number over TCP is another Service port, with another endpoint.
    for (name, protocol, port, address) in
        [("n2", "SCTP", 9999, "10.244.1.12"), ("web", "TCP", 8080, "10.244.1.13")]
    {
        cluster.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("amf-{name}"), "namespace": "demo",
                "labels": { "kubernetes.io/service-name": "amf" },
            },
            "addressType": "IPv4",
            "ports": [{ "name": name, "port": port, "protocol": protocol }],
            "endpoints": [{ "addresses": [address], "nodeName": "worker-1" }],
        }));
    }
    let endpoint: SocketAddr = "10.244.1.12:9999".parse()?;
    cluster.lab.pod("pod-b")?.serve([(Proto::Sctp, endpoint)])?;
    let agent = cluster.start()?;
    for to in ["10.96.0.60:38412", "192.0.2.11:30082"] {
        let seen = cluster.lab.client().probe(Probe::sctp(to.parse()?).timeout(LONG))?;
        let answer = seen.answer().with_context(|| format!("{to}: {seen}: {agent}"))?;
        assert_eq!((answer.pod.as_str(), answer.local), ("pod-b", endpoint));
        let node: IpAddr = "192.0.2.11".parse()?;
        assert_eq!(answer.peer.ip(), node, "masqueraded: the client is outside the cluster");
    }
    cluster.reach("10.96.0.60:38412", &["pod-c"])
}
