//! Bodies of answers: whole, or line by line, without waiting for ever.

use http_body_util::BodyExt;
use kube::client::Body;
use tokio::time::{Instant, timeout_at};

/// No object comes near this size (etcd's limit is 1.5 MiB); a line that grows on is garbage.
const LONGEST_LINE: usize = 64 << 20;

/// A body that arrives in pieces.
pub(super) struct Lines {
    body: Body,
    buffer: Vec<u8>,
    /// Start of what has not been given out.
    start: usize,
    /// Where to look on for the end of the line.
    scanned: usize,
}

/// Why there is no next piece.
#[derive(Debug)]
pub(super) enum NoLine {
    /// The body has ended, at the end of a line.
    End,
    /// The body ended within a line, broke, or kept us waiting.
    Broken(String),
}

impl Lines {
    pub(super) fn new(body: Body) -> Self {
        Self { body, buffer: Vec::new(), start: 0, scanned: 0 }
    }

    /// The next line that is not empty. `deadline` may be asked for anew for each piece.
    pub(super) async fn next(&mut self, deadline: impl Fn() -> Instant) -> Result<&[u8], NoLine> {
        loop {
            let rest = self.buffer.get(self.scanned..).unwrap_or_default();
            if let Some(length) = rest.iter().position(|b| *b == b'\n') {
                let (start, end) = (self.start, self.scanned + length);
                self.start = end + 1;
                self.scanned = self.start;
                if self.buffer[start..end].iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(&self.buffer[start..end]);
            }
            // Everything before has been given out: the memory is free for the next piece.
            self.buffer.drain(..self.start);
            self.start = 0;
            self.scanned = self.buffer.len();
            if self.scanned > LONGEST_LINE {
                return Err(NoLine::Broken("a line without end".to_owned()));
            }
            if !self.fill(deadline()).await.map_err(NoLine::Broken)? {
                return Err(if self.buffer.is_empty() {
                    NoLine::End
                } else {
                    NoLine::Broken("the connection ended within a line".to_owned())
                });
            }
        }
    }

    /// The whole body, for as long as pieces keep coming.
    pub(super) async fn all(
        mut self,
        deadline: impl Fn() -> Instant,
        most: usize,
    ) -> Result<Vec<u8>, String> {
        while self.buffer.len() < most && self.fill(deadline()).await? {}
        Ok(self.buffer)
    }

    /// Adds one piece; false at the end.
    async fn fill(&mut self, deadline: Instant) -> Result<bool, String> {
        loop {
            return match timeout_at(deadline, self.body.frame()).await {
                Err(_) => Err("no answer in time".to_owned()),
                Ok(None) => Ok(false),
                Ok(Some(Err(error))) => Err(super::reflector::chain(&error)),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        self.buffer.extend_from_slice(&data);
                        Ok(true)
                    }
                    Err(_trailers) => continue,
                },
            };
        }
    }
}
