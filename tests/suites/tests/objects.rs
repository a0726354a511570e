//! Objects of all sorts, sound and unsound, through everything that is pure: the corpus of the fuzz
//! target, and every object of every case.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use shunt_suites::mode::ModeUnderTest;
use shunt_suites::objects::take_in;

fn nothing_panics<M: ModeUnderTest>() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/objects");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&corpus).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 10, "the corpus is gone");
    for file in files {
        println!("{}", file.display());
        take_in::<M>(&std::fs::read(&file).unwrap());
    }
}

shunt_suites::every_mode!(nothing_panics);
