//! Counters of netfilter's accounting (nfacct), by netlink. Rules count in them by name; the kernel of a
//! network namespace has one set of them for both families.

use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Attributes, Batch, Error, NLM_F_CREATE, Socket, Writer, be64, text};

use crate::names;

/// `NFNL_SUBSYS_ACCT` in the upper byte of message types.
const SUBSYSTEM: u16 = 7 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 3;

const NAME: u16 = 1;
const PACKETS: u16 = 2;

/// Size of the netfilter header.
const HEADER: usize = 4;
/// The counter is there already.
const EBUSY: i32 = 16;

const COUNTERS: [&str; 2] = [names::INVALID_DROPPED, names::LOOPBACK_ACCEPTED];

fn start(w: &mut Writer) {
    // No family, version 0, resource 0.
    w.header(&[0; HEADER]);
}

fn for_each(kind: u16, flags: u16) -> Batch {
    let mut batch = Batch::default();
    for name in COUNTERS {
        batch.push(kind, flags, |w| {
            start(w);
            w.string(NAME, name);
        });
    }
    batch
}

/// Makes the counters that are not there. False if the kernel has no such counters.
pub(super) fn make() -> Result<bool, Error> {
    let refusals = Socket::open(NETLINK_NETFILTER)?.execute(&mut for_each(NEW, NLM_F_CREATE))?;
    Ok(refusals.iter().all(|refusal| refusal.errno == EBUSY))
}

/// Removes the counters, but for those that rules count in.
pub(super) fn remove() -> Result<(), Error> {
    Socket::open(NETLINK_NETFILTER)?.execute(&mut for_each(DELETE, 0)).map(drop)
}

/// How many packets our counters counted, by their names; those that are not there are left out.
pub(super) fn read() -> Result<Vec<(&'static str, u64)>, Error> {
    let mut read = Vec::new();
    Socket::open(NETLINK_NETFILTER)?.dump(GET, start, |payload| {
        let attributes = payload.get(HEADER..).unwrap_or_default();
        let find = |kind| Attributes::find(attributes, kind);
        let name = find(NAME).and_then(text).ok_or(Error::Malformed("a counter's name"))?;
        if let Some(name) = COUNTERS.into_iter().find(|known| *known == name) {
            let packets = find(PACKETS).and_then(be64).ok_or(Error::Malformed("a counter's packets"))?;
            read.push((name, packets));
        }
        Ok(())
    })?;
    Ok(read)
}
