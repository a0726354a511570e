//! `make bench`: packets, control plane and restarts, against fixed references, in network namespaces.
//!
//! ```text
//!   cluster (API objects) ──> subject: direct | layout of kube-proxy | shunt --mode ... | kube-proxy
//!                                 │ in a bed: client ── node ── pods
//!   load (a process on a core) ───┘──> latency, throughput, control ──> report: JSON, Markdown, SVG
//! ```
//!
//! It measures and compares with the goals; it fails only when something cannot be measured. The method is
//! in benches/README.md. Start reading at `subject.rs`, then `latency.rs`.

// Counts and times are far below 2^52.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

mod agent;
mod bed;
mod cluster;
mod control;
mod growth;
mod guest;
mod latency;
mod layouts;
mod load;
mod report;
mod subject;
mod throughput;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::agent::Program;
use crate::layouts::Layout;
use crate::report::Report;
use crate::subject::Subject;

#[derive(Parser)]
#[command(about = "Measures Shunt against fixed references, in network namespaces (needs root)")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures, and writes results.
    Run(Box<RunArgs>),
    /// Judges results that exist and writes the table of goals.
    Goals {
        /// Results, JSON.
        results: Vec<PathBuf>,
        /// File with the table, between marks.
        #[arg(long, default_value = "benches/README.md")]
        into: PathBuf,
    },
    /// The load tool: does what a file says (used by `run`).
    #[command(hide = true)]
    Load {
        /// The specification, JSON.
        file: PathBuf,
    },
    /// Changes a cluster in memory (used by `run`, under valgrind).
    #[command(hide = true)]
    Change {
        /// Mode.
        mode: String,
        /// Number of Services.
        services: usize,
        /// Number of changes.
        changes: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// First packets.
    Latency,
    /// Floods, streams, short connections.
    Throughput,
    /// Starts, changes, memory, restarts.
    Control,
    /// Instructions and allocations of one change (needs valgrind).
    Growth,
}

#[derive(Args)]
struct RunArgs {
    /// The release build of shunt.
    shunt: PathBuf,
    /// Modes to measure; iptables-legacy and iptables-nft name a flavour. ipvs is measured in a guest where
    /// this machine's kernel has none.
    #[arg(long, value_delimiter = ',', default_value = "nftables")]
    modes: Vec<String>,
    /// Parts to measure.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["latency", "throughput", "control", "growth"])]
    parts: Vec<Part>,
    /// Numbers of Services for first packets. Default: 1,10,100,1000,10000,30000.
    #[arg(long, value_delimiter = ',')]
    services: Option<Vec<usize>>,
    /// Cold starts: Services x endpoints. Default: 100x10,1000x10,10000x10,30000x10,45000x1,5000x50.
    #[arg(long, value_delimiter = ',', value_parser = shape)]
    shapes: Option<Vec<(usize, usize)>>,
    /// Numbers of Services among which changes are measured. Default: 1000,10000,30000.
    #[arg(long, value_delimiter = ',')]
    churn: Option<Vec<usize>>,
    /// References are written for up to so many Services.
    #[arg(long, default_value_t = 10_000)]
    reference_limit: usize,
    /// Leaves out kube-proxy's layouts.
    #[arg(long)]
    no_references: bool,
    /// Repetitions of what goals are about. Default: 7.
    #[arg(long)]
    repetitions: Option<u32>,
    /// Connections in a repetition. Default: 20,000.
    #[arg(long)]
    connections: Option<u32>,
    /// A kube-proxy binary to measure besides, in the same modes.
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// Small sizes and few repetitions: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Begins nothing new after so many minutes; what is left out is named.
    #[arg(long)]
    minutes: Option<u64>,
    /// Name of this machine in file names.
    #[arg(long)]
    machine: Option<String>,
    /// Folder for results.
    #[arg(long, default_value = "benches/results")]
    output: PathBuf,
    /// File whose table of goals is written anew from the results.
    #[arg(long)]
    goals: Option<PathBuf>,
    /// Measures ipvs mode in this kernel and prints the results as JSON.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Time since the start.
fn elapsed() -> Duration {
    static STARTED: OnceLock<Instant> = OnceLock::new();
    STARTED.get_or_init(Instant::now).elapsed()
}

/// After so long nothing new is begun.
static TIME: OnceLock<Duration> = OnceLock::new();

/// Fails when the time is up.
fn in_time() -> Result<()> {
    ensure!(TIME.get().is_none_or(|time| elapsed() < *time), "no time was left");
    Ok(())
}

/// Says what is being done, and since when.
fn say(what: std::fmt::Arguments<'_>) {
    let seconds = elapsed().as_secs();
    eprintln!("{:3}:{:02} {what}", seconds / 60, seconds % 60);
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run(*args),
        Command::Goals { results, into } => report::put_goals(&into, &results),
        Command::Load { file } => load::run(&file),
        Command::Change { mode, services, changes } => growth::work(&mode, services, changes),
    }
}

/// How thoroughly to measure where the command line does not say.
struct Defaults {
    services: &'static [usize],
    shapes: &'static [(usize, usize)],
    churn: &'static [usize],
    growth: &'static [usize],
    throughput: usize,
    /// Of what goals are about, and of the rest.
    repetitions: [u32; 2],
    cold_repetitions: u32,
    connections: u32,
    rates: &'static [u32],
    /// Of connections at most, of bulk, of changes at one rate, of rest.
    seconds: [f64; 4],
    /// Share of a flood that must arrive.
    arriving: f64,
}

const THOROUGH: Defaults = Defaults {
    services: &[1, 10, 100, 1_000, 10_000, 30_000],
    shapes: &[(100, 10), (1_000, 10), (10_000, 10), (30_000, 10), (45_000, 1), (5_000, 50)],
    churn: &[1_000, 10_000, 30_000],
    growth: &[1_000, 30_000],
    throughput: 1_000,
    repetitions: [7, 2],
    cold_repetitions: 2,
    connections: 20_000,
    rates: &[1, 10, 100],
    seconds: [2.0, 0.4, 3.0, 1.0],
    arriving: 0.999,
};

const QUICK: Defaults = Defaults {
    services: &[1, 100],
    shapes: &[(100, 10)],
    churn: &[100],
    growth: &[100, 1_000],
    throughput: 100,
    repetitions: [2, 1],
    cold_repetitions: 1,
    connections: 1_000,
    rates: &[10, 100],
    seconds: [1.0, 0.1, 0.5, 0.1],
    // Whoever else is at work may take nearly all of the time.
    arriving: 0.01,
};

/// A connection costs the guest as much as a hundred elsewhere.
const GUEST: Defaults = Defaults {
    services: &[1, 10, 1_000, 10_000],
    shapes: &[(100, 10), (1_000, 10), (10_000, 10), (30_000, 10)],
    churn: &[1_000, 10_000],
    throughput: 100,
    repetitions: [5, 2],
    cold_repetitions: 1,
    connections: 300,
    ..THOROUGH
};

const GUEST_QUICK: Defaults = Defaults { connections: 50, shapes: &[(100, 3)], ..QUICK };

fn run(mut args: RunArgs) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    if let Some(minutes) = args.minutes {
        elapsed();
        TIME.get_or_init(|| Duration::from_mins(minutes));
    }
    if args.inside {
        args.modes = vec![guest::MODE.to_owned()];
        guest::prepare()?;
        println!("{}", serde_json::to_string(&measure(&args)?)?);
        return Ok(());
    }
    let elsewhere = args.modes.iter().any(|mode| mode == guest::MODE) && !guest::has_ipvs();
    args.modes.retain(|mode| mode != guest::MODE || !elsewhere);
    let mut written = Vec::new();
    let mut failures = 0;
    let mut write = |report: Report| -> Result<()> {
        failures += report.failures.len();
        written.push(report.write(&args.output)?);
        Ok(())
    };
    if !args.modes.is_empty() {
        write(measure(&args)?)?;
    }
    if elsewhere {
        let mut report = guest::measure()?;
        let name = Report::new(args.machine.clone(), &args.shunt)?.machine.name;
        report.machine.name = format!("{name}-guest");
        write(report)?;
    }
    if let Some(into) = &args.goals {
        report::put_goals(into, &report::beside(&written)?)?;
    }
    ensure!(failures == 0, "{failures} measurements failed, see above");
    Ok(())
}

/// What was measured; of an error is only told, so that the other parts are not lost.
fn keep<T: Default>(what: &str, measured: Result<T>, failures: &mut Vec<String>) -> T {
    measured.unwrap_or_else(|error| {
        failures.push(format!("{what}: {error:#}"));
        T::default()
    })
}

fn measure(args: &RunArgs) -> Result<Report> {
    let defaults = match (args.inside, args.quick) {
        (false, false) => THOROUGH,
        (false, true) => QUICK,
        (true, false) => GUEST,
        (true, true) => GUEST_QUICK,
    };
    let [many, few] = defaults.repetitions.map(|number| args.repetitions.unwrap_or(number));
    let [connecting, bulk, changing, rest] = defaults.seconds.map(Duration::from_secs_f64);
    let mode = |mode: &String| Program::Shunt { binary: args.shunt.clone(), mode: mode.clone() };
    let mut programs: Vec<Program> = args.modes.iter().map(mode).collect();
    if let Some(peer) = &args.peer {
        // kube-proxy has no eBPF mode, and takes the flavour of iptables that it finds.
        for mode in ["nftables", "iptables", "ipvs"] {
            if args.modes.iter().any(|wanted| wanted.split('-').next() == Some(mode)) {
                programs.push(Program::KubeProxy { binary: peer.clone(), mode: mode.to_owned() });
            }
        }
    }
    let mut subjects = vec![Subject::Direct];
    if !args.no_references {
        let layouts = Layout::of(args.modes.iter().any(|mode| mode == guest::MODE));
        subjects.extend(layouts.iter().copied().map(Subject::Layout));
    }
    subjects.extend(programs.iter().cloned().map(Subject::Program));

    let mut report = Report::new(args.machine.clone(), &args.shunt)?;
    if args.parts.contains(&Part::Latency) {
        report.latency = latency::measure(
            &latency::Plan {
                services: args.services.clone().unwrap_or_else(|| defaults.services.to_vec()),
                endpoints: 10,
                connections: args.connections.unwrap_or(defaults.connections),
                repetitions: many,
                few_repetitions: few,
                limit: connecting,
                subjects: subjects.clone(),
                reference_limit: args.reference_limit,
            },
            &mut report.failures,
        );
    }
    if args.parts.contains(&Part::Throughput) {
        let measured = throughput::measure(
            &throughput::Plan {
                services: defaults.throughput,
                repetitions: many,
                duration: bulk,
                arriving: defaults.arriving,
                subjects,
            },
            &mut report.failures,
        );
        report.throughput = keep("throughput", measured, &mut report.failures);
    }
    if args.parts.contains(&Part::Control) {
        let measured = control::measure(
            &control::Plan {
                programs,
                shapes: args.shapes.clone().unwrap_or_else(|| defaults.shapes.to_vec()),
                repetitions: defaults.cold_repetitions,
                churn: args.churn.clone().unwrap_or_else(|| defaults.churn.to_vec()),
                rates: defaults.rates.to_vec(),
                duration: changing,
                rest,
            },
            &mut report.failures,
        );
        report.control = keep("control", measured, &mut report.failures);
    }
    // The other modes are not measured without a kernel.
    if args.parts.contains(&Part::Growth) && args.modes.iter().any(|mode| mode == "nftables") {
        let measured = growth::measure("nftables", defaults.growth);
        report.growth = keep("growth", measured, &mut report.failures);
    }
    Ok(report)
}

fn shape(text: &str) -> Result<(usize, usize)> {
    let parsed = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.ok_or_else(|| anyhow::anyhow!("{text:?} is not SERVICESxENDPOINTS"))
}
