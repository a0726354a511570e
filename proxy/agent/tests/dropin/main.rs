//! The binary in kube-proxy's place: kubeadm's command line and files, health, metrics, events, a
//! configuration that changes.

mod cluster;
mod config;
mod confined;
mod ebpf;
mod metrics;
mod modes;
mod node;
mod takeover;
mod takeover_ipvs;

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use shunt_harness::apiserver::Resource;
use shunt_harness::lab::require_kernel;

use cluster::{Answer, Cluster, service};

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
    metrics::server(&cluster)?;

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

/// Clients of health checks and metrics that send half a request, or do not read the answer.
#[test]
fn slow_clients_hold_up_neither_rules_nor_each_other() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let servers =
        [("127.0.0.1:10256", "/healthz"), ("127.0.0.1:10249", "/metrics"), ("192.0.2.11:31234", "/")];
    cluster.wait("all servers", |c| Ok(servers.iter().all(|(at, path)| c.get(at, path).is_ok())))?;
    let slow = cluster.lab.node().run(|| {
        let mut slow = Vec::new();
        for (at, path) in servers {
            for n in 0..100 {
                let mut stream = TcpStream::connect(at)?;
                write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n")?;
                if n % 20 == 0 {
                    // One after the other, until nothing more can be sent.
                    stream.set_nonblocking(true)?;
                    let whole = format!("\r\nGET {path} HTTP/1.1\r\nHost: x\r\n").repeat(200);
                    let _ = stream.write(whole.as_bytes());
                }
                slow.push(stream);
            }
        }
        Ok(slow)
    })?;
    for (endpoint, pod) in [("10.244.1.12", "pod-b"), ("10.244.1.11", "pod-a")] {
        let began = Instant::now();
        cluster.endpoints(&[endpoint]);
        cluster.reach("10.96.0.10:80", &[pod])?;
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        for (at, path) in servers {
            assert_eq!(cluster.get(at, path)?.status, 200, "{at}");
        }
    }
    drop(slow);
    assert!(agent.stop()?.success());
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
    // So shall they when the Node is being deleted, or is gone.
    let back = || {
        cluster.node(&json!({}));
        cluster.wait("eligible again", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.status == 200))
    };
    let leaves = |what: &str| {
        cluster.wait(what, |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.status == 503))?;
        assert_eq!(cluster.get("127.0.0.1:10256", "/livez")?.status, 200, "{what}");
        back()
    };
    back()?;
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": "worker-1", "deletionTimestamp": "2026-01-01T00:00:00Z" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
    }));
    leaves("the Node is being deleted")?;
    cluster.server.delete(Resource::Nodes, "", "worker-1");
    leaves("the Node is gone")?;
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
