//! Session affinity: a client stays with its endpoint as long as both are there.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use proptest::prelude::*;
use proptest::test_runner::{Config as RunnerConfig, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::{Change, ForwardingTable};
use shunt_core::walk::{Outcome, Packet, Reason, walk};
use shunt_harness::lab::{Lab, Probe, Proto};
use shunt_mode::{Backend, rendered};
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::affinity::{NUMBER_MAX, port_label, token};
use shunt_mode_nftables::fake::FakeKernel;
use shunt_mode_nftables::state::State;
use shunt_mode_nftables::trace::{Records, trace_client};
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::every_mode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{NODE, Step, context, packets, step, steps};

fn check<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let cases = std::env::var("SHUNT_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = RunnerConfig { cases, failure_persistence: None, ..RunnerConfig::default() };
    // As in the other properties: always the same clusters unless asked otherwise.
    let mut runner = match std::env::var("SHUNT_PROPERTY_SEED").as_deref() {
        Ok("random") => TestRunner::new(config),
        seed => {
            let number: u64 = seed.map_or(0, |n| n.parse().unwrap());
            let mut seed = [0; 32];
            seed[..8].copy_from_slice(&number.to_le_bytes());
            TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
        }
    };
    if let Err(error) = runner.run(strategy, test) {
        let text = error.to_string();
        panic!("{}", text.split("\n    Packets(").next().unwrap_or_default());
    }
}

/// The id of the Service port that answers a packet, if it has affinity and the packet is carried.
fn id_of(table: &ForwardingTable, state: &State, packet: &Packet) -> Option<u32> {
    let walked = walk(table, packet);
    match (walked.reason, walked.outcome) {
        (Reason::Frontend { service, frontend, .. }, Outcome::Forward(_)) => {
            table.frontend(&frontend)?.0.affinity?;
            state.affinity_id(&port_label(&service))
        }
        _ => None,
    }
}

fn endpoints(outcome: &Outcome) -> BTreeSet<SocketAddr> {
    match outcome {
        Outcome::Forward(endpoints) => endpoints.iter().map(|(e, _)| *e).collect(),
        _ => BTreeSet::new(),
    }
}

fn ask(
    table: &ForwardingTable,
    state: &State,
    packet: &Packet,
    records: &Records,
) -> Result<(Outcome, BTreeMap<SocketAddr, Option<u32>>), TestCaseError> {
    trace_client(state, &table.node().local_addresses, packet, records)
        .map_err(|why| TestCaseError::fail(format!("{why}\n{table}\n{state}")))
}

/// Whatever a record says: one that leads to an endpoint that this traffic may use decides, every other
/// one counts for nothing and is replaced.
#[test]
fn a_record_decides_if_it_leads_where_traffic_may_go() {
    let seen = [const { Cell::new(0) }; 2];
    check(300, &(context(), steps(10..60), packets(40)), |(context, steps, packets)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&steps);
        for family in IpFamily::ALL {
            let table = cluster.table(family);
            let state = rendered::<Nftables<FakeKernel>>(table);
            for packet in packets.aimed(table) {
                let Some(id) = id_of(table, &state, &packet) else { continue };
                let all = walk(table, &packet).outcome;
                let (first, fresh) = ask(table, &state, &packet, &Records::new())?;
                prop_assert_eq!(&first, &all);
                let by_token: BTreeMap<Option<u32>, SocketAddr> =
                    fresh.iter().map(|(e, t)| (*t, *e)).collect();
                prop_assert_eq!(by_token.len(), fresh.len(), "tokens are not distinct");
                for number in (1..8).chain([NUMBER_MAX]) {
                    let known = token(id, number);
                    let records = Records::from([((packet.source, id), known)]);
                    let (outcome, remembered) = ask(table, &state, &packet, &records)?;
                    if let Some(endpoint) = by_token.get(&Some(known)) {
                        seen[0].set(seen[0].get() + 1);
                        prop_assert_eq!(endpoints(&outcome), BTreeSet::from([*endpoint]));
                        prop_assert_eq!(remembered, BTreeMap::from([(*endpoint, Some(known))]));
                    } else {
                        seen[1].set(seen[1].get() + 1);
                        prop_assert_eq!(&outcome, &all);
                        prop_assert_eq!(&remembered, &fresh);
                    }
                }
            }
        }
        Ok(())
    });
    let seen = seen.map(Cell::into_inner);
    println!("{} records decided, {} did not", seen[0], seen[1]);
    assert!(seen.iter().all(|n| *n > 1000), "{seen:?}");
}

/// However a cluster changes, a client stays with its endpoint while the endpoint may be used and the
/// Service port has affinity; and no record ever leads elsewhere than it may.
#[test]
fn clients_keep_their_endpoints_through_changes() {
    let kept = Cell::new(0);
    let strategy = (context(), steps(10..50), proptest::collection::vec(step(), 1..8), packets(40), 0..6_u8);
    check(300, &strategy, |(context, first, second, packets, tightness)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&first);
        let mut states = IpFamily::ALL.map(|family| rendered::<Nftables<FakeKernel>>(cluster.table(family)));
        let mut records: [Vec<(Packet, Records, SocketAddr)>; 2] = [Vec::new(), Vec::new()];
        for (family, state) in IpFamily::ALL.into_iter().zip(&states) {
            cluster.take_change(family);
            let table = cluster.table(family);
            for packet in packets.aimed(table) {
                let Some(id) = id_of(table, state, &packet) else { continue };
                for (endpoint, token) in ask(table, state, &packet, &Records::new())?.1 {
                    let token = token.context("no token").map_err(|e| TestCaseError::fail(e.to_string()))?;
                    let known = Records::from([((packet.source, id), token)]);
                    records[family as usize].push((packet.clone(), known, endpoint));
                }
            }
        }
        for step in second {
            cluster.step(&step);
            for (family, state) in IpFamily::ALL.into_iter().zip(&mut states) {
                let change = cluster.take_change(family);
                let table = cluster.table(family);
                let desired = Nftables::<FakeKernel>::render(table, &change);
                let plan = shunt_suites::mode::NftablesMode::plan_tight(state, &desired, tightness);
                plan.transactions.iter().for_each(|t| Nftables::<FakeKernel>::advance(state, t));
                let list = &mut records[family as usize];
                // Clients of a Service port that lost its affinity meanwhile are nobody's.
                list.retain(|(packet, known, _)| {
                    id_of(table, state, packet).is_some_and(|id| known.contains_key(&(packet.source, id)))
                });
                let mut lost = Vec::new();
                for (i, (packet, known, endpoint)) in list.iter().enumerate() {
                    let all = endpoints(&walk(table, packet).outcome);
                    let (outcome, _) = ask(table, state, packet, known)?;
                    let to = endpoints(&outcome);
                    if all.contains(endpoint) {
                        prop_assert_eq!(to, BTreeSet::from([*endpoint]), "{}\n{}\n{}", packet, table, state);
                        kept.set(kept.get() + 1);
                    } else {
                        prop_assert!(to.is_subset(&all) && !to.is_empty());
                        lost.push(i);
                    }
                }
                // They would be recorded elsewhere with their next connection.
                lost.into_iter().rev().for_each(|i| drop(list.swap_remove(i)));
            }
        }
        Ok(())
    });
    let kept = kept.into_inner();
    println!("kept {kept} times");
    assert!(kept > 2000, "kept only {kept} times");
}

const NODE_IPS: [&str; 2] = ["192.168.0.2", "2001:db8::2"];
const CLUSTER_IPS: [&str; 2] = ["172.30.0.41", "fd00:172:30::41"];
const NODE_PORT: u16 = 30_080;
const PODS: u8 = 5;
/// The last pods run on another node.
const REMOTE_FROM: u8 = 4;
const CLIENTS: u8 = 12;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod(family: IpFamily, n: u8) -> IpAddr {
    match family {
        IpFamily::V4 => ip(&format!("10.180.{}.{n}", u8::from(n >= REMOTE_FROM))),
        IpFamily::V6 => ip(&format!("fd00:10:{}::{n}", u8::from(n >= REMOTE_FROM))),
    }
}

fn client(family: IpFamily, n: u8) -> IpAddr {
    match family {
        IpFamily::V4 => ip(&format!("203.0.113.{}", n + 1)),
        IpFamily::V6 => ip(&format!("2600::{}", n + 1)),
    }
}

/// A Service with affinity in earnest: ports 80 (and a node port) and 81, pods that answer, clients.
struct Street<M: ModeUnderTest> {
    lab: Lab,
    cluster: Cluster,
    kernels: Vec<(IpFamily, Synced<M::Real>)>,
    service: Service,
    pods: BTreeSet<u8>,
}

impl<M: ModeUnderTest> Street<M> {
    fn build(timeout: u64) -> Result<Self> {
        let both = |f: &dyn Fn(IpFamily) -> IpAddr| IpFamily::ALL.map(f);
        let mut builder = Lab::builder().node(NODE_IPS.map(ip));
        for n in 0..CLIENTS {
            builder = builder.client(both(&|family| client(family, n)));
        }
        for n in 1..=PODS {
            let (name, addresses) = (format!("p{n}"), both(&|family| pod(family, n)));
            builder = if n < REMOTE_FROM {
                builder.pod(&name, addresses)
            } else {
                builder.remote_pod("elsewhere", &name, addresses)
            };
        }
        let lab = builder.build()?;
        for n in 1..=PODS {
            let guest = if n < REMOTE_FROM { format!("p{n}") } else { "elsewhere".to_owned() };
            let servers = [8080, 8081].into_iter().flat_map(|port| {
                both(&|family| pod(family, n)).map(|address| (Proto::Tcp, SocketAddr::new(address, port)))
            });
            lab.pod(&guest)?.serve(servers)?;
        }
        let port = |name: &str, port, node_port| ServicePort {
            name: name.into(),
            protocol: Protocol::Tcp,
            port,
            node_port,
        };
        let service = Service {
            name: NamespacedName::new("ns", "svc"),
            created: 0,
            cluster_ips: CLUSTER_IPS.map(ip).to_vec(),
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            ports: vec![port("a", 80, Some(NODE_PORT)), port("b", 81, None)],
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: Some(Duration::from_secs(timeout)),
            scheduler: None,
            algorithm: None,
            health_check_node_port: None,
        };
        let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
        cluster.step(&Step::Event(Event::Node(Node {
            name: NODE.into(),
            addresses: NODE_IPS.map(ip).to_vec(),
            eligible: true,
            ..Node::default()
        })));
        let mut kernels = Vec::new();
        for family in IpFamily::ALL {
            kernels.push((family, lab.node().run(|| Ok(Synced::adopt(M::real(family)?)?))?));
        }
        let mut street = Self { lab, cluster, kernels, service, pods: (1..=PODS).collect() };
        street.sync()?;
        Ok(street)
    }

    /// Makes the kernel hold what Service and pods are now.
    fn sync(&mut self) -> Result<()> {
        self.cluster.step(&Step::Event(Event::Service(self.service.clone())));
        for family in IpFamily::ALL {
            let endpoints = self.pods.iter().map(|n| Endpoint {
                address: pod(family, *n),
                conditions: Conditions::default(),
                node: Some(Arc::from(if *n < REMOTE_FROM { NODE } else { "elsewhere" })),
                zone: None,
                hints: None,
                pod: None,
            });
            let port = |name: &str, port| EndpointPort { name: name.into(), protocol: Protocol::Tcp, port };
            self.cluster.step(&Step::Event(Event::Slice(EndpointSlice {
                name: NamespacedName::new("ns", format!("svc-{family}")),
                service: self.service.name.clone(),
                family,
                ports: vec![port("a", 8080), port("b", 8081)],
                endpoints: endpoints.collect(),
                last_change_trigger: None,
            })));
        }
        for (family, kernel) in &mut self.kernels {
            let change = self.cluster.take_change(*family);
            kernel.sync(self.cluster.table(*family), &change)?;
            let observed = kernel.backend.observe()?;
            ensure!(observed == kernel.mirror, "observed:\n{observed}\nbelieved:\n{}", kernel.mirror);
        }
        M::list(self.lab.node()).map(drop)
    }

    /// Which pods a client reaches with so many connections, one after the other.
    fn reach(&self, family: IpFamily, n: u8, to: To, count: usize) -> Result<BTreeSet<String>> {
        let i = family as usize;
        let to = match to {
            To::Cluster(port) => SocketAddr::new(ip(CLUSTER_IPS[i]), port),
            To::Node => SocketAddr::new(ip(NODE_IPS[i]), NODE_PORT),
        };
        let probe = Probe::tcp(to).from(client(family, n)).timeout(Duration::from_secs(3));
        (0..count)
            .map(|_| {
                let seen = self.lab.client().probe(probe.clone())?;
                Ok(seen.pod().with_context(|| format!("{probe}: {seen}"))?.to_owned())
            })
            .collect()
    }

    /// The one pod that each client reaches.
    fn homes(&self, family: IpFamily, to: To) -> Result<Vec<String>> {
        (0..CLIENTS)
            .map(|n| {
                let pods = self.reach(family, n, to, 3)?;
                ensure!(pods.len() == 1, "client {n} reaches {pods:?} by {to:?}");
                pods.into_iter().next().context("a pod")
            })
            .collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum To {
    Cluster(u16),
    Node,
}

fn clients_stay<M: ModeUnderTest>() {
    let run = || -> Result<()> {
        let mut street = Street::<M>::build(10_800)?;
        for family in IpFamily::ALL {
            let pods = street.reach(family, 0, To::Cluster(80), 20)?;
            ensure!(pods.len() == 1, "one client reaches {pods:?}");
        }
        let at_first = IpFamily::ALL.map(|family| street.homes(family, To::Cluster(80)).unwrap());
        for (family, homes) in IpFamily::ALL.into_iter().zip(&at_first) {
            ensure!(homes.iter().collect::<BTreeSet<_>>().len() > 1, "all clients reach {homes:?}");
            if M::AFFINITY_OF_PORTS {
                ensure!(street.homes(family, To::Node)? == *homes, "by node port elsewhere");
            }
            // Alike once in 5^12 runs; where the kernel deals endpoints out in turn, in each.
            let others = street.homes(family, To::Cluster(81))?;
            ensure!(others != *homes || !M::AFFINITY_OF_PORTS, "two ports share records");
        }

        // A pod goes: its clients move at once and stay; the others do not notice, though slots move.
        let gone: u8 = at_first[0][0][1..].parse()?;
        street.pods.remove(&gone);
        street.sync()?;
        let mut homes = Vec::new();
        for (family, before) in IpFamily::ALL.into_iter().zip(&at_first) {
            let now = street.homes(family, To::Cluster(80))?;
            for (before, now) in before.iter().zip(&now) {
                ensure!(*now != format!("p{gone}"), "reached what is gone");
                ensure!(before == now || *before == format!("p{gone}"), "{before} stays, but now {now}");
            }
            ensure!(!M::AFFINITY_OF_PORTS || street.homes(family, To::Node)? == now);
            homes.push(now);
        }
        let same = |street: &Street<M>, what: &str| -> Result<()> {
            for (family, homes) in IpFamily::ALL.into_iter().zip(&homes) {
                ensure!(street.homes(family, To::Cluster(80))? == *homes, "{family}: elsewhere {what}");
            }
            Ok(())
        };
        street.pods.insert(gone);
        street.sync()?;
        same(&street, "after a pod came")?;

        // Another process takes over.
        for (family, kernel) in &mut street.kernels {
            let restarted = street.lab.node().run(|| Ok(Synced::<M::Real>::adopt(M::real(*family)?)?))?;
            let plan = restarted.plan(street.cluster.table(*family), &Change::everything());
            let ops = plan.transactions.iter().flat_map(|t| &t.ops);
            ensure!(ops.into_iter().all(M::is_garbage), "a restart would do\n{plan}");
            *kernel = restarted;
        }
        street.sync()?;
        same(&street, "after a restart")?;

        street.service.affinity = Some(Duration::from_mins(1));
        street.sync()?;
        same(&street, "after another timeout")?;

        street.service.affinity = None;
        street.sync()?;
        for family in IpFamily::ALL {
            // All the same once in 5^19 runs.
            ensure!(street.reach(family, 0, To::Cluster(80), 20)?.len() > 1, "affinity is still on");
        }
        street.service.affinity = Some(Duration::from_mins(1));
        street.sync()?;
        for family in IpFamily::ALL {
            street.homes(family, To::Cluster(80))?;
        }

        // Under the Local policy only pods of this node count, and what is recorded there counts for all.
        street.service.external_policy = TrafficPolicy::Local;
        street.sync()?;
        for family in IpFamily::ALL {
            let before = street.homes(family, To::Cluster(80))?;
            let by_node = street.homes(family, To::Node)?;
            for (before, now) in before.iter().zip(&by_node) {
                let here = |pod: &str| (1..REMOTE_FROM).any(|n| pod == format!("p{n}"));
                ensure!(here(now), "by node port to {now}, which is elsewhere");
                let stays = before == now || !here(before) || !M::AFFINITY_OF_PORTS;
                ensure!(stays, "{before} is here, but {now} was reached");
            }
            let again =
                street.homes(family, if M::AFFINITY_OF_PORTS { To::Cluster(80) } else { To::Node })?;
            ensure!(again == by_node);
        }
        for (_, kernel) in &mut street.kernels {
            kernel.backend.cleanup()?;
        }
        Ok(())
    };
    run().unwrap();
}

/// Records live from one new connection to the next, and no packet of an old one keeps them alive.
fn records_expire<M: ModeUnderTest>() {
    const TIMEOUT: u64 = 3;
    let run = || -> Result<()> {
        let street = Street::<M>::build(TIMEOUT)?;
        let family = IpFamily::V4;
        let records = || M::affinity_records(street.lab.node(), family);
        let started = Instant::now();
        let homes = street.homes(family, To::Cluster(80))?;
        ensure!(records()? == usize::from(CLIENTS), "{} records", records()?);
        // Twice as long as the timeout, with new connections in between.
        while started.elapsed() < Duration::from_secs(2 * TIMEOUT) {
            sleep(Duration::from_millis(900));
            ensure!(street.homes(family, To::Cluster(80))? == homes, "forgotten");
        }
        if !M::AFFINITY_FORGETS_CONNECTED {
            return Ok(());
        }
        // Once more that long, with packets of a connection that stays open.
        let to = SocketAddr::new(ip(CLUSTER_IPS[0]), 80);
        let probe = Probe::tcp(to).from(client(family, 0)).timeout(Duration::from_secs(3));
        let mut open = street.lab.client().converse(&probe)?;
        let idle = Instant::now();
        while idle.elapsed() < Duration::from_millis(1000 * TIMEOUT + 500) {
            sleep(Duration::from_millis(200));
            ensure!(open.ask()?.pod == homes[0], "an open connection moved");
        }
        ensure!(records()? == 0, "{} records outlived their timeout", records()?);
        // Forgotten: no two rounds alike, but once in 5^12 runs each.
        let again = street.homes(family, To::Cluster(80))?;
        ensure!(again != homes, "not forgotten");
        Ok(())
    };
    run().unwrap();
}

/// More clients than the kernel remembers where nothing is said.
fn many_clients_are_remembered<M: ModeUnderTest>() {
    if let Some(why) = M::lacks("many clients", None) {
        println!("skipped: {} mode: {why}", M::MODE);
        return;
    }
    let run = || -> Result<()> {
        let street = Street::<M>::build(600)?;
        let strangers = 70_000;
        M::add_affinity_records(street.lab.node(), IpFamily::V4, strangers)?;
        let homes = street.homes(IpFamily::V4, To::Cluster(80))?;
        ensure!(street.homes(IpFamily::V4, To::Cluster(80))? == homes);
        let records = M::affinity_records(street.lab.node(), IpFamily::V4)?;
        ensure!(records == strangers + usize::from(CLIENTS), "{records} records");
        // A start does not read them.
        let started = Instant::now();
        let node = street.lab.node();
        let restarted = node.run(|| Ok(Synced::<M::Real>::adopt(M::real(IpFamily::V4)?)?))?;
        println!("{} mode: {records} records, a start observes in {:?}", M::MODE, started.elapsed());
        let plan = restarted.plan(street.cluster.table(IpFamily::V4), &Change::everything());
        ensure!(plan.is_empty(), "a restart would do\n{plan}");
        Ok(())
    };
    run().unwrap();
}

/// What the plan for one changed endpoint costs.
fn a_changed_endpoint_is_a_handful_of_operations<M: ModeUnderTest>() {
    let event = |pods: std::ops::Range<u8>| {
        Step::Event(Event::Slice(EndpointSlice {
            name: NamespacedName::new("ns", "svc-1"),
            service: NamespacedName::new("ns", "svc"),
            family: IpFamily::V4,
            ports: vec![EndpointPort { name: "a".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: pods
                .map(|n| Endpoint {
                    address: pod(IpFamily::V4, n),
                    conditions: Conditions::default(),
                    node: Some(NODE.into()),
                    zone: None,
                    hints: None,
                    pod: None,
                })
                .collect(),
            last_change_trigger: None,
        }))
    };
    let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
    cluster.step(&Step::Event(Event::Service(Service {
        name: NamespacedName::new("ns", "svc"),
        created: 0,
        cluster_ips: vec![ip(CLUSTER_IPS[0])],
        external_ips: vec![ip("192.168.99.11")],
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort {
            name: "a".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: Some(NODE_PORT),
        }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Local,
        affinity: Some(Duration::from_mins(1)),
        scheduler: None,
        algorithm: None,
        health_check_node_port: None,
    })));
    cluster.step(&event(1..50));
    let mut kernel = Synced::adopt(M::fake(IpFamily::V4)).unwrap();
    kernel.sync(cluster.table(IpFamily::V4), &Change::everything()).unwrap();
    cluster.take_change(IpFamily::V4);
    for pods in [1..51, 2..51, 1..51, 1..50] {
        cluster.step(&event(pods.clone()));
        let change = cluster.take_change(IpFamily::V4);
        let plan = kernel.sync(cluster.table(IpFamily::V4), &change).unwrap();
        assert!(plan.len() <= M::OPS_PER_ENDPOINT && plan.transactions.len() == 1, "{pods:?}:\n{plan}");
    }
}

every_mode!(
    a_changed_endpoint_is_a_handful_of_operations;
    in kernel: clients_stay, records_expire, many_clients_are_remembered
);
