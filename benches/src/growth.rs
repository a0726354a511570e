//! What a change costs in user space, counted and not timed: instructions and allocations of one changed
//! endpoint among few and among many Services, under valgrind.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use shunt_bench::change::Programmed;
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::kernel::Netlink;

/// Changes that are counted.
const CHANGES: usize = 200;
/// Endpoints of each Service.
const ENDPOINTS: usize = 10;

/// One mode among so many Services.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Growth {
    /// Which mode.
    pub subject: String,
    /// Number of Services.
    pub services: usize,
    /// Instructions of one change, from the event to the plan.
    pub instructions: f64,
    /// Allocations of one change.
    pub allocations: f64,
}

/// Changes a cluster in memory so many times; what valgrind looks at.
pub(crate) fn work(mode: &str, services: usize, changes: usize) -> Result<()> {
    ensure!(mode == "nftables", "mode {mode} is not measured without a kernel");
    let mut programmed = Programmed::<Nftables<Netlink>>::new(services, ENDPOINTS);
    let operations: usize = (0..changes).map(|number| programmed.one_change(number)).sum();
    println!("{operations} operations");
    Ok(())
}

/// Counts for all sizes; nothing without valgrind.
pub(crate) fn measure(mode: &str, sizes: &[usize]) -> Result<Vec<Growth>> {
    let mut found = Vec::new();
    for &services in sizes {
        crate::in_time()?;
        crate::say(format_args!("instructions and allocations of a change, {mode}, {services} Services"));
        let collect = ["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=*one_change*"];
        let text = valgrind(&collect, mode, services, CHANGES)?;
        let instructions = number_after(&text, "Collected : ")?;
        // Allocations can only be counted from start to end.
        let allocations = |changes| -> Result<f64> {
            let text = valgrind(&["--tool=memcheck", "--undef-value-errors=no"], mode, services, changes)?;
            number_after(&text, "total heap usage: ")
        };
        found.push(Growth {
            subject: format!("shunt {mode}"),
            services,
            instructions: instructions / CHANGES as f64,
            allocations: (allocations(CHANGES)? - allocations(0)?) / CHANGES as f64,
        });
    }
    Ok(found)
}

fn valgrind(arguments: &[&str], mode: &str, services: usize, changes: usize) -> Result<String> {
    let output = Command::new("valgrind")
        .args(arguments)
        .arg(std::env::current_exe()?)
        .args(["change", mode, &services.to_string(), &changes.to_string()])
        .output()
        .context("valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "valgrind: {text}");
    Ok(text)
}

/// The number after a text, with or without commas.
fn number_after(text: &str, label: &str) -> Result<f64> {
    let (_, rest) = text.split_once(label).with_context(|| format!("no {label:?} in {text}"))?;
    let digits: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == ',').collect();
    digits.replace(',', "").parse().with_context(|| format!("{label}{digits}"))
}
