//! Names and default sizes of the maps.

/// One element: [`crate::Config`].
pub const CONFIG: &str = "config";
/// What is served where.
pub const FRONTENDS: &str = "frontends";
/// Endpoint ids of all groups.
pub const SLOTS: &str = "slots";
/// Endpoints by id.
pub const ENDPOINTS: &str = "endpoints";
/// What is known of single addresses.
pub const ADDRESSES: &str = "addresses";
/// Ranges of addresses, by owner.
pub const RANGES: &str = "ranges";
/// The node's devices.
pub const INTERFACES: &str = "interfaces";
/// Names of Service ports by service id. Programs do not look at it; it is not part of the object.
pub const NAMES: &str = "names";
/// Consistent-hashing tables by group.
pub const MAGLEV: &str = "maglev";
/// Session affinity.
pub const AFFINITY: &str = "affinity";
/// What sockets were promised that name the peer each time.
pub const SOCKETS: &str = "sockets";
/// What connected sockets were promised.
pub const PEERS: &str = "peers";
/// The connection table of tc.
pub const FLOWS: &str = "flows";
/// See [`crate::FlowFilter`].
pub const FLOW_FILTER: &str = "pairs_of_flows";
/// See [`crate::AddressFilter`].
pub const ADDRESS_FILTER: &str = "address_filter";
/// Ports of packets whose fragments are on the way.
pub const FRAGMENTS: &str = "fragments";
/// Counters per service id.
pub const SERVICE_STATS: &str = "service_stats";
/// Bytes per service id.
pub const SERVICE_BYTES: &str = "service_bytes";
/// Counters per endpoint id.
pub const ENDPOINT_STATS: &str = "endpoint_stats";
/// Counters of events that belong to no Service.
pub const EVENTS: &str = "events";

/// Default sizes, in elements.
pub mod size {
    /// `frontends`; service ids are smaller too.
    pub const FRONTENDS: u32 = 65_536;
    /// `slots`: two groups of each endpoint, in extents of which half may be unused.
    pub const SLOTS: u32 = 1_048_576;
    /// `endpoints`.
    pub const ENDPOINTS: u32 = 262_144;
    /// `addresses`.
    pub const ADDRESSES: u32 = 131_072;
    /// `ranges`.
    pub const RANGES: u32 = 65_536;
    /// `interfaces`.
    pub const INTERFACES: u32 = 16_384;
    /// `maglev`; each table takes 64 KiB besides.
    pub const MAGLEV: u32 = 4_096;
    /// `affinity`.
    pub const AFFINITY: u32 = 65_536;
    /// `sockets`.
    pub const SOCKETS: u32 = 131_072;
    /// `peers`: a power of two, always the same.
    pub const PEERS: u32 = 131_072;
    /// `flows`: two to four a connection.
    pub const FLOWS: u32 = 262_144;
    /// `fragments`.
    pub const FRAGMENTS: u32 = 8_192;
    /// `service_stats` and `service_bytes`, for service ids below the size of `frontends`.
    pub const SERVICE_STATS: u32 = FRONTENDS.div_ceil(crate::SERVICE_BLOCK);
    /// `endpoint_stats`.
    pub const ENDPOINT_STATS: u32 = ENDPOINTS.div_ceil(crate::ENDPOINT_BLOCK);
}
