//! ebpf mode as the suites see it.

pub mod place;

use anyhow::{Result, ensure};
use shunt_core::id::IpFamily;
use shunt_harness::lab::{Lab, Namespace};
use shunt_mode::{KernelError, Plan, Remedy};
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::fake::FakeKernel;
use shunt_mode_ebpf::kernel::Bpf;
use shunt_mode_ebpf::op::Op;
use shunt_mode_ebpf::plan::{TRANSACTION_MAX, plan_within};
use shunt_mode_ebpf::render::Desired;
use shunt_mode_ebpf::state::State;

use super::ModeUnderTest;

/// ebpf mode.
#[derive(Debug)]
pub struct EbpfMode;

impl ModeUnderTest for EbpfMode {
    type State = State;
    type Desired = Desired;
    type Op = Op;
    type Fake = Ebpf<FakeKernel>;
    type Real = Ebpf<Bpf>;

    const OPS_PER_ENDPOINT: usize = 8;

    fn fake(family: IpFamily) -> Self::Fake {
        Ebpf::new(FakeKernel::new(family))
    }

    fn real(family: IpFamily) -> Result<Self::Real, KernelError> {
        let options = place::options().map_err(|error| KernelError {
            context: "a place for the maps".to_owned(),
            source: error.into(),
            remedy: Remedy::Fatal,
        })?;
        Bpf::open(family, options).map(Ebpf::new)
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
        let transaction = match tightness {
            0 | 1 => 1,
            2 => 2,
            3 => 3,
            4 => 7,
            _ => TRANSACTION_MAX,
        };
        plan_within(observed, desired, transaction)
    }

    fn is_garbage(_op: &Op) -> bool {
        false
    }

    fn check_text(_namespace: &Namespace, text: &str) -> Result<()> {
        const MAPS: [&str; 7] = ["config", "names", "frontends", "slots", "endpoints", "addresses", "ranges"];
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let map = line.split_once(' ').map_or("", |(map, _)| map);
            ensure!(MAPS.contains(&map) && line.contains(" = "), "no map entry: {line}");
        }
        Ok(())
    }

    fn list(_namespace: &Namespace) -> Result<String> {
        Ok(String::new())
    }

    fn foreign(_namespace: &Namespace) -> Result<()> {
        Ok(())
    }

    fn damage(_namespace: &Namespace, _family: IpFamily, _script: &str) -> Result<()> {
        anyhow::bail!("no kernel")
    }

    fn damages() -> &'static [(&'static str, &'static str)] {
        &[]
    }

    fn affinity_records(_namespace: &Namespace, _family: IpFamily) -> Result<usize> {
        anyhow::bail!("no kernel")
    }

    fn add_affinity_records(_namespace: &Namespace, _family: IpFamily, _count: usize) -> Result<()> {
        anyhow::bail!("no kernel")
    }

    fn settle(lab: &Lab) -> Result<bool> {
        // Pods stay outside: their packets meet the programs at devices.
        lab.node().set_cgroup(lab.node().run(place::cgroup)?);
        Ok(true)
    }

    fn lacks(_case: &str, packet: Option<&str>) -> Option<&'static str> {
        let own_vip = matches!(packet, Some("vip-source-to-lb1" | "vip-source-to-lb2"));
        // The walker knows the answer, but nothing leaves a device that tc could look at.
        own_vip.then_some("a load balancer's address with source ranges that the node itself has")
    }
}
