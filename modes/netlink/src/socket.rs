//! The conversation with the kernel.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
};
use netlink_sys::SocketAddr;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};

use crate::batch::{Batch, MESSAGE_HEADER, Messages};
use crate::error::{Error, Refusal};
use crate::wire::{Attributes, Writer, text};

/// Room for a batch. Only a limit: the kernel allocates what a batch needs.
const SEND_BUFFER: usize = 16 << 20;
/// Room for the answers to a batch in which tens of thousands of messages are refused.
const RECEIVE_BUFFER: usize = 16 << 20;
/// The kernel fills messages of a dump up to 32 KiB if it sees that the reader offers as much.
const MESSAGE_BUFFER: usize = 64 << 10;
const EXT_ACK_MESSAGE: u16 = 1;

/// A netlink socket in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Socket { what, source }
}

impl Socket {
    /// Opens a socket for a protocol of `netlink(7)`. Privileges are only needed for what is done with it.
    pub fn open(protocol: isize) -> Result<Self, Error> {
        let mut inner = netlink_sys::Socket::new(protocol).map_err(failed("open a netlink socket"))?;
        inner.bind_auto().map_err(failed("bind a netlink socket"))?;
        // Connected to the kernel, it hears nobody else.
        inner.connect(&SocketAddr::new(0, 0)).map_err(failed("connect a netlink socket"))?;
        // Explanations are welcome, echoes of requests are not; kernels too old for either do without.
        let _ = inner.set_ext_ack(true);
        let _ = inner.set_cap_ack(true);
        setsockopt(&inner, sockopt::SndBufForce, &SEND_BUFFER)
            .or_else(|_| setsockopt(&inner, sockopt::SndBuf, &SEND_BUFFER))
            .map_err(|e| failed("size the send buffer")(e.into()))?;
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .or_else(|_| setsockopt(&inner, sockopt::RcvBuf, &RECEIVE_BUFFER))
            .map_err(|e| failed("size the receive buffer")(e.into()))?;
        Ok(Self { inner, sequence: 0, buffer: Vec::with_capacity(MESSAGE_BUFFER) })
    }

    /// Hands messages to the kernel and answers which of them it refused, first ones first. An empty
    /// batch is not sent.
    pub fn execute(&mut self, batch: &mut Batch) -> Result<Vec<Refusal>, Error> {
        if let Some(index) = batch.oversized {
            return Err(Error::Oversized(index));
        }
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let first = self.sequence.wrapping_add(1);
        batch.seal(first);
        let last = self.sequence.wrapping_add(batch.len() as u32);
        self.sequence = last;
        self.send(&batch.buf)?;
        let mut refusals = Vec::new();
        let mut lost = false;
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    // Too many refusals for the receive buffer: the first ones are still in it.
                    lost = true;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(failed("receive an answer")(e)),
            }
            for message in Messages::new(&self.buffer) {
                let Some((errno, words)) = answer(&message) else { continue };
                let index = message.sequence_number().wrapping_sub(first) as usize;
                if errno != 0 && index < batch.len() {
                    refusals.push(Refusal { index, errno, message: words });
                }
                if message.sequence_number() == last {
                    return Ok(refusals);
                }
            }
        }
        if refusals.is_empty() || !lost { Err(Error::Unanswered) } else { Ok(refusals) }
    }

    /// Sends one request and hands the payload of each answer to `each`, until the kernel says that
    /// there are no more.
    pub fn request(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Writer<'_>),
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(kind, 0, body);
        if let Some(index) = batch.oversized {
            return Err(Error::Oversized(index));
        }
        self.sequence = self.sequence.wrapping_add(1);
        batch.seal(self.sequence);
        self.send(&batch.buf)?;
        let mut result = Ok(());
        loop {
            self.receive(MsgFlags::empty()).map_err(failed("receive an answer"))?;
            for message in Messages::new(&self.buffer) {
                if message.sequence_number() != self.sequence {
                    continue;
                }
                match answer(&message) {
                    Some((0, _)) => return result,
                    Some((errno, message)) => {
                        return Err(Error::Refused(Refusal { index: 0, errno, message }));
                    }
                    None if result.is_ok() => result = each(message.payload()),
                    None => {}
                }
            }
        }
    }

    /// Asks for a dump and hands the payload of each of its messages to `each`. Always reads to the
    /// end, since the kernel starts no second dump on the same socket before.
    ///
    /// After [`Error::Interrupted`] forget what was seen and ask again.
    pub fn dump(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Writer<'_>),
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(kind, NLM_F_DUMP, body);
        if let Some(index) = batch.oversized {
            return Err(Error::Oversized(index));
        }
        self.sequence = self.sequence.wrapping_add(1);
        // An answer to the request besides the dump would come in addition.
        let mut message = NetlinkBuffer::new(&mut batch.buf[..]);
        message.set_sequence_number(self.sequence);
        self.send(&batch.buf)?;
        let mut result = Ok(());
        let mut interrupted = false;
        loop {
            self.receive(MsgFlags::empty()).map_err(failed("receive an answer"))?;
            for message in Messages::new(&self.buffer) {
                if message.sequence_number() != self.sequence {
                    continue;
                }
                interrupted |= message.flags() & NLM_F_DUMP_INTR != 0;
                match message.message_type() {
                    NLMSG_DONE | NLMSG_ERROR => {
                        let errno = errno_of(message.payload());
                        return match Errno::from_raw(errno) {
                            Errno::EINTR => Err(Error::Interrupted),
                            _ if errno != 0 => {
                                let words = answer(&message).and_then(|(_, words)| words);
                                Err(Error::Refused(Refusal { index: 0, errno, message: words }))
                            }
                            _ if interrupted => Err(Error::Interrupted),
                            _ => result,
                        };
                    }
                    _ if result.is_ok() => result = each(message.payload()),
                    _ => {}
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        loop {
            match self.inner.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed("send a request")(e)),
            }
        }
    }

    /// Receives one datagram of messages into the buffer.
    fn receive(&mut self, flags: MsgFlags) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.inner.recv(&mut self.buffer, (flags | MsgFlags::MSG_TRUNC).bits()) {
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

/// The error number that an error or done message starts with, positive; 0 for none.
fn errno_of(payload: &[u8]) -> i32 {
    payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code).saturating_neg())
}

/// The error number of an answer, 0 for success, and the kernel's words; `None` for other messages.
fn answer(message: &NetlinkBuffer<&[u8]>) -> Option<(i32, Option<String>)> {
    if message.message_type() != NLMSG_ERROR {
        return None;
    }
    let payload = message.payload();
    let mut words = None;
    if message.flags() & NLM_F_ACK_TLVS != 0 {
        // They follow the error number and the request, or only its header if the request was cut.
        let request = payload.get(4..).unwrap_or_default();
        let length = match NetlinkBuffer::new_checked(request) {
            Ok(whole) if message.flags() & NLM_F_CAPPED == 0 => whole.length() as usize,
            _ => MESSAGE_HEADER,
        };
        let attributes = request.get(length.next_multiple_of(4)..).unwrap_or_default();
        words = Attributes::find(attributes, EXT_ACK_MESSAGE).and_then(text).map(str::to_owned);
    }
    Some((errno_of(payload), words))
}

#[cfg(test)]
mod tests {
    use netlink_sys::protocols::NETLINK_ROUTE;
    use proptest::prelude::*;

    use super::*;

    const fn assert_send<T: Send>() {}
    const _: () = assert_send::<Socket>();

    const RTM_GETLINK: u16 = 18;
    const RTM_NEWLINK: u16 = 16;

    #[test]
    fn links_are_dumped_and_nonsense_is_refused_by_number() {
        let mut socket = Socket::open(NETLINK_ROUTE).unwrap();
        let mut messages = 0;
        socket
            .dump(
                RTM_GETLINK,
                |w| w.header(&[0; 16]),
                |payload| {
                    assert!(payload.len() > 16);
                    messages += 1;
                    Ok(())
                },
            )
            .unwrap();
        assert!(messages > 0, "there is always a loopback interface");

        let mut batch = Batch::default();
        let mut link = [0; 16];
        // An interface that does not exist: refused before anything is touched.
        link[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        batch.push(RTM_GETLINK, 0, |w| w.header(&link));
        batch.push(RTM_NEWLINK, 0, |w| w.header(&link));
        batch.push(RTM_GETLINK, 0, |w| w.header(&link));
        let refusals = socket.execute(&mut batch).unwrap();
        assert_eq!(refusals.iter().map(|r| r.index).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(socket.execute(&mut Batch::default()).unwrap(), []);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200), flags in any::<u16>()
        ) {
            for message in Messages::new(&bytes) {
                let _ = (answer(&message), errno_of(message.payload()));
            }
            let mut error = vec![0; MESSAGE_HEADER];
            error.extend_from_slice(&bytes);
            let length = error.len() as u32;
            let mut message = NetlinkBuffer::new(&mut error);
            message.set_length(length);
            message.set_message_type(NLMSG_ERROR);
            message.set_flags(flags);
            for message in Messages::new(&error) {
                prop_assert!(answer(&message).is_some());
            }
        }
    }
}
