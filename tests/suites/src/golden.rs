//! Expected texts in files.

use std::path::Path;

/// Compares texts with files and says at the end which ones differ.
#[derive(Debug, Default)]
pub struct Goldens {
    differing: Vec<String>,
}

impl Goldens {
    /// Compares a text with a file; with `SHUNT_BLESS=1` writes the file instead.
    pub fn compare(&mut self, path: &Path, text: &str) {
        if std::env::var_os("SHUNT_BLESS").is_some_and(|value| value == "1") {
            std::fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            return;
        }
        let expected = std::fs::read_to_string(path).unwrap_or_default();
        if expected != text {
            let line = expected.lines().zip(text.lines()).position(|(e, t)| e != t);
            let line = line.unwrap_or_else(|| expected.lines().count().min(text.lines().count()));
            let of = |text: &str| text.lines().nth(line).unwrap_or("(end)").to_owned();
            self.differing.push(format!(
                "{}:{}\n  expected: {}\n  got:      {}",
                path.display(),
                line + 1,
                of(&expected),
                of(text)
            ));
        }
    }

    /// Fails when any text differed.
    pub fn finish(self) {
        assert!(
            self.differing.is_empty(),
            "{} files differ (SHUNT_BLESS=1 writes them anew):\n{}",
            self.differing.len(),
            self.differing.join("\n")
        );
    }
}
