//! Servers inside a namespace which say who they are and whom they see.
//!
//! A UDP datagram, a line over TCP, or an SCTP INIT is answered with `pod=<name> local=<address:port> peer=<address:port>`.
//! The TCP line `echo` turns the connection into one that returns every byte.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::namespace::Namespace;
use super::{lock, sctp};

/// A transport protocol which the lab can speak.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP: one packet each way, over raw sockets. Ports that are not served are silent.
    Sctp,
}

impl Proto {
    /// A socket of the calling thread's namespace, which does not block, that can reach, or listen on, such an address.
    pub(super) fn socket(self, address: SocketAddr) -> io::Result<Socket> {
        let (kind, protocol) = match self {
            Self::Tcp => (Type::STREAM, None),
            Self::Udp => (Type::DGRAM, None),
            Self::Sctp => (Type::RAW, Some(sctp::PROTOCOL.into())),
        };
        Socket::new(Domain::for_address(address), kind.nonblocking(), protocol)
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

impl Namespace {
    /// Opens echo servers; an unspecified address (`0.0.0.0`, `::`) stands for all of its family. Ready on return.
    pub fn serve(&self, servers: impl IntoIterator<Item = (Proto, SocketAddr)>) -> Result<()> {
        self.with_echo(|echo| {
            for (proto, address) in servers {
                echo.ask(|reply| Request::Open(proto, address, reply))
                    .with_context(|| format!("serve {proto} {address} in {}", self.name()))?;
            }
            Ok(())
        })
    }

    /// Opens echo servers on these ports, TCP and UDP, on every address of both families.
    pub fn serve_ports(&self, ports: impl IntoIterator<Item = u16>) -> Result<()> {
        let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)];
        self.serve(ports.into_iter().flat_map(|port| {
            any.into_iter().flat_map(move |address| {
                [Proto::Tcp, Proto::Udp].map(|proto| (proto, SocketAddr::new(address, port)))
            })
        }))
    }

    /// Closes an echo server opened with the same address; its established TCP connections go on.
    pub fn stop_serving(&self, proto: Proto, address: SocketAddr) -> Result<()> {
        self.with_echo(|echo| echo.ask(|reply| Request::Close(proto, address, reply)))
    }
}

enum Request {
    Open(Proto, SocketAddr, mpsc::Sender<Result<()>>),
    Close(Proto, SocketAddr, mpsc::Sender<Result<()>>),
}

/// One thread in the namespace runs all of its servers.
#[derive(Debug)]
pub(super) struct EchoServer {
    requests: Option<UnboundedSender<Request>>,
    thread: Option<thread::JoinHandle<Result<()>>>,
}

impl EchoServer {
    pub(super) fn start(namespace: &Namespace) -> Result<Self> {
        let (requests, receiver) = unbounded_channel();
        let names = Names { namespace: namespace.name().to_owned(), pods: namespace.pods() };
        let thread = namespace.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(serve(receiver, Arc::new(names)));
            Ok(())
        })?;
        Ok(Self { requests: Some(requests), thread: Some(thread) })
    }

    fn ask(&self, request: impl FnOnce(mpsc::Sender<Result<()>>) -> Request) -> Result<()> {
        let (reply, answer) = mpsc::channel();
        let requests = self.requests.as_ref().context("echo server stopped")?;
        requests.send(request(reply)).ok().context("echo server ended")?;
        answer.recv().context("echo server ended")?
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

struct Names {
    namespace: String,
    pods: Arc<Mutex<BTreeMap<IpAddr, String>>>,
}

impl Names {
    fn line(&self, local: SocketAddr, peer: SocketAddr) -> String {
        let pods = lock(&self.pods);
        let pod = pods.get(&local.ip()).unwrap_or(&self.namespace);
        format!("pod={pod} local={local} peer={peer}\n")
    }
}

/// A server under way; it closes when `close` is dropped.
struct Server {
    close: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn serve(mut requests: UnboundedReceiver<Request>, names: Arc<Names>) {
    let mut servers: HashMap<(Proto, SocketAddr), Server> = HashMap::new();
    while let Some(request) = requests.recv().await {
        // Whoever asked may have given up waiting; that is no concern of the servers.
        match request {
            Request::Open(proto, address, reply) => {
                let opened = open(proto, address, &names);
                drop(reply.send(opened.map(|server| {
                    servers.insert((proto, address), server);
                })));
            }
            Request::Close(proto, address, reply) => {
                let Some(server) = servers.remove(&(proto, address)) else {
                    drop(reply.send(Err(anyhow::anyhow!("{proto} {address} is not served"))));
                    continue;
                };
                drop(server.close);
                drop(reply.send(server.task.await.context("a server ended early")));
            }
        }
    }
}

fn open(proto: Proto, address: SocketAddr, names: &Arc<Names>) -> Result<Server> {
    let socket = proto.socket(address)?;
    // A raw socket is of one family anyway, and the kernel takes no such wish for it.
    if address.is_ipv6() && proto != Proto::Sctp {
        socket.set_only_v6(true)?;
    }
    let names = Arc::clone(names);
    let (close, closed) = oneshot::channel();
    let task = match proto {
        Proto::Tcp => {
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())?;
            socket.listen(4096)?;
            let listener = TcpListener::from_std(socket.into())?;
            tokio::spawn(accept(listener, closed, names))
        }
        Proto::Udp | Proto::Sctp => {
            // Says on which address a datagram arrived: the answer must come from there.
            if address.is_ipv4() {
                setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
            } else {
                setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
            }
            let port = if proto == Proto::Udp { address.port() } else { 0 };
            socket.bind(&SocketAddr::new(address.ip(), port).into())?;
            let socket = UdpSocket::from_std(socket.into())?;
            tokio::spawn(async move {
                tokio::select! {
                    _ = closed => {}
                    () = answer_datagrams(socket, proto, address.port(), names) => {}
                }
            })
        }
    };
    Ok(Server { close, task })
}

async fn accept(listener: TcpListener, mut closed: oneshot::Receiver<()>, names: Arc<Names>) {
    let talk = |stream, peer| {
        let names = Arc::clone(&names);
        // A client that goes away mid-sentence is part of many tests.
        tokio::spawn(async move { drop(converse(stream, peer, &names).await) });
    };
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((stream, peer)) = accepted {
                talk(stream, peer);
            },
            _ = &mut closed => break,
        }
    }
    // Whoever is connected but not yet accepted would be reset.
    let Ok(listener) = listener.into_std() else { return };
    while let Ok((stream, peer)) = listener.accept() {
        if stream.set_nonblocking(true).is_ok()
            && let Ok(stream) = TcpStream::from_std(stream)
        {
            talk(stream, peer);
        }
    }
}

async fn converse(mut stream: TcpStream, peer: SocketAddr, names: &Names) -> io::Result<()> {
    let answer = names.line(stream.local_addr()?, peer);
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let mut line = String::new();
    while reader.read_line(&mut line).await? > 0 {
        if line == "echo\n" {
            writer.as_ref().set_nodelay(true)?;
            tokio::io::copy_buf(&mut reader, &mut writer).await?;
            break;
        }
        writer.write_all(answer.as_bytes()).await?;
        line.clear();
    }
    Ok(())
}

/// Of a raw socket, too: tokio asks nothing of a UDP socket that it cannot do.
async fn answer_datagrams(socket: UdpSocket, proto: Proto, port: u16, names: Arc<Names>) {
    loop {
        if socket.readable().await.is_err() {
            return;
        }
        // An earlier answer's ICMP error may show up here; it concerns nobody.
        drop(socket.try_io(Interest::READABLE, || answer_datagram(&socket, proto, port, &names)));
    }
}

fn answer_datagram(socket: &UdpSocket, proto: Proto, port: u16, names: &Names) -> io::Result<()> {
    let mut payload = [0; 2048];
    let mut buffer = [IoSliceMut::new(&mut payload)];
    let mut space = nix::cmsg_space!(in6_pktinfo, in_pktinfo);
    let fd = socket.as_raw_fd();
    let received = recvmsg::<SockaddrStorage>(fd, &mut buffer, Some(&mut space), MsgFlags::empty())?;
    let peer = received.address.and_then(socket_addr).ok_or(io::ErrorKind::InvalidData)?;
    let local = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::from(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::from(Ipv6Addr::from(info.ipi6_addr.s6_addr)))
        }
        _ => None,
    });
    let local = local.ok_or(io::ErrorKind::InvalidData)?;
    let length = received.bytes;

    let answer = if proto == Proto::Sctp {
        // A raw socket sees packets to all ports.
        let init = sctp::Init::parse(sctp::payload(&payload[..length], local.is_ipv4()));
        let Some(init) = init.filter(|init| init.to == port) else { return Ok(()) };
        init.answer(&names.line(SocketAddr::new(local, port), SocketAddr::new(peer.ip(), init.from)))
    } else {
        names.line(SocketAddr::new(local, port), peer).into_bytes()
    };
    let buffer = [IoSlice::new(&answer)];
    let to = Some(SockaddrStorage::from(peer));
    // Interface 0: whichever the route says.
    match local {
        IpAddr::V4(local) => {
            let ipi_spec_dst = in_addr { s_addr: u32::from(local).to_be() };
            let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst, ipi_addr: in_addr { s_addr: 0 } };
            let from = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &buffer, &from, MsgFlags::empty(), to.as_ref())?;
        }
        IpAddr::V6(local) => {
            let info = in6_pktinfo { ipi6_addr: in6_addr { s6_addr: local.octets() }, ipi6_ifindex: 0 };
            let from = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &buffer, &from, MsgFlags::empty(), to.as_ref())?;
        }
    }
    Ok(())
}

/// The address of an IPv4 or IPv6 socket.
pub(super) fn socket_addr(address: SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4(SocketAddrV4::from(*v4)));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6(SocketAddrV6::from(*v6))))
}

/// Parses an echo server's line.
pub(super) fn parse_line(line: &str) -> Result<(String, SocketAddr, SocketAddr)> {
    let mut words = line.split_whitespace();
    let mut word = |key: &str| words.next().and_then(|word| word.strip_prefix(key));
    let (Some(pod), Some(local), Some(peer)) = (word("pod="), word("local="), word("peer=")) else {
        bail!("not an echo server's line: {line:?}");
    };
    Ok((pod.to_owned(), local.parse()?, peer.parse()?))
}
