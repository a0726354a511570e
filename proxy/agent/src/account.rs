//! What the run loop tells about itself: metrics, health, checks of Services, events. It decides nothing
//! about the tables, and costs what a change touches.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use shunt_core::compile::Compiler;
use shunt_core::health::{HealthCheck, health_check, ports_without_local_endpoints};
use shunt_core::id::{IpFamily, NamespacedName, ServicePortName};
use shunt_core::store::{Dirty, Event, Store};
use shunt_core::table::NodePortMatch;
use shunt_mode::driver::{Driver, Report};
use shunt_mode::{Counted, CountedEndpoint};
use shunt_node::health::Health;
use shunt_node::health::service::ServiceHealth;
use shunt_watch::{EventType, Notice, Regarding};
use tokio::sync::mpsc;

use crate::metrics::{self, Metrics};

/// How soon ports that could not be opened are tried again.
const RETRY: Duration = Duration::from_secs(5);
/// Least time between two counts of the kernel's tables.
const USAGE: Duration = Duration::from_secs(10);

/// What is told of one family.
struct Family {
    /// Services of which changes of endpoints are on their way to the kernel, with the earliest time at
    /// which one of them began (milliseconds since the epoch).
    triggers: BTreeMap<NamespacedName, i64>,
    /// Services with ports that have no local endpoints; others are left out.
    no_local: BTreeMap<NamespacedName, [usize; 2]>,
    no_local_sum: [usize; 2],
    checks: BTreeMap<NamespacedName, HealthCheck>,
    /// Where the checks are served.
    addresses: BTreeSet<IpAddr>,
    servers: ServiceHealth,
    /// When the kernel's tables were counted last: that walks them.
    usage_at: Option<Instant>,
    /// When flows were counted last, and what the kernel's counters said, with whose they were.
    counted_at: Option<Instant>,
    counted: BTreeMap<u32, (ServicePortName, [u64; 5])>,
    /// Endpoints for which flows are shown.
    endpoints: BTreeSet<(ServicePortName, SocketAddr)>,
    /// Something about the checks changed.
    dirty: bool,
    /// Ports that could not be opened: it is said once.
    failed: BTreeSet<(NamespacedName, u16)>,
}

/// What an event is about, noted before the store takes it in.
pub(crate) enum Note {
    Service,
    Slice { family: IpFamily, service: NamespacedName, trigger: Option<i64> },
    SliceGone,
    Other,
}

impl Note {
    /// Of an event.
    pub(crate) fn of(event: &Event) -> Self {
        match event {
            Event::Service(_) | Event::ServiceGone(_) => Self::Service,
            Event::Slice(slice) => Self::Slice {
                family: slice.family,
                service: slice.service.clone(),
                trigger: slice.last_change_trigger,
            },
            Event::SliceGone(_) => Self::SliceGone,
            _ => Self::Other,
        }
    }
}

/// Everything that is told.
pub(crate) struct Account {
    pub metrics: Metrics,
    health: Health,
    events: mpsc::Sender<Notice>,
    node_name: String,
    /// Milliseconds since the epoch: changes that began before were not ours to program.
    started: f64,
    families: [Family; 2],
    pending: [i64; 2],
    retry_at: Option<Instant>,
}

impl Account {
    pub(crate) fn new(
        metrics: Metrics,
        health: Health,
        events: mpsc::Sender<Notice>,
        node_name: String,
    ) -> Self {
        let families = IpFamily::ALL.map(|_| Family {
            triggers: BTreeMap::new(),
            no_local: BTreeMap::new(),
            no_local_sum: [0, 0],
            usage_at: None,
            counted_at: None,
            counted: BTreeMap::new(),
            endpoints: BTreeSet::new(),
            checks: BTreeMap::new(),
            addresses: BTreeSet::new(),
            servers: ServiceHealth::new(health.clone()),
            dirty: false,
            failed: BTreeSet::new(),
        });
        let started = metrics::now() * 1e3;
        Self { metrics, health, events, node_name, started, families, pending: [0, 0], retry_at: None }
    }

    /// The store took an event in, which touched something or nothing.
    pub(crate) fn took(&mut self, note: Note, touched: &Dirty) {
        if touched.is_empty() {
            return;
        }
        match note {
            Note::Service => {
                self.metrics.service_change();
                self.pending[0] += 1;
            }
            Note::Slice { family, service, trigger } => {
                self.metrics.endpoint_change();
                self.pending[1] += 1;
                #[allow(clippy::cast_precision_loss)] // Milliseconds of this millennium.
                if let Some(trigger) = trigger.filter(|t| *t as f64 >= self.started) {
                    let triggers = &mut self.families[family as usize].triggers;
                    triggers.entry(service).and_modify(|t| *t = trigger.min(*t)).or_insert(trigger);
                }
            }
            Note::SliceGone => {
                self.metrics.endpoint_change();
                self.pending[1] += 1;
            }
            Note::Other => {}
        }
        self.metrics.pending(self.pending[0], self.pending[1]);
    }

    /// The tables were made of the store: everything, or what these Services say; or the node changed.
    pub(crate) fn compiled(
        &mut self,
        services: Option<&BTreeSet<NamespacedName>>,
        store: &Store,
        compiler: &Compiler,
    ) {
        for (of, family) in IpFamily::ALL.into_iter().zip(&mut self.families) {
            let table = compiler.table(of);
            let mut one = |name: &NamespacedName| {
                let ports = table.service(name).map_or([0, 0], |s| ports_without_local_endpoints(s));
                let before = match ports {
                    [0, 0] => family.no_local.remove(name),
                    _ => family.no_local.insert(name.clone(), ports),
                };
                for ((sum, now), before) in
                    family.no_local_sum.iter_mut().zip(ports).zip(before.unwrap_or_default())
                {
                    *sum = *sum + now - before;
                }
                let check = health_check(store, name, of, &self.node_name);
                let before = match check {
                    Some(check) => family.checks.insert(name.clone(), check),
                    None => family.checks.remove(name),
                };
                family.dirty |= before != check;
            };
            match services {
                Some(services) => services.iter().for_each(&mut one),
                None => store.services().for_each(|service| one(&service.name)),
            }
            let addresses: BTreeSet<IpAddr> = match (&table.node().node_ports, of) {
                (NodePortMatch::Addresses(addresses), _) => addresses.iter().copied().collect(),
                (NodePortMatch::AllLocal, IpFamily::V4) => [Ipv4Addr::UNSPECIFIED.into()].into(),
                (NodePortMatch::AllLocal, IpFamily::V6) => [Ipv6Addr::UNSPECIFIED.into()].into(),
            };
            family.dirty |= addresses != family.addresses;
            family.addresses = addresses;
            self.metrics.services(of, table.len());
            let sum = family.no_local_sum.map(|n| i64::try_from(n).unwrap_or(i64::MAX));
            self.metrics.no_local_endpoints(of, sum);
        }
        self.health.node(store.node().is_some_and(|node| node.eligible));
    }

    /// Since when a family's kernel lacks something.
    pub(crate) fn waiting(&self, family: IpFamily, since: Option<Instant>) {
        self.health.waiting(family, since);
        if since.is_some() {
            self.metrics.queued(family);
        }
    }

    /// A family's kernel was brought up to date.
    pub(crate) fn synced(&mut self, driver: &dyn Driver, full: bool, report: &Report, now: Instant) {
        let of = driver.family();
        self.health.updated(of);
        self.metrics.synced(of, full, report);
        let family = &mut self.families[of as usize];
        if family.usage_at.is_none_or(|at| at + USAGE <= now) {
            family.usage_at = Some(now);
            for usage in driver.usage() {
                self.metrics.table(of, usage.table, usage.entries, usage.limit);
            }
        }
        self.metrics.not_programmed(of, report.problems.len());
        for trigger in std::mem::take(&mut family.triggers).into_values() {
            self.metrics.programmed(of, trigger);
        }
        self.pending = [0, 0];
        self.metrics.pending(0, 0);
    }

    /// Reads what the mode counts, now and then.
    pub(crate) fn count(&mut self, driver: &mut dyn Driver, now: Instant) {
        let of = driver.family();
        let family = &mut self.families[of as usize];
        if family.counted_at.is_some_and(|at| at + USAGE > now) {
            return;
        }
        family.counted_at = Some(now);
        let counted = match driver.counted() {
            Ok(counted) => counted,
            Err(error) => {
                tracing::debug!(family = %of, "flows are not counted: {error}");
                return;
            }
        };
        let (mut before, mut gone) = (std::mem::take(&mut family.counted), BTreeSet::new());
        let mut gone_endpoints = std::mem::take(&mut family.endpoints);
        for Counted { port, counter, forwarded, rejected, dropped, bytes, endpoints } in counted {
            let now = [forwarded, rejected, dropped, bytes[0], bytes[1]];
            let known = before.remove(&counter);
            // Most are of Services that nobody talks to at the moment.
            if known.as_ref().is_none_or(|(held, counts)| *held != port || *counts != now) {
                // What was counted before the first look, or for another Service port, is not this one's.
                let base = known.as_ref().map_or(now, |(_, counts)| *counts);
                let [forwarded, rejected, dropped, request, response] =
                    [0, 1, 2, 3, 4].map(|i| now[i].saturating_sub(base[i]));
                let flows = [forwarded, rejected, dropped];
                self.metrics.service_flows(of, &port, flows, [request, response]);
            }
            gone.extend(known.map(|(held, _)| held).filter(|held| *held != port));
            for CountedEndpoint { address, flows } in endpoints {
                let shown = (port.clone(), address);
                if !gone_endpoints.remove(&shown) || flows != 0 {
                    self.metrics.endpoint_flows(of, &port, address, flows);
                }
                family.endpoints.insert(shown);
            }
            family.counted.insert(counter, (port, now));
        }
        gone.extend(before.into_values().map(|(port, _)| port));
        if !gone.is_empty() {
            for (port, _) in family.counted.values() {
                gone.remove(port);
            }
        }
        for port in gone {
            self.metrics.no_service_flows(of, &port);
        }
        for (port, address) in gone_endpoints {
            self.metrics.no_endpoint_flows(of, &port, address);
        }
    }

    /// Tells of something that the kernel has no room for ([`Plan::problems`](shunt_mode::Plan::problems)), by an event
    /// about the Service.
    pub(crate) fn no_room(&self, note: &str) {
        let regarding = match service_of(note) {
            Some((namespace, name)) => {
                Regarding::Service { namespace: namespace.to_owned(), name: name.to_owned() }
            }
            None => Regarding::Node,
        };
        // Nobody may be there to send it, or too much to send.
        let _ = self.events.try_send(Notice {
            regarding,
            event_type: EventType::Warning,
            reason: "KernelTableFull",
            action: "Sync",
            note: format!("node {}: {note}", self.node_name),
        });
    }

    /// When ports are to be tried again.
    pub(crate) const fn deadline(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            for family in &mut self.families {
                family.dirty |= !family.failed.is_empty();
            }
        }
    }

    /// Brings the servers of checks up to date, for a family whose table is in the kernel.
    pub(crate) fn serve(&mut self, of: IpFamily, now: Instant) {
        let family = &mut self.families[of as usize];
        if !std::mem::take(&mut family.dirty) {
            return;
        }
        let before = std::mem::take(&mut family.failed);
        for error in family.servers.sync(&family.checks, &family.addresses) {
            self.retry_at.get_or_insert(now + RETRY);
            let failed = (error.service.clone(), error.port);
            let known = before.contains(&failed);
            family.failed.insert(failed);
            if known {
                continue;
            }
            let note = format!(
                "node {} failed to start healthcheck {:?} on port {}: {}",
                self.node_name,
                error.service.to_string(),
                error.port,
                error.reason
            );
            tracing::warn!("{note}");
            // Nobody may be there to send it, or too much to send.
            let _ = self.events.try_send(Notice {
                regarding: Regarding::Service {
                    namespace: error.service.namespace.to_string(),
                    name: error.service.name.to_string(),
                },
                event_type: EventType::Warning,
                reason: "FailedToStartServiceHealthcheck",
                action: "Listen",
                note,
            });
        }
    }
}

/// Namespace and name of the Service with whose port a sentence begins.
fn service_of(problem: &str) -> Option<(&str, &str)> {
    let (port, _) = problem.split_once(": ")?;
    let (namespace, rest) = port.split_once('/')?;
    let name = rest.split([':', '/']).next()?;
    (!namespace.is_empty() && !namespace.contains(':') && !name.is_empty()).then_some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::service_of;

    #[test]
    fn problems_name_their_service() {
        assert_eq!(service_of("ns/web:http/tcp: not served: all is taken"), Some(("ns", "web")));
        assert_eq!(service_of("ns/web/udp: 10.0.0.1:80/udp is not served"), Some(("ns", "web")));
        assert_eq!(service_of("10.0.0.1:80/tcp: not served"), None);
        assert_eq!(service_of("nothing"), None);
    }
}
