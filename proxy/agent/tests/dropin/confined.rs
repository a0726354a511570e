//! Every mode with the capabilities and mounts of its DaemonSet, and nothing else.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Probe, TransferSpec, place, require_kernel};

use crate::cluster::{Cluster, KUBEADM, LONG};
use crate::metrics::{promtool, sample};
use crate::takeover::{KUBE_PROXY_IPTABLES, kube_chains};

/// The capabilities in a mode's overlay, or in the base that it does not change.
fn capabilities(mode: &str) -> Result<Vec<String>> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let overlay = std::fs::read_to_string(deploy.join("modes").join(mode).join("daemonset.yaml"));
    let base = std::fs::read_to_string(deploy.join("base/daemonset.yaml"))?;
    let of = |text: &str| {
        let (_, list) = text.split_once("capabilities:")?.1.split_once("add: [")?;
        Some(list.split_once(']')?.0.split(',').map(|name| name.trim().to_owned()).collect())
    };
    overlay.ok().as_deref().and_then(of).or_else(|| of(&base)).context("no capabilities")
}

/// Whether this process has `CAP_SYS_RESOURCE`.
fn may_lower_scores() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    bits.is_some_and(|bits| bits & (1 << 24) != 0)
}

/// Traffic flows, endpoints change, and nothing is complained about.
fn serves(mode: &str, mounts: &str, more: &[&str]) -> Result<()> {
    let cluster = Cluster::new()?;
    let document = format!("apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\n");
    cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
    // The init container is privileged.
    let mut init = cluster.start(&["--init-only"])?;
    ensure!(init.wait(LONG * 4)?.success(), "{init}");
    let capabilities = capabilities(mode)?;
    let mut agent = cluster.start_confined(&capabilities, mounts, more)?;
    cluster
        .reach("10.96.0.10:80", &["pod-a", "pod-b"])
        .with_context(|| format!("{mode} {capabilities:?}: {agent}"))?;
    cluster.reach("192.0.2.11:30080", &["pod-a", "pod-b"])?;
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    cluster.wait("healthy", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.status == 200))?;
    let metrics = cluster.metrics()?;
    for of_mode in [
        "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}".to_owned(),
        format!("shunt_info{{version=\"{}\",mode=\"{mode}\"}}", env!("CARGO_PKG_VERSION")),
    ] {
        ensure!(sample(&metrics, &of_mode).is_some_and(|n| n >= 1.0), "{of_mode}: {metrics}");
    }
    promtool(&metrics)?;
    let deprecated =
        cluster.server.events().iter().any(|e| e["reason"] == "IPVSDeprecation" && e["type"] == "Warning");
    ensure!(deprecated == (mode == "ipvs"), "the event IPVSDeprecation");
    ensure!(agent.stop()?.success(), "{agent}");
    let log = agent.stderr();
    let complaints: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
        // Where these tests themselves may not do it, nobody below them may.
        .filter(|line| !line.contains("oom_score_adj stays as it is") || may_lower_scores())
        // These two are the machine's, whichever namespace a lab has.
        .filter(|line| !line.contains("/nf_conntrack_max") && !line.contains("/hashsize"))
        .collect();
    ensure!(complaints.is_empty(), "{mode} {capabilities:?}: {complaints:#?}");
    Ok(())
}

#[test]
fn nftables_mode_needs_no_more_than_its_overlay_gives() -> Result<()> {
    if require_kernel() { serves("nftables", "", &[]) } else { Ok(()) }
}

/// What other modes and kube-proxy leave goes with these capabilities, too: rules of both flavours of iptables,
/// and a folder of ours in a bpffs.
#[test]
fn leftovers_go_with_the_capabilities_of_the_base() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["nft", "legacy"] {
        let cluster = Cluster::new()?;
        let node = cluster.lab.node();
        node.exec(&format!("iptables-{flavour}-restore"), ["--noflush"], KUBE_PROXY_IPTABLES)?;
        let mounts = "mount -t tmpfs tmpfs /sys/fs/bpf; mkdir -p /sys/fs/bpf/shunt/links";
        let mut agent = cluster.start_confined(&capabilities("nftables")?, mounts, &[])?;
        cluster
            .wait("kube-proxy's chains are gone", |c| Ok(kube_chains(c, flavour)? == 0))
            .with_context(|| agent.to_string())?;
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        agent.stop()?;
        ensure!(!agent.stderr().contains("may remain"), "{agent}");
    }
    Ok(())
}

#[test]
fn iptables_mode_needs_no_more_than_its_overlay_gives() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["nft", "legacy"] {
        serves("iptables", "", &["--iptables-flavour", flavour]).context(flavour)?;
    }
    Ok(())
}

#[test]
fn ebpf_mode_needs_no_more_than_its_overlay_gives() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cgroup = place::cgroup("confined")?;
    let cgroup = cgroup.to_str().context("a path")?;
    let mounts = "mount -t bpf bpf /sys/fs/bpf
        mount --rbind /sys/fs/cgroup /sys/fs/cgroup; mount -o remount,bind,ro /sys/fs/cgroup";
    serves("ebpf", mounts, &["--cgroup-root", cgroup])
}

/// Another overlay follows: without the capabilities of ebpf mode its connections are waited for, then it goes.
#[test]
fn ebpf_mode_gives_way_with_the_capabilities_of_the_base() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let (cgroup, bpf) = (place::cgroup("gives-way")?, place::bpffs("gives-way")?);
    let [cgroup, root] = [&cgroup, &bpf].map(|path| path.to_str().context("a path"));
    let places = ["--cgroup-root", cgroup?, "--bpf-fs-root", root?];
    let cluster = Cluster::new()?;
    let start = |mode: &str| {
        let document = format!("apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\n");
        cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
        // The bpffs is reached by way of a descriptor of this process, which takes one more here.
        let capabilities = [capabilities(mode)?, vec!["SYS_PTRACE".to_owned()]].concat();
        let agent = cluster.start_confined(&capabilities, "", &places)?;
        cluster
            .wait("in sync", |_| Ok(agent.stderr().matches("in sync with the kernel").count() == 2))
            .with_context(|| agent.to_string())?;
        Ok::<_, anyhow::Error>(agent)
    };
    let mut agent = start("ebpf")?;
    let probe = Probe::tcp("10.96.0.10:80".parse()?);
    let spec = TransferSpec { probe, pace: Some(1 << 20), limit: None };
    let transfer = cluster.lab.client().transfer(&spec)?;
    agent.stop()?;
    let mut agent = start("nftables")?;
    agent.wait_for("stays until its connections have ended", LONG)?;
    let bytes = transfer.bytes();
    cluster.wait("the connection goes on", |_| Ok(transfer.bytes() > bytes))?;
    assert!(bpf.join("shunt").exists());
    transfer.stop()?;
    cluster
        .wait("ebpf mode is gone", |_| Ok(!bpf.join("shunt").exists()))
        .with_context(|| agent.to_string())?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    agent.stop()?;
    let log = agent.stderr();
    assert!(!log.contains("may remain") && !log.contains("not waited for"), "{log}");
    Ok(())
}

#[test]
fn ipvs_mode_needs_no_more_than_its_overlay_gives() {
    test_in_guest(module_path!(), "ipvs_mode_needs_no_more_than_its_overlay_gives", || {
        serves("ipvs", "", &[]).unwrap();
    });
}

/// Nothing but a lower `oom_score_adj` takes `CAP_SYS_RESOURCE`: the kubelet gives pods of this class -997, and
/// kube-proxy's default is -999.
#[test]
fn the_oom_killers_score_takes_the_capability_that_overlays_give_for_it() {
    test_in_guest(
        module_path!(),
        "the_oom_killers_score_takes_the_capability_that_overlays_give_for_it",
        || {
            scores().unwrap();
        },
    );
}

fn scores() -> Result<()> {
    ensure!(may_lower_scores(), "the test itself may not do it");
    let given = capabilities("iptables")?;
    let without: Vec<String> = given.iter().filter(|name| *name != "SYS_RESOURCE").cloned().collect();
    ensure!(given.len() == without.len() + 1, "{given:?}");
    for (capabilities, expected) in [(&given, "-999"), (&without, "-997")] {
        let cluster = Cluster::new()?;
        let document = "apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: iptables\n";
        cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
        // Modules are loaded by the init container.
        let mut init = cluster.start(&["--init-only"])?;
        ensure!(init.wait(LONG * 4)?.success(), "{init}");
        let as_kubelet = "echo -997 > /proc/self/oom_score_adj";
        let mut agent = cluster.start_confined(capabilities, as_kubelet, &[])?;
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"]).with_context(|| agent.to_string())?;
        let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.id()))?;
        ensure!(score.trim() == expected, "{capabilities:?}: {score}");
        let complains = agent.stderr().contains("oom_score_adj stays as it is: Permission denied");
        ensure!(complains == (expected == "-997"), "{agent}");
        agent.stop()?;
    }
    Ok(())
}
