//! kube-proxy's nftables mode (1.36), as input for `nft -f`.

use std::fmt::Write as _;

use super::hash;
use crate::cluster::{Cluster, NODE_ADDRESS, POD_RANGE, SERVICE_RANGE};

/// Services that one transaction brings.
const PART: usize = 500;

/// The table in parts, to be written one after the other.
pub(super) fn rules(cluster: &Cluster) -> Vec<String> {
    let protocol = if cluster.shape.udp { "udp" } else { "tcp" };
    let mut parts = vec![base()];
    for services in cluster.services.chunks(PART) {
        let mut part = String::new();
        for service in services {
            let of = format!("{}-{}/{protocol}/http", &hash(&service.name)[..8], service.name);
            let (address, port) = (service.frontend.ip(), service.frontend.port());
            let count = service.endpoints.len();
            let slots: Vec<String> = service
                .endpoints
                .iter()
                .enumerate()
                .map(|(i, endpoint)| format!("{i} : {} . {}", endpoint.ip(), endpoint.port()))
                .collect();
            _ = writeln!(
                part,
                "add chain ip kube-proxy service-{of}\n\
                 add rule ip kube-proxy service-{of} meta l4proto {protocol} dnat ip to numgen random mod {count} map {{ {} }}\n\
                 add element ip kube-proxy cluster-ips {{ {address} }}\n\
                 add element ip kube-proxy service-ips {{ {address} . {protocol} . {port} : goto service-{of} }}",
                slots.join(" , ")
            );
            if let Some(node_port) = service.node_port {
                _ = writeln!(
                    part,
                    "add chain ip kube-proxy external-{of}\n\
                     add rule ip kube-proxy external-{of} jump mark-for-masquerade\n\
                     add rule ip kube-proxy external-{of} goto service-{of}\n\
                     add element ip kube-proxy service-nodeports {{ {protocol} . {node_port} : goto external-{of} }}"
                );
            }
        }
        parts.push(part);
    }
    parts
}

/// What is there without any Service.
fn base() -> String {
    format!(
        "\
table ip kube-proxy {{
	comment \"rules for kube-proxy\"
	set cluster-ips {{ type ipv4_addr; comment \"Active ClusterIPs\"; }}
	set nodeport-ips {{ type ipv4_addr; elements = {{ {NODE_ADDRESS} }}; }}
	set hairpin-connections {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; }}
	map firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
	map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
	map no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
	map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
	map service-nodeports {{ type inet_proto . inet_service : verdict; }}
	chain cluster-ips-check {{
		ip daddr @cluster-ips reject
		ip daddr {{ {SERVICE_RANGE} }} drop
	}}
	chain firewall-check {{ ip daddr . meta l4proto . th dport vmap @firewall-ips; }}
	chain mark-for-masquerade {{ meta mark set mark or 0x4000; }}
	chain masquerading {{
		mark and 0x4000 != 0 meta mark set mark xor 0x4000 masquerade fully-random
		ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
	}}
	chain nodeport-endpoints-check {{ ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
	chain reject-chain {{ reject; }}
	chain service-endpoints-check {{ ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
	chain services {{
		ip daddr @cluster-ips ip saddr != {POD_RANGE} meta mark set mark or 0x4000
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}}
	chain filter-prerouting-pre-dnat {{
		type filter hook prerouting priority -110;
		ct state new jump firewall-check
	}}
	chain filter-output-pre-dnat {{
		type filter hook output priority -110;
		ct state new jump firewall-check
	}}
	chain filter-forward {{
		type filter hook forward priority 0;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}}
	chain filter-input {{
		type filter hook input priority 0;
		ct state new jump nodeport-endpoints-check
		ct state new jump service-endpoints-check
	}}
	chain filter-output {{
		type filter hook output priority 0;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}}
	chain nat-output {{
		type nat hook output priority -100;
		jump services
	}}
	chain nat-prerouting {{
		type nat hook prerouting priority -100;
		jump services
	}}
	chain nat-postrouting {{
		type nat hook postrouting priority 100;
		jump masquerading
	}}
}}
"
    )
}
