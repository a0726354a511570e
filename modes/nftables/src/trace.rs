//! Walks a packet through the rules and maps of a [`State`]: a small interpreter of nftables
//! expressions. It reads exactly what the kernel is given, so that what it finds is what the kernel
//! will do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use nft_netlink::{
    CmpOp, CtKey, DynsetOp, ElementData, Expr, FibFlags, FibResult, MetaKey, NatKind, PayloadBase, Register,
    Verdict,
};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::walk::{Outcome, Packet};

use crate::affinity;
use crate::layout::{Key, KeyReader, SetKey};
use crate::state::State;

/// Where the packet is and what it carries.
#[derive(Clone, Debug)]
struct Walker<'a> {
    state: &'a State,
    local: &'a BTreeSet<IpAddr>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    protocol: Protocol,
    interface: &'a str,
    mark: u32,
    priority: u32,
    translated: bool,
    records: &'a Records,
    /// What became of the record of the packet's source: its id, and the token that it holds now.
    record: Option<(u32, Option<u32>)>,
}

/// Which endpoints clients were sent to: what the map `affinity` holds, by source and id.
pub type Records = BTreeMap<(IpAddr, u32), u32>;

/// How a rule or chain ended.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum End {
    /// The rule did not match, or the chain came to its end.
    Continue,
    /// The chain was left by `return`.
    Return,
    Accept,
    Drop,
    Reject,
    Translated(SocketAddr),
    Masqueraded,
    /// Something that this walker does not know.
    Unknown(String),
}

/// All ways in which evaluation may go on: random choices make more than one.
type Ends<'a> = Vec<(End, Walker<'a>)>;

const JUMPS_MAX: usize = 16;

/// What becomes of a packet that comes in, or leaves this node, under `state`. `local` are the
/// addresses of the node.
///
/// # Errors
/// When the rules are not such as we write: unknown expressions, or random choices with outcomes of
/// different kinds.
pub fn trace(state: &State, local: &BTreeSet<IpAddr>, packet: &Packet) -> Result<Outcome, String> {
    trace_client(state, local, packet, &Records::new()).map(|(outcome, _)| outcome)
}

/// [`trace`] for a client with a history. Answers also what is remembered of the client where it is sent
/// to an endpoint: the token, if any.
///
/// # Errors
/// As [`trace`]; also when one endpoint may be remembered in several ways.
pub fn trace_client(
    state: &State,
    local: &BTreeSet<IpAddr>,
    packet: &Packet,
    records: &Records,
) -> Result<(Outcome, BTreeMap<SocketAddr, Option<u32>>), String> {
    let mut remembered: BTreeMap<SocketAddr, Option<u32>> = BTreeMap::new();
    let walker = Walker {
        state,
        local,
        source: packet.source,
        destination: packet.destination,
        port: packet.port,
        protocol: packet.protocol,
        interface: packet.interface.as_deref().unwrap_or_default(),
        mark: 0,
        priority: 0,
        translated: false,
        records,
        record: None,
    };
    let mut endpoints: BTreeMap<SocketAddr, bool> = BTreeMap::new();
    let mut others: BTreeSet<Outcome> = BTreeSet::new();
    for (end, after) in walker.base_chain("nat-prerouting") {
        match end {
            End::Translated(to) => {
                let mut after = after;
                after.destination = to.ip();
                after.port = to.port();
                after.translated = true;
                if after.priority != 0 {
                    return Err(format!("{packet}: leaves with priority {:#x}", after.priority));
                }
                let token = after.record.and_then(|(_, token)| token);
                if remembered.insert(to, token).is_some_and(|other| other != token) {
                    return Err(format!("{packet}: {to} remembered in different ways"));
                }
                let masquerade = after
                    .base_chain("nat-postrouting")
                    .into_iter()
                    .map(|(end, after)| match end {
                        // An encapsulated packet that comes by a second time would be taken for marked.
                        End::Masqueraded if after.mark != 0 => Err(format!("{packet}: leaves marked")),
                        End::Masqueraded => Ok(true),
                        End::Continue | End::Accept | End::Return => Ok(false),
                        other => Err(format!("{packet}: {other:?} in nat-postrouting")),
                    })
                    .collect::<Result<BTreeSet<bool>, String>>()?;
                if endpoints.insert(to, masquerade.contains(&true)).is_some_and(|m| masquerade != [m].into())
                {
                    return Err(format!("{packet}: {to} sometimes masqueraded, sometimes not"));
                }
            }
            End::Reject => drop(others.insert(Outcome::Reject)),
            End::Drop => drop(others.insert(Outcome::Drop)),
            End::Continue | End::Accept | End::Return => drop(others.insert(Outcome::None)),
            End::Masqueraded => return Err(format!("{packet}: masqueraded in nat-prerouting")),
            End::Unknown(what) => return Err(format!("{packet}: {what}")),
        }
    }
    match (endpoints.is_empty(), others.pop_first(), others.is_empty()) {
        (false, None, _) => Ok((Outcome::Forward(endpoints.into_iter().collect()), remembered)),
        (true, Some(only), true) => Ok((only, remembered)),
        (true, None, _) => Ok((Outcome::None, remembered)),
        (_, other, _) => Err(format!("{packet}: sometimes {other:?}, sometimes {endpoints:?}")),
    }
}

impl<'a> Walker<'a> {
    fn base_chain(self, name: &str) -> Ends<'a> {
        match self.state.chains.get(name) {
            Some(chain) if chain.base.is_some() => self.chain(name, 0),
            _ => vec![(End::Continue, self)],
        }
    }

    fn chain(self, name: &str, depth: usize) -> Ends<'a> {
        let Some(chain) = self.state.chains.get(name) else {
            return vec![(End::Unknown(format!("no chain {name}")), self)];
        };
        if depth > JUMPS_MAX {
            return vec![(End::Unknown("too many jumps".to_owned()), self)];
        }
        let mut going = vec![self];
        let mut ended = Vec::new();
        for rule in &chain.rules {
            let mut next = Vec::new();
            for walker in going {
                for (end, walker) in Evaluation::new(walker).rule(&rule.exprs, depth) {
                    match end {
                        End::Continue => next.push(walker),
                        end => ended.push((end, walker)),
                    }
                }
            }
            going = next;
        }
        ended.extend(going.into_iter().map(|walker| (End::Continue, walker)));
        ended
    }

    fn verdict(self, verdict: &Verdict, depth: usize) -> Ends<'a> {
        match verdict {
            Verdict::Accept => vec![(End::Accept, self)],
            Verdict::Drop => vec![(End::Drop, self)],
            Verdict::Continue => vec![(End::Continue, self)],
            Verdict::Return => vec![(End::Return, self)],
            // The end of a chain that was gone to is the end of the chain that it was gone to from.
            Verdict::Goto(chain) => self
                .chain(chain, depth + 1)
                .into_iter()
                .map(|(end, w)| (if end == End::Continue { End::Return } else { end }, w))
                .collect(),
            Verdict::Jump(chain) => self
                .chain(chain, depth + 1)
                .into_iter()
                .map(|(end, w)| (if end == End::Return { End::Continue } else { end }, w))
                .collect(),
            Verdict::Other(code) => vec![(End::Unknown(format!("verdict {code}")), self)],
        }
    }

    fn is_local(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address)
    }

    /// Bytes of the packet's headers; `None` where this walker has none.
    fn payload(&self, base: PayloadBase, offset: u32, len: u32) -> Option<Vec<u8>> {
        let mut header = [0_u8; 40];
        match (base, self.source, self.destination) {
            (PayloadBase::Network, IpAddr::V4(source), IpAddr::V4(destination)) => {
                header[9] = self.protocol.number();
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
            }
            (PayloadBase::Network, IpAddr::V6(source), IpAddr::V6(destination)) => {
                header[6] = self.protocol.number();
                header[8..24].copy_from_slice(&source.octets());
                header[24..40].copy_from_slice(&destination.octets());
            }
            (PayloadBase::Transport, ..) => header[2..4].copy_from_slice(&self.port.to_be_bytes()),
            _ => return None,
        }
        header.get(offset as usize..(offset + len) as usize).map(<[u8]>::to_vec)
    }
}

/// Evaluation of one rule: registers come into being with it and go with it.
#[derive(Clone)]
struct Evaluation<'a> {
    walker: Walker<'a>,
    registers: [u8; 64],
}

impl<'a> Evaluation<'a> {
    const fn new(walker: Walker<'a>) -> Self {
        Self { walker, registers: [0; 64] }
    }

    fn load(&mut self, register: Register, data: &[u8]) {
        let at = usize::from(register.index()) * 4;
        let padded = data.len().next_multiple_of(4);
        if let Some(space) = self.registers.get_mut(at..at + padded) {
            space.fill(0);
            space[..data.len()].copy_from_slice(data);
        }
    }

    fn read(&self, register: Register, len: usize) -> &[u8] {
        let at = usize::from(register.index()) * 4;
        self.registers.get(at..at + len).unwrap_or_default()
    }

    fn number(&self, register: Register) -> u32 {
        KeyReader::new(self.read(register, 4)).number().unwrap_or_default()
    }

    fn rule(mut self, exprs: &[Expr], depth: usize) -> Ends<'a> {
        for (i, expr) in exprs.iter().enumerate() {
            match expr {
                Expr::Numgen { dreg, modulus, offset, .. } => {
                    return (0..*modulus)
                        .flat_map(|n| {
                            let mut chosen = self.clone();
                            chosen.load(*dreg, &(n + offset).to_ne_bytes());
                            chosen.rule(&exprs[i + 1..], depth)
                        })
                        .collect();
                }
                Expr::ImmediateVerdict(verdict) => return self.walker.verdict(verdict, depth),
                Expr::VerdictMap { set, sreg } => {
                    return match self.lookup(set, *sreg) {
                        Ok(Some(ElementData::Verdict(verdict))) => self.walker.verdict(&verdict, depth),
                        Ok(_) => vec![(End::Continue, self.walker)],
                        Err(what) => vec![(End::Unknown(what), self.walker)],
                    };
                }
                other => match self.step(other) {
                    Ok(None) => {}
                    Ok(Some(end)) => return vec![(end, self.walker)],
                    Err(what) => return vec![(End::Unknown(what), self.walker)],
                },
            }
        }
        vec![(End::Continue, self.walker)]
    }

    /// The set of this name and the key for it.
    fn key(&self, set: &str, sreg: Register) -> Result<(SetKey, &[u8]), String> {
        let key = SetKey::from_name(set).ok_or_else(|| format!("no set {set}"))?;
        if !self.walker.state.sets.contains(&key) {
            return Err(format!("no set {set}"));
        }
        let len = key.declaration(self.walker.state.family).key_len();
        Ok((key, self.read(sreg, len)))
    }

    fn lookup(&self, set: &str, sreg: Register) -> Result<Option<ElementData>, String> {
        let (set, key) = self.key(set, sreg)?;
        if set == SetKey::Affinity {
            let token = self.record(key)?.1;
            return Ok(token.map(|t| ElementData::Value(Key::default().number(t).done())));
        }
        Ok(self.walker.state.lookup(set, key))
    }

    /// Id and token of the record with this key.
    fn record(&self, key: &[u8]) -> Result<(u32, Option<u32>), String> {
        let mut reader = KeyReader::new(key);
        let id = reader.number().and_then(affinity::read_id_part);
        let source = reader.address(self.walker.state.family);
        match (source, id) {
            (Some(source), Some(id)) if source == self.walker.source => match self.walker.record {
                Some((of, token)) if of == id => Ok((id, token)),
                _ => Ok((id, self.walker.records.get(&(source, id)).copied())),
            },
            _ => Err(format!("record of {source:?} for {id:?}")),
        }
    }

    fn dynset(&mut self, set: &str, op: DynsetOp, key: Register, data: Register) -> Result<(), String> {
        let (set, key) = self.key(set, key)?;
        if set != SetKey::Affinity {
            return Err(format!("{op} @{set}"));
        }
        let (id, held) = self.record(key)?;
        let token = match op {
            DynsetOp::Delete => None,
            // An element that exists keeps its data.
            DynsetOp::Add | DynsetOp::Update => held.or(Some(self.number(data))),
        };
        self.walker.record = Some((id, token));
        Ok(())
    }

    /// Evaluates one expression: `Some(Continue)` when the rule does not match.
    fn step(&mut self, expr: &Expr) -> Result<Option<End>, String> {
        const NO_MATCH: Option<End> = Some(End::Continue);
        match expr {
            Expr::Payload { base, offset, len, dreg } => {
                let data =
                    self.walker.payload(*base, *offset, *len).ok_or_else(|| format!("payload: {expr}"))?;
                self.load(*dreg, &data);
            }
            Expr::Meta { key, dreg } => match key {
                MetaKey::L4Proto => self.load(*dreg, &[self.walker.protocol.number()]),
                MetaKey::Mark => self.load(*dreg, &self.walker.mark.to_ne_bytes()),
                MetaKey::Priority => self.load(*dreg, &self.walker.priority.to_ne_bytes()),
                MetaKey::IifName => {
                    let mut name = [0; 16];
                    let len = self.walker.interface.len().min(15);
                    name[..len].copy_from_slice(&self.walker.interface.as_bytes()[..len]);
                    self.load(*dreg, &name);
                }
                other => return Err(format!("meta {other}")),
            },
            Expr::MetaSet { key, sreg } => match key {
                MetaKey::Mark => self.walker.mark = self.number(*sreg),
                MetaKey::Priority => self.walker.priority = self.number(*sreg),
                other => return Err(format!("meta set {other}")),
            },
            Expr::Ct { key: CtKey::Status, direction: None, dreg } => {
                self.load(*dreg, &(u32::from(self.walker.translated) << 5).to_ne_bytes());
            }
            Expr::Cmp { op, sreg, data } => {
                let equal = self.read(*sreg, data.len()) == data.as_slice();
                let matches = match op {
                    CmpOp::Eq => equal,
                    CmpOp::Neq => !equal,
                    other => return Err(format!("cmp {other}")),
                };
                if !matches {
                    return Ok(NO_MATCH);
                }
            }
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                let data: Vec<u8> = self
                    .read(*sreg, mask.len())
                    .iter()
                    .zip(mask.iter().zip(xor.iter()))
                    .map(|(byte, (mask, xor))| byte & mask ^ xor)
                    .collect();
                self.load(*dreg, &data);
            }
            Expr::Immediate { dreg, data } => self.load(*dreg, data),
            Expr::Lookup { set, sreg, dreg, invert } => match (self.lookup(set, *sreg)?, dreg) {
                (Some(ElementData::Value(value)), Some(dreg)) => self.load(*dreg, &value),
                (found, None) if found.is_some() != *invert => {}
                _ => return Ok(NO_MATCH),
            },
            Expr::Fib { result: FibResult::AddrType, flags, dreg } => {
                let address = if flags.contains(FibFlags::SADDR) {
                    self.walker.source
                } else {
                    self.walker.destination
                };
                let kind: u32 = if self.walker.is_local(address) { 2 } else { 1 };
                self.load(*dreg, &kind.to_ne_bytes());
            }
            Expr::Nat { kind: NatKind::Dnat, addr, port: Some(port), .. } => {
                let family = self.walker.state.family;
                let len = match family {
                    IpFamily::V4 => 4,
                    IpFamily::V6 => 16,
                };
                let address = KeyReader::new(self.read(*addr, len)).address(family);
                let port = KeyReader::new(self.read(*port, 2)).port();
                let (Some(address), Some(port)) = (address, port) else {
                    return Err(format!("no address in {expr}"));
                };
                return Ok(Some(End::Translated(SocketAddr::new(address, port))));
            }
            Expr::Masquerade { .. } => return Ok(Some(End::Masqueraded)),
            Expr::Reject(_) => return Ok(Some(End::Reject)),
            Expr::Counter(_) => {}
            Expr::Dynset { set, op, key, data: Some(data), .. } => self.dynset(set, *op, *key, *data)?,
            other => return Err(format!("expression {other}")),
        }
        Ok(None)
    }
}
