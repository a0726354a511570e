//! The conversation with the kernel.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
};
use netlink_sys::SocketAddr;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, getsockopt, setsockopt, sockopt};

use crate::batch::{Batch, Messages};
use crate::error::{Error, Refusal};
use crate::wire::{Attributes, MESSAGE_HEADER, Writer, native32, text};

/// Room for a batch of most families.
const SEND_BUFFER: usize = 16 << 20;
/// Room for the answers to a batch in which tens of thousands of messages are refused.
const RECEIVE_BUFFER: usize = 16 << 20;
/// The kernel fills messages of a dump up to 32 KiB if it sees that the reader offers as much.
const MESSAGE_BUFFER: usize = 64 << 10;
/// Numbers of requests start here, so that late answers to batches that others number (from 0) are not
/// taken for theirs.
const FIRST: u32 = 0x8000_0000;
const EXT_ACK_MESSAGE: u16 = 1;
const EXT_ACK_OFFSET: u16 = 2;

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
        Self::open_for(protocol, SEND_BUFFER)
    }

    /// Opens a socket that takes so many bytes in one batch. Only a limit: the kernel allocates what a
    /// batch needs.
    pub fn open_for(protocol: isize, batch: usize) -> Result<Self, Error> {
        let mut inner = netlink_sys::Socket::new(protocol).map_err(failed("open a netlink socket"))?;
        inner.bind_auto().map_err(failed("bind a netlink socket"))?;
        // Connected to the kernel, it hears nobody else.
        inner.connect(&SocketAddr::new(0, 0)).map_err(failed("connect a netlink socket"))?;
        // Explanations are welcome, echoes of requests are not; kernels too old for either do without.
        let _ = inner.set_ext_ack(true);
        let _ = inner.set_cap_ack(true);
        setsockopt(&inner, sockopt::SndBufForce, &batch)
            .or_else(|_| setsockopt(&inner, sockopt::SndBuf, &batch))
            .map_err(|e| failed("size the send buffer")(e.into()))?;
        setsockopt(&inner, sockopt::RcvBufForce, &RECEIVE_BUFFER)
            .or_else(|_| setsockopt(&inner, sockopt::RcvBuf, &RECEIVE_BUFFER))
            .map_err(|e| failed("size the receive buffer")(e.into()))?;
        Ok(Self { inner, sequence: FIRST, buffer: Vec::with_capacity(MESSAGE_BUFFER) })
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
        let first = self.number(batch.len() as u32);
        batch.seal(first);
        let last = self.sequence;
        self.send(batch.as_bytes()).map_err(failed("send a request"))?;
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
                let Some(answer) = Answer::read(&message) else { continue };
                let (sequence, index) = (answer.sequence, answer.sequence.wrapping_sub(first) as usize);
                if answer.errno != 0 && index < batch.len() {
                    refusals.push(answer.refusal(index));
                }
                if sequence == last {
                    return Ok(refusals);
                }
            }
        }
        if refusals.is_empty() {
            return Err(Error::Unanswered);
        }
        // Families that want privileges for everything answer the first message and drop the rest.
        if lost { Ok(refusals) } else { Err(Error::Refused(refusals.swap_remove(0))) }
    }

    /// Takes the next numbers; the first of them.
    fn number(&mut self, count: u32) -> u32 {
        self.sequence = self.sequence.checked_add(count).unwrap_or(FIRST + count);
        self.sequence - count + 1
    }

    /// Sends one request and hands the payload of each answer to `each`, until the kernel says that
    /// there are no more.
    pub fn request(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(kind, 0, body);
        if let Some(index) = batch.oversized {
            return Err(Error::Oversized(index));
        }
        batch.seal(self.number(1));
        self.send(batch.as_bytes()).map_err(failed("send a request"))?;
        let mut result = Ok(());
        loop {
            self.receive(MsgFlags::empty()).map_err(failed("receive an answer"))?;
            for message in Messages::new(&self.buffer) {
                if message.sequence_number() != self.sequence {
                    continue;
                }
                match Answer::read(&message) {
                    Some(answer) if answer.errno == 0 => return result,
                    Some(answer) => return Err(Error::Refused(answer.refusal(0))),
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
        body: impl FnOnce(&mut Writer),
        mut each: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut batch = Batch::default();
        batch.push(kind, NLM_F_DUMP, body);
        if let Some(index) = batch.oversized {
            return Err(Error::Oversized(index));
        }
        batch.number(self.number(1));
        self.send(batch.as_bytes()).map_err(failed("send a request"))?;
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
                                let words = Answer::read(&message).and_then(|answer| answer.message);
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

    /// The size of the send buffer: larger messages do not go through.
    pub fn send_buffer(&self) -> io::Result<usize> {
        Ok(getsockopt(&self.inner, sockopt::SndBuf)?)
    }

    /// Sends messages that somebody else has numbered. For families whose batches are more than a row of
    /// messages; what comes back is for [`Socket::answers`].
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.inner.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The messages of the next datagram that is there already; none is `WouldBlock`.
    pub fn answers(&mut self) -> io::Result<Messages<'_>> {
        self.receive(MsgFlags::MSG_DONTWAIT)?;
        Ok(Messages::new(&self.buffer))
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

/// The kernel's answer to one message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The number of the message.
    pub sequence: u32,
    /// The error number, positive; 0 is an acknowledgement.
    pub errno: i32,
    /// The kernel's own words, if it had any.
    pub message: Option<String>,
    /// Where in the message the kernel saw the fault: the offset of an attribute from the start of the
    /// message's header.
    pub attribute_offset: Option<u32>,
}

impl Answer {
    /// Reads an answer; `None` for other messages.
    pub fn read(message: &NetlinkBuffer<&[u8]>) -> Option<Self> {
        if message.message_type() != NLMSG_ERROR {
            return None;
        }
        let payload = message.payload();
        let mut answer =
            Self { sequence: message.sequence_number(), errno: errno_of(payload), ..Self::default() };
        if message.flags() & NLM_F_ACK_TLVS != 0 {
            // They follow the error number and the request, or only its header if the request was cut.
            let request = payload.get(4..).unwrap_or_default();
            let length = match NetlinkBuffer::new_checked(request) {
                Ok(whole) if message.flags() & NLM_F_CAPPED == 0 => whole.length() as usize,
                _ => MESSAGE_HEADER,
            };
            let attributes = request.get(length.next_multiple_of(4)..).unwrap_or_default();
            for (kind, value) in Attributes::new(attributes) {
                match kind {
                    EXT_ACK_MESSAGE => answer.message = text(value).map(str::to_owned),
                    EXT_ACK_OFFSET => answer.attribute_offset = native32(value),
                    _ => {}
                }
            }
        }
        Some(answer)
    }

    fn refusal(self, index: usize) -> Refusal {
        Refusal { index, errno: self.errno, message: self.message }
    }
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

    /// An error message as the kernel writes it.
    fn error(sequence: u32, code: i32, flags: u16, tail: &[u8]) -> Vec<u8> {
        let mut w = Writer::default();
        let body = [&code.to_ne_bytes()[..], tail].concat();
        w.message(NLMSG_ERROR, flags, sequence, &body, |_| {});
        w.as_bytes().to_vec()
    }

    #[test]
    fn explanations_are_found() {
        let mut explanation = Writer::default();
        explanation.string(EXT_ACK_MESSAGE, "No!");
        explanation.attribute(EXT_ACK_OFFSET, &48_u32.to_ne_bytes());
        let mut request = Writer::default();
        request.message(0, 0, 7, &[0; 4], |w| w.u32(1, 1));

        let cut = [&request.as_bytes()[..MESSAGE_HEADER], explanation.as_bytes()].concat();
        let whole = [request.as_bytes(), explanation.as_bytes()].concat();
        for (flags, tail) in [(NLM_F_ACK_TLVS | NLM_F_CAPPED, cut), (NLM_F_ACK_TLVS, whole)] {
            let bytes = error(7, -2, flags, &tail);
            let answer = Answer::read(&Messages::new(&bytes).next().unwrap()).unwrap();
            let message = Some("No!".to_owned());
            assert_eq!(answer, Answer { sequence: 7, errno: 2, message, attribute_offset: Some(48) });
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..200), code in any::<i32>(), flags in any::<u16>()
        ) {
            for message in Messages::new(&bytes) {
                let _ = (Answer::read(&message), errno_of(message.payload()));
            }
            let error = error(1, code, flags, &bytes);
            for message in Messages::new(&error) {
                prop_assert!(Answer::read(&message).is_some());
            }
        }
    }
}
