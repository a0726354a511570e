//! ebpf mode in the binary: more Services than its maps have room for, limits that change, devices that come.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shunt_harness::apiserver::Resource;
use shunt_harness::lab::{ChildGuard, Probe, place, require_kernel};

use crate::cluster::{Cluster, KUBEADM};
use crate::metrics::sample;

/// Service ids below 64 of one family, from 16 on.
const ROOM: u8 = 24;
const SERVICES: u8 = 30;

fn put(cluster: &Cluster, n: u8) {
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

/// The agent in ebpf mode with its settings, and arguments that keep it in a place of the test's own.
fn start(cluster: &Cluster, place: &str, settings: &str, more: &[&str]) -> Result<ChildGuard> {
    let document =
        format!("apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: ebpf\nebpf: {settings}\n");
    cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
    let (root, cgroup) = (place::bpffs(place)?, place::cgroup(place)?);
    let root = root.to_str().context("a path")?;
    let cgroup = cgroup.to_str().context("a path")?;
    cluster.start(&[&["--bpf-fs-root", root, "--cgroup-root", cgroup], more].concat())
}

/// A pod whose device comes later is served at it as soon as the kernel tells of the device.
#[test]
fn a_device_that_comes_is_served_live() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let mut cluster = Cluster::new()?;
    let mut agent = start(&cluster, "devices", "{}", &[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    cluster.lab.add_pod("late", &["10.244.1.77".parse()?])?;
    // Its process is in no cgroup that the programs are at: its packets meet them at the device.
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(1));
    cluster
        .wait("the new pod is served", |c| Ok(c.lab.pod("late")?.probe(probe.clone())?.pod().is_some()))?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}

/// Limits take effect at the next start, and connections at devices go on; one that is too small is told of, and what is
/// there is served on.
#[test]
fn limits_change_at_a_start() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let limit = |c: &Cluster| {
        let name = "shunt_kernel_table_entries_limit{ip_family=\"IPv4\",table=\"services\"}";
        Ok::<_, anyhow::Error>(sample(&c.metrics()?, name))
    };
    for n in 0..20 {
        put(&cluster, n);
    }
    let mut open = None;
    // Half of the ids from 16 on are those of IPv4.
    for (settings, more, services) in [
        ("{frontendsMax: 1000, flowsMax: 4096}", &[][..], 492.0),
        ("{frontendsMax: 1000}", &["--ebpf-frontends-max", "64", "--ebpf-flows-max", "8192"], 24.0),
        ("{frontendsMax: 128}", &["--ebpf-flows-max", "2048"], 56.0),
    ] {
        let mut agent = start(&cluster, "limits", settings, more)?;
        cluster.wait("the limit", |c| Ok(limit(c)? == Some(services))).with_context(|| agent.to_string())?;
        cluster.reach("10.96.1.7:80", &["pod-a"])?;
        if open.is_none() {
            let probe = Probe::tcp("192.0.2.11:30080".parse()?).timeout(Duration::from_secs(5));
            open = Some(cluster.lab.client().converse(&probe)?);
        }
        let answer = open.as_mut().map(shunt_harness::lab::Conversation::ask);
        answer.transpose().context("a connection through a device")?;
        ensure!(agent.stop()?.success(), "{agent}");
    }
    for n in 20..50 {
        put(&cluster, n);
    }
    let mut agent = start(&cluster, "limits", "{frontendsMax: 1000}", &[])?;
    cluster.reach("10.96.1.49:80", &["pod-a"])?;
    ensure!(agent.stop()?.success(), "{agent}");
    let mut agent = start(&cluster, "limits", "{frontendsMax: 64}", &[])?;
    cluster.wait("the limit stays", |c| Ok(limit(c)? == Some(492.0))).with_context(|| agent.to_string())?;
    let refused = "--ebpf-frontends-max (ebpf.frontendsMax) is 64, but what is there needs 117";
    ensure!(agent.stderr().contains(refused), "{agent}");
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}

/// What there is no room for is said in the log, counted, and said of the Service itself; nothing of it is in the maps,
/// and the rest is served. Once there is room, it is served too.
#[test]
fn what_ebpf_mode_has_no_room_for_is_told_of_and_left_out() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.server.delete(Resource::Services, "demo", "web");
    for n in 0..SERVICES {
        put(&cluster, n);
    }
    let mut agent = start(&cluster, "full", "{frontendsMax: 64}", &[])?;
    let left_out = |metrics: &str| sample(metrics, "shunt_not_programmed{ip_family=\"IPv4\"}");
    cluster
        .wait("the metric", |c| Ok(left_out(&c.metrics()?) == Some(f64::from(SERVICES - ROOM))))
        .with_context(|| agent.to_string())?;
    let limited = "shunt_kernel_table_entries_limit{ip_family=\"IPv4\",table=\"services\"}";
    ensure!(sample(&cluster.metrics()?, limited) == Some(f64::from(ROOM)), "{}", cluster.metrics()?);
    for n in ROOM..SERVICES {
        let name = format!("many-{n:02}");
        let why = format!("demo/{name}:http/tcp: not served: all service ids are taken");
        cluster.wait("the log", |_| Ok(agent.stderr().contains(&why))).with_context(|| agent.to_string())?;
        cluster.wait("the event", |c| {
            Ok(c.server.events().iter().any(|event| {
                event["reason"] == "KernelTableFull"
                    && event["regarding"]["kind"] == "Service"
                    && event["regarding"]["name"] == name.as_str()
                    && event["note"].as_str().is_some_and(|note| note.contains(&why))
            }))
        })?;
    }
    let kernel = |agent: &ChildGuard| -> Result<String> {
        let socket = format!("/proc/{}/root/run/shunt/shunt.sock", agent.id());
        let mut dump = std::process::Command::new(crate::cluster::SHUNT);
        dump.args(["dump", "--stage", "kernel", "--admin-socket", &socket]);
        Ok(String::from_utf8(dump.output()?.stdout)?)
    };
    let held = kernel(&agent)?;
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
