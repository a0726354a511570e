//! What the eBPF programs and the agent share: the keys and values of all maps, and the lookup that
//! says what becomes of a packet. The programs compile [`lookup`] for the kernel, the mode's walker
//! compiles the same code for the host: the walk is the program.
//!
//! ```text
//!  destination, port, protocol                                                 (of one Service port)
//!        │   1. frontends[address,port,protocol]  ──hit──────────────┐
//!        │                                                           ▼
//!        └── miss ─► addresses[address] ─ node port? ─► frontends[::,port,protocol] ─► Frontend
//!                        │ no                                                  │ verdicts by class
//!                        ├─ local: none of our business                        │ of source; ranges
//!                        ├─ cluster IP: reject                                 ▼
//!                        └─ ranges[service_cidr]: drop               Group (cluster or local)
//!                                                                     base, count
//!                                                                        │ random slot
//!            maglev[group][hash] ── endpoint id ──┐                      ▼
//!            affinity[client,service] ── id ──────┤              slots[base + slot]
//!                                                 ▼                      │ endpoint id
//!                                           endpoints[id]  ◄─────────────┘
//!                                           address, port, generation, owner
//! ```
//!
//! # Maps
//!
//! Addresses of both families are written in 16 bytes, IPv4 as `::ffff:a.b.c.d`; one set of maps and
//! one lookup serve both. Addresses and ports are in network byte order, everything else in that of
//! the host. Names are those in [`map`]; sizes are the defaults of [`size`], all can be set when the
//! object is loaded.
//!
//! | map | type | key → value | written by |
//! |---|---|---|---|
//! | `config` | array, 1 | 0 → [`Config`] | agent |
//! | `frontends` | hash, 65,536 | [`FrontendKey`] → [`Frontend`] | agent |
//! | `slots` | array to be mapped, 1,048,576 | number → endpoint id (`u32`) | agent |
//! | `endpoints` | array to be mapped, 262,144 | endpoint id → [`Endpoint`] | agent |
//! | `addresses` | hash, 131,072 | [`Address`] → bits of [`address_flags`] (`u32`) | agent |
//! | `ranges` | LPM, 65,536 | prefix length, [`RangeKey`] → `u32` (1) | agent |
//! | `interfaces` | hash, 16,384 | ifindex (`u32`) → [`Interface`] | agent, as devices come and go |
//! | `names` | hash, 65,536 | service id (`u32`) → [`Name`] | agent, for itself: which Service port has which id |
//! | `maglev` | hash of arrays, 4,096 | [`Group::id`] (`u32`) → array of one [`MaglevTable`] | agent |
//! | `affinity` | LRU hash, 65,536 | [`AffinityKey`] → [`Affinity`] | programs |
//! | `sockets` | LRU hash, 131,072 | [`SocketKey`] → [`SocketRecord`] | programs (socket hooks) |
//! | `peers` | array, 131,072 | [`Peer::place`] → [`Peer`] | programs (socket hooks) |
//! | `flows` | LRU hash, 262,144 | [`FlowKey`] → [`Flow`] | programs (tc; for sockets that are bound, socket hooks) |
//! | `pairs_of_flows` | array, 256 | [`FlowFilter::place`] → [`FlowFilter`] | programs; agent, when it replaces programs |
//! | `address_filter` | array to be mapped, 16,384 | [`AddressFilter::place`] → bits (`u64`) | agent |
//! | `fragments` | LRU hash, 8,192 | [`FragmentKey`] → [`Fragment`] | programs (tc) |
//! | `service_stats` | per-CPU array, 1,024 | service id / [`SERVICE_BLOCK`] → [`ServiceBlock`] | programs |
//! | `service_bytes` | per-CPU array, 1,024 | service id / [`SERVICE_BLOCK`] → [`BytesBlock`] | programs (tc) |
//! | `endpoint_stats` | per-CPU array, 512 | endpoint id / [`ENDPOINT_BLOCK`] → [`EndpointBlock`] | programs |
//! | `events` | per-CPU array | [`Event`] → `u64` | programs |
//!
//! The mode's state is the first nine, less what the agent learns from the kernel and not from the
//! forwarding table: [`address_flags::LOCAL`], all of `interfaces`, and of [`Config`] the
//! namespace and the fallback addresses.
//!
//! # Ids
//!
//! * A *service id* stands for one port of one Service in one family (a `PortEntry`); its lowest bit
//!   is 0 for IPv4 and 1 for IPv6, so that the families allocate apart. Ids begin at
//!   [`FIRST_SERVICE_ID`] and are smaller than the size of `frontends`.
//! * An *endpoint id* stands for one endpoint of one service id, and has the same lowest bit. 0 and 1
//!   are never used: a zero in `slots` is no endpoint.
//!
//! # Writing
//!
//! A program may run between any two writes, and it may hold what it read for some time. These rules
//! make every moment safe:
//!
//! 1. `endpoints[id]` is filled before any slot names it, with a [`Endpoint::generation`] one higher
//!    than the id had before. Address, port and owner of an id never change while it has an owner.
//!    A used entry only changes its flags. The kernel copies an element bit by bit, so an entry that was used
//!    before is filled without its owner, then once more with it: whoever finds the same owner and the same
//!    generation before and after has read what belongs to these.
//! 2. A slot is one aligned `u32`: replacing an endpoint is one write of another id. The slots of a group
//!    lie side by side at `base`; growing inside its extent means filling the slot, then raising the
//!    count in each frontend; shrinking means moving the last id into the gap, then lowering the
//!    counts. A group that outgrows its extent is filled anew elsewhere, then the frontends are turned to
//!    the new base, then the old extent is free.
//! 3. An endpoint that goes leaves the slots first. While it terminates it keeps
//!    [`endpoint_flags::SERVING`]: flows that have it keep it. When it is gone the entry loses its owner
//!    and nothing else: flows that have it choose again.
//! 4. A program that finds an endpoint whose owner is not the frontend's has met a write half-way: it
//!    looks the frontend up again, then takes the first slot, then drops the packet ([`lookup::choose`]).
//! 5. Tables in `maglev` are never changed: a filled one takes the place of the old one. Without a
//!    table, or with one that leads to an endpoint of another owner, the choice is by chance.
//! 6. `addresses` has [`address_flags::CLUSTER_IP`] before a frontend of that address is removed, and
//!    ranges of a frontend are there before it asks for them.
//! 7. `address_filter` has the address of an element of `frontends` or `addresses` before the element is there.
#![no_std]
// Programs built from host bitcode cannot call functions that return aggregates: they are inlined.
#![allow(clippy::inline_always)]

pub mod address;
pub mod filter;
pub mod flow;
pub mod lookup;
pub mod maglev;
pub mod map;
pub mod service;
pub mod socket;

#[cfg(feature = "user")]
mod pod;

pub use address::Address;
pub use filter::{AddressFilter, FlowFilter};
pub use flow::{Flow, FlowKey, Fragment, FragmentKey, Tuple};
pub use map::size;
pub use service::{
    Affinity, AffinityKey, BytesBlock, Config, ENDPOINT_BLOCK, Endpoint, EndpointBlock, Event,
    FIRST_SERVICE_ID, Frontend, FrontendKey, Group, Interface, MAGLEV_SIZE, MaglevTable, Name, RangeKey,
    SERVICE_BLOCK, ServiceBlock, ServiceBytes, ServiceCounters, Verdict, address_flags, config_flags,
    endpoint_flags, frontend_flags, range_owner,
};
pub use socket::{Peer, SocketKey, SocketRecord};

/// Version of all of the above. Maps pinned by another version are not adopted but migrated.
pub const VERSION: u32 = 1;
