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

mod account;
mod admin;
mod cli;
mod config;
mod connections;
mod dump;
mod engine;
mod explain;
mod families;
mod flags;
mod flows;
mod leftovers;
mod logging;
mod metrics;
mod offline;
mod pods;
mod questions;
mod run;
mod servers;
mod settings;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use shunt_core::id::IpFamily;
use shunt_mode::Mode;

use crate::cli::{Cli, Command, RunArgs};
use crate::config::Configuration;

fn main() -> ExitCode {
    let cli = Cli::parse_from(arguments());
    let result = match cli.command {
        Command::Run(args) => done(start(&args)),
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
            done(cleanup_modes(args.mode.as_deref(), &args.modes))
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

/// What `shunt run` is asked to do: usually to run.
fn start(args: &RunArgs) -> anyhow::Result<()> {
    shunt_node::memory::return_large_buffers();
    if args.cleanup == Some(true) {
        logging::start(&args.log);
        return cleanup(&args.settings.modes);
    }
    let configuration = Configuration::load(args)?;
    logging::start_configured(&args.log, &configuration.kube_proxy.logging);
    for warning in &configuration.warnings {
        tracing::warn!("{warning}");
    }
    let settings = configuration.settings()?;
    if let Some(path) = &args.write_config_to {
        std::fs::write(path, shunt_config::write(&configuration.kube_proxy)?)
            .with_context(|| format!("write {}", path.display()))?;
        tracing::info!(file = %path.display(), "wrote the configuration");
        return Ok(());
    }
    run::run(args, configuration, settings)
}

fn done(result: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// The arguments; called as `kube-proxy`, those of `shunt run`. As Kubernetes' components do, it takes
/// `_` for `-` in the names of flags.
fn arguments() -> Vec<OsString> {
    let mut arguments: Vec<OsString> = std::env::args_os().map(dashed).collect();
    let called = arguments.first().map(std::path::PathBuf::from);
    if called.as_ref().and_then(|p| p.file_name()).is_some_and(|name| name == "kube-proxy") {
        arguments.insert(1, "run".into());
    }
    arguments
}

/// `--hostname_override=worker_1` is `--hostname-override=worker_1`.
fn dashed(argument: OsString) -> OsString {
    let Some(text) = argument.to_str().filter(|text| text.starts_with("--")) else { return argument };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    format!("{}{value}", name.replace('_', "-")).into()
}

/// Removes what our modes put into the kernel, or what one of them did.
fn cleanup_modes(only: Option<&str>, modes: &cli::ModeArgs) -> anyhow::Result<()> {
    let options = modes.options(&shunt_config::shunt::Ebpf::default());
    let only: Option<Mode> = only.map(str::parse).transpose()?;
    for mode in Mode::ALL.iter().filter(|mode| only.is_none_or(|only| only == **mode)) {
        for family in IpFamily::ALL {
            shunt_modes::open(*mode, family, &options)?.cleanup()?;
            tracing::info!(%mode, %family, "removed");
        }
    }
    Ok(())
}

/// Removes everything of ours and of kube-proxy's.
fn cleanup(modes: &cli::ModeArgs) -> anyhow::Result<()> {
    let options = modes.options(&shunt_config::shunt::Ebpf::default());
    let mut failed = None;
    for family in IpFamily::ALL {
        for error in shunt_modes::remove_leftovers(None, family, &options) {
            tracing::error!(%family, "{error}");
            failed = Some(error);
        }
        tracing::info!(%family, "removed");
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}
