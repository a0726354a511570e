//! Tables for people.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::Report;
use super::table::number;
use crate::latency::{Cell, Target};

/// The whole report; `plots` are titles and file names.
pub(super) fn text(report: &Report, plots: &[(&str, String)]) -> String {
    let machine = &report.machine;
    let mut out = format!(
        "# {} on {}\n\nLinux {}, {} x {}, load average at the start {}. {}; references by {} and {}.\n\n",
        machine.date,
        machine.name,
        machine.kernel,
        machine.cores,
        machine.processor,
        machine.load_average,
        machine.shunt,
        machine.nft,
        machine.iptables,
    );
    goals(report, &mut out);
    for (title, file) in plots {
        _ = writeln!(out, "![{title}]({file})\n");
    }
    for (target, title) in [
        (Target::Random, "First packet to any cluster IP"),
        (Target::NodePort, "First packet to any node port, from outside"),
        (Target::Fixed, "First packet to one cluster IP"),
        (Target::Miss, "First packet to a pod's own address, past all Services"),
    ] {
        latency(report, target, title, &mut out);
    }
    throughput(report, &mut out);
    control(report, &mut out);
    out
}

fn table(out: &mut String, title: &str, head: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    _ = writeln!(out, "## {title}\n\n| {} |\n|{}", head.join(" | "), "---|".repeat(head.len()));
    for row in rows {
        _ = writeln!(out, "| {} |", row.join(" | "));
    }
    out.push('\n');
}

fn goals(report: &Report, out: &mut String) {
    let rows: Vec<Vec<String>> = report
        .goals
        .iter()
        .map(|goal| {
            let (at_most, met) = match goal.at_most {
                Some(at_most) => {
                    (format!("≤ {}", number(at_most)), if goal.met() { "met" } else { "**not met**" })
                }
                None => (String::new(), ""),
            };
            vec![
                goal.id.to_owned(),
                goal.mode.to_owned(),
                goal.what.to_owned(),
                number(goal.value),
                at_most,
                met.to_owned(),
            ]
        })
        .collect();
    table(out, "Goals", &["", "mode", "figure", "measured", "goal", ""], &rows);
}

fn latency(report: &Report, target: Target, title: &str, out: &mut String) {
    let cells: Vec<&Cell> = report.latency.iter().filter(|cell| cell.target == target).collect();
    let sizes: BTreeSet<usize> = cells.iter().map(|cell| cell.services).collect();
    // In the order in which they were measured.
    let mut subjects: Vec<&str> = Vec::new();
    let mut by: BTreeMap<(&str, usize), &Cell> = BTreeMap::new();
    for cell in &cells {
        if !subjects.contains(&cell.subject.as_str()) {
            subjects.push(&cell.subject);
        }
        by.insert((&cell.subject, cell.services), cell);
    }
    let text = |cell: &&Cell| {
        let [_, p99, p999] = cell.response_us;
        let failed = if cell.failed > 0 { format!(", {} failed", cell.failed) } else { String::new() };
        let fewer = if cell.endpoints == 10 { String::new() } else { format!(" (x {})", cell.endpoints) };
        format!("**{:.2}** / {p99:.0} / {p999:.0}{failed}{fewer}", cell.p50_us)
    };
    let rows: Vec<Vec<String>> = subjects
        .iter()
        .map(|subject| {
            let cell = |services: &usize| by.get(&(subject, *services)).map_or_else(|| "–".to_owned(), text);
            std::iter::once((*subject).to_owned()).chain(sizes.iter().map(cell)).collect()
        })
        .collect();
    let mut head = vec!["p50 / p99 / p99.9, µs".to_owned()];
    head.extend(sizes.iter().map(|size| format!("{size} Services")));
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    table(out, title, &head, &rows);
}

fn throughput(report: &Report, out: &mut String) {
    let head = [
        "",
        "CPU of a UDP packet, ns",
        "past Services, ns",
        "to a node port, ns",
        "UDP packets/s",
        "1 TCP stream, Gbit/s",
        "8 TCP streams, Gbit/s",
        "short connections/s",
        "CPU of each, µs",
        "failed",
        "spread, σ",
    ];
    let rows: Vec<Vec<String>> = report
        .throughput
        .iter()
        .map(|row| {
            vec![
                row.subject.clone(),
                format!("{:.0}", row.udp_cpu_ns),
                format!("{:.0}", row.past_cpu_ns),
                format!("{:.0}", row.node_port_cpu_ns),
                format!("{:.0}", row.udp_per_second),
                format!("{:.1}", row.stream_gbps),
                format!("{:.1}", row.streams_gbps),
                format!("{:.0}", row.exchanges_per_second),
                format!("{:.1}", row.exchange_cpu_us),
                row.failed.to_string(),
                row.spread().map_or_else(|| "–".to_owned(), |sigma| format!("{sigma:.1}")),
            ]
        })
        .collect();
    table(out, "Packets in bulk", &head, &rows);
}

fn control(report: &Report, out: &mut String) {
    let cold: Vec<Vec<String>> = report
        .control
        .cold
        .iter()
        .map(|cold| {
            let sync = |value: &dyn Fn(&crate::agent::FirstSync) -> String| {
                cold.first_sync.as_ref().map_or_else(|| "–".to_owned(), value)
            };
            vec![
                cold.subject.clone(),
                format!("{} x {}", cold.services, cold.endpoints),
                format!("{:.0}", cold.whole_ms),
                sync(&|sync| format!("{:.0}", sync.write_ms)),
                sync(&|sync| format!("{} in {}", sync.operations, sync.transactions)),
                format!("{:.0}", cold.cpu_ms),
                format!("{:.1} / {:.1}", cold.memory.peak_mib, cold.memory.steady_mib),
                format!("{:.1}", cold.memory.children_peak_mib),
                format!("{:.1} / {:.1}", cold.lock_wait.nf_tables_ms, cold.lock_wait.xtables_ms),
                format!("{} / {}", cold.chains_and_sets[0], cold.chains_and_sets[1]),
            ]
        })
        .collect();
    let head = [
        "",
        "Services x endpoints",
        "start to last rule, ms",
        "writing, ms",
        "operations in transactions",
        "CPU, ms",
        "RSS peak / steady, MiB",
        "tools' peak RSS, MiB",
        "longest wait for nf_tables' / xtables' lock, ms",
        "nf_tables chains / sets",
    ];
    table(out, "Cold start", &head, &cold);

    let mut churn = Vec::new();
    for measured in &report.control.churn {
        for rate in &measured.rates {
            let [p50, p90, p99, max] = rate.ms;
            churn.push(vec![
                measured.subject.clone(),
                measured.services.to_string(),
                rate.per_second.to_string(),
                rate.changes.to_string(),
                format!("{p50:.2} / {p90:.2} / {p99:.2} / {max:.2}"),
                format!("{:.2}", rate.cpu_s_per_1000),
                format!("{:.0}", measured.burst_ms),
                format!("{:.2}", measured.idle_ms_per_s),
            ]);
        }
    }
    let head = [
        "",
        "Services",
        "changes/s",
        "changes",
        "event to kernel p50 / p90 / p99 / max, ms",
        "CPU of 1,000 changes, s",
        "1,000 at once, ms",
        "idle CPU, ms/s",
    ];
    table(out, "Changes", &head, &churn);

    let restart: Vec<Vec<String>> = report
        .control
        .restart
        .iter()
        .map(|restart| {
            vec![
                restart.subject.clone(),
                format!("{} x {}", restart.services, restart.endpoints),
                format!("{:.0}", restart.whole_ms),
                format!("{:.0}", restart.cpu_ms),
                format!("{:.0}", restart.first_sync.read_ms),
                format!("{:.0}", restart.first_sync.plan_ms),
                restart.first_sync.operations.to_string(),
            ]
        })
        .collect();
    let head = [
        "",
        "Services x endpoints",
        "whole, ms",
        "CPU, ms",
        "reading the kernel, ms",
        "planning, ms",
        "operations",
    ];
    table(out, "Restart over what is there", &head, &restart);
    let growth: Vec<Vec<String>> = report
        .growth
        .iter()
        .map(|growth| {
            vec![
                growth.subject.clone(),
                growth.services.to_string(),
                format!("{:.0}", growth.instructions),
                format!("{:.1}", growth.allocations),
            ]
        })
        .collect();
    let head = ["", "Services", "instructions", "allocations"];
    table(out, "One changed endpoint in user space, from the event to the plan", &head, &growth);
    if !report.failures.is_empty() {
        _ = writeln!(out, "## Not measured\n");
        for failure in &report.failures {
            _ = writeln!(out, "* {failure}");
        }
    }
}
