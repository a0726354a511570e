//! Layouts that no program writes: the references of every measurement of packets. kube-proxy's own, from the
//! same Services, and the least that translates at all.
//!
//! Names, order and rules are those that kube-proxy 1.36 writes for a cluster IP with endpoints on other
//! nodes, and for a node port with `externalTrafficPolicy: Cluster`.

mod floor;
mod iptables;
mod ipvs;
mod nftables;

use anyhow::{Context, Result};
use shunt_harness::lab::Namespace;

use crate::cluster::Cluster;

/// Name of the least that translates.
pub(crate) const FLOOR: &str = "one DNAT rule";

/// A layout.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Layout {
    /// One rule that translates everything to one pod: what conntrack and the hooks of nat cost whatever
    /// the rules are.
    Floor,
    /// iptables mode: one rule a Service in KUBE-SERVICES, asked one after the other (legacy iptables).
    Iptables,
    /// nftables mode: a chain and a map a Service.
    Nftables,
    /// ipvs mode: all virtual addresses on a dummy device, legacy iptables and ipset for masquerade.
    Ipvs,
}

impl Layout {
    /// Those that a mode is compared with.
    pub(crate) const fn of(ipvs: bool) -> &'static [Self] {
        if ipvs { &[Self::Ipvs] } else { &[Self::Floor, Self::Iptables, Self::Nftables] }
    }

    /// Name in reports.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Floor => FLOOR,
            Self::Iptables => "kube-proxy iptables layout",
            Self::Nftables => "kube-proxy nftables layout",
            Self::Ipvs => "kube-proxy ipvs layout",
        }
    }

    /// Endpoints, of all Services together, that the kernel takes: it refuses iptables tables of more than
    /// 512 MiB.
    pub(crate) const fn most_endpoints(self) -> usize {
        match self {
            Self::Iptables => 100_000,
            Self::Floor | Self::Nftables | Self::Ipvs => usize::MAX,
        }
    }

    /// Whether loading it costs what the cluster costs.
    pub(crate) fn grows(self) -> bool {
        self != Self::Floor
    }

    /// Writes the layout into a namespace.
    pub(crate) fn load(self, node: &Namespace, cluster: &Cluster) -> Result<()> {
        match self {
            Self::Floor => drop(node.nft(&floor::rules(cluster)).context("load one rule")?),
            Self::Iptables => {
                restore(node, &iptables::rules(cluster)).context("load kube-proxy's iptables layout")?;
            }
            Self::Ipvs => {
                let ipvs = ipvs::Ipvs::new(cluster);
                node.set_sysctl("net/ipv4/vs/conntrack", "1").context("IPVS")?;
                node.exec("ip", ["-batch", "-"], &ipvs.addresses)?;
                node.exec("ipset", ["restore"], &ipvs.sets)?;
                restore(node, ipvs::RULES)?;
                node.exec("ipvsadm", ["--restore"], &ipvs.servers).context("load kube-proxy's IPVS")?;
            }
            Self::Nftables => {
                // In one transaction the kernel looks sets up in a list: quadratic. What is there in the
                // end is the same.
                for part in nftables::rules(cluster) {
                    node.nft(&part).context("load kube-proxy's nftables layout")?;
                }
            }
        }
        Ok(())
    }
}

/// Adds rules with legacy iptables.
fn restore(node: &Namespace, rules: &str) -> Result<()> {
    // A lock of its own: the machine's is everybody's.
    let lock = tempfile::NamedTempFile::new()?;
    let lock = format!("XTABLES_LOCKFILE={}", lock.path().display());
    node.exec("env", [&*lock, "iptables-legacy-restore", "--noflush"], rules).map(drop)
}

/// Sixteen characters that stand for a name, as kube-proxy shortens names to chains: base32 of a SHA-256.
fn hash(name: &str) -> String {
    use sha2::Digest as _;
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = sha2::Sha256::digest(name.as_bytes());
    let mut text = String::with_capacity(16);
    // Sixteen times five bits are ten bytes.
    for group in digest[..10].chunks(5) {
        let bits = group.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
        for i in (0..8).rev() {
            text.push(char::from(ALPHABET[(bits >> (i * 5) & 31) as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Shape;

    #[test]
    fn chains_are_named_as_kube_proxy_names_them() {
        // From the golden files of kube-proxy's iptables mode: ns1/svc1:p80 over TCP.
        assert_eq!(hash("ns1/svc1:p80tcp"), "XPGD46QRK7WJZT7O");
        assert_eq!(hash("ns1/svc1:p80tcp10.180.0.1:80"), "SXIVWICOYRO3J4NJ");
    }

    #[test]
    fn layouts_name_every_service_and_every_endpoint() -> Result<()> {
        let shape = Shape { node_ports: true, ..Shape::new(30, 3) };
        let cluster = Cluster::new(shape)?;
        let ipvs = ipvs::Ipvs::new(&cluster);
        let ipvs = [ipvs.addresses, ipvs.sets, ipvs.servers].concat();
        let texts = [iptables::rules(&cluster), nftables::rules(&cluster).concat(), ipvs];
        for text in texts {
            for service in &cluster.services {
                assert!(text.contains(&service.frontend.ip().to_string()));
                for endpoint in &service.endpoints {
                    assert!(text.contains(&endpoint.ip().to_string()));
                }
            }
            for port in [30_000, 30_001, 30_002] {
                assert!(text.contains(&port.to_string()));
            }
        }
        Ok(())
    }
}
