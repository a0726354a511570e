//! What every mode makes of each case, in the words of the mode's own tool, beside the case; and the
//! tool itself reads it.
//!
//! `SHUNT_BLESS=1` writes the texts anew.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use shunt_core::id::IpFamily;
use shunt_harness::cases;
use shunt_harness::lab::{Lab, require_kernel};
use shunt_mode::rendered;
use shunt_suites::driver::CaseRun;
use shunt_suites::every_kernel;
use shunt_suites::golden::Goldens;
use shunt_suites::mode::ModeUnderTest;

fn every_step_of_every_case_renders_to_its_text<M: ModeUnderTest>() {
    let lab = require_kernel().then(|| Lab::builder().build().unwrap());
    let mut goldens = Goldens::default();
    let mut refused = Vec::new();
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, M::MODE);
        while let Some(step) = run.next_step() {
            let path = step.folder.join(format!("{}.golden", M::MODE));
            let states = IpFamily::ALL.map(|family| rendered::<M::Fake>(run.cluster.table(family)));
            let text = states.map(|state| state.to_string()).concat();
            if let Some(lab) = &lab
                && let Err(error) = M::check_text(lab.node(), &text)
            {
                refused.push(format!("{}: {error:#}", path.display()));
            }
            goldens.compare(&path, &text);
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    goldens.finish();
}

every_kernel!(every_step_of_every_case_renders_to_its_text);
