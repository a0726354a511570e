//! How long others had to wait for the kernel's table locks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nft_netlink::{Batch, Family, Socket, TableId};
use serde::{Deserialize, Serialize};

use crate::bed::Bed;

/// Longest waits, ms.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LockWait {
    /// For the lock of `nf_tables` transactions, one for each network namespace.
    pub nf_tables_ms: f64,
    /// For the lock of legacy iptables, one for the machine.
    pub xtables_ms: f64,
}

/// Two threads that take a lock each, again and again.
pub(super) struct Watch {
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<Result<Duration>>; 2],
}

impl Watch {
    /// Begins to take the locks in the node's namespace.
    pub(super) fn start(bed: &Bed) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let nf_tables = bed.node().thread(move || {
            let mut socket = Socket::new()?;
            // A table that is there already: the kernel takes the lock and finds nothing to do.
            let mut batch = Batch::new();
            batch.add_table(TableId::new(Family::Ip, "shunt-bench"), None);
            if socket.commit(&batch).is_err() {
                // A kernel without nf_tables, such as the guest's, has no such lock.
                return Ok(Duration::ZERO);
            }
            longest(&stopped, || Ok(socket.commit(&batch)?))
        })?;
        let stopped = Arc::clone(&stop);
        let xtables = bed.node().thread(move || {
            // Listing the tables takes the lock; without the module there is nothing to wait for.
            longest(&stopped, || {
                let _ = std::fs::read("/proc/thread-self/net/ip_tables_names");
                Ok(())
            })
        })?;
        Ok(Self { stop, threads: [nf_tables, xtables] })
    }

    /// The longest waits.
    pub(super) fn finish(self) -> Result<LockWait> {
        self.stop.store(true, Ordering::Relaxed);
        let [nf_tables_ms, xtables_ms] = self.threads.map(|thread| {
            let longest = thread.join().map_err(|_| anyhow!("the lock watch panicked"))??;
            Ok::<_, anyhow::Error>(longest.as_secs_f64() * 1e3)
        });
        Ok(LockWait { nf_tables_ms: nf_tables_ms?, xtables_ms: xtables_ms? })
    }
}

fn longest(stop: &AtomicBool, mut take: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let started = Instant::now();
        take()?;
        longest = longest.max(started.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(longest)
}
