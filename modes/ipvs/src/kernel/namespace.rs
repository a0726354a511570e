//! The network namespace in which the mode was opened. Sockets stay in it on their own; processes and
//! `/proc/sys/net` are those of the calling thread's.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use nix::sched::{CloneFlags, setns};

const CURRENT: &str = "/proc/thread-self/ns/net";

/// A network namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    file: File,
    inode: u64,
}

impl Namespace {
    /// That of the calling thread.
    pub(super) fn current() -> io::Result<Self> {
        let file = File::open(CURRENT)?;
        let inode = file.metadata()?.ino();
        Ok(Self { file, inode })
    }

    /// Does something in the namespace: on a thread of its own if the calling one is in another. Without
    /// the privilege to go there it is done where the caller is.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let here = std::fs::metadata(CURRENT).is_ok_and(|m| m.ino() == self.inode);
        if here {
            return work();
        }
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                if let Err(error) = setns(&self.file, CloneFlags::CLONE_NEWNET) {
                    tracing::warn!("cannot enter the network namespace: {error}");
                }
                work()
            });
            match thread.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}
