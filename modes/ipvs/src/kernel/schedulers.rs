//! Which schedulers the kernel lacks: it loads a module when asked for one, and says so if it cannot.

use std::collections::BTreeSet;

use ipvs_netlink::{Error, Ipvs, Service, ServiceKey};
use shunt_core::id::IpFamily;

use crate::layout;

const ENOENT: i32 = 2;

/// Asks for a scheduler, by a virtual server that no packet meets: its mark is one that we give nobody.
pub(super) fn has(ipvs: &mut Ipvs, family: IpFamily, scheduler: &str) -> Result<bool, Error> {
    // The bit does not matter: whatever it is, the mark is ours and nobody's.
    let key = ServiceKey::Mark { ipv6: family == IpFamily::V6, mark: layout::mark(0, 0) };
    let mut commands = ipvs.commands();
    // One may be left by a process that was killed in between; usually there is none.
    commands.delete_service(&key);
    commands.add_service(&Service::new(key, scheduler));
    commands.delete_service(&key);
    let refusals = ipvs.execute(&mut commands)?;
    Ok(!refusals.iter().any(|refusal| (refusal.index, refusal.errno) == (1, ENOENT)))
}

/// Those of `refused` that the kernel still lacks: modules may have been installed since.
pub(super) fn lacking(
    ipvs: &mut Ipvs,
    family: IpFamily,
    refused: &BTreeSet<String>,
) -> Result<BTreeSet<String>, Error> {
    let mut lacking = BTreeSet::new();
    for scheduler in refused {
        if !has(ipvs, family, scheduler)? {
            lacking.insert(scheduler.clone());
        }
    }
    Ok(lacking)
}
