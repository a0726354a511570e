//! Long TCP streams, as fast as they go.

use std::io::Write;
use std::net::{SocketAddrV4, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::cpu_time;

/// Where streams go.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct StreamSpec {
    /// Targets; flow `i` goes to target `i` modulo their number.
    pub targets: Vec<SocketAddrV4>,
    /// Number of flows.
    pub flows: usize,
    /// For how long.
    pub duration: Duration,
}

/// What went through.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Stream {
    /// Gigabits a second, all flows together.
    pub gigabits_per_second: f64,
    /// Processor time of the sender for a mebibyte, microseconds.
    pub cpu_us_per_mib: f64,
}

const CHUNK: usize = 128 * 1024;

pub(super) fn run(spec: &StreamSpec) -> Result<Stream> {
    let (started, before) = (Instant::now(), cpu_time()?);
    let sent = thread::scope(|scope| {
        let flows: Vec<_> = (0..spec.flows)
            .map(|flow| {
                let target = spec.targets.get(flow % spec.targets.len().max(1)).copied();
                scope.spawn(move || -> Result<u64> {
                    let target = target.context("no targets")?;
                    let mut stream = TcpStream::connect_timeout(&target.into(), Duration::from_secs(2))?;
                    let chunk = vec![b'x'; CHUNK];
                    let mut sent = 0;
                    while started.elapsed() < spec.duration {
                        sent += stream.write(&chunk)? as u64;
                    }
                    Ok(sent)
                })
            })
            .collect();
        flows
            .into_iter()
            .map(|flow| flow.join().map_err(|_| anyhow!("a stream panicked"))?)
            .sum::<Result<u64>>()
    })?;
    let (elapsed, used) = (started.elapsed(), cpu_time()?.saturating_sub(before));
    Ok(Stream {
        gigabits_per_second: sent as f64 * 8.0 / 1e9 / elapsed.as_secs_f64(),
        cpu_us_per_mib: used.as_secs_f64() * 1e6 / (sent as f64 / f64::from(1 << 20)),
    })
}
