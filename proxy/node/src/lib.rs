//! The node around the modes: what every mode needs of it, and no mode should ask for itself.
//!
//! ```text
//!   rtnetlink ──> addresses of all interfaces, now and whenever they change
//! ```
//!
//! Nothing in here knows what a Service is. Start reading at [`addresses`].

#![forbid(unsafe_code)]

pub mod addresses;
