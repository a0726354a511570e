//! Connect, one byte there, one byte back, close: how many a second one core can do.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::SocketAddrV4;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{Sources, cpu_time};

/// What to connect to.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct ExchangeSpec {
    /// Targets; each connection takes one at random.
    pub targets: Vec<SocketAddrV4>,
    /// Where connections come from.
    pub sources: Sources,
    /// Connections under way at the same time.
    pub concurrency: usize,
    /// For how long.
    pub duration: Duration,
}

/// What was done.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Exchanges {
    /// Exchanges a second.
    pub per_second: f64,
    /// Processor time of the client for each, microseconds: its system calls and the whole way of its
    /// packets.
    pub cpu_us: f64,
    /// Connections that failed.
    pub failed: u64,
    /// Exchanges by the last byte of the address of the pod that answered.
    pub by_pod: BTreeMap<u8, u64>,
}

pub(super) fn run(spec: &ExchangeSpec) -> Result<Exchanges> {
    ensure!(!spec.targets.is_empty(), "no targets");
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let mut next = 0;
    let mut open = |slot: u64| -> Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_reuse_address(true)?;
        socket.set_tcp_nodelay(true)?;
        loop {
            let from = spec.sources.nth(next);
            next += 1;
            match socket.bind(&from.into()) {
                // Somebody else has the port, such as whoever waited for the rules.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                bound => break bound.with_context(|| format!("bind {from}"))?,
            }
        }
        let target = SockAddr::from(spec.targets[fastrand::usize(..spec.targets.len())]);
        match socket.connect(&target) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => return Err(error.into()),
            _ => {}
        }
        epoll.add(socket.as_fd(), EpollEvent::new(EpollFlags::EPOLLOUT, slot))?;
        Ok(socket)
    };

    let mut sockets = Vec::new();
    for slot in 0..spec.concurrency {
        sockets.push(open(slot as u64)?);
    }
    let (mut done, mut failed) = (0_u64, 0_u64);
    let mut by_pod = BTreeMap::new();
    let (started, before) = (Instant::now(), cpu_time()?);
    let mut events = vec![EpollEvent::empty(); spec.concurrency];
    while started.elapsed() < spec.duration {
        let ready = epoll.wait(&mut events, EpollTimeout::from(100_u8))?;
        for event in events.iter().take(ready) {
            let slot = event.data() as usize;
            let socket = &mut sockets[slot];
            let over = if event.events().contains(EpollFlags::EPOLLOUT) {
                let sent = socket.write(b"x");
                let mut answer = EpollEvent::new(EpollFlags::EPOLLIN, event.data());
                epoll.modify(socket.as_fd(), &mut answer)?;
                sent.map(|_| false)
            } else {
                let mut pod = [0];
                socket.read(&mut pod).map(|length| {
                    *by_pod.entry(pod[0]).or_insert(0) += u64::from(length == 1);
                    true
                })
            };
            match over {
                Ok(false) => continue,
                Ok(true) => done += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(_) => failed += 1,
            }
            // Closing takes it out of epoll, too.
            *socket = open(slot as u64)?;
        }
    }
    let (elapsed, used) = (started.elapsed(), cpu_time()?.saturating_sub(before));
    ensure!(done > 0, "not one exchange succeeded, {failed} failed");
    Ok(Exchanges {
        per_second: done as f64 / elapsed.as_secs_f64(),
        cpu_us: used.as_secs_f64() * 1e6 / done as f64,
        failed,
        by_pod,
    })
}
