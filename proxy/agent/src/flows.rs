//! Keeps tracked flows in step with the Services: asks what is stale, hands that to a thread which
//! deletes it, and counts. It decides nothing.
//!
//! ```text
//!   Store, Change ──> Flows ──StaleFlows──> thread "conntrack" ──> kernel
//!                       ▲                         │
//!                       └────────── Done ─────────┘
//! ```

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use shunt_core::compile::Compiler;
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::stale::{Scope, Serving, StaleFlows, is_cleaned};
use shunt_core::store::Store;
use shunt_core::table::Change;
use shunt_node::conntrack::schedule::{Periods, Schedule};
use shunt_node::conntrack::{Netlink, Report, Totals, clean};
use tokio::sync::mpsc;

/// A clean-up that ended.
#[derive(Debug)]
pub(crate) struct Done {
    family: IpFamily,
    report: Report,
    took: Duration,
}

impl Done {
    /// Whose flows.
    pub(crate) const fn family(&self) -> IpFamily {
        self.family
    }

    /// What was done.
    pub(crate) const fn report(&self) -> &Report {
        &self.report
    }

    /// How long it took.
    pub(crate) const fn took(&self) -> Duration {
        self.took
    }
}

/// What is known of the flows of one family.
struct Family {
    serving: Serving,
    schedule: Schedule,
    /// Where node ports answer.
    node_addresses: BTreeSet<IpAddr>,
    totals: Totals,
}

impl Family {
    fn new(family: IpFamily) -> Self {
        Self {
            serving: Serving::new(family),
            schedule: Schedule::new(Periods::default()),
            node_addresses: BTreeSet::new(),
            totals: Totals::default(),
        }
    }
}

/// The flows of both families and the thread that deletes the stale ones.
pub(crate) struct Flows {
    families: [Family; 2],
    jobs: std::sync::mpsc::Sender<StaleFlows>,
}

impl Flows {
    /// Starts the thread, in the network namespace of the calling one. It ends with the last of the
    /// two ends of its channels.
    pub(crate) fn start(done: mpsc::UnboundedSender<Done>) -> Result<Self> {
        let (jobs, queue) = std::sync::mpsc::channel();
        std::thread::Builder::new()
            .name("conntrack".to_owned())
            .spawn(move || work(&queue, &done))
            .context("start the conntrack thread")?;
        Ok(Self { families: IpFamily::ALL.map(Family::new), jobs })
    }

    /// All objects are known.
    pub(crate) fn all_known(&mut self, store: &Store, compiler: &Compiler, now: Instant) {
        for (of, family) in IpFamily::ALL.into_iter().zip(&mut self.families) {
            family.serving = Serving::full(of, store);
            family.node_addresses = compiler.table(of).node().node_port_addresses();
            family.schedule.start(now);
        }
    }

    /// Services changed, or the node did.
    pub(crate) fn changed(
        &mut self,
        services: &BTreeSet<NamespacedName>,
        changes: &[Change; 2],
        store: &Store,
        compiler: &Compiler,
        now: Instant,
    ) {
        for ((of, family), change) in IpFamily::ALL.into_iter().zip(&mut self.families).zip(changes) {
            let table = compiler.table(of);
            let mut frontends: BTreeSet<_> =
                change.frontends.iter().copied().filter(|f| is_cleaned(f.protocol)).collect();
            for name in services {
                frontends.extend(family.serving.update(name, store, table));
            }
            family.schedule.changed(Scope::Frontends(frontends), now);
            if change.everything {
                let node_addresses = table.node().node_port_addresses();
                if node_addresses != family.node_addresses {
                    family.node_addresses = node_addresses;
                    family.schedule.changed(Scope::All, now);
                }
            }
        }
    }

    /// When the flows of a family are due.
    pub(crate) fn deadline(&self, family: IpFamily) -> Option<Instant> {
        self.families[family as usize].schedule.deadline()
    }

    /// Does what is due for a family whose table is in the kernel.
    pub(crate) fn tick(&mut self, family: IpFamily, compiler: &Compiler, now: Instant) {
        let Family { serving, schedule, .. } = &mut self.families[family as usize];
        let Some(scope) = schedule.next(now) else { return };
        let stale = StaleFlows::new(compiler.table(family), serving, &scope);
        if stale.is_empty() {
            schedule.finished(true, Duration::ZERO, now);
        } else if self.jobs.send(stale).is_err() {
            schedule.finished(false, Duration::ZERO, now);
            tracing::error!("the conntrack thread is gone: stale flows stay");
        }
    }

    /// Takes in a clean-up that ended. Answers what to complain about.
    pub(crate) fn done(&mut self, done: Done, now: Instant) -> Option<String> {
        let Done { family: of, report, took } = done;
        let family = &mut self.families[of as usize];
        family.schedule.finished(report.error.is_none(), took, now);
        family.totals.add(&report, took);
        for ((protocol, holder), flows) in &report.deleted {
            let service = holder.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
            tracing::info!(family = %of, service, %protocol, flows, "deleted stale flows");
        }
        let Totals { runs, failures, deleted, .. } = family.totals;
        tracing::debug!(
            family = %of,
            deleted = report.deleted_total(),
            received = report.received,
            dumps = report.dumps,
            refused = report.refused,
            milliseconds = took.as_secs_f64() * 1e3,
            runs,
            failures,
            deleted_total = deleted,
            "flows cleaned up"
        );
        let error = report.error?;
        tracing::debug!(family = %of, failures = family.schedule.failures(), "{error}; trying again");
        Some(format!("stale flows may stay, {of}: {error}"))
    }
}

/// Carries out one clean-up after the other, on one socket while that works.
fn work(queue: &std::sync::mpsc::Receiver<StaleFlows>, done: &mpsc::UnboundedSender<Done>) {
    let mut kernel = None;
    while let Ok(stale) = queue.recv() {
        let started = Instant::now();
        let mut report = Report::default();
        match kernel.take().map_or_else(Netlink::open, Ok) {
            Ok(mut netlink) => {
                report = clean(&mut netlink, &stale);
                // What an error left unread must not be taken for the answer to something else.
                kernel = report.error.is_none().then_some(netlink);
            }
            Err(error) => report.error = Some(error),
        }
        if done.send(Done { family: stale.family(), report, took: started.elapsed() }).is_err() {
            return;
        }
    }
}
