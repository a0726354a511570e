//! What is wrong with an object, in one line.

use std::fmt;

use crate::kind::Kind;

/// Something in an object or a file that cannot be used. The rest of it is used.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Problem {
    /// Kind of the object (`Service`), or `file`.
    pub kind: &'static str,
    /// `namespace/name` of the object, or path of the file.
    pub name: String,
    /// Path of the field, such as `spec.clusterIPs[0]`; a line for a file; empty for the whole.
    pub field: String,
    /// What is wrong, and what is done about it.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: ", self.kind, self.name)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        // One line, whatever a parser's message looks like.
        for (i, line) in self.message.lines().map(str::trim).filter(|l| !l.is_empty()).enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            f.write_str(line)?;
        }
        Ok(())
    }
}

/// Whether the API server is heard, for one kind of object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Contact {
    /// The kind whose list or watch this is about.
    pub kind: Kind,
    /// `None`: heard from just now (list complete, watch opened, bookmark). `Some`: why not.
    pub lost: Option<String>,
}

impl fmt::Display for Contact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.lost {
            None => write!(f, "{}: in touch with the API server", self.kind),
            Some(reason) => write!(f, "{}: lost the API server: {reason}", self.kind),
        }
    }
}
