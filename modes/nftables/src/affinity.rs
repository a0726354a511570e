//! Session affinity: which client goes to which endpoint, kept by the kernel.
//!
//! ```text
//!   affinity           : id . address    -> token             written by rules; elements expire
//!   affinity-endpoints : token           -> address . port    what a token means now
//!   affinity-slots     : id . slot       -> token             for choosing
//! ```
//!
//! An id stands for a Service port, a token for one of its endpoints. A record holds a token and never
//! an address: when an endpoint goes, its token leads nowhere, and all records that name it are void at
//! once, without anybody looking for them. Records are written by rules only. We never read them, so
//! they survive every restart and cost it nothing.
//!
//! A token is shaped `id (17 bits) | 0 | number (13 bits)`. In the key of `affinity-endpoints` the bit
//! between the two says by which list the endpoint is asked for: a record is shared by both lists, and
//! one that names an endpoint elsewhere leads nowhere under the Local policy.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use shunt_core::id::ServicePortName;

use crate::layout::{Endpoint, Leg, List};

const NUMBER_BITS: u32 = 13;
const LIST_BIT: u32 = 1 << NUMBER_BITS;
const ID_SHIFT: u32 = NUMBER_BITS + 1;
/// Largest id. Tokens stay below 2^31.
const ID_MAX: u32 = (1 << 17) - 1;
/// Largest number of an endpoint within its Service port; 0 is none.
pub const NUMBER_MAX: u32 = LIST_BIT - 1;
/// The bits of a token that are the id.
pub const ID_MASK: u32 = !(LIST_BIT | NUMBER_MAX);
/// The bit that a token has in addition, where the second list is asked.
pub const SECOND_LIST_BIT: u32 = LIST_BIT;

/// The number under which an id is part of keys: a token without an endpoint.
pub const fn id_part(id: u32) -> u32 {
    id << ID_SHIFT
}

/// The token of an endpoint.
pub const fn token(id: u32, number: u32) -> u32 {
    id_part(id) | (number & NUMBER_MAX)
}

/// The key of a token in `affinity-endpoints`.
pub const fn token_key(id: u32, list: List, number: u32) -> u32 {
    let list = match list {
        List::First => 0,
        List::Second => SECOND_LIST_BIT,
    };
    token(id, number) | list
}

/// Id, list and number of a key of `affinity-endpoints`; `None` for what is none.
pub const fn read_token_key(key: u32) -> Option<(u32, List, u32)> {
    let list = if key & SECOND_LIST_BIT == 0 { List::First } else { List::Second };
    let number = key & NUMBER_MAX;
    match read_id(key >> ID_SHIFT) {
        Some(id) if number != 0 => Some((id, list, number)),
        _ => None,
    }
}

/// The id of a key of `affinity-slots`; `None` for what is none.
pub const fn read_id_part(part: u32) -> Option<u32> {
    if part & !ID_MASK == 0 { read_id(part >> ID_SHIFT) } else { None }
}

const fn read_id(id: u32) -> Option<u32> {
    if id != 0 && id <= ID_MAX { Some(id) } else { None }
}

/// The id that a Service port would like to have: always the same, so that records outlive a time
/// without rules.
fn favourite(port: &str) -> u32 {
    let hash =
        port.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    ((hash >> 17) ^ hash) & ID_MAX
}

/// Ids for Service ports: those that are held are kept, the others get their favourite or the next free
/// one. A port is left out when there is none.
pub fn assign_ids<'a>(
    ports: impl Iterator<Item = &'a str> + Clone,
    held: impl Fn(&str) -> Option<u32>,
    in_use: impl Fn(u32) -> bool,
) -> BTreeMap<&'a str, u32> {
    let mut ids = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for port in ports.clone() {
        if let Some(id) = held(port)
            && taken.insert(id)
        {
            ids.insert(port, id);
        }
    }
    for port in ports {
        if ids.contains_key(port) {
            continue;
        }
        let first = favourite(port);
        let free = (0..=ID_MAX)
            .map(|n| (first + n) & ID_MAX)
            .find(|id| *id != 0 && !taken.contains(id) && !in_use(*id));
        if let Some(id) = free {
            taken.insert(id);
            ids.insert(port, id);
        }
    }
    ids
}

/// Longest name of a Service port in the name of a chain, which the kernel limits to 255 bytes.
const PORT_MAX: usize = 220;

/// The name of a Service port as a part of names of chains: `namespace/service/port/protocol`. What the
/// API server would not let pass is written as `_` and the byte in hexadecimal.
pub fn port_label(port: &ServicePortName) -> String {
    let mut label = String::new();
    let service = &port.service;
    let parts = [&*service.namespace, &*service.name, &*port.port].into_iter();
    for part in parts.take(if port.port.is_empty() { 2 } else { 3 }) {
        for byte in part.bytes() {
            if byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' {
                label.push(char::from(byte));
            } else {
                // Writing to a string does not fail.
                let _ = write!(label, "_{byte:02x}");
            }
        }
        label.push('/');
    }
    let _ = write!(label, "{}", port.protocol);
    if label.len() > PORT_MAX {
        let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        label.truncate(PORT_MAX - 18);
        let _ = write!(label, "__{hash:016x}");
    }
    label
}

const FIRST_CHAIN: &str = "affinity-";
const SECOND_CHAIN: &str = "affinity-here-";

/// What the name of the chain of an id and a list begins with.
pub fn chain_prefix(id: u32, list: List) -> String {
    match list {
        List::First => format!("{FIRST_CHAIN}{id:05x}-"),
        List::Second => format!("{SECOND_CHAIN}{id:05x}-"),
    }
}

/// The chain of a Service port and a list.
pub fn chain_name(id: u32, list: List, port: &str) -> String {
    chain_prefix(id, list) + port
}

/// Id and Service port of a chain's name; `None` for the name of another chain.
pub fn read_chain_name(name: &str) -> Option<(u32, &str)> {
    let rest = name.strip_prefix(SECOND_CHAIN).or_else(|| name.strip_prefix(FIRST_CHAIN))?;
    let (id, port) = rest.split_once('-')?;
    if id.len() != 5 || id.bytes().any(|b| !b.is_ascii_digit() && !(b'a'..=b'f').contains(&b)) {
        return None;
    }
    Some((read_id(u32::from_str_radix(id, 16).ok()?)?, port))
}

/// What the kernel holds for one id, records excepted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Affinity {
    /// What tokens mean, by list and number.
    pub endpoints: BTreeMap<(List, u32), Endpoint>,
    /// Slots of both lists: numbers of endpoints. A hole is an element that is missing.
    pub slots: [Vec<Option<u32>>; 2],
    /// How many chains there are.
    pub chains: usize,
    /// How many frontends have a class of this id, by its legs.
    pub frontends: BTreeMap<[Leg; 3], usize>,
}

impl Affinity {
    /// True when the kernel holds nothing.
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
            && self.slots.iter().all(Vec::is_empty)
            && self.chains == 0
            && self.frontends.is_empty()
    }

    /// Counts a frontend with a class of this id.
    pub fn count_frontend(&mut self, legs: [Leg; 3]) {
        *self.frontends.entry(legs).or_default() += 1;
    }

    /// Counts a frontend less.
    pub fn discount_frontend(&mut self, legs: [Leg; 3]) {
        if let Some(count) = self.frontends.get_mut(&legs) {
            *count -= 1;
            if *count == 0 {
                self.frontends.remove(&legs);
            }
        }
    }

    /// Sets or clears what a token means to a list.
    pub fn set_endpoint(&mut self, list: List, number: u32, to: Option<Endpoint>) {
        match to {
            Some(endpoint) => drop(self.endpoints.insert((list, number), endpoint)),
            None => drop(self.endpoints.remove(&(list, number))),
        }
    }

    /// Sets or clears a slot.
    pub fn set_slot(&mut self, list: List, index: u32, to: Option<u32>) {
        let (slots, index) = (&mut self.slots[list as usize], index as usize);
        if index >= slots.len() && to.is_some() {
            slots.resize(index + 1, None);
        }
        if let Some(slot) = slots.get_mut(index) {
            *slot = to;
        }
        while slots.last().is_some_and(Option::is_none) {
            slots.pop();
        }
    }

    /// Numbers for endpoints: those that stay keep theirs, the others get the smallest that are free.
    /// Endpoints for which none is left get none.
    pub fn number(&self, wanted: &[Endpoint]) -> BTreeMap<Endpoint, u32> {
        let wanted: BTreeSet<Endpoint> = wanted.iter().copied().take(NUMBER_MAX as usize).collect();
        let mut taken = BTreeSet::new();
        let mut numbers = BTreeMap::new();
        for ((_, number), endpoint) in &self.endpoints {
            if wanted.contains(endpoint) && !numbers.contains_key(endpoint) && taken.insert(*number) {
                numbers.insert(*endpoint, *number);
            }
        }
        let mut free = (1..=NUMBER_MAX).filter(|number| !taken.contains(number));
        for endpoint in wanted {
            if let std::collections::btree_map::Entry::Vacant(vacant) = numbers.entry(endpoint)
                && let Some(number) = free.next()
            {
                vacant.insert(number);
            }
        }
        numbers
    }
}

/// A class id as nft prints it: `major:minor` in hexadecimal.
pub fn classid(number: u32) -> String {
    format!("{:x}:{:x}", number >> 16, number & 0xffff)
}

#[cfg(test)]
mod tests {
    use shunt_core::id::{NamespacedName, Protocol};

    use super::*;

    fn port(namespace: &str, service: &str, port: &str) -> ServicePortName {
        ServicePortName {
            service: NamespacedName::new(namespace, service),
            port: port.into(),
            protocol: Protocol::Tcp,
        }
    }

    #[test]
    fn tokens_are_read_back_and_are_no_classes() {
        for id in [1, 77, ID_MAX] {
            for number in [1, 4096, NUMBER_MAX] {
                for list in List::ALL {
                    assert_eq!(read_token_key(token_key(id, list, number)), Some((id, list, number)));
                }
                let token = token(id, number);
                assert_eq!(token & ID_MASK, id_part(id));
                assert!(token < 1 << 31);
            }
            assert_eq!(read_id_part(id_part(id)), Some(id));
            assert_eq!(read_token_key(id_part(id)), None, "number 0 is no endpoint");
        }
        assert_eq!(read_id_part(0), None);
        assert_eq!(read_id_part(u32::MAX), None);
    }

    #[test]
    fn chains_say_what_they_are_for() {
        let label = port_label(&port("ns", "a-b", "http"));
        assert_eq!(label, "ns/a-b/http/tcp");
        for list in List::ALL {
            let name = chain_name(0x1a2b, list, &label);
            assert_eq!(read_chain_name(&name), Some((0x1a2b, &*label)), "{name}");
        }
        for other in ["affinity-", "affinity-xyz", "affinity-here-0-a", "affinity-00000-a", "pick-7"] {
            assert_eq!(read_chain_name(other), None, "{other}");
        }
    }

    #[test]
    fn labels_are_short_plain_and_distinct() {
        let long = "x".repeat(63);
        let ports = [
            port("ns", "svc", ""),
            port("ns", "svc", "tcp"),
            port("ns", "svc_2f", ""),
            port("ns", "svc/", ""),
            port("ns", "sv", "c"),
            port("n s\"", "SVC", "\u{e9}"),
            port(&long, &long, &long),
            port(&long.repeat(9), &long, "a"),
            port(&long.repeat(9), &long, "b"),
        ];
        let labels: BTreeSet<String> = ports.iter().map(port_label).collect();
        assert_eq!(labels.len(), ports.len(), "{labels:?}");
        for label in labels {
            assert!(chain_name(ID_MAX, List::Second, &label).len() < 256);
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_/".contains(&b);
            assert!(label.bytes().all(plain), "{label}");
        }
    }

    #[test]
    fn ids_are_kept_and_never_shared() {
        let names = ["a", "b", "c"];
        let fresh = assign_ids(names.into_iter(), |_| None, |_| false);
        assert_eq!(fresh, assign_ids(["c", "a", "b"].into_iter(), |_| None, |_| false));
        let busy = fresh["a"];
        let other = assign_ids(["a"].into_iter(), |_| None, |id| id == busy);
        assert_ne!(other["a"], busy);
        // Somebody made two chains with one id.
        let held = BTreeMap::from([("a", 7), ("b", 7), ("c", 9)]);
        let ids = assign_ids(names.into_iter(), |port| held.get(port).copied(), |id| [7, 9].contains(&id));
        assert_eq!((ids["a"], ids["c"]), (7, 9));
        assert!(![0, 7, 9].contains(&ids["b"]));
    }

    #[test]
    fn endpoints_that_stay_keep_their_numbers() {
        let endpoint = |n: u8| Endpoint { address: [10, 0, 0, n].into(), port: 80 };
        let mut held = Affinity::default();
        for n in 1..=4 {
            held.set_endpoint(List::First, u32::from(n), Some(endpoint(n)));
        }
        let numbers = held.number(&[endpoint(9), endpoint(4), endpoint(1), endpoint(3)]);
        let of = |n| numbers[&endpoint(n)];
        assert_eq!((of(1), of(9), of(3), of(4)), (1, 2, 3, 4));
        let many: Vec<Endpoint> = (0..10_000).map(|port| Endpoint { port, ..endpoint(1) }).collect();
        let numbers: BTreeSet<u32> = held.number(&many).into_values().collect();
        assert_eq!(numbers, (1..=NUMBER_MAX).collect());
    }
}
