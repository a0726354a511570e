//! The only file that touches the kernel: the port, and the adapter that runs the tools of iptables and
//! speaks to ipset by netlink.

mod accounting;

use std::error::Error;
use std::io;
use std::time::Duration;

use ipset_netlink::{Commands, Ipset};
use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Mode, Remedy, Transaction, Unsupported};
use xtables_tools::{Flavour, Held, Namespace, Programs, Table};

use crate::names;
use crate::op::{About, Op, Script, counts};
use crate::plan;
use crate::sets::Kind;
use crate::state::{Reader, State};

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

const ROUTE_LOCALNET: &str = "/proc/sys/net/ipv4/conf/all/route_localnet";
/// The legacy tool reads a whole table to show one chain of it, and only the nat table is large: it is looked
/// at every so many times.
const NAT_LOOKS: u32 = 10;
/// Bytes that are handed to ipset at once.
const BATCH_BYTES: usize = 1 << 20;

/// The kernel of a network namespace, by way of the tools of iptables and netlink of ipset.
#[derive(Debug)]
pub struct Tools {
    family: IpFamily,
    namespace: Namespace,
    programs: Option<Programs>,
    /// Or why there is none.
    sets: Result<Ipset, ipset_netlink::Error>,
    /// Chains of ours that rules of others led to when rules were read last.
    held: Held,
    /// There are rules of ours, as far as known.
    programmed: bool,
    looks: u32,
    waited: Duration,
}

/// Chains that stay: by flavour of the tools, table and name.
type IsKept<'a> = dyn Fn(Flavour, Table, &str) -> bool + 'a;

impl Tools {
    /// The kernel of the calling thread's network namespace, in this flavour or the one that the node uses.
    pub fn open(family: IpFamily, flavour: Option<Flavour>) -> Result<Self, KernelError> {
        let namespace = Namespace::current().map_err(|error| failed("open the network namespace", error))?;
        let programs = match flavour {
            Some(flavour) => Programs::find(&namespace, family, flavour),
            None => Programs::of_node(&namespace, family),
        };
        Ok(Self {
            family,
            namespace,
            programs,
            sets: Ipset::open(),
            held: Held::default(),
            programmed: false,
            looks: 0,
            waited: Duration::ZERO,
        })
    }

    /// The flavour in use; `None` if it is not installed.
    pub fn flavour(&self) -> Option<Flavour> {
        self.programs.as_ref().map(|programs| programs.flavour)
    }

    /// Whether there are rules of ours, or of kube-proxy's, in any flavour that can be asked.
    pub fn has_rules(&self) -> bool {
        let programs =
            Flavour::ALL.into_iter().filter_map(|f| Programs::find(&self.namespace, self.family, f));
        programs.filter_map(|programs| programs.save(&self.namespace).ok()).any(|text| {
            let mut state = State::empty(self.family);
            state.read_rules(&text);
            !plan::removal(&state).is_empty()
        })
    }

    /// Removes rules of ours in the flavour that is not in use. Sets are the same in both.
    pub fn remove_other_flavour(&mut self) -> Result<(), KernelError> {
        let used = self.flavour();
        self.remove_rules(|flavour| Some(flavour) != used, &|_, _, _| false)
    }

    /// Removes what is ours but for chains that another mode has made its own.
    pub fn remove_beside(&mut self, is_kept: &IsKept<'_>) -> Result<(), KernelError> {
        self.remove_rules(|_| true, is_kept)?;
        self.remove_sets()
    }

    fn remove_sets(&mut self) -> Result<(), KernelError> {
        if self.sets.is_ok() {
            let mut state = State::empty(self.family);
            self.read_sets(&mut state).map_err(|error| failed("read sets", error))?;
            self.carry_out(&plan::removal(&state))?;
        }
        self.programmed = false;
        // Where there are none, nothing is left.
        let _ = self.namespace.inside(|| accounting::remove().map_err(io::Error::other));
        Ok(())
    }

    fn remove_rules(
        &mut self,
        is_meant: impl Fn(Flavour) -> bool,
        is_kept: &IsKept<'_>,
    ) -> Result<(), KernelError> {
        let lost = |error| failed("read rules", error);
        let used = self.flavour();
        for flavour in Flavour::ALL.into_iter().filter(|flavour| is_meant(*flavour)) {
            let Some(programs) = Programs::find(&self.namespace, self.family, flavour) else { continue };
            let text = match programs.save(&self.namespace) {
                // The kernel may not know the other one.
                Err(_) if Some(flavour) != used => continue,
                text => text.map_err(lost)?,
            };
            let mut state = State::empty(self.family);
            let held = std::mem::replace(&mut self.held, state.read_rules(&text));
            state.forget(&|table, chain| is_kept(flavour, table, chain));
            let used = self.programs.replace(programs);
            let removed = self.carry_out(&plan::removal(&state));
            (self.programs, self.held) = (used, held);
            removed?;
        }
        Ok(())
    }

    fn programs(&self) -> io::Result<&Programs> {
        self.programs.as_ref().ok_or_else(|| io::Error::other("iptables is not installed"))
    }

    fn sets(&mut self) -> Result<&mut Ipset, String> {
        self.sets.as_mut().map_err(|error| error.to_string())
    }

    fn read_rules(&mut self) -> io::Result<State> {
        let mut state = State::empty(self.family);
        let mut reader = Reader::new(&mut state);
        self.programs()?.save_lines(&self.namespace, &mut |line| reader.line(line))?;
        self.held = reader.finish();
        if self.family == IpFamily::V4 {
            let routed = self.namespace.inside(|| std::fs::read_to_string(ROUTE_LOCALNET))?;
            state.loopback.routed = routed.trim() == "1";
        }
        Ok(state)
    }

    fn read_sets(&mut self, state: &mut State) -> Result<(), Box<dyn Error + Send + Sync>> {
        let family = self.family;
        let sets = self.sets()?;
        for declared in sets.declarations()? {
            match Kind::of(family, &declared.name) {
                None => {}
                Some(Kind::Clients) => state.read_set(&declared),
                Some(_) => sets.list(Some(&declared.name))?.iter().for_each(|listed| state.read_set(listed)),
            }
        }
        Ok(())
    }

    fn restore(&mut self, ops: &[Op]) -> io::Result<()> {
        let programs = self.programs()?;
        let counting = ops.iter().any(counts)
            && self.namespace.inside(|| accounting::make().map_err(io::Error::other)).unwrap_or(false);
        let restore = |script: &Script<'_>| programs.restore(&self.namespace, script);
        self.waited += restore_counting(ops, counting, &self.held, restore)?;
        for op in ops {
            match op {
                Op::SetChain(Table::Mangle, name, _) if &**name == names::CANARY => self.programmed = true,
                Op::DeleteChain(_, name) if &**name == names::CANARY => self.programmed = false,
                _ => {}
            }
        }
        Ok(())
    }

    fn change_sets(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        let mut rest = ops;
        while !rest.is_empty() {
            let mut commands = Commands::default();
            let mut left = rest.iter();
            while commands.bytes() < BATCH_BYTES
                && let Some(op) = left.next()
            {
                encode(&mut commands, op);
            }
            let sent = rest;
            rest = left.as_slice();
            let sets = self.sets().map_err(|error| failed("change sets", error))?;
            let refusals = sets.execute(&mut commands).map_err(|error| failed("change sets", error))?;
            if let Some((refusal, op)) = refusals.iter().find_map(|r| Some((r, sent.get(r.index)?))) {
                return Err(failed(op.to_string(), ipset_netlink::explain(refusal)));
            }
        }
        Ok(())
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        for group in ops.chunk_by(|a, b| a.about() == b.about()) {
            match group[0].about() {
                About::Sets => self.change_sets(group)?,
                About::Rules => self.restore(group).map_err(|error| failed("change rules", error))?,
                About::Setting => self.route_loopback()?,
            }
        }
        Ok(())
    }

    /// Makes a set, and asks the tool whether it and the kernel know everything that our rules say.
    fn try_rules(&mut self, programs: &Programs) -> Result<(), Box<dyn Error + Send + Sync>> {
        let set = match self.family {
            IpFamily::V4 => "SHUNT-PROBE",
            IpFamily::V6 => "SHUNT-6-PROBE",
        };
        // One may be left by a process that was killed half-way; usually there is none.
        let mut stale = Commands::default();
        stale.destroy(set);
        self.sets()?.execute(&mut stale)?;
        self.change_sets(&[Op::CreateSet(self.family, set.into(), Kind::Clients)])?;
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
        let tried = programs.test(&self.namespace, &text);
        self.change_sets(&[Op::DestroySet(set.into())])?;
        Ok(tried?)
    }
}

/// Has operations on tables carried out by what is given texts for `iptables-restore`; adds up what it answers.
///
/// A kernel may have counters, but no condition that counts. What it refuses for that is said again without, and nothing
/// but that, as some of it would then be there twice: so each table is a text of its own.
fn restore_counting(
    ops: &[Op],
    counting: bool,
    held: &Held,
    mut restore: impl FnMut(&Script<'_>) -> io::Result<Duration>,
) -> io::Result<Duration> {
    let all = Script { ops, tables: &Table::ALL, counting, held };
    if !counting {
        return restore(&all);
    }
    let mut waited = Duration::ZERO;
    for table in Table::ALL.chunks(1) {
        let script = Script { tables: table, ..all };
        if script.is_empty() {
            continue;
        }
        waited += match restore(&script) {
            Err(_) if script.counts() => restore(&Script { counting: false, ..script }),
            done => done,
        }?;
    }
    Ok(waited)
}

fn encode(commands: &mut Commands, op: &Op) {
    match op {
        Op::CreateSet(family, name, kind) => commands.create(&kind.declaration(*family, name)),
        Op::DestroySet(name) => commands.destroy(name),
        Op::AddElement(set, element) => commands.add(set, &element.entry().into()),
        Op::DeleteElement(set, element) => commands.delete(set, &element.entry().into()),
        _ => {}
    }
}

fn failed(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> KernelError {
    KernelError { context: what.into(), source: source.into(), remedy: Remedy::Resync }
}

/// How many packets rules counted in the calling thread's network namespace, by the names of the counters;
/// those that are not there are left out.
pub fn counted() -> Vec<(&'static str, u64)> {
    accounting::read().unwrap_or_default()
}

impl Kernel for Tools {
    fn probe(&mut self) -> Result<(), Unsupported> {
        let missing = |missing: &str, advice: &str| Unsupported {
            mode: Mode::Iptables,
            missing: missing.to_owned(),
            advice: advice.to_owned(),
        };
        let Some(programs) = self.programs.clone() else {
            return Err(missing(
                "iptables (iptables-restore, iptables-save) is not installed, or not in the flavour asked for",
                "install the package iptables",
            ));
        };
        self.sets().map_err(|error| {
            missing(
                &error,
                "sets need CAP_NET_ADMIN and a kernel with CONFIG_IP_SET, CONFIG_IP_SET_HASH_IP, IP_SET_HASH_IPPORT, \
                 IP_SET_HASH_IPPORTIP and IP_SET_HASH_IPPORTNET",
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
            .map_err(|error| failed("set net.ipv4.conf.all.route_localnet", error))
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        let mut state = self.read_rules().map_err(|error| failed("read rules", error))?;
        self.read_sets(&mut state).map_err(|error| failed("read sets", error))?;
        self.programmed = state.chains.keys().any(|(_, name)| &**name == names::CANARY);
        Ok(state)
    }

    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        self.carry_out(&transaction.ops)
    }

    fn remove(&mut self) -> Result<(), KernelError> {
        self.remove_beside(&|_, _, _| false)
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        if !self.programmed {
            return Ok(true);
        }
        self.looks = self.looks.wrapping_add(1);
        let programs = self.programs().map_err(|error| failed("look for the canary", error))?;
        let skip_nat = programs.flavour == Flavour::Legacy && !self.looks.is_multiple_of(NAT_LOOKS);
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Nat || !skip_nat) {
            let there = programs.has_rules(&self.namespace, self.family, table.name(), names::CANARY);
            if !there.map_err(|error| failed("look for the canary", error))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::{Match, Rule, States, Target};
    use xtables_tools::Builtin;

    /// Adds a rule that counts to both tables, and a hook.
    fn counted() -> Vec<Op> {
        let rule = || {
            let matches =
                vec![Match::State(false, States::INVALID), Match::Counted(names::INVALID_DROPPED.into())];
            Rule::new(matches, Target::Return)
        };
        let hook = Rule::always(Target::Jump(names::FORWARD.into()));
        vec![
            Op::SetChain(Table::Nat, names::POSTROUTING.into(), [rule()].into()),
            Op::SetChain(Table::Filter, names::FORWARD.into(), [rule()].into()),
            Op::SetHooks { table: Table::Filter, builtin: Builtin::Forward, from: vec![], to: vec![hook] },
        ]
    }

    #[test]
    fn only_what_was_refused_for_its_counters_is_said_again() {
        for refused in [&[][..], &["*nat"], &["*filter"], &["*filter", "*nat"]] {
            let mut taken: Vec<String> = Vec::new();
            let done = restore_counting(&counted(), true, &Held::default(), |script| {
                let text = script.to_string();
                if text.contains("nfacct") && refused.iter().any(|table| text.contains(table)) {
                    return Err(io::Error::other("unknown match"));
                }
                taken.push(text);
                Ok(Duration::from_secs(1))
            });
            assert_eq!(done.ok(), Some(Duration::from_secs(2)));
            assert_eq!(taken.concat().matches("-I FORWARD").count(), 1, "{refused:?}: {taken:#?}");
            for (text, table) in taken.iter().zip(["*filter", "*nat"]) {
                assert!(text.starts_with(table), "{taken:#?}");
                assert_eq!(text.contains("nfacct"), !refused.contains(&table), "{text}");
            }
        }
    }

    #[test]
    fn without_counters_all_tables_are_one_text_and_a_refusal_is_final() {
        let mut texts = Vec::new();
        let done = restore_counting(&counted(), false, &Held::default(), |script| {
            texts.push(script.to_string());
            Err(io::Error::other("no"))
        });
        assert!(done.is_err());
        assert!(texts.len() == 1 && !texts[0].contains("nfacct"), "{texts:#?}");
        let mut asked = 0;
        let mangle = [Op::SetChain(Table::Mangle, names::CANARY.into(), [].into())];
        let done = restore_counting(&mangle, true, &Held::default(), |_| {
            asked += 1;
            Err(io::Error::other("no"))
        });
        assert!(done.is_err() && asked == 1, "what counts nothing is not refused for its counters");
    }
}
