//! More Services than ebpf mode's maps have room for.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shunt_harness::apiserver::Resource;
use shunt_harness::lab::{place, require_kernel};

use crate::cluster::{Cluster, KUBEADM};
use crate::metrics::sample;

/// Service ids below 64 of one family, from 16 on.
const ROOM: u32 = 24;
const SERVICES: u32 = 30;

fn put(cluster: &Cluster, n: u32) {
    let name = format!("many-{n:02}");
    let address = format!("10.96.1.{n}");
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }],
        },
    }));
    cluster.server.put(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-1"), "namespace": "demo", "labels": { "kubernetes.io/service-name": name },
        },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": [
            { "addresses": ["10.244.1.11"], "conditions": { "ready": true }, "nodeName": "worker-1" },
        ],
    }));
}

/// What there is no room for is said in the log, counted, and said of the Service itself; nothing of it is in the maps,
/// and the rest is served. Once there is room, it is served too.
#[test]
fn what_ebpf_mode_has_no_room_for_is_told_of_and_left_out() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let document =
        "apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: ebpf\nebpf: {frontendsMax: 64}\n";
    cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
    cluster.server.delete(Resource::Services, "demo", "web");
    for n in 0..SERVICES {
        put(&cluster, n);
    }
    let root = place::bpffs("full")?;
    let cgroup = place::cgroup("full")?;
    let mut agent = cluster.start(&[
        "--bpf-fs-root",
        root.to_str().context("a path")?,
        "--cgroup-root",
        cgroup.to_str().context("a path")?,
    ])?;
    let left_out = |metrics: &str| sample(metrics, "shunt_not_programmed{ip_family=\"IPv4\"}");
    cluster
        .wait("the metric", |c| Ok(left_out(&c.metrics()?) == Some(f64::from(SERVICES - ROOM))))
        .with_context(|| agent.to_string())?;
    let limited = "shunt_kernel_table_entries_limit{ip_family=\"IPv4\",table=\"services\"}";
    ensure!(sample(&cluster.metrics()?, limited) == Some(f64::from(ROOM)), "{}", cluster.metrics()?);
    for n in ROOM..SERVICES {
        let name = format!("many-{n:02}");
        let why = format!("demo/{name}:http/tcp: not served: all service ids are taken");
        ensure!(agent.stderr().contains(&why), "{agent}");
        cluster.wait("the event", |c| {
            Ok(c.server.events().iter().any(|event| {
                event["reason"] == "KernelTableFull"
                    && event["regarding"]["kind"] == "Service"
                    && event["regarding"]["name"] == name.as_str()
                    && event["note"].as_str().is_some_and(|note| note.contains(&why))
            }))
        })?;
    }
    let kernel = |agent: &mut shunt_harness::lab::ChildGuard| -> Result<String> {
        let socket = format!("/proc/{}/root/run/shunt/shunt.sock", agent.id());
        let mut dump = std::process::Command::new(crate::cluster::SHUNT);
        dump.args(["dump", "--stage", "kernel", "--admin-socket", &socket]);
        Ok(String::from_utf8(dump.output()?.stdout)?)
    };
    let held = kernel(&mut agent)?;
    for n in 0..SERVICES {
        let there =
            [format!("/many-{n:02}:"), format!("10.96.1.{n}:80/tcp")].map(|text| held.contains(&text));
        ensure!(there == [n < ROOM; 2], "many-{n:02}: {there:?}\n{held}");
    }
    cluster.reach("10.96.1.0:80", &["pod-a"])?;
    cluster.reach(&format!("10.96.1.{}:80", ROOM - 1), &["pod-a"])?;
    // Some go, and there is room.
    for n in 0..SERVICES - ROOM {
        cluster.server.delete(Resource::Services, "demo", &format!("many-{n:02}"));
    }
    cluster.wait("nothing is left out", |c| Ok(left_out(&c.metrics()?) == Some(0.0)))?;
    cluster.reach(&format!("10.96.1.{}:80", SERVICES - 1), &["pod-a"])?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}
