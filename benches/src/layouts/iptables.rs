//! kube-proxy's iptables mode, as input for `iptables-restore`.

use std::fmt::Write as _;

use super::hash;
use crate::cluster::{Cluster, POD_RANGE};

const NAT_BASE: &str = "\
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
";

const FILTER: &str = "\
*filter
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment \"kubernetes health check service ports\" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment \"kubernetes externally-visible service portals\" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes load balancer firewall\" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment \"block incoming localnet connections\" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding rules\" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

/// kube-proxy has a canary in each of the three tables; with it the kernel asks the table `mangle`, too.
const MANGLE: &str = "\
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
";

/// The tables `nat`, `filter` and `mangle`. Rules carry no comments of Services: kube-proxy leaves them out beyond
/// 1,000 endpoints.
pub(super) fn rules(cluster: &Cluster) -> String {
    let protocol = if cluster.shape.udp { "udp" } else { "tcp" };
    let mut chains = String::from("*nat\n");
    for chain in ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"] {
        _ = writeln!(chains, ":{chain} - [0:0]");
    }
    let mut rules = NAT_BASE.to_owned();
    for service in &cluster.services {
        let port_name = format!("{}:http{protocol}", service.name);
        let id = hash(&port_name);
        let (address, port) = (service.frontend.ip(), service.frontend.port());
        _ = writeln!(chains, ":KUBE-SVC-{id} - [0:0]");
        _ = writeln!(
            rules,
            "-A KUBE-SERVICES -m {protocol} -p {protocol} -d {address} --dport {port} -j KUBE-SVC-{id}"
        );
        if let Some(node_port) = service.node_port {
            _ = writeln!(chains, ":KUBE-EXT-{id} - [0:0]");
            _ = writeln!(
                rules,
                "-A KUBE-NODEPORTS -m {protocol} -p {protocol} --dport {node_port} -j KUBE-EXT-{id}\n\
                 -A KUBE-EXT-{id} -j KUBE-MARK-MASQ\n\
                 -A KUBE-EXT-{id} -j KUBE-SVC-{id}"
            );
        }
        _ = writeln!(
            rules,
            "-A KUBE-SVC-{id} -m {protocol} -p {protocol} -d {address} --dport {port} ! -s {POD_RANGE} -j KUBE-MARK-MASQ"
        );
        let count = service.endpoints.len();
        for (i, endpoint) in service.endpoints.iter().enumerate() {
            let of = hash(&format!("{port_name}{endpoint}"));
            let share = match count - i {
                1 => String::new(),
                left => format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64),
            };
            _ = writeln!(chains, ":KUBE-SEP-{of} - [0:0]");
            _ = writeln!(
                rules,
                "-A KUBE-SVC-{id} {share}-j KUBE-SEP-{of}\n\
                 -A KUBE-SEP-{of} -s {} -j KUBE-MARK-MASQ\n\
                 -A KUBE-SEP-{of} -m {protocol} -p {protocol} -j DNAT --to-destination {endpoint}",
                endpoint.ip()
            );
        }
    }
    // kube-proxy: "NOTE: this must be the last rule in this chain".
    rules.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n");
    chains + &rules + "COMMIT\n" + FILTER + MANGLE
}
