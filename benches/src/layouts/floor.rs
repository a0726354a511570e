//! One DNAT rule in the three hooks of nat, as input for `nft -f`.

use crate::cluster::{Cluster, NODE_ADDRESS, SERVICE_RANGE};

/// Cluster IPs lead to one pod; so do node ports, with masquerade as under `externalTrafficPolicy: Cluster`.
pub(super) fn rules(cluster: &Cluster) -> String {
    let protocol = if cluster.shape.udp { "udp" } else { "tcp" };
    let Some(pod) = cluster.services.first().and_then(|service| service.endpoints.first()) else {
        return String::new();
    };
    format!(
        "\
table ip floor {{
	chain nat-prerouting {{
		type nat hook prerouting priority -100;
		ip daddr {SERVICE_RANGE} meta l4proto {protocol} dnat ip to {pod}
		ip daddr {NODE_ADDRESS} {protocol} dport 30000-32767 meta mark set 0x4000 dnat ip to {pod}
	}}
	chain nat-output {{
		type nat hook output priority -100;
	}}
	chain nat-postrouting {{
		type nat hook postrouting priority 100;
		meta mark 0x4000 masquerade fully-random
	}}
}}
"
    )
}
