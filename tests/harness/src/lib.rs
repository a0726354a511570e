//! Test harness.

pub mod apiserver;
#[cfg(feature = "cases")]
pub mod cases;
pub mod guest;
pub mod lab;
#[cfg(feature = "cases")]
pub mod settings;

/// Says that a test is skipped, and why; with `SHUNT_REQUIRE_KERNEL=1` it fails instead, so that a build machine
/// cannot pass by skipping.
fn skip(missing: &str) {
    let required = std::env::var_os("SHUNT_REQUIRE_KERNEL").is_some_and(|value| value == "1");
    assert!(!required, "SHUNT_REQUIRE_KERNEL=1 and missing: {missing}");
    eprintln!("skipped: {missing}");
}
