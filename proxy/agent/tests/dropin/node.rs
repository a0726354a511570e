//! Duties on the node: sysctls, addresses that change.

use std::net::IpAddr;

use anyhow::Result;
use serde_json::json;
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::require_kernel;

use crate::cluster::{Cluster, KUBEADM, LONG};

#[test]
fn the_node_changes_in_place() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let ranges =
        KUBEADM.replace("nodePortAddresses: null", "nodePortAddresses: [192.0.2.0/24, 2001:db8::/64]");
    cluster.write_files(&ranges)?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("192.0.2.11:30080", &["pod-a", "pod-b"])?;
    let more: IpAddr = "192.0.2.77".parse()?;
    cluster.lab.add_node_address(more)?;
    cluster.reach("192.0.2.77:30080", &["pod-a", "pod-b"])?;
    cluster.wait("health checks there", |c| Ok(c.get("192.0.2.77:31234", "/")?.status == 200))?;
    assert_eq!(cluster.get("192.0.2.11:31234", "/")?.status, 200);
    cluster.lab.remove_node_address(more)?;
    cluster.wait("no health checks there", |c| Ok(c.get("192.0.2.77:31234", "/").is_err()))?;

    // Another primary address by the Node object, and back to where node ports follow it.
    cluster.write_files(KUBEADM)?;
    cluster.lab.add_node_address(more)?;
    cluster.wait("only the primary address", |c| {
        Ok(c.get("192.0.2.77:31234", "/").is_err() && c.get("192.0.2.11:31234", "/").is_ok())
    })?;
    cluster.server.put(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.77" }] },
    }));
    cluster.reach("192.0.2.77:30080", &["pod-a", "pod-b"])?;
    cluster.wait("the primary address moved", |c| {
        Ok(c.get("192.0.2.11:31234", "/").is_err() && c.get("192.0.2.77:31234", "/").is_ok())
    })?;
    assert!(agent.try_wait()?.is_none(), "{agent}");
    agent.stop()?;
    Ok(())
}

/// The zone is a label of the Node; endpoints are hinted to zones.
#[test]
fn the_zone_changes_in_place() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let endpoint = |address: &str, zone: &str| {
        json!({
            "addresses": [address], "conditions": { "ready": true }, "nodeName": "worker-1", "zone": zone,
            "hints": { "forZones": [{ "name": zone }] },
        })
    };
    cluster.server.put(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1", "namespace": "demo", "labels": { "kubernetes.io/service-name": "web" },
        },
        "addressType": "IPv4", "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
        "endpoints": [endpoint("10.244.1.11", "zone-a"), endpoint("10.244.1.12", "zone-b")],
    }));
    let zone = |zone: &str| {
        cluster.server.put(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": "worker-1", "labels": { "topology.kubernetes.io/zone": zone } },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
        }));
    };
    zone("zone-a");
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a"])?;
    zone("zone-b");
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    zone("zone-c");
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    assert!(agent.try_wait()?.is_none(), "{agent}");
    agent.stop()?;
    Ok(())
}

#[test]
fn the_oom_killers_score_is_set() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    // To lower it takes a privilege that tests may not have.
    cluster.write_files(&KUBEADM.replace("oomScoreAdj: null", "oomScoreAdj: 321"))?;
    let mut agent = cluster.start(&[])?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.id()))?;
    assert_eq!(score.trim(), "321");
    agent.stop()?;
    Ok(())
}

/// `mode` in our own document, and another list of node port addresses.
fn with(mode: &str, node_port_addresses: &str) -> String {
    let addresses = format!("nodePortAddresses: {node_port_addresses}");
    let kube_proxy = KUBEADM.replace("nodePortAddresses: null", &addresses);
    assert!(kube_proxy.contains(&addresses));
    format!("{kube_proxy}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\n")
}

#[test]
fn init_only_sets_sysctls_and_no_rules() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let route = "net/ipv4/conf/all/route_localnet";
    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    node.set_sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "60")?;
    node.set_sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "500000")?;
    for (mode, addresses, routed) in [
        ("nftables", "[all]", "0"),
        ("iptables", "[primary]", "0"),
        ("iptables", "[primary, localhost]", "1"),
    ] {
        cluster.write_files(&with(mode, addresses))?;
        let mut agent = cluster.start(&["--init-only"])?;
        assert!(agent.wait(LONG)?.success(), "{agent}");
        assert_eq!(node.sysctl(route)?, routed, "{mode} {addresses}: {agent}");
    }
    assert_eq!(node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait")?, "3600");
    let kept = node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_established")?;
    assert_eq!(kept, "500000", "an administrator's larger value stays");
    assert_eq!(node.exec("nft", ["list", "ruleset"], "")?, "");
    assert_eq!(node.exec("ipset", ["list", "-name"], "")?, "");
    Ok(())
}

mod ipvs {
    use super::*;

    fn init_only() -> Result<()> {
        let cluster = Cluster::new()?;
        let node = cluster.lab.node();
        node.set_sysctl("net/ipv4/ip_forward", "0")?;
        cluster.write_files(&with("ipvs", "null").replace("strictARP: false", "strictARP: true"))?;
        let mut agent = cluster.start(&["--init-only"])?;
        assert!(agent.wait(LONG * 4)?.success(), "{agent}");
        for (key, value) in [
            ("net/ipv4/vs/conntrack", "1"),
            ("net/ipv4/vs/expire_nodest_conn", "1"),
            ("net/ipv4/vs/expire_quiescent_template", "1"),
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv4/conf/all/arp_ignore", "1"),
            ("net/ipv4/conf/all/arp_announce", "2"),
        ] {
            assert_eq!(node.sysctl(key)?, value, "{key}");
        }
        assert_eq!(node.exec("ipvsadm", ["-Sn"], "")?, "");
        Ok(())
    }

    #[test]
    fn init_only_sets_sysctls_and_no_rules() {
        test_in_guest(module_path!(), "init_only_sets_sysctls_and_no_rules", || init_only().unwrap());
    }
}
