//! From every mode that this kernel runs to every other one, by a change of the configuration of a running
//! agent, under load.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shunt_harness::guest::{inside, test_in_guest};
use shunt_harness::lab::{
    ChildGuard, Namespace, Outcome, Probe, Storm, StormSpec, Transfer, TransferSpec, place, require_kernel,
};

use crate::cluster::{Cluster, KUBEADM};

/// Modes, with the flavour of iptables.
type Way = (&'static str, &'static str);
const NFTABLES: Way = ("nftables", "nft");
const LEGACY: Way = ("iptables", "legacy");
const NFT: Way = ("iptables", "nft");
const EBPF: Way = ("ebpf", "nft");
/// In the guest: its own kernel has no `nf_tables` for IP.
const IPVS: Way = ("ipvs", "legacy");
const GUEST_EBPF: Way = ("ebpf", "legacy");

/// Every ordered pair of modes of netfilter, once.
const NETFILTER: [Way; 7] = [NFTABLES, LEGACY, NFTABLES, NFT, LEGACY, NFT, NFTABLES];
/// Every ordered pair with ebpf mode, once.
const WITH_EBPF: [Way; 7] = [NFTABLES, EBPF, LEGACY, EBPF, NFT, EBPF, NFTABLES];

/// Every ordered pair of the modes that the guest's kernel runs, once.
const WITH_IPVS: [Way; 3] = [LEGACY, IPVS, LEGACY];
const WITH_IPVS_AND_EBPF: [Way; 5] = [IPVS, GUEST_EBPF, LEGACY, GUEST_EBPF, IPVS];

/// What is there of each mode.
type There = [bool; 6];

fn document((mode, flavour): Way) -> String {
    format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\niptablesFlavour: {flavour}\n"
    )
}

/// What each way to program the kernel has there: nftables, iptables-legacy, iptables-nft, sets, eBPF, IPVS.
fn there(cluster: &Cluster, bpf: &std::path::Path) -> Result<There> {
    let run = |program: &str, args: &[&str]| cluster.lab.node().exec(program, args.iter().copied(), "");
    let ours = |text: &str| text.contains("KUBE-") || text.contains("SHUNT-");
    let both = |flavour: &str| {
        let v4 = run(&format!("iptables-{flavour}-save"), &[])?;
        Ok::<_, anyhow::Error>(v4 + &run(&format!("ip6tables-{flavour}-save"), &[])?)
    };
    Ok([
        !inside() && run("nft", &["list", "tables"])?.contains(" shunt"),
        ours(&both("legacy")?),
        !inside() && ours(&both("nft")?),
        ours(&run("ipset", &["list", "-name"])?),
        bpf.join("shunt").exists(),
        run("ip", &["-o", "link", "show"])?.contains("kube-ipvs0"),
    ])
}

const fn expected(way: Way) -> There {
    let (mode, flavour) = (way.0.as_bytes(), way.1.as_bytes());
    match (mode, flavour) {
        (b"nftables", _) => [true, false, false, false, false, false],
        (b"iptables", b"legacy") => [false, true, false, true, false, false],
        (b"iptables", _) => [false, false, true, true, false, false],
        (b"ipvs", _) => [false, true, false, true, false, true],
        _ => [false, false, false, false, true, false],
    }
}

/// How often a family was in sync after a start.
fn syncs(log: &str) -> usize {
    log.matches("in sync with the kernel").count()
}

/// How many SYNs were sent once more from a namespace, since no answer came within a second.
fn syns_sent_again(from: &Namespace) -> Result<u64> {
    let counters = from.exec("cat", ["/proc/net/netstat"], "")?;
    let mut lines = counters.lines().map(str::split_whitespace);
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let found = names.zip(values).find(|(name, _)| *name == "TCPSynRetrans").context("no TCPSynRetrans")?;
    Ok(found.1.parse()?)
}

/// Goes through modes under load. Nothing is refused or reset, a connection from before each change goes on, and
/// nothing of the mode before is left after that: at once where the new mode `hands_over`, else when it has ended.
fn tour(name: &str, tour: &[Way], hands_over: bool) -> Result<()> {
    let cluster = Cluster::new()?;
    // Neither the machine's own cgroup nor its bpffs, nor those of tests beside: what is pinned there would be taken for
    // leftovers, and removed.
    let cgroup = place::cgroup(name)?;
    let bpf = place::bpffs(name)?;
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let arguments = ["--cgroup-root".to_owned(), path(&cgroup)?, "--bpf-fs-root".to_owned(), path(&bpf)?];
    cluster.write_files(&document(tour[0]))?;
    let mut agent = cluster.start(&arguments.each_ref().map(String::as_str))?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    cluster.wait("the first mode", |c| Ok(there(c, &bpf)? == expected(tour[0])))?;

    let probe = |to: &str| Ok::<_, anyhow::Error>(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)));
    let client = cluster.lab.client();
    // From two addresses: IPVS cannot tell two connections from the same port to the same endpoint apart that go by
    // different frontends.
    let storm = |probe, rate| client.storm(StormSpec { probe, rate, duration: Duration::from_mins(5) });
    let rates = if inside() { [20, 20] } else { [300, 200] };
    let storms = [
        storm(probe("10.96.0.10:80")?, rates[0])?,
        storm(probe("192.0.2.11:30080")?.from("198.51.100.21".parse()?), rates[1])?,
    ];
    let transfer = |from: &Namespace| {
        from.transfer(&TransferSpec { probe: probe("10.96.0.10:80")?, pace: Some(1 << 20), limit: None })
    };
    // These processes are in no cgroup that is served, so that ebpf mode meets the node's own connections at its
    // devices, too.
    // In ipvs mode VIPs are addresses of the node: there such connections have no way out to its devices.
    let of_node = !tour.contains(&IPVS) || !tour.contains(&GUEST_EBPF);
    let transfers = || {
        let from = [client, cluster.lab.node()].into_iter().take(if of_node { 2 } else { 1 });
        from.map(transfer).collect::<Result<Vec<_>>>()
    };
    let go_on = |transfers: &[Transfer], what: &str| {
        let bytes: Vec<u64> = transfers.iter().map(Transfer::bytes).collect();
        cluster.wait(what, |_| {
            Ok(transfers.iter().zip(&bytes).all(|(transfer, bytes)| transfer.bytes() > *bytes))
        })
    };
    let stop = |transfers: Vec<Transfer>| {
        transfers.into_iter().enumerate().try_for_each(|(n, transfer)| {
            transfer.stop().map(drop).with_context(|| format!("transfer {n}, by turns from client and node"))
        })
    };
    let gone = |way: Way, agent: &ChildGuard| {
        let mut left = Ok([false; 6]);
        cluster
            .wait("nothing is left of the mode before", |c| {
                left = there(c, &bpf);
                Ok(left.as_ref().is_ok_and(|left| *left == expected(way)))
            })
            .with_context(|| format!("{left:?} instead of {:?}: {agent}", expected(way)))
    };
    let mut long = transfers()?;
    for (from, to) in tour.iter().zip(&tour[1..]) {
        let what = format!("{from:?} to {to:?}");
        println!("{what}");
        let before = syncs(&agent.stderr());
        std::fs::write(cluster.path("config.conf"), document(*to))?;
        cluster
            .wait(&what, |_| Ok(syncs(&agent.stderr()) >= before + 2))
            .with_context(|| agent.to_string())?;
        if hands_over {
            gone(*to, &agent)?;
        }
        cluster.endpoints(&["10.244.1.11"]);
        cluster.reach("10.96.0.10:80", &["pod-a"])?;
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        go_on(&long, &format!("{what}: a connection from before"))?;
        let begun = storms.each_ref().map(Storm::attempted);
        cluster.wait("connections in this mode", |_| {
            Ok(storms
                .iter()
                .zip(begun)
                .all(|(storm, begun)| storm.attempted() > begun + if inside() { 10 } else { 50 }))
        })?;
        if hands_over {
            // From each of the modes, to the end.
            long.extend(transfers()?);
        } else {
            // Longer than what is left would stay otherwise.
            std::thread::sleep(Duration::from_secs(if *to == EBPF { 4 } else { 1 }));
            let left = there(&cluster, &bpf)?;
            let both = |n: usize| expected(*from)[n] || expected(*to)[n];
            ensure!(
                left == std::array::from_fn(both),
                "{what}: {left:?} while a connection needs both: {agent}"
            );
            go_on(&long, &format!("{what}: a connection from before, later"))?;
            stop(long).context(what.clone())?;
            gone(*to, &agent)?;
            // Not sooner: the mode before might still have taken it.
            long = transfers().with_context(|| format!("{what}: a new connection"))?;
        }
    }
    if !hands_over {
        // There and back while a connection keeps what is left of the first mode.
        let (last, before) = (tour[tour.len() - 1], tour[tour.len() - 2]);
        for way in [before, last, before, last] {
            let before = syncs(&agent.stderr());
            std::fs::write(cluster.path("config.conf"), document(way))?;
            cluster
                .wait("there and back", |_| Ok(syncs(&agent.stderr()) >= before + 2))
                .with_context(|| agent.to_string())?;
            go_on(&long, "there and back")
                .with_context(|| format!("{way:?} {:?} {agent}", there(&cluster, &bpf)))?;
        }
        stop(long)?;
        gone(last, &agent)?;
        long = transfers()?;
    }
    for storm in storms {
        let report = storm.stop()?;
        println!("{report}");
        ensure!(
            report.attempted > if inside() { 100 } else { 500 } && report.failures.is_empty(),
            "{agent}\n{report} {:?}",
            report.failures
        );
    }
    // The guest is slow enough to send some again that were not lost.
    let lost = if inside() { 0 } else { syns_sent_again(client)? };
    ensure!(lost == 0, "{agent}\n{lost} first packets were lost");
    stop(long)?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}

#[test]
fn modes_of_netfilter_give_way_to_each_other_under_load() -> Result<()> {
    if require_kernel() { tour("netfilter", &NETFILTER, true) } else { Ok(()) }
}

#[test]
fn ipvs_and_iptables_mode_give_way_to_each_other_under_load() {
    test_in_guest(module_path!(), "ipvs_and_iptables_mode_give_way_to_each_other_under_load", || {
        tour("ipvs", &WITH_IPVS, false).unwrap();
    });
}

#[test]
fn ebpf_mode_comes_and_goes_beside_ipvs_mode_under_load() {
    test_in_guest(module_path!(), "ebpf_mode_comes_and_goes_beside_ipvs_mode_under_load", || {
        tour("ipvs-and-ebpf", &WITH_IPVS_AND_EBPF, false).unwrap();
    });
}

/// IPVS remembers an ended connection for two minutes, and knows answers to it by client and endpoint alone: it would
/// translate those to a later connection between the same two, whatever frontend that one has.
#[test]
fn ebpf_mode_keeps_off_the_ended_connections_of_ipvs_mode() {
    test_in_guest(module_path!(), "ebpf_mode_keeps_off_the_ended_connections_of_ipvs_mode", || {
        let answered = || -> Result<()> {
            let cluster = Cluster::new()?;
            cluster.endpoints(&["10.244.1.11"]);
            let (cgroup, bpf) = (place::cgroup("ended")?, place::bpffs("ended")?);
            let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
            let places =
                ["--cgroup-root".to_owned(), path(&cgroup)?, "--bpf-fs-root".to_owned(), path(&bpf)?];
            cluster.write_files(&document(IPVS))?;
            let agent = cluster.start(&places.each_ref().map(String::as_str))?;
            cluster.reach("10.96.0.10:80", &["pod-a"])?;
            let ask = |to: &str, ports: std::ops::Range<u16>| {
                let probe = |port| Ok::<_, anyhow::Error>(Probe::tcp(to.parse()?).from_port(port));
                cluster.lab.client().probe_all(ports.map(probe).collect::<Result<_>>()?)
            };
            let all_answered = |outcomes: &[Outcome]| outcomes.iter().all(|o| o.answer().is_some());
            let before = ask("10.96.0.10:80", 50_000..50_020)?;
            ensure!(all_answered(&before), "{before:?}");
            let synced = syncs(&agent.stderr());
            std::fs::write(cluster.path("config.conf"), document(GUEST_EBPF))?;
            cluster.wait("ebpf mode", |_| Ok(syncs(&agent.stderr()) >= synced + 2))?;
            let after = ask("192.0.2.11:30080", 50_000..50_020)?;
            ensure!(all_answered(&after), "{after:?}: {agent}");
            Ok(())
        };
        answered().unwrap();
    });
}

#[test]
fn ebpf_mode_comes_and_goes_under_load() -> Result<()> {
    if require_kernel() { tour("ebpf", &WITH_EBPF, false) } else { Ok(()) }
}
