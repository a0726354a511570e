//! Tests that run in a guest kernel: the test binary starts itself there.

use std::ffi::OsStr;
use std::process::Command;

use super::Guest;
use crate::skip;

/// Set to `1` in a guest. Set by hand, it lets the tests run in the machine's own kernel instead, which must then
/// have what they need.
pub const INSIDE: &str = "SHUNT_IN_GUEST";

/// What passes into the guest: what tests are told through.
const PASSED: &[&str] = &["SHUNT_", "RUST_", "PROPTEST_"];

/// Whether this process is in a guest, or to act as if it were.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some_and(|value| value == "1")
}

/// How to run guests; nothing where that cannot be, which is printed, and a failure with `SHUNT_REQUIRE_KERNEL=1`.
pub fn require_guest() -> Option<Guest> {
    Guest::new().inspect_err(|missing| skip(&format!("{missing:#}"))).ok()
}

/// Runs a test in a guest: in one, calls `test`; outside, starts the same test of this binary in a guest of its own
/// and fails if it fails there.
///
/// `path` is what `module_path!()` says beside the function that has `#[test]`, `name` its name. Where there is no
/// guest kernel, [`require_guest`] decides.
///
/// ```no_run
/// #[test]
/// fn kernel_has_ipvs() {
///     shunt_harness::guest::test_in_guest(module_path!(), "kernel_has_ipvs", || {
///         assert!(std::path::Path::new("/proc/net/ip_vs").exists());
///     });
/// }
/// ```
///
/// # Panics
/// When the test failed, or did not run at all.
#[allow(clippy::panic)] // What a failing test does.
pub fn test_in_guest(path: &str, name: &str, test: impl FnOnce()) {
    if inside() {
        return test();
    }
    let Some(guest) = require_guest() else { return };
    // The test runner's names start below the crate.
    let modules = path.split_once("::").map(|(_, modules)| format!("{modules}::")).unwrap_or_default();
    let binary = std::env::current_exe().unwrap_or_else(|error| panic!("find this test's binary: {error}"));
    let mut command = Command::new(binary);
    command.args([&format!("{modules}{name}"), "--exact", "--include-ignored", "--nocapture"]);
    let passed =
        |key: &OsStr| key.to_str().is_some_and(|key| PASSED.iter().any(|start| key.starts_with(start)));
    command.envs(std::env::vars_os().filter(|(key, _)| passed(key))).env(INSIDE, "1");
    let output = guest.run(&command).unwrap_or_else(|error| panic!("{error:#}"));
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    println!("{stdout}{stderr}");
    assert!(output.status.success(), "failed in the guest: {}", output.status);
    assert!(stdout.contains("test result: ok. 1 passed"), "{modules}{name} did not run in the guest");
}
