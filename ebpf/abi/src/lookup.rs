//! What becomes of the first packet of a connection. Compiled into the programs and into the walker.
//!
//! ```text
//!   find ──► Frontend ──► judge(class, source) ──► Forward ──► choose ──► endpoint ──► hairpin?
//!     └────► Miss
//! ```
//!
//! Everything is inlined: programs built from host bitcode cannot return aggregates from functions.

use crate::service::{
    Endpoint, Frontend, FrontendKey, Group, address_flags, config_flags, endpoint_flags, frontend_flags,
    range_owner,
};
use crate::{Address, MAGLEV_SIZE, Tuple};

/// The maps, read one element at a time.
pub trait Tables {
    /// Whether `frontends` or `addresses` may have an element for the address.
    #[inline(always)]
    fn may_know(&self, _address: &Address) -> bool {
        true
    }
    /// An element of `frontends`.
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend>;
    /// An element of `addresses`; 0 when there is none.
    fn address(&self, address: &Address) -> u32;
    /// Whether a range of the owner contains the address.
    fn in_range(&self, owner: u32, address: &Address) -> bool;
    /// An element of `slots`.
    fn slot(&self, number: u32) -> Option<u32>;
    /// An element of `endpoints`.
    fn endpoint(&self, id: u32) -> Option<Endpoint>;
    /// An entry of a table of `maglev`, by [`Group::id`].
    fn maglev(&self, group: u32, entry: u32) -> Option<u32>;
    /// [`crate::Config::flags`].
    fn flags(&self) -> u32;
}

/// Classes of source, as indices of [`Frontend::verdicts`].
#[repr(usize)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// A local pod.
    Pod = 0,
    /// This node itself.
    Node = 1,
    /// Everything else.
    Other = 2,
}

/// What a destination is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// Served by this frontend.
    Frontend(Frontend),
    /// A cluster IP without such a port: refused.
    UnknownPort,
    /// An address of a ServiceCIDR that no Service has: dropped.
    Unallocated,
    /// None of our business.
    Nothing,
}

/// What becomes of a packet to a frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Sent to an endpoint of a group.
    Forward {
        /// The Local policy's group instead of the Cluster policy's.
        local: bool,
        /// Whether the source becomes a node address.
        masquerade: bool,
    },
    /// Refused with an error to the client.
    Reject,
    /// Silently discarded.
    Drop,
}

/// Whether an address belongs to this node.
#[inline(always)]
pub fn is_local<T: Tables>(tables: &T, address: &Address) -> bool {
    address.is_loopback() || tables.address(address) & address_flags::LOCAL != 0
}

/// The class of a source. `pod_interface`: the packet came in by an interface that only local pods use.
#[inline(always)]
pub fn class<T: Tables>(tables: &T, source: &Address, pod_interface: bool) -> Class {
    let flags = tables.flags();
    let by_range =
        if source.is_v4() { config_flags::PODS_BY_RANGE_V4 } else { config_flags::PODS_BY_RANGE_V6 };
    if flags & by_range != 0 && tables.in_range(range_owner::pods(source.is_v4()), source)
        || flags & config_flags::PODS_BY_INTERFACE != 0 && pod_interface
    {
        Class::Pod
    } else if is_local(tables, source) {
        Class::Node
    } else {
        Class::Other
    }
}

/// The frontend of a destination: its own, or else that of a node port where those answer. There is none while the
/// family is not in use: a flow that began while only some of the programs are in place would not get its answers.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, key: &FrontendKey) -> Found {
    let flags = tables.flags();
    // The unspecified addresses stand for node ports as keys; as destinations they mean loopback.
    if flags & config_flags::in_use(key.address.is_v4()) == 0 || key.address.is_unspecified() {
        return Found::Nothing;
    }
    let loopback = key.address.is_loopback();
    let mut address = 0;
    if tables.may_know(&key.address) {
        if let Some(frontend) = tables.frontend(key) {
            return Found::Frontend(frontend);
        }
        address = tables.address(&key.address);
        let all_local = if key.address.is_v4() {
            config_flags::NODE_PORTS_ALL_LOCAL_V4
        } else {
            config_flags::NODE_PORTS_ALL_LOCAL_V6
        };
        let local = flags & all_local != 0 && address & address_flags::LOCAL != 0 && !loopback;
        if (address & address_flags::NODE_PORT != 0 || local)
            && let Some(frontend) = tables.frontend(&key.node_port())
        {
            return Found::Frontend(frontend);
        }
    }
    if address & address_flags::LOCAL != 0 || loopback {
        Found::Nothing
    } else if address & address_flags::CLUSTER_IP != 0 {
        Found::UnknownPort
    } else if flags & config_flags::SERVICE_CIDRS != 0
        && tables.in_range(range_owner::service_cidr(key.address.is_v4()), &key.address)
    {
        Found::Unallocated
    } else {
        Found::Nothing
    }
}

/// Whether the frontend's source ranges let a packet from `source` to `destination` pass.
#[inline(always)]
pub fn may_pass<T: Tables>(tables: &T, frontend: &Frontend, source: &Address, destination: &Address) -> bool {
    frontend.flags & frontend_flags::SOURCE_RANGES == 0
        || frontend.flags & frontend_flags::ALLOW_OWN_SOURCE != 0 && source.same(destination)
        || tables.in_range(frontend.service, source)
}

/// The verdict of a frontend for a class of source.
#[inline(always)]
pub const fn judge(frontend: &Frontend, class: Class) -> Judgement {
    // Indexing would leave a bounds check, which programs cannot have.
    let verdict = match class {
        Class::Pod => frontend.verdicts[0],
        Class::Node => frontend.verdicts[1],
        Class::Other => frontend.verdicts[2],
    };
    if verdict.is_forward() {
        Judgement::Forward { local: verdict.is_local(), masquerade: verdict.masquerades() }
    } else if verdict.0 == crate::Verdict::REJECT.0 {
        Judgement::Reject
    } else {
        Judgement::Drop
    }
}

/// Whether new flows of a service id may go to this endpoint under a policy.
#[inline(always)]
pub const fn is_member(endpoint: &Endpoint, service: u32, local: bool) -> bool {
    let group = if local { endpoint_flags::LOCAL } else { endpoint_flags::CLUSTER };
    endpoint.service == service && endpoint.flags & group != 0
}

/// The endpoint with an id, if new flows of the service id may go there under the policy.
#[inline(always)]
pub fn member<T: Tables>(tables: &T, service: u32, local: bool, id: u32) -> Option<Endpoint> {
    let endpoint = tables.endpoint(id)?;
    if is_member(&endpoint, service, local) { Some(endpoint) } else { None }
}

/// The endpoint in a slot of a group, with its id; `None` when there is none or the frontend is being
/// changed.
#[inline(always)]
pub fn in_slot<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    local: bool,
    slot: u32,
) -> Option<(u32, Endpoint)> {
    let id = tables.slot(frontend.group(local).base.wrapping_add(slot))?;
    Some((id, member(tables, frontend.service, local, id)?))
}

/// An endpoint by chance. `random` is uniform over all `u32`. When the frontend is met half-way through
/// a change, it is looked up again; then the first slot counts, which is there as long as there is an
/// endpoint.
#[inline(always)]
pub fn choose<T: Tables>(
    tables: &T,
    key: &FrontendKey,
    frontend: &Frontend,
    local: bool,
    random: u32,
) -> Option<(u32, Endpoint)> {
    if let Some(found) = in_slot(tables, frontend, local, scale(random, frontend.group(local).count)) {
        return Some(found);
    }
    let Found::Frontend(again) = find(tables, key) else { return None };
    let found = in_slot(tables, &again, local, scale(random, again.group(local).count));
    if found.is_some() { found } else { in_slot(tables, &again, local, 0) }
}

/// The endpoint in an entry of a group's Maglev table; `None` when there is no table, or its endpoint is
/// gone.
#[inline(always)]
pub fn hashed<T: Tables>(
    tables: &T,
    frontend: &Frontend,
    local: bool,
    entry: u32,
) -> Option<(u32, Endpoint)> {
    if frontend.flags & frontend_flags::MAGLEV == 0 {
        return None;
    }
    let id = tables.maglev(Group::id(frontend.service, local), entry)?;
    Some((id, member(tables, frontend.service, local, id)?))
}

/// A number below `count` (0 for 0), uniform if `random` is.
#[inline(always)]
pub const fn scale(random: u32, count: u32) -> u32 {
    ((random as u64 * count as u64) >> 32) as u32
}

/// An endpoint of this node that reaches itself must see another source, or it answers itself directly.
#[inline(always)]
pub const fn hairpin(source: &Address, endpoint: &Endpoint) -> bool {
    endpoint.flags & endpoint_flags::HERE != 0 && source.same(&endpoint.address)
}

/// Whether what was remembered of an endpoint still holds: it belongs to the Service and serves.
#[inline(always)]
pub const fn is_serving(endpoint: &Endpoint, service: u32, generation: u32) -> bool {
    endpoint.service == service
        && endpoint.generation == generation
        && endpoint.flags & endpoint_flags::SERVING != 0
}

/// Where a flow falls in a Maglev table: the same on every node with the same seed.
#[inline(always)]
pub const fn maglev_entry(seed: u32, tuple: &Tuple, protocol: u8) -> u32 {
    let mut hash = seed ^ protocol as u32;
    hash = mix(hash, tuple.source.0[0]);
    hash = mix(hash, tuple.source.0[1]);
    hash = mix(hash, tuple.source.0[2]);
    hash = mix(hash, tuple.source.0[3]);
    hash = mix(hash, tuple.destination.0[0]);
    hash = mix(hash, tuple.destination.0[1]);
    hash = mix(hash, tuple.destination.0[2]);
    hash = mix(hash, tuple.destination.0[3]);
    hash = mix(hash, (tuple.source_port as u32) << 16 | tuple.destination_port as u32);
    // Not by remainder: the verifier follows this one.
    scale(finish(hash), MAGLEV_SIZE as u32)
}

/// One round of `MurmurHash3_x86_32`.
#[inline(always)]
pub(crate) const fn mix(hash: u32, word: u32) -> u32 {
    let word = word.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
    (hash ^ word).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64)
}

/// The finalizer of `MurmurHash3_x86_32`.
#[inline(always)]
pub(crate) const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}
