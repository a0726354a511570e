//! The configuration: written, changed while the agent runs, and what is refused.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_harness::lab::{Probe, StormSpec, require_kernel};

use crate::cluster::{Cluster, KUBEADM, LONG, SHUNT};

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

/// kubeadm's DaemonSet has a /sys of its own, in which no bpffs is mounted: what would be pinned in one that is mounted
/// there would go with the container, and Services with it.
#[test]
fn ebpf_mode_without_the_nodes_bpffs_is_refused() -> Result<()> {
    const NO_BPFFS: &str = "ebpf mode cannot run here: /sys/fs/bpf is no bpffs";
    if !require_kernel() {
        return Ok(());
    }
    let in_mode = |mode: &str| {
        format!("{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\n")
    };
    let cluster = Cluster::new()?;
    let start = || cluster.start_with("mount -t sysfs sysfs /sys", "", &[]);
    cluster.write_files(&in_mode("ebpf"))?;
    let mut agent = start()?;
    assert_eq!(agent.wait(LONG)?.code(), Some(1), "{agent}");
    let log = agent.stderr();
    assert!(log.contains(NO_BPFFS) && log.contains("deploy/modes/ebpf/kubeadm.yaml"), "{log}");

    // `auto` is another mode there, and a running agent stays in its own.
    cluster.write_files(&in_mode("auto"))?;
    let mut agent = start()?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    assert!(agent.stderr().contains("mode chosen: nftables"), "{agent}");
    std::fs::write(cluster.path("config.conf"), in_mode("ebpf"))?;
    agent.wait_for(NO_BPFFS, LONG)?;
    agent.wait_for("the configuration in use stays", LONG)?;
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    assert_eq!(cluster.get("127.0.0.1:10249", "/proxyMode")?.body, "nftables");
    assert!(!agent.stderr().contains("starting anew"), "{agent}");
    assert!(agent.stop()?.success());
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_tried_again_or_ends_it() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let take = |address: &'static str| cluster.lab.node().run(|| Ok(std::net::TcpListener::bind(address)?));
    let taken = (take("127.0.0.1:10249")?, take("0.0.0.0:10256")?);
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    for reason in ["FailedToStartMetricServer", "FailedToStartProxierHealthcheck"] {
        cluster.wait(reason, |c| {
            let event = |e: &Value| e["reason"] == reason && e["regarding"]["kind"] == "Node";
            Ok(c.server.events().iter().any(event))
        })?;
    }
    drop(taken);
    cluster.wait("metrics", |c| Ok(c.metrics()?.contains("kubeproxy_")))?;
    cluster.wait("health", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.status == 200))?;
    agent.stop()?;

    let _taken = cluster.lab.node().run(|| Ok(std::net::TcpListener::bind("127.0.0.1:10249")?))?;
    cluster.write_files(&KUBEADM.replace("bindAddressHardFail: false", "bindAddressHardFail: true"))?;
    let mut agent = cluster.start(&[])?;
    assert_eq!(agent.wait(LONG)?.code(), Some(1), "{agent}");
    assert!(agent.stderr().contains("failed to start metrics server on 127.0.0.1:10249"), "{agent}");
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
