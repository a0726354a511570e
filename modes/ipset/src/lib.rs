//! Sets of the kernel's packet filter (ipset) over netlink, in pure Rust.
//!
//! ```text
//!   Ipset::open ──> list ──> Vec<(Set, Vec<Element>)>
//!        └──────> Commands::{create,add,delete,swap,destroy,flush} ──Ipset::execute──> refusals
//! ```
//!
//! The types are those that service proxies use: `hash:ip`, `hash:ip,port`, `hash:ip,port,ip`,
//! `hash:ip,port,net`, `hash:net` and `bitmap:port`, with `skbinfo` where a set maps to packet marks and
//! `timeout` where elements are forgotten.
//! Sets of other types are listed without their elements. Commands are sent in batches; the kernel
//! carries out each on its own.

#![forbid(unsafe_code)]

mod commands;
mod element;
mod set;
mod socket;

pub use commands::Commands;
pub use element::{Element, Entry, Mark};
pub use netlink_requests::{Error as NetlinkError, Refusal};
pub use set::{Family, Kind, Set};
pub use socket::{Error, Ipset, Listed};

/// The error number of a set that cannot be deleted because rules refer to it or somebody lists it.
const IN_USE: i32 = 4100;

/// Why the kernel refused a command, in words.
pub fn explain(refusal: &Refusal) -> String {
    meaning(refusal.errno).map_or_else(|| refusal.to_string(), str::to_owned)
}

/// What the kernel's own error numbers of ipset mean, beyond those of `errno(3)`.
fn meaning(errno: i32) -> Option<&'static str> {
    Some(match errno {
        4097 => "protocol error",
        4098 => "no such set type, or one of another revision",
        4099 => "too many sets",
        IN_USE => "the set is in use",
        4101 => "a set with this name exists already",
        4102 => "sets of different types",
        4103 => "the element is already there, or not there",
        4104 => "invalid prefix length",
        4105 => "invalid network",
        4106 => "invalid family",
        4107 => "invalid timeout",
        4108 => "the set is referenced",
        4109 => "IPv4 address out of range",
        4110 => "IPv6 address out of range",
        4352 => "the set is full",
        4353 | 4354 => "invalid protocol or port",
        _ => return None,
    })
}

/// Decoders on raw attributes, for tests with arbitrary bytes.
#[doc(hidden)]
pub mod raw {
    /// Decodes a message of a list; anything may come out, but no panic.
    pub fn decode(bytes: &[u8]) {
        let mut listed = Vec::new();
        let _ = crate::socket::take_in(bytes, &mut listed);
        for kind in crate::Kind::ALL {
            let _ = crate::element::decode(kind, bytes);
        }
    }
}
