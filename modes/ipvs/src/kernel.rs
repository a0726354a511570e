//! The only part that touches the kernel: virtual servers and sets by netlink, the dummy link and its
//! addresses by rtnetlink, rules by `iptables-restore` where the skeleton changes, settings by `/proc`.

mod batch;
mod carried;
mod link;
mod schedulers;
mod tables;
mod tuning;

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use ipnet::IpNet;
use ipset_netlink::{Element, Ipset};
use ipvs_netlink::{Config, Ipvs, NetlinkError, ServiceKey};
use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Mode, Remedy, Transaction, Unsupported};
use xtables_tools::{Flavour, Namespace, Programs, Table};

use crate::drain::Drained;
use crate::layout::{self, Place, SetName};
use crate::op::Op;
use crate::rules::Rules;
use crate::scheduler;
use crate::state::{Server, State};
use batch::Batch;
pub use carried::Carried;
use link::Links;

/// Connections of drained destinations.
pub type Connections = BTreeMap<Drained, u32>;

/// What the mode needs of a kernel, in the mode's own types.
pub trait Kernel {
    /// Whether this kernel has what the mode needs.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Writes the kernel's settings for the mode.
    fn tune(&mut self) -> Result<(), KernelError>;
    /// Has the tools load the modules of their tables, which they may not do later without `CAP_SYS_MODULE`.
    fn load_tables(&mut self) -> Result<(), KernelError>;
    /// Reads what is ours, and nothing else.
    fn observe(&mut self) -> Result<State, KernelError>;
    /// Carries out operations one after the other.
    fn carry_out(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError>;
    /// Counts the connections of the destinations of some virtual servers; those without may be left out.
    fn connections(&mut self, keys: &[ServiceKey]) -> Result<Connections, KernelError>;
    /// Whether what a flush takes away is still there: virtual servers, the link, rules.
    fn intact(&mut self) -> Result<bool, KernelError>;
    /// TCP connections of the family; `None` where there is no virtual server of ours.
    fn carried(&mut self) -> Result<Option<Carried>, KernelError>;
    /// Removes the rules that judge new connections by what virtual servers there are.
    fn retire(&mut self) -> Result<(), KernelError>;
    /// Removes everything that is ours.
    fn remove_everything(&mut self) -> Result<(), KernelError>;
}

/// Settings of the mode (`ipvs` of `KubeProxyConfiguration`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Virtual servers with addresses in these ranges are somebody else's (`excludeCIDRs`).
    pub exclude_cidrs: Vec<IpNet>,
    /// Answer ARP only for addresses of the asked interface, so that the node does not claim VIPs.
    pub strict_arp: bool,
    /// Seconds after which established TCP connections without packets are forgotten; 0 to leave it.
    pub tcp_timeout: u32,
    /// The same after a FIN.
    pub tcp_fin_timeout: u32,
    /// The same for UDP.
    pub udp_timeout: u32,
}

/// Bytes that are handed to the kernel at once.
const BATCH_BYTES: usize = 1 << 20;

/// The kernel of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Linux {
    family: IpFamily,
    options: Options,
    namespace: Namespace,
    /// They are the same as long as the process runs.
    programs: Option<Programs>,
    links: Links,
    /// `None` where the kernel has none.
    ipvs: Option<Ipvs>,
    /// `None` where the kernel has none.
    sets: Option<Ipset>,
    /// Schedulers that the kernel has refused.
    refused: BTreeSet<String>,
    held: Held,
}

/// What is believed to be there, as far as it is looked for often.
#[derive(Debug, Default)]
struct Held {
    link: bool,
    servers: usize,
    rules: Rules,
    /// Chains that rules of others led to when rules were read last.
    chains: xtables_tools::Held,
}

impl Held {
    fn advance(&mut self, op: &Op) {
        match op {
            Op::AddLink => self.link = true,
            Op::AddServer(_) => self.servers += 1,
            Op::DeleteServer(_) => self.servers = self.servers.saturating_sub(1),
            Op::SetRules(_, _, rules) => self.rules.clone_from(rules),
            _ => {}
        }
    }
}

fn failed(
    context: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    remedy: Remedy,
) -> KernelError {
    KernelError { context: context.into(), source: source.into(), remedy }
}

impl Linux {
    /// Opens the kernel in the calling thread's network namespace.
    pub fn open(family: IpFamily, options: Options) -> Result<Self, KernelError> {
        let retry = |what: &str, source: Box<dyn std::error::Error + Send + Sync>| {
            failed(what, source, Remedy::Retry)
        };
        let ipvs = match Ipvs::open() {
            Ok(ipvs) => Some(ipvs),
            Err(ipvs_netlink::Error::NoIpvs) => None,
            Err(error) => return Err(retry("open IPVS", error.into())),
        };
        let sets = match Ipset::open() {
            Ok(sets) => Some(sets),
            Err(ipset_netlink::Error::NoIpset) => None,
            // Without privileges the kernel does not say.
            Err(error) if ipvs.is_some() => return Err(retry("open ipset", error.into())),
            Err(_) => None,
        };
        Ok(Self {
            family,
            options,
            namespace: Namespace::current().map_err(|e| retry("find the network namespace", e.into()))?,
            programs: None,
            links: Links::open().map_err(|e| retry("open rtnetlink", e.into()))?,
            ipvs,
            sets,
            refused: BTreeSet::new(),
            held: Held::default(),
        })
    }

    /// The programs of iptables; `None` if they are not installed.
    fn programs(&mut self) -> Option<Programs> {
        if self.programs.is_none() {
            self.programs = Programs::of_node(&self.namespace, self.family);
        }
        self.programs.clone()
    }

    fn with_rules<T>(
        &mut self,
        context: &str,
        remedy: Remedy,
        work: impl FnOnce(&Programs, &Namespace) -> io::Result<T>,
    ) -> Result<T, KernelError> {
        let programs = self.programs();
        let done = match &programs {
            Some(programs) => work(programs, &self.namespace),
            None => Err(io::Error::other("iptables is not installed")),
        };
        done.map_err(|error| failed(context, error, remedy))
    }

    fn ipvs(&mut self) -> Result<&mut Ipvs, KernelError> {
        let missing = || failed("reach IPVS", "the kernel has none", Remedy::Fatal);
        self.ipvs.as_mut().ok_or_else(missing)
    }

    fn sets(&mut self) -> Result<&mut Ipset, KernelError> {
        let missing = || failed("reach ipset", "the kernel has none", Remedy::Fatal);
        self.sets.as_mut().ok_or_else(missing)
    }

    /// Whether a virtual server is of our family and not somebody else's.
    fn is_ours(&self, key: &ServiceKey) -> bool {
        if key.is_ipv6() != (self.family == IpFamily::V6) {
            return false;
        }
        match key {
            ServiceKey::Mark { mark, .. } => layout::is_our_mark(*mark),
            ServiceKey::Address { address, .. } => {
                !self.options.exclude_cidrs.iter().any(|range| range.contains(address))
            }
        }
    }

    fn servers(&mut self) -> Result<BTreeMap<ServiceKey, Server>, KernelError> {
        let lost = |error: ipvs_netlink::Error| failed("list virtual servers", error, Remedy::Retry);
        let listed = self.ipvs()?.services().map_err(lost)?;
        let mut servers = BTreeMap::new();
        for entry in listed {
            let key = entry.service.key;
            if !self.is_ours(&key) {
                continue;
            }
            let destinations = self.ipvs()?.destinations(&key).map_err(lost)?;
            let destinations =
                destinations.into_iter().map(|e| (e.destination.address, e.destination)).collect();
            servers.insert(key, Server { service: entry.service, destinations });
        }
        Ok(servers)
    }

    /// Our rules as they are.
    fn saved(&mut self) -> Result<Rules, KernelError> {
        let text = self.with_rules("read the rules", Remedy::Retry, Programs::save)?;
        let (rules, chains) = crate::parse::parse(self.family, &text);
        self.held.chains = chains;
        Ok(rules)
    }

    fn lacking(&mut self) -> Result<BTreeSet<String>, KernelError> {
        let lost = |error: ipvs_netlink::Error| failed("look for schedulers", error, Remedy::Retry);
        let (family, refused) = (self.family, std::mem::take(&mut self.refused));
        let lacking = schedulers::lacking(self.ipvs()?, family, &refused).map_err(lost)?;
        self.refused.clone_from(&lacking);
        Ok(lacking)
    }

    fn read_sets(&mut self, state: &mut State) -> Result<(), KernelError> {
        let family = self.family;
        let lost = |error: ipset_netlink::Error| failed("list sets", error, Remedy::Retry);
        for listed in self.sets()?.list(None).map_err(lost)? {
            let Some(set) = SetName::from_name(family, &listed.name) else { continue };
            if listed.set.as_ref() != Some(&set.declaration(family)) {
                state.misdeclared.insert(set);
            }
            // Of a set of another type nothing can be kept.
            let elements = listed.elements.into_iter().filter(|e| e.entry.kind() == set.kind());
            state.sets.insert(set, elements.map(|e| (e.entry, e.mark)).collect());
        }
        Ok(())
    }

    /// What says which virtual servers are ours: addresses and sets.
    fn names(&mut self) -> Result<State, KernelError> {
        let mut state = State::empty(self.family);
        if self.sets.is_some() {
            self.read_addresses(&mut state)?;
            self.read_sets(&mut state)?;
        }
        Ok(state)
    }

    fn read_addresses(&mut self, state: &mut State) -> Result<(), KernelError> {
        let lost = |error: NetlinkError| failed("list addresses", error, Remedy::Retry);
        let family = self.family;
        let of_family = |a: &std::net::IpAddr| IpFamily::of(*a) == family;
        state.addresses = self.links.addresses().map_err(lost)?.into_iter().filter(of_family).collect();
        Ok(())
    }

    fn timeouts(&self) -> Config {
        Config {
            tcp: self.options.tcp_timeout,
            tcp_fin: self.options.tcp_fin_timeout,
            udp: self.options.udp_timeout,
        }
    }

    fn is_tuned(&mut self) -> Result<bool, KernelError> {
        let wanted = self.timeouts();
        let lost = |error: ipvs_netlink::Error| failed("read timeouts", error, Remedy::Retry);
        let held = self.ipvs()?.config().map_err(lost)?;
        let kept = |wanted, held| wanted == 0 || wanted == held;
        let strict_arp = self.options.strict_arp;
        Ok(kept(wanted.tcp, held.tcp)
            && kept(wanted.tcp_fin, held.tcp_fin)
            && kept(wanted.udp, held.udp)
            && self
                .namespace
                .inside(move || Ok(tuning::is_tuned(strict_arp)))
                .map_err(|error| failed("read the kernel's settings", error, Remedy::Retry))?)
    }

    /// Carries out operations that are no messages.
    fn carry_out_alone(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::Tune => self.tune(),
            Op::AddLink => {
                let lost = |error: NetlinkError| failed(op.to_string(), error, Remedy::Resync);
                self.links.add().map_err(lost)
            }
            Op::ReplaceSet(family, set, elements) => self.replace_set(*family, *set, elements),
            Op::SetRules(family, was, rules) => {
                let text = tables::restore_text(*family, was, rules, &self.held.chains);
                let restore = |programs: &Programs, namespace: &_| programs.restore(namespace, &text);
                self.with_rules(&op.to_string(), Remedy::Resync, restore).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Makes a set anew under another name and lets the two change places, so that rules never see
    /// it empty. A set of another type cannot be exchanged as long as rules refer to it.
    fn replace_set(
        &mut self,
        family: IpFamily,
        set: SetName,
        elements: &[Element],
    ) -> Result<(), KernelError> {
        const SPARE: &str = "KUBE-SHUNT-SPARE";
        let declaration = set.declaration(family);
        let mut commands = ipset_netlink::Commands::default();
        commands.create(&ipset_netlink::Set { name: SPARE.to_owned(), ..declaration.clone() });
        for element in elements {
            commands.add(SPARE, element);
        }
        commands.swap(SPARE, &declaration.name);
        commands.destroy(SPARE);
        let context = || format!("declare set {} anew", declaration.name);
        let lost = |error: ipset_netlink::Error| failed(context(), error, Remedy::Retry);
        let mut stale = ipset_netlink::Commands::default();
        stale.destroy(SPARE);
        // One may be left by a process that was killed half-way; usually there is none.
        self.sets()?.execute(&mut stale).map_err(lost)?;
        match self.sets()?.execute(&mut commands).map_err(lost)?.first() {
            Some(refusal) => Err(failed(context(), ipset_netlink::explain(refusal), Remedy::Resync)),
            None => Ok(()),
        }
    }
}

impl Kernel for Linux {
    fn probe(&mut self) -> Result<(), Unsupported> {
        let unsupported = |missing: String, advice: &str| {
            Err(Unsupported { mode: Mode::Ipvs, missing, advice: advice.to_owned() })
        };
        if self.ipvs.is_none() {
            return unsupported(
                "the kernel has no IPVS (CONFIG_IP_VS, module ip_vs)".to_owned(),
                "load the module (modprobe ip_vs), use a kernel that has it, or choose another --mode",
            );
        }
        if self.sets.is_none() {
            return unsupported(
                "the kernel has no ipset (CONFIG_IP_SET, module ip_set)".to_owned(),
                "load the module (modprobe ip_set), use a kernel that has it, or choose another --mode",
            );
        }
        let family = self.family;
        if let Some(Ok(false)) = self.ipvs.as_mut().map(|i| schedulers::has(i, family, scheduler::DEFAULT)) {
            return unsupported(
                scheduler::missing(scheduler::DEFAULT),
                "load the module (modprobe ip_vs_rr), or use a kernel with CONFIG_IP_VS_RR",
            );
        }
        if let Err(error) = self.namespace.inside(tuning::check) {
            return unsupported(
                format!("IPVS without connection tracking ({error})"),
                "the kernel needs CONFIG_IP_VS_NFCT, and /proc/sys must be writable",
            );
        }
        // Whether it works shows when the rules are read, before anything is written.
        if self.programs().is_some() {
            return Ok(());
        }
        unsupported(
            "iptables (iptables-restore, iptables-save) is not installed".to_owned(),
            "install the package iptables; the kernel needs its tables and CONFIG_NETFILTER_XT_SET",
        )
    }

    fn tune(&mut self) -> Result<(), KernelError> {
        let strict_arp = self.options.strict_arp;
        self.namespace
            .inside(move || tuning::tune(strict_arp))
            .map_err(|error| failed("set the kernel's settings", error, Remedy::Retry))?;
        let timeouts = self.timeouts();
        if timeouts != Config::default() {
            let lost = |error: ipvs_netlink::Error| failed("set timeouts", error, Remedy::Retry);
            self.ipvs()?.set_config(&timeouts).map_err(lost)?;
        }
        Ok(())
    }

    fn load_tables(&mut self) -> Result<(), KernelError> {
        let text = Table::ALL.map(|table| format!("*{}\nCOMMIT\n", table.name())).concat();
        let restore = |programs: &Programs, namespace: &Namespace| programs.restore(namespace, &text);
        self.with_rules("load the tables' modules", Remedy::Retry, restore).map(drop)
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        let mut state = State::empty(self.family);
        state.tuned = self.is_tuned()?;
        let lost = |error: NetlinkError| failed("look for the dummy link", error, Remedy::Retry);
        state.link = self.links.exists().map_err(lost)?;
        self.read_addresses(&mut state)?;
        state.servers = self.servers()?;
        state.lacking = self.lacking()?;
        self.read_sets(&mut state)?;
        state.rules = self.saved()?;
        self.held.link = state.link;
        self.held.servers = state.servers.len();
        self.held.rules.clone_from(&state.rules);
        state.forget_shared();
        Ok(state)
    }

    fn carry_out(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        let mut open: Option<Batch> = None;
        let mut ops: Vec<&Op> = Vec::new();
        for op in &transaction.ops {
            let fits = match &open {
                Some(batch) => batch.bytes() < BATCH_BYTES && batch.takes(op),
                None => true,
            };
            if !fits {
                self.send(open.take(), &ops)?;
                ops.clear();
            }
            match self.batch_for(op, open.take())? {
                Some(mut batch) => {
                    self.encode(&mut batch, op)?;
                    ops.push(op);
                    open = Some(batch);
                }
                None => self.carry_out_alone(op)?,
            }
        }
        self.send(open, &ops)?;
        transaction.ops.iter().for_each(|op| self.held.advance(op));
        Ok(())
    }

    fn intact(&mut self) -> Result<bool, KernelError> {
        let lost = |error: NetlinkError| failed("look for the dummy link", error, Remedy::Retry);
        // It may be the other family's only.
        if self.held.link && !self.links.exists().map_err(lost)? {
            return Ok(false);
        }
        let lost = |error: ipvs_netlink::Error| failed("count virtual servers", error, Remedy::Retry);
        let listed = self.ipvs()?.services().map_err(lost)?;
        if listed.iter().filter(|entry| self.is_ours(&entry.service.key)).count() != self.held.servers {
            return Ok(false);
        }
        Ok(self.saved()? == self.held.rules)
    }

    fn connections(&mut self, keys: &[ServiceKey]) -> Result<Connections, KernelError> {
        let mut connections = Connections::new();
        for key in keys {
            let lost = |error: ipvs_netlink::Error| failed("count connections", error, Remedy::Retry);
            for entry in self.ipvs()?.destinations(key).map_err(lost)? {
                let count = entry.active.saturating_add(entry.inactive);
                connections.insert((*key, entry.destination.address), count);
            }
        }
        Ok(connections)
    }

    fn carried(&mut self) -> Result<Option<Carried>, KernelError> {
        let lost = |error: ipvs_netlink::Error| failed("list virtual servers", error, Remedy::Retry);
        if self.ipvs.is_none() {
            return Ok(None);
        }
        let listed = self.ipvs()?.services().map_err(lost)?;
        let held = self.names()?;
        if !listed.iter().any(|entry| self.is_ours(&entry.service.key) && held.names(&entry.service.key)) {
            return Ok(None);
        }
        let is_ours = |place: Place| self.is_ours(&place.key()) && held.names(&place.key());
        let carried = carried::connections(&self.namespace, self.family, is_ours);
        carried.map(Some).map_err(|error| failed("list connections", error, Remedy::Retry))
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        self.remove_rules(&|_, table, _| table != Table::Mangle)
    }

    fn remove_everything(&mut self) -> Result<(), KernelError> {
        self.remove_beside(&|_, _, _| false)
    }
}

/// Chains that stay: by flavour of the tools, table and name.
type IsKept<'a> = dyn Fn(Flavour, Table, &str) -> bool + 'a;

impl Linux {
    /// Removes everything that is ours but for chains that another mode has made its own.
    pub fn remove_beside(&mut self, is_kept: &IsKept<'_>) -> Result<(), KernelError> {
        if self.ipvs.is_none() || self.sets.is_none() {
            return Ok(());
        }
        let state = self.observe()?;
        let servers = state.servers.keys().filter(|key| state.names(key));
        let ops = servers.map(|key| Op::DeleteServer(*key)).collect();
        self.carry_out(&Transaction { ops })?;
        // This table drops what goes to a VIP that is not there, and another mode may serve it by now.
        self.remove_rules(&|flavour, table, chain| table != Table::Mangle || is_kept(flavour, table, chain))?;
        let ops = state.addresses.iter().map(|a| Op::DeleteAddress(*a)).collect();
        self.carry_out(&Transaction { ops })?;
        self.remove_rules(is_kept)?;
        let ops = state.sets.keys().map(|set| Op::DestroySet(self.family, *set)).collect();
        self.carry_out(&Transaction { ops })?;
        let lost = |error: NetlinkError| failed("delete the dummy link", error, Remedy::Retry);
        self.links.delete_if_empty().map_err(lost)
    }

    fn remove_rules(&mut self, is_kept: &IsKept<'_>) -> Result<(), KernelError> {
        let lost = |error: io::Error| failed("remove rules", error, Remedy::Retry);
        let used = self.programs().map(|programs| programs.flavour);
        for flavour in Flavour::ALL {
            let Some(programs) = Programs::find(&self.namespace, self.family, flavour) else { continue };
            let text = match programs.save(&self.namespace) {
                // The kernel may not know the other one.
                Err(_) if Some(flavour) != used => continue,
                text => text.map_err(lost)?,
            };
            let (mut rules, held) = crate::parse::parse(self.family, &text);
            rules.forget(&|table, chain| is_kept(flavour, table, chain));
            let text = tables::restore_text(self.family, &rules, &Rules::default(), &held);
            if !text.is_empty() {
                programs.restore(&self.namespace, &text).map_err(lost)?;
            }
        }
        Ok(())
    }
}
