//! Test harness.

pub mod apiserver;
