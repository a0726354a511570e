//! Random clusters and random packets: whatever happens, the mode does what the table says, and on the
//! way to it never refuses what it should carry.
//!
//! `SHUNT_PROPERTY_CASES` sets how many clusters each property tries, `SHUNT_PROPERTY_SEED` which: a
//! number, or `random`. Without it they are always the same, so that a red run is the change's doing.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use proptest::prelude::*;
use proptest::test_runner::{Config as RunnerConfig, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use shunt_core::compile::{Compiler, Context};
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::explain::{Cause, Ruling, Source, explain};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::Config;
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_core::table::{Change, ForwardingTable, Target};
use shunt_core::walk::{Outcome, Packet, walk};
use shunt_mode::{Backend, rendered};
use shunt_suites::driver::{Cluster, Synced};
use shunt_suites::every_mode;
use shunt_suites::mode::ModeUnderTest;
use shunt_suites::random::{NODE, Packets, Step, context, packets, step, steps};

fn runner(cases: u32) -> TestRunner {
    let cases = std::env::var("SHUNT_PROPERTY_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let config = RunnerConfig { cases, failure_persistence: None, ..RunnerConfig::default() };
    let mut seed = [0; 32];
    match std::env::var("SHUNT_PROPERTY_SEED").as_deref() {
        Ok("random") => return TestRunner::new(config),
        Ok(number) => seed[..8].copy_from_slice(&number.parse::<u64>().unwrap().to_le_bytes()),
        Err(_) => {}
    }
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed))
}

fn check<S: Strategy>(cases: u32, strategy: &S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    if let Err(error) = runner(cases).run(strategy, test) {
        let text = error.to_string();
        // The packets say nothing that the message does not.
        panic!("{}", text.split("\n    Packets(").next().unwrap_or_default());
    }
}

fn trace<M: ModeUnderTest>(table: &ForwardingTable, state: &M::State, packet: &Packet) -> Outcome {
    match M::trace(state, &table.node().local_addresses, packet) {
        Ok(outcome) => outcome,
        Err(why) => panic!("{why}\n{table}\n{state}"),
    }
}

fn same_answers<M: ModeUnderTest>(
    table: &ForwardingTable,
    state: &M::State,
    packets: &Packets,
) -> Result<(), TestCaseError> {
    for packet in packets.aimed(table) {
        let (want, got) = (M::expected(table, &packet), trace::<M>(table, state, &packet));
        prop_assert_eq!(&got, &want, "{}\n{}\n{}", packet, table, state);
    }
    Ok(())
}

/// What is compiled change by change is what is compiled at once.
#[test]
fn incremental_compilation_is_full_compilation() {
    check(1500, &(context(), steps(1..40)), |(context, steps)| {
        let mut cluster = Cluster::new(context);
        for step in &steps {
            cluster.step(step);
        }
        let full = Compiler::full(cluster.compiler.context().clone(), &cluster.store);
        for family in IpFamily::ALL {
            prop_assert_eq!(cluster.table(family), full.table(family));
        }
        Ok(())
    });
}

/// Objects may arrive in any order.
#[test]
fn the_order_of_events_means_nothing() {
    let strategy = (context(), steps(1..30)).prop_flat_map(|(context, steps)| {
        // One object each, so that every order ends with the same objects.
        let mut seen = BTreeSet::new();
        let steps: Vec<Step> = steps
            .into_iter()
            .filter(|step| match step {
                Step::Event(Event::Service(s)) => seen.insert((0, s.name.to_string())),
                Step::Event(Event::Slice(s)) => seen.insert((1, s.name.to_string())),
                Step::Event(Event::Node(_)) => seen.insert((2, String::new())),
                _ => false,
            })
            .collect();
        (Just(context), Just(steps.clone()), Just(steps).prop_shuffle())
    });
    check(500, &strategy, |(context, one, other)| {
        let [one, other] = [one, other].map(|steps| {
            let mut cluster = Cluster::new(context.clone());
            cluster.steps(&steps);
            cluster
        });
        for family in IpFamily::ALL {
            prop_assert_eq!(one.table(family), other.table(family));
        }
        Ok(())
    });
}

/// The mode's walker over what the mode rendered gives the answers of the reference walker.
fn rendered_state_answers_as_the_table<M: ModeUnderTest>() {
    let seen: std::cell::RefCell<BTreeMap<&'static str, usize>> = std::cell::RefCell::default();
    check(1200, &(context(), steps(10..60), packets(100)), |(context, steps, packets)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&steps);
        for family in IpFamily::ALL {
            let table = cluster.table(family);
            same_answers::<M>(table, &rendered::<M::Fake>(table), &packets)?;
            for packet in packets.aimed(table) {
                let kind = match walk(table, &packet).outcome {
                    Outcome::Forward(_) => "forward",
                    Outcome::Reject => "reject",
                    Outcome::Drop => "drop",
                    Outcome::None => "none",
                };
                *seen.borrow_mut().entry(kind).or_default() += 1;
            }
        }
        Ok(())
    });
    let seen = seen.into_inner();
    let pairs: usize = seen.values().sum();
    println!("{pairs} packets: {seen:?}");
    for kind in ["forward", "reject", "drop", "none"] {
        assert!(seen.get(kind).is_some_and(|n| n * 50 > pairs), "too few packets end as {kind}: {seen:?}");
    }
}

/// Nothing is left to do after a plan was carried out, whatever it started from.
fn a_plan_leads_from_any_table_to_any_other<M: ModeUnderTest>() {
    let strategy = (context(), steps(0..40), steps(1..25), packets(24), 0..6_u8);
    check(400, &strategy, |(context, first, second, packets, tightness)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&first);
        let before = cluster.clone();
        cluster.steps(&second);
        for family in IpFamily::ALL {
            let mut kernel = Synced::adopt(M::fake(family)).unwrap();
            for cluster in [&before, &cluster] {
                let table = cluster.table(family);
                let desired = M::Fake::render(table, &Change::everything());
                let plan = M::plan_tight(&kernel.mirror, &desired, tightness);
                for transaction in &plan.transactions {
                    kernel.apply(transaction).map_err(|e| TestCaseError::fail(format!("{e}\n{plan}")))?;
                }
                same_answers::<M>(table, &kernel.mirror, &packets)?;
                prop_assert_eq!(&M::held(&mut kernel.backend), &kernel.mirror);
                let again = M::plan_tight(&kernel.mirror, &desired, tightness);
                prop_assert!(again.is_empty(), "not done after\n{}but still\n{}", plan, again);
            }
        }
        Ok(())
    });
}

/// Changes carried out as they come, some of them together, end where one look at everything ends.
fn incremental_syncs_end_where_a_full_one_does<M: ModeUnderTest>() {
    let strategy =
        (context(), proptest::collection::vec((step(), any::<bool>()), 1..40), packets(24), 0..6_u8);
    check(400, &strategy, |(context, steps, packets, tightness)| {
        let mut cluster = Cluster::new(context);
        let mut kernels = IpFamily::ALL.map(|family| Synced::adopt(M::fake(family)).unwrap());
        let last = steps.len() - 1;
        for (i, (step, sync)) in steps.iter().enumerate() {
            cluster.step(step);
            if !sync && i != last {
                continue;
            }
            for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
                let change = cluster.take_change(family);
                if change.is_empty() {
                    continue;
                }
                let table = cluster.table(family);
                let plan = M::plan_tight(&kernel.mirror, &M::Fake::render(table, &change), tightness);
                for transaction in &plan.transactions {
                    kernel
                        .apply(transaction)
                        .map_err(|e| TestCaseError::fail(format!("{e}\n{plan}\n{}", kernel.mirror)))?;
                }
                same_answers::<M>(table, &kernel.mirror, &packets)?;
            }
        }
        for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
            prop_assert_eq!(M::reads(&mut kernel.backend), 1, "read again");
            prop_assert_eq!(&M::held(&mut kernel.backend), &kernel.mirror);
            let table = cluster.table(family);
            let everything = M::Fake::render(table, &Change::everything());
            let rest = M::plan_tight(&kernel.mirror, &everything, tightness);
            let ops = rest.transactions.iter().flat_map(|t| &t.ops);
            prop_assert!(ops.clone().all(M::is_garbage), "left undone:\n{}\n{}", rest, kernel.mirror);
        }
        Ok(())
    });
}

/// Where a packet was carried before and is carried after, it is carried in between, to an endpoint of
/// either time; what was discarded before and is not carried after is never carried.
fn every_prefix_of_a_plan_is_safe<M: ModeUnderTest>() {
    let strategy = (context(), steps(8..50), steps(1..12), packets(48), 0..6_u8, any::<bool>());
    check(500, &strategy, |(context, first, second, packets, tightness, everything)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&first);
        let before = cluster.clone();
        for family in IpFamily::ALL {
            cluster.take_change(family);
        }
        cluster.steps(&second);
        for family in IpFamily::ALL {
            let old = before.table(family);
            let mut state = M::Fake::empty(family);
            let desired = M::Fake::render(old, &Change::everything());
            for transaction in &M::plan_tight(&state, &desired, tightness).transactions {
                M::Fake::advance(&mut state, transaction);
            }
            let new = cluster.compiler.table(family).clone();
            let change = cluster.take_change(family);
            let change = if everything { Change::everything() } else { change };
            let plan = M::plan_tight(&state, &M::Fake::render(&new, &change), tightness);
            let start = state.clone();
            let packets: BTreeSet<Packet> =
                packets.aimed(old).into_iter().chain(packets.aimed(&new)).collect();
            for transaction in &plan.transactions {
                M::Fake::advance(&mut state, transaction);
                for packet in &packets {
                    let between = |local: &BTreeSet<IpAddr>| {
                        M::trace(&state, local, packet).map_err(TestCaseError::fail)
                    };
                    // Which addresses are the node's changes on its own; either time will do.
                    let local = &new.node().local_addresses;
                    if local != &old.node().local_addresses || !M::is_settled(old, &new, packet) {
                        continue;
                    }
                    let (was, will, is) =
                        (M::expected(old, packet), M::expected(&new, packet), between(local)?);
                    // Other settings are in force before the objects change: what is a pod, where node
                    // ports answer. Then only what is carried at both times must be carried.
                    let carried = |outcome: &Outcome| matches!(outcome, Outcome::Forward(_));
                    let excused =
                        old.node() != new.node() && (M::ONE_BY_ONE || !(carried(&was) && carried(&will)));
                    prop_assert!(
                        excused || is_safe::<M>(packet, &was, &will, &is),
                        "{}: {}, then {}, but {} in between\nbefore:\n{}\n{}\nplan:\n{}\nnow:\n{}\n{}",
                        packet,
                        was,
                        will,
                        is,
                        old,
                        start,
                        plan,
                        new,
                        state
                    );
                }
            }
        }
        Ok(())
    });
}

fn is_safe<M: ModeUnderTest>(packet: &Packet, was: &Outcome, will: &Outcome, is: &Outcome) -> bool {
    match (was, will) {
        (Outcome::Forward(was), Outcome::Forward(will)) => {
            let either: BTreeSet<&(SocketAddr, bool)> = was.iter().chain(will).collect();
            // An endpoint that moves to another node may for a moment be masqueraded to itself as before.
            let itself = |to: &SocketAddr| {
                to.ip() == packet.source && either.iter().any(|(endpoint, _)| endpoint == to)
            };
            // Masqueraded it arrives and finds back, whoever sent it.
            let masqueraded = |endpoint: &(SocketAddr, bool)| {
                M::ONE_BY_ONE && endpoint.1 && either.iter().any(|(socket, _)| *socket == endpoint.0)
            };
            let safe = |endpoint: &(SocketAddr, bool)| {
                either.contains(endpoint) || itself(&endpoint.0) || masqueraded(endpoint)
            };
            matches!(is, Outcome::Forward(is) if is.iter().all(safe))
        }
        (Outcome::Drop, Outcome::Drop | Outcome::None | Outcome::Reject) => {
            !matches!(is, Outcome::Forward(_))
        }
        (Outcome::None, Outcome::None) => *is == Outcome::None,
        _ => true,
    }
}

/// One changed endpoint costs a handful of operations and no look at the kernel, however many Services
/// there are.
fn one_endpoint_costs_the_same_in_any_cluster<M: ModeUnderTest>() {
    const ENDPOINTS: u8 = 5;
    let slice = |service: u32, endpoints: &[u8]| {
        let [_, _, high, low] = service.to_be_bytes();
        Step::Event(Event::Slice(EndpointSlice {
            name: NamespacedName::new("ns", format!("svc{service}-1")),
            service: NamespacedName::new("ns", format!("svc{service}")),
            family: IpFamily::V4,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
            endpoints: endpoints
                .iter()
                .map(|n| Endpoint {
                    address: [10, high, low, *n].into(),
                    conditions: Conditions::default(),
                    node: (n % 2 == 0).then(|| NODE.into()),
                    zone: None,
                    hints: None,
                    pod: None,
                })
                .collect(),
            last_change_trigger: None,
        }))
    };
    for services in [10_u32, 3000] {
        let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
        for n in 0..services {
            let [_, _, high, low] = n.to_be_bytes();
            cluster.step(&Step::Event(Event::Service(Service {
                name: NamespacedName::new("ns", format!("svc{n}")),
                created: 0,
                cluster_ips: vec![[172, 16, high, low].into()],
                external_ips: Vec::new(),
                load_balancer_ips: Vec::new(),
                source_ranges: Vec::new(),
                ports: vec![ServicePort {
                    name: "".into(),
                    protocol: Protocol::Tcp,
                    port: 80,
                    node_port: None,
                }],
                internal_policy: TrafficPolicy::Cluster,
                external_policy: TrafficPolicy::Cluster,
                affinity: None,
                scheduler: None,
                algorithm: None,
                health_check_node_port: None,
            })));
            cluster.step(&slice(n, &(0..ENDPOINTS).collect::<Vec<u8>>()));
        }
        let mut kernel = Synced::adopt(M::fake(IpFamily::V4)).unwrap();
        let change = cluster.take_change(IpFamily::V4);
        kernel.sync(cluster.table(IpFamily::V4), &change).unwrap();
        for (what, endpoints) in [
            ("replaced", &[0, 1, 2, 3, 9][..]),
            ("added", &[0, 1, 2, 3, 4, 9]),
            ("removed", &[0, 2, 3, 4, 9]),
            ("first removed", &[2, 3, 4, 9]),
            ("made local", &[2, 3, 4, 8]),
        ] {
            cluster.step(&slice(7, endpoints));
            let change = cluster.take_change(IpFamily::V4);
            assert!(!change.everything);
            let plan = kernel.sync(cluster.table(IpFamily::V4), &change).unwrap();
            println!("{services} Services, endpoint {what}: {} operations", plan.len());
            assert!((1..=M::OPS_PER_ENDPOINT).contains(&plan.len()), "{services}: {what}:\n{plan}");
            cluster.step(&slice(7, endpoints));
            assert!(cluster.take_change(IpFamily::V4).is_empty(), "the same again is no change");
        }
        assert_eq!(M::reads(&mut kernel.backend), 1);
    }
}

/// What is explained is what the table does, and every endpoint is either chosen or left out for a
/// reason.
#[test]
fn explanations_say_what_the_table_does() {
    check(300, &(context(), steps(4..40), packets(48)), |(context, steps, packets)| {
        let mut cluster = Cluster::new(context);
        cluster.steps(&steps);
        for family in IpFamily::ALL {
            let table = cluster.table(family);
            for packet in packets.aimed(table) {
                let explanation = explain(&cluster.store, &cluster.compiler, &packet);
                prop_assert_eq!(&explanation.outcome, &walk(table, &packet).outcome);
                let Cause::Frontend(matched) = &explanation.cause else {
                    prop_assert!(!matches!(explanation.outcome, Outcome::Forward(_)), "{}", explanation);
                    continue;
                };
                let Ruling::Forward { source, endpoints, .. } = &matched.ruling else {
                    prop_assert!(matches!(explanation.outcome, Outcome::Drop | Outcome::Reject));
                    continue;
                };
                let socket = |t: &Target| SocketAddr::new(t.address, t.port);
                let explained = endpoints.iter().map(|c| (socket(&c.target), c.masquerade)).collect();
                prop_assert_eq!(&explanation.outcome, &Outcome::Forward(explained), "{}", explanation);
                let always = matches!(source, Source::Masqueraded(_));
                prop_assert!(endpoints.iter().all(|c| c.masquerade == (always || c.hairpin)));
                let chosen: BTreeSet<_> = endpoints.iter().map(|c| socket(&c.target)).collect();
                let left_out: BTreeSet<_> = matched.left_out.iter().map(|(t, _)| socket(t)).collect();
                prop_assert!(chosen.is_disjoint(&left_out));
                let slices = cluster.store.slices(&matched.service.service);
                let all: BTreeSet<SocketAddr> = slices
                    .filter(|slice| slice.family == family)
                    .flat_map(|slice| slice.ports.iter().map(move |port| (slice, port)))
                    .filter(|(_, p)| p.name == matched.service.port && p.protocol == packet.protocol)
                    .flat_map(|(s, p)| s.endpoints.iter().map(|e| SocketAddr::new(e.address, p.port)))
                    .collect();
                prop_assert_eq!(chosen.union(&left_out).copied().collect::<BTreeSet<_>>(), all);
            }
        }
        Ok(())
    });
}

every_mode!(
    one_endpoint_costs_the_same_in_any_cluster,
    rendered_state_answers_as_the_table,
    a_plan_leads_from_any_table_to_any_other,
    incremental_syncs_end_where_a_full_one_does,
    every_prefix_of_a_plan_is_safe,
);
