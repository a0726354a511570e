//! What is written: everything as JSON, tables as Markdown, curves as SVG.

mod goals;
mod markdown;
mod plot;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::growth::Growth;
use crate::{latency, throughput};

pub(crate) use goals::Goal;
pub(crate) use table::{beside, put as put_goals};

/// All results of a run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Where and when.
    pub machine: Machine,
    /// First packets.
    pub latency: Vec<latency::Cell>,
    /// Packets in bulk.
    pub throughput: Vec<throughput::Row>,
    /// Control plane.
    pub control: Control,
    /// What a change costs in user space.
    pub growth: Vec<Growth>,
    /// What could not be measured, and why.
    pub failures: Vec<String>,
    /// Figures that have goals.
    #[serde(skip_deserializing)]
    pub goals: Vec<Goal>,
}

/// Where and when.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    /// Name of the machine.
    pub name: String,
    /// Day, UTC.
    pub date: String,
    /// Kernel release.
    pub kernel: String,
    /// Processor.
    pub processor: String,
    /// Cores.
    pub cores: usize,
    /// Load average of the last minute, at the start: how quiet the machine was.
    pub load_average: String,
    /// `shunt --version`.
    pub shunt: String,
    /// `nft --version`.
    pub nft: String,
    /// `iptables-legacy --version`.
    pub iptables: String,
}

impl Report {
    /// An empty report on this machine.
    pub(crate) fn new(name: Option<String>, shunt: &Path) -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).with_context(|| path.to_owned());
        let cores = std::thread::available_parallelism()?.get();
        let processor = read("/proc/cpuinfo")?;
        let processor = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let machine = Machine {
            name: name.unwrap_or_else(|| format!("{cores}-cores")),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: processor.map_or_else(String::new, |(_, name)| name.to_owned()),
            cores,
            load_average: read("/proc/loadavg")?.split(' ').next().unwrap_or_default().to_owned(),
            shunt: version(shunt),
            nft: version("nft".as_ref()),
            iptables: version("iptables-legacy".as_ref()),
        };
        Ok(Self {
            machine,
            latency: Vec::new(),
            throughput: Vec::new(),
            control: Control::default(),
            growth: Vec::new(),
            failures: Vec::new(),
            goals: Vec::new(),
        })
    }

    /// Writes `DATE-MACHINE.json`, `.md` and `-*.svg` into a folder, and the Markdown to standard output; the
    /// path of the JSON. What could not be measured does not keep the rest from being written.
    pub(crate) fn write(mut self, folder: &Path) -> Result<PathBuf> {
        self.goals = goals::all(&self);
        std::fs::create_dir_all(folder)?;
        let stem = format!("{}-{}", self.machine.date, self.machine.name);
        let put = |name: String, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| path.display().to_string())
        };
        for failure in &self.failures {
            eprintln!("NOT MEASURED: {failure}");
        }
        // What programs have logged is for whoever is here; files keep the first line.
        for failure in &mut self.failures {
            failure.truncate(failure.find('\n').unwrap_or(failure.len()));
        }
        put(format!("{stem}.json"), &format!("{}\n", serde_json::to_string_pretty(&self)?))?;
        let plots = plot::all(&self)?;
        let mut names = Vec::new();
        for plot in &plots {
            let name = format!("{stem}-{}.svg", plot.name);
            put(name.clone(), &plot.svg)?;
            names.push((plot.title, name));
        }
        let text = markdown::text(&self, &names);
        put(format!("{stem}.md"), &text)?;
        println!("{text}");
        eprintln!("written: {}/{stem}.*", folder.display());
        Ok(folder.join(format!("{stem}.json")))
    }
}

/// What a program says of its version.
fn version(program: &Path) -> String {
    let output = Command::new(program).arg("--version").output();
    output.map_or_else(
        |error| format!("{}: {error}", program.display()),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}
