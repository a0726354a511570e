//! Real packets through the real kernel, each case in namespaces of its own.

#![allow(missing_docs)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Packet, Reason, walk};
use shunt_harness::cases::{self, Case, SourceKind};
use shunt_harness::lab::{Lab, Namespace, require_kernel};
use shunt_mode::{Backend, rendered};
use shunt_suites::driver::{CaseRun, Cluster, Synced};
use shunt_suites::every_mode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{context, steps};
use shunt_suites::town::Town;

/// Cases that run at the same time. They wait most of the time.
const WORKERS: usize = 6;

/// What somebody else has in the kernel; it must stay as it is.
const FOREIGN: &str = "
table inet somebody {
  set theirs { type ipv4_addr; elements = { 10.9.9.9 } }
  chain forward { type filter hook forward priority 0; policy accept; ip saddr @theirs drop; }
  chain post { type nat hook postrouting priority 90; policy accept; ip daddr { 10.9.9.8, 10.9.9.9 } masquerade; }
}
table ip shunts {
  chain c { counter; }
}
";

fn adopt<M: ModeUnderTest>(node: &Namespace, family: IpFamily) -> Result<Synced<M::Real>> {
    node.run(|| {
        let mut real = M::real(family)?;
        real.probe()?;
        Ok(Synced::adopt(real)?)
    })
}

/// Believed and found are the same, and a process that starts now has nothing to do.
fn check_adoption<M: ModeUnderTest>(
    node: &Namespace,
    kernel: &mut Synced<M::Real>,
    cluster: &Cluster,
    family: IpFamily,
) -> Result<()> {
    let observed = kernel.backend.observe()?;
    ensure!(observed == kernel.mirror, "observed:\n{observed}\nbelieved:\n{}", kernel.mirror);
    let restarted = adopt::<M>(node, family)?;
    let plan = restarted.plan(cluster.table(family), &Change::everything());
    let ops = plan.transactions.iter().flat_map(|t| &t.ops);
    ensure!(ops.into_iter().all(M::is_garbage), "a restart would do\n{plan}");
    Ok(())
}

fn has_affinity(table: &ForwardingTable, packet: &Packet) -> bool {
    match walk(table, packet).reason {
        Reason::Frontend { frontend, .. } => {
            table.frontend(&frontend).is_some_and(|(p, _)| p.affinity.is_some())
        }
        _ => false,
    }
}

fn run_case<M: ModeUnderTest>(case: &Case, report: &Report) -> Result<()> {
    let town = Town::build(case)?;
    let node = town.lab.node();
    node.nft(FOREIGN)?;
    let foreign = M::list(node)?;
    let mut kernels = Vec::new();
    for family in IpFamily::ALL {
        kernels.push((family, adopt::<M>(node, family)?));
    }
    let mut run = CaseRun::new(case, M::MODE);
    let mut first = true;
    while let Some(step) = run.next_step() {
        for (family, kernel) in &mut kernels {
            let mut change = run.cluster.take_change(*family);
            if case.restart_between_steps {
                *kernel = adopt::<M>(node, *family)?;
                change = Change::everything();
            }
            let plan = kernel.sync(run.cluster.table(*family), &change)?;
            report.ops.fetch_add(plan.len(), Ordering::Relaxed);
            check_adoption::<M>(node, kernel, &run.cluster, *family)?;
            if first || change.everything {
                let again = kernel.plan(run.cluster.table(*family), &Change::everything());
                ensure!(again.is_empty(), "left to do:\n{again}");
            }
        }
        first = false;
        M::list(node)?;
        for packet in step.packets.iter().filter(|p| p.modes.contains(&M::MODE)) {
            let missing = M::lacks(&case.name, Some(&packet.name)).or(Town::cannot_send(packet));
            if let Some(missing) = missing {
                println!("skipped: {} mode, {}, {}: {missing}", M::MODE, case.name, packet.name);
                continue;
            }
            let vip = (packet.source_kind == SourceKind::LbVip).then_some(packet.packet.source);
            if let Some(vip) = vip {
                // Such a packet is only sent by a node that has the address.
                town.lab.add_node_address(vip)?;
            }
            let table = run.cluster.table(IpFamily::of(packet.packet.destination));
            let sent = town.send(packet, has_affinity(table, &packet.packet));
            if let Some(vip) = vip {
                town.lab.remove_node_address(vip)?;
            }
            report.packets.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = sent {
                report.failed(format!(
                    "{} {}: {}, expected {}: {error:#}",
                    step.folder.display(),
                    packet.name,
                    packet.packet,
                    packet.expect
                ));
            }
        }
    }
    for (_, kernel) in &mut kernels {
        kernel.backend.cleanup()?;
        kernel.backend.cleanup()?;
    }
    let left = M::list(node)?;
    ensure!(left == foreign, "after the clean-up:\n{left}\nbut it was\n{foreign}");
    Ok(())
}

#[derive(Default)]
struct Report {
    failures: Mutex<Vec<String>>,
    packets: AtomicUsize,
    ops: AtomicUsize,
}

impl Report {
    fn failed(&self, what: String) {
        self.failures.lock().unwrap().push(what);
    }
}

fn packets_meet_their_fate<M: ModeUnderTest>() {
    if !require_kernel() {
        return;
    }
    let cases = cases::all().unwrap();
    let cases: Vec<&Case> = cases.iter().filter(|case| case.modes.contains(&M::MODE)).collect();
    let (next, report) = (AtomicUsize::new(0), Report::default());
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = run_case::<M>(case, &report) {
                        report.failed(format!("{}: {error:#}", case.name));
                    }
                }
            });
        }
    });
    let packets = report.packets.into_inner();
    println!("{packets} packets of {} cases, {} operations", cases.len(), report.ops.into_inner());
    let failures = report.failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(packets > 250, "only {packets} packets were sent");
}

/// The real kernel takes every plan that random clusters lead to, and holds afterwards what the mirror
/// says: transactions split at any place, maps that grow, changes one by one.
fn the_kernel_takes_random_plans<M: ModeUnderTest>() {
    if !require_kernel() {
        return;
    }
    let count = std::env::var("SHUNT_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let strategy = (context(), steps(10..60), 0..6_u8);
    let mut runner = TestRunner::default();
    let lab = Lab::builder().build().unwrap();
    let node = lab.node();
    let mut transactions = 0;
    for _ in 0..count {
        let (context, steps, tightness) = strategy.new_tree(&mut runner).unwrap().current();
        let mut cluster = Cluster::new(context);
        let mut kernels = IpFamily::ALL.map(|family| adopt::<M>(node, family).unwrap());
        for (i, step) in steps.iter().enumerate() {
            cluster.step(step);
            if i % 3 != 0 && i + 1 != steps.len() {
                continue;
            }
            for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
                let mut change = cluster.take_change(family);
                if i % 5 == 0 {
                    change = Change::everything();
                }
                let desired = M::Real::render(cluster.table(family), &change);
                let plan = M::plan_tight(&kernel.mirror, &desired, tightness);
                for transaction in &plan.transactions {
                    transactions += 1;
                    let done = kernel.apply(transaction);
                    assert!(done.is_ok(), "{done:?}\n{plan}\nfrom\n{}", kernel.mirror);
                }
                let observed = kernel.backend.observe().unwrap();
                assert!(
                    observed == kernel.mirror,
                    "after\n{plan}\nobserved:\n{observed}\nbelieved:\n{}",
                    kernel.mirror
                );
            }
        }
        M::list(node).unwrap();
        for kernel in &mut kernels {
            kernel.backend.cleanup().unwrap();
        }
        assert_eq!(M::list(node).unwrap(), "");
    }
    println!("{count} clusters, {transactions} transactions");
}

/// Whatever somebody does to our rules by hand, the next look at the kernel repairs.
fn damage_is_repaired<M: ModeUnderTest>() {
    if !require_kernel() {
        return;
    }
    let repair = |case: &Case, damage: &str| -> Result<()> {
        let lab = Lab::builder().build()?;
        let node = lab.node();
        let mut run = CaseRun::new(case, M::MODE);
        run.next_step().context("a step")?;
        let family = *case.steps[0].families().first().context("a family")?;
        let table = run.cluster.table(family);
        let mut kernel = adopt::<M>(node, family)?;
        kernel.sync(table, &Change::everything())?;
        node.nft(damage)?;
        let mut kernel = adopt::<M>(node, family)?;
        let want = rendered::<M::Real>(table);
        ensure!(kernel.mirror != want, "the damage is not seen");
        let plan = kernel.sync(table, &Change::everything())?;
        let observed = kernel.backend.observe()?;
        ensure!(observed == want, "after\n{plan}\nthere is\n{observed}\ninstead of\n{want}");
        Ok(())
    };
    let all = cases::all().unwrap();
    let mut failures = Vec::new();
    for (name, damage) in M::damages() {
        let case = all.iter().find(|case| case.name == *name).unwrap();
        if let Err(error) = repair(case, damage) {
            failures.push(anyhow!("{damage}: {error:#}").to_string());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

every_mode!(packets_meet_their_fate, the_kernel_takes_random_plans, damage_is_repaired);
