//! The metrics server: pages, names, labels and buckets.

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_harness::lab::{Probe, TransferSpec, place, require_kernel};

use crate::cluster::{Cluster, KUBEADM};

/// The value of a sample.
pub(crate) fn sample(metrics: &str, name: &str) -> Option<f64> {
    metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

pub(crate) fn server(cluster: &Cluster) -> Result<()> {
    let at = "127.0.0.1:10249";
    let plain = |path: &str, body: &str| -> Result<()> {
        let answer = cluster.get(at, path)?;
        assert_eq!((answer.status, answer.body.as_str()), (200, body));
        assert_eq!(answer.headers["content-type"], "text/plain; charset=utf-8");
        Ok(())
    };
    plain("/proxyMode", "nftables")?;
    plain("/healthz", "ok")?;
    slis(cluster)?;
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
        ("kubernetes_feature_enabled{name=\"AllowServiceExternalIPs\",stage=\"DEPRECATED\"}", 1.0),
        ("process_resident_memory_bytes", 1e6),
        ("process_cpu_seconds_total", 0.0),
    ] {
        let value = sample(&metrics, name).with_context(|| format!("{name}: {metrics}"))?;
        assert!(value >= least, "{name}: {value}");
    }
    let host = cluster.server.url();
    let host = host.trim_start_matches("https://").trim_end_matches('/');
    let listed = format!("rest_client_requests_total{{code=\"200\",method=\"GET\",host=\"{host}\"}}");
    assert!(sample(&metrics, &listed).is_some_and(|n| n >= 3.0), "{listed}: {metrics}");
    let took = format!("rest_client_request_duration_seconds_count{{verb=\"POST\",host=\"{host}\"}}");
    assert!(sample(&metrics, &took).is_some_and(|n| n >= 1.0), "{took}: {metrics}");
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
    documented(&metrics);
    openmetrics(cluster)?;
    promtool(&metrics)
}

/// Scrapers that accept it get the newer format: counters without the end of their samples' names, and an end mark.
fn openmetrics(cluster: &Cluster) -> Result<()> {
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let answer = cluster.ask_with("GET", "127.0.0.1:10249", "/metrics", accept)?;
    assert_eq!(answer.headers["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(answer.body.ends_with("# EOF\n"), "{}", answer.body);
    assert!(answer.body.contains("\n# TYPE kubeproxy_proxy_healthz counter\n"), "{}", answer.body);
    assert!(answer.body.contains("\nkubeproxy_proxy_healthz_total{code=\"200\"}"), "{}", answer.body);
    Ok(())
}

/// Every metric that is shown stands in the reference, in full or by the end of its name.
pub(crate) fn documented(metrics: &str) {
    let words: Vec<&str> = include_str!("../../../../docs/metrics.md")
        .split('`')
        .filter_map(|word| word.split('{').next())
        .filter(|word| word.len() > 3)
        .collect();
    for name in metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()) {
        let is_meant = |word: &&str| {
            let end = word.strip_prefix("...").is_some_and(|end| name.ends_with(end));
            let start = word.strip_suffix('*').is_some_and(|start| name.starts_with(start));
            name == *word || end || start
        };
        assert!(words.iter().any(is_meant), "docs/metrics.md lacks {name}");
    }
}

/// Results of checks appear when they are asked for, and can be reset.
fn slis(cluster: &Cluster) -> Result<()> {
    let at = "127.0.0.1:10249";
    let delete = || cluster.ask("DELETE", at, "/metrics/slis");
    assert_eq!(delete()?.body, "metrics reset\n");
    let page = || Ok::<_, anyhow::Error>(cluster.get(at, "/metrics/slis")?.body);
    assert!(!page()?.contains("ping"), "{}", page()?);
    for _ in 0..2 {
        assert_eq!(cluster.get(at, "/healthz")?.status, 200);
    }
    let text = page()?;
    assert_eq!(sample(&text, "kubernetes_healthcheck{name=\"ping\",type=\"healthz\"}"), Some(1.0), "{text}");
    let all = "kubernetes_healthchecks_total{name=\"ping\",type=\"healthz\",status=\"success\"}";
    assert_eq!(sample(&text, all), Some(2.0), "{text}");
    promtool(&text)
}

/// What the dashboard "Kubernetes / Proxy" of kubernetes-mixin (dashboards/proxy.libsonnet), which kube-prometheus
/// installs, asks kube-proxy for. Its panel "Goroutines" (`go_goroutines`) stays empty; its alerts ask for `up` only.
const MIXIN: &str = "kubeproxy_sync_proxy_rules_duration_seconds_count
    kubeproxy_sync_proxy_rules_duration_seconds_bucket kubeproxy_network_programming_duration_seconds_count
    kubeproxy_network_programming_duration_seconds_bucket rest_client_requests_total
    rest_client_request_duration_seconds_bucket process_resident_memory_bytes process_cpu_seconds_total";

/// Every metric that dashboards and alerts ask for is there.
fn dashboards(metrics: &str) {
    for text in [
        include_str!("../../../../deploy/dashboards/grafana.json"),
        include_str!("../../../../deploy/dashboards/alerts.yaml"),
        MIXIN,
    ] {
        let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| {
            ["kubeproxy_", "shunt_", "process_", "rest_client_"].iter().any(|prefix| word.starts_with(prefix))
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
pub(crate) fn promtool(metrics: &str) -> Result<()> {
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
    // kube-proxy's names: dashboards ask for them.
    let gauges = ["no_local_endpoints_total", "iptables_total"].map(|name| {
        format!("kubeproxy_sync_proxy_rules_{name} non-counter metrics should not have \"_total\" suffix")
    });
    let complaints: Vec<&str> =
        text.lines().filter(|line| !gauges.iter().any(|known| known == line)).collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
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

/// In ebpf mode programs count: connections by Service port and endpoint, at sockets and at devices, and bytes at
/// devices.
#[test]
fn programs_count() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let (cgroup, bpf) = (place::cgroup("metrics")?, place::bpffs("metrics")?);
    let text = |path: &Path| path.to_str().map(str::to_owned).context("a path");
    let (cgroup_text, bpf_text) = (text(&cgroup)?, text(&bpf)?);
    cluster.write_files(&format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: ebpf\n"
    ))?;
    let mut agent = cluster.start(&["--cgroup-root", &cgroup_text, "--bpf-fs-root", &bpf_text])?;
    let web = "namespace=\"demo\",service=\"web\",port=\"http\",ip_family=\"IPv4\",protocol=\"TCP\"";
    let forwarded = format!("shunt_service_flows_total{{{web},result=\"forwarded\"}}");
    let of_pod = |pod| format!("shunt_endpoint_flows_total{{{web},endpoint=\"10.244.1.{pod}:8080\"}}");
    let bytes = |direction| format!("shunt_service_flow_bytes_total{{{web},direction=\"{direction}\"}}");
    // A look every half minute.
    let wait = |holds: &dyn Fn(&str) -> bool| {
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            match cluster.metrics() {
                Ok(metrics) if holds(&metrics) => return Ok(metrics),
                seen => ensure!(Instant::now() < deadline, "{seen:?}"),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let names = [forwarded.clone(), of_pod(11), of_pod(12), bytes("request"), bytes("response")];
    let all = |metrics: &str| names.each_ref().map(|name| sample(metrics, name));
    // The first look is the base, and the rules are there by then.
    let metrics = wait(&|metrics| sample(metrics, &forwarded).is_some())?;
    assert_eq!(all(&metrics), [Some(0.0), None, None, Some(0.0), Some(0.0)], "{metrics}");

    // A process of the cluster, at its socket: no bytes.
    let probe = Probe::tcp("10.96.0.10:80".parse()?);
    let threads = cgroup.join("cgroup.threads");
    cluster.lab.client().run(|| {
        std::fs::write(&threads, "0")?;
        for _ in 0..23 {
            let stream = TcpStream::connect_timeout(&probe.dst, Duration::from_secs(5))?;
            ensure!(stream.peer_addr()? == probe.dst, "the peer is {}", stream.peer_addr()?);
        }
        Ok(())
    })?;
    // One from outside that carries something.
    let spec =
        TransferSpec { probe: Probe::tcp("192.0.2.11:30080".parse()?), pace: None, limit: Some(1 << 20) };
    cluster.lab.client().transfer(&spec)?.join()?;

    let metrics = wait(&|metrics| sample(metrics, &forwarded).is_some_and(|n| n >= 24.0))?;
    let counted = all(&metrics).map(Option::unwrap_or_default);
    assert_eq!((counted[0], counted[1] + counted[2]), (24.0, 24.0), "{counted:?}");
    // There and back, with headers, and not what the others carried.
    assert!(counted[3..].iter().all(|bytes| (1e6..1.3e6).contains(bytes)), "{counted:?}");
    promtool(&metrics)?;
    documented(&metrics);

    // An endpoint that goes takes its counter along.
    cluster.endpoints(&["10.244.1.11"]);
    let metrics = wait(&|metrics| sample(metrics, &of_pod(12)).is_none())?;
    assert!(sample(&metrics, &of_pod(11)).is_some(), "{metrics}");
    agent.stop()?;
    Ok(())
}
