//! Memory of a process and of the tools it starts, looked at every few milliseconds.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

const EVERY: Duration = Duration::from_millis(2);

/// Resident memory, MiB.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[allow(clippy::struct_field_names)] // Units belong to names.
pub(crate) struct Memory {
    /// Most of the process itself (`VmHWM`).
    pub peak_mib: f64,
    /// Now (`VmRSS`).
    pub steady_mib: f64,
    /// Most of all its child processes at the same time.
    pub children_peak_mib: f64,
}

/// Looks on while a process works.
pub(super) struct Watch {
    id: u32,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl Watch {
    /// Begins to look at a process.
    pub(super) fn start(id: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("memory".to_owned()).spawn(move || {
            let mut most = 0.0_f64;
            while !stopped.load(Ordering::Relaxed) {
                let itself = program(id);
                // The highest mark of each child that is there now.
                let marks: BTreeMap<u32, f64> = children(id)
                    .into_iter()
                    // Before a child becomes its tool it shares its parent's memory.
                    .filter(|child| program(*child) != itself)
                    .filter_map(|child| Some((child, status_mib(child, "VmHWM").ok()?)))
                    .collect();
                most = most.max(marks.values().sum());
                std::thread::sleep(EVERY);
            }
            most
        })?;
        Ok(Self { id, stop, thread })
    }

    /// What was seen.
    pub(super) fn finish(self) -> Result<Memory> {
        self.stop.store(true, Ordering::Relaxed);
        let children_peak_mib = self.thread.join().map_err(|_| anyhow!("the memory watch panicked"))?;
        Ok(Memory {
            peak_mib: status_mib(self.id, "VmHWM")?,
            steady_mib: status_mib(self.id, "VmRSS")?,
            children_peak_mib,
        })
    }
}

/// The program that a process runs.
fn program(id: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{id}/exe")).ok()
}

/// Children, and theirs.
fn children(id: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    for task in tasks {
        let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in text.split_whitespace().filter_map(|id| id.parse().ok()) {
            found.push(child);
            found.extend(children(child));
        }
    }
    found
}

fn status_mib(id: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find(|line| line.starts_with(field)).with_context(|| field.to_owned())?;
    let kib: f64 = line.split_whitespace().nth(1).context("no number")?.parse()?;
    Ok(kib / 1024.0)
}
