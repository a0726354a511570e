//! Deletes tracked flows that outlived their endpoint, by ctnetlink.
//!
//! ```text
//!   StaleFlows ──filters──> dump, filtered by the kernel ──judge──> delete, one by one
//!       ▲
//!   Schedule says when, and whose flows
//! ```
//!
//! What is stale is decided in `shunt_core::stale`; here it is only asked for and carried out. A flow
//! that the kernel forgets is not lost: its next packet is taken for the first one of a new flow.
//! Start reading at [`clean`], then [`schedule`].

pub mod netlink;
pub mod schedule;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use shunt_core::id::{Protocol, ServicePortName};
use shunt_core::stale::{Flow, FlowFilter, StaleFlows};

pub use netlink::{Connections, Netlink};

/// The kernel walks its whole table for every dump: more filters than this, and one dump of all flows
/// of the protocol is cheaper.
const MOST_DUMPS: usize = 4;
/// How often a dump is done again that the kernel could not finish in one piece.
const DUMP_ATTEMPTS: u32 = 4;

/// Why flows could not be listed or deleted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConntrackError {
    /// The socket could not be opened or used.
    #[error("conntrack netlink socket: cannot {what}: {source}")]
    Socket {
        /// What was asked for.
        what: String,
        /// What the socket says.
        source: netlink_requests::Error,
    },
    /// The agent may not do this.
    #[error("cannot {what}: the capability CAP_NET_ADMIN is missing")]
    NotPermitted {
        /// What was asked for.
        what: String,
    },
    /// The kernel refused.
    #[error("cannot {what}: {source}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel's table changed too much while it was dumped.
    #[error("listing flows was interrupted {DUMP_ATTEMPTS} times")]
    Interrupted,
}

/// How a dump went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dump {
    /// Flows that the kernel sent.
    pub received: u64,
    /// It may have missed some.
    pub interrupted: bool,
    /// It sent flows that were not asked for: this kernel does not filter.
    pub unfiltered: bool,
}

/// What became of a flow that was to be deleted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is deleted.
    Deleted,
    /// It was gone before.
    Gone,
    /// The kernel refused, with this error number.
    Refused(i32),
}

/// The kernel's table of tracked flows.
pub trait Conntrack {
    /// Lists flows. More than asked for may be handed on, by kernels that do not filter.
    fn dump(&mut self, filter: &FlowFilter, each: &mut dyn FnMut(Flow)) -> Result<Dump, ConntrackError>;

    /// Deletes flows; the fates are in the same order.
    fn delete(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError>;
}

/// What a clean-up did, finished or not.
#[derive(Debug, Default)]
pub struct Report {
    /// Flows deleted, by protocol and by who holds the frontend; nobody if it is gone.
    pub deleted: BTreeMap<(Protocol, Option<ServicePortName>), u64>,
    /// Flows that the kernel sent.
    pub received: u64,
    /// Dumps asked for.
    pub dumps: u32,
    /// Flows that the kernel refused to delete.
    pub refused: u64,
    /// Why it is not finished.
    pub error: Option<ConntrackError>,
}

impl Report {
    /// Flows deleted.
    pub fn deleted_total(&self) -> u64 {
        self.deleted.values().sum()
    }
}

/// Counts of all clean-ups of a family, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Clean-ups done.
    pub runs: u64,
    /// Clean-ups that failed, wholly or in part, and were tried again.
    pub failures: u64,
    /// Flows deleted.
    pub deleted: u64,
    /// How long the last one took.
    pub last: Duration,
}

impl Totals {
    /// Counts one more.
    pub fn add(&mut self, report: &Report, took: Duration) {
        self.runs += 1;
        self.failures += u64::from(report.error.is_some());
        self.deleted += report.deleted_total();
        self.last = took;
    }
}

/// Deletes all flows that are stale.
pub fn clean(conntrack: &mut impl Conntrack, stale: &StaleFlows) -> Report {
    let mut report = Report::default();
    if let Err(error) = clean_into(conntrack, stale, &mut report) {
        report.error = Some(error);
    }
    report
}

fn clean_into(
    conntrack: &mut impl Conntrack,
    stale: &StaleFlows,
    report: &mut Report,
) -> Result<(), ConntrackError> {
    let mut refused = None;
    for filter in stale.filters(MOST_DUMPS) {
        let mut attempts = 0;
        let dump = loop {
            let mut found = Vec::new();
            let dump = conntrack.dump(&filter, &mut |flow| {
                if stale.judge(&flow).is_some() {
                    found.push(flow);
                }
            })?;
            report.dumps += 1;
            report.received += dump.received;
            let fates = conntrack.delete(&found)?;
            // What was found goes even if not everything was found.
            for (flow, fate) in found.iter().zip(fates) {
                match fate {
                    Fate::Deleted => {
                        let holder = stale.judge(flow).and_then(|rule| rule.holder.clone());
                        *report.deleted.entry((flow.protocol, holder)).or_default() += 1;
                    }
                    Fate::Gone => {}
                    Fate::Refused(errno) => {
                        report.refused += 1;
                        refused.get_or_insert((*flow, errno));
                    }
                }
            }
            attempts += 1;
            if !dump.interrupted {
                break dump;
            }
            if attempts == DUMP_ATTEMPTS {
                return Err(ConntrackError::Interrupted);
            }
        };
        if dump.unfiltered {
            // All flows of the family were there to be judged.
            break;
        }
    }
    match refused {
        None => Ok(()),
        Some((flow, errno)) => Err(netlink::refusal(format!("delete flow {flow}"), errno)),
    }
}

#[cfg(test)]
mod tests;
