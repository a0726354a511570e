//! When to look for stale flows, and whose: a state machine that is handed the time.
//!
//! Flows are looked at as soon as a change is in the kernel, and once more a second later: a packet
//! that met the old rules may enter the kernel's table while it is read, and a dump may miss entries
//! while that table is resized. All flows are looked at first of all, and now and then.

use std::time::{Duration, Instant};

use shunt_core::stale::Scope;

/// Periods of the schedule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Periods {
    /// Time from a clean-up to the second look at the same flows.
    pub second_look: Duration,
    /// Most time between two looks at all flows.
    pub full: Duration,
    /// Least time from the end of a clean-up to the start of the next one.
    pub pause: Duration,
    /// The same as a multiple of what the last one took, which bounds the share of a processor that
    /// clean-ups may take under constant change.
    pub pause_factor: u32,
    /// First delay after a failure; it doubles with every further one.
    pub retry: Duration,
    /// Longest delay after a failure.
    pub retry_max: Duration,
}

impl Default for Periods {
    fn default() -> Self {
        Self {
            second_look: Duration::from_secs(1),
            full: Duration::from_mins(5),
            pause: Duration::from_millis(5),
            pause_factor: 4,
            retry: Duration::from_millis(100),
            retry_max: Duration::from_secs(30),
        }
    }
}

/// Decides when to clean up one family's flows.
#[derive(Clone, Debug)]
pub struct Schedule {
    periods: Periods,
    /// Not yet looked at, and since when.
    pending: Scope,
    pending_since: Option<Instant>,
    /// To be looked at once more, and when.
    again: Scope,
    again_at: Option<Instant>,
    full_at: Option<Instant>,
    /// What is being looked at, and what of it for the first time.
    running: Option<(Scope, Scope)>,
    not_before: Option<Instant>,
    failures: u32,
}

impl Schedule {
    /// A schedule that stays idle until [`Schedule::start`].
    pub fn new(periods: Periods) -> Self {
        Self {
            periods,
            pending: Scope::default(),
            pending_since: None,
            again: Scope::default(),
            again_at: None,
            full_at: None,
            running: None,
            not_before: None,
            failures: 0,
        }
    }

    /// All objects are known.
    pub fn start(&mut self, now: Instant) {
        self.full_at = Some(now + self.periods.full);
        self.changed(Scope::All, now);
    }

    /// Flows may have become stale.
    pub fn changed(&mut self, scope: Scope, now: Instant) {
        if !scope.is_empty() {
            self.pending.merge(scope);
            self.pending_since.get_or_insert(now);
        }
    }

    /// Failures in a row.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// When to call [`Schedule::next`], if nothing happens before.
    pub fn deadline(&self) -> Option<Instant> {
        let full_at = self.full_at.filter(|_| self.running.is_none())?;
        let due = [self.pending_since, self.again_at].into_iter().flatten().fold(full_at, Instant::min);
        Some(self.not_before.map_or(due, |at| at.max(due)))
    }

    /// Whose flows to look at now, while the kernel is up to date; `None` when it is not time yet.
    /// Afterwards the caller says how it went with [`Schedule::finished`].
    pub fn next(&mut self, now: Instant) -> Option<Scope> {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return None;
        }
        self.pending_since = None;
        let first = std::mem::take(&mut self.pending);
        let mut scope = first.clone();
        if self.again_at.is_some_and(|at| at <= now) {
            self.again_at = None;
            scope.merge(std::mem::take(&mut self.again));
        }
        if self.full_at.is_some_and(|at| at <= now) {
            scope = Scope::All;
        }
        self.running = Some((scope.clone(), first));
        Some(scope)
    }

    /// Says how the last clean-up went and how long it took.
    pub fn finished(&mut self, success: bool, took: Duration, now: Instant) {
        let Some((scope, first)) = self.running.take() else { return };
        if success {
            self.failures = 0;
            self.not_before = Some(now + self.periods.pause.max(took * self.periods.pause_factor));
            if scope == Scope::All {
                self.full_at = Some(now + self.periods.full);
            }
            if !first.is_empty() {
                self.again.merge(first);
                // Under constant change the second look must not be put off for ever.
                self.again_at.get_or_insert(now + self.periods.second_look);
            }
        } else {
            self.changed(scope, now);
            let delay = self.periods.retry.saturating_mul(1 << self.failures.min(16));
            self.failures = self.failures.saturating_add(1);
            self.not_before = Some(now + delay.min(self.periods.retry_max));
        }
    }
}

#[cfg(test)]
mod tests {
    use shunt_core::id::Protocol;
    use shunt_core::table::Frontend;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn scope(port: u16) -> Scope {
        Scope::Frontends([Frontend { address: None, protocol: Protocol::Udp, port }].into())
    }

    fn both(a: u16, b: u16) -> Scope {
        let mut both = scope(a);
        both.merge(scope(b));
        both
    }

    /// Everything was looked at twice.
    fn quiet(t0: Instant) -> (Schedule, Instant) {
        let mut s = Schedule::new(Periods::default());
        s.changed(scope(1), t0);
        assert_eq!(s.deadline(), None, "before the start there is nothing to do");
        assert_eq!(s.next(t0), None);
        s.start(t0);
        assert_eq!(s.next(t0), Some(Scope::All));
        assert_eq!(s.deadline(), None);
        s.finished(true, MS, t0 + MS);
        let t1 = s.deadline().unwrap();
        assert_eq!(t1, t0 + MS + Duration::from_secs(1));
        assert_eq!(s.next(t1), Some(Scope::All));
        s.finished(true, MS, t1);
        (s, t1)
    }

    #[test]
    fn a_change_is_looked_at_at_once_and_once_more() {
        let (mut s, t0) = quiet(Instant::now());
        let t1 = t0 + Duration::from_secs(10);
        s.changed(Scope::default(), t1);
        assert_eq!(s.next(t1), None);
        s.changed(scope(1), t1);
        assert_eq!(s.next(t1), Some(scope(1)));
        s.changed(scope(2), t1);
        assert_eq!(s.next(t1), None);
        s.finished(true, 10 * MS, t1);
        // The second change waits, so that clean-ups take a fifth of the time at most.
        assert_eq!(s.deadline(), Some(t1 + 40 * MS));
        assert_eq!(s.next(t1 + 40 * MS), Some(scope(2)));
        s.finished(true, MS, t1 + 41 * MS);
        let t2 = t1 + Duration::from_secs(1);
        assert_eq!(s.deadline(), Some(t2));
        assert_eq!(s.next(t2), Some(both(1, 2)));
        s.finished(true, MS, t2);
        assert_eq!(s.deadline(), Some(t0 + Duration::from_mins(5)));
        assert_eq!(s.next(t0 + Duration::from_mins(5)), Some(Scope::All));
    }

    #[test]
    fn what_failed_is_tried_again_with_what_changed_meanwhile() {
        let (mut s, t0) = quiet(Instant::now());
        let mut now = t0 + Duration::from_secs(10);
        s.changed(scope(1), now);
        let mut delays = Vec::new();
        assert_eq!(s.next(now), Some(scope(1)));
        s.changed(scope(2), now);
        for failures in 1..=10 {
            s.finished(false, MS, now);
            assert_eq!(s.failures(), failures);
            let due = s.deadline().unwrap();
            delays.push(due - now);
            now = due;
            assert_eq!(s.next(now), Some(both(1, 2)));
        }
        assert_eq!(delays[..3], [100 * MS, 200 * MS, 400 * MS]);
        assert_eq!(delays[9], Duration::from_secs(30));
        s.finished(true, MS, now);
        assert_eq!(s.failures(), 0);
        assert_eq!(s.deadline(), Some(now + Duration::from_secs(1)));
    }
}
