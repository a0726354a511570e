//! A node that kube-proxy has programmed: no connection breaks when it is taken over.

use std::time::Duration;

use anyhow::{Context, Result};
use shunt_harness::lab::{Probe, StormSpec, TransferSpec, place, require_kernel};

use crate::cluster::{Cluster, KUBEADM, LONG};

/// What kube-proxy 1.36 in nftables mode has for the Service of this test, and a table of somebody else.
const KUBE_PROXY_NFTABLES: &str = r#"
table ip kube-proxy {
    comment "rules for kube-proxy"
    set cluster-ips { type ipv4_addr; comment "Active ClusterIPs"; elements = { 10.96.0.10 } }
    set nodeport-ips { type ipv4_addr; comment "IPs that accept NodePort traffic"; elements = { 192.0.2.11 } }
    map service-ips {
        type ipv4_addr . inet_proto . inet_service : verdict
        elements = { 10.96.0.10 . tcp . 80 : goto service-ABCDEFGH-demo/web/tcp/http }
    }
    map service-nodeports {
        type inet_proto . inet_service : verdict
        elements = { tcp . 30080 : goto service-ABCDEFGH-demo/web/tcp/http }
    }
    map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
    chain mark-for-masquerade { meta mark set meta mark | 0x4000; }
    chain masquerading {
        meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }
    chain endpoint-IJKLMNOP-demo/web/tcp/http__10.244.1.11/8080 {
        ip saddr 10.244.1.11 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.244.1.11:8080
    }
    chain endpoint-QRSTUVWX-demo/web/tcp/http__10.244.1.12/8080 {
        ip saddr 10.244.1.12 jump mark-for-masquerade
        meta l4proto tcp dnat to 10.244.1.12:8080
    }
    chain service-ABCDEFGH-demo/web/tcp/http {
        ip saddr != 10.244.0.0/16 jump mark-for-masquerade
        numgen random mod 2 vmap {
            0 : goto endpoint-IJKLMNOP-demo/web/tcp/http__10.244.1.11/8080,
            1 : goto endpoint-QRSTUVWX-demo/web/tcp/http__10.244.1.12/8080
        }
    }
    chain services {
        ip daddr . meta l4proto . th dport vmap @service-ips
        ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }
    chain cluster-ips-check { ip daddr @cluster-ips reject; }
    chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
    chain filter-prerouting-pre-dnat { type filter hook prerouting priority -110; policy accept; }
    chain filter-forward {
        type filter hook forward priority 0; policy accept;
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }
    chain nat-prerouting { type nat hook prerouting priority -100; policy accept; jump services; }
    chain nat-output { type nat hook output priority -100; policy accept; jump services; }
    chain nat-postrouting { type nat hook postrouting priority 100; policy accept; jump masquerading; }
}
table ip6 kube-proxy { comment "rules for kube-proxy"
}
table ip of-somebody-else { chain kube-proxy { type filter hook input priority 5; counter; }
}
"#;

#[test]
fn a_node_is_taken_over_from_kube_proxy_without_a_break() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    node.nft(KUBE_PROXY_NFTABLES)?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
    let client = cluster.lab.client();
    let storm =
        client.storm(StormSpec { probe: probe.clone(), rate: 300, duration: Duration::from_mins(1) })?;
    let transfer = client.transfer(&TransferSpec { probe, pace: None, limit: None })?;
    let foreign = || node.exec("nft", ["-s", "list", "table", "ip", "of-somebody-else"], "");
    let before = foreign()?;

    let mut agent = cluster.start(&[])?;
    cluster.wait("kube-proxy's tables are gone", |c| {
        let tables = c.lab.node().exec("nft", ["list", "tables"], "")?;
        Ok(!tables.contains("kube-proxy") && tables.contains("ip shunt"))
    })?;
    let at_change = transfer.bytes();
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    // What follows the change counts as well.
    std::thread::sleep(Duration::from_millis(500));
    let report = storm.stop()?;
    assert!(report.attempted > 100 && report.failures.is_empty(), "{report}");
    assert!(transfer.bytes() > at_change, "a connection that kube-proxy translated stands still");
    transfer.stop()?;
    assert_eq!(foreign()?, before, "somebody else's table was touched");

    // And back: everything goes, kube-proxy's as well as ours, and nothing else.
    assert!(agent.stop()?.success());
    node.nft(KUBE_PROXY_NFTABLES.split("table ip of-").next().context("text")?)?;
    let mut cleanup = cluster.start(&["--cleanup"])?;
    assert!(cleanup.wait(LONG)?.success(), "{cleanup}");
    assert_eq!(node.exec("nft", ["list", "tables"], "")?.trim(), "table ip of-somebody-else");
    Ok(())
}

/// What kube-proxy 1.36 in iptables mode has for the Service of this test, and rules of others.
pub(crate) const KUBE_PROXY_IPTABLES: &str = r#"*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:FOREIGN - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -j FOREIGN
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A FOREIGN -j RETURN
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-SVC-ABCDEFGHIJKLMNOP - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-SVC-ABCDEFGHIJKLMNOP
-A KUBE-SVC-ABCDEFGHIJKLMNOP ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
-A KUBE-SVC-ABCDEFGHIJKLMNOP -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SVC-ABCDEFGHIJKLMNOP -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.244.1.11:8080
-A KUBE-SEP-BBBBBBBBBBBBBBBB -p tcp -m tcp -j DNAT --to-destination 10.244.1.12:8080
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*mangle
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"#;

/// Chains of kube-proxy, or of a mode with its names, in a flavour of iptables.
pub(crate) fn kube_chains(cluster: &Cluster, flavour: &str) -> Result<usize> {
    let saved = cluster.lab.node().exec(&format!("iptables-{flavour}-save"), [""; 0], "")?;
    Ok(saved.lines().filter(|line| line.starts_with(":KUBE-")).count())
}

#[test]
fn a_node_is_taken_over_from_kube_proxys_iptables_mode() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    for flavour in ["nft", "legacy"] {
        let cluster = Cluster::new()?;
        let node = cluster.lab.node();
        node.exec(&format!("iptables-{flavour}-restore"), ["--noflush"], KUBE_PROXY_IPTABLES)?;
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(3));
        let client = cluster.lab.client();
        let storm =
            client.storm(StormSpec { probe: probe.clone(), rate: 200, duration: Duration::from_mins(1) })?;
        let transfer = client.transfer(&TransferSpec { probe, pace: None, limit: None })?;
        let mut agent = cluster.start(&[])?;
        cluster.wait("kube-proxy's chains are gone", |c| Ok(kube_chains(c, flavour)? == 0))?;
        let at_change = transfer.bytes();
        cluster.endpoints(&["10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-b"])?;
        // What follows the change counts as well.
        std::thread::sleep(Duration::from_millis(500));
        let report = storm.stop()?;
        assert!(report.attempted > 50 && report.failures.is_empty(), "{flavour}: {report}");
        assert!(
            transfer.bytes() > at_change,
            "{flavour}: a connection that kube-proxy translated stands still"
        );
        transfer.stop()?;
        let saved = node.exec(&format!("iptables-{flavour}-save"), [""; 0], "")?;
        assert!(saved.contains("-A FORWARD -j FOREIGN") && saved.contains("-A FOREIGN -j RETURN"), "{saved}");
        agent.stop()?;
    }
    Ok(())
}

/// ebpf mode takes new connections at once, and what kube-proxy has stays until those have ended that it translated.
#[test]
fn ebpf_mode_takes_over_from_kube_proxy_without_a_break() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let (cgroup, bpf) = (place::cgroup("takeover")?, place::bpffs("takeover")?);
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let arguments = ["--cgroup-root".to_owned(), path(&cgroup)?, "--bpf-fs-root".to_owned(), path(&bpf)?];
    let document = "apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: ebpf\n";
    for rules in ["nftables", "nft", "legacy"] {
        let cluster = Cluster::new()?;
        let node = cluster.lab.node();
        let left = |c: &Cluster| match rules {
            "nftables" => Ok(c.lab.node().exec("nft", ["list", "tables"], "")?.contains(" kube-proxy")),
            flavour => Ok::<_, anyhow::Error>(kube_chains(c, flavour)? > 0),
        };
        match rules {
            "nftables" => node.nft(KUBE_PROXY_NFTABLES)?,
            flavour => {
                node.exec(&format!("iptables-{flavour}-restore"), ["--noflush"], KUBE_PROXY_IPTABLES)?;
            }
        }
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        let probe = Probe::tcp("10.96.0.10:80".parse()?).timeout(Duration::from_secs(10));
        let client = cluster.lab.client();
        let storm =
            client.storm(StormSpec { probe: probe.clone(), rate: 200, duration: Duration::from_mins(2) })?;
        let transfer = client.transfer(&TransferSpec { probe, pace: Some(1 << 20), limit: None })?;

        cluster.write_files(&format!("{KUBEADM}---\n{document}"))?;
        let mut agent = cluster.start(&arguments.each_ref().map(String::as_str))?;
        cluster.wait("in sync", |_| Ok(agent.stderr().matches("in sync with the kernel").count() >= 2))?;
        cluster.endpoints(&["10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-b"])?;
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        // Longer than rules would stay otherwise.
        std::thread::sleep(Duration::from_secs(4));
        assert!(left(&cluster)?, "{rules}: gone while a connection needs them: {agent}");
        let bytes = transfer.bytes();
        cluster.wait("the connection goes on", |_| Ok(transfer.bytes() > bytes))?;
        transfer.stop().context(rules)?;
        cluster
            .wait("nothing of kube-proxy is left", |c| Ok(!left(c)?))
            .with_context(|| agent.to_string())?;
        cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
        let report = storm.stop()?;
        assert!(
            report.attempted > 500 && report.failures.is_empty(),
            "{rules}: {report} {:?}: {agent}",
            report.failures
        );
        assert!(agent.stop()?.success());
        let more = ["--cleanup"].into_iter().chain(arguments.iter().map(String::as_str));
        let mut cleanup = cluster.start(&more.collect::<Vec<_>>())?;
        assert!(cleanup.wait(LONG)?.success(), "{cleanup}");
        assert!(!bpf.join("shunt").exists(), "{cleanup}");
    }
    Ok(())
}

#[test]
fn leftovers_stay_where_they_are_to_stay() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.lab.node().nft(KUBE_PROXY_NFTABLES)?;
    cluster.write_files(&format!(
        "{KUBEADM}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nleftovers: Keep\nfuture: 1\n"
    ))?;
    let mut agent = cluster.start(&[])?;
    agent.wait_for("ShuntConfiguration: unknown field \"future\"", LONG)?;
    cluster.wait("in sync", |c| Ok(c.get("127.0.0.1:10256", "/healthz")?.body.contains("IPv4")))?;
    cluster.endpoints(&["10.244.1.11"]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(cluster.lab.node().exec("nft", ["list", "tables"], "")?.contains("table ip kube-proxy"));
    agent.stop()?;
    Ok(())
}
