//! Operations as messages: those of one kind that follow each other are sent together.

use ipvs_netlink::NetlinkError;
use shunt_mode::{KernelError, Remedy};

use super::{Linux, failed, link};
use crate::op::Op;
use crate::scheduler;

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
const EADDRNOTAVAIL: i32 = 99;

/// Operations of one kind that are sent together.
#[derive(Debug)]
pub(super) enum Batch {
    Servers(ipvs_netlink::Commands),
    Sets(ipset_netlink::Commands),
    Addresses(netlink_requests::Batch),
}

impl Batch {
    /// Whether an operation is of its kind.
    pub(super) const fn takes(&self, op: &Op) -> bool {
        match self {
            Self::Servers(_) => is_of_servers(op),
            Self::Sets(_) => is_of_sets(op),
            Self::Addresses(_) => is_of_addresses(op),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Servers(commands) => commands.bytes(),
            Self::Sets(commands) => commands.bytes(),
            Self::Addresses(batch) => batch.bytes(),
        }
    }
}

impl Linux {
    /// The batch for an operation: the open one if it is of its kind. `None` for those that are no
    /// messages.
    pub(super) fn batch_for(&mut self, op: &Op, open: Option<Batch>) -> Result<Option<Batch>, KernelError> {
        if open.as_ref().is_some_and(|batch| batch.takes(op)) {
            return Ok(open);
        }
        Ok(if is_of_servers(op) {
            Some(Batch::Servers(self.ipvs()?.commands()))
        } else if is_of_sets(op) {
            Some(Batch::Sets(ipset_netlink::Commands::default()))
        } else if is_of_addresses(op) {
            Some(Batch::Addresses(netlink_requests::Batch::default()))
        } else {
            None
        })
    }

    pub(super) fn encode(&mut self, batch: &mut Batch, op: &Op) -> Result<(), KernelError> {
        match (batch, op) {
            (Batch::Servers(commands), Op::AddServer(service)) => commands.add_service(service),
            (Batch::Servers(commands), Op::SetServer(service)) => commands.set_service(service),
            (Batch::Servers(commands), Op::DeleteServer(key)) => commands.delete_service(key),
            (Batch::Servers(commands), Op::AddDestination(key, destination)) => {
                commands.add_destination(key, destination);
            }
            (Batch::Servers(commands), Op::SetDestination(key, destination)) => {
                commands.set_destination(key, destination);
            }
            (Batch::Servers(commands), Op::DeleteDestination(key, address)) => {
                commands.delete_destination(key, *address);
            }
            (Batch::Sets(commands), Op::CreateSet(family, set)) => {
                commands.create(&set.declaration(*family));
            }
            (Batch::Sets(commands), Op::DestroySet(family, set)) => commands.destroy(&set.name(*family)),
            (Batch::Sets(commands), Op::AddElement(family, set, element)) => {
                commands.add(&set.name(*family), element);
            }
            (Batch::Sets(commands), Op::DeleteElement(family, set, entry)) => {
                commands.delete(&set.name(*family), &(*entry).into());
            }
            (Batch::Addresses(batch), Op::AddAddress(address) | Op::DeleteAddress(address)) => {
                let lost = |error: NetlinkError| failed("find the dummy link", error, Remedy::Resync);
                let index = self.links.index().map_err(lost)?;
                let index = index.ok_or_else(|| failed(op.to_string(), "no such link", Remedy::Resync))?;
                link::address(batch, index, *address, matches!(op, Op::AddAddress(_)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Sends a batch; `ops` are its operations.
    pub(super) fn send(&mut self, batch: Option<Batch>, ops: &[&Op]) -> Result<(), KernelError> {
        let Some(batch) = batch else { return Ok(()) };
        let unknown = |error: Box<dyn std::error::Error + Send + Sync>| {
            failed("talk to the kernel", error, Remedy::Retry)
        };
        let refusals = match batch {
            Batch::Servers(mut commands) => {
                self.ipvs()?.execute(&mut commands).map_err(|e| unknown(e.into()))?
            }
            Batch::Sets(mut commands) => {
                self.sets()?.execute(&mut commands).map_err(|e| unknown(e.into()))?
            }
            Batch::Addresses(mut batch) => self.links.execute(&mut batch).map_err(|e| unknown(e.into()))?,
        };
        let mut first = None;
        for refusal in refusals {
            let Some(op) = ops.get(refusal.index) else { continue };
            let strange = matches!(op, Op::AddDestination(..) | Op::AddAddress(_))
                && [EINVAL, EADDRNOTAVAIL].contains(&refusal.errno);
            if strange {
                // One address that nobody can use must not hold up everything else.
                tracing::warn!("{op}: {refusal}: left out");
                continue;
            }
            let words = match op {
                Op::CreateSet(..) | Op::DestroySet(..) | Op::AddElement(..) | Op::DeleteElement(..) => {
                    ipset_netlink::explain(&refusal)
                }
                // The next plan does without it.
                Op::AddServer(service) | Op::SetServer(service) if refusal.errno == ENOENT => {
                    self.refused.insert(service.scheduler.clone());
                    scheduler::missing(&service.scheduler)
                }
                _ => refusal.to_string(),
            };
            first.get_or_insert_with(|| failed(op.to_string(), words, Remedy::Resync));
        }
        first.map_or(Ok(()), Err)
    }
}

const fn is_of_servers(op: &Op) -> bool {
    matches!(
        op,
        Op::AddServer(_)
            | Op::SetServer(_)
            | Op::DeleteServer(_)
            | Op::AddDestination(..)
            | Op::SetDestination(..)
            | Op::DeleteDestination(..)
    )
}

const fn is_of_addresses(op: &Op) -> bool {
    matches!(op, Op::AddAddress(_) | Op::DeleteAddress(_))
}

const fn is_of_sets(op: &Op) -> bool {
    matches!(op, Op::CreateSet(..) | Op::DestroySet(..) | Op::AddElement(..) | Op::DeleteElement(..))
}
