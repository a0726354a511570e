//! What can go wrong.

use std::fmt;
use std::io;

use netlink_requests::Error as NetlinkError;

/// A request or a dump failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket could not be opened or used.
    #[error("netlink socket: cannot {what}")]
    Socket {
        /// The step that failed.
        what: &'static str,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The kernel refused the request.
    #[error("{request}: {source}")]
    Refused {
        /// The request.
        request: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The ruleset changed while it was dumped, so the dump may be inconsistent: ask again.
    #[error("{request}: the ruleset changed meanwhile")]
    Interrupted {
        /// The request.
        request: String,
    },
    /// An object the kernel sent lacks something this crate cannot do without.
    #[error("{request}: cannot understand the kernel's answer: {missing}")]
    Malformed {
        /// The request.
        request: String,
        /// What is missing or wrong.
        missing: &'static str,
    },
}

impl Error {
    pub(crate) fn of(request: String, error: NetlinkError) -> Self {
        match error {
            NetlinkError::Socket { what, source } => Self::Socket { what, source },
            NetlinkError::Refused(refusal) => {
                Self::Refused { request, source: io::Error::from_raw_os_error(refusal.errno) }
            }
            NetlinkError::Interrupted => Self::Interrupted { request },
            NetlinkError::Malformed(missing) => Self::Malformed { request, missing },
            _ => Self::Malformed { request, missing: "no answer" },
        }
    }

    /// The kernel's error number, if that is what failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Socket { source, .. } | Self::Refused { source, .. } => source.raw_os_error(),
            Self::Interrupted { .. } | Self::Malformed { .. } => None,
        }
    }
}

/// A transaction failed. Unless it is [`CommitError::Unanswered`] the kernel has changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// The kernel refused some operations, and therefore all of them. The first one is usually the cause of the others.
    #[error("{}", Failures(.0))]
    Refused(Vec<Refusal>),
    /// The ruleset is no longer of the generation the batch asked for: observe it again.
    #[error("the ruleset has changed since generation {expected}")]
    GenerationChanged {
        /// The generation given to [`Batch::at_generation`](crate::Batch::at_generation).
        expected: u32,
    },
    /// An attribute of this operation does not fit into netlink's 16-bit length.
    #[error("operation {index} ({description}) is too large for a netlink attribute")]
    Oversized {
        /// Which operation of the batch, from 0.
        index: usize,
        /// The operation in words.
        description: String,
    },
    /// The batch is larger than the socket's send buffer.
    #[error("a batch of {bytes} bytes does not fit the socket's send buffer of {limit} bytes")]
    TooLarge {
        /// The size of the batch.
        bytes: usize,
        /// The size of the send buffer.
        limit: usize,
    },
    /// The batch could not be sent.
    #[error("cannot send a batch of {bytes} bytes")]
    Send {
        /// The size of the batch.
        bytes: usize,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The batch was sent but its outcome is unknown: observe the ruleset again.
    #[error("the kernel's answer to the batch was lost")]
    Unanswered {
        /// Why, if the socket said so.
        source: Option<io::Error>,
    },
}

impl CommitError {
    /// The operation that failed first, if the kernel refused any.
    pub fn first(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusals) => refusals.first(),
            _ => None,
        }
    }
}

/// One operation the kernel refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which operation of the batch, counting calls of its methods from 0. `None` means the transaction as a whole,
    /// for instance when the final validation fails.
    pub index: Option<usize>,
    /// The operation in words: `add rule ip table chain`.
    pub description: String,
    /// The kernel's error number, positive.
    pub errno: i32,
    /// The kernel's own words, if it had any.
    pub message: Option<String>,
    /// Where in the message the kernel saw the fault: the offset of an attribute from the start of the message's header.
    pub attribute_offset: Option<u32>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            Some(index) => write!(f, "operation {index} ({})", self.description)?,
            None => f.write_str(&self.description)?,
        }
        write!(f, ": {}", io::Error::from_raw_os_error(self.errno))?;
        if let Some(message) = &self.message {
            write!(f, ": {message}")?;
        }
        Ok(())
    }
}

struct Failures<'a>(&'a [Refusal]);

impl fmt::Display for Failures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("the kernel refused the transaction"),
            [first] => write!(f, "the kernel refused {first}"),
            [first, rest @ ..] => write!(f, "the kernel refused {first} (and {} more)", rest.len()),
        }
    }
}
