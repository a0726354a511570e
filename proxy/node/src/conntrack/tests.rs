use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;
use shunt_core::id::IpFamily;
use shunt_core::stale::{Scope, Serving, Tuple};
use shunt_core::table::{ForwardingTable, Frontend};

use super::*;

/// A table of flows in memory.
#[derive(Default)]
struct Fake {
    flows: BTreeSet<Flow>,
    filters: bool,
    /// Dumps that are interrupted, and after how many flows.
    interruptions: VecDeque<usize>,
    refuse: Option<i32>,
    asked: Vec<FlowFilter>,
}

impl Conntrack for Fake {
    fn dump(&mut self, filter: &FlowFilter, each: &mut dyn FnMut(Flow)) -> Result<Dump, ConntrackError> {
        self.asked.push(*filter);
        let mut dump = Dump::default();
        let interrupted = self.interruptions.pop_front();
        let flows = self.flows.iter().filter(|f| !self.filters || filter.matches(f));
        for flow in flows.take(interrupted.unwrap_or(usize::MAX)) {
            dump.received += 1;
            dump.unfiltered |= !filter.matches(flow);
            each(*flow);
        }
        Ok(Dump { interrupted: interrupted.is_some(), ..dump })
    }

    fn delete(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError> {
        let fate = |flow| match self.refuse {
            Some(errno) => Fate::Refused(errno),
            None if self.flows.remove(flow) => Fate::Deleted,
            None => Fate::Gone,
        };
        Ok(flows.iter().map(fate).collect())
    }
}

fn flow(destination: &str, number: u16) -> Flow {
    let source = SocketAddr::new([198, 51, 100, 20].into(), 10_000 + number);
    Flow {
        protocol: Protocol::Udp,
        original: Tuple { source, destination: destination.parse().unwrap() },
        reply: Tuple { source: "10.244.1.1:5353".parse().unwrap(), destination: source },
        zone: 0,
        id: Some(number.into()),
    }
}

/// The flows to frontends that nobody has.
fn stale(addresses: &[&str]) -> StaleFlows {
    let frontend = |address: &&str| Frontend {
        address: Some(address.parse::<IpAddr>().unwrap()),
        protocol: Protocol::Udp,
        port: 53,
    };
    let scope = Scope::Frontends(addresses.iter().map(frontend).collect());
    StaleFlows::new(&ForwardingTable::new(IpFamily::V4), &Serving::new(IpFamily::V4), &scope)
}

fn fake(filters: bool) -> Fake {
    let mut fake = Fake { filters, ..Fake::default() };
    for number in 0..100 {
        fake.flows.insert(flow("10.96.0.1:53", number));
        fake.flows.insert(flow("10.96.0.2:53", number));
        fake.flows.insert(flow("203.0.113.1:53", number));
    }
    fake
}

#[test]
fn only_stale_flows_go_and_the_kernel_filters() {
    let mut kernel = fake(true);
    let report = clean(&mut kernel, &stale(&["10.96.0.1", "10.96.0.2"]));
    assert!(report.error.is_none());
    assert_eq!((report.deleted_total(), report.received, report.dumps), (200, 200, 2));
    assert_eq!(report.deleted, [((Protocol::Udp, None), 200)].into());
    assert_eq!(kernel.flows.len(), 100);
    let mut totals = Totals::default();
    totals.add(&report, Duration::from_millis(3));
    assert_eq!(totals, Totals { runs: 1, failures: 0, deleted: 200, last: Duration::from_millis(3) });
    // Nothing to clean: the kernel is not asked.
    assert_eq!(clean(&mut kernel, &stale(&[])).dumps, 0);
}

#[test]
fn many_frontends_are_asked_for_at_once() {
    let mut kernel = fake(true);
    let report =
        clean(&mut kernel, &stale(&["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4", "10.96.0.5"]));
    assert_eq!((report.deleted_total(), report.received, report.dumps), (200, 300, 1));
    assert_eq!(kernel.flows.len(), 100);
}

#[test]
fn a_kernel_that_does_not_filter_is_asked_once() {
    let mut kernel = fake(false);
    let report = clean(&mut kernel, &stale(&["10.96.0.1", "10.96.0.2"]));
    assert_eq!((report.deleted_total(), report.received, report.dumps), (200, 300, 1));
}

#[test]
fn what_an_interrupted_dump_found_goes_and_the_rest_is_asked_for_again() {
    let mut kernel = fake(true);
    kernel.interruptions = [30, 20].into();
    let report = clean(&mut kernel, &stale(&["10.96.0.1"]));
    assert!(report.error.is_none());
    assert_eq!((report.deleted_total(), report.received, report.dumps), (100, 100, 3));

    let mut kernel = fake(true);
    kernel.interruptions = [10; 9].into();
    let report = clean(&mut kernel, &stale(&["10.96.0.1"]));
    assert!(matches!(report.error, Some(ConntrackError::Interrupted)));
    assert_eq!(report.deleted_total(), 40);
}

#[test]
fn refusals_are_counted_and_named() {
    let mut kernel = fake(true);
    kernel.refuse = Some(Errno::EBUSY as i32);
    let report = clean(&mut kernel, &stale(&["10.96.0.1", "10.96.0.2"]));
    assert_eq!((report.deleted_total(), report.refused), (0, 200));
    let error = report.error.unwrap().to_string();
    assert!(
        error.starts_with("cannot delete flow udp 198.51.100.20:10000 -> 10.96.0.1:53 -> 10.244.1.1:5353"),
        "{error}"
    );
    kernel.refuse = Some(Errno::EPERM as i32);
    let error = clean(&mut kernel, &stale(&["10.96.0.1"])).error.unwrap();
    assert!(matches!(error, ConntrackError::NotPermitted { .. }), "{error}");
}
