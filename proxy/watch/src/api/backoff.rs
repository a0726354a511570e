//! How long to wait after a failure.

use std::time::Duration;

/// Doubling waits with jitter: after an API server came back, a thousand nodes must not ask it in
/// the same instant.
#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0 }
    }

    /// All is well again.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since all was well.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// One more failure: how long to wait now. Never shorter than what the server asked for
    /// (`Retry-After`, taken up to `max`).
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let doubled = self.min.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let jittered = doubled.min(self.max).mul_f64(0.5 + fastrand::f64());
        jittered.max(asked.unwrap_or_default().min(self.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_start_again_after_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        for i in 0..40_u32 {
            let base = Duration::from_millis(100 * (1 << i.min(16))).min(Duration::from_secs(10));
            let wait = backoff.next(None);
            assert!(wait >= base / 2 && wait <= base * 3 / 2, "{i}: {wait:?}");
        }
        backoff.reset();
        assert!(backoff.next(None) <= Duration::from_millis(150));
    }

    #[test]
    fn the_server_may_ask_for_more_but_not_for_ever() {
        let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_secs(10));
        assert_eq!(backoff.next(Some(Duration::from_secs(3))), Duration::from_secs(3));
        assert_eq!(backoff.next(Some(Duration::from_hours(1))), Duration::from_secs(10));
    }
}
