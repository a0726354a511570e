//! The verifier takes every program.

use aya::VerifierLogLevel;
use aya::programs::Program;
use shunt_ebpf_tests::{DEVICE_HOOKS, Loaded, SOCKET_HOOKS, in_both_kernels};

fn every_program_passes_the_verifier() -> anyhow::Result<()> {
    let mut loaded = Loaded::with_log(if std::env::var_os("VERBOSE").is_some() {
        VerifierLogLevel::VERBOSE | VerifierLogLevel::STATS
    } else {
        VerifierLogLevel::STATS
    })?;
    let mut names = Vec::new();
    for (name, program) in loaded.ebpf().programs() {
        let info = match program {
            Program::SchedClassifier(p) => p.info()?,
            Program::CgroupSockAddr(p) => p.info()?,
            _ => anyhow::bail!("{name} is neither for sockets nor for devices"),
        };
        println!(
            "{name}: {} bytes, {} instructions verified",
            info.size_translated().unwrap_or_default(),
            info.verified_instruction_count().unwrap_or_default()
        );
        names.push(name.to_owned());
    }
    let mut expected: Vec<&str> = SOCKET_HOOKS.into_iter().chain(DEVICE_HOOKS).collect();
    expected.sort_unstable();
    names.sort_unstable();
    assert_eq!(names, expected);
    Ok(())
}

in_both_kernels!(every_program_passes_the_verifier,);
