//! `shunt-bench run` at its smallest: that everything is measured and written, never how fast.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use shunt_harness::guest::require_guest;
use shunt_harness::lab::require_kernel;

const MODES: [&str; 3] = ["nftables", "iptables-legacy", "ebpf"];

/// The agent, built as this test was.
fn shunt() -> PathBuf {
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--quiet", "-p", "shunt"]);
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "cannot build shunt");
    Path::new(env!("CARGO_BIN_EXE_shunt-bench")).with_file_name("shunt")
}

/// Runs the tool at its smallest; the JSON and the Markdown that it wrote.
fn run(folder: &Path, arguments: &[&str]) -> (Value, String) {
    let shunt = shunt();
    // Shunt takes kube-proxy's command line, so it can stand for the peer.
    let peer = folder.join("kube-proxy");
    std::os::unix::fs::symlink(&shunt, &peer).unwrap();
    let goals = folder.join("goals.md");
    fs::write(&goals, "before\n<!-- goals: written by shunt-bench -->\n<!-- goals: end -->\nafter\n")
        .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_shunt-bench"));
    command.arg("run").arg(&shunt).args(["--quick", "--machine", "test"]);
    command.arg("--peer").arg(&peer).arg("--output").arg(folder).arg("--goals").arg(&goals).args(arguments);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let goals = fs::read_to_string(&goals).unwrap();
    assert!(goals.starts_with("before\n") && goals.ends_with("after\n"), "{goals}");
    for id in [
        "A1", "A2", "A3", "A4", "A5", "B", "C1", "C2", "C5", "C6", "C7", "D1", "D4", "D6", "E1", "E3", "E4",
        "F",
    ] {
        assert!(goals.contains(&format!("\n| {id} | ")), "no goal {id} in {goals}");
    }
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let with = |extension: &str| {
        let mut found = files.iter().filter(|file| file.extension().is_some_and(|e| e == extension));
        let found: Vec<String> = found.by_ref().map(|file| fs::read_to_string(file).unwrap()).collect();
        found
    };
    let json = with("json");
    assert_eq!(json.len(), 1, "{files:?}");
    let markdown = with("md").into_iter().find(|text| text.starts_with("# ")).unwrap();
    for svg in with("svg") {
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        assert!(markdown.contains(".svg)"), "{markdown}");
    }
    (serde_json::from_str(&json[0]).unwrap(), markdown)
}

/// Everything that belongs to a subject, in a list of the report.
fn of<'v>(list: &'v Value, subject: &str) -> Vec<&'v Value> {
    list.as_array().unwrap().iter().filter(|item| item["subject"] == subject).collect()
}

fn connections_were_measured(report: &Value, subject: &str) {
    let cells = of(&report["latency"], subject);
    for target in ["random", "node_port"] {
        let cell = cells.iter().find(|cell| cell["target"] == target);
        let cell = cell.unwrap_or_else(|| panic!("{subject}: no {target}"));
        assert!(cell["connections"].as_u64() > Some(0) && cell["p50_us"].as_f64() > Some(0.0), "{cell}");
        assert_eq!(cell["failed"], 0, "{cell}");
    }
}

fn packets_were_measured(report: &Value, subject: &str) {
    connections_were_measured(report, subject);
    let rows = of(&report["throughput"], subject);
    assert_eq!(rows.len(), 1, "{subject}");
    for (figure, value) in rows[0].as_object().unwrap() {
        let measured = match figure.as_str() {
            "subject" => value == subject,
            "failed" => value == 0,
            "by_pod" => subject == "direct" || value.as_object().is_some_and(|pods| pods.len() == 10),
            // So short a stream may not get anywhere on a busy machine.
            "stream_gbps" | "streams_gbps" => value.as_f64() >= Some(0.0),
            _ => value.as_f64() > Some(0.0),
        };
        assert!(measured, "{subject}: {figure} is {value}");
    }
}

fn control_was_measured(report: &Value, subject: &str) {
    let control = &report["control"];
    for part in ["cold", "churn"] {
        assert_eq!(of(&control[part], subject).len(), 1, "{subject}: {part}");
    }
    for rate in of(&control["churn"], subject)[0]["rates"].as_array().unwrap() {
        assert!(rate["changes"].as_u64() >= Some(5), "{rate}");
    }
}

fn shunt_was_measured(report: &Value, subject: &str) {
    packets_were_measured(report, subject);
    control_was_measured(report, subject);
    let control = &report["control"];
    assert_eq!(of(&control["restart"], subject)[0]["first_sync"]["operations"], 0, "{subject}");
    assert!(of(&control["cold"], subject)[0]["first_sync"]["operations"].as_u64() > Some(0), "{subject}");
    assert_eq!(of(&control["churn"], subject)[0]["full_reads"], 0, "{subject}");
}

#[test]
fn everything_is_measured_and_written() {
    if !require_kernel() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let modes = MODES.join(",");
    let arguments = ["--modes", &modes, "--parts", "latency,throughput,control", "--services", "20"];
    let sizes = ["--shapes", "20x3", "--churn", "20", "--repetitions", "1", "--connections", "200"];
    let (report, markdown) = run(folder.path(), &[&arguments[..], &sizes[..]].concat());
    assert_eq!(report["failures"].as_array().unwrap().len(), 0, "{}", report["failures"]);
    for subject in
        ["direct", "kube-proxy iptables layout", "kube-proxy nftables layout", "kube-proxy nftables"]
    {
        packets_were_measured(&report, subject);
    }
    control_was_measured(&report, "kube-proxy nftables");
    for mode in MODES {
        shunt_was_measured(&report, &format!("shunt {mode}"));
        assert!(markdown.contains(&format!("| shunt {mode} |")), "{markdown}");
    }
}

#[test]
fn ipvs_is_measured_in_a_guest() {
    if require_guest().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--modes", "ipvs", "--parts", "latency,throughput,control", "--services", "5"];
    let sizes = ["--shapes", "5x3", "--churn", "5", "--repetitions", "1", "--connections", "50"];
    let (report, _) = run(folder.path(), &[&arguments[..], &sizes[..]].concat());
    assert_eq!(report["failures"].as_array().unwrap().len(), 0, "{}", report["failures"]);
    for subject in ["direct", "kube-proxy ipvs layout", "kube-proxy ipvs"] {
        packets_were_measured(&report, subject);
    }
    control_was_measured(&report, "kube-proxy ipvs");
    shunt_was_measured(&report, "shunt ipvs");
}
