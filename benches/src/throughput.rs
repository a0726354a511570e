//! Packets in bulk: UDP floods, TCP streams, short connections. Repetitions go round as in `latency`.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

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
    /// Share of a flood that must arrive: what is dropped on the way costs less than what is carried.
    pub arriving: f64,
}

/// One subject.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Which subject.
    pub subject: String,
    /// Number of Services, with ten endpoints each.
    pub services: usize,
    /// Processor time of a forwarded UDP packet, ns: least of the repetitions.
    pub udp_cpu_ns: f64,
    /// The same for packets to the pods themselves, past all Services, ns.
    #[serde(default)]
    pub past_cpu_ns: f64,
    /// The same for packets to a node port, from outside, ns.
    pub node_port_cpu_ns: f64,
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
    /// Short connections that failed.
    pub failed: u64,
    /// Connections to one Service by pod, the last byte of its address.
    pub by_pod: BTreeMap<u8, u64>,
}

impl Row {
    /// How far the pod with most or least connections is from an equal share, in standard deviations of a
    /// fair choice. Nothing without Services.
    pub(crate) fn spread(&self) -> Option<f64> {
        let share = 1.0 / ENDPOINTS as f64;
        let all = self.by_pod.values().sum::<u64>() as f64;
        let deviation = (all * share * (1.0 - share)).sqrt();
        // A pod that nobody reached is not in the map.
        let missing = (self.by_pod.len() < ENDPOINTS).then_some(0);
        let counts = self.by_pod.values().copied().chain(missing);
        counts
            .map(|count| (count as f64 - all * share).abs() / deviation)
            .max_by(f64::total_cmp)
            .filter(|sigma| sigma.is_finite())
    }
}

/// Endpoints of each Service.
const ENDPOINTS: usize = 10;

/// Flows of the flood.
const FLOWS: usize = 64;
/// Short connections under way at the same time.
const CONCURRENCY: usize = 32;

/// Measures all subjects that can be set up; the others are named in `failures`.
pub(crate) fn measure(plan: &Plan, failures: &mut Vec<String>) -> Result<Vec<Row>> {
    crate::in_time()?;
    crate::say(format_args!("throughput: {} Services x 10 endpoints", plan.services));
    let udp = Cluster::new(Shape { udp: true, node_ports: true, ..Shape::new(plan.services, ENDPOINTS) })?;
    let tcp = Cluster::new(Shape::new(plan.services, ENDPOINTS))?;
    let mut rows = Vec::new();
    let mut stages = Vec::new();
    for subject in &plan.subjects {
        match Both::set_up(subject, &udp, &tcp) {
            Ok(both) => {
                stages.push((subject.serves(), both));
                rows.push(Row { subject: subject.name(), services: plan.services, ..Row::default() });
            }
            Err(error) => failures.push(format!("throughput, {}: {error:#}", subject.name())),
        }
    }
    for run in 0..plan.repetitions {
        for ((serves, both), row) in stages.iter().zip(&mut rows) {
            let targets = if *serves {
                [udp.frontends(), udp.pods(), udp.node_ports(), tcp.frontends()]
            } else {
                [udp.pods(), udp.pods(), udp.pods(), tcp.pods()]
            };
            if let Err(error) = both.repetition(plan, targets, *serves, run, row) {
                failures.push(format!("throughput, {}, repetition {run}: {error:#}", row.subject));
            }
        }
    }
    Ok(rows)
}

/// One subject's namespaces, with UDP Services and with TCP Services.
struct Both {
    udp: Stage,
    tcp: Stage,
}

impl Both {
    fn set_up(subject: &Subject, udp: &Cluster, tcp: &Cluster) -> Result<Self> {
        let both = Self { udp: subject.set_up(udp, true)?, tcp: subject.set_up(tcp, true)? };
        sink(&both.udp.bed)?;
        Ok(both)
    }

    /// All kinds of load once; the best of each kind stays in `row`.
    fn repetition(
        &self,
        plan: &Plan,
        targets: [Vec<SocketAddrV4>; 4],
        serves: bool,
        run: u32,
        row: &mut Row,
    ) -> Result<()> {
        let [udp, pods, node_ports, tcp] = targets;
        for stage in [&self.udp, &self.tcp] {
            stage.bed.flush_conntrack()?;
        }
        let packets = flood(&self.udp.bed, From::Pod, &udp, run, plan)?;
        best(&mut row.udp_cpu_ns, packets.cpu_ns, f64::min);
        best(&mut row.udp_per_second, packets.per_second, f64::max);
        let packets = flood(&self.udp.bed, From::Pod, &pods, run, plan)?;
        best(&mut row.past_cpu_ns, packets.cpu_ns, f64::min);
        let packets = flood(&self.udp.bed, From::Outside, &node_ports, run, plan)?;
        best(&mut row.node_port_cpu_ns, packets.cpu_ns, f64::min);
        let exchange = ExchangeSpec {
            targets: tcp.clone(),
            sources: From::Pod.sources(run),
            concurrency: CONCURRENCY,
            duration: plan.duration,
        };
        let exchanges: Exchanges = self.tcp.bed.load(From::Pod, Work::Exchange(exchange))?;
        best(&mut row.exchanges_per_second, exchanges.per_second, f64::max);
        best(&mut row.exchange_cpu_us, exchanges.cpu_us, f64::min);
        row.failed += exchanges.failed;
        if serves {
            let exchange = ExchangeSpec {
                targets: tcp.iter().take(1).copied().collect(),
                sources: From::Pod.sources(run + plan.repetitions),
                concurrency: CONCURRENCY,
                duration: plan.duration,
            };
            let exchanges: Exchanges = self.tcp.bed.load(From::Pod, Work::Exchange(exchange))?;
            row.failed += exchanges.failed;
            for (pod, count) in exchanges.by_pod {
                *row.by_pod.entry(pod).or_default() += count;
            }
        }
        for (flows, figure) in [(1, &mut row.stream_gbps), (8, &mut row.streams_gbps)] {
            let targets = tcp.iter().take(FLOWS).copied().collect();
            let spec = StreamSpec { targets, flows, duration: plan.duration };
            let stream: Stream = self.tcp.bed.load(From::Pod, Work::Stream(spec))?;
            best(figure, stream.gigabits_per_second, f64::max);
        }
        Ok(())
    }
}

/// The better of what is known and what was found; nothing is known before the first time.
fn best(known: &mut f64, found: f64, better: fn(f64, f64) -> f64) {
    *known = if *known == 0.0 { found } else { better(*known, found) };
}

fn flood(bed: &Bed, from: From, targets: &[SocketAddrV4], run: u32, plan: &Plan) -> Result<Flood> {
    let source = from.sources(0).addresses.first().copied().context("no source")?;
    let step = (targets.len() / FLOWS).max(1);
    let work = FloodSpec {
        targets: targets.iter().skip(run as usize % step).step_by(step).copied().collect(),
        source,
        flows: FLOWS,
        duration: plan.duration,
    };
    let before = arrived(bed)?;
    let flood: Flood = bed.load(from, Work::Flood(work))?;
    let arrived = (arrived(bed)? - before) as f64;
    ensure!(arrived >= flood.sent as f64 * plan.arriving, "of {} packets only {arrived} arrived", flood.sent);
    Ok(flood)
}

/// Lets the pods' link drop UDP as early as the kernel can without a program of ours: what lies behind the
/// node costs next to nothing.
fn sink(bed: &Bed) -> Result<()> {
    let table = "table netdev bench {\n chain sink {\n  type filter hook ingress device \"eth0\" priority 0;\n  \
                 meta l4proto udp drop\n }\n}\n";
    bed.pods()?.nft(table).or_else(|_| {
        // A kernel without nf_tables, such as the guest's.
        let rules = "*raw\n-A PREROUTING -p udp -j DROP\nCOMMIT\n";
        bed.pods()?.exec("iptables-legacy-restore", ["--noflush"], rules).map(drop)
    })
}

/// Packets that the pods' link has received so far.
fn arrived(bed: &Bed) -> Result<u64> {
    let text = bed.pods()?.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
    let counters = text.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
    // Bytes, then packets.
    counters.split_whitespace().nth(1).context("no counter")?.parse().context("counter")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_counts_standard_deviations() {
        let row = |by_pod: BTreeMap<u8, u64>| Row { by_pod, ..Row::default() };
        let even: BTreeMap<u8, u64> = (0..10).map(|pod| (pod, 900)).collect();
        assert_eq!(row(even.clone()).spread(), Some(0.0));
        // 9,000 connections: the standard deviation of a pod's share of 900 is the root of 810.
        let mut odd = even.clone();
        odd.insert(0, 985);
        odd.insert(1, 815);
        assert!(row(odd).spread().is_some_and(|sigma| (2.9..3.1).contains(&sigma)));
        // One pod is never reached.
        let nine: BTreeMap<u8, u64> = even.into_iter().take(9).collect();
        assert!(row(nine).spread().is_some_and(|sigma| sigma > 25.0));
        assert_eq!(row(BTreeMap::new()).spread(), None);
    }
}
