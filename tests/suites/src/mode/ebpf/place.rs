//! A bpffs and cgroups for each lab.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use shunt_harness::lab::{Lab, Namespace, place};
use shunt_mode_ebpf::kernel::{Options, network_namespace_cookie};

/// Options for the lab in whose node's network namespace the calling thread is. The same lab gets the
/// same ones each time.
pub fn options() -> Result<Arc<Options>> {
    Ok(Arc::new(Options {
        // Unlike the inode number, a cookie is never given to a second namespace.
        bpf_root: place::bpffs(&network_namespace_cookie()?.to_string())?,
        cgroup_root: Some(cgroup()?),
        frontends: 4096,
        endpoints: 16_384,
        flows: 65_536,
        clients: 131_072,
        ..Options::default()
    }))
}

/// The cgroup for that lab.
pub(super) fn cgroup() -> Result<PathBuf> {
    place::cgroup(&network_namespace_cookie()?.to_string())
}

/// Moves a lab's pods into cgroups of their own below the node's, as containers have them: their processes meet the
/// programs at sockets too.
pub fn settle_pods<'a>(lab: &Lab, pods: impl IntoIterator<Item = &'a Namespace>) -> Result<()> {
    let node = lab.node().run(|| Ok(network_namespace_cookie()?))?;
    for pod in pods {
        let own = pod.run(|| Ok(network_namespace_cookie()?))?;
        pod.set_cgroup(place::cgroup(&format!("{node}/{own}"))?);
    }
    Ok(())
}
