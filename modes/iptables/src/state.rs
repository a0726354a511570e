//! What we own in the kernel, typed. Its `Display` is what `ipset restore` and `iptables-restore` read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipset_netlink::Listed;
use shunt_core::id::IpFamily;
use shunt_core::table::{Change, Frontend};
use xtables_tools::{Builtin, Held, HeldReader, Line, Table, is_hook, target, words};

use crate::fixed::{Chains, Hooks};
use crate::names::{self, Name};
use crate::parse;
use crate::rule::{Match, Pool, Rule, Target};
use crate::sets::{Element, Kind, family_of};
use crate::tree;

/// A set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Set {
    /// What it holds; `None` when it is declared as ours are not.
    pub kind: Option<Kind>,
    /// Its elements; those of clients are nobody's business but the kernel's.
    pub elements: BTreeSet<Element>,
}

/// What there is of the protection of loopback. It is shared with the kubelet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Loopback {
    /// Whether the chain exists.
    pub chain: bool,
    /// Whether it has the rule.
    pub rule: bool,
    /// Whether packets for the node, and of the node, meet it.
    pub hooked: [bool; 2],
    /// Whether the kernel routes packets to loopback at all (`route_localnet`).
    pub routed: bool,
}

impl Loopback {
    /// Whether others are kept from talking to loopback.
    pub fn is_guarded(&self) -> bool {
        self.chain && self.rule && self.hooked == [true; 2]
    }
}

/// Everything that we own in the kernel, for one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// The family.
    pub family: IpFamily,
    /// Our chains with their rules.
    pub chains: Chains,
    /// Rules in chains of the kernel's that lead to ours.
    pub hooks: Hooks,
    /// Our sets.
    pub sets: BTreeMap<Name, Set>,
    /// The protection of loopback.
    pub loopback: Loopback,
}

impl State {
    /// Nothing at all.
    pub fn empty(family: IpFamily) -> Self {
        Self {
            family,
            chains: Chains::new(),
            hooks: Hooks::new(),
            sets: BTreeMap::new(),
            loopback: Loopback::default(),
        }
    }

    /// The rules of a chain; none if it does not exist.
    pub fn rules(&self, table: Table, chain: &str) -> &[Rule] {
        self.chains.get(&(table, Name::from(chain))).map_or(&[], |rules| rules)
    }

    /// Whether a set holds an element.
    pub fn holds(&self, set: &str, element: &Element) -> bool {
        self.sets.get(set).is_some_and(|s| s.elements.contains(element))
    }

    /// Takes in what `iptables-save` prints: see [`Reader`].
    pub fn read_rules(&mut self, text: &str) -> Held {
        let mut reader = Reader::new(self);
        text.lines().for_each(|line| reader.line(line));
        reader.finish()
    }

    /// Whether rules of ours lead to a chain, or another one of ours does what it asks for.
    fn uses(&self, table: Table, chain: &str) -> bool {
        if chain == names::MARK_MASQ && self.chains.contains_key(&(table, names::POSTROUTING.into())) {
            return true;
        }
        let of_chains =
            self.chains.iter().filter(|((of, _), _)| *of == table).flat_map(|(_, rules)| rules.iter());
        let of_hooks = self.hooks.iter().filter(|((of, _), _)| *of == table).flat_map(|(_, rules)| rules);
        of_chains.chain(of_hooks).any(|rule| rule.leads_to().is_some_and(|to| &**to == chain))
    }

    fn read_hook(&mut self, table: Table, builtin: Builtin, text: &str) {
        let words = words(text);
        let Some(chain) = target(&words) else { return };
        let rule = parse::rule(text);
        if names::is_ours(table, chain) {
            if is_hook(builtin.name(), chain) {
                self.hooks.entry((table, builtin)).or_default().push(rule);
            }
        } else if table == Table::Filter && rule == Rule::always(Target::Jump(names::FIREWALL.into())) {
            match builtin {
                Builtin::Input => self.loopback.hooked[0] = true,
                Builtin::Output => self.loopback.hooked[1] = true,
                _ => {}
            }
        }
    }

    /// Takes in a set that the kernel has.
    pub fn read_set(&mut self, listed: &Listed) {
        let Some(kind) = Kind::of(self.family, &listed.name) else { return };
        // Sets of clients are named alike in both families.
        if kind == Kind::Clients && listed.family != Some(family_of(self.family)) {
            return;
        }
        let is_ours = listed.set.as_ref() == Some(&kind.declaration(self.family, &listed.name));
        let set = if is_ours {
            let elements = listed.elements.iter().map(|e| Element::of(e.entry)).collect();
            Set { kind: Some(kind), elements }
        } else {
            Set { kind: None, elements: BTreeSet::new() }
        };
        self.sets.insert(listed.name.as_str().into(), set);
    }

    /// Leaves out chains that are somebody else's as well, and what leads to them.
    pub fn forget(&mut self, is_kept: &dyn Fn(Table, &str) -> bool) {
        self.chains.retain(|(table, chain), _| !is_kept(*table, chain));
        for ((table, _), rules) in &mut self.hooks {
            rules.retain(|rule| match &rule.target {
                // Rules of the other mode have conditions that ours have not.
                Target::Other(text) => target(&words(text)).is_none_or(|chain| !is_kept(*table, chain)),
                _ => rule.leads_to().is_none_or(|chain| !is_kept(*table, chain)),
            });
        }
        self.hooks.retain(|_, rules| !rules.is_empty());
    }

    /// The chains that can be come by from a chain of the nat table, itself included.
    pub fn reachable(&self, chain: &Name, found: &mut BTreeSet<Name>) {
        reachable(&|name| self.rules(Table::Nat, name), chain, found);
    }

    /// Leaves only what `only` touches.
    pub fn restrict(&mut self, only: &Change) {
        if only.everything {
            return;
        }
        let mut kept = Chains::new();
        let touched = |frontend: &Frontend| only.frontends.contains(frontend);
        let mut reached = BTreeSet::new();
        for ((table, name), rules) in &self.chains {
            let here: Vec<Rule> =
                rules.iter().filter(|r| tree::leaf(r).is_some_and(|(f, _)| touched(&f))).cloned().collect();
            if here.is_empty() {
                continue;
            }
            here.iter().filter_map(Rule::leads_to).for_each(|chain| self.reachable(chain, &mut reached));
            kept.insert((*table, name.clone()), here.into());
        }
        for name in reached {
            let key = (Table::Nat, name);
            let rules = self.chains.get(&key).cloned().unwrap_or_default();
            kept.insert(key, rules);
        }
        let used: BTreeSet<Name> =
            kept.values().flat_map(|rules| rules.iter()).flat_map(Rule::sets).cloned().collect();
        self.sets.retain(|name, set| {
            set.elements.retain(|element| match element {
                Element::Frontend(a, p, port) | Element::Source(a, p, port, _) => {
                    touched(&Frontend { address: Some(*a), protocol: *p, port: *port })
                }
                Element::Address(address) => only.cluster_ips.contains(address),
                Element::Hairpin(endpoint) => only.local_endpoints.contains(endpoint),
                Element::Stray(_) => false,
            });
            !set.elements.is_empty() || used.contains(name)
        });
        self.chains = kept;
        self.hooks.clear();
    }

    /// The state for programs.
    pub fn json(&self) -> serde_json::Value {
        let texts = |rules: &[Rule]| rules.iter().map(ToString::to_string).collect::<Vec<_>>();
        let tables = Table::ALL.map(|table| {
            let chains: BTreeMap<&str, Vec<String>> = self
                .chains
                .iter()
                .filter(|((of, _), _)| *of == table)
                .map(|((_, name), rules)| (&**name, texts(rules)))
                .collect();
            let hooks: BTreeMap<&str, Vec<String>> = self
                .hooks
                .iter()
                .filter(|((of, _), _)| *of == table)
                .map(|((_, builtin), rules)| (builtin.name(), texts(rules)))
                .collect();
            (table.name(), serde_json::json!({ "chains": chains, "hooks": hooks }))
        });
        let sets: BTreeMap<&str, Vec<String>> = self
            .sets
            .iter()
            .map(|(name, set)| (&**name, set.elements.iter().map(ToString::to_string).collect()))
            .collect();
        serde_json::json!({
            "family": self.family.to_string(),
            "tables": BTreeMap::from(tables),
            "sets": sets,
        })
    }
}

/// Takes what `iptables-save` prints into a state, line by line: all rules of a large cluster are many megabytes.
#[derive(Debug)]
pub struct Reader<'s> {
    state: &'s mut State,
    table: Option<Table>,
    /// The chain of ours that is being read.
    chain: Option<(Table, Name)>,
    /// Its rules so far.
    rules: Vec<Rule>,
    pool: Pool,
    anti_martian: Rule,
    held: HeldReader,
}

impl<'s> Reader<'s> {
    /// Begins.
    pub fn new(state: &'s mut State) -> Self {
        Self {
            state,
            table: None,
            chain: None,
            rules: Vec::new(),
            pool: Pool::default(),
            anti_martian: crate::fixed::anti_martian(),
            held: HeldReader::default(),
        }
    }

    /// Takes in a line.
    pub fn line(&mut self, line: &str) {
        match (xtables_tools::line(line), self.table) {
            (Some(Line::Table(name)), _) => self.table = Table::parse(name),
            (Some(Line::Chain(chain)), Some(table)) => {
                if names::is_ours(table, chain) {
                    self.state.chains.entry((table, chain.into())).or_default();
                }
                self.state.loopback.chain |= table == Table::Filter && chain == names::FIREWALL;
            }
            (Some(Line::Rule(chain, text)), Some(table)) => {
                self.held.rule(table, chain, text, &names::is_ours);
                if names::is_ours(table, chain) {
                    self.enter(table, chain);
                    self.rules.push(self.pool.share(parse::rule(text)));
                } else if let Some(builtin) = Builtin::parse(chain) {
                    self.state.read_hook(table, builtin, text);
                } else if chain == names::FIREWALL && table == Table::Filter {
                    self.state.loopback.rule |= parse::rule(text) == self.anti_martian;
                }
            }
            _ => {}
        }
    }

    /// Goes on with a chain. The tool prints all rules of a chain one after the other.
    fn enter(&mut self, table: Table, chain: &str) {
        if self.chain.as_ref().is_some_and(|(of, name)| *of == table && &**name == chain) {
            return;
        }
        self.leave();
        let key = (table, Name::from(chain));
        if let Some(rules) = self.state.chains.get(&key) {
            self.rules.extend(rules.iter().cloned());
        }
        self.chain = Some(key);
    }

    fn leave(&mut self) {
        if let Some((table, chain)) = self.chain.take() {
            // The name that was declared stays.
            *self.state.chains.entry((table, chain)).or_default() = self.rules.drain(..).collect();
        }
    }

    /// Answers which chains rules of others lead to. Where only those do, and nothing of ours is to be taken away,
    /// the chain is theirs.
    pub fn finish(mut self) -> Held {
        self.leave();
        let held = self.held.finish();
        for (table, chain) in held.untouched() {
            if !self.state.uses(table, chain) {
                self.state.chains.remove(&(table, chain.into()));
            }
        }
        held
    }
}

/// The chains that can be come by from a chain, itself included, as far as `rules` knows them.
pub fn reachable<'a>(rules: &dyn Fn(&str) -> &'a [Rule], chain: &Name, found: &mut BTreeSet<Name>) {
    if names::hash_of(chain).is_none() || !found.insert(chain.clone()) {
        return;
    }
    for next in rules(chain).iter().filter_map(Rule::leads_to) {
        reachable(rules, next, found);
    }
}

/// What begins the part of a text that `ipset restore` reads.
pub const SETS_HEADER: &str = "# ipset restore";

/// What begins the part of a text that `iptables-restore` reads.
pub const fn rules_header(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "# iptables-restore --noflush",
        IpFamily::V6 => "# ip6tables-restore --noflush",
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.sets.is_empty() {
            writeln!(f, "{SETS_HEADER}")?;
        }
        for (name, set) in &self.sets {
            match set.kind {
                Some(kind) => writeln!(f, "{}", kind.declaration(self.family, name))?,
                None => writeln!(f, "# {name} is declared otherwise")?,
            }
            set.elements.iter().try_for_each(|element| writeln!(f, "add {name} {element}"))?;
        }
        let tables: BTreeSet<Table> =
            self.chains.keys().map(|(t, _)| *t).chain(self.hooks.keys().map(|(t, _)| *t)).collect();
        if !tables.is_empty() {
            writeln!(f, "{}", rules_header(self.family))?;
        }
        for table in tables {
            writeln!(f, "*{}", table.name())?;
            let chains = || self.chains.iter().filter(|((of, _), _)| *of == table);
            chains().try_for_each(|((_, name), _)| writeln!(f, ":{name} - [0:0]"))?;
            for ((_, builtin), rules) in self.hooks.iter().filter(|((of, _), _)| *of == table) {
                for (i, rule) in rules.iter().enumerate() {
                    writeln!(f, "-I {} {} {rule}", builtin.name(), i + 1)?;
                }
            }
            for ((_, name), rules) in chains() {
                rules.iter().try_for_each(|rule| writeln!(f, "-A {name} {rule}"))?;
            }
            writeln!(f, "COMMIT")?;
        }
        if self.loopback.is_guarded() {
            writeln!(f, "# {} keeps others from talking to loopback", names::FIREWALL)?;
        }
        Ok(())
    }
}

/// Where a frontend leads in a tree: the rule of its leaf, without the frontend's own conditions.
pub fn find_leaf(state: &State, table: Table, root: &str, frontend: &Frontend) -> Option<Rule> {
    let meets = |m: &Match| match m {
        Match::Destination(false, range) => frontend.address.is_some_and(|a| range.contains(&a)),
        Match::Protocol(protocol) => *protocol == frontend.protocol,
        Match::Ports(protocol, from, to) => {
            *protocol == frontend.protocol && (*from..=*to).contains(&frontend.port)
        }
        _ => true,
    };
    let mut rules = state.rules(table, root);
    loop {
        let rule = rules.iter().find(|rule| {
            let branch = rule.leads_to().is_some_and(|chain| names::is_tree(chain));
            (branch || tree::leaf(rule).is_some()) && rule.matches.iter().all(meets)
        })?;
        match rule.leads_to().filter(|chain| names::is_tree(chain)) {
            Some(next) => rules = state.rules(table, next),
            None => return tree::leaf(rule).filter(|(f, _)| f == frontend).map(|(_, leaf)| leaf),
        }
    }
}
