//! From every mode that this kernel runs to every other one, by a change of the configuration of a running
//! agent, under load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shunt_harness::lab::{Outcome, Probe, Storm, StormSpec, Transfer, TransferSpec, place, require_kernel};

use crate::cluster::{Cluster, KUBEADM};

/// Modes, with the flavour of iptables.
type Way = (&'static str, &'static str);
const NFTABLES: Way = ("nftables", "nft");
const LEGACY: Way = ("iptables", "legacy");
const NFT: Way = ("iptables", "nft");
const EBPF: Way = ("ebpf", "nft");

/// Every ordered pair of modes of netfilter, once.
const NETFILTER: [Way; 7] = [NFTABLES, LEGACY, NFTABLES, NFT, LEGACY, NFT, NFTABLES];
/// Every ordered pair with ebpf mode, once.
const WITH_EBPF: [Way; 7] = [NFTABLES, EBPF, LEGACY, EBPF, NFT, EBPF, NFTABLES];

fn document((mode, flavour): Way) -> String {
    format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\niptablesFlavour: {flavour}\n"
    )
}

/// What each way to program the kernel has there: nftables, iptables-legacy, iptables-nft, sets, eBPF.
fn there(cluster: &Cluster, bpf: &std::path::Path) -> Result<[bool; 5]> {
    let run = |program: &str, args: &[&str]| cluster.lab.node().exec(program, args.iter().copied(), "");
    let ours = |text: &str| text.contains("KUBE-") || text.contains("SHUNT-");
    let both = |flavour: &str| {
        let v4 = run(&format!("iptables-{flavour}-save"), &[])?;
        Ok::<_, anyhow::Error>(v4 + &run(&format!("ip6tables-{flavour}-save"), &[])?)
    };
    Ok([
        run("nft", &["list", "tables"])?.contains(" shunt"),
        ours(&both("legacy")?),
        ours(&both("nft")?),
        ours(&run("ipset", &["list", "-name"])?),
        bpf.join("shunt").exists(),
    ])
}

const fn expected(way: Way) -> [bool; 5] {
    let (mode, flavour) = (way.0.as_bytes(), way.1.as_bytes());
    match (mode, flavour) {
        (b"nftables", _) => [true, false, false, false, false],
        (b"iptables", b"legacy") => [false, true, false, true, false],
        (b"iptables", _) => [false, false, true, true, false],
        _ => [false, false, false, false, true],
    }
}

/// Goes through modes under load, and gives how connections failed meanwhile. `hands_over`: whether connections
/// that one mode translated go on under the next one.
fn tour(tour: &[Way], hands_over: bool) -> Result<Vec<(Duration, Outcome)>> {
    let cluster = Cluster::new()?;
    // Neither the machine's own cgroup nor its bpffs.
    let cgroup = place::cgroup("modes")?;
    let bpf = place::bpffs("modes")?;
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let arguments = ["--cgroup-root".to_owned(), path(&cgroup)?, "--bpf-fs-root".to_owned(), path(&bpf)?];
    cluster.write_files(&document(tour[0]))?;
    let mut agent = cluster.start(&arguments.each_ref().map(String::as_str))?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    cluster.wait("the first mode", |c| Ok(there(c, &bpf)? == expected(tour[0])))?;

    let probe = |to: &str| Ok::<_, anyhow::Error>(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)));
    let client = cluster.lab.client();
    let storm = |to: &str, rate| {
        client.storm(StormSpec { probe: probe(to)?, rate, duration: Duration::from_mins(5) })
    };
    let storms = [storm("10.96.0.10:80", 300)?, storm("192.0.2.11:30080", 200)?];
    let transfer = || {
        client.transfer(&TransferSpec { probe: probe("10.96.0.10:80")?, pace: Some(1 << 20), limit: None })
    };
    let goes_on = |transfer: &Transfer, what: &str| {
        let bytes = transfer.bytes();
        cluster.wait(what, |_| Ok(transfer.bytes() > bytes))
    };
    let mut long = transfer()?;
    for (from, to) in tour.iter().zip(&tour[1..]) {
        let what = format!("{from:?} to {to:?}");
        std::fs::write(cluster.path("config.conf"), document(*to))?;
        let mut left = Ok([false; 5]);
        cluster
            .wait(&what, |c| {
                left = there(c, &bpf);
                Ok(left.as_ref().is_ok_and(|left| *left == expected(*to)))
            })
            .with_context(|| format!("{left:?} instead of {:?}: {agent}", expected(*to)))?;
        cluster.endpoints(&["10.244.1.11"]);
        cluster.reach("10.96.0.10:80", &["pod-a"])?;
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        if !hands_over {
            // docs/migration.md
            drop(std::mem::replace(&mut long, transfer()?));
        }
        goes_on(&long, &format!("{what}: a connection from before"))?;
        let begun = storms.each_ref().map(Storm::attempted);
        cluster.wait("connections in this mode", |_| {
            Ok(storms.iter().zip(begun).all(|(storm, begun)| storm.attempted() > begun + 50))
        })?;
    }
    let mut failures = Vec::new();
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}");
        failures.extend(report.failures);
    }
    long.stop()?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(failures)
}

#[test]
fn modes_of_netfilter_give_way_to_each_other_under_load() -> Result<()> {
    if require_kernel() {
        let failures = tour(&NETFILTER, true)?;
        ensure!(failures.is_empty(), "{failures:?}");
    }
    Ok(())
}

/// What is in the middle of its handshake may break, and nothing else: the storms' connections are short.
#[test]
fn ebpf_mode_comes_and_goes_under_load() -> Result<()> {
    if require_kernel() {
        let failures = tour(&WITH_EBPF, false)?;
        ensure!(failures.len() < 250, "half a second's worth: {failures:?}");
    }
    Ok(())
}
