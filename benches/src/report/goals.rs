//! Figures that have goals, and whether they are met.

use serde::Serialize;

use super::Report;
use crate::control::{Churn, Cold, Restart};
use crate::latency::Target;
use crate::layouts::FLOOR;

/// Modes that have goals, in the order of [`Row::at_most`].
pub(super) const MODES: [&str; 5] = ["nftables", "iptables-legacy", "iptables-nft", "ebpf", "ipvs"];

/// One figure of one mode.
#[derive(Debug, Serialize)]
pub(crate) struct Goal {
    /// Its number in the table of goals.
    pub id: &'static str,
    /// The mode.
    pub mode: &'static str,
    /// What it says.
    pub what: &'static str,
    /// The figure.
    pub value: f64,
    /// At most this much, where it has a goal.
    pub at_most: Option<f64>,
}

impl Goal {
    /// Whether it is met.
    pub(crate) fn met(&self) -> bool {
        self.at_most.is_none_or(|at_most| self.value <= at_most)
    }
}

/// A figure, and what it may be at most in each of the [`MODES`].
pub(super) struct Row {
    pub id: &'static str,
    pub what: &'static str,
    pub at_most: [f64; MODES.len()],
    value: fn(&View<'_>) -> Option<f64>,
}

/// No goal.
const ANY: f64 = f64::INFINITY;
/// No goal either, but shown: what the goal above it is read with.
const SHOWN: f64 = f64::MAX;

const fn row(
    id: &'static str,
    what: &'static str,
    at_most: [f64; MODES.len()],
    value: fn(&View<'_>) -> Option<f64>,
) -> Row {
    Row { id, what, at_most, value }
}

const fn only_nftables(at_most: f64) -> [f64; MODES.len()] {
    [at_most, ANY, ANY, ANY, ANY]
}

const fn only_iptables(at_most: f64) -> [f64; MODES.len()] {
    [ANY, at_most, at_most, ANY, ANY]
}

const fn only_ebpf(at_most: f64) -> [f64; MODES.len()] {
    [ANY, ANY, ANY, at_most, ANY]
}

/// The whole table.
pub(super) const ROWS: &[Row] = &[
    row("A1", "first packet p50 to one Service: most Services / 1", [1.05, 1.1, ANY, 1.05, 1.05], |view| {
        view.growth(Target::Fixed)
    }),
    row("A2", "the same, to any Service", [1.25, 1.3, ANY, 1.15, 1.25], |view| view.growth(Target::Random)),
    row(
        "A3",
        "first packet - direct, 10,000 Services: ours / kube-proxy's layout",
        [0.65, 0.11, 0.11, 0.1, 0.7],
        |view| view.share(Target::Random),
    ),
    row("A3", "the same of one DNAT rule and nothing else", [SHOWN, SHOWN, SHOWN, ANY, ANY], |view| {
        view.floor(Target::Random)
    }),
    row("A3", "first packet - direct: 10,000 Services / 10", only_iptables(1.3), |view| {
        Some(view.above(10_000, Target::Random)? / view.above(10, Target::Random)?)
    }),
    row("A4", "first packet, 10 Services: ours / direct", only_ebpf(1.15), |view| view.to_direct(10)),
    row("A4", "first packet, 30,000 Services: ours / direct", only_ebpf(1.15), |view| view.to_direct(30_000)),
    row(
        "A5",
        "non-Service connection - direct, 10,000 Services: ours / kube-proxy's layout",
        [0.8, 0.02, 0.02, ANY, 1.0],
        |view| view.share(Target::Miss),
    ),
    row("A5", "the same of one DNAT rule and nothing else", [SHOWN, SHOWN, SHOWN, ANY, ANY], |view| {
        view.floor(Target::Miss)
    }),
    row(
        "A5",
        "non-Service connection, 10,000 Services: (ours - direct) / direct (repeats are within 0.02)",
        only_ebpf(0.02),
        |view| Some(view.above(10_000, Target::Miss)? / view.p50("direct", 10_000, Target::Miss)?),
    ),
    row("A5", "non-Service connection, 10,000 Services - 10, µs", only_iptables(1.0), |view| {
        Some(view.above(10_000, Target::Miss)? - view.above(10, Target::Miss)?)
    }),
    row("B", "CPU of a packet: ours / kube-proxy's layout", [0.9, 1.0, 1.0, ANY, ANY], |view| {
        view.cpu(view.reference())
    }),
    row("B", "CPU of a packet: ours / direct", [1.2, ANY, ANY, 1.01, ANY], |view| view.cpu("direct")),
    row("B", "CPU of a packet: to a Service / to its pod, on one node", only_ebpf(1.01), |view| {
        let row = view.bulk(&view.subject).filter(|row| row.past_cpu_ns > 0.0)?;
        Some(row.udp_cpu_ns / row.past_cpu_ns)
    }),
    row("B", "CPU of a packet to a node port: ours / nftables mode", only_ebpf(0.95), |view| {
        view.node_port_cpu("shunt nftables")
    }),
    row("B", "CPU of a packet to a node port: ours / plain forwarding (XDP)", only_ebpf(0.9), |view| {
        view.node_port_cpu("direct")
    }),
    row(
        "C1",
        "change to kernel p50, 10,000 x 10, 100 changes/s, ms",
        [2.0, 400.0, 400.0, 1.0, 2.0],
        |view| fastest(view.churn(10_000)?, 0),
    ),
    row("C1", "the same, one change a second", only_iptables(400.0), |view| {
        let alone = view.churn(10_000)?.rates.iter().find(|rate| rate.per_second == 1)?;
        alone.ms.first().copied()
    }),
    row("C1", "change to kernel p99, 10,000 x 10, 100 changes/s, ms", [10.0, ANY, ANY, 5.0, 10.0], |view| {
        fastest(view.churn(10_000)?, 2)
    }),
    row("C2", "change to kernel p50: 30,000 Services / 1,000", only_nftables(1.5), |view| {
        Some(fastest(view.churn(30_000)?, 0)? / fastest(view.churn(1_000)?, 0)?)
    }),
    row("C5", "1,000 Services change at once, ms", [100.0, 1_000.0, 1_000.0, 100.0, 200.0], |view| {
        Some(view.churn(10_000)?.burst_ms)
    }),
    row("C6", "full reads of the kernel during all changes", [0.0; MODES.len()], |view| {
        Some(view.churn(10_000)?.full_reads? as f64)
    }),
    row("C7", "instructions of a change: 30,000 Services / 1,000", only_nftables(1.3), |view| {
        view.growth_of(|growth| growth.instructions)
    }),
    row("C7", "allocations of a change: 30,000 Services / 1,000", only_nftables(1.3), |view| {
        view.growth_of(|growth| growth.allocations)
    }),
    row("D1", "cold start, 10,000 x 10, kernel part, ms", [150.0, ANY, ANY, 20.0, ANY], |view| {
        Some(view.cold(10_000, 10)?.first_sync?.write_ms)
    }),
    row(
        "D1",
        "cold start, 10,000 x 10, whole process, ms",
        [800.0, 1_500.0, 15_000.0, 700.0, 1_000.0],
        |view| Some(view.cold(10_000, 10)?.whole_ms),
    ),
    row("D4", "cold start, 30,000 x 10, kernel part, ms", [500.0, 4_000.0, ANY, 50.0, 3_000.0], |view| {
        Some(view.cold(30_000, 10)?.first_sync?.write_ms)
    }),
    row("D6", "restart over 10,000 x 10, ms", [500.0; MODES.len()], |view| {
        Some(view.restart(10_000)?.whole_ms)
    }),
    row("D6", "restart over 10,000 x 10, writes", [0.0; MODES.len()], |view| {
        Some(view.restart(10_000)?.first_sync.operations as f64)
    }),
    row("E1", "peak RSS, 10,000 x 10, without the tools, MiB", [64.0; MODES.len()], |view| {
        Some(view.cold(10_000, 10)?.memory.peak_mib)
    }),
    row("E1", "peak RSS, 100 x 10, MiB", only_nftables(15.0), |view| {
        Some(view.cold(100, 10)?.memory.peak_mib)
    }),
    row("E3", "chains in the kernel, 10,000 x 10", only_nftables(50.0), |view| {
        Some(view.cold(10_000, 10)?.chains_and_sets[0] as f64)
    }),
    row("E3", "sets in the kernel, 10,000 x 10", only_nftables(12.0), |view| {
        Some(view.cold(10_000, 10)?.chains_and_sets[1] as f64)
    }),
    row("E4", "idle CPU, 10,000 x 10, ms/s", [1.0; MODES.len()], |view| {
        Some(view.churn(10_000)?.idle_ms_per_s)
    }),
    row(
        "F",
        "spread over ten endpoints: most standard deviations from an equal share",
        [5.0; MODES.len()],
        |view| view.bulk(&view.subject)?.spread(),
    ),
    row("F", "short connections that failed", [0.0; MODES.len()], |view| {
        Some(view.bulk(&view.subject)?.failed as f64)
    }),
];

/// All figures of all modes that were measured.
pub(super) fn all(report: &Report) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (i, mode) in MODES.into_iter().enumerate() {
        for row in ROWS.iter().filter(|row| row.at_most[i].is_finite()) {
            // Shunt chooses the flavour of "iptables" by itself; where tests run that is legacy.
            let names: &[&str] =
                if mode == "iptables-legacy" { &["iptables-legacy", "iptables"] } else { &[mode] };
            let value = names
                .iter()
                .find_map(|name| (row.value)(&View { report, mode: name, subject: format!("shunt {name}") }));
            if let Some(value) = value.filter(|value| value.is_finite()) {
                let at_most = Some(row.at_most[i]).filter(|at_most| *at_most < SHOWN);
                goals.push(Goal { id: row.id, mode, what: row.what, value, at_most });
            }
        }
    }
    goals
}

/// A mode's figures in a report.
struct View<'r> {
    report: &'r Report,
    mode: &'r str,
    subject: String,
}

impl View<'_> {
    /// Which of kube-proxy's layouts the mode is compared with.
    fn reference(&self) -> &'static str {
        match self.mode {
            "iptables" | "iptables-legacy" | "iptables-nft" => "kube-proxy iptables layout",
            "ipvs" => "kube-proxy ipvs layout",
            _ => "kube-proxy nftables layout",
        }
    }

    fn p50(&self, subject: &str, services: usize, target: Target) -> Option<f64> {
        // Of one Service there may be two: the last one was measured beside the largest cluster.
        let mut cells = self.report.latency.iter().rev();
        cells
            .find(|cell| cell.subject == subject && cell.services == services && cell.target == target)
            .map(|cell| cell.p50_us)
    }

    fn growth(&self, target: Target) -> Option<f64> {
        let largest = self.report.latency.iter().map(|cell| cell.services).max()?;
        let at = |services| self.p50(&self.subject, services, target);
        if largest < 10_000 { None } else { Some(at(largest)? / at(1)?) }
    }

    fn above(&self, services: usize, target: Target) -> Option<f64> {
        Some(self.p50(&self.subject, services, target)? - self.p50("direct", services, target)?)
    }

    fn share(&self, target: Target) -> Option<f64> {
        let direct = self.p50("direct", 10_000, target)?;
        Some(self.above(10_000, target)? / (self.p50(self.reference(), 10_000, target)? - direct))
    }

    /// What no rules of whatever mode of netfilter's can go below: their share of kube-proxy's layout.
    fn floor(&self, target: Target) -> Option<f64> {
        let direct = self.p50("direct", 10_000, target)?;
        let above = |subject| Some(self.p50(subject, 10_000, target)? - direct);
        Some(above(FLOOR)? / above(self.reference())?)
    }

    fn to_direct(&self, services: usize) -> Option<f64> {
        let at = |subject| self.p50(subject, services, Target::Random);
        Some(at(&self.subject)? / at("direct")?)
    }

    fn bulk(&self, subject: &str) -> Option<&crate::throughput::Row> {
        self.report.throughput.iter().find(|row| row.subject == subject)
    }

    fn cpu(&self, to: &str) -> Option<f64> {
        Some(self.bulk(&self.subject)?.udp_cpu_ns / self.bulk(to)?.udp_cpu_ns)
    }

    fn node_port_cpu(&self, to: &str) -> Option<f64> {
        Some(self.bulk(&self.subject)?.node_port_cpu_ns / self.bulk(to)?.node_port_cpu_ns)
    }

    fn churn(&self, services: usize) -> Option<&Churn> {
        self.report.control.churn.iter().find(|c| c.subject == self.subject && c.services == services)
    }

    fn cold(&self, services: usize, endpoints: usize) -> Option<&Cold> {
        let shape = (services, endpoints);
        let mut cold = self.report.control.cold.iter();
        cold.find(|c| c.subject == self.subject && (c.services, c.endpoints) == shape)
    }

    fn restart(&self, services: usize) -> Option<&Restart> {
        self.report.control.restart.iter().find(|r| r.subject == self.subject && r.services == services)
    }

    fn growth_of(&self, what: fn(&crate::growth::Growth) -> f64) -> Option<f64> {
        let at = |services| {
            let mut all = self.report.growth.iter();
            all.find(|growth| growth.subject == self.subject && growth.services == services).map(what)
        };
        Some(at(30_000)? / at(1_000)?)
    }
}

/// A percentile at the highest rate of changes.
fn fastest(churn: &Churn, percentile: usize) -> Option<f64> {
    churn.rates.last()?.ms.get(percentile).copied()
}
