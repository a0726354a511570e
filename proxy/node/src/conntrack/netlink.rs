//! The real table of flows, by ctnetlink.

use std::io;

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter};

use super::{Conntrack, ConntrackError, Dump, Fate, wire};

/// Deletions sent at once: as many as their acknowledgements have room in the receive buffer.
const BATCH: usize = 128;
const RECEIVE_BUFFER: usize = 1 << 20;
/// The kernel fills messages of a dump up to 32 KiB if it sees that the reader offers as much.
const MESSAGE_BUFFER: usize = 64 << 10;

const SEND_FAILED: fn(io::Error) -> ConntrackError =
    |source| ConntrackError::Socket { what: "send a request", source };
const RECEIVE_FAILED: fn(io::Error) -> ConntrackError =
    |source| ConntrackError::Socket { what: "receive an answer", source };

/// The flows of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

pub(super) fn refusal(what: String, errno: i32) -> ConntrackError {
    if errno == Errno::EPERM as i32 {
        ConntrackError::NotPermitted { what }
    } else {
        ConntrackError::Refused { what, source: io::Error::from_raw_os_error(errno) }
    }
}

impl Netlink {
    /// Opens a socket; privileges are only needed for what is done with it.
    pub fn open() -> Result<Self, ConntrackError> {
        let fail = |what| move |source| ConntrackError::Socket { what, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(fail("open"))?;
        socket.bind_auto().map_err(fail("bind"))?;
        // Connected to the kernel, it hears nobody else.
        socket.connect(&SocketAddr::new(0, 0)).map_err(fail("connect"))?;
        // Acknowledgements need not repeat the request; kernels too old for that do.
        let _ = socket.set_cap_ack(true);
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER))
            .map_err(|e| fail("size the receive buffer")(e.into()))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(MESSAGE_BUFFER) })
    }

    /// Asks for a dump and hands on its flows. `Err` inside is the kernel's error number.
    fn try_dump(
        &mut self,
        filter: &FlowFilter,
        filter_in_kernel: bool,
        each: &mut dyn FnMut(Flow, &[u8]),
    ) -> Result<Result<Dump, Errno>, ConntrackError> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut request = Vec::new();
        wire::dump(&mut request, sequence, filter, filter_in_kernel);
        self.send(&request).map_err(SEND_FAILED)?;
        let mut dump = Dump::default();
        loop {
            self.receive(MsgFlags::empty()).map_err(RECEIVE_FAILED)?;
            for message in Messages(&self.buffer).filter(|m| m.sequence_number() == sequence) {
                dump.interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return Ok(match errno_of(message.payload()) {
                            None => Ok(dump),
                            Some(Errno::EINTR) => Ok(Dump { interrupted: true, ..dump }),
                            Some(errno) => Err(errno),
                        });
                    }
                    wire::NEW => {
                        dump.received += 1;
                        let attributes = message.payload().get(wire::NETFILTER_HEADER..).unwrap_or_default();
                        let flow = wire::flow(attributes);
                        dump.unfiltered |= flow.is_none_or(|flow| !filter.matches(&flow));
                        if let Some(flow) = flow {
                            each(flow, attributes);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Lists all flows of a family that Services may have, with the bytes of both directions so far, that of
    /// the client first. They are zero unless `net.netfilter.nf_conntrack_acct` is set.
    pub fn list(
        &mut self,
        family: IpFamily,
        each: &mut dyn FnMut(Flow, [u64; 2]),
    ) -> Result<Dump, ConntrackError> {
        let filter = FlowFilter { family, protocol: Protocol::Tcp, address: None, port: None };
        let each = &mut |flow, attributes: &[u8]| each(flow, wire::bytes(attributes));
        let listed = self.try_dump(&filter, false, each)?;
        listed.map_err(|errno| refusal(format!("list {family} flows"), errno as i32))
    }

    fn delete_batch(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError> {
        let mut request = Vec::with_capacity(flows.len() * 128);
        let first = self.sequence.wrapping_add(1);
        for flow in flows {
            self.sequence = self.sequence.wrapping_add(1);
            wire::delete(&mut request, self.sequence, flow);
        }
        self.send(&request).map_err(SEND_FAILED)?;
        let mut fates = vec![None; flows.len()];
        let mut missing = flows.len();
        while missing > 0 {
            // The kernel has answered all of them before the send came back.
            self.receive(MsgFlags::MSG_DONTWAIT).map_err(RECEIVE_FAILED)?;
            for message in Messages(&self.buffer).filter(|m| m.message_type() == NLMSG_ERROR) {
                let index = message.sequence_number().wrapping_sub(first) as usize;
                let Some(fate @ None) = fates.get_mut(index) else { continue };
                missing -= 1;
                *fate = Some(match errno_of(message.payload()) {
                    None => Fate::Deleted,
                    Some(Errno::ENOENT) => Fate::Gone,
                    Some(errno) => Fate::Refused(errno as i32),
                });
            }
        }
        Ok(fates.into_iter().flatten().collect())
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Receives one datagram of messages into the buffer.
    fn receive(&mut self, flags: MsgFlags) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, (flags | MsgFlags::MSG_TRUNC).bits()) {
                Ok(length) if length > self.buffer.len() => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "the kernel sent more than it may",
                    ));
                }
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl Conntrack for Netlink {
    fn dump(&mut self, filter: &FlowFilter, each: &mut dyn FnMut(Flow)) -> Result<Dump, ConntrackError> {
        let fail = |errno: Errno| refusal(format!("list flows {filter}"), errno as i32);
        let filter = &wire::what_the_kernel_can(filter);
        let each = &mut |flow, _: &[u8]| each(flow);
        match self.try_dump(filter, true, each)? {
            Ok(dump) => Ok(dump),
            // Kernels before 5.8 ignore filters; others may know filters, but not this one.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => self.try_dump(filter, false, each)?.map_err(fail),
            Err(errno) => Err(fail(errno)),
        }
    }

    fn delete(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError> {
        let mut fates = Vec::with_capacity(flows.len());
        for batch in flows.chunks(BATCH) {
            fates.extend(self.delete_batch(batch)?);
        }
        Ok(fates)
    }
}

/// The messages of a datagram.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = NetlinkBuffer<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = NetlinkBuffer::new_checked(self.0).ok()?;
        self.0 = self.0.get((message.length() as usize).next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

/// The error number that an error or done message starts with, if it is one.
fn errno_of(payload: &[u8]) -> Option<Errno> {
    let code = i32::from_ne_bytes(*payload.first_chunk()?);
    (code != 0).then(|| Errno::from_raw(code.saturating_neg()))
}
