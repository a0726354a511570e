//! The kernel's load balancer (IPVS) over generic netlink, in pure Rust.
//!
//! ```text
//!   Ipvs::open ──> services, destinations ──> Vec<Service>, Vec<Destination>
//!        └──────> Commands::{add,set,delete}_{service,destination} ──Ipvs::execute──> refusals
//! ```
//!
//! Everything that `ipvsadm` shows and sets except the synchronisation daemon. Commands are sent in
//! batches; the kernel carries out each on its own, so that one that is refused leaves the others in
//! force. Attributes that are not known are passed over: newer kernels may add some.
//!
//! Start reading at [`Ipvs`], then [`Service`] and [`Destination`].

#![forbid(unsafe_code)]

mod commands;
mod destination;
mod service;
mod socket;
mod stats;

pub use commands::Commands;
pub use destination::{Destination, DestinationEntry, Forwarding};
pub use netlink_requests::{Error as NetlinkError, Refusal};
pub use service::{Flags, Persistence, Protocol, Service, ServiceEntry, ServiceKey};
pub use socket::{Config, Error, Info, Ipvs};
pub use stats::Stats;

/// Decoders on raw attributes, for tests with arbitrary bytes.
#[doc(hidden)]
pub mod raw {
    /// Decodes a service nest and a destination nest; anything may come out, but no panic.
    pub fn decode(bytes: &[u8]) {
        let _ = crate::service::decode(bytes);
        for family in [crate::service::AF_INET, crate::service::AF_INET6, 0] {
            let _ = crate::destination::decode(bytes, family);
        }
        let _ = crate::stats::decode(bytes);
        let _ = crate::socket::decode_config(bytes);
        let _ = crate::socket::decode_info(bytes);
        let _ = crate::socket::family_id(bytes);
    }
}
