//! The binary: command line, run loop, dumps, explanations.
//!
//! ```text
//!   shunt run:   source ─Update─> Store ─Dirty─> Compiler ─Change─> SyncLoop ─Step─> Driver ─> kernel
//!   shunt dump, explain:  manifests ─> Compiler ─> text        or: the running agent ─> text
//! ```
//!
//! Everything that decides is elsewhere and pure; this crate waits, wires and prints. Start reading
//! at `run.rs`.

#![forbid(unsafe_code)]

mod admin;
mod cli;
mod dump;
mod explain;
mod flows;
mod logging;
mod offline;
mod questions;
mod run;
mod settings;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use shunt_core::id::IpFamily;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments());
    let result = match cli.command {
        Command::Run(args) => {
            logging::start(&args.log);
            done(if args.cleanup { cleanup() } else { run::run(&args) })
        }
        Command::Dump(args) => {
            logging::start(&args.log);
            done(dump::dump(&args))
        }
        Command::Explain(args) => {
            logging::start(&args.log);
            explain::explain(&args)
        }
        Command::Cleanup(args) => {
            logging::start(&args.log);
            done(cleanup())
        }
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // Not through the log: the last word of a command must be read whatever the verbosity.
            eprintln!("shunt: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn done(result: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// The arguments; called as `kube-proxy`, those of `shunt run`.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    let called = arguments.first().map(std::path::PathBuf::from);
    if called.as_ref().and_then(|p| p.file_name()).is_some_and(|name| name == "kube-proxy") {
        arguments.insert(1, "run".into());
    }
    arguments
}

fn cleanup() -> anyhow::Result<()> {
    for mode in shunt_modes::BUILT {
        for family in IpFamily::ALL {
            shunt_modes::open(*mode, family, shunt_modes::Options::default())?.cleanup()?;
            tracing::info!(%mode, %family, "removed");
        }
    }
    Ok(())
}
