//! The binary in kube-proxy's place: kubeadm's command line and files, health, metrics, events, a
//! configuration that changes.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shunt_harness::apiserver::{ApiServer, Resource};
use shunt_harness::lab::{ChildGuard, Lab, Namespace, Probe, StormSpec, TransferSpec, require_kernel};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
const LONG: Duration = Duration::from_secs(30);
const TOKEN: &str = "a-token-of-the-service-account";
const KUBEADM: &str = include_str!("../../config/tests/data/kubeadm.yaml");

/// A node with two pods, a client, and an API server with TLS in the node's namespace.
struct Cluster {
    lab: Lab,
    server: ApiServer,
    folder: tempfile::TempDir,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Cluster {
    fn new() -> Result<Self> {
        let address = |text: &str| text.parse::<IpAddr>();
        let lab = Lab::builder()
            .node([address("192.0.2.11")?, address("2001:db8::11")?])
            .client([address("198.51.100.20")?])
            .pod("pod-a", [address("10.244.1.11")?])
            .pod("pod-b", [address("10.244.1.12")?])
            .build()?;
        for pod in ["pod-a", "pod-b"] {
            lab.pod(pod)?.serve_ports([8080])?;
        }
        let (started, server) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = lab.node().thread(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                started.send(ApiServer::start_tls(TOKEN).await?).ok();
                let _ = stopped.await;
                Ok(())
            })
        })?;
        let server = server.recv().context("the API server did not start")?;
        let folder = tempfile::tempdir()?;
        let cluster = Self { lab, server, folder, stop: Some(stop), thread: Some(thread) };
        cluster.node(&json!({}));
        cluster.server.put(service());
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.write_files(KUBEADM)?;
        Ok(cluster)
    }

    /// Puts the Node, with some fields of `spec`.
    fn node(&self, spec: &Value) {
        self.server.put(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" }, "spec": spec,
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
        }));
    }

    fn endpoints(&self, addresses: &[&str]) {
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|a| json!({ "addresses": [a], "conditions": { "ready": true }, "nodeName": "worker-1" }))
            .collect();
        let now = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]).output();
        let now = now.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        self.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "web-1", "namespace": "demo",
                "labels": { "kubernetes.io/service-name": "web" },
                "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": now },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
            "endpoints": endpoints,
        }));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The files that kubeadm's DaemonSet mounts, and the binary under kube-proxy's name.
    fn write_files(&self, config: &str) -> Result<()> {
        let secrets = "/var/run/secrets/kubernetes.io/serviceaccount";
        std::fs::write(self.path("config.conf"), config)?;
        std::fs::write(
            self.path("kubeconfig.conf"),
            format!(
                "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    certificate-authority: {secrets}/ca.crt\n    \
                 server: {}\n  name: default\ncontexts:\n- context:\n    cluster: default\n    namespace: default\n    \
                 user: default\n  name: default\ncurrent-context: default\nusers:\n- name: default\n  user:\n    \
                 tokenFile: {secrets}/token\n",
                self.server.url()
            ),
        )?;
        std::fs::write(self.path("ca.crt"), self.server.certificate().context("no TLS")?)?;
        std::fs::write(self.path("token"), TOKEN)?;
        if !self.path("kube-proxy").exists() {
            std::os::unix::fs::symlink(SHUNT, self.path("kube-proxy"))?;
        }
        Ok(())
    }

    /// Starts kube-proxy as kubeadm does, with the mounts that it has, in a mount namespace of its own.
    fn start(&self, more: &[&str]) -> Result<ChildGuard> {
        const MOUNTS: &str = "set -e
            mount -t tmpfs tmpfs /var/lib; mount -t tmpfs tmpfs /run
            mkdir -p /var/lib/kube-proxy /run/secrets/kubernetes.io/serviceaccount /run/shunt
            mount --bind \"$1\" /var/lib/kube-proxy
            cp \"$1/token\" \"$1/ca.crt\" /run/secrets/kubernetes.io/serviceaccount
            program=$2; shift 2
            exec \"$program\" --config=/var/lib/kube-proxy/config.conf --hostname-override=worker-1 \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", MOUNTS, "sh"]);
        command.arg(self.folder.path()).arg(self.path("kube-proxy")).args(more);
        self.lab.node().spawn(&command)
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

    fn get(&self, address: &str, path: &str) -> Result<Answer> {
        get(self.lab.node(), address, path)
    }

    fn metrics(&self) -> Result<String> {
        Ok(self.get("127.0.0.1:10249", "/metrics")?.body)
    }

    /// Waits until something holds.
    fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + LONG;
        while !matches!(holds(self), Ok(true)) {
            ensure!(Instant::now() < deadline, "never: {what}: {:?}", holds(self));
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "web", "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local", "healthCheckNodePort": 31234,
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080 }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } },
    })
}

/// What an HTTP server answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

fn get(namespace: &Namespace, address: &str, path: &str) -> Result<Answer> {
    let address: SocketAddr = address.parse()?;
    let text = namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|l| l.split(' ').nth(1)).context("no status")?.parse()?;
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Ok(Answer { status, headers, body: body.to_owned() })
}

/// The value of a sample.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn kubeadms_command_line_serves_and_tells() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    cluster.reach("192.0.2.11:30080", &["pod-a", "pod-b"])?;
    // Objects come and go; traffic follows.
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("203.0.113.1:80", &["pod-b"])?;

    health(&cluster)?;
    checks_of_services(&cluster)?;
    metrics_server(&cluster)?;

    cluster.server.delete(Resource::Services, "demo", "web");
    cluster.wait("the Service's port is closed", |c| Ok(c.get("192.0.2.11:31234", "/").is_err()))?;
    let events = cluster.server.events();
    let starting = events.iter().find(|e| e["reason"] == "Starting").context("no event Starting")?;
    assert_eq!(starting["regarding"]["kind"], "Node");
    assert_eq!(starting["regarding"]["name"], "worker-1");
    assert_eq!(starting["action"], "StartKubeProxy");
    assert!(agent.stop()?.success());
    let log = agent.stderr();
    assert!(log.contains("mode chosen: nftables: a trial in a private network namespace worked"), "{log}");
    assert!(!log.contains("unknown field"), "{log}");
    Ok(())
}

fn health(cluster: &Cluster) -> Result<()> {
    let json_headers = |answer: &Answer| {
        assert_eq!(answer.headers["content-type"], "application/json");
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
    };
    let healthz = cluster.get("127.0.0.1:10256", "/healthz")?;
    assert_eq!(healthz.status, 200, "{healthz:?}");
    json_headers(&healthz);
    let body: Value = serde_json::from_str(&healthz.body)?;
    let (last, now) = (&body["lastUpdated"], &body["currentTime"]);
    let v4 = &body["status"]["IPv4"]["lastUpdated"];
    let v6 = &body["status"]["IPv6"]["lastUpdated"];
    assert_eq!(
        healthz.body,
        format!(
            r#"{{"lastUpdated":{last},"currentTime":{now},"nodeEligible":true,"healthy":true,"status":{{"IPv4":{{"lastUpdated":{v4},"healthy":true}},"IPv6":{{"lastUpdated":{v6},"healthy":true}}}}}}"#
        )
    );
    assert_eq!(last, now, "a healthy proxy is up to date");

    // The autoscaler is about to delete the node: load balancers shall leave, the kubelet shall not restart.
    cluster.node(&json!({ "taints": [{ "key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule" }] }));
    cluster.wait("not eligible", |c| Ok(c.get("192.0.2.11:10256", "/healthz")?.status == 503))?;
    let healthz = cluster.get("127.0.0.1:10256", "/healthz")?;
    json_headers(&healthz);
    assert!(healthz.body.contains(r#""nodeEligible":false,"healthy":true,"#), "{healthz:?}");
    let livez = cluster.get("127.0.0.1:10256", "/livez")?;
    assert_eq!(livez.status, 200);
    json_headers(&livez);
    assert!(!livez.body.contains("nodeEligible"), "{livez:?}");
    cluster.node(&json!({}));
    cluster.wait("eligible again", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.status == 200))?;
    assert_eq!(cluster.get("127.0.0.1:10256", "/else")?.status, 404);
    Ok(())
}

fn checks_of_services(cluster: &Cluster) -> Result<()> {
    let check = cluster.get("192.0.2.11:31234", "/any/path")?;
    assert_eq!(check.status, 200);
    assert_eq!(check.headers["content-type"], "application/json");
    assert_eq!(check.headers["x-content-type-options"], "nosniff");
    assert_eq!(check.headers["x-load-balancing-endpoint-weight"], "1");
    assert_eq!(
        check.body,
        "{\n\t\"service\": {\n\t\t\"namespace\": \"demo\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}"
    );
    // Node ports answer on the primary address only, and so does this.
    assert!(cluster.get("127.0.0.1:31234", "/").is_err());
    cluster.endpoints(&[]);
    cluster.wait("no endpoints", |c| Ok(c.get("192.0.2.11:31234", "/")?.status == 503))?;
    let check = cluster.get("192.0.2.11:31234", "/")?;
    assert_eq!(check.headers["x-load-balancing-endpoint-weight"], "0");
    assert!(check.body.contains("\"localEndpoints\": 0,"), "{check:?}");

    // A port that somebody else has is tried again, and an event says so.
    let taken = cluster.lab.node().run(|| Ok(std::net::TcpListener::bind("192.0.2.11:31235")?))?;
    let mut moved = service();
    moved["spec"]["healthCheckNodePort"] = 31235.into();
    cluster.server.put(moved);
    cluster.endpoints(&["10.244.1.11"]);
    cluster.wait("an event", |c| {
        let failed = |e: &Value| e["reason"] == "FailedToStartServiceHealthcheck";
        Ok(c.server.events().iter().any(|e| failed(e) && e["regarding"]["name"] == "web"))
    })?;
    assert!(cluster.get("192.0.2.11:31234", "/").is_err(), "the old port is closed");
    drop(taken);
    cluster.wait("the new port is open", |c| Ok(c.get("192.0.2.11:31235", "/")?.status == 200))?;
    cluster.server.put(service());
    cluster.wait("the old port is back", |c| Ok(c.get("192.0.2.11:31234", "/")?.status == 200))
}

fn metrics_server(cluster: &Cluster) -> Result<()> {
    let at = "127.0.0.1:10249";
    let plain = |path: &str, body: &str| -> Result<()> {
        let answer = cluster.get(at, path)?;
        assert_eq!((answer.status, answer.body.as_str()), (200, body));
        assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8");
        Ok(())
    };
    plain("/proxyMode", "nftables")?;
    plain("/healthz", "ok")?;
    let configz: Value = serde_json::from_str(&cluster.get(at, "/configz")?.body)?;
    let config = &configz["kubeproxy.config.k8s.io"];
    assert_eq!(config["kind"], "KubeProxyConfiguration");
    assert_eq!(config["clusterCIDR"], "10.244.0.0/16");
    assert!(cluster.get("192.0.2.11:10249", "/metrics").is_err(), "metrics are for this node alone");

    cluster.lab.node().set_sysctl("net/netfilter/nf_conntrack_acct", "1")?;
    let probe = Probe::tcp("203.0.113.1:80".parse()?);
    let transfer = cluster.lab.client().transfer(&TransferSpec { probe, pace: None, limit: None })?;
    let web = "namespace=\"demo\",service=\"web\",port=\"http\",ip_family=\"IPv4\",protocol=\"TCP\"";
    cluster.wait("bytes of a Service", |c| {
        let metrics = c.metrics()?;
        let of = |direction| format!("shunt_service_bytes{{{web},direction=\"{direction}\"}}");
        let least = |direction| sample(&metrics, &of(direction)).is_some_and(|bytes| bytes > 1000.0);
        let connections = sample(&metrics, &format!("shunt_service_connections{{{web}}}"));
        Ok(least("request") && least("response") && connections.is_some_and(|n| n >= 1.0))
    })?;
    transfer.stop()?;

    let answer = cluster.get(at, "/metrics")?;
    assert_eq!(answer.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let metrics = answer.body;
    for (name, least) in [
        ("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 2.0),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"}", 1.7e9),
        ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"}", 1.7e9),
        ("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total", 2.0),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", 0.0),
        ("kubeproxy_sync_proxy_rules_service_changes_total", 1.0),
        ("kubeproxy_sync_proxy_rules_service_changes_pending", 0.0),
        (
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"external\"}",
            0.0,
        ),
        ("kubeproxy_proxy_healthz_total{code=\"200\"}", 1.0),
        ("kubeproxy_proxy_healthz_total{code=\"503\"}", 1.0),
        ("kubeproxy_proxy_livez_total{code=\"200\"}", 1.0),
        ("kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"}", 0.0),
        ("kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"}", 0.0),
        ("shunt_services{ip_family=\"IPv4\"}", 1.0),
        ("shunt_kernel_table_entries_limit{ip_family=\"IPv4\",table=\"endpoints\"}", 1000.0),
        ("shunt_watch_connected{kind=\"EndpointSlice\"}", 1.0),
        ("shunt_watch_last_contact_timestamp_seconds{kind=\"Service\"}", 1.7e9),
        ("shunt_conntrack_entries_limit", 1.0),
        ("process_resident_memory_bytes", 1e6),
        ("process_cpu_seconds_total", 0.0),
    ] {
        let value = sample(&metrics, name).with_context(|| format!("{name}: {metrics}"))?;
        assert!(value >= least, "{name}: {value}");
    }
    assert!(metrics.contains("kubernetes_build_info{major=\"1\",minor=\"36\""), "{metrics}");
    let buckets = |name: &str| {
        let prefix = format!("{name}_bucket{{le=\"");
        let bound = |line: &str| Some(line.strip_prefix(&prefix)?.split('"').next()?.to_owned());
        let mut bounds: Vec<String> = Vec::new();
        for bound in metrics.lines().filter_map(bound) {
            if !bounds.contains(&bound) {
                bounds.push(bound);
            }
        }
        bounds.join(" ")
    };
    assert_eq!(
        buckets("kubeproxy_sync_proxy_rules_duration_seconds"),
        "0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 4.096 8.192 16.384 +Inf"
    );
    let programming = buckets("kubeproxy_network_programming_duration_seconds");
    assert!(
        programming.starts_with("0.25 0.5 1 2 3 ")
            && programming.ends_with(" 115 120 150 180 210 240 270 300 +Inf"),
        "{programming}"
    );
    assert_eq!(programming.split(' ').count(), 81);
    dashboards(&metrics);
    promtool(&metrics)
}

/// Every metric that dashboard and alerts ask for is there.
fn dashboards(metrics: &str) {
    for text in [
        include_str!("../../../deploy/dashboards/grafana.json"),
        include_str!("../../../deploy/dashboards/alerts.yaml"),
    ] {
        let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| {
            ["kubeproxy_", "shunt_", "process_"].iter().any(|prefix| word.starts_with(prefix))
        });
        for name in names {
            // A pattern has the beginning of a name in it.
            let is_there = metrics.lines().any(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| name.ends_with('_') || rest.starts_with(['{', ' ']))
            });
            assert!(is_there, "{name}");
        }
    }
}

/// Prometheus' own check of names, types and texts. kube-proxy has a gauge whose name ends like a
/// counter's, which the tool dislikes and dashboards expect.
fn promtool(metrics: &str) -> Result<()> {
    let mut child = match Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => {
            let required = std::env::var_os("SHUNT_REQUIRE_KERNEL").is_some_and(|v| v == "1");
            ensure!(!required, "promtool (Debian package prometheus): {error}");
            eprintln!("skipped: promtool: {error}");
            return Ok(());
        }
    };
    child.stdin.take().context("stdin")?.write_all(metrics.as_bytes())?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
    let complaints: Vec<&str> = text
        .lines()
        .filter(|line| {
            *line != "kubeproxy_sync_proxy_rules_no_local_endpoints_total non-counter metrics should not have \"_total\" suffix"
        })
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
    Ok(())
}

#[test]
fn a_changed_configuration_takes_effect_and_breaks_nothing() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    assert!(cluster.get("192.0.2.11:31234", "/").is_ok());
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
    let storm =
        cluster.lab.client().storm(StormSpec { probe, rate: 300, duration: Duration::from_mins(1) })?;

    // Nonsense is refused by name; what was there goes on.
    std::fs::write(cluster.path("config.conf"), KUBEADM.replace("oomScoreAdj: null", "oomScoreAdj: 5000"))?;
    agent.wait_for("OOMScoreAdj: Invalid value: 5000", LONG)?;
    assert_eq!(cluster.get("127.0.0.1:10249", "/healthz")?.status, 200);

    // Replaced as the kubelet replaces a ConfigMap: another file under the same name.
    let changed = KUBEADM.replace("metricsBindAddress: \"\"", "metricsBindAddress: 127.0.0.1:11249");
    std::fs::write(cluster.path("new"), changed)?;
    std::fs::rename(cluster.path("new"), cluster.path("config.conf"))?;
    cluster.wait("the new address", |c| Ok(c.get("127.0.0.1:11249", "/proxyMode")?.status == 200))?;
    cluster.wait("the old one is gone", |c| Ok(c.get("127.0.0.1:10249", "/proxyMode").is_err()))?;
    cluster.wait("health checks are back", |c| Ok(c.get("192.0.2.11:31234", "/").is_ok()))?;
    cluster.endpoints(&["10.244.1.11"]);
    cluster.reach("10.96.0.10:80", &["pod-a"])?;
    // What follows the change counts as well.
    std::thread::sleep(Duration::from_millis(500));
    let report = storm.stop()?;
    assert!(report.attempted > 100 && report.failures.is_empty(), "{report}");
    assert!(agent.try_wait()?.is_none(), "the process is the same: {agent}");
    assert!(agent.stop()?.success());
    Ok(())
}

/// What kube-proxy 1.36 in nftables mode has for the Service of this test, and a table of somebody else.
const KUBE_PROXY_NFTABLES: &str = r#"
table ip kube-proxy {
    comment "rules for kube-proxy"
    set cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; elements = { 10.96.0.10 } }
    set nodeport-ips { type ipv4_addr; comment "IPs that accept NodePort traffic"; elements = { 192.0.2.11 } }
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 10.96.0.10 . tcp . 80 : goto service-ABCDEFGH-demo/web/tcp/http }
    }
    map service-nodeports {
        type inet_proto . inet_service : verdict
        elements = { tcp . 30080 : goto service-ABCDEFGH-demo/web/tcp/http }
    }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    chain mark-for-masquerade { meta mark set meta mark | 0x4000; }
    chain masquerading {
        meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }
    chain endpoint-IJKLMNOP-demo/web/tcp/http__10.244.1.11/8080 {
        ip saddr 10.244.1.11 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.244.1.11:8080
    }
    chain endpoint-QRSTUVWX-demo/web/tcp/http__10.244.1.12/8080 {
        ip saddr 10.244.1.12 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.244.1.12:8080
    }
    chain service-ABCDEFGH-demo/web/tcp/http {
        ip saddr != 10.244.0.0/16 jump mark-for-masquerade
        numgen random mod 2 vmap {
            0 : goto endpoint-IJKLMNOP-demo/web/tcp/http__10.244.1.11/8080,
            1 : goto endpoint-QRSTUVWX-demo/web/tcp/http__10.244.1.12/8080
        }
    }
    chain services {
        ip daddr . meta l4proto . th dport vmap @service-ips
        ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }
    chain cluster-ips-check { ip daddr @cluster-ips reject; }
    chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
    chain filter-prerouting-pre-dnat { type filter hook prerouting priority -110; policy accept; }
    chain filter-forward {
        type filter hook forward priority 0; policy accept;
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }
    chain nat-prerouting { type nat hook prerouting priority -100; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
    chain nat-postrouting { type nat hook postrouting priority 100; policy accept; jump masquerading; }
}
table ip6 kube-proxy { comment "rules for kube-proxy"
}
table ip of-somebody-else { chain kube-proxy { type filter hook input priority 5; counter; }
}
"#;

#[test]
fn a_node_is_taken_over_from_kube_proxy_without_a_break() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    node.nft(KUBE_PROXY_NFTABLES)?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
    let client = cluster.lab.client();
    let storm =
        client.storm(StormSpec { probe: probe.clone(), rate: 300, duration: Duration::from_mins(1) })?;
    let transfer = client.transfer(&TransferSpec { probe, pace: None, limit: None })?;
    let foreign = || node.exec("nft", ["-s", "list", "table", "ip", "of-somebody-else"], "");
    let before = foreign()?;

    let mut agent = cluster.start(&[])?;
    cluster.wait("kube-proxy's tables are gone", |c| {
        let tables = c.lab.node().exec("nft", ["list", "tables"], "")?;
        Ok(!tables.contains("kube-proxy") && tables.contains("ip shunt"))
    })?;
    let at_change = transfer.bytes();
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    // What follows the change counts as well.
    std::thread::sleep(Duration::from_millis(500));
    let report = storm.stop()?;
    assert!(report.attempted > 100 && report.failures.is_empty(), "{report}");
    assert!(transfer.bytes() > at_change, "a connection that kube-proxy translated stands still");
    transfer.stop()?;
    assert_eq!(foreign()?, before, "somebody else's table was touched");

    // And back: everything goes, kube-proxy's as well as ours, and nothing else.
    assert!(agent.stop()?.success());
    node.nft(KUBE_PROXY_NFTABLES.split("table ip of-").next().context("text")?)?;
    let mut cleanup = cluster.start(&["--cleanup"])?;
    assert!(cleanup.wait(LONG)?.success(), "{cleanup}");
    assert_eq!(node.exec("nft", ["list", "tables"], "")?.trim(), "table ip of-somebody-else");
    Ok(())
}

/// What kube-proxy 1.36 in iptables mode has for the Service of this test, and rules of others.
const KUBE_PROXY_IPTABLES: &str = r#"*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:FOREIGN - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -j FOREIGN
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A FOREIGN -j RETURN
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SVC-ABCDEFGHIJKLMNOP - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SVC-ABCDEFGHIJKLMNOP ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-ABCDEFGHIJKLMNOP -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SVC-ABCDEFGHIJKLMNOP -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.244.1.11:8080
-A KUBE-SEP-BBBBBBBBBBBBBBBB -p tcp -m tcp -j DNAT --to-destination 10.244.1.12:8080
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"#;

/// Chains of kube-proxy, or of a mode with its names, in a flavour of iptables.
fn kube_chains(cluster: &Cluster, flavour: &str) -> Result<usize> {
    let saved = cluster.lab.node().exec(&format!("iptables-{flavour}-save"), [""; 0], "")?;
    Ok(saved.lines().filter(|line| line.starts_with(":KUBE-")).count())
}

#[test]
fn a_node_is_taken_over_from_kube_proxys_iptables_mode() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["nft", "legacy"] {
        let cluster = Cluster::new()?;
        let node = cluster.lab.node();
        node.exec(&format!("iptables-{flavour}-restore"), ["--noflush"], KUBE_PROXY_IPTABLES)?;
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
        let client = cluster.lab.client();
        let storm =
            client.storm(StormSpec { probe: probe.clone(), rate: 200, duration: Duration::from_mins(1) })?;
        let transfer = client.transfer(&TransferSpec { probe, pace: None, limit: None })?;
        let mut agent = cluster.start(&[])?;
        cluster.wait("kube-proxy's chains are gone", |c| Ok(kube_chains(c, flavour)? == 0))?;
        let at_change = transfer.bytes();
        cluster.endpoints(&["10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-b"])?;
        // What follows the change counts as well.
        std::thread::sleep(Duration::from_millis(500));
        let report = storm.stop()?;
        assert!(report.attempted > 50 && report.failures.is_empty(), "{flavour}: {report}");
        assert!(
            transfer.bytes() > at_change,
            "{flavour}: a connection that kube-proxy translated stands still"
        );
        transfer.stop()?;
        let saved = node.exec(&format!("iptables-{flavour}-save"), [""; 0], "")?;
        assert!(saved.contains("-A FORWARD -j FOREIGN") && saved.contains("-A FOREIGN -j RETURN"), "{saved}");
        agent.stop()?;
    }
    Ok(())
}

#[test]
fn the_mode_changes_under_load() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let with = |mode: &str| {
        format!("{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\n")
    };
    cluster.write_files(&with("nftables"))?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
    let client = cluster.lab.client();
    let storm =
        client.storm(StormSpec { probe: probe.clone(), rate: 200, duration: Duration::from_mins(2) })?;
    let transfer = client.transfer(&TransferSpec { probe, pace: None, limit: None })?;
    for mode in ["iptables", "nftables", "iptables", "nftables"] {
        let before = transfer.bytes();
        std::fs::write(cluster.path("config.conf"), with(mode))?;
        cluster.wait(mode, |c| Ok(c.get("127.0.0.1:10249", "/proxyMode")?.body == mode))?;
        cluster.wait("nothing of the other mode is left", |c| {
            let ours = c.lab.node().exec("nft", ["list", "tables"], "")?.contains(" shunt");
            let chains = kube_chains(c, "nft")? + kube_chains(c, "legacy")?;
            Ok(if mode == "nftables" { ours && chains == 0 } else { !ours && chains > 0 })
        })?;
        cluster.endpoints(&["10.244.1.11"]);
        cluster.reach("10.96.0.10:80", &["pod-a"])?;
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        assert!(transfer.bytes() > before, "a connection from before {mode} stands still");
    }
    let report = storm.stop()?;
    assert!(report.attempted > 200 && report.failures.is_empty(), "{report}");
    transfer.stop()?;
    assert!(agent.stop()?.success());
    Ok(())
}

#[test]
fn leftovers_stay_where_they_are_to_stay() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.lab.node().nft(KUBE_PROXY_NFTABLES)?;
    cluster.write_files(&format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nleftovers: Keep\nfuture: 1\n"
    ))?;
    let mut agent = cluster.start(&[])?;
    agent.wait_for("ShuntConfiguration: unknown field \"future\"", LONG)?;
    cluster.wait("in sync", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.body.contains("IPv4")))?;
    cluster.endpoints(&["10.244.1.11"]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(cluster.lab.node().exec("nft", ["list", "tables"], "")?.contains("table ip kube-proxy"));
    agent.stop()?;
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_tried_again_or_ends_it() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let taken = cluster.lab.node().run(|| Ok(std::net::TcpListener::bind("127.0.0.1:10249")?))?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    cluster.wait("an event", |c| {
        Ok(c.server.events().iter().any(|e| e["reason"] == "FailedToStartMetricServer"))
    })?;
    drop(taken);
    cluster.wait("metrics", |c| Ok(c.metrics()?.contains("kubeproxy_")))?;
    agent.stop()?;

    let _taken = cluster.lab.node().run(|| Ok(std::net::TcpListener::bind("127.0.0.1:10249")?))?;
    cluster.write_files(&KUBEADM.replace("bindAddressHardFail: false", "bindAddressHardFail: true"))?;
    let mut agent = cluster.start(&[])?;
    assert_eq!(agent.wait(LONG)?.code(), Some(1), "{agent}");
    assert!(agent.stderr().contains("failed to start metrics server on 127.0.0.1:10249"), "{agent}");
    Ok(())
}

#[test]
fn drift_is_mended_and_counted() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.write_files(&format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nresyncPeriod: 200ms\n"
    ))?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let drift = "shunt_drift_repaired_total{ip_family=\"IPv4\"}";
    assert_eq!(sample(&cluster.metrics()?, drift), Some(0.0));
    cluster.lab.node().nft("delete element ip shunt services { 10.96.0.10 . tcp . 80 }")?;
    cluster.wait("drift", |c| Ok(sample(&c.metrics()?, drift) == Some(1.0)))?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    agent.stop()?;
    Ok(())
}

#[test]
fn the_node_changes_in_place() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let ranges =
        KUBEADM.replace("nodePortAddresses: null", "nodePortAddresses: [192.0.2.0/24, 2001:db8::/64]");
    cluster.write_files(&ranges)?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("192.0.2.11:30080", &["pod-a", "pod-b"])?;
    let more: IpAddr = "192.0.2.77".parse()?;
    cluster.lab.add_node_address(more)?;
    cluster.reach("192.0.2.77:30080", &["pod-a", "pod-b"])?;
    cluster.wait("health checks there", |c| Ok(c.get("192.0.2.77:31234", "/")?.status == 200))?;
    assert_eq!(cluster.get("192.0.2.11:31234", "/")?.status, 200);
    cluster.lab.remove_node_address(more)?;
    cluster.wait("no health checks there", |c| Ok(c.get("192.0.2.77:31234", "/").is_err()))?;

    // Another primary address by the Node object, and back to where node ports follow it.
    cluster.write_files(KUBEADM)?;
    cluster.lab.add_node_address(more)?;
    cluster.wait("only the primary address", |c| {
        Ok(c.get("192.0.2.77:31234", "/").is_err() && c.get("192.0.2.11:31234", "/").is_ok())
    })?;
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.77" }] },
    }));
    cluster.reach("192.0.2.77:30080", &["pod-a", "pod-b"])?;
    cluster.wait("the primary address moved", |c| {
        Ok(c.get("192.0.2.11:31234", "/").is_err() && c.get("192.0.2.77:31234", "/").is_ok())
    })?;
    assert!(agent.try_wait()?.is_none(), "{agent}");
    agent.stop()?;
    Ok(())
}

#[test]
fn init_only_sets_sysctls_and_no_rules() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    node.set_sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "60")?;
    node.set_sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "500000")?;
    let mut agent = cluster.start(&["--init-only"])?;
    assert!(agent.wait(LONG)?.success(), "{agent}");
    assert_eq!(node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait")?, "3600");
    let kept = node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_established")?;
    assert_eq!(kept, "500000", "an administrator's larger value stays");
    assert_eq!(node.exec("nft", ["list", "tables"], "")?, "");
    Ok(())
}

#[test]
fn the_written_configuration_is_read_back_equal() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let write = |from: &[&str], to: &Path| -> Result<String> {
        let output = Command::new(SHUNT).arg("run").args(from).arg("--write-config-to").arg(to).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(std::fs::read_to_string(to)?)
    };
    let first = write(&["--proxy_mode=ebpf", "--cluster-cidr=10.0.0.0/8"], &path("first"))?;
    assert!(first.contains("mode: ebpf\n") && first.contains("clusterCIDR: 10.0.0.0/8\n"), "{first}");
    let file = path("first");
    let again = write(&["--config", file.to_str().context("path")?], &path("second"))?;
    assert_eq!(first, again);
    Ok(())
}
