//! Consistent hashing after Maglev (Eisenbud et al., NSDI 2016): every node with the same endpoints and
//! seed makes the same table, and a changed endpoint moves few flows of the others.

use crate::lookup::{finish, mix};
use crate::{Address, MAGLEV_SIZE, MaglevTable};

/// An endpoint that takes part, and how far it has come in its permutation of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    id: u32,
    next: u32,
    skip: u32,
}

impl Member {
    /// The endpoint with this id, address and port (network byte order).
    pub const fn new(seed: u32, id: u32, address: &Address, port: u16) -> Self {
        let size = MAGLEV_SIZE as u32;
        let next = hash(seed, address, port) % size;
        let skip = hash(!seed, address, port) % (size - 1) + 1;
        Self { id, next, skip }
    }

    /// Its id.
    pub const fn id(&self) -> u32 {
        self.id
    }
}

const fn hash(seed: u32, address: &Address, port: u16) -> u32 {
    let mut hash = mix(seed, address.0[0]);
    hash = mix(hash, address.0[1]);
    hash = mix(hash, address.0[2]);
    hash = mix(hash, address.0[3]);
    finish(mix(hash, port as u32))
}

/// Fills a table. Members must come in an order that is the same everywhere: by address and port.
/// Without members the table is all 0, which is no endpoint.
pub fn fill(members: &mut [Member], table: &mut MaglevTable) {
    table.fill(0);
    if members.is_empty() {
        return;
    }
    let mut left = table.len();
    loop {
        for member in &mut *members {
            // The table is not full and its size is prime, so the permutation meets a free entry.
            while let Some(entry) = table.get_mut(member.next as usize) {
                member.next = (member.next + member.skip) % MAGLEV_SIZE as u32;
                if *entry == 0 {
                    *entry = member.id;
                    break;
                }
            }
            left -= 1;
            if left == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::boxed::Box;
    use std::vec;
    use std::vec::Vec;

    fn table(ids: impl IntoIterator<Item = u32>) -> Box<MaglevTable> {
        let mut members: Vec<Member> =
            ids.into_iter().map(|i| Member::new(7, i, &Address::v4((0x0a00_0000 + i).to_be()), 80)).collect();
        let mut table: Box<MaglevTable> =
            vec![0; MAGLEV_SIZE].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!());
        fill(&mut members, &mut table);
        table
    }

    #[test]
    fn shares_are_even_and_a_missing_endpoint_moves_little_else() {
        let full = table(2..102);
        let mut shares = [0_usize; 102];
        for id in *full {
            shares[id as usize] += 1;
        }
        let (least, most) = (shares[2..].iter().min(), shares[2..].iter().max());
        assert!(least >= Some(&162) && most <= Some(&166), "{least:?} to {most:?} of {MAGLEV_SIZE} for 100");
        let less = table((2..102).filter(|i| *i != 50));
        let moved = full.iter().zip(less.iter()).filter(|(a, b)| **a != 50 && a != b).count();
        assert!(moved * 1000 < MAGLEV_SIZE * 25, "{moved} of {MAGLEV_SIZE} entries of other endpoints moved");
    }

    #[test]
    fn none_and_one() {
        assert!(table([]).iter().all(|id| *id == 0));
        assert!(table([9]).iter().all(|id| *id == 9));
    }
}
