//! How the suites see ipvs mode.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Result, bail};
use shunt_core::id::IpFamily;
use shunt_core::node::LocalDetector;
use shunt_core::table::{ForwardingTable, NodeFacts};
use shunt_core::walk::{Outcome, Packet, Reason, walk};
use shunt_harness::lab::Namespace;
use shunt_mode::{KernelError, Plan};
use shunt_mode_ipvs::Ipvs;
use shunt_mode_ipvs::fake::FakeKernel;
use shunt_mode_ipvs::kernel::{Linux, Options};
use shunt_mode_ipvs::op::Op;
use shunt_mode_ipvs::plan::plan_within;
use shunt_mode_ipvs::render::Desired;
use shunt_mode_ipvs::state::State;

use super::ModeUnderTest;

/// ipvs mode.
#[derive(Debug)]
pub struct IpvsMode;

/// Whether an address is on the dummy link.
fn is_vip(table: &ForwardingTable, address: IpAddr) -> bool {
    (table.is_cluster_ip(address) || table.has_frontends_at(address)) && !table.node().is_local(address)
}

impl ModeUnderTest for IpvsMode {
    type State = State;
    type Desired = Desired;
    type Op = Op;
    type Fake = Ipvs<FakeKernel>;
    type Real = Ipvs<Linux>;

    const NEEDS_GUEST: bool = true;
    const OPS_PER_ENDPOINT: usize = 12;
    const ONE_BY_ONE: bool = true;
    const AFFINITY_OF_PORTS: bool = false;
    const AFFINITY_FORGETS_CONNECTED: bool = false;

    fn fake(family: IpFamily) -> Self::Fake {
        Ipvs::new(FakeKernel::new(family))
    }

    fn real(family: IpFamily) -> Result<Self::Real, KernelError> {
        Linux::open(family, Options::default()).map(Ipvs::new)
    }

    fn held(fake: &mut Self::Fake) -> State {
        fake.kernel().state().clone()
    }

    fn fail_after(fake: &mut Self::Fake, commits: Option<usize>) {
        fake.kernel().fail_after = commits;
    }

    fn reads(fake: &mut Self::Fake) -> usize {
        fake.kernel().reads
    }

    fn plan_tight(observed: &State, desired: &Desired, tightness: u8) -> Plan<Op> {
        let most = match tightness {
            0 => usize::MAX,
            1 => 1,
            2 => 2,
            3 => 3,
            4 => 5,
            _ => 11,
        };
        plan_within(observed, desired, most)
    }

    fn is_garbage(_op: &Op) -> bool {
        false
    }

    /// VIPs are addresses of the node here. A packet that has one as its source is the node's own, and
    /// masqueraded, as nobody else could answer it. What is not served on a VIP is refused, for the
    /// node's own ports are behind it.
    fn expected(table: &ForwardingTable, packet: &Packet) -> Outcome {
        let walked = walk(table, packet);
        let miss = matches!(walked.reason, Reason::UnknownPort | Reason::Unallocated | Reason::NoFrontend);
        if miss {
            return if is_vip(table, packet.destination) { Outcome::Reject } else { walked.outcome };
        }
        if !is_vip(table, packet.source) {
            return walked.outcome;
        }
        let mut of_node = table.clone();
        let mut facts: NodeFacts = table.node().clone();
        facts.local_addresses.insert(packet.source);
        facts.local_detector = LocalDetector::None;
        of_node.set_node(facts);
        match walk(&of_node, packet).outcome {
            Outcome::Forward(endpoints) => {
                Outcome::Forward(endpoints.into_iter().map(|(endpoint, _)| (endpoint, true)).collect())
            }
            outcome => outcome,
        }
    }

    /// Where a packet comes from that has an address as its source which becomes a VIP is as open as with
    /// one that becomes the node's.
    fn is_settled(before: &ForwardingTable, after: &ForwardingTable, packet: &Packet) -> bool {
        is_vip(before, packet.source) == is_vip(after, packet.source)
    }

    /// ipset reads the sets. iptables would need a kernel with `xt_ipvs` to read the rules: it does in the
    /// tests in the kernel.
    fn check_text(namespace: &Namespace, text: &str) -> Result<()> {
        let mut sets = String::new();
        let mut section = "";
        for line in text.lines() {
            match line.strip_prefix("# ") {
                Some(name) => section = name,
                None if section == "ipset save" => sets.extend([line, "\n"]),
                None => {}
            }
        }
        namespace.exec("ipset", ["restore"], &sets)?;
        namespace.exec("ipset", ["destroy"], "").map(drop)
    }

    fn list(namespace: &Namespace) -> Result<String> {
        let mut all = String::new();
        for (tool, arguments) in [
            ("ipvsadm", &["-Sn"][..]),
            ("ipset", &["save"]),
            ("ip", &["-o", "link", "show", "type", "dummy"]),
            ("iptables-save", &[]),
            ("ip6tables-save", &[]),
        ] {
            let text = namespace.exec(tool, arguments.iter().copied(), "")?;
            // The kernel may list a virtual server twice while other namespaces change theirs.
            let mut servers = BTreeSet::new();
            let lines = text.lines().filter(|line| {
                // Tables without rules come into being by being looked at.
                let empty = line.starts_with(['#', '*', ':']) || *line == "COMMIT";
                (!empty || line.starts_with(":KUBE-")) && (tool != "ipvsadm" || servers.insert(*line))
            });
            all.extend(lines.flat_map(|line| [line, "\n"]));
        }
        Ok(all)
    }

    fn foreign(namespace: &Namespace) -> Result<()> {
        for tool in ["iptables", "ip6tables"] {
            let rules = "*nat\n:OTHER - [0:0]\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                -A PREROUTING -m comment --comment \"somebody's\" -j OTHER\n-A OTHER -m mark --mark 0x7 -j RETURN\n\
                -A KUBE-HP-X -p tcp -j KUBE-MARK-MASQ\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n*filter\n:KUBE-FIREWALL - [0:0]\n\
                -A FORWARD -j KUBE-FIREWALL\nCOMMIT\n";
            namespace.exec(&format!("{tool}-restore"), ["--noflush"], rules)?;
        }
        namespace.exec("ipset", ["create", "KUBE-OTHER", "hash:ip"], "")?;
        namespace.exec("ip", ["link", "add", "kube-other0", "type", "dummy"], "")?;
        namespace.exec("ipvsadm", ["-A", "-f", "7", "-s", "rr"], "").map(drop)
    }

    fn damage(namespace: &Namespace, _family: IpFamily, script: &str) -> Result<()> {
        namespace.exec("sh", ["-c", script], "").map(drop)
    }

    fn damages() -> &'static [(&'static str, &'static str)] {
        &[
            ("008-etp-local", "ipvsadm -C"),
            ("008-etp-local", "ip link del kube-ipvs0"),
            ("008-etp-local", "ip -4 address flush dev kube-ipvs0"),
            ("008-etp-local", "ip address add 9.9.9.9/32 dev kube-ipvs0"),
            ("008-etp-local", "ipset flush KUBE-FWMARK"),
            ("008-etp-local", "ipset flush KUBE-IPVS-IPS"),
            ("008-etp-local", "ipset flush KUBE-CLUSTER-IP"),
            ("008-etp-local", "ipset flush KUBE-LOAD-BALANCER"),
            ("008-etp-local", "ipset flush KUBE-NODE-PORT-TCP"),
            ("008-etp-local", "ipset flush KUBE-NODE-PORT-IPS"),
            ("008-etp-local", "ipset add KUBE-CLUSTER-IP 9.9.9.9,tcp:80"),
            ("008-etp-local", "ipset add KUBE-CLUSTER-IP 9.9.9.9,udplite:80"),
            ("008-etp-local", "ipset add KUBE-LOOP-BACK 9.9.9.9,tcp:80,9.9.9.9"),
            ("008-etp-local", "ipset add KUBE-NODE-PORT-UDP 77"),
            ("008-etp-local", "ipset add KUBE-SERVICE-CIDR 9.9.0.0/16"),
            ("008-etp-local", "ipset add KUBE-NO-LOCAL 9.9.9.9,tcp:80"),
            (
                "008-etp-local",
                "ipset create other hash:ip,port family inet maxelem 100 timeout 100 && \
                 ipset swap other KUBE-CLUSTER-IP && ipset destroy other",
            ),
            ("008-etp-local", "iptables -t nat -F KUBE-SERVICES"),
            ("008-etp-local", "iptables -t nat -F PREROUTING"),
            ("008-etp-local", "iptables -t mangle -F"),
            ("008-etp-local", "iptables -I KUBE-IPVS-FILTER -s 9.9.9.9 -j ACCEPT"),
            ("008-etp-local", "iptables -A FORWARD -j KUBE-FORWARD"),
            ("008-etp-local", "iptables -t nat -N KUBE-LOAD-BALANCER"),
            ("008-etp-local", "ipvsadm -A -t 9.9.9.9:80 -s rr"),
            ("008-etp-local", "echo 0 > /proc/sys/net/ipv4/vs/conntrack"),
            ("003-loadbalancer-source-ranges", "ipset flush KUBE-LOAD-BALANCER-FW"),
            ("003-loadbalancer-source-ranges", "ipset flush KUBE-LOAD-BALANCER-SOURCE-CIDR"),
            (
                "003-loadbalancer-source-ranges",
                "ipset add KUBE-LOAD-BALANCER-SOURCE-CIDR 1.2.3.4,tcp:80,9.9.0.0/16",
            ),
            ("006-nodeport-v6-primary", "ipset flush KUBE-6-CLUSTER-IP"),
            ("006-nodeport-v6-primary", "ip6tables -t nat -F KUBE-MARK-MASQ"),
        ]
    }

    /// Templates are listed as connections from port 0.
    fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize> {
        let text = namespace.exec("cat", ["/proc/net/ip_vs_conn"], "")?;
        let is_template = |line: &&str| {
            let mut words = line.split_whitespace().skip(1);
            let v6 = words.next().is_some_and(|address| address.len() > 8);
            v6 == (family == IpFamily::V6) && words.next() == Some("0000")
        };
        Ok(text.lines().filter(is_template).count())
    }

    fn add_affinity_records(_namespace: &Namespace, _family: IpFamily, _count: usize) -> Result<()> {
        bail!("the kernel makes templates itself")
    }

    fn lacks(case: &str, _packet: Option<&str>) -> Option<&'static str> {
        // Templates are made by packets alone; the kernel's table of connections has no bound.
        (case == "many clients").then_some("records cannot be made by hand")
    }
}
