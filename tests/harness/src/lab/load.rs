//! Connections that last: long transfers, and such as are kept open.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::echo::parse_line;
use super::namespace::Namespace;
use super::probe::{Answer, Probe, bind};

/// Nothing on one machine stalls this long unless it is broken.
const STALLED: Duration = Duration::from_secs(5);
const CHUNK: usize = 16 * 1024;

/// A long TCP transfer to an echo server, which returns every byte.
#[derive(Clone, Debug)]
pub struct TransferSpec {
    /// Where to, and from where. (Its timeout is for connecting.)
    pub probe: Probe,
    /// How many bytes a second at most.
    pub pace: Option<u64>,
    /// How many bytes in all; [`Transfer::stop`] ends it earlier.
    pub limit: Option<u64>,
}

/// A transfer under way.
#[derive(Debug)]
pub struct Transfer {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<TransferReport>>,
}

/// What became of a transfer: every byte came back, in order and unharmed.
#[derive(Clone, Copy, Debug)]
pub struct TransferReport {
    /// Bytes sent, and received again.
    pub bytes: u64,
    /// From the first byte sent to the last one received.
    pub elapsed: Duration,
}

impl Transfer {
    /// How many bytes have come back so far.
    pub fn bytes(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Sends no more, waits for what is under way, and reports; an error if a byte was lost or changed, or the
    /// connection broke.
    pub fn stop(self) -> Result<TransferReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for the limit to be reached, and reports like [`Transfer::stop`].
    pub fn join(self) -> Result<TransferReport> {
        self.thread.join().map_err(|_| anyhow!("the transfer's thread panicked"))?
    }
}

/// A port that neither the kernel of a lab gives to connections (10000 and above) nor a proxy to those that it
/// masquerades (1024 and above).
///
/// By different VIPs, one client may reach the same endpoint from the same port twice. Where nothing translates the
/// source, as for `externalTrafficPolicy: Local` by IPVS, the endpoint takes the second connection for the first, and
/// both break. So do they where ebpf mode masquerades one with the port that a process of the node has bound. In storms
/// of short connections that happens to a long one now and then.
fn own_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    512 + TAKEN.fetch_add(1, Ordering::Relaxed) % 500
}

/// A TCP connection to an echo server, kept open.
#[derive(Debug)]
pub struct Conversation {
    reader: BufReader<TcpStream>,
}

impl Conversation {
    /// Asks again over the same connection.
    pub fn ask(&mut self) -> Result<Answer> {
        self.reader.get_mut().write_all(b"who\n")?;
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "connection closed");
        let (pod, local, peer) = parse_line(&line)?;
        Ok(Answer { pod, local, peer })
    }

    /// The connection itself.
    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }
}

impl Namespace {
    /// Opens a TCP connection from this namespace as the probe says; reads and writes wait as long as its timeout.
    /// Without a source port in the probe it has one that no other connection gets.
    pub fn connect(&self, probe: &Probe) -> Result<TcpStream> {
        let probe = match probe.src_port {
            0 => probe.clone().from_port(own_port()),
            _ => probe.clone(),
        };
        self.run(|| {
            let socket = bind(&probe)?;
            socket.connect_timeout(&probe.dst.into(), probe.timeout).with_context(|| probe.to_string())?;
            socket.set_read_timeout(Some(probe.timeout))?;
            socket.set_write_timeout(Some(probe.timeout))?;
            socket.set_tcp_nodelay(true)?;
            Ok(socket.into())
        })
    }

    /// Opens a TCP connection to an echo server, to ask over it again and again.
    pub fn converse(&self, probe: &Probe) -> Result<Conversation> {
        Ok(Conversation { reader: BufReader::new(self.connect(probe)?) })
    }

    /// Starts a long transfer from this namespace; it is connected on return.
    pub fn transfer(&self, spec: &TransferSpec) -> Result<Transfer> {
        let stream = self.connect(&spec.probe)?;
        stream.set_read_timeout(Some(STALLED))?;
        stream.set_write_timeout(Some(STALLED))?;
        let (stop, received) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&received));
        let (pace, limit, dst) = (spec.pace, spec.limit.unwrap_or(u64::MAX), spec.probe.dst);
        let thread = thread::Builder::new().name("transfer".to_owned()).spawn(move || {
            run_transfer(&stream, pace, limit, &stopped, &counter).with_context(|| {
                format!("transfer to {dst}, {} bytes returned", counter.load(Ordering::Relaxed))
            })
        })?;
        Ok(Transfer { stop, received, thread })
    }
}

fn run_transfer(
    mut stream: &TcpStream,
    pace: Option<u64>,
    limit: u64,
    stop: &AtomicBool,
    received: &AtomicU64,
) -> Result<TransferReport> {
    stream.write_all(b"echo\n")?;
    let begin = Instant::now();
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream, pace, limit, stop));
        let verified = receive(stream, received);
        if verified.is_err() {
            // The sender may be waiting for room that will never come.
            drop(stream.shutdown(Shutdown::Both));
        }
        let sent = sender.join().map_err(|_| anyhow!("sender panicked"))?;
        let bytes = verified?;
        let sent = sent?;
        ensure!(bytes == sent, "sent {sent} bytes, {bytes} came back");
        Ok(TransferReport { bytes, elapsed: begin.elapsed() })
    })
}

fn send(mut stream: &TcpStream, pace: Option<u64>, limit: u64, stop: &AtomicBool) -> Result<u64> {
    let begin = Instant::now();
    let mut sent = 0;
    let mut chunk = vec![0; CHUNK];
    while sent < limit && !stop.load(Ordering::Relaxed) {
        // A slow transfer goes in small steps, ten a second or more.
        let step = pace.map_or(CHUNK as u64, |pace| (pace / 10).clamp(1, CHUNK as u64)).min(limit - sent);
        let step = &mut chunk[..step as usize];
        fill(step, sent);
        stream.write_all(step)?;
        sent += step.len() as u64;
        if let Some(pace) = pace {
            let due = Duration::from_nanos(sent.saturating_mul(1_000_000_000) / pace.max(1));
            thread::sleep(due.saturating_sub(begin.elapsed()));
        }
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(sent)
}

fn receive(mut stream: &TcpStream, received: &AtomicU64) -> Result<u64> {
    let (mut buffer, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut position = 0;
    loop {
        let length = match stream.read(&mut buffer) {
            // With a timeout set, the kernel does not go on by itself after a signal.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            length => length?,
        };
        if length == 0 {
            return Ok(position);
        }
        fill(&mut expected[..length], position);
        if buffer[..length] != expected[..length] {
            bail!("bytes changed on the way, at or after byte {position}");
        }
        position += length as u64;
        received.store(position, Ordering::Relaxed);
    }
}

/// The bytes of a transfer from `position` on: their period is no power of two, so that a missing segment shows.
fn fill(bytes: &mut [u8], position: u64) {
    let mut phase = (position % 251) as u8;
    for byte in bytes {
        *byte = phase;
        phase = if phase == 250 { 0 } else { phase + 1 };
    }
}
