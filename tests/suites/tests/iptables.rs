//! What only iptables mode has: flushed rules are noticed, health checks are accepted, node ports answer on
//! loopback.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use shunt_core::compile::Context;
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, NodePortAddresses};
use shunt_core::service::{Service, ServicePort};
use shunt_core::table::Change;
use shunt_core::walk::{Outcome, Packet, walk};
use shunt_harness::cases::{self, Case};
use shunt_harness::lab::{Lab, require_kernel};
use shunt_mode::{Backend, rendered};
use shunt_mode_iptables::cover::RANGES_MAX;
use shunt_mode_iptables::kernel::Tools;
use shunt_mode_iptables::names;
use shunt_mode_iptables::op::About;
use shunt_mode_iptables::render::COMMENTED_MAX;
use shunt_mode_iptables::rule::{Match, Rule};
use shunt_suites::driver::{CaseRun, Cluster, Synced};
use shunt_suites::mode::{IptablesLegacy, IptablesNft, ModeUnderTest};
use shunt_suites::random::Step;
use xtables_tools::Table;

fn case(name: &str) -> Case {
    cases::all().unwrap().into_iter().find(|case| case.name == name).unwrap()
}

/// Whatever is flushed, in whichever table, the cheap look finds out.
fn flushed_rules_are_noticed<M: ModeUnderTest>(flavour: &str) -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let case = case("008-etp-local");
    let mut run = CaseRun::new(&case, M::MODE);
    run.next_step();
    for family in IpFamily::ALL {
        let tool = format!("{}-{flavour}", if family == IpFamily::V4 { "iptables" } else { "ip6tables" });
        for (table, flush) in
            [("filter", "-F"), ("nat", "-F"), ("mangle", "-X"), ("nat", "-X"), ("filter", "-X")]
        {
            let lab = Lab::builder().build()?;
            let mut kernel = lab.node().run(|| Ok(Synced::<M::Real>::adopt(M::real(family)?)?))?;
            ensure!(kernel.backend.intact()?, "nothing is missing before there is anything");
            let mut run = CaseRun::new(&case, M::MODE);
            run.next_step();
            kernel.sync(run.cluster.table(family), &Change::everything())?;
            if kernel.mirror == M::Fake::empty(family) {
                continue;
            }
            ensure!(kernel.backend.intact()?, "they are there");
            lab.node().exec(&tool, ["-t", table, "-F"], "")?;
            lab.node().exec(&tool, ["-t", table, flush], "")?;
            let mut looks = (0..10).map(|_| kernel.backend.intact());
            let noticed = looks.any(|intact| matches!(intact, Ok(false)));
            ensure!(noticed, "{tool} -t {table} {flush} is not noticed");
            kernel.mirror = kernel.backend.observe()?;
            kernel.sync(run.cluster.table(family), &Change::everything())?;
            ensure!(kernel.backend.intact()?, "mended");
            kernel.backend.cleanup()?;
            ensure!(kernel.backend.intact()?, "nothing is missing after the clean-up");
        }
    }
    Ok(())
}

#[test]
fn flushed_legacy_rules_are_noticed() {
    flushed_rules_are_noticed::<IptablesLegacy>("legacy").unwrap();
}

#[test]
fn flushed_nft_rules_are_noticed() {
    flushed_rules_are_noticed::<IptablesNft>("nft").unwrap();
}

/// Loopback is one more address of node ports, in IPv4 and where it is included.
#[test]
fn node_ports_answer_on_loopback_where_they_are_told_to() {
    let case = case("008-etp-local");
    let ranges =
        |texts: &[&str]| NodePortAddresses::Ranges(texts.iter().map(|text| text.parse().unwrap()).collect());
    let mut forwarded = 0;
    for (addresses, localhost, answers) in [
        (NodePortAddresses::All, true, true),
        (NodePortAddresses::All, false, false),
        (NodePortAddresses::Primary, true, false),
        (ranges(&["127.0.0.0/8"]), true, true),
        (ranges(&["192.168.0.0/16"]), true, false),
        (ranges(&["2001:db8::/64"]), true, true),
        (NodePortAddresses::PrimaryAnd(vec!["127.0.0.0/8".parse().unwrap()]), true, true),
        (NodePortAddresses::PrimaryAnd(vec!["2001:db8::/64".parse().unwrap()]), true, false),
    ] {
        let mut run = CaseRun::new(&case, IptablesLegacy::MODE);
        run.next_step();
        let config = Config {
            node_port_addresses: addresses.clone(),
            localhost_node_ports: localhost,
            ..run.cluster.compiler.context().config.clone()
        };
        run.cluster.step(&Step::Config(config));
        let table = run.cluster.table(IpFamily::V4);
        let state = rendered::<<IptablesLegacy as ModeUnderTest>::Fake>(table);
        assert_eq!(state.loopback.is_guarded() && state.loopback.routed, answers, "{addresses:?}");
        for (destination, source) in [("127.0.0.1", "127.0.0.1"), ("127.1.2.3", "127.0.0.1")] {
            let packet = Packet {
                source: source.parse().unwrap(),
                interface: None,
                destination: destination.parse::<IpAddr>().unwrap(),
                port: 3001,
                protocol: Protocol::Tcp,
            };
            let outcome = walk(table, &packet).outcome;
            let traced = IptablesLegacy::trace(&state, &table.node().local_addresses, &packet);
            assert_eq!(traced, Ok(outcome.clone()), "{packet}\n{state}");
            match outcome {
                Outcome::Forward(endpoints) => {
                    assert!(answers && endpoints.iter().all(|(_, masquerade)| *masquerade));
                    forwarded += 1;
                }
                other => assert!(!answers && other == Outcome::None, "{other}"),
            }
        }
    }
    assert_eq!(forwarded, 8);
    let v6 =
        CaseRun::new(&case, IptablesLegacy::MODE).cluster.table(IpFamily::V6).node().localhost_node_ports;
    assert!(!v6);
}

/// However much is to be done, the tool is called once for it.
#[test]
fn a_sync_is_one_call_of_the_tool() {
    let (mut syncs, mut calls) = (0, 0);
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, IptablesLegacy::MODE);
        let mut kernels = IpFamily::ALL.map(|family| Synced::adopt(IptablesLegacy::fake(family)).unwrap());
        while let Some(step) = run.next_step() {
            for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
                let change = run.cluster.take_change(family);
                let plan = kernel.sync(run.cluster.table(family), &change).unwrap();
                for transaction in &plan.transactions {
                    let groups = transaction.ops.chunk_by(|a, b| a.about() == b.about());
                    let of_rules = groups.filter(|group| group[0].about() == About::Rules).count();
                    assert!(of_rules <= 1, "{} {}: {plan}", case.name, step.folder.display());
                    calls += of_rules;
                }
                syncs += usize::from(!plan.is_empty());
                assert!(plan.transactions.len() <= 1, "{plan}");
            }
        }
    }
    assert!(calls > 50 && calls <= syncs, "{calls} calls in {syncs} syncs");
}

/// What costs more than a comparison of addresses is asked only of packets to addresses near those of Services, or
/// between endpoints of the node.
#[test]
fn sets_are_asked_for_a_few_ranges_only() {
    let mut asked = 0;
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, IptablesLegacy::MODE);
        while run.next_step().is_some() {
            for family in IpFamily::ALL {
                let state = rendered::<<IptablesLegacy as ModeUnderTest>::Fake>(run.cluster.table(family));
                for (table, chain) in [
                    (Table::Filter, names::SERVICES),
                    (Table::Filter, names::PROXY_FIREWALL),
                    (Table::Nat, names::POSTROUTING),
                ] {
                    let asks = |rule: &&Rule| {
                        rule.sets().next().is_some()
                            || rule.leads_to().is_some_and(|to| &**to == names::REFUSE)
                    };
                    let asking: Vec<&Rule> = state.rules(table, chain).iter().filter(asks).collect();
                    let of_range = |rule: &&Rule| {
                        rule.matches
                            .iter()
                            .any(|m| matches!(m, Match::Destination(false, range) if range.prefix_len() > 0))
                    };
                    assert!(asking.iter().all(of_range), "{}: {state}", case.name);
                    assert!(asking.len() <= RANGES_MAX + 2, "{}: {state}", case.name);
                    asked += asking.len();
                }
            }
        }
    }
    assert!(asked > 100, "{asked}");
}

/// A health check node port comes and goes as one operation, without a look at anything else.
#[test]
fn a_health_check_node_port_is_one_rule() {
    let case = case("008-etp-local");
    let mut run = CaseRun::new(&case, IptablesLegacy::MODE);
    run.next_step();
    let service = run.cluster.store.services().next().unwrap().as_ref().clone();
    let mut kernel = Synced::adopt(IptablesLegacy::fake(IpFamily::V4)).unwrap();
    let change = run.cluster.take_change(IpFamily::V4);
    kernel.sync(run.cluster.table(IpFamily::V4), &change).unwrap();
    assert!(
        kernel
            .mirror
            .to_string()
            .contains("--dport 30000 -m comment --comment \"ns1/svc1 health check node port\" -j ACCEPT")
    );
    for port in [None, Some(31_000)] {
        let changed = Service { health_check_node_port: port, ..service.clone() };
        run.cluster.step(&Step::Event(shunt_core::store::Event::Service(changed)));
        let change = run.cluster.take_change(IpFamily::V4);
        assert!(!change.is_empty() && !change.everything);
        let plan = kernel.sync(run.cluster.table(IpFamily::V4), &change).unwrap();
        assert_eq!(plan.len(), 1, "{plan}");
        let accepted = kernel.mirror.to_string().contains("--dport 31000 ");
        assert_eq!(accepted, port.is_some());
    }
    let context = Context::new(cases::NODE, Config::default());
    assert!(!context.facts(IpFamily::V4).localhost_node_ports);
}

/// In a large cluster rules carry no comments of Services. What is there stays as it is when a cluster becomes one.
#[test]
fn comments_of_services_end_where_a_cluster_is_large() {
    let mut cluster = Cluster::new(Context::new(cases::NODE, Config::default()));
    let case = case("001-no-endpoints-reject");
    let mut run = CaseRun::new(&case, IptablesLegacy::MODE);
    run.next_step();
    let service = run.cluster.store.services().next().unwrap().as_ref().clone();
    let add = |cluster: &mut Cluster, n: usize| {
        let [.., high, low] = (n as u32).to_be_bytes();
        let service = Service {
            name: NamespacedName::new("ns", format!("svc{n}")),
            cluster_ips: vec![[172, 30, high, low].into()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            ports: vec![ServicePort { node_port: None, ..service.ports[0].clone() }],
            ..service.clone()
        };
        cluster.step(&Step::Event(shunt_core::store::Event::Service(service)));
    };
    let commented =
        |state: &shunt_mode_iptables::state::State| state.to_string().matches("has no endpoints").count();
    for n in 1..=COMMENTED_MAX {
        add(&mut cluster, n);
    }
    let mut kernel = Synced::adopt(IptablesLegacy::fake(IpFamily::V4)).unwrap();
    kernel.sync(cluster.table(IpFamily::V4), &Change::everything()).unwrap();
    assert_eq!(commented(&kernel.mirror), COMMENTED_MAX);

    // Another Service takes over the address of one: rules name who has it.
    cluster.take_change(IpFamily::V4);
    let heir = Service {
        name: NamespacedName::new("ns", "heir"),
        cluster_ips: vec![[172, 30, 0, 7].into()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        ports: vec![ServicePort { node_port: None, ..service.ports[0].clone() }],
        ..service.clone()
    };
    cluster.steps(&[
        Step::Event(shunt_core::store::Event::ServiceGone(NamespacedName::new("ns", "svc7"))),
        Step::Event(shunt_core::store::Event::Service(heir)),
    ]);
    let change = cluster.take_change(IpFamily::V4);
    kernel.sync(cluster.table(IpFamily::V4), &change).unwrap();
    let text = kernel.mirror.to_string();
    assert!(text.contains("\"ns/heir") && !text.contains("\"ns/svc7 ") && !text.contains("\"ns/svc7:"));

    add(&mut cluster, COMMENTED_MAX + 1);
    let change = cluster.take_change(IpFamily::V4);
    let plan = kernel.sync(cluster.table(IpFamily::V4), &change).unwrap();
    assert!(plan.len() < 10, "{plan}");
    assert_eq!(commented(&kernel.mirror), COMMENTED_MAX, "the new one has none");
    let again = kernel.sync(cluster.table(IpFamily::V4), &Change::everything()).unwrap();
    assert!(again.is_empty(), "{again}");
    assert_eq!(
        commented(&rendered::<<IptablesLegacy as ModeUnderTest>::Fake>(cluster.table(IpFamily::V4))),
        0
    );
}

/// What ipvs mode makes of the chains that both have, in short, and one that only it has.
const TAKEN_OVER: &str = "*filter
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-A INPUT -j KUBE-IPVS-FILTER
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-IPVS-FILTER -j RETURN
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A KUBE-SERVICES -s 10.9.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-POSTROUTING -j RETURN
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
";

/// After a switch to ipvs mode what only iptables mode had goes, in the flavour in use and in the other one; chains
/// that ipvs mode has taken over stay as they are, with what leads to them.
fn chains_that_ipvs_mode_has_taken_over_stay<M, N>(
    flavour: &str,
    tools: impl Fn(&mut N::Real) -> &mut Tools,
) -> Result<()>
where
    M: ModeUnderTest,
    N: ModeUnderTest,
{
    if !require_kernel() {
        return Ok(());
    }
    let case = case("044-session-affinity");
    let mut run = CaseRun::new(&case, M::MODE);
    run.next_step();
    let family = IpFamily::V4;
    let lab = Lab::builder().build()?;
    let table = run.cluster.table(family);
    lab.node().run(|| Ok(Synced::<M::Real>::adopt(M::real(family)?)?.sync(table, &Change::everything())?))?;
    let mut kernel = lab.node().run(|| Ok(Synced::<N::Real>::adopt(N::real(family)?)?))?;
    kernel.sync(table, &Change::everything())?;
    let rules = |what: &str| {
        let text = lab.node().exec(&format!("iptables-{what}-save"), [""; 0], "")?;
        let lines = text.lines().filter(|line| line.starts_with("-A") || line.contains(" - ["));
        Ok::<_, anyhow::Error>(
            lines.map(|line| line.split(" [").next().unwrap().to_owned()).collect::<BTreeSet<_>>(),
        )
    };
    lab.node().exec(&format!("iptables-{flavour}-restore"), ["--noflush", "--wait"], TAKEN_OVER)?;
    let before = rules(flavour)?;
    tools(&mut kernel.backend).remove_beside(&|used, table, chain| {
        used.name() == flavour && shunt_mode_ipvs::skeleton::is_ours(table, chain)
    })?;
    let left = rules(flavour)?;
    ensure!(left.is_subset(&before), "made anew: {left:?}");
    for text in TAKEN_OVER.lines().filter(|line| line.starts_with([':', '-'])) {
        let line = text.split(" [").next().unwrap();
        ensure!(left.contains(line), "{line} is gone: {left:?}");
    }
    let led: Vec<&str> = left.iter().filter_map(|l| l.rsplit_once("-j ").map(|(_, to)| to)).collect();
    let ours = ["SHUNT-", "KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-NODEPORTS", "KUBE-PROXY-CANARY"];
    let stale: Vec<&String> =
        left.iter().filter(|line| ours.iter().any(|name| line.contains(name))).collect();
    ensure!(stale.is_empty(), "left: {stale:?}");
    ensure!(led.iter().filter(|to| **to == "KUBE-SERVICES").count() == 2, "hooks of the nat table: {left:?}");
    let other = if flavour == "legacy" { "nft" } else { "legacy" };
    let stale = rules(other)?;
    ensure!(stale.is_empty(), "in the other flavour: {stale:?}");
    ensure!(lab.node().exec("ipset", ["list", "-name"], "")?.is_empty(), "sets are left");
    Ok(())
}

#[test]
fn legacy_chains_that_ipvs_mode_has_taken_over_stay() {
    chains_that_ipvs_mode_has_taken_over_stay::<IptablesNft, IptablesLegacy>("legacy", |m| m.kernel())
        .unwrap();
}

#[test]
fn nft_chains_that_ipvs_mode_has_taken_over_stay() {
    chains_that_ipvs_mode_has_taken_over_stay::<IptablesLegacy, IptablesNft>("nft", |m| m.kernel()).unwrap();
}
