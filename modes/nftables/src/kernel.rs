//! The only file that touches the kernel.

use std::collections::BTreeMap;
use std::time::Duration;

use nft_netlink::{
    Batch, Bytes, CommitError, Element, ElementData, Error, Rule as WireRule, Set, Socket, TableId, Verdict,
};
use shunt_core::id::IpFamily;
use shunt_mode::{KernelError, Mode, Remedy, Transaction, Unsupported};

use crate::affinity;
use crate::family;
use crate::layout::{self, List, SetKey, TABLE, TABLE_COMMENT};
use crate::op::Op;
use crate::ranges::{range_elements, ranges_of};
use crate::rules::Rule;
use crate::state::{State, Stray};

/// What the mode needs of a kernel, in the mode's own types.
pub trait Kernel {
    /// Whether this kernel has what the mode needs.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Reads our table, and nothing else.
    fn observe(&mut self) -> Result<State, KernelError>;
    /// Carries out all operations, or none.
    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError>;
    /// Deletes our table if it is there.
    fn delete_table(&mut self) -> Result<(), KernelError>;
}

/// The kernel of the network namespace in which it was opened, by netlink.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    family: IpFamily,
}

const fn table(family_of: IpFamily) -> TableId<'static> {
    TableId::new(family(family_of), TABLE)
}

impl Netlink {
    /// Opens the kernel's `nf_tables` in the calling thread's network namespace.
    pub fn open(family: IpFamily) -> Result<Self, KernelError> {
        let socket = Socket::new().map_err(|e| failed("open nf_tables", e))?;
        Ok(Self { socket, family })
    }

    fn read(&mut self) -> Result<State, Error> {
        let id = table(self.family);
        let mut state = State::empty(self.family);
        if !self.socket.dump_tables(id.family)?.iter().any(|t| t.name == TABLE) {
            return Ok(state);
        }
        state.exists = true;
        for chain in self.socket.dump_chains(id)? {
            state.add_chain(chain.name, chain.base);
        }
        for rule in self.socket.dump_rules(id, None)? {
            if let Some(chain) = state.chains.get_mut(&rule.chain) {
                chain.rules.push(Rule { exprs: rule.exprs, text: String::new() });
            }
        }
        let declared: Vec<Set> = self.socket.dump_sets(id)?;
        let largest = |sets: &[SetKey], of: fn(&SetKey) -> Option<u32>| sets.iter().filter_map(of).max();
        for set in &declared {
            match SetKey::from_name(&set.name) {
                Some(key) if key.declaration(self.family) == *set => {
                    state.sets.insert(key);
                }
                _ => state.foreign = true,
            }
        }
        if state.foreign {
            return Ok(state);
        }
        let sets: Vec<SetKey> = state.sets.iter().copied().collect();
        let services = largest(&sets, |s| if let SetKey::Services(n) = s { Some(*n) } else { None });
        let endpoints = largest(&sets, |s| if let SetKey::Endpoints(n) = s { Some(*n) } else { None });
        for set in sets {
            // Of two maps of the same kind the larger one is in use.
            let in_use = match set {
                SetKey::Services(n) => Some(n) == services,
                SetKey::Endpoints(n) => Some(n) == endpoints,
                _ => true,
            };
            // There may be millions of records; nobody but the rules has any use for them.
            if !in_use || set == SetKey::Affinity {
                continue;
            }
            let sized = matches!(set, SetKey::Services(_) | SetKey::Endpoints(_));
            if sized {
                self.socket.dump_elements(id, &set.to_string(), |e| state.insert(set, &e))?;
                continue;
            }
            let elements = self.settled_elements(id, set)?;
            if set == SetKey::ServiceCidrs {
                let (ranges, strays) = ranges_of(self.family, &elements);
                state.service_cidrs = ranges;
                state.strays.extend(strays.into_iter().map(|e| Stray {
                    set,
                    key: e.key,
                    key_end: e.key_end,
                    interval_end: e.interval_end,
                }));
            } else {
                for element in &elements {
                    state.insert(set, element);
                }
            }
        }
        Ok(state)
    }

    /// Elements of a set without a declared size: dumped until two dumps agree, because the kernel
    /// reorganises such sets after many additions, and a dump meanwhile may lack some.
    fn settled_elements(&mut self, id: TableId<'_>, set: SetKey) -> Result<Vec<Element>, Error> {
        const TRIES: usize = 20;
        let mut last: Vec<Element> = Vec::new();
        for _ in 0..TRIES {
            let mut elements = Vec::new();
            self.socket.dump_elements(id, &set.to_string(), |e| elements.push(e))?;
            elements.sort_unstable();
            if elements == last {
                break;
            }
            last = elements;
        }
        Ok(last)
    }
}

impl Kernel for Netlink {
    fn probe(&mut self) -> Result<(), Unsupported> {
        match self.socket.generation() {
            Ok(_) => Ok(()),
            Err(error) => Err(Unsupported {
                mode: Mode::Nftables,
                missing: format!("nf_tables does not answer ({error})"),
                advice: "the kernel needs CONFIG_NF_TABLES (module nf_tables) and the process CAP_NET_ADMIN"
                    .to_owned(),
            }),
        }
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        /// A table that keeps changing is read as well as it can be; the next sync reads it again.
        const TRIES: usize = 10;
        let mut tries = 0;
        loop {
            tries += 1;
            match self.read() {
                Err(Error::Interrupted { .. }) if tries < TRIES => {}
                read => return read.map_err(|e| failed("read our table", e)),
            }
        }
    }

    fn commit(&mut self, transaction: &Transaction<Op>) -> Result<(), KernelError> {
        let batch = encode(self.family, &transaction.ops);
        self.socket.commit(&batch).map_err(|error| {
            let remedy = match &error {
                CommitError::Refused(_) => Remedy::Resync,
                _ => Remedy::Retry,
            };
            KernelError { context: format!("commit to table {TABLE}"), source: Box::new(error), remedy }
        })
    }

    fn delete_table(&mut self) -> Result<(), KernelError> {
        let id = table(self.family);
        let tables = self.socket.dump_tables(id.family).map_err(|e| failed("list tables", e))?;
        if !tables.iter().any(|t| t.name == TABLE) {
            return Ok(());
        }
        // Chains with hooks go first. A packet on its way through the chains meets the end of the maps, which a
        // deletion empties at once, but not yet of the sets: it would be refused as one for an unknown port.
        let chains = self.socket.dump_chains(id).map_err(|e| failed("list chains", e))?;
        let mut batch = Batch::new();
        for chain in chains.iter().filter(|chain| chain.base.is_some()) {
            batch.delete_chain(id, &chain.name);
        }
        self.socket.commit(&batch).map_err(|error| KernelError {
            context: "delete the chains with hooks".to_owned(),
            source: Box::new(error),
            remedy: Remedy::Retry,
        })?;
        std::thread::sleep(PACKETS_PASS);
        self.commit(&Transaction { ops: vec![Op::DeleteTable(self.family)] })
    }
}

/// After this time no packet is on its way through chains that nothing leads to any more.
const PACKETS_PASS: Duration = Duration::from_millis(20);

/// The table of kube-proxy's own nftables mode, in `ip` and `ip6`.
const KUBE_PROXY_TABLE: &str = "kube-proxy";

/// Whether there is a table of ours, or of kube-proxy's, in the calling thread's network namespace.
pub fn has_table(of: IpFamily) -> Result<bool, KernelError> {
    let mut socket = Socket::new().map_err(|e| failed("open nf_tables", e))?;
    let tables = socket.dump_tables(family(of)).map_err(|e| failed("list tables", e))?;
    Ok(tables.iter().any(|t| [TABLE, KUBE_PROXY_TABLE].contains(&&*t.name)))
}

/// Deletes what kube-proxy's nftables mode left in the calling thread's network namespace. Answers whether
/// there was anything.
pub fn remove_kube_proxy(of: IpFamily) -> Result<bool, KernelError> {
    let mut socket = Socket::new().map_err(|e| failed("open nf_tables", e))?;
    let id = TableId::new(family(of), KUBE_PROXY_TABLE);
    let tables = socket.dump_tables(id.family).map_err(|e| failed("list tables", e))?;
    if !tables.iter().any(|t| t.name == KUBE_PROXY_TABLE) {
        return Ok(false);
    }
    let mut batch = Batch::new();
    batch.delete_table(id);
    socket.commit(&batch).map_err(|error| KernelError {
        context: format!("delete table {KUBE_PROXY_TABLE}"),
        source: Box::new(error),
        remedy: Remedy::Retry,
    })?;
    Ok(true)
}

fn failed(context: &str, error: Error) -> KernelError {
    KernelError { context: context.to_owned(), source: Box::new(error), remedy: Remedy::Retry }
}

/// Elements to delete from and to add to one set.
#[derive(Default)]
struct Elements {
    delete: Vec<Element>,
    add: Vec<Element>,
}

/// One batch for a transaction. Within a transaction the order of operations on different keys means
/// nothing, so that elements are gathered by set; what is referred to is made first and deleted last.
fn encode(of: IpFamily, ops: &[Op]) -> Batch {
    let id = table(of);
    let mut batch = Batch::new();
    let mut elements: BTreeMap<SetKey, Elements> = BTreeMap::new();
    let mut last: Vec<&Op> = Vec::new();
    for op in ops {
        match op {
            Op::AddTable(_) => batch.add_table(id, Some(TABLE_COMMENT)),
            Op::DeleteTable(_) => batch.delete_table(id),
            Op::AddSet(set) => batch.add_set(id, &set.declaration(of)),
            Op::AddChain(name, base) => {
                batch.add_chain(id, &nft_netlink::Chain { name: name.clone(), base: *base });
            }
            Op::SetRules(chain, _) => {
                batch.flush_chain(id, chain);
                last.push(op);
            }
            Op::DeleteSet(_) | Op::DeleteChain(_) => last.push(op),
            element => gather(element, &mut elements),
        }
    }
    // Rules refer to sets and chains, which exist by now; elements refer to chains.
    for op in &last {
        if let Op::SetRules(chain, rules) = op {
            for rule in rules {
                let (chain, exprs) = (chain.clone(), rule.exprs.clone());
                batch.add_rule(id, &WireRule { chain, handle: None, comment: None, exprs });
            }
        }
    }
    for (set, elements) in &elements {
        let name = set.to_string();
        if !elements.delete.is_empty() {
            batch.delete_elements(id, &name, &elements.delete);
        }
        if !elements.add.is_empty() {
            batch.add_elements(id, &name, &elements.add);
        }
    }
    for op in &last {
        match op {
            Op::DeleteChain(name) => batch.delete_chain(id, name),
            Op::DeleteSet(set) => batch.delete_set(id, &set.to_string()),
            _ => {}
        }
    }
    batch
}

fn gather(op: &Op, elements: &mut BTreeMap<SetKey, Elements>) {
    let mut delete = |set: SetKey, element| elements.entry(set).or_default().delete.push(element);
    match op {
        Op::SetClass { set, frontend, from: Some(_), .. } => {
            delete(*set, Element::new(layout::frontend_key(frontend).done()));
        }
        Op::SetSlot { set, frontend, list, index, from: Some(_), .. } => {
            delete(*set, Element::new(layout::slot_key(frontend, *list, *index)));
        }
        Op::SetToken { id, list, number, from: Some(_), .. } => {
            delete(
                SetKey::AffinityEndpoints,
                Element::new(number_key(affinity::token_key(*id, *list, *number))),
            );
        }
        Op::SetChoice { id, list, index, from: Some(_), .. } => {
            delete(SetKey::AffinitySlots, Element::new(choice_key(*id, *list, *index)));
        }
        Op::DeleteClass(class) => delete(SetKey::Classes, Element::new(number_key(class.number()))),
        Op::DeleteAddress(set, address) => {
            delete(*set, Element::new(layout::Key::default().address(*address).done()));
        }
        Op::DeleteServiceCidr(range) => {
            for element in range_elements(range) {
                delete(SetKey::ServiceCidrs, element);
            }
        }
        Op::DeleteHairpin(endpoint) => delete(SetKey::Hairpin, Element::new(layout::hairpin_key(endpoint))),
        Op::DeleteGuard(frontend) => {
            delete(SetKey::Guarded, Element::new(layout::frontend_key(frontend).done()));
        }
        Op::DeleteSource(frontend, range) => delete(SetKey::SourceRanges, source_element(frontend, range)),
        Op::DeleteStray(stray) => delete(
            stray.set,
            Element {
                key_end: stray.key_end.clone(),
                interval_end: stray.interval_end,
                ..Element::new(stray.key.clone())
            },
        ),
        _ => {}
    }
    let mut add = |set: SetKey, element| elements.entry(set).or_default().add.push(element);
    match op {
        Op::SetClass { set, frontend, to: Some(class), .. } => {
            let key = layout::frontend_key(frontend).done();
            add(*set, Element::value(key, number_key(class.number())));
        }
        Op::SetSlot { set, frontend, list, index, to: Some(endpoint), .. } => {
            let key = layout::slot_key(frontend, *list, *index);
            add(*set, Element::value(key, layout::endpoint_data(endpoint)));
        }
        Op::SetToken { id, list, number, to: Some(endpoint), .. } => {
            let key = number_key(affinity::token_key(*id, *list, *number));
            add(SetKey::AffinityEndpoints, Element::value(key, layout::endpoint_data(endpoint)));
        }
        Op::SetChoice { id, list, index, to: Some(number), .. } => {
            let token = number_key(affinity::token(*id, *number));
            add(SetKey::AffinitySlots, Element::value(choice_key(*id, *list, *index), token));
        }
        Op::AddClass(class, chain) => {
            let leads_to = chain.clone().map_or(Verdict::Drop, Verdict::Goto);
            let key = number_key(class.number());
            let element = Element { data: Some(ElementData::Verdict(leads_to)), ..Element::new(key) };
            add(SetKey::Classes, element);
        }
        Op::AddAddress(set, address) => {
            add(*set, Element::new(layout::Key::default().address(*address).done()));
        }
        Op::AddServiceCidr(range) => {
            for element in range_elements(range) {
                add(SetKey::ServiceCidrs, element);
            }
        }
        Op::AddHairpin(endpoint) => add(SetKey::Hairpin, Element::new(layout::hairpin_key(endpoint))),
        Op::AddGuard(frontend) => {
            add(SetKey::Guarded, Element::new(layout::frontend_key(frontend).done()));
        }
        Op::AddSource(frontend, range) => add(SetKey::SourceRanges, source_element(frontend, range)),
        _ => {}
    }
}

fn number_key(number: u32) -> Bytes {
    layout::Key::default().number(number).done()
}

fn choice_key(id: u32, list: List, index: u32) -> Bytes {
    layout::Key::default().number(affinity::id_part(id)).number(list.base() + index).done()
}

fn source_element(frontend: &shunt_core::table::Frontend, range: &ipnet::IpNet) -> Element {
    let key = |address| layout::frontend_key(frontend).address(address).done();
    Element { key_end: Some(key(range.broadcast())), ..Element::new(key(range.network())) }
}
