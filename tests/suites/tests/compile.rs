//! What the objects of each case compile to, as text beside the case.
//!
//! `SHUNT_BLESS=1` writes the texts anew.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use shunt_core::compile::Compiler;
use shunt_core::health::ports_without_local_endpoints;
use shunt_core::id::IpFamily;
use shunt_harness::cases;
use shunt_mode::Mode;
use shunt_suites::driver::CaseRun;
use shunt_suites::golden::Goldens;

#[test]
fn every_step_of_every_case_compiles_to_its_table() {
    let mut goldens = Goldens::default();
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, Mode::Nftables);
        while let Some(step) = run.next_step() {
            let full = Compiler::full(run.cluster.compiler.context().clone(), &run.cluster.store);
            for family in IpFamily::ALL {
                assert_eq!(run.cluster.table(family), full.table(family), "{}", step.folder.display());
            }
            let text = IpFamily::ALL.map(|family| run.cluster.table(family).to_string()).concat();
            goldens.compare(&step.folder.join("table.golden"), &text);
        }
    }
    goldens.finish();
}

#[test]
fn the_inputs_are_sound() {
    // A blank before a CIDR and a port that the API server would refuse are part of the cases.
    for case in cases::all().unwrap() {
        for step in &case.steps {
            for problem in &step.problems {
                println!("{}: {problem}", case.name);
            }
            for packet in &step.packets {
                assert_eq!(
                    IpFamily::of(packet.packet.source),
                    IpFamily::of(packet.packet.destination),
                    "{}: {}",
                    case.name,
                    packet.name
                );
            }
        }
    }
}

#[test]
fn ports_without_local_endpoints_are_those_that_kube_proxy_counts() {
    let mut compared = 0;
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, Mode::Nftables);
        while let Some(step) = run.next_step() {
            let Ok(text) = std::fs::read_to_string(step.folder.join("metrics.json")) else { continue };
            let metrics: serde_json::Value = serde_json::from_str(&text).unwrap();
            let table = run.cluster.table(IpFamily::V4);
            let counts = table.services().map(|s| ports_without_local_endpoints(s));
            let [internal, external] = counts.fold([0, 0], |a, b| [a[0] + b[0], a[1] + b[1]]);
            for sample in metrics["kubeproxy_sync_proxy_rules_no_local_endpoints_total"].as_array().unwrap() {
                let count = match sample["labels"]["traffic_policy"].as_str().unwrap() {
                    "internal" => internal,
                    _ => external,
                };
                assert_eq!(sample["value"], count, "{}: {sample}", case.name);
                compared += 1;
            }
        }
    }
    assert!(compared >= 14, "{compared}");
}
