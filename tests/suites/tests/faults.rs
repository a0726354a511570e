//! The kernel fails at any call; the loop looks at it again and gets there.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use shunt_core::id::IpFamily;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::walk;
use shunt_mode::sync::{Periods, Step, SyncLoop};
use shunt_mode::{Backend, KernelError, Remedy};
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::every_mode;
use shunt_suites::faulty::{Fault, Faulty};
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{Packets, context, packets, step, steps};

fn check<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    if let Err(error) = TestRunner::new(config).run(strategy, test) {
        panic!("{error}");
    }
}

fn is_served<M: ModeUnderTest>(
    table: &ForwardingTable,
    state: &M::State,
    packets: &Packets,
) -> Result<(), TestCaseError> {
    for packet in packets.aimed(table) {
        let got = M::trace(state, &table.node().local_addresses, &packet);
        prop_assert_eq!(got, Ok(walk(table, &packet).outcome), "{}\n{}\n{}", packet, table, state);
    }
    Ok(())
}

/// Whichever commit fails, another look at the kernel and another plan finish the work.
fn a_plan_that_breaks_off_is_finished_by_the_next<M: ModeUnderTest>() {
    let strategy = (context(), steps(10..40), steps(1..15), packets(16), 0..6_u8);
    check(120, &strategy, |(context, first, second, packets, tightness)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&first);
        let before = cluster.clone();
        cluster.steps(&second);
        for family in IpFamily::ALL {
            let (old, new) = (before.table(family), cluster.table(family));
            for commits in 0.. {
                let mut kernel = Synced::adopt(M::fake(family)).unwrap();
                kernel.sync(old, &Change::everything()).unwrap();
                M::fail_after(&mut kernel.backend, Some(commits));
                let desired = M::Fake::render(new, &Change::everything());
                let plan = M::plan_tight(&kernel.mirror, &desired, tightness);
                let broken = plan.transactions.iter().try_for_each(|t| kernel.apply(t)).is_err();
                M::fail_after(&mut kernel.backend, None);

                let mut kernel = Synced::adopt(kernel.backend).unwrap();
                let rest = M::plan_tight(&kernel.mirror, &desired, tightness);
                prop_assert!(broken || rest.is_empty());
                prop_assert!(!broken || !rest.is_empty());
                rest.transactions.iter().try_for_each(|t| kernel.apply(t)).unwrap();
                is_served::<M>(new, &kernel.mirror, &packets)?;
                if !broken {
                    break;
                }
            }
        }
        Ok(())
    });
}

struct Agent<B: Backend> {
    sync: SyncLoop,
    kernel: Faulty<B>,
    mirror: B::State,
    now: Instant,
    errors: usize,
}

impl<B: Backend> Agent<B> {
    fn new(kernel: Faulty<B>, family: IpFamily, now: Instant) -> Self {
        let mut sync = SyncLoop::new(Periods::default());
        sync.start(now);
        Self { sync, kernel, mirror: B::empty(family), now, errors: 0 }
    }

    fn carry_out(&mut self, table: &ForwardingTable, step: &Step) -> Result<(), KernelError> {
        let change = match step {
            Step::Resync => {
                self.mirror = self.kernel.observe()?;
                Change::everything()
            }
            Step::Apply(change) => change.clone(),
            Step::Check => return Ok(()),
        };
        for transaction in B::plan(&self.mirror, &B::render(table, &change)).transactions {
            self.kernel.apply(&transaction)?;
            B::advance(&mut self.mirror, &transaction);
        }
        Ok(())
    }

    /// Does what is due until nothing is, letting time pass as the loop asks.
    fn run(&mut self, table: &ForwardingTable) {
        for _ in 0..200 {
            if let Some(step) = self.sync.next(self.now) {
                let healthy = self.kernel.faults.is_empty();
                let result = self.carry_out(table, &step);
                if let (true, Err(error)) = (healthy, &result) {
                    // Waiting for the next hourly look would heal this as well.
                    panic!("after {} errors, all of them over, one of our own making: {error}", self.errors);
                }
                let result = result.map(|()| step).map_err(|error| error.remedy);
                self.errors += usize::from(result.is_err());
                self.sync.finished(result, self.now);
            }
            if self.sync.queued_since().is_none() {
                return;
            }
            self.now = self.sync.deadline().unwrap().max(self.now);
        }
        panic!("no end of it after {} errors", self.errors);
    }
}

/// Calls fail, with and without having had their effect, while objects change: in the end the kernel
/// does what the table says, without anyone's help.
fn the_loop_gets_there_whatever_fails<M: ModeUnderTest>() {
    let fault = prop_oneof![
        3 => Just(Fault::None),
        2 => select(vec![Remedy::Retry, Remedy::Resync]).prop_map(Fault::Refused),
        1 => Just(Fault::AnswerLost),
    ];
    let faults = proptest::collection::vec(fault, 0..40);
    let steps = proptest::collection::vec((step(), any::<bool>()), 1..40);
    check(300, &(context(), steps, faults, packets(16)), |(context, steps, faults, packets)| {
        let mut cluster = Cluster::new(context);
        let now = Instant::now();
        let mut agents = IpFamily::ALL.map(|family| {
            let kernel = Faulty { inner: M::fake(family), faults: VecDeque::new() };
            Agent::new(kernel, family, now)
        });
        let broken_from = steps.len() / 3;
        for (i, (step, sync)) in steps.into_iter().enumerate() {
            cluster.step(&step);
            if i == broken_from {
                // The first look at the kernel is over by now: it is changes that fail.
                for agent in &mut agents {
                    agent.kernel.faults = faults.clone().into();
                }
            }
            for (family, agent) in IpFamily::ALL.into_iter().zip(&mut agents) {
                let change = cluster.take_change(family);
                agent.now += Duration::from_millis(100);
                agent.sync.changed(change, agent.now);
                if sync {
                    agent.run(cluster.table(family));
                }
            }
        }
        for (family, agent) in IpFamily::ALL.into_iter().zip(&mut agents) {
            agent.run(cluster.table(family));
            let held = M::held(&mut agent.kernel.inner);
            prop_assert_eq!(&held, &agent.mirror);
            is_served::<M>(cluster.table(family), &held, &packets)?;
            let all = M::Fake::render(cluster.table(family), &Change::everything());
            let rest = M::Fake::plan(&held, &all);
            prop_assert!(rest.transactions.iter().flat_map(|t| &t.ops).all(M::is_garbage), "{}", rest);
        }
        Ok(())
    });
}

every_mode!(a_plan_that_breaks_off_is_finished_by_the_next, the_loop_gets_there_whatever_fails);
