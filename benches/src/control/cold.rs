//! From the start of the process to the last rule, in an empty kernel and over what is there.

use std::time::Duration;

use anyhow::{Result, ensure};
use nft_netlink::{Family, Socket, TableId};
use serde::{Deserialize, Serialize};

use super::lock::{self, LockWait};
use super::memory::{self, Memory};
use crate::agent::{Agent, Api, FirstSync, Program};
use crate::bed::Bed;
use crate::cluster::{Cluster, Shape};
use crate::subject::{PATIENCE, sample};

/// A cold start.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Cold {
    /// Which program.
    pub subject: String,
    /// Number of Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// From the start of the process until connections to Services all over the cluster come up, ms; the
    /// fastest repetition.
    pub whole_ms: f64,
    /// What Shunt says of the first sync of that repetition.
    pub first_sync: Option<FirstSync>,
    /// Processor time, its tools included, ms.
    pub cpu_ms: f64,
    /// Memory.
    pub memory: Memory,
    /// Longest waits for the kernel's locks, in a repetition of its own.
    pub lock_wait: LockWait,
    /// Chains and sets in the kernel's `nf_tables` (an nft flavoured iptables has chains there, too).
    pub chains_and_sets: [usize; 2],
}

/// What takes so long is started no third time.
const LONG: Duration = Duration::from_secs(10);

pub(super) fn measure(program: &Program, cluster: &Cluster, repetitions: u32) -> Result<Cold> {
    let mut best: Option<Cold> = None;
    let mut lock_wait = LockWait::default();
    // The first repetition meets cold memory; its time is only used for what the locks cost others.
    for repetition in 0..=repetitions {
        let bed = Bed::new(false, program.works_on_sockets())?;
        let api = Api::start(&bed, cluster)?;
        let locks = (repetition == 0).then(|| lock::Watch::start(&bed)).transpose()?;
        let mut agent = Agent::start(&bed, &api, program)?;
        let watch = memory::Watch::start(agent.id())?;
        let whole = agent.wait_until_served(&bed, &sample(&cluster.frontends()), PATIENCE)?;
        let first_sync = match program {
            Program::Shunt { .. } => Some(agent.first_sync(Duration::from_secs(10))?),
            Program::KubeProxy { .. } => None,
        };
        std::thread::sleep(Duration::from_millis(300));
        if let Some(locks) = locks {
            lock_wait = locks.finish()?;
            watch.finish()?;
            continue;
        }
        let cold = Cold {
            subject: program.name(),
            services: cluster.shape.services,
            endpoints: cluster.shape.endpoints,
            whole_ms: whole.as_secs_f64() * 1e3,
            first_sync,
            cpu_ms: agent.cpu()?.as_secs_f64() * 1e3,
            memory: watch.finish()?,
            lock_wait,
            // A kernel without nf_tables, such as the guest's, has none.
            chains_and_sets: bed.node().run(chains_and_sets).unwrap_or_default(),
        };
        if best.as_ref().is_none_or(|best| cold.whole_ms < best.whole_ms) {
            best = Some(cold);
        }
        if whole > LONG {
            break;
        }
    }
    best.ok_or_else(|| anyhow::anyhow!("no repetition"))
}

/// A restart over what the process before has left.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Restart {
    /// Which program.
    pub subject: String,
    /// Number of Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// From the start of the process until it says that it is in sync, ms; the fastest repetition.
    pub whole_ms: f64,
    /// Processor time of that start, ms.
    pub cpu_ms: f64,
    /// What it says of the sync. Its operations must be none.
    pub first_sync: FirstSync,
}

pub(super) fn restart(
    program: &Program,
    bed: &Bed,
    api: &Api,
    shape: Shape,
    repetitions: u32,
) -> Result<Restart> {
    let mut best: Option<Restart> = None;
    for _ in 0..repetitions {
        let mut agent = Agent::start(bed, api, program)?;
        let first_sync = agent.first_sync(PATIENCE)?;
        let whole_ms = agent.started.elapsed().as_secs_f64() * 1e3;
        let cpu_ms = agent.cpu()?.as_secs_f64() * 1e3;
        agent.stop()?;
        ensure!(
            first_sync.operations == 0,
            "a restart over unchanged rules wrote {} operations",
            first_sync.operations
        );
        if best.as_ref().is_none_or(|best| whole_ms < best.whole_ms) {
            let Shape { services, endpoints, .. } = shape;
            best =
                Some(Restart { subject: program.name(), services, endpoints, whole_ms, cpu_ms, first_sync });
        }
    }
    best.ok_or_else(|| anyhow::anyhow!("no repetition"))
}

fn chains_and_sets() -> Result<[usize; 2]> {
    let mut socket = Socket::new()?;
    let mut count = [0; 2];
    for table in socket.dump_tables(Family::Ip)? {
        let table = TableId::new(Family::Ip, &table.name);
        count[0] += socket.dump_chains(table)?.len();
        count[1] += socket.dump_sets(table)?.len();
    }
    Ok(count)
}
