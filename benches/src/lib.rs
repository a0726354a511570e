//! What is measured without a kernel: see [`change`]. The rest of this package is the program `shunt-bench`.

#![forbid(unsafe_code)]

pub mod change;
