//! From one mode to another on a node that carries traffic: nothing is refused, nothing is left behind.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shunt_harness::lab::{ChildGuard, Lab, Probe, StormSpec, TransferSpec, require_kernel};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
const LONG: Duration = Duration::from_mins(1);

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples")
}

fn lab() -> Result<Lab> {
    let mut builder = Lab::builder()
        .node(["192.0.2.11".parse()?, "2001:db8::11".parse()?])
        .client(["198.51.100.20".parse()?]);
    for (pod, last) in [("pod-a", 11), ("pod-b", 12), ("pod-c", 13)] {
        builder = builder.pod(pod, [format!("10.244.1.{last}").parse()?]);
    }
    let lab = builder.build()?;
    for pod in ["pod-a", "pod-b", "pod-c"] {
        lab.pod(pod)?.serve_ports([8080, 8053, 8090, 8443])?;
    }
    Ok(lab)
}

/// Starts the agent; when this returns, both families are in sync.
fn start(lab: &Lab, arguments: &[&str]) -> Result<ChildGuard> {
    let mut command = Command::new(SHUNT);
    command.args(["run", "--hostname-override", "worker-1", "--cluster-cidr", "10.244.0.0/16"]);
    command.args(["--admin-socket", "", "--manifests"]).arg(examples()).args(arguments);
    let mut agent = lab.node().spawn(&command)?;
    let deadline = Instant::now() + LONG;
    loop {
        let log = agent.to_string();
        if log.matches("in sync with the kernel").count() >= 2 {
            return Ok(agent);
        }
        ensure!(agent.try_wait()?.is_none(), "ended: {log}");
        ensure!(Instant::now() < deadline, "never in sync: {log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What each way to program the kernel has there: nftables, iptables-legacy, iptables-nft, sets.
fn leavings(lab: &Lab) -> Result<[bool; 4]> {
    let run = |program: &str, args: &[&str]| lab.node().exec(program, args.iter().copied(), "");
    let ours = |text: &str| text.contains("KUBE-") || text.contains("SHUNT-");
    let both =
        |save: &str| Ok::<_, anyhow::Error>(run(save, &[])? + &run(&format!("ip6{}", &save[2..]), &[])?);
    Ok([
        run("nft", &["list", "tables"])?.contains(" shunt"),
        ours(&both("iptables-legacy-save")?),
        ours(&both("iptables-nft-save")?),
        ours(&run("ipset", &["list", "-name"])?),
    ])
}

#[test]
fn modes_take_turns_under_load() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab()?;
    let nftables: (&[&str], _) = (&["--mode", "nftables"], [true, false, false, false]);
    let legacy: (&[&str], _) =
        (&["--mode", "iptables", "--iptables-flavour", "legacy"], [false, true, false, true]);
    let nft: (&[&str], _) =
        (&["--mode", "iptables", "--iptables-flavour", "nft"], [false, false, true, true]);
    let mut agent = start(&lab, nftables.0)?;
    let storm = |to: &str| {
        let probe = Probe::tcp(to.parse()?).timeout(Duration::from_secs(20));
        lab.client().storm(StormSpec { probe, rate: 250, duration: LONG * 5 })
    };
    let storms = [storm("10.96.0.10:80")?, storm("192.0.2.11:30080")?];
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(20));
    let transfer = lab.client().transfer(&TransferSpec { probe, pace: Some(1 << 20), limit: None })?;
    for (arguments, expected) in [legacy, nftables, nft, legacy, nftables] {
        std::thread::sleep(Duration::from_millis(300));
        agent.stop()?;
        agent = start(&lab, arguments)?;
        // Others are cleaned up after once the new rules are in place.
        let deadline = Instant::now() + LONG;
        while leavings(&lab)? != expected {
            let left = leavings(&lab)?;
            ensure!(
                Instant::now() < deadline,
                "{arguments:?} left {left:?} instead of {expected:?}: {agent}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        let bytes = transfer.bytes();
        let deadline = Instant::now() + LONG;
        while transfer.bytes() == bytes {
            ensure!(Instant::now() < deadline, "the transfer stands still after {arguments:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}");
        ensure!(report.failures.is_empty(), "{report}");
    }
    transfer.stop()?;
    agent.stop()?;
    Ok(())
}

/// Node ports on loopback: routed there only once others are kept out, and masqueraded.
#[test]
fn node_ports_answer_on_loopback_and_to_nobody_else() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = lab()?;
    let sysctl = || lab.node().exec("cat", ["/proc/sys/net/ipv4/conf/all/route_localnet"], "");
    let mut agent = start(&lab, &["--mode", "iptables"])?;
    ensure!(sysctl()?.trim() == "0", "route_localnet without need");
    agent.stop()?;
    let mut agent = start(&lab, &["--mode", "iptables", "--nodeport-addresses", "127.0.0.0/8,192.0.2.0/24"])?;
    ensure!(sysctl()?.trim() == "1", "route_localnet is off: {agent}");
    let rules = lab.node().exec("iptables-nft", ["-S", "KUBE-FIREWALL"], "")?;
    ensure!(rules.contains("! -s 127.0.0.0/8 -d 127.0.0.0/8"), "{rules}");
    for to in ["127.0.0.1:30080", "192.0.2.11:30080"] {
        let seen = lab.node().probe(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)))?;
        ensure!(seen.pod().is_some(), "{to}: {seen}");
    }
    agent.stop()?;
    Ok(())
}
