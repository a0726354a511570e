//! How large the maps are: what the settings say, what is held, and what may become of what is held. Pure.

use std::collections::{BTreeMap, BTreeSet};

use shunt_ebpf_abi::{ENDPOINT_BLOCK, Frontend, Group, SERVICE_BLOCK, map};

use crate::slots::extent;
use crate::state::Sizes;

/// Sizes of maps by name.
pub type MapSizes = BTreeMap<&'static str, u32>;

/// What the settings limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Most frontends, and service ids.
    pub frontends: u32,
    /// Most endpoints.
    pub endpoints: u32,
    /// Most entries of the connection table of tc; that of sockets has half as many.
    pub flows: u32,
    /// Most clients with session affinity.
    pub clients: u32,
    /// Most groups of endpoints that are chosen by hash.
    pub maglev: u32,
}

impl Limits {
    /// Sizes of the maps that follow.
    pub fn maps(&self) -> MapSizes {
        BTreeMap::from([
            (map::FRONTENDS, self.frontends),
            (map::NAMES, self.frontends),
            (map::SERVICE_STATS, self.frontends.div_ceil(SERVICE_BLOCK)),
            (map::SERVICE_BYTES, self.frontends.div_ceil(SERVICE_BLOCK)),
            (map::ENDPOINTS, self.endpoints),
            (map::ENDPOINT_STATS, self.endpoints.div_ceil(ENDPOINT_BLOCK)),
            // Two groups of each endpoint, in extents of which half may be unused.
            (map::SLOTS, self.endpoints.saturating_mul(4)),
            (map::ADDRESSES, self.frontends.saturating_mul(2)),
            (map::FLOWS, self.flows),
            (map::SOCKETS, (self.flows / 2).max(2)),
            (map::AFFINITY, self.clients),
            (map::MAGLEV, self.maglev),
        ])
    }

    /// Names of the maps whose sizes differ under other limits.
    pub fn differing(&self, other: &Self) -> BTreeSet<&'static str> {
        let other = other.maps();
        let differs = |(name, size): (&'static str, u32)| (other.get(name) != Some(&size)).then_some(name);
        self.maps().into_iter().filter_map(differs).collect()
    }

    /// Room for one family in maps of these limits, where it has so much room in maps of others.
    pub fn room(&self, held: &Self, of: &Sizes) -> Sizes {
        // What is taken by others stays so.
        let rest = |of: u32, held: u32, now: u32| now.saturating_sub(held.saturating_sub(of));
        Sizes {
            frontends: rest(of.frontends, held.frontends, self.frontends),
            services: self.frontends,
            endpoints: self.endpoints,
            slots: self.endpoints.saturating_mul(4),
            maglev: rest(of.maglev, held.maglev, self.maglev),
            addresses: rest(of.addresses, held.frontends.saturating_mul(2), self.frontends.saturating_mul(2)),
            ranges: of.ranges,
        }
    }

    /// Room for a family in maps that nobody uses.
    pub fn all_room(&self) -> Sizes {
        let of = Limits { frontends: 0, maglev: 0, ..*self };
        let nothing = Sizes { frontends: 0, maglev: 0, addresses: 0, ..Sizes::default() };
        self.room(&of, &nothing)
    }

    /// These limits as far as what is there fits into them: where it does not, the maps keep the size that they have, and
    /// the text says so. `needed` is the least that there must be room for.
    pub fn fitting(&self, held: &Self, needed: &Self) -> (Self, Vec<String>) {
        let mut problems = Vec::new();
        let mut fit = |wanted: u32, held: u32, needed: u32, flag: &str, field: &str| {
            if wanted >= needed || wanted >= held {
                return wanted;
            }
            problems.push(format!(
                "--{flag} (ebpf.{field}) is {wanted}, but what is there needs {needed}: the maps keep room for {held}"
            ));
            held
        };
        let fitting = Self {
            frontends: fit(
                self.frontends,
                held.frontends,
                needed.frontends,
                "ebpf-frontends-max",
                "frontendsMax",
            ),
            endpoints: fit(
                self.endpoints,
                held.endpoints,
                needed.endpoints,
                "ebpf-endpoints-max",
                "endpointsMax",
            ),
            maglev: fit(self.maglev, held.maglev, needed.maglev, "ebpf-maglev-max", "maglevMax"),
            // What is least recently used goes.
            flows: self.flows,
            clients: self.clients,
        };
        (fitting, problems)
    }
}

/// What the maps hold, as far as it says how large they must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extent {
    /// Frontends of both families.
    pub frontends: u32,
    /// The number after the highest service id.
    pub services: u32,
    /// Addresses of which something is known.
    pub addresses: u32,
    /// The number after the highest endpoint id that has an owner.
    pub endpoints: u32,
    /// Slots of the family that reaches farther into its half.
    pub slots: u32,
    /// Maglev tables.
    pub tables: u32,
}

impl Extent {
    /// Takes in a group of endpoints, in maps with so many slots.
    pub fn group(&mut self, group: Group, slots: u32) {
        let half = slots / 2;
        let end = extent(group).end;
        if group.count > 0 {
            self.slots = self.slots.max(if group.base < half { end } else { end.saturating_sub(half) });
        }
    }

    /// The least limits under which everything fits.
    pub fn needed(&self) -> Limits {
        Limits {
            frontends: self.frontends.max(self.services).max(self.addresses.div_ceil(2)),
            // A family's half are two slots an endpoint.
            endpoints: self.endpoints.max(self.slots.div_ceil(2)),
            flows: 0,
            clients: 0,
            maglev: self.tables,
        }
    }
}

/// Where a slot is in maps of `to` slots that was in maps of `from` slots: IPv6 has the second half.
pub const fn moved_slot(slot: u32, from: u32, to: u32) -> u32 {
    let (from, to) = (from / 2, to / 2);
    if slot < from { slot } else { slot - from + to }
}

/// The same for a frontend's groups.
pub const fn moved_frontend(frontend: &Frontend, from: u32, to: u32) -> Frontend {
    const fn moved(group: Group, from: u32, to: u32) -> Group {
        if group.count == 0 {
            return group;
        }
        Group { base: moved_slot(group.base, from, to), count: group.count }
    }
    Frontend {
        cluster: moved(frontend.cluster, from, to),
        local: moved(frontend.local, from, to),
        ..*frontend
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { frontends: 64, endpoints: 256, flows: 1024, clients: 64, maglev: 8 };

    #[test]
    fn what_does_not_fit_is_named_with_flag_and_numbers() {
        let wanted = Limits { frontends: 32, endpoints: 100, flows: 64, clients: 32, maglev: 8 };
        let needed = Limits { frontends: 32, endpoints: 101, ..Limits::default() };
        let (fitting, problems) = wanted.fitting(&LIMITS, &needed);
        assert_eq!(fitting, Limits { endpoints: 256, ..wanted });
        let text = "--ebpf-endpoints-max (ebpf.endpointsMax) is 100, but what is there needs 101: the maps keep room for 256";
        assert_eq!(problems, [text]);
        // More than there was may be too little as well: what there is room for is served.
        let (fitting, problems) = wanted.fitting(&Limits { endpoints: 50, ..LIMITS }, &needed);
        assert_eq!((fitting, problems), (wanted, Vec::new()));
    }

    #[test]
    fn limits_say_which_maps_are_made_anew() {
        let differing = |other: Limits| LIMITS.differing(&other).into_iter().collect::<Vec<_>>();
        assert!(differing(LIMITS).is_empty());
        assert_eq!(differing(Limits { flows: 2048, ..LIMITS }), [map::FLOWS, map::SOCKETS]);
        assert_eq!(
            differing(Limits { endpoints: 1024, ..LIMITS }),
            [map::ENDPOINT_STATS, map::ENDPOINTS, map::SLOTS]
        );
    }

    #[test]
    fn extents_of_both_halves_say_what_is_needed() {
        let mut held =
            Extent { frontends: 3, services: 20, addresses: 50, endpoints: 7, slots: 0, tables: 2 };
        held.group(Group { base: 8, count: 5 }, 1000);
        held.group(Group { base: 500 + 16, count: 9 }, 1000);
        held.group(Group { base: 900, count: 0 }, 1000);
        assert_eq!(held.slots, 32);
        let needed = Limits { frontends: 25, endpoints: 16, flows: 0, clients: 0, maglev: 2 };
        assert_eq!(held.needed(), needed);
    }

    #[test]
    fn the_second_half_moves() {
        assert_eq!([0, 99, 100, 130].map(|slot| moved_slot(slot, 200, 600)), [0, 99, 300, 330]);
        assert_eq!([300, 330].map(|slot| moved_slot(slot, 600, 200)), [100, 130]);
        let frontend = Frontend {
            cluster: Group { base: 100, count: 2 },
            local: Group { base: 100, count: 0 },
            ..Frontend::default()
        };
        let moved = moved_frontend(&frontend, 200, 600);
        assert_eq!((moved.cluster.base, moved.local.base), (300, 100));
    }
}
