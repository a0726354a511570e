//! Walks a packet through the chains of a [`State`]: a small interpreter of iptables rules. It reads
//! exactly what the kernel is given, so that what it finds is what the kernel will do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use shunt_core::table::LocalEndpoint;
use shunt_core::walk::{Outcome, Packet};
use xtables_tools::{Builtin, Table};

use crate::names;
use crate::rule::{Key, Match, Rule, Side, States, Target};
use crate::sets::Element;
use crate::state::State;

/// Jumps and gotos on one way: the deepest tree has 43 levels and a few chains below.
const DEPTH_MAX: usize = 64;

#[derive(Clone)]
struct Walker<'a> {
    state: &'a State,
    local: &'a BTreeSet<IpAddr>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    packet: &'a Packet,
    mark: u32,
    translated: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum End {
    /// The end of the chain, or `RETURN`.
    Return,
    Accept,
    Drop,
    Reject,
    Translated(SocketAddr),
    Masqueraded,
    Unknown(String),
}

/// All ways in which evaluation may go on: random choices make more than one.
type Ends<'a> = Vec<(End, Walker<'a>)>;

/// What becomes of a packet that comes in, or leaves this node, under `state`. `local` are the addresses of
/// the node. Clients have no history: no set of clients holds anybody.
///
/// # Errors
/// When the rules are not such as we write: unknown rules, or random choices with outcomes of different
/// kinds.
pub fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
    let walker = Walker {
        state,
        local,
        source: packet.source,
        destination: packet.destination,
        port: packet.port,
        packet,
        mark: 0,
        translated: false,
    };
    // A packet of the node itself takes another way.
    let own = packet.interface.is_none() && walker.is_local(packet.source);
    let first = if own { Builtin::Output } else { Builtin::Prerouting };
    let mut endpoints: BTreeMap<SocketAddr, bool> = BTreeMap::new();
    let mut others: BTreeSet<Outcome> = BTreeSet::new();
    for (end, mut walker) in walker.hook(Table::Nat, first) {
        let translated = match end {
            End::Translated(to) => {
                (walker.destination, walker.port, walker.translated) = (to.ip(), to.port(), true);
                Some(to)
            }
            End::Return | End::Accept => None,
            other => return Err(format!("{packet}: {other:?} in {}", first.name())),
        };
        for (end, walker) in walker.filter(own)? {
            match (end, translated) {
                (End::Drop, _) => drop(others.insert(Outcome::Drop)),
                (End::Reject, _) => drop(others.insert(Outcome::Reject)),
                (_, None) => drop(others.insert(Outcome::None)),
                (_, Some(to)) => {
                    let masquerade = walker.masquerade()?;
                    if endpoints.insert(to, masquerade).is_some_and(|before| before != masquerade) {
                        return Err(format!("{packet}: {to} sometimes masqueraded, sometimes not"));
                    }
                }
            }
        }
    }
    match (endpoints.is_empty(), others.pop_first(), others.is_empty()) {
        (false, None, _) => Ok(Outcome::Forward(endpoints.into_iter().collect())),
        (true, Some(only), true) => Ok(only),
        (true, None, _) => Ok(Outcome::None),
        (_, other, _) => Err(format!("{packet}: sometimes {other:?}, sometimes {endpoints:?}")),
    }
}

impl<'a> Walker<'a> {
    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address)
    }

    /// The filter table, where the packet passes it once or twice.
    fn filter(self, own: bool) -> Result<Ends<'a>, String> {
        let for_us = self.is_local(self.destination);
        let hooks: &[Builtin] = match (own, for_us) {
            (true, true) => &[Builtin::Output, Builtin::Input],
            (true, false) => &[Builtin::Output],
            (false, true) => &[Builtin::Input],
            (false, false) => &[Builtin::Forward],
        };
        let mut ends = vec![(End::Return, self)];
        for hook in hooks {
            let mut next = Vec::new();
            for (end, walker) in ends {
                match end {
                    End::Return | End::Accept => next.extend(walker.hook(Table::Filter, *hook)),
                    end => next.push((end, walker)),
                }
            }
            ends = next;
        }
        for (end, walker) in &ends {
            if !matches!(end, End::Return | End::Accept | End::Drop | End::Reject) {
                return Err(format!("{}: {end:?} in the filter table", walker.packet));
            }
        }
        Ok(ends)
    }

    fn masquerade(self) -> Result<bool, String> {
        let packet = self.packet;
        let ends = self.hook(Table::Nat, Builtin::Postrouting);
        let mut found = BTreeSet::new();
        for (end, walker) in ends {
            found.insert(match end {
                End::Masqueraded if walker.mark != 0 => return Err(format!("{packet}: leaves marked")),
                End::Masqueraded => true,
                End::Return | End::Accept => false,
                other => return Err(format!("{packet}: {other:?} in POSTROUTING")),
            });
        }
        match (found.pop_first(), found.is_empty()) {
            (Some(only), true) => Ok(only),
            _ => Err(format!("{packet}: sometimes masqueraded")),
        }
    }

    fn hook(self, table: Table, builtin: Builtin) -> Ends<'a> {
        match self.state.hooks.get(&(table, builtin)) {
            Some(rules) => self.rules(table, rules, 0),
            None => vec![(End::Return, self)],
        }
    }

    fn chain(self, table: Table, name: &str, depth: usize) -> Ends<'a> {
        if depth > DEPTH_MAX {
            return vec![(End::Unknown("too many jumps".to_owned()), self)];
        }
        match self.state.chains.get(&(table, names::Name::from(name))) {
            Some(rules) => self.rules(table, rules, depth),
            None => vec![(End::Unknown(format!("no chain {name}")), self)],
        }
    }

    fn rules(self, table: Table, rules: &'a [Rule], depth: usize) -> Ends<'a> {
        let mut going = vec![self];
        let mut ended = Vec::new();
        for rule in rules {
            let mut next = Vec::new();
            for mut walker in going {
                match walker.meets(rule) {
                    Ok((false, _)) => next.push(walker),
                    Ok((true, by_chance)) => {
                        if by_chance {
                            next.push(walker.clone());
                        }
                        match &rule.target {
                            Target::Jump(chain) => {
                                for (end, walker) in walker.chain(table, chain, depth + 1) {
                                    match end {
                                        End::Return => next.push(walker),
                                        end => ended.push((end, walker)),
                                    }
                                }
                            }
                            Target::Goto(chain) => ended.extend(walker.chain(table, chain, depth + 1)),
                            Target::SetMark(value, mask) => {
                                walker.mark = walker.mark & !mask ^ value;
                                next.push(walker);
                            }
                            Target::AddSource(..) => next.push(walker),
                            Target::Return => ended.push((End::Return, walker)),
                            Target::Accept => ended.push((End::Accept, walker)),
                            Target::Drop => ended.push((End::Drop, walker)),
                            Target::Reject => ended.push((End::Reject, walker)),
                            Target::Dnat(address, port) => {
                                let to = SocketAddr::new(*address, *port);
                                ended.push((End::Translated(to), walker));
                            }
                            Target::Masquerade => ended.push((End::Masqueraded, walker)),
                            Target::Other(text) => ended.push((End::Unknown(text.to_string()), walker)),
                        }
                    }
                    Err(what) => ended.push((End::Unknown(what), walker)),
                }
            }
            going = next;
        }
        ended.extend(going.into_iter().map(|walker| (End::Return, walker)));
        ended
    }

    /// Whether the packet meets a rule's conditions, and whether that was by chance.
    fn meets(&self, rule: &Rule) -> Result<(bool, bool), String> {
        let mut by_chance = false;
        for m in rule.matches.iter() {
            let (inverted, met) = match m {
                Match::Source(inverted, range) => (*inverted, range.contains(&self.source)),
                Match::Destination(inverted, range) => (*inverted, range.contains(&self.destination)),
                Match::Interface(inverted, name) => {
                    let came_by = self.packet.interface.as_deref().unwrap_or_default();
                    (
                        *inverted,
                        match name.strip_suffix('+') {
                            Some(prefix) => came_by.starts_with(prefix),
                            None => came_by == &**name,
                        },
                    )
                }
                Match::Protocol(protocol) => (false, *protocol == self.packet.protocol),
                Match::Ports(protocol, from, to) => {
                    (false, *protocol == self.packet.protocol && (*from..=*to).contains(&self.port))
                }
                Match::Local(inverted, Side::Source) => (*inverted, self.is_local(self.source)),
                Match::Local(inverted, Side::Destination) => (*inverted, self.is_local(self.destination)),
                Match::State(inverted, states) => {
                    let dnat = if self.translated { States::DNAT.0 } else { 0 };
                    (*inverted, states.0 & (States::NEW.0 | dnat) != 0)
                }
                Match::OriginalDestination(inverted, range) => {
                    (*inverted, range.contains(&self.packet.destination))
                }
                Match::Mark(inverted, value, mask) => (*inverted, self.mark & mask == *value),
                Match::Set(inverted, set, key) => (*inverted, self.is_in(set, *key)?),
                Match::Chance(_) => {
                    by_chance = true;
                    continue;
                }
                Match::Comment(_) | Match::Counted(_) => continue,
            };
            if met == inverted {
                return Ok((false, false));
            }
        }
        Ok((true, by_chance))
    }

    fn is_in(&self, set: &names::Name, key: Key) -> Result<bool, String> {
        let held = self.state.sets.get(set).ok_or_else(|| format!("no set {set}"))?;
        let (address, port, protocol) = (self.destination, self.port, self.packet.protocol);
        Ok(match key {
            Key::Source => false,
            Key::Destination => held.elements.contains(&Element::Address(address)),
            Key::Frontend => held.elements.contains(&Element::Frontend(address, protocol, port)),
            Key::FrontendSource => {
                let endpoint = LocalEndpoint { address, protocol, port };
                let itself = self.source == address && held.elements.contains(&Element::Hairpin(endpoint));
                itself
                    || held.elements.iter().any(|element| match element {
                        Element::Source(a, p, of, range) => {
                            (*a, *p, *of) == (address, protocol, port) && range.contains(&self.source)
                        }
                        _ => false,
                    })
            }
        })
    }
}
