//! All maps, with their default sizes. The agent may load them with others.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, HashOfMaps, LpmTrie, LruHashMap, PerCpuArray};
use aya_ebpf::macros::btf_map;
use shunt_ebpf_abi::{
    Address, AddressFilter, Affinity, AffinityKey, BytesBlock, Config, Endpoint, EndpointBlock, Event, Flow,
    FlowFilter, FlowKey, Fragment, FragmentKey, Frontend, FrontendKey, Interface, MaglevTable, Peer,
    RangeKey, ServiceBlock, SocketKey, SocketRecord, size,
};

/// The agent reads these as memory: asked for one by one, a million elements take the kernel a third of a second.
const MAPPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map(name = "config")]
pub(crate) static CONFIG: Array<Config, 1> = Array::new();

#[btf_map(name = "frontends")]
pub(crate) static FRONTENDS: HashMap<FrontendKey, Frontend, { size::FRONTENDS as usize }> = HashMap::new();

#[btf_map(name = "slots")]
pub(crate) static SLOTS: Array<u32, { size::SLOTS as usize }, MAPPABLE> = Array::new();

#[btf_map(name = "endpoints")]
pub(crate) static ENDPOINTS: Array<Endpoint, { size::ENDPOINTS as usize }, MAPPABLE> = Array::new();

#[btf_map(name = "addresses")]
pub(crate) static ADDRESSES: HashMap<Address, u32, { size::ADDRESSES as usize }> = HashMap::new();

#[btf_map(name = "ranges")]
pub(crate) static RANGES: LpmTrie<RangeKey, u32, { size::RANGES as usize }> = LpmTrie::new();

#[btf_map(name = "interfaces")]
pub(crate) static INTERFACES: HashMap<u32, Interface, { size::INTERFACES as usize }> = HashMap::new();

#[btf_map(name = "maglev")]
pub(crate) static MAGLEV: HashOfMaps<u32, Array<MaglevTable, 1>, { size::MAGLEV as usize }> =
    HashOfMaps::new();

#[btf_map(name = "affinity")]
pub(crate) static AFFINITY: LruHashMap<AffinityKey, Affinity, { size::AFFINITY as usize }> =
    LruHashMap::new();

#[btf_map(name = "sockets")]
pub(crate) static SOCKETS: LruHashMap<SocketKey, SocketRecord, { size::SOCKETS as usize }> =
    LruHashMap::new();

#[btf_map(name = "peers")]
pub(crate) static PEERS: Array<Peer, { size::PEERS as usize }> = Array::new();

#[btf_map(name = "flows")]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow, { size::FLOWS as usize }> = LruHashMap::new();

#[btf_map(name = "pairs_of_flows")]
pub(crate) static FLOW_FILTER: Array<FlowFilter, { FlowFilter::BLOCKS as usize }> = Array::new();

#[btf_map(name = "address_filter")]
pub(crate) static ADDRESS_FILTER: Array<u64, { AddressFilter::WORDS as usize }, MAPPABLE> = Array::new();

#[btf_map(name = "fragments")]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, Fragment, { size::FRAGMENTS as usize }> =
    LruHashMap::new();

#[btf_map(name = "service_stats")]
pub(crate) static SERVICE_STATS: PerCpuArray<ServiceBlock, { size::SERVICE_STATS as usize }> =
    PerCpuArray::new();

#[btf_map(name = "service_bytes")]
pub(crate) static SERVICE_BYTES: PerCpuArray<BytesBlock, { size::SERVICE_STATS as usize }> =
    PerCpuArray::new();

#[btf_map(name = "endpoint_stats")]
pub(crate) static ENDPOINT_STATS: PerCpuArray<EndpointBlock, { size::ENDPOINT_STATS as usize }> =
    PerCpuArray::new();

#[btf_map(name = "events")]
pub(crate) static EVENTS: PerCpuArray<u64, { Event::COUNT as usize }> = PerCpuArray::new();
