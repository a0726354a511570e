//! Endpoints that go are drained, which only ipvs mode has. In a guest.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::time::{Duration, Instant};

use ipvs_netlink::Protocol;
use shunt_core::table::Change;
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Outcome, Probe};
use shunt_mode_ipvs::drain::{DEADLINE, UDP_DEADLINE};
use shunt_mode_ipvs::kernel::Options;
use shunt_suites::web::{FAMILY, VIP, Web, at, probe};

fn drained() {
    let mut web = Web::new();
    let probe = probe(VIP, 80);
    let mut talk = web.lab.client().converse(&probe).unwrap();
    let home = talk.ask().unwrap().pod;
    let (gone, stays) = if home == "pod1" { (1, 2) } else { (2, 1) };
    web.pods(&[stays]);
    let mut drained = vec![(at(gone), 0), (at(stays), 1)];
    drained.sort_unstable();
    assert_eq!(web.weights(Protocol::Tcp), drained);
    for seen in web.lab.client().probe_all(vec![probe.clone(); 10]).unwrap() {
        assert_eq!(seen.pod(), Some(format!("pod{stays}").as_str()));
    }
    assert_eq!(talk.ask().unwrap().pod, home, "its connection goes on");

    // Another process takes over: it finds nothing to do, and deletes nothing that is in use.
    web.restart(Options::default());
    let plan = web.kernel.plan(web.cluster.table(FAMILY), &Change::everything());
    assert!(plan.is_empty(), "{plan}");
    let now = Instant::now();
    web.tend(now);
    web.tend(now + DEADLINE / 2);
    assert_eq!(web.weights(Protocol::Tcp), drained);
    assert_eq!(talk.ask().unwrap().pod, home);

    // It comes back.
    web.pods(&[1, 2]);
    assert_eq!(web.weights(Protocol::Tcp), [(at(1), 1), (at(2), 1)]);
    assert_eq!(talk.ask().unwrap().pod, home);

    // It goes for good: past the deadline it is deleted whoever is still there.
    web.pods(&[stays]);
    web.tend(now + DEADLINE);
    web.tend(now + 2 * DEADLINE + Duration::from_secs(1));
    assert_eq!(web.weights(Protocol::Tcp), [(at(stays), 1)]);

    // One without connections goes at the second look.
    web.pods(&[1, 2]);
    web.pods(&[stays]);
    assert_eq!(web.weights(Protocol::Tcp), drained);
    web.tend(now);
    web.tend(now + Duration::from_secs(10));
    assert_eq!(web.weights(Protocol::Tcp), [(at(stays), 1)]);
}

fn drained_by_time() {
    let mut web = Web::new();
    // From the same port: to IPVS these are one connection.
    let probe = Probe::udp((VIP, 80).into()).from_port(7000).timeout(Duration::from_secs(3));
    let asked = |web: &Web| web.lab.client().probe(probe.clone()).unwrap();
    let home = asked(&web).pod().unwrap().to_owned();
    let (gone, stays) = if home == "pod1" { (1, 2) } else { (2, 1) };
    web.pods(&[stays]);
    assert_eq!(asked(&web).pod(), Some(home.as_str()), "the flow goes on");
    let now = Instant::now();
    web.tend(now);
    web.tend(now + UDP_DEADLINE / 2);
    let mut drained = vec![(at(gone), 0), (at(stays), 1)];
    drained.sort_unstable();
    assert_eq!(web.weights(Protocol::Udp), drained);
    web.tend(now + UDP_DEADLINE);
    assert_eq!(web.weights(Protocol::Udp), [(at(stays), 1)]);
    // The packet that finds the destination gone may be lost; it ends what IPVS remembers.
    let answers: Vec<Outcome> = (0..4).map(|_| asked(&web)).collect();
    assert_eq!(answers[3].pod(), Some(format!("pod{stays}").as_str()), "{answers:?}");
}

mod ipvs {
    use super::*;

    #[test]
    fn removed_endpoints_are_drained() {
        test_in_guest(module_path!(), "removed_endpoints_are_drained", drained);
    }

    #[test]
    fn udp_flows_of_removed_endpoints_go_elsewhere_in_time() {
        test_in_guest(module_path!(), "udp_flows_of_removed_endpoints_go_elsewhere_in_time", drained_by_time);
    }
}
