//! First packets: every subject has namespaces of its own, all are loaded at the same time, and repetitions
//! go round: direct, references, Shunt, direct, ...

use std::net::SocketAddrV4;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::bed::From;
use crate::cluster::{Cluster, Shape};
use crate::load::{ConnectSpec, Latency, Work};
use crate::subject::{Stage, Subject};

/// How thoroughly to measure.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Numbers of Services.
    pub services: Vec<usize>,
    /// Endpoints of each.
    pub endpoints: usize,
    /// Connections in a repetition.
    pub connections: u32,
    /// Repetitions of what goals are about.
    pub repetitions: u32,
    /// Repetitions of sizes and targets that only curves show.
    pub few_repetitions: u32,
    /// Most time for the connections of a repetition.
    pub limit: Duration,
    /// What is compared.
    pub subjects: Vec<Subject>,
    /// References are written for up to so many Services.
    pub reference_limit: usize,
}

/// What connections go to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    /// One Service's cluster IP, from a pod.
    Fixed,
    /// Any Service's cluster IP, from a pod.
    Random,
    /// Any node port, from outside.
    NodePort,
    /// A pod's own address, from a pod: no Service at all.
    Miss,
}

impl Target {
    /// What is asked at a size. One Service and packets to none matter where there are many.
    fn at(services: usize, largest: bool) -> Vec<Self> {
        let mut targets = vec![Self::Random, Self::NodePort];
        if largest {
            targets.push(Self::Fixed);
        }
        // Where there are few, for the difference.
        if largest || services == 10 || services >= 10_000 {
            targets.push(Self::Miss);
        }
        targets
    }

    fn from(self) -> From {
        if self == Self::NodePort { From::Outside } else { From::Pod }
    }

    /// Addresses, where Services exist; without, the same number of pods.
    fn addresses(self, cluster: &Cluster, served: bool) -> Vec<SocketAddrV4> {
        let mut found = match self {
            Self::Miss => cluster.pods(),
            Self::NodePort => cluster.node_ports(),
            Self::Fixed | Self::Random => cluster.frontends(),
        };
        if !served {
            found = cluster.pods().into_iter().take(found.len()).collect();
        }
        if self == Self::Fixed {
            // Neither the first nor the last one of any list.
            found = found.get(found.len() / 2).copied().into_iter().collect();
        }
        found
    }
}

/// One subject, one size, one target. Microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Which subject.
    pub subject: String,
    /// Number of Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// What was connected to.
    pub target: Target,
    /// Least median of the repetitions, from the SYN: what ratios are made of.
    pub p50_us: f64,
    /// Largest median of the repetitions, from the SYN.
    pub p50_max_us: f64,
    /// From when a connection was due: median over repetitions of the median, 99th and 99.9th percentile.
    pub response_us: [f64; 3],
    /// Connections measured.
    pub connections: u64,
    /// Connections that failed.
    pub failed: u64,
    /// Connections a second, median.
    pub rate: f64,
}

struct Row {
    subject: Subject,
    cluster: usize,
    stage: Stage,
    results: Vec<(Target, Vec<Latency>)>,
}

/// Measures all sizes; what cannot be measured is said in `failures`.
pub(crate) fn measure(plan: &Plan, failures: &mut Vec<String>) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &services in &plan.services {
        match measure_size(plan, services, failures) {
            Ok(measured) => cells.extend(measured),
            Err(error) => failures.push(format!("first packets, {services} Services: {error:#}")),
        }
    }
    cells
}

fn measure_size(plan: &Plan, services: usize, failures: &mut Vec<String>) -> Result<Vec<Cell>> {
    crate::in_time()?;
    crate::say(format_args!("first packets: {services} Services x {} endpoints", plan.endpoints));
    let shape = |services| Shape { node_ports: true, ..Shape::new(services, plan.endpoints) };
    let largest = plan.services.iter().max() == Some(&services);
    let targets = Target::at(services, largest);
    let mut clusters = vec![Cluster::new(shape(services))?];
    if largest && services > 1 {
        // One Service again beside the most, so that growth is a ratio within one run.
        clusters.push(Cluster::new(shape(1))?);
    }
    let mut wanted: Vec<(Subject, usize)> = Vec::new();
    for subject in &plan.subjects {
        if let Subject::Layout(layout) = subject {
            if layout.grows() && services > plan.reference_limit {
                continue;
            }
            if services * plan.endpoints > layout.most_endpoints() {
                // The kernel refuses; fewer endpoints leave the way to the Service as long as it is.
                let endpoints = (layout.most_endpoints() / services).max(1);
                clusters.push(Cluster::new(Shape { endpoints, ..shape(services) })?);
                wanted.push((subject.clone(), clusters.len() - 1));
                continue;
            }
        }
        if matches!(subject, Subject::Program(program) if !program.can_take(services, plan.endpoints)) {
            continue;
        }
        wanted.push((subject.clone(), 0));
        if largest && services > 1 && matches!(subject, Subject::Program(_)) {
            wanted.push((subject.clone(), 1));
        }
    }
    let stages = thread::scope(|scope| {
        let threads: Vec<_> = wanted
            .iter()
            .map(|(subject, cluster)| {
                let cluster = &clusters[*cluster];
                scope.spawn(move || {
                    let started = Instant::now();
                    let stage = subject.set_up(cluster, false).with_context(|| subject.name())?;
                    crate::say(format_args!(
                        "  {}: ready after {:.1} s",
                        subject.name(),
                        started.elapsed().as_secs_f64()
                    ));
                    Ok(stage)
                })
            })
            .collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<Stage>>| {
            thread.join().map_err(|_| anyhow!("a thread panicked"))?
        };
        threads.into_iter().map(join).collect::<Vec<Result<Stage>>>()
    });
    let mut rows: Vec<Row> = Vec::new();
    for ((subject, cluster), stage) in wanted.into_iter().zip(stages) {
        // Of one Service beside the most only growth is wanted.
        let beside = clusters[cluster].shape.services != services;
        let wanted = |target: &&Target| !beside || matches!(target, Target::Fixed | Target::Random);
        let results = targets.iter().filter(wanted).map(|target| (*target, Vec::new())).collect();
        match stage {
            Ok(stage) => rows.push(Row { subject, cluster, stage, results }),
            Err(error) => failures.push(format!("first packets, {services} Services: {error:#}")),
        }
    }
    let judged = largest || services == 10 || services == 10_000;
    for run in 0..plan.repetitions {
        for row in &mut rows {
            let count = row.results.len() as u32;
            for (number, (target, results)) in (0..).zip(&mut row.results) {
                if run >= plan.few_repetitions && (!judged || *target == Target::NodePort) {
                    continue;
                }
                let cluster = &clusters[row.cluster];
                let spec = ConnectSpec {
                    targets: target.addresses(cluster, row.subject.serves()),
                    // IPVS remembers closed connections: to a pod itself they come from other ports.
                    sources: target.from().sources(run * count + number),
                    connections: plan.connections,
                    limit: plan.limit,
                };
                if row.subject.serves() {
                    row.stage.bed.flush_conntrack()?;
                }
                match row.stage.bed.load(target.from(), Work::Connect(spec)) {
                    Ok(latency) => results.push(latency),
                    Err(error) => failures.push(format!(
                        "first packets, {}, {target:?}, {} Services, repetition {run}: {error:#}",
                        row.subject.name(),
                        cluster.shape.services
                    )),
                }
            }
        }
    }
    Ok(rows.iter().flat_map(|row| cells(row, &clusters[row.cluster].shape)).collect())
}

fn cells(row: &Row, shape: &Shape) -> Vec<Cell> {
    let of = |(target, results): &(Target, Vec<Latency>)| {
        let sorted = |value: &dyn Fn(&Latency) -> f64| {
            let mut values: Vec<f64> = results.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let median = |value: &dyn Fn(&Latency) -> f64| sorted(value).get(results.len() / 2).copied();
        let p50 = sorted(&|l| l.service.p50);
        Some(Cell {
            subject: row.subject.name(),
            services: shape.services,
            endpoints: shape.endpoints,
            target: *target,
            p50_us: *p50.first()?,
            p50_max_us: *p50.last()?,
            response_us: [
                median(&|l| l.response.p50)?,
                median(&|l| l.response.p99)?,
                median(&|l| l.response.p999)?,
            ],
            connections: results.iter().map(|l| l.connections).sum(),
            failed: results.iter().map(|l| l.failed).sum(),
            rate: median(&|l| l.rate)?,
        })
    };
    row.results.iter().filter_map(of).collect()
}
