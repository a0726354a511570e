//! When to sync: a state machine that is handed the time and never looks at a clock.
//!
//! ```text
//!            changed()                    due: Observe or Apply
//!   Quiet ───────────────> Pending ───────────────────────────> Running
//!     ▲                       ▲                                    │
//!     │ finished(Ok), nothing │ finished(Err): back-off, and        │
//!     └── changed meanwhile   └── whatever changed meanwhile ───────┘
//! ```
//!
//! The first change after a quiet time is carried out at once; after that a sync starts at the
//! earliest `min_sync_period` after the last one ended (kube-proxy's `BoundedFrequencyRunner`).
//! What is believed about the kernel is read anew at the start, after an error that calls for it,
//! and every `resync_period`.

use std::time::{Duration, Instant};

use shunt_core::table::Change;

use crate::Remedy;

/// Periods of the loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Periods {
    /// Least time from the end of a sync to the start of the next one.
    pub min_sync: Duration,
    /// Most time between two looks at the whole kernel state.
    pub resync: Duration,
    /// Time between two cheap looks whether our rules are still there (kube-proxy's `syncPeriod`).
    pub check: Duration,
    /// First delay after an error; it doubles with every further one.
    pub retry: Duration,
    /// Longest delay after an error.
    pub retry_max: Duration,
}

impl Default for Periods {
    /// kube-proxy waits a second between syncs because each is dear; here a change costs what it
    /// touches, and a pause only has to let a burst gather.
    fn default() -> Self {
        Self {
            min_sync: Duration::from_millis(1),
            resync: Duration::from_hours(1),
            check: Duration::from_secs(30),
            retry: Duration::from_millis(100),
            retry_max: Duration::from_secs(30),
        }
    }
}

/// What to do now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Read the kernel, then carry out everything that the table asks for.
    Resync,
    /// Carry out what these changes touch.
    Apply(Change),
    /// See whether our rules are still there.
    Check,
}

/// Decides when to sync one family's table and what to sync.
#[derive(Clone, Debug)]
pub struct SyncLoop {
    periods: Periods,
    pending: Change,
    /// The kernel's state is unknown or not to be trusted.
    must_observe: bool,
    running: Option<Change>,
    not_before: Option<Instant>,
    failures: u32,
    next_resync: Option<Instant>,
    next_check: Option<Instant>,
    queued_since: Option<Instant>,
}

impl SyncLoop {
    /// A loop that has seen nothing yet. It stays idle until [`SyncLoop::start`].
    pub fn new(periods: Periods) -> Self {
        Self {
            periods,
            pending: Change::default(),
            must_observe: false,
            running: None,
            not_before: None,
            failures: 0,
            next_resync: None,
            next_check: None,
            queued_since: None,
        }
    }

    /// All first lists are complete: the table may be programmed.
    pub fn start(&mut self, now: Instant) {
        self.must_observe = true;
        self.next_resync = Some(now);
        self.queued_since.get_or_insert(now);
    }

    /// The table changed.
    pub fn changed(&mut self, change: Change, now: Instant) {
        if !change.is_empty() {
            self.queued_since.get_or_insert(now);
            self.pending.merge(change);
        }
    }

    /// Since when a change is waiting or being carried out; `None` when the kernel is up to date.
    pub const fn queued_since(&self) -> Option<Instant> {
        self.queued_since
    }

    /// Errors in a row.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// When to call [`SyncLoop::next`] again, if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        if self.running.is_some() {
            return None;
        }
        let due = if self.must_observe || !self.pending.is_empty() {
            // Before the start there is nothing to wait for but the start itself.
            self.next_resync.map(|start| self.not_before.unwrap_or(start))
        } else {
            None
        };
        let not_before = |at: Instant| at.max(self.not_before.unwrap_or(at));
        match (due, self.next_resync) {
            (Some(due), Some(resync)) => Some(due.min(not_before(resync))),
            (None, Some(resync)) => Some(self.next_check.map_or(resync, |check| resync.min(check))),
            (due, None) => due,
        }
    }

    /// What to do at `now`; `None` when there is nothing to do yet. After a step the caller says
    /// how it went with [`SyncLoop::finished`], and asks for no other step before.
    pub fn next(&mut self, now: Instant) -> Option<Step> {
        if self.running.is_some() || self.deadline().is_none_or(|deadline| deadline > now) {
            return None;
        }
        let change = std::mem::take(&mut self.pending);
        let resync = self.must_observe || self.next_resync.is_some_and(|at| at <= now);
        if !resync && change.is_empty() {
            self.running = Some(change);
            return Some(Step::Check);
        }
        self.running = Some(change.clone());
        if resync || change.everything { Some(Step::Resync) } else { Some(Step::Apply(change)) }
    }

    /// Says how the last step went.
    pub fn finished(&mut self, result: Result<Step, Remedy>, now: Instant) {
        let change = self.running.take().unwrap_or_default();
        if let Ok(step) = result {
            self.next_check = Some(now + self.periods.check);
            if step == Step::Check {
                self.queued_since = self.queued_since.filter(|_| !self.pending.is_empty());
                return;
            }
            self.failures = 0;
            self.not_before = Some(now + self.periods.min_sync);
            if step == Step::Resync {
                self.must_observe = false;
                self.next_resync = Some(now + self.periods.resync);
            }
            self.queued_since = (!self.pending.is_empty()).then_some(now);
        } else {
            // What was half done is only known after another look at the kernel.
            self.must_observe = true;
            self.queued_since.get_or_insert(now);
            self.pending.merge(change);
            let delay = self.periods.retry.saturating_mul(1 << self.failures.min(16));
            self.failures = self.failures.saturating_add(1);
            self.not_before = Some(now + delay.min(self.periods.retry_max));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shunt_core::id::Protocol;
    use shunt_core::table::Frontend;

    const MS: Duration = Duration::from_millis(1);

    fn change(port: u16) -> Change {
        let mut change = Change::default();
        change.frontends.insert(Frontend { address: None, protocol: Protocol::Tcp, port });
        change
    }

    fn started(now: Instant) -> SyncLoop {
        let mut l = SyncLoop::new(Periods { min_sync: Duration::from_secs(1), ..Periods::default() });
        l.start(now);
        assert_eq!(l.next(now), Some(Step::Resync));
        l.finished(Ok(Step::Resync), now);
        l
    }

    #[test]
    fn nothing_happens_before_the_first_lists_are_complete() {
        let now = Instant::now();
        let mut l = SyncLoop::new(Periods::default());
        l.changed(change(1), now);
        assert_eq!(l.deadline(), None);
        assert_eq!(l.next(now + Duration::from_secs(9999)), None);
    }

    #[test]
    fn the_first_change_after_a_quiet_time_goes_at_once_and_a_burst_waits() {
        let t0 = Instant::now();
        let mut l = started(t0);
        let t1 = t0 + Duration::from_secs(10);
        l.changed(change(1), t1);
        assert_eq!(l.next(t1), Some(Step::Apply(change(1))));
        // Changes that come while a sync runs, and within the least period after it, go together.
        l.changed(change(2), t1 + MS);
        l.finished(Ok(Step::Apply(change(1))), t1 + 2 * MS);
        l.changed(change(3), t1 + 3 * MS);
        assert_eq!(l.next(t1 + 500 * MS), None);
        let due = t1 + 2 * MS + Duration::from_secs(1);
        assert_eq!(l.deadline(), Some(due));
        let mut both = change(2);
        both.merge(change(3));
        assert_eq!(l.next(due), Some(Step::Apply(both)));
    }

    #[test]
    fn an_error_backs_off_and_looks_at_the_kernel_again() {
        let t0 = Instant::now();
        let mut l = started(t0);
        let mut now = t0 + Duration::from_secs(10);
        l.changed(change(1), now);
        let mut delays = Vec::new();
        let mut step = l.next(now);
        for _ in 0..12 {
            assert!(step.is_some());
            l.finished(Err(Remedy::Retry), now);
            let due = l.deadline().unwrap();
            delays.push(due - now);
            assert_eq!(l.next(now), None);
            now = due;
            step = l.next(now);
            assert_eq!(step, Some(Step::Resync));
        }
        assert_eq!(delays[..3], [100 * MS, 200 * MS, 400 * MS]);
        assert_eq!(delays[11], Duration::from_secs(30));
        l.finished(Ok(Step::Resync), now);
        assert_eq!(l.queued_since(), None);
        assert_eq!(l.failures(), 0);
    }

    #[test]
    fn the_kernel_is_looked_at_now_and_then() {
        let t0 = Instant::now();
        let mut l = started(t0);
        assert_eq!(l.next(t0 + Duration::from_hours(1)), Some(Step::Resync));
    }

    #[test]
    fn in_quiet_times_the_rules_are_looked_for() {
        let t0 = Instant::now();
        let mut l = started(t0);
        let mut now = t0;
        for _ in 0..3 {
            now += Duration::from_secs(30);
            assert_eq!(l.deadline(), Some(now));
            assert_eq!(l.next(now.checked_sub(MS).unwrap()), None);
            assert_eq!(l.next(now), Some(Step::Check));
            assert_eq!(l.queued_since(), None);
            l.finished(Ok(Step::Check), now);
        }
        // Changes go first, and put the look off.
        l.changed(change(1), now + MS);
        assert_eq!(l.next(now + MS), Some(Step::Apply(change(1))));
        l.finished(Ok(Step::Apply(change(1))), now + MS);
        now += Duration::from_secs(30) + MS;
        assert_eq!(l.deadline(), Some(now));
        assert_eq!(l.next(now), Some(Step::Check));
        // They are gone: everything is looked at again.
        l.finished(Err(Remedy::Resync), now);
        now = l.deadline().unwrap();
        assert_eq!(l.next(now), Some(Step::Resync));
    }

    #[test]
    fn a_change_is_queued_until_it_is_carried_out() {
        let t0 = Instant::now();
        let mut l = started(t0);
        let t1 = t0 + Duration::from_secs(5);
        l.changed(change(1), t1);
        assert_eq!(l.queued_since(), Some(t1));
        let step = l.next(t1).unwrap();
        assert_eq!(l.queued_since(), Some(t1));
        l.finished(Ok(step), t1 + MS);
        assert_eq!(l.queued_since(), None);
    }
}
