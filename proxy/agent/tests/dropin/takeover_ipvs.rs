//! A node that kube-proxy has programmed in its ipvs mode, in the guest: no connection breaks when it is taken over,
//! there is in the end what a fresh start makes, and what belongs to others is as it was.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Namespace, Probe, Storm, StormSpec, Transfer, TransferSpec, place};

use crate::cluster::{Cluster, KUBEADM, LONG};

/// The sets that kube-proxy 1.36 makes at its start, used or not, with the type of each and whether its name begins
/// with `KUBE-6-` and is cut to 31 characters for IPv6.
const SETS: [(&str, &str); 17] = [
    ("LOOP-BACK", "hash:ip,port,ip"),
    ("CLUSTER-IP", "hash:ip,port"),
    ("EXTERNAL-IP", "hash:ip,port"),
    ("EXTERNAL-IP-LOCAL", "hash:ip,port"),
    ("LOAD-BALANCER", "hash:ip,port"),
    ("LOAD-BALANCER-FW", "hash:ip,port"),
    ("LOAD-BALANCER-LOCAL", "hash:ip,port"),
    ("LOAD-BALANCER-SOURCE-IP", "hash:ip,port,ip"),
    ("LOAD-BALANCER-SOURCE-CIDR", "hash:ip,port,net"),
    ("NODE-PORT-TCP", "bitmap:port"),
    ("NODE-PORT-LOCAL-TCP", "bitmap:port"),
    ("NODE-PORT-UDP", "bitmap:port"),
    ("NODE-PORT-LOCAL-UDP", "bitmap:port"),
    ("NODE-PORT-SCTP-HASH", "hash:ip,port"),
    ("NODE-PORT-LOCAL-SCTP-HASH", "hash:ip,port"),
    ("HEALTH-CHECK-NODE-PORT", "bitmap:port"),
    ("IPVS-IPS", "hash:ip"),
];

/// For the Service of this test, and for one that nobody has any more.
const ELEMENTS: &str = "\
add KUBE-LOOP-BACK 10.244.1.11,tcp:8080,10.244.1.11
add KUBE-LOOP-BACK 10.244.1.12,tcp:8080,10.244.1.12
add KUBE-CLUSTER-IP 10.96.0.10,tcp:80
add KUBE-CLUSTER-IP 10.96.0.99,udp:53
add KUBE-LOAD-BALANCER 203.0.113.1,tcp:80
add KUBE-LOAD-BALANCER-LOCAL 203.0.113.1,tcp:80
add KUBE-NODE-PORT-TCP 30080
add KUBE-NODE-PORT-LOCAL-TCP 30080
add KUBE-HEALTH-CHECK-NODE-PORT 31234
add KUBE-IPVS-IPS 10.96.0.10
add KUBE-IPVS-IPS 10.96.0.99
add KUBE-IPVS-IPS 203.0.113.1
";

/// Node ports are served at each address of the node.
const SERVERS: [&str; 4] = ["10.96.0.10:80", "203.0.113.1:80", "192.0.2.11:30080", "10.244.1.1:30080"];

/// Rules for one family; those for sets are there if the sets have elements.
const RULES: &str = r#"*filter
:KUBE-FORWARD - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A INPUT -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-A FORWARD -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A OUTPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-OUT-FILTER
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-SOURCE-RANGES-FIREWALL -j DROP
SETS-OF-FILTER
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-SERVICES -s LOOPBACK -j RETURN
SETS-OF-NAT
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
COMMIT
"#;
const FILTER_BY_SETS: &str = r#"-A KUBE-NODE-PORT -m comment --comment "Kubernetes health check node port" -m set --match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j ACCEPT
-A KUBE-IPVS-FILTER -m set --match-set KUBE-LOAD-BALANCER dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set KUBE-EXTERNAL-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set KUBE-EXTERNAL-IP-LOCAL dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT
-A KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-LOAD-BALANCER dst,dst -j RETURN
-A KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-EXTERNAL-IP dst,dst -j RETURN
-A KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-EXTERNAL-IP-LOCAL dst,dst -j RETURN
-A KUBE-IPVS-OUT-FILTER -m set --match-set KUBE-HEALTH-CHECK-NODE-PORT dst -j RETURN
-A KUBE-IPVS-OUT-FILTER -m conntrack --ctstate NEW -m set --match-set KUBE-IPVS-IPS dst -j REJECT"#;
const NAT_BY_SETS: &str = r#"-A KUBE-POSTROUTING -m comment --comment "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose" -m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-SERVICES -m comment --comment "Kubernetes service lb portal" -m set --match-set KUBE-LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
-A KUBE-LOAD-BALANCER -m comment --comment "Kubernetes service load balancer ip + port with externalTrafficPolicy=local" -m set --match-set KUBE-LOAD-BALANCER-LOCAL dst,dst -j RETURN
-A KUBE-NODE-PORT -p tcp -m comment --comment "Kubernetes nodeport TCP port with externalTrafficPolicy=local" -m set --match-set KUBE-NODE-PORT-LOCAL-TCP dst -j RETURN
-A KUBE-NODE-PORT -p tcp -m comment --comment "Kubernetes nodeport TCP port for masquerade purpose" -m set --match-set KUBE-NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES ! -s 10.244.0.0/16 -m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-SERVICES -m set --match-set KUBE-LOAD-BALANCER dst,dst -j ACCEPT"#;

/// What belongs to the kubelet and to others. ipvs mode is told of their virtual servers by `excludeCIDRs`, as
/// kube-proxy is; what removes leftovers goes by sets and addresses.
const FOREIGN_RULES: &str = "\
*mangle
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:FOREIGN - [0:0]
-A FOREIGN -m set --match-set KUBE-OF-OTHERS src -j RETURN
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:FOREIGN - [0:0]
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -j FOREIGN
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A FOREIGN -j RETURN
COMMIT
";
const FOREIGN_SETS: &str = "create KUBE-OF-OTHERS hash:ip\nadd KUBE-OF-OTHERS 192.0.2.77\n";
const FOREIGN_SERVERS: &str = "\
-A -t 198.51.100.77:80 -s wlc
-a -t 198.51.100.77:80 -r 10.244.1.11:8080 -m -w 7
-A -f 77 -s sh
-a -f 77 -r 10.244.1.12 -g -w 3
";

fn exec(node: &Namespace, program: &str, args: &[&str], input: &str) -> Result<String> {
    node.exec(program, args.iter().copied(), input)
}

fn foreign(node: &Namespace) -> Result<()> {
    exec(node, "ipset", &["restore"], FOREIGN_SETS)?;
    exec(node, "iptables-legacy-restore", &["--noflush"], FOREIGN_RULES)?;
    exec(node, "ipvsadm", &["-R"], FOREIGN_SERVERS)?;
    exec(node, "ip", &["link", "add", "others0", "type", "dummy"], "")?;
    exec(node, "ip", &["address", "add", "198.51.100.77/32", "dev", "others0"], "")?;
    Ok(())
}

/// Everything that kube-proxy leaves, in the order in which it makes it.
fn kube_proxy(node: &Namespace) -> Result<()> {
    for key in ["vs.conntrack", "vs.expire_nodest_conn", "vs.expire_quiescent_template", "ip_forward"] {
        exec(node, "sysctl", &["-qw", &format!("net.ipv4.{key}=1")], "")?;
    }
    exec(node, "ip", &["link", "add", "kube-ipvs0", "type", "dummy"], "")?;
    let mut sets = String::new();
    for (prefix, family) in [("KUBE-", "inet"), ("KUBE-6-", "inet6")] {
        for (name, kind) in SETS {
            let mut name = format!("{prefix}{name}");
            name.truncate(31);
            match kind {
                "bitmap:port" => writeln!(sets, "create {name} {kind} range 0-65535")?,
                _ => writeln!(sets, "create {name} {kind} family {family} hashsize 1024 maxelem 65536")?,
            }
        }
    }
    exec(node, "ipset", &["restore"], &(sets + ELEMENTS))?;
    let rules = |filter, nat, loopback| {
        RULES.replace("SETS-OF-FILTER", filter).replace("SETS-OF-NAT", nat).replace("LOOPBACK", loopback)
    };
    let v4 = rules(FILTER_BY_SETS, NAT_BY_SETS, "127.0.0.0/8");
    exec(node, "iptables-legacy-restore", &["--noflush"], &v4)?;
    exec(node, "ip6tables-legacy-restore", &["--noflush"], &rules("", "", "::1/128"))?;
    let mut servers = String::from("-A -u 10.96.0.99:53 -s rr -p 10800\n");
    for server in SERVERS {
        writeln!(servers, "-A -t {server} -s rr")?;
        for pod in ["10.244.1.11:8080", "10.244.1.12:8080"] {
            writeln!(servers, "-a -t {server} -r {pod} -m -w 1")?;
        }
    }
    exec(node, "ipvsadm", &["-R"], &servers)?;
    for address in ["10.96.0.10/32", "10.96.0.99/32", "203.0.113.1/32"] {
        exec(node, "ip", &["address", "add", address, "dev", "kube-ipvs0"], "")?;
    }
    Ok(())
}

/// Rules, sets with their elements, virtual servers with their destinations, and addresses.
fn holdings(node: &Namespace) -> Result<BTreeSet<String>> {
    let run = |program: &str, args: &[&str]| exec(node, program, args, "");
    let mut all = BTreeSet::new();
    for tool in ["iptables", "ip6tables"] {
        let (mut table, mut chain, mut number) = (String::new(), String::new(), 0);
        for line in run(&format!("{tool}-legacy-save"), &[])?.lines() {
            match line.chars().next() {
                Some('*') => line.clone_into(&mut table),
                // Tables that a tool has looked at have the kernel's chains.
                Some(':') if !line.contains(" - [") => {}
                Some(':') => {
                    all.insert(format!("{tool} {table} {}", line.split(" [").next().unwrap_or(line)));
                }
                Some('-') => {
                    let of = line.split(' ').nth(1).unwrap_or_default();
                    number = if of == chain { number + 1 } else { 0 };
                    of.clone_into(&mut chain);
                    all.insert(format!("{tool} {table} {number} {line}"));
                }
                _ => {}
            }
        }
    }
    for line in run("ipset", &["save"])?.lines() {
        // How large the kernel's table is, and its random number, are its own.
        let words = line.split(' ').collect::<Vec<_>>();
        let own = |n: usize| ["hashsize", "initval", "bucketsize"].contains(&words[n]);
        let kept = (0..words.len()).filter(|n| !own(*n) && (*n == 0 || !own(n - 1))).map(|n| words[n]);
        all.insert(kept.collect::<Vec<_>>().join(" "));
    }
    all.extend(run("ipvsadm", &["-Sn"])?.lines().map(str::to_owned));
    for line in run("ip", &["-o", "address", "show"])?.lines() {
        // The index of a link depends on how many there were before it.
        let line = line.split_once(": ").map_or(line, |(_, rest)| rest);
        if !line.contains("scope link") {
            all.insert(line.to_owned());
        }
    }
    Ok(all)
}

fn configuration(mode: &str) -> String {
    let mut kube_proxy = KUBEADM.to_owned();
    if mode == "ipvs" {
        kube_proxy = kube_proxy.replace("excludeCIDRs: null", "excludeCIDRs: [198.51.100.0/24]");
    }
    format!(
        "{kube_proxy}---\napiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: {mode}\niptablesFlavour: legacy\n"
    )
}

/// What a start in a mode makes of a node that only others have programmed, and what is there before.
fn fresh(mode: &str, arguments: &[&str]) -> Result<[BTreeSet<String>; 2]> {
    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    foreign(node)?;
    let before = holdings(node)?;
    cluster.write_files(&configuration(mode))?;
    let mut agent = cluster.start(arguments)?;
    agent_in_sync(&cluster, &agent)?;
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    // What is looked for after the rules are in place.
    std::thread::sleep(Duration::from_secs(1));
    let made = holdings(node)?;
    ensure!(agent.stop()?.success(), "{agent}");
    Ok([before, made])
}

fn agent_in_sync(cluster: &Cluster, agent: &shunt_harness::lab::ChildGuard) -> Result<()> {
    cluster
        .wait("in sync", |_| Ok(agent.stderr().matches("in sync with the kernel").count() >= 2))
        .with_context(|| agent.to_string())
}

fn is_taken_over(mode: &str) -> Result<()> {
    let name = format!("takeover-{mode}");
    let (cgroup, bpf) = (place::cgroup(&name)?, place::bpffs(&name)?);
    let path = |path: &std::path::Path| path.to_str().map(str::to_owned).context("a path");
    let arguments = ["--cgroup-root".to_owned(), path(&cgroup)?, "--bpf-fs-root".to_owned(), path(&bpf)?];
    let arguments = arguments.each_ref().map(String::as_str);
    let [others, expected] = fresh(mode, &arguments)?;

    let cluster = Cluster::new()?;
    let node = cluster.lab.node();
    foreign(node)?;
    kube_proxy(node)?;
    let waits = |expected: &BTreeSet<String>, what: &str| {
        let mut differing = Vec::new();
        cluster
            .wait(what, |c| {
                let held = holdings(c.lab.node())?;
                differing = held.symmetric_difference(expected).cloned().collect();
                Ok(differing.is_empty())
            })
            .with_context(|| format!("{mode}: left or missing: {differing:#?}"))
    };
    let all = ["10.96.0.10:80", "203.0.113.1:80", "192.0.2.11:30080"];
    for address in all {
        cluster.reach(address, &["pod-a", "pod-b"])?;
    }
    let probe = |to: &str| Ok::<_, anyhow::Error>(Probe::tcp(to.parse()?).timeout(Duration::from_secs(10)));
    let client = cluster.lab.client();
    let storms = all
        .map(|to| client.storm(StormSpec { probe: probe(to)?, rate: 15, duration: Duration::from_mins(5) }));
    let storms = storms.into_iter().collect::<Result<Vec<_>>>()?;
    // What the programs of ebpf mode do with connections of the node itself to its own addresses is in
    // docs/migration.md.
    let from: &[&Namespace] = if mode == "ebpf" { &[client] } else { &[client, node] };
    let ways = from.iter().flat_map(|from| all.map(|to| (*from, to)));
    let transfers = ways.map(|(from, to)| {
        from.transfer(&TransferSpec { probe: probe(to)?, pace: Some(1 << 18), limit: None })
    });
    let transfers = transfers.collect::<Result<Vec<_>>>()?;
    let go_on = |what: &str| {
        let bytes: Vec<u64> = transfers.iter().map(Transfer::bytes).collect();
        cluster.wait(what, |_| Ok(transfers.iter().zip(&bytes).all(|(t, bytes)| t.bytes() > *bytes)))
    };
    go_on("connections through kube-proxy's rules")?;
    // What belongs to others is not waited for. Into ebpf mode it is: see docs/migration.md.
    let to_others = (mode != "ebpf").then(|| {
        let probe = probe("198.51.100.77:80")?;
        client.transfer(&TransferSpec { probe, pace: Some(1 << 18), limit: None })
    });
    let to_others = to_others.transpose()?;

    cluster.write_files(&configuration(mode))?;
    let mut agent = cluster.start(&arguments)?;
    agent_in_sync(&cluster, &agent)?;
    cluster.endpoints(&["10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-b"])?;
    cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
    cluster.reach("10.96.0.10:80", &["pod-a", "pod-b"])?;
    // Longer than what is left would stay otherwise.
    std::thread::sleep(Duration::from_secs(4));
    go_on("connections from before").with_context(|| agent.to_string())?;
    if mode == "ipvs" {
        waits(&expected, "what a fresh start makes, under load")?;
    }
    let begun: Vec<u64> = storms.iter().map(Storm::attempted).collect();
    cluster.wait("new connections", |_| {
        Ok(storms.iter().zip(&begun).all(|(storm, begun)| storm.attempted() > begun + 10))
    })?;
    for (n, transfer) in transfers.into_iter().enumerate() {
        transfer.stop().with_context(|| format!("{mode}: connection {n} from before: {agent}"))?;
    }
    waits(&expected, "what a fresh start makes").with_context(|| agent.to_string())?;
    for storm in storms {
        let report = storm.stop()?;
        println!("{mode}: {report}");
        ensure!(
            report.attempted > 30 && report.failures.is_empty(),
            "{mode}: {report} {:?}: {agent}",
            report.failures
        );
    }
    ensure!(agent.stop()?.success(), "{agent}");
    if let Some(transfer) = to_others {
        let bytes = transfer.bytes();
        cluster.wait("a connection through a virtual server of others", |_| Ok(transfer.bytes() > bytes))?;
        transfer.stop()?;
    }

    // And back: kube-proxy is there again, and both go.
    let cleanup = || -> Result<()> {
        let mut cleanup = cluster.start(&[&["--cleanup"], &arguments[..]].concat())?;
        ensure!(cleanup.wait(LONG)?.success(), "{cleanup}");
        waits(&others, "only what belongs to others").with_context(|| cleanup.to_string())
    };
    cleanup()?;
    kube_proxy(node)?;
    cleanup()
}

macro_rules! taken_over {
    ($($name:ident: $mode:literal),*) => { $(
        #[test]
        fn $name() {
            test_in_guest(module_path!(), stringify!($name), || is_taken_over($mode).unwrap());
        }
    )* };
}

taken_over!(
    ipvs_mode_takes_over_what_kube_proxys_ipvs_mode_left: "ipvs",
    iptables_mode_takes_over_from_kube_proxys_ipvs_mode: "iptables",
    ebpf_mode_takes_over_from_kube_proxys_ipvs_mode: "ebpf"
);
