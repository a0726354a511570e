//! Health as a value: what is known, and what follows at a time that is handed in
//! (kubernetes 1.36, `pkg/proxy/healthcheck/proxy_health.go`).

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use shunt_core::id::IpFamily;

/// What is known of one family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Family {
    /// When its kernel was brought up to date last.
    last_updated: Option<Timestamp>,
    /// Since when something waits to be programmed.
    waiting: Option<Instant>,
}

/// What is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    timeout: Duration,
    families: [Family; 2],
    /// The own Node is known, not being deleted, and has not the autoscaler's taint.
    pub node_eligible: bool,
}

/// How it is at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// No family has waited too long.
    pub healthy: bool,
    /// The node may get traffic from load balancers.
    pub node_eligible: bool,
    last_updated: Option<Timestamp>,
    now: Timestamp,
    /// Families that were up to date at least once.
    families: Vec<(IpFamily, Timestamp, bool)>,
}

impl State {
    /// A proxy that is starting: well, but on an unknown node.
    pub fn new(timeout: Duration) -> Self {
        Self { timeout, families: Default::default(), node_eligible: false }
    }

    /// Since when a family waits.
    pub fn waiting(&mut self, family: IpFamily, since: Option<Instant>) {
        self.families[family as usize].waiting = since;
    }

    /// A family is up to date.
    pub fn updated(&mut self, family: IpFamily, at: Timestamp) {
        self.families[family as usize].last_updated = Some(at);
    }

    /// How it is now. A family that was never up to date is starting, which is no illness.
    pub fn report(&self, now: Instant, wall: Timestamp) -> Report {
        let families: Vec<_> = IpFamily::ALL
            .into_iter()
            .zip(&self.families)
            .filter_map(|(of, family)| {
                let late =
                    family.waiting.is_some_and(|since| now.saturating_duration_since(since) >= self.timeout);
                Some((of, family.last_updated?, !late))
            })
            .collect();
        Report {
            healthy: families.iter().all(|(_, _, healthy)| *healthy),
            node_eligible: self.node_eligible,
            last_updated: families.iter().map(|(_, at, _)| *at).max(),
            now: wall,
            families,
        }
    }
}

/// Go's zero time, where nothing was ever updated.
const NEVER: &str = "0001-01-01T00:00:00Z";

impl Report {
    /// Body of `/healthz`.
    pub fn healthz(&self) -> String {
        let healthy = self.healthy && self.node_eligible;
        self.body(healthy, Some(self.node_eligible))
    }

    /// Body of `/livez`.
    pub fn livez(&self) -> String {
        self.body(self.healthy, None)
    }

    /// A healthy proxy counts as updated just now, whenever there was something to do last.
    fn body(&self, healthy: bool, node_eligible: Option<bool>) -> String {
        let last = if healthy { Some(self.now) } else { self.last_updated };
        let last = last.map_or_else(|| NEVER.to_owned(), |at| at.to_string());
        let mut body = format!(r#"{{"lastUpdated":"{last}","currentTime":"{}""#, self.now);
        // Writing to a String cannot fail.
        if let Some(eligible) = node_eligible {
            let _ = write!(body, r#","nodeEligible":{eligible}"#);
        }
        // As kube-proxy has it, this is the proxy alone: the node stands beside it.
        let _ = write!(body, r#","healthy":{}"#, self.healthy);
        for (i, (family, at, healthy)) in self.families.iter().enumerate() {
            body.push_str(if i == 0 { r#","status":{"# } else { "," });
            let _ = write!(body, r#""{family}":{{"lastUpdated":"{at}","healthy":{healthy}}}"#);
        }
        if !self.families.is_empty() {
            body.push('}');
        }
        body.push('}');
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_mins(1);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + second).unwrap()
    }

    #[test]
    fn a_starting_proxy_is_alive_on_an_unknown_node() {
        let report = State::new(TIMEOUT).report(Instant::now(), at(0));
        assert!(report.healthy && !report.node_eligible);
        assert_eq!(
            report.livez(),
            r#"{"lastUpdated":"2026-11-18T11:06:40Z","currentTime":"2026-11-18T11:06:40Z","healthy":true}"#
        );
        assert_eq!(
            report.healthz(),
            r#"{"lastUpdated":"0001-01-01T00:00:00Z","currentTime":"2026-11-18T11:06:40Z","nodeEligible":false,"healthy":true}"#
        );
    }

    #[test]
    fn a_family_that_waits_too_long_makes_it_ill() {
        let start = Instant::now();
        let mut state = State::new(TIMEOUT);
        state.node_eligible = true;
        state.updated(IpFamily::V4, at(1));
        state.updated(IpFamily::V6, at(2));
        state.waiting(IpFamily::V4, Some(start));
        let just = TIMEOUT.checked_sub(Duration::from_millis(1)).unwrap();
        assert!(state.report(start + just, at(60)).healthy);
        let report = state.report(start + TIMEOUT, at(62));
        assert!(!report.healthy);
        assert_eq!(
            report.healthz(),
            r#"{"lastUpdated":"2026-11-18T11:06:42Z","currentTime":"2026-11-18T11:07:42Z","nodeEligible":true,"healthy":false,"status":{"IPv4":{"lastUpdated":"2026-11-18T11:06:41Z","healthy":false},"IPv6":{"lastUpdated":"2026-11-18T11:06:42Z","healthy":true}}}"#
        );
        state.waiting(IpFamily::V4, None);
        assert!(state.report(start + 2 * TIMEOUT, at(120)).healthy);
    }

    #[test]
    fn a_family_that_never_came_up_is_starting() {
        let start = Instant::now();
        let mut state = State::new(TIMEOUT);
        state.waiting(IpFamily::V4, Some(start));
        assert!(state.report(start + 10 * TIMEOUT, at(600)).healthy);
    }
}
