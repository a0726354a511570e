//! The node around the modes: what every mode needs of it, and no mode should ask for itself.
//!
//! ```text
//!   rtnetlink ──> addresses of all interfaces, now and whenever they change
//!   ctnetlink <── deletes tracked flows that the core calls stale
//!   HTTP      ──> how the proxy is, and which Services have endpoints here
//!   sysctls   <── what connection tracking needs
//!   allocator <── what is not needed goes back
//! ```
//!
//! Nothing in here decides what a Service means. Start reading at [`addresses`], then [`conntrack`].

#![deny(unsafe_code)]

pub mod addresses;
pub mod conntrack;
pub mod health;
pub mod http;
pub mod memory;
pub mod sysctl;
