//! Names of chains and sets. Those that other software looks for are kube-proxy's, down to the hash.

use std::net::SocketAddr;
use std::sync::Arc;

use data_encoding::BASE32;
use sha2::{Digest as _, Sha256};
use shunt_core::id::{IpFamily, ServicePortName};
pub use xtables_tools::MARK_MASQ;
use xtables_tools::Table;

/// The name of a chain or set. Most appear in several rules.
pub type Name = Arc<str>;

/// Finds the frontend of a packet (nat), or refuses it (filter).
pub const SERVICES: &str = "KUBE-SERVICES";
/// Node ports without endpoints (filter).
pub const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";
/// Finds a node port (nat), or accepts health checks (filter).
pub const NODE_PORTS: &str = "KUBE-NODEPORTS";
/// Masquerades.
pub const POSTROUTING: &str = "KUBE-POSTROUTING";
/// Accepts forwarded traffic of Services.
pub const FORWARD: &str = "KUBE-FORWARD";
/// Drops what source ranges do not allow.
pub const PROXY_FIREWALL: &str = "KUBE-PROXY-FIREWALL";
/// Is gone when somebody flushed the rules.
pub const CANARY: &str = "KUBE-PROXY-CANARY";
/// Keeps others from talking to loopback. Shared with the kubelet: made here if need be, never removed.
pub const FIREWALL: &str = "KUBE-FIREWALL";
/// Refuses packets to addresses of Services that were not translated (filter).
pub const REFUSE: &str = "SHUNT-REFUSE";
/// Packets to cluster IPs that are not translated: takes back the mark that they may have got before (nat).
pub const UNSERVED: &str = "SHUNT-UNSERVED";
/// What the names of chains of dispatch trees begin with.
pub const TREE: &str = "SHUNT-";

/// What becomes of the chains of a Service port: their prefixes.
pub const CLUSTER: &str = "KUBE-SVC-";
/// Endpoints of the Local policy.
pub const LOCAL: &str = "KUBE-SVL-";
/// Tells sources apart.
pub const EXTERNAL: &str = "KUBE-EXT-";
/// Tells sources apart that come to a cluster IP, where one condition does not.
pub const INTERNAL: &str = "KUBE-INT-";
/// Lets allowed sources pass.
pub const GUARD: &str = "KUBE-FW-";
/// One endpoint with session affinity; also the set of its clients.
pub const ENDPOINT: &str = "KUBE-SEP-";

const FIXED: [&str; 8] =
    [SERVICES, EXTERNAL_SERVICES, NODE_PORTS, POSTROUTING, MARK_MASQ, FORWARD, PROXY_FIREWALL, CANARY];
const PREFIXES: [&str; 6] = [CLUSTER, LOCAL, EXTERNAL, INTERNAL, GUARD, ENDPOINT];

/// Whether a chain of a table is ours (or kube-proxy's, whose place we take). Others in the table mangle are those
/// of ipvs mode, whose rules we do not read: only it knows how to take them away.
pub fn is_ours(table: Table, chain: &str) -> bool {
    if table == Table::Mangle {
        return chain == CANARY;
    }
    FIXED.contains(&chain)
        || chain.starts_with(TREE)
        || PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// Whether a chain belongs to a dispatch tree, its root excepted.
pub fn is_tree(chain: &str) -> bool {
    chain.starts_with(TREE) && chain != REFUSE && chain != UNSERVED
}

/// The hash in the name of a chain of a Service port.
pub fn hash_of(chain: &str) -> Option<&str> {
    let rest = PREFIXES.iter().find_map(|prefix| chain.strip_prefix(prefix))?;
    rest.get(..16)
}

/// The first 16 characters of the base32 text of the SHA-256 of a text (kube-proxy's rule).
pub fn hash(text: &str) -> String {
    let mut hash = BASE32.encode(&Sha256::digest(text.as_bytes()));
    hash.truncate(16);
    hash
}

/// `namespace/name:port`, as kube-proxy writes it in comments.
pub fn port_label(port: &ServicePortName) -> String {
    if port.port.is_empty() { port.service.to_string() } else { format!("{}:{}", port.service, port.port) }
}

/// The part of the names of its chains that says which Service port it is.
pub fn port_hash(port: &ServicePortName) -> String {
    hash(&format!("{}{}", port_label(port), port.protocol))
}

/// Chain and set of an endpoint of a Service port.
pub fn endpoint(port: &ServicePortName, endpoint: SocketAddr) -> Name {
    format!("{ENDPOINT}{}", hash(&format!("{}{}{endpoint}", port_label(port), port.protocol))).into()
}

/// Counts forwarded packets that were dropped because they fit no flow. Counters know no family.
pub const INVALID_DROPPED: &str = "ct_state_invalid_dropped_pkts";
/// Counts connections to node ports on loopback.
pub const LOOPBACK_ACCEPTED: &str = "localhost_nps_accepted_pkts";

/// Cluster IPs.
pub const CLUSTER_IPS: &str = "CLUSTER-IPS";
/// Frontends that refuse.
pub const REJECT: &str = "REJECT";
/// Frontends that discard what they do not forward.
pub const DROP: &str = "DROP";
/// Frontends that only allowed sources may use.
pub const GUARDED: &str = "GUARDED";
/// Which sources those are.
pub const SOURCES: &str = "SOURCES";
/// Endpoints of this node that may meet themselves.
pub const HAIRPIN: &str = "HAIRPIN";

/// The sets that there always are.
pub const SETS: [&str; 6] = [CLUSTER_IPS, REJECT, DROP, GUARDED, SOURCES, HAIRPIN];

/// The full name of one of [`SETS`]. Names of sets know no family.
pub fn set(family: IpFamily, name: &str) -> Name {
    match family {
        IpFamily::V4 => format!("SHUNT-{name}"),
        IpFamily::V6 => format!("SHUNT-6-{name}"),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use shunt_core::id::{NamespacedName, Protocol};

    use super::*;

    #[test]
    fn hashes_are_those_of_kube_proxy() {
        let port = |service: &str, name: Arc<str>| ServicePortName {
            service: NamespacedName::new(service, service.replace("ns", "svc")),
            port: name,
            protocol: Protocol::Tcp,
        };
        assert_eq!(port_hash(&port("ns1", "p80".into())), "XPGD46QRK7WJZT7O");
        assert_eq!(port_hash(&port("ns2", "p80".into())), "GNZBNJ2PO5MGZ6GT");
        let sep = endpoint(&port("ns1", "p80".into()), "10.180.0.1:80".parse().unwrap());
        assert_eq!(&*sep, "KUBE-SEP-SXIVWICOYRO3J4NJ");
    }

    #[test]
    fn names_fit_and_those_of_others_are_not_ours() {
        for name in SETS {
            assert!(set(IpFamily::V6, name).len() <= 31);
        }
        for other in
            ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-ROUTER-INPUT", "CNI-1"]
        {
            assert!(Table::ALL.iter().all(|table| !is_ours(*table, other)), "{other}");
        }
        // In ipvs mode.
        assert!(!is_ours(Table::Mangle, PROXY_FIREWALL));
        assert!(is_ours(Table::Filter, PROXY_FIREWALL) && is_ours(Table::Mangle, CANARY));
    }
}
