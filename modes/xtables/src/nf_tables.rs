//! Whether the kernel can hold rules of the nft flavour. The tool finds out when it writes, and not before: without
//! `nf_tables` for IP it lists empty chains, and finds nothing wrong with any rule that it only tests.

use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Batch, Error, NLM_F_CREATE, Socket};
use nix::errno::Errno;
use shunt_core::id::IpFamily;

use crate::namespace::Namespace;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`. Its header names the subsystem.
const BEGIN: u16 = 16;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NAME: u16 = 1;
/// No table that is there has this name.
const PROBE: &str = "shunt-probe";

/// Whether the kernel has tables for a family. True if it does not say, as without `CAP_NET_ADMIN`.
pub(crate) fn has_tables(namespace: &Namespace, family: IpFamily) -> bool {
    let asked = namespace.inside(|| Ok(ask(family)));
    !matches!(asked, Ok(Err(errno)) if errno == Errno::EOPNOTSUPP)
}

/// Makes a table in a batch without an end, which the kernel checks and forgets.
fn ask(family: IpFamily) -> Result<(), Errno> {
    let mut batch = Batch::default();
    let [high, low] = SUBSYSTEM.to_be_bytes();
    batch.push(BEGIN, 0, |w| w.header(&[0, 0, high, low]));
    let number = match family {
        IpFamily::V4 => 2,
        IpFamily::V6 => 10,
    };
    batch.push(NEW_TABLE, NLM_F_CREATE, |w| {
        w.header(&[number, 0, 0, 0]);
        w.string(NAME, PROBE);
    });
    let refusals = match Socket::open(NETLINK_NETFILTER).and_then(|mut socket| socket.execute(&mut batch)) {
        Ok(refusals) => refusals,
        Err(Error::Refused(refusal)) => vec![refusal],
        // A kernel that has not even netlink for netfilter.
        Err(Error::Socket { source, .. }) if source.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => {
            return Err(Errno::EOPNOTSUPP);
        }
        Err(_) => return Ok(()),
    };
    refusals.first().map_or(Ok(()), |refusal| Err(Errno::from_raw(refusal.errno)))
}
