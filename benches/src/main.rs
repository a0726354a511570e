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
mod latency;
mod layouts;
mod load;
mod report;
mod subject;
mod throughput;

use std::path::PathBuf;
use std::time::Duration;

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
    Run(RunArgs),
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
    /// Modes to measure; iptables-legacy and iptables-nft name a flavour.
    #[arg(long, value_delimiter = ',', default_value = "nftables")]
    modes: Vec<String>,
    /// Parts to measure.
    #[arg(long, value_delimiter = ',', value_enum, default_values = ["latency", "throughput", "control", "growth"])]
    parts: Vec<Part>,
    /// Numbers of Services for first packets.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,1000,10000,30000")]
    services: Vec<usize>,
    /// Cold starts: Services x endpoints.
    #[arg(long, value_delimiter = ',', default_value = "100x10,1000x10,10000x10,30000x10,45000x1,5000x50")]
    shapes: Vec<String>,
    /// Numbers of Services among which changes are measured.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000,30000")]
    churn: Vec<usize>,
    /// References are written for up to so many Services.
    #[arg(long, default_value_t = 10_000)]
    reference_limit: usize,
    /// Leaves out kube-proxy's layouts.
    #[arg(long)]
    no_references: bool,
    /// Repetitions.
    #[arg(long, default_value_t = 7)]
    repetitions: u32,
    /// Connections in a repetition.
    #[arg(long, default_value_t = 20_000)]
    connections: u32,
    /// A kube-proxy binary to measure besides, in the same modes.
    #[arg(long, value_name = "PATH")]
    peer: Option<PathBuf>,
    /// Small sizes and few repetitions: shows that everything runs, not how fast.
    #[arg(long)]
    quick: bool,
    /// Name of this machine in file names.
    #[arg(long)]
    machine: Option<String>,
    /// Folder for results.
    #[arg(long, default_value = "benches/results")]
    output: PathBuf,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Run(args) => run(args),
        Command::Load { file } => load::run(&file),
        Command::Change { mode, services, changes } => growth::work(&mode, services, changes),
    }
}

fn run(mut args: RunArgs) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces need root");
    let mut duration = Duration::from_secs(5);
    if args.quick {
        args.services = vec![1, 100];
        args.shapes = vec!["100x10".to_owned(), "1000x10".to_owned()];
        args.churn = vec![100];
        args.repetitions = 2;
        args.connections = 2_000;
        duration = Duration::from_secs(1);
    }
    let mode = |mode: &String| Program::Shunt { binary: args.shunt.clone(), mode: mode.clone() };
    let mut programs: Vec<Program> = args.modes.iter().map(mode).collect();
    if let Some(peer) = &args.peer {
        // kube-proxy has no eBPF mode, and takes the flavour of iptables that it finds.
        let modes =
            args.modes.iter().filter(|mode| matches!(mode.as_str(), "nftables" | "iptables" | "ipvs"));
        programs.extend(modes.map(|mode| Program::KubeProxy { binary: peer.clone(), mode: mode.clone() }));
    }
    let mut subjects = vec![Subject::Direct];
    if !args.no_references {
        subjects.extend(Layout::ALL.map(Subject::Layout));
    }
    subjects.extend(programs.iter().cloned().map(Subject::Program));

    let mut report = Report::new(args.machine.clone(), &args.shunt)?;
    if args.parts.contains(&Part::Latency) {
        report.latency = latency::measure(
            &latency::Plan {
                services: args.services.clone(),
                endpoints: 10,
                connections: args.connections,
                repetitions: args.repetitions,
                subjects: subjects.clone(),
                reference_limit: args.reference_limit,
            },
            &mut report.failures,
        )?;
    }
    if args.parts.contains(&Part::Throughput) {
        report.throughput = throughput::measure(
            &throughput::Plan {
                services: if args.quick { 100 } else { 1_000 },
                repetitions: args.repetitions.min(5),
                duration: Duration::from_millis(500),
                subjects,
            },
            &mut report.failures,
        )?;
    }
    if args.parts.contains(&Part::Control) {
        let shapes = args.shapes.iter().map(|text| shape(text)).collect::<Result<_>>()?;
        report.control = control::measure(
            &control::Plan {
                programs,
                shapes,
                repetitions: if args.quick { 1 } else { 2 },
                churn: args.churn,
                rates: vec![1, 10, 100],
                duration,
            },
            &mut report.failures,
        )?;
    }
    if args.parts.contains(&Part::Growth) {
        let sizes: &[usize] = if args.quick { &[100, 1_000] } else { &[1_000, 30_000] };
        // The other modes are not measured without a kernel.
        if args.modes.iter().any(|mode| mode == "nftables") {
            report.growth = growth::measure("nftables", sizes)?;
        }
    }
    report.write(&args.output)
}

fn shape(text: &str) -> Result<(usize, usize)> {
    let parsed = text.split_once('x').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.ok_or_else(|| anyhow::anyhow!("{text:?} is not SERVICESxENDPOINTS"))
}
