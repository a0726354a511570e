//! The only file that touches the kernel: the port, and the adapter that runs the tools.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Mode, Remedy, Transaction, Unsupported};

use crate::fixed::Table;
use crate::flavour::{self, Flavour, Programs};
use crate::names;
use crate::op::{Op, Tool, restore_text};
use crate::plan;
use crate::process::{self, Namespace};
use crate::sets::Kind;
use crate::state::State;

/// What the mode needs of a kernel, for one family.
pub trait Kernel {
    /// Whether the mode can run here; names what is missing.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Makes the kernel route packets to loopback (`route_localnet`).
    fn route_loopback(&mut self) -> Result<(), KernelError>;
    /// Reads what is ours.
    fn observe(&mut self) -> Result<State, KernelError>;
    /// Carries out a transaction.
    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError>;
    /// Removes what is ours, in both flavours.
    fn remove(&mut self) -> Result<(), KernelError>;
    /// Whether the rules are still there, asked cheaply.
    fn intact(&mut self) -> Result<bool, KernelError>;
    /// Time spent waiting for the lock of the tables since this was last asked.
    fn waited(&mut self) -> Duration;
}

/// Seconds for which the tool waits for the lock of the tables.
const LOCK_TIMEOUT: &str = "10";
const LOCK_FILE: &str = "/run/xtables.lock";
const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";
/// The legacy tool reads a whole table to show one chain of it, and only the nat table is large: it is looked
/// at every so many times.
const NAT_LOOKS: u32 = 10;
/// A set may be in use for a moment after the rules that looked at it are gone.
const DESTROY_TRIES: u32 = 100;
const DESTROY_PAUSE: Duration = Duration::from_millis(10);

/// The kernel of a network namespace, by way of the tools.
#[derive(Debug)]
pub struct Tools {
    family: IpFamily,
    namespace: Namespace,
    programs: Option<Programs>,
    ipset: Option<PathBuf>,
    /// There are rules of ours, as far as known.
    programmed: bool,
    looks: u32,
    waited: Duration,
}

impl Tools {
    /// The kernel of the calling thread's network namespace, in this flavour or the one that the node uses.
    pub fn open(family: IpFamily, flavour: Option<Flavour>) -> Result<Self, KernelError> {
        let namespace = Namespace::current().map_err(failed("open the network namespace"))?;
        let flavour = flavour.or_else(|| flavour::detect(&namespace));
        let programs = flavour.and_then(|flavour| Programs::find(&namespace, family, flavour));
        Ok(Self {
            family,
            namespace,
            programs,
            ipset: process::find("ipset"),
            programmed: false,
            looks: 0,
            waited: Duration::ZERO,
        })
    }

    /// The flavour in use; `None` if it is not installed.
    pub fn flavour(&self) -> Option<Flavour> {
        self.programs.as_ref().map(|programs| programs.flavour)
    }

    /// Removes rules of ours in the flavour that is not in use. Sets are the same in both.
    pub fn remove_other_flavour(&mut self) -> Result<(), KernelError> {
        let used = self.flavour();
        self.remove_rules(|flavour| Some(flavour) != used)
    }

    fn remove_rules(&mut self, is_meant: impl Fn(Flavour) -> bool) -> Result<(), KernelError> {
        for flavour in Flavour::ALL.into_iter().filter(|flavour| is_meant(*flavour)) {
            let Some(programs) = Programs::find(&self.namespace, self.family, flavour) else { continue };
            let mut state = State::empty(self.family);
            state.read_rules(&programs.save(&self.namespace).map_err(failed("read rules"))?);
            let used = self.programs.replace(programs);
            let removed = self.carry_out(&plan::removal(&state));
            self.programs = used;
            removed?;
        }
        Ok(())
    }

    fn programs(&self) -> io::Result<&Programs> {
        self.programs.as_ref().ok_or_else(|| io::Error::other("iptables is not installed"))
    }

    fn ipset(&self, args: &[&str], input: &str) -> io::Result<String> {
        let ipset = self.ipset.as_ref().ok_or_else(|| io::Error::other("ipset is not installed"))?;
        self.namespace.run(ipset, args, input)
    }

    fn read(&self, programs: &Programs) -> io::Result<State> {
        let mut state = State::empty(self.family);
        state.read_rules(&programs.save(&self.namespace)?);
        self.read_sets(&mut state)?;
        if self.family == IpFamily::V4 {
            let routed = self.namespace.inside(|| std::fs::read_to_string(ROUTE_LOCALNET))?;
            state.loopback.routed = routed.trim() == "1";
        }
        Ok(state)
    }

    fn read_sets(&self, state: &mut State) -> io::Result<()> {
        state.read_sets(&self.ipset(&["list", "-terse"], "")?);
        let names: Vec<_> =
            state.sets.keys().filter(|n| Kind::of(self.family, n) != Some(Kind::Clients)).cloned().collect();
        for name in names {
            state.read_elements(&self.ipset(&["save", &name], "")?);
        }
        Ok(())
    }

    /// Waits until nobody holds the lock of the tables, so that the wait is known. The tool takes the lock
    /// itself, and waits again if somebody was faster.
    fn await_lock(&mut self, programs: &Programs) {
        if programs.flavour == Flavour::Nft {
            return;
        }
        let path = std::env::var_os("XTABLES_LOCKFILE").map_or_else(|| LOCK_FILE.into(), PathBuf::from);
        let Ok(file) = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)
        else {
            return;
        };
        let started = Instant::now();
        if file.try_lock().is_err() {
            wait_for(&file, started);
            self.waited += started.elapsed();
        }
    }

    fn restore(&mut self, ops: &[Op]) -> io::Result<()> {
        let programs = self.programs()?.clone();
        self.await_lock(&programs);
        let text = restore_text(ops);
        self.namespace.run(&programs.restore, &["--noflush", "--wait", LOCK_TIMEOUT], &text)?;
        for op in ops {
            match op {
                Op::SetChain(Table::Mangle, name, _) if &**name == names::CANARY => self.programmed = true,
                Op::DeleteChain(_, name) if &**name == names::CANARY => self.programmed = false,
                _ => {}
            }
        }
        Ok(())
    }

    fn change_sets(&self, ops: &[Op]) -> io::Result<()> {
        let mut lines: Vec<String> = ops.iter().map(ToString::to_string).collect();
        for tries in 1.. {
            let Err(error) = self.ipset(&["restore"], &(lines.join("\n") + "\n")) else { break };
            let said = error.to_string();
            if tries == DESTROY_TRIES || !said.contains("in use by a kernel component") {
                return Err(error);
            }
            // What came before the line that failed is done.
            let done =
                said.split("Error in line ").nth(1).and_then(|rest| rest.split(':').next()?.parse().ok());
            lines.drain(..done.map_or(0, |line: usize| line.saturating_sub(1).min(lines.len())));
            std::thread::sleep(DESTROY_PAUSE);
        }
        Ok(())
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        for group in ops.chunk_by(|a, b| a.tool() == b.tool()) {
            match group[0].tool() {
                Tool::Ipset => self.change_sets(group).map_err(failed("change sets"))?,
                Tool::Iptables => self.restore(group).map_err(failed("change rules"))?,
                Tool::Sysctl => self.route_loopback()?,
            }
        }
        Ok(())
    }

    /// Makes a set, and asks the tool whether it and the kernel know everything that our rules say.
    fn try_rules(&self, programs: &Programs) -> io::Result<()> {
        let set = match self.family {
            IpFamily::V4 => "SHUNT-PROBE",
            IpFamily::V6 => "SHUNT-6-PROBE",
        };
        let declaration = Kind::Clients.declaration(self.family);
        self.ipset(&["-exist", "restore"], &format!("create {set} {declaration}\n"))?;
        let to = match self.family {
            IpFamily::V4 => "192.0.2.1:80",
            IpFamily::V6 => "[2001:db8::1]:80",
        };
        let text = format!(
            "*filter\n:SHUNT-PROBE - [0:0]\n\
             -A SHUNT-PROBE -m conntrack --ctstate NEW -m mark --mark 0x1/0x1 -j REJECT\n\
             -A SHUNT-PROBE -m addrtype --dst-type LOCAL -m comment --comment probe -j RETURN\n\
             COMMIT\n\
             *nat\n:SHUNT-PROBE - [0:0]\n\
             -A SHUNT-PROBE -m set --match-set {set} src -j SET --add-set {set} src --exist --timeout 1\n\
             -A SHUNT-PROBE -p tcp -m statistic --mode random --probability 0.5 -j DNAT --to-destination {to}\n\
             -A SHUNT-PROBE -j MARK --set-xmark 0x1/0x0\n\
             -A SHUNT-PROBE -j MASQUERADE --random-fully\nCOMMIT\n"
        );
        let tried =
            self.namespace.run(&programs.restore, &["--noflush", "--test", "--wait", LOCK_TIMEOUT], &text);
        self.ipset(&["destroy", set], "")?;
        tried.map(drop)
    }
}

fn wait_for(file: &File, started: Instant) {
    while started.elapsed() < Duration::from_secs(10) && file.try_lock().is_err() {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn failed(what: &str) -> impl Fn(io::Error) -> KernelError {
    let context = what.to_owned();
    move |error| KernelError { context: context.clone(), source: error.into(), remedy: Remedy::Resync }
}

impl Kernel for Tools {
    fn probe(&mut self) -> Result<(), Unsupported> {
        let missing = |missing: &str, advice: &str| Unsupported {
            mode: Mode::Iptables,
            missing: missing.to_owned(),
            advice: advice.to_owned(),
        };
        if self.ipset.is_none() {
            return Err(missing("the program ipset is not installed", "install the package ipset"));
        }
        let Some(programs) = self.programs.clone() else {
            return Err(missing(
                "iptables (iptables-restore, iptables-save) is not installed, or not in the flavour asked for",
                "install the package iptables",
            ));
        };
        self.ipset(&["list", "-name"], "").map_err(|error| {
            missing(
                &error.to_string(),
                "ipset needs CAP_NET_ADMIN and a kernel with CONFIG_IP_SET and CONFIG_IP_SET_HASH_IP",
            )
        })?;
        self.try_rules(&programs).map_err(|error| {
            missing(
                &error.to_string(),
                "rules need CONFIG_NETFILTER_XT_SET, XT_MATCH_ADDRTYPE, XT_MATCH_CONNTRACK, XT_MATCH_STATISTIC, \
                 XT_MATCH_COMMENT, XT_NAT and XT_TARGET_MASQUERADE in the kernel (and NFT_COMPAT for the nft flavour, \
                 IP_NF_NAT and IP6_NF_NAT for legacy)",
            )
        })
    }

    fn route_loopback(&mut self) -> Result<(), KernelError> {
        self.namespace
            .inside(|| std::fs::write(ROUTE_LOCALNET, "1"))
            .map_err(failed("set net.ipv4.conf.all.route_localnet"))
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        let programs = self.programs().map_err(failed("read rules"))?.clone();
        let state = self.read(&programs).map_err(failed("read rules and sets"))?;
        self.programmed = state.chains.keys().any(|(_, name)| &**name == names::CANARY);
        Ok(state)
    }

    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.carry_out(&transaction.ops)
    }

    fn remove(&mut self) -> Result<(), KernelError> {
        self.remove_rules(|_| true)?;
        if self.ipset.is_some() {
            let mut state = State::empty(self.family);
            state.read_sets(&self.ipset(&["list", "-terse"], "").map_err(failed("read sets"))?);
            self.carry_out(&plan::removal(&state))?;
        }
        self.programmed = false;
        Ok(())
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        if !self.programmed {
            return Ok(true);
        }
        self.looks = self.looks.wrapping_add(1);
        let programs = self.programs().map_err(failed("look for the canary"))?;
        let skip_nat = programs.flavour == Flavour::Legacy && !self.looks.is_multiple_of(NAT_LOOKS);
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Nat || !skip_nat) {
            let args = ["--wait", LOCK_TIMEOUT, "-t", table.name(), "-S", names::CANARY];
            // A chain that is gone makes the tool fail.
            let there = self.namespace.run(&programs.iptables, &args, "");
            if !there.is_ok_and(|text| text.contains("-A ")) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}
