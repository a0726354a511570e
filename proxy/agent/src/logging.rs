//! Log lines on standard error, as text or JSON.

use std::io::IsTerminal;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::cli::{LogArgs, LogFormat};

/// Starts logging. `RUST_LOG`, where set, overrides the verbosity.
pub(crate) fn start(args: &LogArgs) {
    let level = match args.verbosity {
        0..=3 => LevelFilter::INFO,
        4..=5 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // Libraries speak up at the highest verbosity only.
    let others = if args.verbosity < 8 { LevelFilter::WARN } else { level };
    let ours = [
        "shunt",
        "shunt_watch",
        "shunt_node",
        "shunt_mode",
        "shunt_modes",
        "shunt_mode_ipvs",
        "shunt_mode_nftables",
    ];
    let filter = EnvFilter::builder().with_default_directive(others.into()).from_env_lossy();
    let filter = if std::env::var_os(EnvFilter::DEFAULT_ENV).is_some() {
        filter
    } else {
        ours.iter()
            .filter_map(|name| format!("{name}={level}").parse().ok())
            .fold(filter, EnvFilter::add_directive)
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match args.logging_format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
