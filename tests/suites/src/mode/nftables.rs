//! nftables mode, as the suites see it.

use anyhow::{Context as _, Result};
use shunt_core::id::IpFamily;
use shunt_harness::lab::Namespace;
use shunt_mode::{KernelError, Plan};
use shunt_mode_nftables::Nftables;
use shunt_mode_nftables::fake::FakeKernel;
use shunt_mode_nftables::kernel::Netlink;
use shunt_mode_nftables::op::Op;
use shunt_mode_nftables::plan::Limits;
use shunt_mode_nftables::render::Desired;
use shunt_mode_nftables::state::State;

use super::ModeUnderTest;

/// nftables mode.
#[derive(Debug)]
pub struct NftablesMode;

impl ModeUnderTest for NftablesMode {
    type State = State;
    type Desired = Desired;
    type Op = Op;
    type Fake = Nftables<FakeKernel>;
    type Real = Nftables<Netlink>;

    const OPS_PER_ENDPOINT: usize = 12;

    fn fake(family: IpFamily) -> Self::Fake {
        Nftables::new(FakeKernel::new(family))
    }

    fn real(family: IpFamily) -> Result<Self::Real, KernelError> {
        Netlink::open(family).map(Nftables::new)
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
        let (transaction, services, endpoints) = match tightness {
            0 => (usize::MAX, 1 << 14, 1 << 16),
            1 => (1, 1 << 14, 1 << 16),
            2 => (usize::MAX, 1, 1),
            3 => (2, 2, 1 << 16),
            4 => (3, 1 << 14, 2),
            _ => (5, 3, 4),
        };
        shunt_mode_nftables::plan::plan_within(
            observed,
            desired,
            &Limits { transaction, services, endpoints },
        )
    }

    fn is_garbage(op: &Op) -> bool {
        match op {
            Op::DeleteClass(_) | Op::DeleteChain(_) | Op::DeleteTable(_) => true,
            Op::SetRules(_, rules) => rules.is_empty(),
            _ => false,
        }
    }

    fn check_text(namespace: &Namespace, text: &str) -> Result<()> {
        namespace.exec("nft", ["-c", "-f", "-"], text).map(drop)
    }

    fn list(namespace: &Namespace) -> Result<String> {
        let binaries = std::env::var("SHUNT_NFT_BINARIES").unwrap_or_else(|_| "nft".to_owned());
        let mut listed = None;
        for nft in binaries.split(':') {
            let text = namespace.exec(nft, ["list", "ruleset"], "")?;
            for family in ["ip", "ip6"] {
                let ours = format!("\n{text}").contains(&format!("\ntable {family} shunt {{"));
                let ours = if ours {
                    namespace.exec(nft, ["-s", "list", "table", family, "shunt"], "")?
                } else {
                    String::new()
                };
                let rules =
                    ours.lines().filter(|line| line.starts_with("\t\t") && !line.contains("elements"));
                // What rules write into the map of records looks the same.
                let rules = rules.map(|line| line.replace("@affinity {", ""));
                let mut sets = rules.filter(|line| line.contains('{'));
                anyhow::ensure!(sets.next().is_none(), "{nft} finds an anonymous set in\n{ours}");
            }
            listed.get_or_insert(text);
        }
        listed.context("SHUNT_NFT_BINARIES names no nft")
    }

    fn foreign(_namespace: &Namespace) -> Result<()> {
        // The mode has tables of its own.
        Ok(())
    }

    fn damage(namespace: &Namespace, _family: IpFamily, script: &str) -> Result<()> {
        namespace.nft(script)
    }

    fn damages() -> &'static [(&'static str, &'static str)] {
        &[
            ("008-etp-local", "delete table ip shunt"),
            ("008-etp-local", "flush map ip shunt services"),
            ("008-etp-local", "flush map ip shunt endpoints"),
            ("008-etp-local", "flush map ip shunt node-ports"),
            ("008-etp-local", "flush map ip shunt node-port-endpoints"),
            ("008-etp-local", "flush map ip shunt classes"),
            ("008-etp-local", "flush set ip shunt node-port-ips"),
            ("008-etp-local", "flush set ip shunt cluster-ips"),
            ("008-etp-local", "flush set ip shunt hairpin"),
            ("008-etp-local", "flush set ip shunt service-cidrs"),
            ("008-etp-local", "flush chain ip shunt services"),
            ("008-etp-local", "flush chain ip shunt nat-prerouting"),
            ("008-etp-local", "flush chain ip shunt nat-postrouting"),
            ("008-etp-local", "flush chain ip shunt pick-2"),
            ("008-etp-local", "insert rule ip shunt services drop"),
            ("008-etp-local", "add chain ip shunt mine; add rule ip shunt mine drop"),
            ("008-etp-local", "add set ip shunt mine { type ipv4_addr; }"),
            ("008-etp-local", "add element ip shunt services { 9.9.9.9 . tcp . 80 : 100:0 }"),
            ("008-etp-local", "add element ip shunt services { 9.9.9.9 . tcp . 80 : 77:1 }"),
            ("008-etp-local", "add element ip shunt cluster-ips { 9.9.9.9 }"),
            ("008-etp-local", "add element ip shunt hairpin { 9.9.9.9 . 8.8.8.8 . tcp . 80 }"),
            ("008-etp-local", "add element ip shunt service-cidrs { 9.9.9.3-9.9.9.77 }"),
            ("008-etp-local", "add element ip shunt classes { 77:1 : drop }"),
            (
                "001-no-endpoints-reject",
                "delete element ip shunt classes { 100:0 }; add element ip shunt classes { 100:0 : drop }",
            ),
            ("008-etp-local", "add element ip shunt guarded { 1.2.3.4 . tcp . 80 }"),
            ("008-etp-local", "delete set ip shunt guarded"),
            ("003-loadbalancer-source-ranges", "flush set ip shunt guarded"),
            ("003-loadbalancer-source-ranges", "flush set ip shunt source-ranges"),
            (
                "003-loadbalancer-source-ranges",
                "add element ip shunt source-ranges { 1.2.3.4 . tcp . 80 . 9.9.9.0-9.9.9.77 }",
            ),
            ("006-nodeport-v6-primary", "flush map ip6 shunt endpoints"),
            ("044-session-affinity", "flush map ip shunt affinity-endpoints"),
            ("044-session-affinity", "flush map ip shunt affinity-slots"),
            ("044-session-affinity", "flush map ip shunt classes"),
            ("044-session-affinity", "add element ip shunt affinity-endpoints { 1:4001 : 9.9.9.9 . 9 }"),
            ("044-session-affinity", "add element ip shunt affinity-endpoints { 9:9 : 9.9.9.9 . 9 }"),
            ("044-session-affinity", "add chain ip shunt affinity-00001-ns/other/tcp"),
            ("044-session-affinity", "add chain ip shunt affinity-00001-ns1/svc1/p80/tcp"),
            ("044-session-affinity", "add chain ip shunt affinity-here-1ffff-ns1/svc1/p80/tcp"),
            ("006-nodeport-v6-primary", "flush chain ip6 shunt services"),
        ]
    }

    fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize> {
        let ip = if family == IpFamily::V4 { "ip" } else { "ip6" };
        let text = namespace.exec("nft", ["list", "map", ip, "shunt", "affinity"], "")?;
        Ok(text.matches(" expires ").count())
    }

    fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()> {
        let ip = if family == IpFamily::V4 { "ip" } else { "ip6" };
        let element = |n: usize| {
            let address = match family {
                IpFamily::V4 => format!("11.{}.{}.{}", n >> 16, (n >> 8) & 255, n & 255),
                IpFamily::V6 => format!("2a00::{n:x}"),
            };
            format!("1:4000 . {address} timeout 1h : 1:4001")
        };
        let elements: Vec<String> = (0..count).map(element).collect();
        namespace.nft(&format!("add element {ip} shunt affinity {{ {} }}", elements.join(", ")))
    }

    fn lacks(_case: &str, _packet: Option<&str>) -> Option<&'static str> {
        None
    }
}
