//! ebpf mode as the suites see it.

pub mod place;
pub mod small;

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use shunt_core::id::IpFamily;
use shunt_core::table::ForwardingTable;
use shunt_core::walk::{Packet, source_class};
use shunt_ebpf_abi::Endpoint;
use shunt_harness::lab::{Lab, Namespace};
use shunt_mode::{KernelError, Plan, Remedy};
use shunt_mode_ebpf::Ebpf;
use shunt_mode_ebpf::fake::FakeKernel;
use shunt_mode_ebpf::kernel::{Bpf, Kernel as _};
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

    fn is_settled(before: &ForwardingTable, after: &ForwardingTable, packet: &Packet) -> bool {
        // Who is a pod changes by one write, the frontends by theirs, before or after it.
        source_class(before, packet) == source_class(after, packet)
    }

    fn is_garbage(_op: &Op) -> bool {
        false
    }

    fn check_text(_namespace: &Namespace, text: &str) -> Result<()> {
        const MAPS: [&str; 8] =
            ["config", "names", "frontends", "slots", "endpoints", "addresses", "ranges", "maglev"];
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let map = line.split_once(' ').map_or("", |(map, _)| map);
            ensure!(MAPS.contains(&map) && line.contains(" = "), "no map entry: {line}");
        }
        Ok(())
    }

    fn list(namespace: &Namespace) -> Result<String> {
        // What is pinned, and the rules of others.
        let root = namespace.run(place::options)?.bpf_root.join("shunt");
        let mut listed = namespace.exec("nft", ["list", "ruleset"], "")?;
        for folder in ["maps", "programs", "links"] {
            let Ok(entries) = std::fs::read_dir(root.join(folder)) else { continue };
            let mut names: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            names.sort();
            for name in names {
                listed.push_str(&name.to_string_lossy());
                listed.push('\n');
            }
        }
        ensure!(!root.exists() || listed.contains("/links/connect4"), "pinned, but without links:\n{listed}");
        Ok(listed)
    }

    fn foreign(_namespace: &Namespace) -> Result<()> {
        Ok(())
    }

    fn damages() -> &'static [(&'static str, &'static str)] {
        &[
            ("008-etp-local", "remove links/connect4"),
            ("008-etp-local", "remove links/ingress"),
            ("008-etp-local", "remove maps/frontends"),
            ("008-etp-local", "remove maps/names"),
            ("008-etp-local", "set frontends: delete"),
            ("008-etp-local", "set slots: delete"),
            ("008-etp-local", "set endpoints: delete"),
            ("008-etp-local", "set addresses: delete"),
            ("008-etp-local", "set ranges: delete"),
            ("003-loadbalancer-source-ranges", "set ranges: delete"),
            ("006-nodeport-v6-primary", "set frontends: delete"),
        ]
    }

    fn damage(namespace: &Namespace, _family: IpFamily, damage: &str) -> Result<()> {
        let options = namespace.run(place::options)?;
        if let Some(file) = damage.strip_prefix("remove ") {
            // Links of devices have a number at the end.
            let file = options.bpf_root.join("shunt").join(file);
            let folder = file.parent().context("a folder")?;
            let mut files = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path());
            let begins = |path: &PathBuf| path.to_string_lossy().starts_with(&*file.to_string_lossy());
            return Ok(std::fs::remove_file(files.find(begins).context("no such file")?)?);
        }
        let map = damage.strip_prefix("set ").and_then(|rest| rest.strip_suffix(": delete"));
        let map = map.context("an unknown damage")?;
        for family in IpFamily::ALL {
            let mut kernel = namespace.run(|| Ok(Bpf::open(family, options.clone())?))?;
            let state = kernel.observe()?;
            let ops: Vec<Op> = match map {
                "frontends" => state.frontends().keys().map(|key| Op::SetFrontend(*key, None)).collect(),
                "slots" => state.used_slots().map(|(number, _)| Op::SetSlots(number, vec![0])).collect(),
                "endpoints" => {
                    state.endpoints().map(|(id, _)| Op::SetEndpoints(id, vec![Endpoint::default()])).collect()
                }
                "addresses" => state.addresses.keys().map(|a| Op::SetAddress(*a, 0)).collect(),
                _ => {
                    let ranges = state.ranges().iter();
                    ranges.flat_map(|(owner, r)| r.iter().map(|r| Op::DeleteRange(*owner, *r))).collect()
                }
            };
            kernel.carry_out(&ops)?;
        }
        Ok(())
    }

    fn is_repaired(observed: &State, wanted: &State) -> bool {
        // Where slots lie follows from history.
        let essence = |state: &State| -> Vec<String> {
            let lines = state.to_string();
            let lines = lines.lines().filter(|line| !line.starts_with("slots "));
            let word = |word: &str| word.split_once('+').map_or(word, |(_, count)| count).to_owned();
            lines.map(|line| line.split(' ').map(word).collect::<Vec<_>>().join(" ")).collect()
        };
        observed.installed == wanted.installed && essence(observed) == essence(wanted)
    }

    fn affinity_records(namespace: &Namespace, family: IpFamily) -> Result<usize> {
        let options = namespace.run(place::options)?;
        Ok(namespace.run(|| Ok(Bpf::open(family, options)?))?.affinity_clients()?)
    }

    fn add_affinity_records(namespace: &Namespace, family: IpFamily, count: usize) -> Result<()> {
        let options = namespace.run(place::options)?;
        let clients: Vec<IpAddr> = (0..u32::try_from(count)?)
            .map(|n| match family {
                IpFamily::V4 => IpAddr::from((0x0b00_0000 + n).to_be_bytes()),
                IpFamily::V6 => IpAddr::from([0x2a00, 0, 0, 0, 0, 0, (n >> 16) as u16, n as u16]),
            })
            .collect();
        Ok(namespace.run(|| Ok(Bpf::open(family, options)?))?.remember_clients(&clients)?)
    }

    fn settle(lab: &Lab) -> Result<bool> {
        // Pods stay outside: their packets meet the programs at devices.
        lab.node().set_cgroup(lab.node().run(place::cgroup)?);
        Ok(true)
    }

    fn lacks(_case: &str, _packet: Option<&str>) -> Option<&'static str> {
        None
    }
}
