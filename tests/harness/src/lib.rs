//! Test harness.

pub mod apiserver;
#[cfg(feature = "cases")]
pub mod cases;
pub mod guest;
pub mod lab;
#[cfg(feature = "cases")]
pub mod settings;
