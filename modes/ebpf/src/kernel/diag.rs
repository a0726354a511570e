//! The kernel's sockets over `NETLINK_SOCK_DIAG`, as the calling thread's network namespace has them.

use netlink_requests::protocols::NETLINK_SOCK_DIAG;
use netlink_requests::{Batch, Error, Refusal, Socket};
use shunt_ebpf_abi::Address;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `TCP_ESTABLISHED`, which connected sockets of UDP are too, `TCP_SYN_SENT`, `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2` and
/// `TCP_CLOSE_WAIT`.
const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8;
/// Bytes of `struct inet_diag_sockid`.
const ID: usize = 48;
/// No such socket: it was closed meanwhile.
const GONE: [i32; 2] = [libc::ENOENT, libc::ENOTCONN];

/// A connected socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Connected {
    family: u8,
    /// As the kernel has it: ports, addresses, device, cookie.
    id: [u8; ID],
}

impl Connected {
    /// The kernel's cookie.
    pub(super) fn cookie(&self) -> u64 {
        let word =
            |at: usize| self.id.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes);
        u64::from(word(44)) << 32 | u64::from(word(40))
    }

    /// The port of its peer, network byte order.
    pub(super) const fn port(&self) -> u16 {
        u16::from_ne_bytes([self.id[2], self.id[3]])
    }

    /// The address of its peer.
    pub(super) fn address(&self) -> Address {
        let word = |n: usize| {
            let at = 20 + 4 * n;
            self.id.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        if self.family == libc::AF_INET as u8 {
            Address::v4(word(0))
        } else {
            Address([word(0), word(1), word(2), word(3)])
        }
    }
}

/// Asks about sockets, and destroys some.
#[derive(Debug)]
pub(super) struct Diag(Socket);

impl Diag {
    pub(super) fn open() -> Result<Self, Error> {
        Socket::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Hands connected sockets of a protocol to `each`.
    pub(super) fn connected(&mut self, protocol: u8, mut each: impl FnMut(Connected)) -> Result<(), Error> {
        for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
            let request = request(family, protocol, &[0; ID]);
            let asked = self.0.dump(
                SOCK_DIAG_BY_FAMILY,
                |writer| writer.header(&request),
                |payload| {
                    // struct inet_diag_msg: family, state, timer, retransmissions, then the id.
                    let id = payload.get(4..).and_then(|rest| rest.first_chunk());
                    if let (Some(family), Some(id)) = (payload.first(), id) {
                        each(Connected { family: *family, id: *id });
                    }
                    Ok(())
                },
            );
            match asked {
                // A kernel without this family.
                Err(Error::Refused(refusal)) if refusal.errno == libc::ENOENT => {}
                asked => asked?,
            }
        }
        Ok(())
    }

    /// Destroys sockets: whoever waits for one gets `ECONNABORTED`. How many there still were.
    pub(super) fn destroy(&mut self, protocol: u8, sockets: &[Connected]) -> Result<usize, Error> {
        let mut batch = Batch::default();
        for socket in sockets {
            let request = request(socket.family, protocol, &socket.id);
            batch.push(SOCK_DESTROY, 0, |writer| writer.header(&request));
        }
        let refusals = self.0.execute(&mut batch)?;
        let is_gone = |refusal: &&Refusal| GONE.contains(&refusal.errno);
        let gone = refusals.iter().filter(is_gone).count();
        match refusals.into_iter().find(|refusal| !GONE.contains(&refusal.errno)) {
            Some(refusal) => Err(Error::Refused(refusal)),
            None => Ok(sockets.len() - gone),
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, id: &[u8; ID]) -> [u8; 8 + ID] {
    let mut request = [0; 8 + ID];
    request[0] = family;
    request[1] = protocol;
    request[4..8].copy_from_slice(&CONNECTED.to_ne_bytes());
    request[8..].copy_from_slice(id);
    request
}
