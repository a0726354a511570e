//! The real table of flows, by ctnetlink.

use std::io;

use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Batch, Error, NLM_F_CREATE, Socket};
use nix::errno::Errno;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter, Tuple};

use super::{Conntrack, ConntrackError, Dump, Fate, wire};

/// Deletions sent at once: what is to be deleted may be all flows of a busy node.
const BATCH: usize = 1024;

/// The flows of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

/// TCP connections that the kernel tracks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Connections {
    /// Those that were answered, and that not both sides have closed.
    pub open: Vec<Flow>,
    /// Those that both sides have closed, or one has reset. The kernel remembers them for up to two minutes, in which it
    /// gives no other connection the same addresses and ports.
    pub closed: Vec<Flow>,
}

pub(super) fn refusal(what: String, errno: i32) -> ConntrackError {
    if errno == Errno::EPERM as i32 {
        ConntrackError::NotPermitted { what }
    } else {
        ConntrackError::Refused { what, source: io::Error::from_raw_os_error(errno) }
    }
}

fn failed(what: impl FnOnce() -> String) -> impl FnOnce(Error) -> ConntrackError {
    |error| match error {
        Error::Refused(refused) => refusal(what(), refused.errno),
        error => ConntrackError::Socket { what: what(), source: error },
    }
}

impl Netlink {
    /// Opens a socket; privileges are only needed for what is done with it.
    pub fn open() -> Result<Self, ConntrackError> {
        let socket = Socket::open(NETLINK_NETFILTER).map_err(failed(|| "open it".to_owned()))?;
        Ok(Self { socket })
    }

    /// Asks for a dump and hands on its flows.
    fn try_dump(
        &mut self,
        filter: &FlowFilter,
        filter_in_kernel: bool,
        each: &mut dyn FnMut(Flow, &[u8]),
    ) -> Result<Dump, Error> {
        let mut dump = Dump::default();
        let dumped = self.socket.dump(
            wire::GET,
            |w| wire::filter(w, filter, filter_in_kernel),
            |payload| {
                dump.received += 1;
                let attributes = payload.get(wire::NETFILTER_HEADER..).unwrap_or_default();
                let flow = wire::flow(attributes);
                dump.unfiltered |= flow.is_none_or(|flow| !filter.matches(&flow));
                if let Some(flow) = flow {
                    each(flow, attributes);
                }
                Ok(())
            },
        );
        match dumped {
            Err(Error::Interrupted) => dump.interrupted = true,
            dumped => dumped?,
        }
        Ok(dump)
    }

    /// Lists all flows of a family that Services may have, with the bytes of both directions so far, that of
    /// the client first. They are zero unless `net.netfilter.nf_conntrack_acct` is set.
    pub fn list(
        &mut self,
        family: IpFamily,
        each: &mut dyn FnMut(Flow, [u64; 2]),
    ) -> Result<Dump, ConntrackError> {
        let filter = FlowFilter { family, protocol: Protocol::Tcp, address: None, port: None };
        let each = &mut |flow, attributes: &[u8]| each(flow, wire::bytes(attributes));
        self.try_dump(&filter, false, each).map_err(failed(|| format!("list {family} flows")))
    }

    /// The TCP connections of a family whose destination was translated, by whomever.
    pub fn connections(&mut self, family: IpFamily) -> Result<Connections, ConntrackError> {
        let filter = FlowFilter { family, protocol: Protocol::Tcp, address: None, port: None };
        let mut connections = Connections::default();
        let each = &mut |flow: Flow, attributes: &[u8]| match wire::tcp_state(attributes) {
            Some(state) if !flow.is_translated() || wire::HANDSHAKE.contains(&state) => {}
            Some(state) if wire::OPEN.contains(&state) => connections.open.push(flow),
            Some(_) => connections.closed.push(flow),
            None => {}
        };
        self.try_dump(&filter, false, each).map_err(failed(|| format!("list {family} connections")))?;
        Ok(connections)
    }

    /// Enters TCP connections as established and not translated. So the kernel takes no packet of theirs for a new or
    /// an invalid one, and gives no other connection the same addresses and ports. Those of which no packet is seen
    /// are forgotten after `seconds`, unless they are entered again.
    pub fn enter(&mut self, tuples: &[Tuple], seconds: u32) -> Result<(), ConntrackError> {
        let what = || format!("enter {} connections", tuples.len());
        let mut other = None;
        for tuples in tuples.chunks(BATCH) {
            let mut batch = Batch::default();
            for tuple in tuples {
                batch.push(wire::NEW, NLM_F_CREATE, |w| wire::established(w, tuple, seconds));
            }
            let refusals = self.socket.execute(&mut batch).map_err(failed(what))?;
            // Somebody else's connection has the tuple of its answers, or is kept by the kernel as it is.
            let known = [Errno::EEXIST as i32, Errno::EBUSY as i32];
            other = other.or_else(|| refusals.into_iter().find(|refusal| !known.contains(&refusal.errno)));
        }
        // One that is refused keeps no other one out.
        other.map_or(Ok(()), |other| Err(refusal(what(), other.errno)))
    }

    fn delete_batch(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError> {
        let mut batch = Batch::default();
        for flow in flows {
            batch.push(wire::DELETE, 0, |w| wire::identity(w, flow));
        }
        let refusals =
            self.socket.execute(&mut batch).map_err(failed(|| format!("delete {} flows", flows.len())))?;
        let mut fates = vec![Fate::Deleted; flows.len()];
        for refusal in refusals {
            if let Some(fate) = fates.get_mut(refusal.index) {
                *fate = match Errno::from_raw(refusal.errno) {
                    Errno::ENOENT => Fate::Gone,
                    _ => Fate::Refused(refusal.errno),
                };
            }
        }
        Ok(fates)
    }
}

impl Conntrack for Netlink {
    fn dump(&mut self, filter: &FlowFilter, each: &mut dyn FnMut(Flow)) -> Result<Dump, ConntrackError> {
        let asked = || format!("list flows {filter}");
        let filter = &wire::what_the_kernel_can(filter);
        let each = &mut |flow, _: &[u8]| each(flow);
        match self.try_dump(filter, true, each) {
            // Kernels before 5.8 ignore filters; others may know filters, but not this one.
            Err(Error::Refused(refused))
                if [Errno::EINVAL, Errno::EOPNOTSUPP].contains(&Errno::from_raw(refused.errno)) =>
            {
                self.try_dump(filter, false, each).map_err(failed(asked))
            }
            dumped => dumped.map_err(failed(asked)),
        }
    }

    fn delete(&mut self, flows: &[Flow]) -> Result<Vec<Fate>, ConntrackError> {
        let mut fates = Vec::with_capacity(flows.len());
        for batch in flows.chunks(BATCH) {
            fates.extend(self.delete_batch(batch)?);
        }
        Ok(fates)
    }
}
