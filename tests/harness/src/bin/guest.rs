//! `shunt-guest COMMAND [ARGUMENT...]`: runs a command in a guest kernel that has IPVS, with the caller's `SHUNT_*`
//! and `RUST_*` variables. Ends as the command does; 125 if the guest failed. Files can be read; what is written
//! vanishes with the guest.

use std::io::{stderr, stdout};
use std::process::{Command, ExitCode};

use anyhow::Result;
use shunt_harness::guest::Guest;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: shunt-guest COMMAND [ARGUMENT...]");
        return ExitCode::from(125);
    };
    let mut command = Command::new(program);
    command.args(arguments);
    run(&command).unwrap_or_else(|error| {
        eprintln!("shunt-guest: {error:#}");
        ExitCode::from(125)
    })
}

fn run(command: &Command) -> Result<ExitCode> {
    let status = Guest::new()?.pass(command, stdout(), stderr())?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}
