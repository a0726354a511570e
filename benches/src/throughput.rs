//! Packets in bulk: UDP floods, TCP streams, short connections. Repetitions go round as in `latency`.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::bed::{Bed, From};
use crate::cluster::{Cluster, Shape};
use crate::load::{ExchangeSpec, Exchanges, Flood, FloodSpec, Stream, StreamSpec, Work};
use crate::subject::{Stage, Subject};

/// How thoroughly to measure.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Number of Services, with ten endpoints each.
    pub services: usize,
    /// Repetitions.
    pub repetitions: u32,
    /// Length of each.
    pub duration: Duration,
    /// What is compared.
    pub subjects: Vec<Subject>,
}

/// One subject.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Which subject.
    pub subject: String,
    /// Number of Services, with ten endpoints each.
    pub services: usize,
    /// Processor time of a forwarded UDP packet, ns: least of the repetitions.
    pub udp_cpu_ns: f64,
    /// UDP packets a second: most of the repetitions.
    pub udp_per_second: f64,
    /// One TCP stream, Gbit/s: most of the repetitions.
    pub stream_gbps: f64,
    /// Eight TCP streams, Gbit/s.
    pub streams_gbps: f64,
    /// Connect, request, response, close: a second; most of the repetitions.
    pub exchanges_per_second: f64,
    /// Processor time of the client's side for each of these, µs: least of the repetitions.
    pub exchange_cpu_us: f64,
}

/// Flows of the flood.
const FLOWS: usize = 64;
/// Share of the flood that must arrive: what is dropped on the way costs less than what is carried.
const ARRIVED: f64 = 0.999;
/// Short connections under way at the same time.
const CONCURRENCY: usize = 32;

/// Measures all subjects.
pub(crate) fn measure(plan: &Plan) -> Result<Vec<Row>> {
    eprintln!("throughput: {} Services x 10 endpoints ...", plan.services);
    let udp = Cluster::new(Shape { udp: true, ..Shape::new(plan.services, 10) })?;
    let tcp = Cluster::new(Shape::new(plan.services, 10))?;
    let floods = rounds(plan, &udp, flood)?;
    let shorts = rounds(plan, &tcp, |bed, targets, run| {
        let work = ExchangeSpec {
            targets: targets.to_vec(),
            sources: From::Pod.sources(run),
            concurrency: CONCURRENCY,
            duration: plan.duration,
        };
        bed.load::<Exchanges>(Work::Exchange(work))
    })?;
    let stream = |flows| {
        rounds(plan, &tcp, move |bed, targets, _| {
            let targets = targets[..FLOWS.min(targets.len())].to_vec();
            bed.load::<Stream>(Work::Stream(StreamSpec { targets, flows, duration: plan.duration }))
        })
    };
    let (one, eight) = (stream(1)?, stream(8)?);
    let rows = plan.subjects.iter().enumerate().map(|(i, subject)| Row {
        subject: subject.name(),
        services: plan.services,
        udp_cpu_ns: least(&floods[i], |f| f.cpu_ns),
        udp_per_second: most(&floods[i], |f| f.per_second),
        stream_gbps: most(&one[i], |s| s.gigabits_per_second),
        streams_gbps: most(&eight[i], |s| s.gigabits_per_second),
        exchanges_per_second: most(&shorts[i], |e| e.per_second),
        exchange_cpu_us: least(&shorts[i], |e| e.cpu_us),
    });
    Ok(rows.collect())
}

/// All repetitions of one kind of load, by subject.
fn rounds<T>(
    plan: &Plan,
    cluster: &Cluster,
    load: impl Fn(&Bed, &[SocketAddrV4], u32) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let set_up = |subject: &Subject| -> Result<Stage> {
        let stage = subject.set_up(cluster, true).with_context(|| subject.name())?;
        if cluster.shape.udp {
            sink(&stage.bed)?;
        }
        Ok(stage)
    };
    let stages = plan.subjects.iter().map(set_up).collect::<Result<Vec<Stage>>>()?;
    let mut results: Vec<Vec<T>> = plan.subjects.iter().map(|_| Vec::new()).collect();
    for run in 0..plan.repetitions {
        for ((subject, stage), results) in plan.subjects.iter().zip(&stages).zip(&mut results) {
            let targets = if subject.serves() { cluster.frontends() } else { cluster.pods() };
            if subject.serves() {
                stage.bed.flush_conntrack()?;
            }
            results.push(load(&stage.bed, &targets, run).with_context(|| subject.name())?);
        }
    }
    Ok(results)
}

fn flood(bed: &Bed, targets: &[SocketAddrV4], run: u32) -> Result<Flood> {
    let source = From::Pod.sources(0).addresses.first().copied().context("no source")?;
    let step = (targets.len() / FLOWS).max(1);
    let work = FloodSpec {
        targets: targets.iter().skip(run as usize % step).step_by(step).copied().collect(),
        source,
        flows: FLOWS,
        duration: Duration::from_millis(500),
    };
    let before = sunk(bed)?;
    let flood: Flood = bed.load(Work::Flood(work))?;
    let arrived = (sunk(bed)? - before) as f64;
    ensure!(arrived >= flood.sent as f64 * ARRIVED, "of {} packets only {arrived} arrived", flood.sent);
    Ok(flood)
}

/// Lets the pods' link drop UDP as early as the kernel can without a program of ours, and count it: what
/// lies behind the node costs next to nothing.
fn sink(bed: &Bed) -> Result<()> {
    bed.pods()?.nft(
        "table netdev bench {\n chain sink {\n  type filter hook ingress device \"eth0\" priority 0;\n  \
         meta l4proto udp counter drop\n }\n}\n",
    )
}

/// Packets that were dropped there so far.
fn sunk(bed: &Bed) -> Result<u64> {
    let text = bed.pods()?.exec("nft", ["list", "chain", "netdev", "bench", "sink"], "")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    words.next().context("no counter")?.parse().context("counter")
}

fn least<T>(results: &[T], value: impl Fn(&T) -> f64) -> f64 {
    results.iter().map(value).fold(f64::INFINITY, f64::min)
}

fn most<T>(results: &[T], value: impl Fn(&T) -> f64) -> f64 {
    results.iter().map(value).fold(0.0, f64::max)
}
