//! Figures that have goals, and whether they are met.

use serde::Serialize;

use super::Report;
use crate::control::{Churn, Cold};
use crate::latency::{Cell, Target};

/// One figure of one mode.
#[derive(Debug, Serialize)]
pub(crate) struct Goal {
    /// Its number in the table of goals.
    pub id: &'static str,
    /// The mode.
    pub subject: String,
    /// What it says.
    pub what: String,
    /// The figure.
    pub value: f64,
    /// At most this much.
    pub at_most: f64,
}

impl Goal {
    /// Whether it is met.
    pub(crate) fn met(&self) -> bool {
        self.value <= self.at_most
    }
}

/// Goals of a mode: iptables, nftables, ipvs, ebpf have different ones.
struct Limits {
    a1: f64,
    a2: f64,
    a3: f64,
    a5: f64,
    b: f64,
    b_direct: f64,
    c1: [f64; 2],
    c5: f64,
    d1: [f64; 2],
    d4: f64,
}

fn limits(mode: &str) -> Option<Limits> {
    Some(match mode {
        "nftables" => Limits {
            a1: 1.05,
            a2: 1.25,
            a3: 0.65,
            a5: 0.8,
            b: 0.9,
            b_direct: 1.2,
            c1: [2.0, 10.0],
            c5: 100.0,
            d1: [150.0, 800.0],
            d4: 500.0,
        },
        "iptables" | "iptables-legacy" => Limits {
            a1: 1.1,
            a2: 1.3,
            a3: 0.11,
            a5: 0.02,
            b: 1.0,
            b_direct: f64::INFINITY,
            c1: [400.0, f64::INFINITY],
            c5: 1_000.0,
            d1: [f64::INFINITY, 1_500.0],
            d4: 4_000.0,
        },
        // The tool itself takes most of the time of a load.
        "iptables-nft" => {
            Limits { d1: [f64::INFINITY, 15_000.0], d4: f64::INFINITY, ..limits("iptables-legacy")? }
        }
        "ebpf" => Limits {
            a1: 1.05,
            a2: 1.15,
            a3: 0.1,
            a5: 0.0,
            b: f64::INFINITY,
            b_direct: 1.01,
            c1: [1.0, 5.0],
            c5: 100.0,
            d1: [20.0, 700.0],
            d4: 50.0,
        },
        "ipvs" => Limits {
            a1: 1.05,
            a2: 1.25,
            a3: 0.7,
            a5: 1.0,
            b: f64::INFINITY,
            b_direct: f64::INFINITY,
            c1: [2.0, 10.0],
            c5: 200.0,
            d1: [f64::INFINITY, 1_000.0],
            d4: 3_000.0,
        },
        _ => return None,
    })
}

/// Which of kube-proxy's layouts a mode is compared with.
const fn reference(mode: &str) -> &'static str {
    // `str` cannot be compared in a const; the first letters tell the two apart.
    match mode.as_bytes() {
        [b'i', b'p', ..] => "kube-proxy iptables layout",
        _ => "kube-proxy nftables layout",
    }
}

/// All figures of all modes that were measured.
pub(super) fn all(report: &Report) -> Vec<Goal> {
    let mut goals = Vec::new();
    for mode in ["iptables", "iptables-legacy", "iptables-nft", "nftables", "ipvs", "ebpf"] {
        let subject = format!("shunt {mode}");
        let Some(limits) = limits(mode) else { continue };
        let mut push = |id, what: String, value: Option<f64>, at_most: f64| {
            if let Some(value) = value.filter(|_| at_most.is_finite()) {
                goals.push(Goal { id, subject: subject.clone(), what, value, at_most });
            }
        };
        latency(report, mode, &subject, &limits, &mut push);
        throughput(report, mode, &subject, &limits, &mut push);
        control(report, &subject, &limits, &mut push);
        let growth: Vec<_> = report.growth.iter().filter(|growth| growth.subject == subject).collect();
        if let [few, .., many] = growth.as_slice() {
            let what = format!("of a change, {} / {} Services", many.services, few.services);
            let instructions = many.instructions / few.instructions;
            push("C7", format!("instructions {what}"), Some(instructions), 1.3);
            push("C7", format!("allocations {what}"), Some(many.allocations / few.allocations), 1.3);
        }
    }
    goals
}

type Push<'p> = &'p mut dyn FnMut(&'static str, String, Option<f64>, f64);

fn latency(report: &Report, mode: &str, subject: &str, limits: &Limits, push: Push<'_>) {
    let p50 = |subject: &str, services: usize, target: Target| {
        let same =
            |cell: &&Cell| cell.subject == subject && cell.services == services && cell.target == target;
        // Of one Service there may be two: the last one was measured beside the largest cluster.
        report.latency.iter().rfind(same).map(|cell| cell.p50_us)
    };
    let largest = report.latency.iter().map(|cell| cell.services).max().unwrap_or_default();
    let growth = |target| Some(p50(subject, largest, target)? / p50(subject, 1, target)?);
    push("A1", format!("first packet p50, {largest} / 1 Services, fixed"), growth(Target::Fixed), limits.a1);
    push(
        "A2",
        format!("first packet p50, {largest} / 1 Services, random"),
        growth(Target::Random),
        limits.a2,
    );
    let at =
        report.latency.iter().map(|cell| cell.services).filter(|s| *s <= 10_000).max().unwrap_or_default();
    let above = |subject: &str, target| Some(p50(subject, at, target)? - p50("direct", at, target)?);
    let share = |target| Some(above(subject, target)? / above(reference(mode), target)?);
    let what = |what: &str| format!("{what} - direct at {at}, / {}", reference(mode));
    push("A3", what("first packet"), share(Target::Random), limits.a3);
    push("A5", what("non-Service connection"), share(Target::Miss), limits.a5);
    let least = report.latency.iter().map(|cell| cell.services).min().unwrap_or_default();
    let miss =
        |services| Some(p50(subject, services, Target::Miss)? - p50("direct", services, Target::Miss)?);
    let more = miss(at).zip(miss(least)).map(|(many, few)| many - few);
    push("A5", format!("non-Service connection - direct at {at}, - the same at {least}, us,"), more, 1.0);
}

fn throughput(report: &Report, mode: &str, subject: &str, limits: &Limits, push: Push<'_>) {
    let of =
        |subject: &str| report.throughput.iter().find(|row| row.subject == subject).map(|row| row.udp_cpu_ns);
    let ratio = |to: &str| Some(of(subject)? / of(to)?);
    push("B", format!("CPU of a packet / {}", reference(mode)), ratio(reference(mode)), limits.b);
    push("B", "CPU of a packet / direct".to_owned(), ratio("direct"), limits.b_direct);
}

fn control(report: &Report, subject: &str, limits: &Limits, push: Push<'_>) {
    let churn: Vec<&Churn> = report.control.churn.iter().filter(|c| c.subject == subject).collect();
    let fastest = |churn: &Churn| churn.rates.last().map(|rate| rate.ms);
    for measured in churn.iter().filter(|c| c.services == 10_000) {
        let ms = fastest(measured);
        push("C1", "change to kernel p50 at 10,000 x 10, ms".to_owned(), ms.map(|ms| ms[0]), limits.c1[0]);
        push("C1", "change to kernel p99 at 10,000 x 10, ms".to_owned(), ms.map(|ms| ms[2]), limits.c1[1]);
        push("C5", "1,000 Services change at once, ms".to_owned(), Some(measured.burst_ms), limits.c5);
        push("E4", "idle CPU, ms/s".to_owned(), Some(measured.idle_ms_per_s), 1.0);
    }
    if let [first, .., last] = churn.as_slice() {
        let growth = fastest(last).zip(fastest(first)).map(|(last, first)| last[0] / first[0]);
        push(
            "C2",
            format!("change to kernel p50, {} / {} Services", last.services, first.services),
            growth,
            1.5,
        );
    }
    for cold in report.control.cold.iter().filter(|c| c.subject == subject) {
        let kernel = cold.first_sync.map(|sync| sync.write_ms);
        let Cold { services, endpoints, .. } = cold;
        let what = |what: &str| format!("{what} at {services} x {endpoints}");
        match (services, endpoints) {
            (10_000, 10) => {
                push("D1", what("cold start, kernel part, ms,"), kernel, limits.d1[0]);
                push("D1", what("cold start, whole process, ms,"), Some(cold.whole_ms), limits.d1[1]);
                push("E1", what("peak RSS, MiB,"), Some(cold.memory.peak_mib), 64.0);
            }
            (30_000, 10) => push("D4", what("cold start, kernel part, ms,"), kernel, limits.d4),
            (100, 10) => push("E1", what("peak RSS, MiB,"), Some(cold.memory.peak_mib), 15.0),
            _ => {}
        }
        if (*services, *endpoints, subject) == (10_000, 10, "shunt nftables") {
            let [chains, sets] = cold.chains_and_sets;
            push("E3", what("chains"), Some(chains as f64), 50.0);
            push("E3", what("sets"), Some(sets as f64), 12.0);
        }
    }
    for restart in report.control.restart.iter().filter(|r| r.subject == subject && r.services == 10_000) {
        push("D6", "restart over 10,000 x 10, ms".to_owned(), Some(restart.whole_ms), 500.0);
        let writes = restart.first_sync.operations as f64;
        push("D6", "restart over 10,000 x 10, operations".to_owned(), Some(writes), 0.0);
    }
}
