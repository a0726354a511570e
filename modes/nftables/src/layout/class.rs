//! What to do for a frontend, as one number that many frontends share.

use std::fmt;

use super::ChainKey;

/// First slot of the endpoints of the second list (see [`List`]).
pub const SECOND_LIST_BASE: u32 = 1 << 20;
/// Most endpoints that one list can hold.
pub const LIST_MAX: usize = SECOND_LIST_BASE as usize - 1;

/// Which list of endpoints of a frontend: a class may choose from two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum List {
    /// The list that all frontends have.
    First,
    /// The node's own endpoints, where outsiders get only those.
    Second,
}

impl List {
    /// Both lists.
    pub const ALL: [Self; 2] = [Self::First, Self::Second];

    /// The slot number of the first endpoint of this list.
    pub const fn base(self) -> u32 {
        match self {
            Self::First => 0,
            Self::Second => SECOND_LIST_BASE,
        }
    }
}

/// What happens to packets of one class of source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Leg {
    /// Discarded.
    Drop,
    /// Sent to an endpoint of a list.
    Pick {
        /// The list.
        list: List,
        /// Whether the source is rewritten.
        masquerade: bool,
    },
}

impl Leg {
    pub(super) const fn code(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Pick { list, masquerade } => 1 + 2 * (list as u32) + masquerade as u32,
        }
    }

    pub(super) const fn from_code(code: u32) -> Self {
        match code {
            0 => Self::Drop,
            _ => Self::Pick {
                list: if code > 2 { List::Second } else { List::First },
                masquerade: code.is_multiple_of(2),
            },
        }
    }
}

/// What to do for a frontend, as one number that many frontends share.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// Refuse.
    Reject,
    /// Discard.
    Drop,
    /// Choose an endpoint.
    Pick {
        /// Whether the frontend is a node port, keyed without an address.
        node_port: bool,
        /// What happens to packets from local pods, from this node, and from elsewhere.
        legs: [Leg; 3],
        /// Endpoints in each list; 0 for a list that no leg uses.
        counts: [u32; 2],
    },
    /// Send each client to the endpoint that it was sent to before. The first list is that of the
    /// Cluster policy, the second that of the Local policy.
    Affinity {
        /// The Service port.
        id: u32,
        /// What happens to packets from local pods, from this node, and from elsewhere.
        legs: [Leg; 3],
    },
}

const REJECT: u32 = 0x0100_0000;
const DROP: u32 = 0x0200_0000;
const FIRST_PICK: u32 = 0x03;
const LEG_CODES: u32 = 5 * 5 * 5;
const AFFINITY: u32 = 0xfd;

const fn code_of(legs: [Leg; 3]) -> u32 {
    legs[0].code() * 25 + legs[1].code() * 5 + legs[2].code()
}

const fn legs_of(code: u32) -> [Leg; 3] {
    [Leg::from_code(code / 25), Leg::from_code(code / 5 % 5), Leg::from_code(code % 5)]
}

impl Class {
    /// Most endpoints of each list where a class uses both.
    pub const SPLIT_MAX: usize = 0xfff;

    /// The number that stands for the class in the kernel.
    ///
    /// Shape: 8 bits of kind, then 24 bits of count, or 12 and 12 where both lists are used, or 17 bits
    /// of id and 7 bits of legs.
    pub const fn number(self) -> u32 {
        match self {
            Self::Reject => REJECT,
            Self::Drop => DROP,
            Self::Pick { node_port, legs, counts } => {
                let kind = FIRST_PICK + code_of(legs) + if node_port { LEG_CODES } else { 0 };
                let counts = if counts[1] == 0 { counts[0] } else { (counts[0] << 12) | (counts[1] & 0xfff) };
                (kind << 24) | (counts & 0x00ff_ffff)
            }
            Self::Affinity { id, legs } => (AFFINITY << 24) | ((id << 7) & 0x00ff_ff80) | code_of(legs),
        }
    }

    /// The class with this number; `None` if we never write such a number.
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            REJECT => return Some(Self::Reject),
            DROP => return Some(Self::Drop),
            _ => {}
        }
        let kind = number >> 24;
        if kind == AFFINITY {
            let (id, code) = ((number >> 7) & 0x1_ffff, number & 0x7f);
            return if id != 0 && code < LEG_CODES {
                Some(Self::Affinity { id, legs: legs_of(code) })
            } else {
                None
            };
        }
        if kind < FIRST_PICK || kind >= FIRST_PICK + 2 * LEG_CODES {
            return None;
        }
        let node_port = kind - FIRST_PICK >= LEG_CODES;
        let legs = legs_of((kind - FIRST_PICK) % LEG_CODES);
        let second = uses(legs, List::Second);
        let low = number & 0x00ff_ffff;
        let counts = if second { [low >> 12, low & 0xfff] } else { [low, 0] };
        let class = Self::Pick { node_port, legs, counts };
        if class.number() == number { Some(class) } else { None }
    }

    /// How many endpoints of a list the class chooses from.
    pub const fn count(self, list: List) -> u32 {
        match self {
            Self::Reject | Self::Drop | Self::Affinity { .. } => 0,
            Self::Pick { counts, .. } => counts[list as usize],
        }
    }

    /// Classes of an id, from the first to the last that there may be.
    pub fn of_id(id: u32) -> std::ops::RangeInclusive<Self> {
        let last = Leg::Pick { list: List::Second, masquerade: true };
        Self::Affinity { id, legs: [Leg::Drop; 3] }..=Self::Affinity { id, legs: [last; 3] }
    }

    /// The chain that does it; `None` for [`Class::Drop`], which is a verdict of its own.
    pub fn chain(self) -> Option<ChainKey> {
        match self {
            Self::Reject => Some(ChainKey::Reject),
            Self::Drop => None,
            Self::Pick { node_port, legs, counts } => {
                let plain = Leg::Pick { list: List::First, masquerade: false };
                Some(if legs == [plain; 3] {
                    ChainKey::Pick { node_port, list: List::First, count: counts[0] }
                } else {
                    ChainKey::Class(self)
                })
            }
            Self::Affinity { id, legs } => {
                let plain = |list| [Leg::Pick { list, masquerade: false }; 3];
                let list = List::ALL.into_iter().find(|list| legs == plain(*list));
                Some(list.map_or(ChainKey::Class(self), |list| ChainKey::Affinity { id, list }))
            }
        }
    }
}

/// Whether some leg chooses from `list`.
pub const fn uses(legs: [Leg; 3], list: List) -> bool {
    let mut i = 0;
    while i < 3 {
        if let Leg::Pick { list: of, .. } = legs[i]
            && of as u8 == list as u8
        {
            return true;
        }
        i += 1;
    }
    false
}

impl fmt::Display for Class {
    /// As nft prints a `classid`: `major:minor` in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = self.number();
        write!(f, "{:x}:{:x}", number >> 16, number & 0xffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn legs() -> impl Iterator<Item = Leg> + Clone {
        (0..5).map(Leg::from_code)
    }

    #[test]
    fn every_class_has_a_number_of_its_own_and_comes_back_from_it() {
        let mut seen = std::collections::BTreeMap::new();
        let mut names = std::collections::BTreeMap::new();
        let mut check = |class: Class| {
            assert_eq!(Class::from_number(class.number()), Some(class));
            assert_eq!(seen.insert(class.number(), class), None);
            if let Some(chain) = class.chain()
                && let Some(other) = names.insert(chain.to_string(), class)
            {
                panic!("{class:?} and {other:?} lead to the same chain {chain}");
            }
        };
        check(Class::Reject);
        check(Class::Drop);
        for id in [1, 0x1_ffff] {
            for code in 0..LEG_CODES {
                check(Class::Affinity { id, legs: legs_of(code) });
            }
        }
        for node_port in [false, true] {
            for a in legs() {
                for b in legs() {
                    for c in legs() {
                        let legs = [a, b, c];
                        let first = u32::from(uses(legs, List::First));
                        let second = u32::from(uses(legs, List::Second));
                        for (n, m) in [(7, 3), (4095, 4095), (10, 1)] {
                            if first + second == 0 {
                                continue;
                            }
                            check(Class::Pick { node_port, legs, counts: [n * first, m * second] });
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn foreign_numbers_are_no_class() {
        for number in [0, 1, 0x0100_0001, 0xffff_ffff, 0xfd00_0000, 0xfd00_00ff] {
            assert_eq!(Class::from_number(number), None, "{number:x}");
        }
    }
}
