//! What is asked of `nf_tables` without the tool.
//!
//! Whether the kernel can hold rules of the nft flavour: the tool finds out when it writes, and not before. Without
//! `nf_tables` for IP it lists empty chains, and finds nothing wrong with any rule that it only tests. And whether a chain
//! has rules: the tool reads all chains to show one.

use std::io;

use netlink_requests::protocols::NETLINK_NETFILTER;
use netlink_requests::{Batch, Error, NLM_F_CREATE, Socket, Writer};
use nix::errno::Errno;
use shunt_core::id::IpFamily;

use crate::namespace::Namespace;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`. Its header names the subsystem.
const BEGIN: u16 = 16;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
/// `NFTA_TABLE_NAME`, `NFTA_RULE_TABLE`.
const NAME: u16 = 1;
/// `NFTA_RULE_CHAIN`.
const CHAIN: u16 = 2;
/// How often a list is asked for that changes while it is read.
const TRIES: u32 = 10;
/// No table that is there has this name.
const PROBE: &str = "shunt-probe";

/// Whether the kernel has tables for a family. True if it does not say, as without `CAP_NET_ADMIN`.
pub(crate) fn has_tables(namespace: &Namespace, family: IpFamily) -> bool {
    let asked = namespace.inside(|| Ok(ask(family)));
    !matches!(asked, Ok(Err(errno)) if errno == Errno::EOPNOTSUPP)
}

/// Whether a chain is there and has rules.
pub(crate) fn has_rules(
    namespace: &Namespace,
    family: IpFamily,
    table: &str,
    chain: &str,
) -> io::Result<bool> {
    let ask = || {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        for _ in 0..TRIES {
            let mut found = false;
            let body = |w: &mut Writer| {
                w.header(&header(family));
                w.string(NAME, table);
                w.string(CHAIN, chain);
            };
            let asked = socket.dump(GET_RULE, body, |_| {
                found = true;
                Ok(())
            });
            match asked {
                Err(Error::Interrupted) if !found => {}
                Err(Error::Refused(refusal)) if refusal.errno == Errno::ENOENT as i32 => return Ok(false),
                Ok(()) | Err(Error::Interrupted) => return Ok(found),
                Err(error) => return Err(error),
            }
        }
        Err(Error::Interrupted)
    };
    namespace.inside(|| ask().map_err(io::Error::other))
}

/// `nfgenmsg`.
const fn header(family: IpFamily) -> [u8; 4] {
    match family {
        IpFamily::V4 => [2, 0, 0, 0],
        IpFamily::V6 => [10, 0, 0, 0],
    }
}

/// Makes a table in a batch without an end, which the kernel checks and forgets.
fn ask(family: IpFamily) -> Result<(), Errno> {
    let mut batch = Batch::default();
    let [high, low] = SUBSYSTEM.to_be_bytes();
    batch.push(BEGIN, 0, |w| w.header(&[0, 0, high, low]));
    batch.push(NEW_TABLE, NLM_F_CREATE, |w| {
        w.header(&header(family));
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
