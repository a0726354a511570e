//! Test harness.

pub mod apiserver;
#[cfg(feature = "cases")]
pub mod cases;
pub mod lab;
#[cfg(feature = "cases")]
pub mod settings;
