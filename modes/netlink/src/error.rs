//! What can go wrong.

use std::fmt;
use std::io;

/// Why a request had no answer, or none that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket failed.
    #[error("cannot {what}")]
    Socket {
        /// What was being done.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The kernel refused a request.
    #[error("the kernel refused: {0}")]
    Refused(Refusal),
    /// What is listed changed while it was listed.
    #[error("what was listed changed meanwhile")]
    Interrupted,
    /// An attribute or a message does not fit into its length.
    #[error("message {0} is too large")]
    Oversized(usize),
    /// The kernel answered something else than was asked for.
    #[error("the answer lacks {0}")]
    Malformed(&'static str),
    /// The kernel carried out what was asked, or not: the answer was lost.
    #[error("the answer was lost")]
    Unanswered,
}

/// One message that the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which message of the batch, from 0.
    pub index: usize,
    /// The kernel's error number, positive.
    pub errno: i32,
    /// The kernel's own words, if it had any.
    pub message: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.errno))?;
        match &self.message {
            Some(message) => write!(f, " ({message})"),
            None => Ok(()),
        }
    }
}
