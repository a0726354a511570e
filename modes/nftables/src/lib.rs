//! nftables mode: a few flat maps and a handful of chains, whatever the number of Services.
//!
//! ```text
//!            services            classes              endpoints
//!   packet ──────────> class ──────────────> chain ──────────────> dnat
//!            one lookup          one lookup           one lookup, slot by numgen
//! ```
//!
//! A change of endpoints is a few elements of maps. No chain and no set belongs to a single Service
//! or endpoint, and nothing is anonymous. Only the tables `ip shunt` and `ip6 shunt` are touched.
//! Everything happens in three hooks of type nat, which see the first packet of each connection.
//!
//! Start reading at [`layout`], then [`rules`], then [`plan`]. [`kernel`] is the only file that
//! touches the kernel.

#![forbid(unsafe_code)]

pub mod layout;
pub mod plan;
pub mod render;
pub mod rules;
pub mod state;
pub mod trace;

use shunt_core::id::IpFamily;

pub(crate) const fn family(family: IpFamily) -> nft_netlink::Family {
    match family {
        IpFamily::V4 => nft_netlink::Family::Ip,
        IpFamily::V6 => nft_netlink::Family::Ip6,
    }
}
