//! What the socket hooks remember.

use crate::{Address, size};

/// A socket and one of its peers.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SocketKey {
    /// The kernel's cookie of the socket.
    pub cookie: u64,
    /// The frontend's address ([`SocketKey::FORWARD`]), or the endpoint's ([`SocketKey::REVERSE`]).
    pub address: Address,
    /// The port that goes with it, network byte order.
    pub port: u16,
    /// One of the two directions.
    pub direction: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero.
    pub reserved: u32,
}

impl SocketKey {
    /// From frontend to endpoint (UDP only): the socket stays with its endpoint.
    pub const FORWARD: u8 = 0;
    /// From endpoint to frontend: what the socket is told who answered.
    pub const REVERSE: u8 = 1;
}

/// The other side of a [`SocketKey`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SocketRecord {
    /// The endpoint's address ([`SocketKey::FORWARD`]), or the frontend's ([`SocketKey::REVERSE`]).
    pub address: Address,
    /// The port that goes with it, network byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
    /// Service id.
    pub service: u32,
    /// Endpoint id.
    pub endpoint: u32,
    /// Its generation.
    pub generation: u32,
}

/// What a socket was promised that is connected to a frontend, in a ring by the socket's cookie ([`Peer::place`]): the
/// kernel counts cookies up, so that a record lives until as many sockets have come as the ring has places.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Peer {
    /// The kernel's cookie of the socket; 0 while somebody writes.
    pub cookie: u64,
    /// The endpoint's address.
    pub endpoint: Address,
    /// The frontend's address.
    pub frontend: Address,
    /// The endpoint's port, network byte order.
    pub endpoint_port: u16,
    /// The frontend's port, network byte order.
    pub frontend_port: u16,
    /// Service id.
    pub service: u32,
    /// Endpoint id.
    pub id: u32,
    /// Its generation.
    pub generation: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Zero; with it a record is one line of a cache.
    pub reserved: [u8; 7],
}

impl Peer {
    /// The place of a socket's record.
    #[inline(always)]
    pub const fn place(cookie: u64) -> u32 {
        cookie as u32 & (size::PEERS - 1)
    }
}

const _: () = {
    assert!(size::PEERS.is_power_of_two());
    assert!(size_of::<Peer>() == 64);
    assert!(size_of::<SocketKey>() == 32);
    assert!(size_of::<SocketRecord>() == 32);
};
