//! When flows are forgotten. Pure.

use shunt_ebpf_abi::{Config, Flow};

/// When a flow was seen last (nanoseconds of `CLOCK_MONOTONIC`), unless its time is over at `now`.
pub fn last_seen(config: &Config, protocol: u8, flow: &Flow, now: u64) -> Option<u64> {
    (!flow.is_forgotten(protocol, config, now)).then_some(flow.last_seen)
}

/// Whether a flow has ended in the direction of an entry: the same ends may begin another one, with another entry.
pub const fn has_ended(flow: &Flow) -> bool {
    flow.state == Flow::CLOSING
}

/// Whether what one copy of a flow says is newer than what another one says that was made of it: a packet was seen since,
/// the flow got its port, or one direction ended.
pub fn supersedes(flow: &Flow, copy: &Flow) -> bool {
    flow.last_seen > copy.last_seen
        || flow.last_seen == copy.last_seen
            && (flow.state > copy.state || flow.masquerade_port != 0 && copy.masquerade_port == 0)
}

/// From when on flows must have been seen so that there is room for those that were.
pub fn kept_from(times: &mut [u64], room: usize) -> u64 {
    match times.len().checked_sub(room) {
        None | Some(0) => 0,
        Some(out) => times.select_nth_unstable(out - 1).1.saturating_add(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_depends_on_protocol_and_state() {
        let config = Config { udp_timeout: 1, tcp_transient_timeout: 2, tcp_timeout: 3, ..Config::DEFAULT };
        let lasts = |protocol, state| {
            let flow = Flow { last_seen: 5, state, ..Flow::default() };
            let at = |second: u64| last_seen(&config, protocol, &flow, 5 + second * 1_000_000_000);
            (0..9).take_while(|second| at(*second) == Some(5)).count() - 1
        };
        assert_eq!([Flow::OPENING, Flow::OPEN, Flow::CLOSING].map(|state| lasts(6, state)), [2, 3, 2]);
        assert_eq!([Flow::OPENING, Flow::OPEN, Flow::CLOSING].map(|state| lasts(17, state)), [1, 1, 1]);
        // Another CPU's clock may be ahead.
        assert_eq!(last_seen(&config, 6, &Flow { last_seen: 9, ..Flow::default() }, 8), Some(9));
    }

    #[test]
    fn what_was_seen_last_counts() {
        let flow = Flow { last_seen: 5, state: Flow::OPEN, ..Flow::default() };
        assert!(!supersedes(&flow, &flow));
        assert!(supersedes(&Flow { last_seen: 6, ..flow }, &flow));
        assert!(supersedes(&Flow { masquerade_port: 1, ..flow }, &flow));
        assert!(supersedes(&Flow { state: Flow::CLOSING, ..flow }, &flow));
        // The flow began anew where the copy is in use.
        let anew = Flow { last_seen: 6, state: Flow::OPENING, ..flow };
        assert!(!supersedes(&Flow { state: Flow::CLOSING, ..flow }, &anew));
    }

    #[test]
    fn those_seen_last_have_room() {
        let kept = |room| {
            let from = kept_from(&mut [5, 3, 9, 3], room);
            [3, 3, 5, 9].into_iter().filter(|time| *time >= from).count()
        };
        assert_eq!([0, 1, 2, 3, 4, 5].map(kept), [0, 1, 2, 2, 4, 4]);
        assert_eq!(kept_from(&mut [], 0), 0);
    }
}
