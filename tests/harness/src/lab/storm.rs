//! Storms of new connections.
//!
//! What a connection costs decides how many a guest kernel can bear, where each system call takes ten times as long
//! as on the machine itself: so one thread has all connections, and makes few calls for each of them.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::echo::{Proto, parse_line};
use super::namespace::Namespace;
use super::probe::{Answer, Outcome, Probe, bind, icmp_error};

/// How long a storm that is told to stop may take to notice.
const NOTICE: Duration = Duration::from_millis(50);

/// New TCP connections at a steady rate, whether or not the earlier ones succeed.
#[derive(Clone, Debug)]
pub struct StormSpec {
    /// What each connection asks, and how long it may take.
    pub probe: Probe,
    /// Connections a second.
    pub rate: u32,
    /// For how long; [`Storm::stop`] ends it earlier.
    pub duration: Duration,
}

/// A storm under way.
#[derive(Debug)]
pub struct Storm {
    stop: Arc<AtomicBool>,
    attempted: Arc<AtomicU64>,
    thread: JoinHandle<Result<StormReport>>,
}

/// What a storm saw.
#[derive(Clone, Debug, Default)]
pub struct StormReport {
    /// Connections tried.
    pub attempted: u64,
    /// How many answers each pod gave.
    pub replies: BTreeMap<String, u64>,
    /// Connections that failed: when they began since the storm did, and how they ended.
    pub failures: Vec<(Duration, Outcome)>,
    /// How long each answered connection took, shortest first.
    pub latencies: Vec<Duration>,
}

impl StormReport {
    /// The latency that this share (0.0 to 1.0) of the answered connections did not exceed.
    #[allow(clippy::cast_precision_loss, clippy::cast_sign_loss)] // Fewer than 2^52 connections.
    pub fn percentile(&self, share: f64) -> Option<Duration> {
        let last = self.latencies.len().checked_sub(1)?;
        let position = (last as f64 * share.clamp(0.0, 1.0)).round() as usize;
        self.latencies.get(position).copied()
    }
}

impl fmt::Display for StormReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections, {} failed, answered by {:?}",
            self.attempted,
            self.failures.len(),
            self.replies
        )?;
        if let (Some(half), Some(most)) = (self.percentile(0.5), self.percentile(0.99)) {
            write!(f, ", p50 {half:?}, p99 {most:?}")?;
        }
        if let Some((at, outcome)) = self.failures.first() {
            write!(f, ", first failure after {at:?}: {outcome}")?;
        }
        Ok(())
    }
}

impl Storm {
    /// How many connections have been tried so far.
    pub fn attempted(&self) -> u64 {
        self.attempted.load(Ordering::Relaxed)
    }

    /// Opens no more connections, waits for the last ones, and reports.
    pub fn stop(self) -> Result<StormReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for the storm to end by itself, and reports.
    pub fn join(self) -> Result<StormReport> {
        self.thread.join().map_err(|_| anyhow!("the storm's thread panicked"))?
    }
}

impl Namespace {
    /// Starts opening new connections from this namespace.
    pub fn storm(&self, spec: StormSpec) -> Result<Storm> {
        ensure!(spec.rate > 0, "a storm needs a rate");
        ensure!(spec.probe.proto == Proto::Tcp, "a storm is of TCP connections");
        let (stop, attempted) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&attempted));
        let thread = self.thread(move || run(&spec, &stopped, &counter))?;
        Ok(Storm { stop, attempted, thread })
    }
}

/// A connection under way.
struct Pending {
    stream: TcpStream,
    began: Instant,
    /// The question is sent, so the connection is there.
    asked: bool,
    line: Vec<u8>,
}

fn run(spec: &StormSpec, stop: &AtomicBool, attempted: &AtomicU64) -> Result<StormReport> {
    let begin = Instant::now();
    let interval = Duration::from_secs(1) / spec.rate;
    let mut due = begin;
    let mut pending: Vec<Pending> = Vec::new();
    let mut report = StormReport::default();
    loop {
        let more = begin.elapsed() < spec.duration && !stop.load(Ordering::Relaxed);
        // A late connection is made up for at once: the rate holds on average.
        while more && due <= Instant::now() {
            due += interval;
            attempted.fetch_add(1, Ordering::Relaxed);
            let began = Instant::now();
            match open(&spec.probe, began)? {
                Ok(connection) => pending.push(connection),
                Err(refused) => report.ended(begin, began, refused),
            }
        }
        if !more && pending.is_empty() {
            break;
        }
        let ready = wait(&pending, more.then_some(due))?;
        let mut flags = ready.into_iter();
        let now = Instant::now();
        let mut failed = None;
        pending.retain_mut(|connection| {
            let ready = flags.next().unwrap_or(PollFlags::empty());
            let outcome = match connection.go_on(ready) {
                Ok(None) if now.saturating_duration_since(connection.began) < spec.probe.timeout => {
                    return true;
                }
                Ok(outcome) => outcome.unwrap_or(Outcome::Timeout),
                Err(error) => {
                    failed = Some(error);
                    return false;
                }
            };
            report.ended(begin, connection.began, outcome);
            false
        });
        if let Some(error) = failed {
            return Err(error);
        }
    }
    report.failures.sort_by_key(|(at, _)| *at);
    report.latencies.sort_unstable();
    Ok(report)
}

/// Begins a connection; the inner error is how it ended already.
fn open(probe: &Probe, began: Instant) -> Result<Result<Pending, Outcome>> {
    let socket = bind(probe)?;
    match socket.connect(&probe.dst.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
            let errno = Errno::from_raw(error.raw_os_error().with_context(|| format!("{probe}: {error}"))?);
            Ok(Err(Outcome::Refused { errno, icmp: icmp_error(&socket) }))
        }
        _ => Ok(Ok(Pending { stream: socket.into(), began, asked: false, line: Vec::new() })),
    }
}

/// Waits until something happens to a connection, at most until the next one is due; says what happened to each.
fn wait(pending: &[Pending], due: Option<Instant>) -> Result<Vec<PollFlags>> {
    let mut descriptors: Vec<PollFd<'_>> = pending
        .iter()
        .map(|c| PollFd::new(c.stream.as_fd(), if c.asked { PollFlags::POLLIN } else { PollFlags::POLLOUT }))
        .collect();
    // Milliseconds are all that poll knows; less than one must not become a loop that never waits.
    let left = due.map_or(NOTICE, |due| due.saturating_duration_since(Instant::now()).min(NOTICE));
    let left = left.as_micros().div_ceil(1000);
    match poll(&mut descriptors, PollTimeout::try_from(left)?) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(descriptors.iter().map(|d| d.revents().unwrap_or(PollFlags::empty())).collect())
}

impl Pending {
    /// Asks or listens, whichever is next; how the connection ended, if it has.
    fn go_on(&mut self, ready: PollFlags) -> Result<Option<Outcome>> {
        if ready.is_empty() {
            return Ok(None);
        }
        let broken = ready.intersects(PollFlags::POLLERR | PollFlags::POLLHUP);
        let error = if broken { self.stream.take_error()? } else { None };
        let error = match error.map_or_else(|| self.talk(), Err) {
            Ok(false) => return Ok(None),
            Ok(true) => {
                let (pod, local, peer) = parse_line(&String::from_utf8_lossy(&self.line))?;
                return Ok(Some(Outcome::Reply(Answer { pod, local, peer })));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => error,
        };
        let errno = Errno::from_raw(error.raw_os_error().with_context(|| error.to_string())?);
        Ok(Some(Outcome::Refused { errno, icmp: icmp_error(&self.stream) }))
    }

    /// True once the whole answer is there.
    fn talk(&mut self) -> std::io::Result<bool> {
        if !self.asked {
            self.stream.write_all(b"who\n")?;
            self.asked = true;
            return Ok(false);
        }
        let mut buffer = [0; 256];
        let length = self.stream.read(&mut buffer)?;
        if length == 0 {
            return Err(Errno::ECONNRESET.into());
        }
        self.line.extend_from_slice(&buffer[..length]);
        Ok(self.line.ends_with(b"\n"))
    }
}

impl StormReport {
    fn ended(&mut self, begin: Instant, began: Instant, outcome: Outcome) {
        self.attempted += 1;
        match outcome {
            Outcome::Reply(answer) => {
                *self.replies.entry(answer.pod).or_default() += 1;
                self.latencies.push(began.elapsed());
            }
            failure => self.failures.push((began.saturating_duration_since(begin), failure)),
        }
    }
}
