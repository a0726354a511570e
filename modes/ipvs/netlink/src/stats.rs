//! What services and destinations carried.

use netlink_requests::{Attributes, native64};

/// Counters since the service or destination was made or zeroed, and rates per second (`STATS64`,
/// since Linux 4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Connections per second.
    pub connection_rate: u64,
    /// Packets from clients per second.
    pub packet_rate_in: u64,
    /// Packets to clients per second.
    pub packet_rate_out: u64,
    /// Bytes from clients per second.
    pub byte_rate_in: u64,
    /// Bytes to clients per second.
    pub byte_rate_out: u64,
}

pub(crate) fn decode(attributes: &[u8]) -> Stats {
    let number = |kind| Attributes::find(attributes, kind).and_then(native64).unwrap_or_default();
    Stats {
        connections: number(1),
        packets_in: number(2),
        packets_out: number(3),
        bytes_in: number(4),
        bytes_out: number(5),
        connection_rate: number(6),
        packet_rate_in: number(7),
        packet_rate_out: number(8),
        byte_rate_in: number(9),
        byte_rate_out: number(10),
    }
}
