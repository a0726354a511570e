//! One question to an echo server, and what came back.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recv, recvmsg, setsockopt, sockopt};
use socket2::Socket;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{TcpStream, UdpSocket};

use super::echo::{Proto, parse_line};
use super::namespace::Namespace;
use super::sctp;
use crate::guest;

/// How long a probe waits unless told otherwise. Everything in a lab is on one machine; what has not come by then
/// was dropped. A guest has one slow CPU.
fn patience() -> Duration {
    Duration::from_millis(if guest::inside() { 1000 } else { 300 })
}

/// A question to an echo server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Probe {
    /// The transport protocol.
    pub proto: Proto,
    /// Where it goes.
    pub dst: SocketAddr,
    /// Where it comes from; the kernel's choice otherwise.
    pub src: Option<IpAddr>,
    /// Its source port; 0 is the kernel's choice.
    pub src_port: u16,
    /// Whether `src` may be an address which the namespace does not own. The answer then finds its way back only if
    /// routes say so.
    pub foreign: bool,
    /// How long to wait for the answer.
    pub timeout: Duration,
}

impl Probe {
    /// A TCP connection, one line each way.
    pub fn tcp(dst: SocketAddr) -> Self {
        Self::new(Proto::Tcp, dst)
    }

    /// A UDP datagram each way.
    pub fn udp(dst: SocketAddr) -> Self {
        Self::new(Proto::Udp, dst)
    }

    /// The first packet of an SCTP association, and the answer.
    pub fn sctp(dst: SocketAddr) -> Self {
        Self::new(Proto::Sctp, dst)
    }

    /// A question over `proto` to `dst`.
    pub fn new(proto: Proto, dst: SocketAddr) -> Self {
        Self { proto, dst, src: None, src_port: 0, foreign: false, timeout: patience() }
    }

    /// The same from this source address.
    #[must_use]
    pub fn from(self, src: IpAddr) -> Self {
        Self { src: Some(src), ..self }
    }

    /// The same from this source port.
    #[must_use]
    pub fn from_port(self, src_port: u16) -> Self {
        Self { src_port, ..self }
    }

    /// The same, waiting this long.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.proto)?;
        if let Some(src) = self.src {
            write!(f, "{src} ")?;
        }
        write!(f, "-> {}", self.dst)
    }
}

/// What an echo server said.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Answer {
    /// The pod's name.
    pub pod: String,
    /// The address on which the pod was reached.
    pub local: SocketAddr,
    /// The source address the pod saw, after any masquerading.
    pub peer: SocketAddr,
}

/// An ICMP error, and who sent it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Icmp {
    /// Its type (IPv4: 3 is unreachable; IPv6: 1 is).
    pub kind: u8,
    /// Its code (IPv4: 3 is port unreachable; IPv6: 4 is).
    pub code: u8,
    /// The sender, where the kernel kept it.
    pub from: Option<IpAddr>,
}

/// What became of a probe.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// A pod answered.
    Reply(Answer),
    /// The network or the destination said no: a TCP reset, or an ICMP error when `icmp` is present.
    Refused {
        /// What the application sees: `ECONNREFUSED`, `EHOSTUNREACH`, ...
        errno: Errno,
        /// The ICMP error behind it.
        icmp: Option<Icmp>,
    },
    /// Nothing came back: dropped, here or on the way.
    Timeout,
}

impl Outcome {
    /// The answer, if there was one.
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Reply(answer) => Some(answer),
            Self::Refused { .. } | Self::Timeout => None,
        }
    }

    /// Which pod answered.
    pub fn pod(&self) -> Option<&str> {
        self.answer().map(|answer| answer.pod.as_str())
    }

    /// The source address that the pod saw.
    pub fn peer(&self) -> Option<IpAddr> {
        self.answer().map(|answer| answer.peer.ip())
    }

    /// Whether it was refused, whichever way.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether it was dropped.
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Timeout)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply(answer) => {
                write!(f, "answered by {} on {}, seen as {}", answer.pod, answer.local, answer.peer)
            }
            Self::Refused { errno, icmp: None } => write!(f, "refused: {errno:?}"),
            Self::Refused { errno, icmp: Some(icmp) } => {
                write!(f, "refused: {errno:?}, ICMP type {} code {}", icmp.kind, icmp.code)?;
                icmp.from.map_or(Ok(()), |from| write!(f, " from {from}"))
            }
            Self::Timeout => f.write_str("no answer"),
        }
    }
}

impl Namespace {
    /// Sends one probe from this namespace.
    ///
    /// An error means the probe could not be made, for example because its source address is not the namespace's.
    pub fn probe(&self, probe: Probe) -> Result<Outcome> {
        self.probe_all(vec![probe])?.pop().context("one outcome for one probe")
    }

    /// Sends probes from this namespace, all at once; the outcomes come in the same order.
    pub fn probe_all(&self, probes: Vec<Probe>) -> Result<Vec<Outcome>> {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let tasks: Vec<_> =
                    probes.into_iter().map(|probe| tokio::spawn(async move { ask(&probe).await })).collect();
                let mut outcomes = Vec::with_capacity(tasks.len());
                for task in tasks {
                    outcomes.push(task.await??);
                }
                Ok(outcomes)
            })
        })
    }

    /// Sends the same probe `count` times, each from a new source port, and gathers which pods answered.
    pub fn pods_reached(&self, probe: &Probe, count: usize) -> Result<BTreeSet<String>> {
        let outcomes = self.probe_all(vec![probe.clone(); count])?;
        outcomes
            .iter()
            .map(|outcome| outcome.pod().map(str::to_owned).ok_or_else(|| anyhow!("{probe}: {outcome}")))
            .collect()
    }
}

/// Makes a socket of the calling thread's namespace, bound as the probe wants it, not connected; it does not block.
pub(super) fn bind(probe: &Probe) -> Result<Socket> {
    let socket = probe.proto.socket(probe.dst).context("socket")?;
    // Otherwise the kernel reports only some ICMP errors, some of them late, and not whence they came.
    if probe.dst.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
    }
    if probe.src.is_some() || probe.src_port != 0 {
        let any: IpAddr = if probe.dst.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        // The ports of raw sockets are in what they send.
        let port = if probe.proto == Proto::Sctp { 0 } else { probe.src_port };
        let source = SocketAddr::new(probe.src.unwrap_or(any), port);
        if probe.foreign && source.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else if probe.foreign {
            socket.set_freebind_v6(true)?;
        }
        if probe.src_port != 0 {
            // Probing again from the same port must not wait for TIME_WAIT to end.
            socket.set_reuse_address(true)?;
        }
        socket.bind(&source.into()).with_context(|| format!("{probe}: bind to {source}"))?;
    }
    Ok(socket)
}

/// Asks once. To be called inside a runtime on a thread inside the namespace.
pub(super) async fn ask(probe: &Probe) -> Result<Outcome> {
    let socket = bind(probe)?;
    // A second descriptor of the same socket, to look at its error queue afterwards.
    let errors = socket.try_clone()?;
    let conversation = async {
        match probe.proto {
            Proto::Tcp => ask_tcp(socket, probe.dst).await,
            Proto::Udp => ask_udp(socket, probe.dst).await,
            Proto::Sctp => ask_sctp(socket, probe).await,
        }
    };
    match tokio::time::timeout(probe.timeout, conversation).await {
        Err(_) => Ok(Outcome::Timeout),
        Ok(Ok(line)) => {
            let (pod, local, peer) = parse_line(&line)?;
            Ok(Outcome::Reply(Answer { pod, local, peer }))
        }
        Ok(Err(error)) => {
            let errno = error.raw_os_error().map(Errno::from_raw);
            let errno = errno.with_context(|| format!("{probe}: {error}"))?;
            Ok(Outcome::Refused { errno, icmp: icmp_error(&errors) })
        }
    }
}

async fn ask_tcp(socket: Socket, dst: SocketAddr) -> io::Result<String> {
    match socket.connect(&dst.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    let mut stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    stream.write_all(b"who\n").await?;
    let mut line = String::new();
    if BufReader::new(&mut stream).read_line(&mut line).await? == 0 {
        return Err(Errno::ECONNRESET.into());
    }
    Ok(line)
}

async fn ask_udp(socket: Socket, dst: SocketAddr) -> io::Result<String> {
    socket.connect(&dst.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    send(&socket, b"who\n").await?;
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).await?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

async fn ask_sctp(socket: Socket, probe: &Probe) -> io::Result<String> {
    let init = sctp::Init::new(probe.src_port, probe.dst.port());
    // Only what comes from there is received then.
    socket.connect(&SocketAddr::new(probe.dst.ip(), 0).into())?;
    // Of a UDP socket tokio uses nothing that a raw one lacks.
    let socket = UdpSocket::from_std(socket.into())?;
    send(&socket, &init.packet()).await?;
    let mut buffer = [0; 2048];
    loop {
        let interest = Interest::READABLE | Interest::ERROR;
        let receive = || Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?);
        let length = socket.async_io(interest, receive).await?;
        if let Some(line) = init.line_of(sctp::payload(&buffer[..length], probe.dst.is_ipv4())) {
            return Ok(line);
        }
    }
}

async fn send(socket: &UdpSocket, packet: &[u8]) -> io::Result<()> {
    match socket.send(packet).await {
        // The sender's own output hook (EPERM) or its device's (ENOBUFS) dropped it. If it was rejected, the ICMP
        // error is waiting; if not, nothing will come, as with any other drop.
        Err(error)
            if error.kind() == ErrorKind::PermissionDenied || error.raw_os_error() == Some(libc::ENOBUFS) =>
        {
            Ok(())
        }
        sent => sent.map(drop),
    }
}

/// The ICMP error in a socket's error queue.
pub(super) fn icmp_error(socket: &impl AsFd) -> Option<Icmp> {
    let mut payload = [0; 512];
    let mut buffer = [IoSliceMut::new(&mut payload)];
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
    let fd = socket.as_fd().as_raw_fd();
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let received = recvmsg::<SockaddrStorage>(fd, &mut buffer, Some(&mut space), flags).ok()?;
    received.cmsgs().ok()?.find_map(|message| {
        let (error, from) = match message {
            ControlMessageOwned::Ipv4RecvErr(error, from) => (
                error,
                from.map(|from| {
                    IpAddr::from(*SocketAddrV4::from(nix::sys::socket::SockaddrIn::from(from)).ip())
                }),
            ),
            ControlMessageOwned::Ipv6RecvErr(error, from) => (
                error,
                from.map(|from| {
                    IpAddr::from(*SocketAddrV6::from(nix::sys::socket::SockaddrIn6::from(from)).ip())
                }),
            ),
            _ => return None,
        };
        let icmp = matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
        icmp.then_some(Icmp { kind: error.ee_type, code: error.ee_code, from })
    })
}
