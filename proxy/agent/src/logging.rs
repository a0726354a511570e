//! Log lines on standard error, as text or JSON.

use std::io::IsTerminal;

use shunt_config::types::Logging;
use shunt_mode::Mode;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::cli::{LogArgs, LogFormat};

/// Verbosity where nothing says another.
const VERBOSITY: u32 = 2;

/// Starts logging as flags say.
pub(crate) fn start(args: &LogArgs) {
    start_with(args.verbosity.map_or(VERBOSITY, u32::from), args.logging_format.unwrap_or_default());
}

/// Starts logging as the configuration says, into which flags have gone already. A verbosity of 0 in it
/// cannot be told from none.
pub(crate) fn start_configured(args: &LogArgs, logging: &Logging) {
    let verbosity =
        if args.verbosity.is_none() && logging.verbosity == 0 { VERBOSITY } else { logging.verbosity };
    start_with(verbosity, if logging.format == "json" { LogFormat::Json } else { LogFormat::Text });
}

/// Starts logging. `RUST_LOG`, where set, overrides the verbosity.
fn start_with(verbosity: u32, format: LogFormat) {
    let level = match verbosity {
        0..=3 => LevelFilter::INFO,
        4..=5 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // Libraries speak up at the highest verbosity only.
    let others = if verbosity < 8 { LevelFilter::WARN } else { level };
    let crates = ["shunt", "shunt_watch", "shunt_node", "shunt_mode", "shunt_modes"];
    let of_modes = Mode::ALL.iter().map(|mode| format!("shunt_mode_{mode}"));
    let ours = crates.into_iter().map(str::to_owned).chain(of_modes);
    let filter = EnvFilter::builder().with_default_directive(others.into()).from_env_lossy();
    let filter = if std::env::var_os(EnvFilter::DEFAULT_ENV).is_some() {
        filter
    } else {
        ours.filter_map(|name| format!("{name}={level}").parse().ok()).fold(filter, EnvFilter::add_directive)
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}
