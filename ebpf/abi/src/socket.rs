//! What the socket hooks remember.

use crate::Address;

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

const _: () = {
    assert!(size_of::<SocketKey>() == 32);
    assert!(size_of::<SocketRecord>() == 32);
};
