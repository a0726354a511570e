//! Servers, pinned to a core of their own.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use super::Ports;

/// Seconds that the kernel keeps an unfinished connection to itself.
static DEFER: libc::c_int = 30;
const BACKLOG: i32 = 65_535;
/// As many reads of one connection in a row, so that streams cannot starve the others.
const READS: usize = 16;

/// Serves until killed.
///
/// The silent port answers SYN with SYN/ACK in the kernel and wakes nobody until data come (which never
/// do): `connect` is timed without the server's scheduling.
pub(super) fn serve(ports: Ports) -> Result<()> {
    let any = |port| SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    let _silent = silent_listener(any(ports.silent))?;
    let echo = bound(any(ports.echo))?;
    echo.listen(BACKLOG)?;
    println!("serving");

    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let listener = echo.as_raw_fd() as u64;
    epoll.add(echo.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, listener))?;
    let mut connections: HashMap<u64, Socket> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in events.iter().take(ready) {
            if event.data() == listener {
                while let Ok((socket, _)) = echo.accept() {
                    socket.set_nonblocking(true)?;
                    socket.set_tcp_nodelay(true)?;
                    socket.set_linger(Some(Duration::ZERO))?;
                    let id = socket.as_raw_fd() as u64;
                    epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, id))?;
                    connections.insert(id, socket);
                }
            } else if connections
                .get_mut(&event.data())
                .is_some_and(|socket| answer(socket, &mut buffer).is_err())
            {
                connections.remove(&event.data());
            }
        }
    }
}

/// Reads what is there; for a single byte the last one of our own address goes back, which tells the pods
/// apart. An error when the connection is over.
fn answer(socket: &mut Socket, buffer: &mut [u8]) -> io::Result<()> {
    for _ in 0..READS {
        match socket.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(1) => {
                let own = socket.local_addr()?.as_socket_ipv4().map_or(0, |address| address.ip().octets()[3]);
                return socket.write_all(&[own]);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A listener that completes handshakes in the kernel and has nothing to accept.
pub(crate) fn silent_listener(address: SocketAddrV4) -> io::Result<Socket> {
    let socket = bound(address)?;
    defer_accept(&socket)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// `TCP_DEFER_ACCEPT`, which no crate of ours offers.
#[allow(unsafe_code)]
fn defer_accept(socket: &Socket) -> io::Result<()> {
    let (value, length) = ((&raw const DEFER).cast(), size_of_val(&DEFER) as libc::socklen_t);
    // SAFETY: the descriptor is open; the pointer and the length are those of an int, as tcp(7) asks for.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, value, length)
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

fn bound(address: SocketAddrV4) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
