//! When drained destinations are deleted. Which ones there are is read from the kernel, so that a restart
//! forgets none; since when is known only to this process.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ipvs_netlink::{Protocol, ServiceKey};
use shunt_mode::Plan;

use crate::kernel::Connections;
use crate::op::Op;
use crate::state::State;

/// How often connections are counted.
pub const PERIOD: Duration = Duration::from_secs(10);

/// After this time a drained destination is deleted although it has connections. Whoever opened one a day
/// ago and still uses it is cut off then; nobody waits for ever.
pub const DEADLINE: Duration = Duration::from_hours(24);

/// The same for UDP, which knows no end of a connection: a client that keeps its port would keep its
/// endpoint as well. By then the endpoint has had the usual time to terminate.
pub const UDP_DEADLINE: Duration = Duration::from_secs(30);

/// A destination of a virtual server.
pub type Drained = (ServiceKey, SocketAddr);

/// Since when each drained destination is known to be drained.
#[derive(Clone, Debug, Default)]
pub struct Drains {
    since: BTreeMap<Drained, Instant>,
}

/// The drained destinations of a state.
pub fn drained(state: &State) -> BTreeSet<Drained> {
    let of = |(key, server): (&ServiceKey, &crate::state::Server)| -> Vec<Drained> {
        server.destinations.values().filter(|d| d.weight == 0).map(|d| (*key, d.address)).collect()
    };
    state.servers.iter().flat_map(of).collect()
}

const fn deadline(key: &ServiceKey) -> Duration {
    match key {
        ServiceKey::Address { protocol: Protocol::Udp, .. } => UDP_DEADLINE,
        ServiceKey::Address { .. } | ServiceKey::Mark { .. } => DEADLINE,
    }
}

impl Drains {
    /// Deletes what has no connections any more or is past its deadline. Answers when to come again;
    /// `None` when nothing is drained.
    pub fn plan(
        &mut self,
        drained: &BTreeSet<Drained>,
        connections: &Connections,
        now: Instant,
    ) -> (Plan<Op>, Option<Instant>) {
        self.since.retain(|at, _| drained.contains(at));
        let mut ops = Vec::new();
        for at in drained {
            let since = *self.since.entry(*at).or_insert(now);
            let busy = connections.get(at).is_some_and(|count| *count > 0);
            // One that was busy a moment ago may have been chosen by a packet that is still on its way.
            let settled = now.saturating_duration_since(since) >= PERIOD / 2;
            let over = now.saturating_duration_since(since) >= deadline(&at.0);
            if (!busy && settled) || over {
                ops.push(Op::DeleteDestination(at.0, at.1));
                self.since.remove(at);
            }
        }
        let mut plan = Plan::default();
        plan.push(ops);
        (plan, (!self.since.is_empty()).then(|| now + PERIOD))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(protocol: Protocol) -> Drained {
        let key = ServiceKey::Address { address: [10, 96, 0, 1].into(), protocol, port: 80 };
        (key, SocketAddr::from(([10, 0, 0, 1], 8080)))
    }

    fn deleted(plan: &Plan<Op>) -> usize {
        plan.len()
    }

    #[test]
    fn a_destination_goes_when_its_connections_have_ended() {
        let (mut drains, now, at) = (Drains::default(), Instant::now(), at(Protocol::Tcp));
        let drained = BTreeSet::from([at]);
        let busy = Connections::from([(at, 3)]);
        let (plan, next) = drains.plan(&drained, &busy, now);
        assert_eq!((deleted(&plan), next), (0, Some(now + PERIOD)));
        let (plan, _) = drains.plan(&drained, &busy, now + 1000 * PERIOD);
        assert_eq!(deleted(&plan), 0);
        let (plan, next) = drains.plan(&drained, &Connections::new(), now + 1001 * PERIOD);
        assert_eq!((deleted(&plan), next), (1, None));
    }

    #[test]
    fn deadlines_are_kept_sooner_for_udp() {
        let now = Instant::now();
        for (protocol, time) in [(Protocol::Tcp, DEADLINE), (Protocol::Udp, UDP_DEADLINE)] {
            let (mut drains, at) = (Drains::default(), at(protocol));
            let (drained, busy) = (BTreeSet::from([at]), Connections::from([(at, 1)]));
            drains.plan(&drained, &busy, now);
            let early = drains.plan(&drained, &busy, now + time / 2).0;
            assert_eq!(deleted(&early), 0);
            assert_eq!(deleted(&drains.plan(&drained, &busy, now + time).0), 1);
        }
    }

    #[test]
    fn one_that_came_back_and_goes_again_starts_anew() {
        let (mut drains, now, at) = (Drains::default(), Instant::now(), at(Protocol::Udp));
        let (drained, busy) = (BTreeSet::from([at]), Connections::from([(at, 1)]));
        drains.plan(&drained, &busy, now);
        drains.plan(&BTreeSet::new(), &busy, now + UDP_DEADLINE / 2);
        let (plan, _) = drains.plan(&drained, &busy, now + UDP_DEADLINE);
        assert_eq!(deleted(&plan), 0);
    }
}
