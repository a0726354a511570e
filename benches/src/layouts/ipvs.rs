//! kube-proxy's ipvs mode, as input for `ip`, `ipset`, `iptables-restore` and `ipvsadm`.

use std::fmt::Write as _;

use crate::cluster::{Cluster, NODE_ADDRESS};

/// What each tool is given, in the order of the fields.
pub(super) struct Ipvs {
    /// The device with all virtual addresses, for `ip -batch`.
    pub addresses: String,
    /// Sets of addresses and ports, for `ipset restore`.
    pub sets: String,
    /// Virtual servers, for `ipvsadm --restore`.
    pub servers: String,
}

/// Rules that do not depend on Services. Of the filter table only what every new connection passes.
pub(super) const RULES: &str = "\
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-SERVICES -s 127.0.0.0/8 -j RETURN
-A KUBE-SERVICES ! -s 10.0.0.0/8 -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-NODE-PORT -p tcp -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-NODE-PORT -p udp -m set --match-set KUBE-NODE-PORT-UDP dst -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
:KUBE-FORWARD - [0:0]
:KUBE-IPVS-FILTER - [0:0]
-A INPUT -m comment --comment \"kubernetes ipvs access filter\" -j KUBE-IPVS-FILTER
-A FORWARD -m comment --comment \"kubernetes forwarding rules\" -j KUBE-FORWARD
-A KUBE-IPVS-FILTER -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
";

impl Ipvs {
    /// For a cluster's Services.
    pub(super) fn new(cluster: &Cluster) -> Self {
        let (protocol, flag) = if cluster.shape.udp { ("udp", "-u") } else { ("tcp", "-t") };
        let mut addresses = "link add kube-ipvs0 type dummy\n".to_owned();
        let mut sets = "\
create KUBE-CLUSTER-IP hash:ip,port maxelem 65536
create KUBE-IPVS-IPS hash:ip maxelem 65536
create KUBE-LOOP-BACK hash:ip,port,ip maxelem 65536
create KUBE-NODE-PORT-TCP bitmap:port range 0-65535
create KUBE-NODE-PORT-UDP bitmap:port range 0-65535
"
        .to_owned();
        let mut servers = String::new();
        let upper = protocol.to_uppercase();
        for service in &cluster.services {
            let address = service.frontend.ip();
            _ = writeln!(addresses, "address add {address}/32 dev kube-ipvs0");
            _ = writeln!(sets, "add KUBE-CLUSTER-IP {address},{protocol}:{}", service.frontend.port());
            _ = writeln!(sets, "add KUBE-IPVS-IPS {address}");
            let mut serve = |frontend: String| {
                _ = writeln!(servers, "-A {flag} {frontend} -s rr");
                for endpoint in &service.endpoints {
                    _ = writeln!(servers, "-a {flag} {frontend} -r {endpoint} -m -w 1");
                }
            };
            serve(service.frontend.to_string());
            if let Some(port) = service.node_port {
                _ = writeln!(sets, "add KUBE-NODE-PORT-{upper} {port}");
                serve(format!("{NODE_ADDRESS}:{port}"));
            }
        }
        Self { addresses, sets, servers }
    }
}
