//! Test harness.

pub mod apiserver;
pub mod lab;
