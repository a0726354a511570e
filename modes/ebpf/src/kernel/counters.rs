//! What the programs have counted, each processor for itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use aya::Pod;
use aya::maps::{Map, MapData, PerCpuArray, PerCpuValues};
use shunt_ebpf_abi::{
    BytesBlock, ENDPOINT_BLOCK, Endpoint, EndpointBlock, SERVICE_BLOCK, ServiceBlock, ServiceBytes,
    ServiceCounters, map,
};
use shunt_mode::CountedEndpoint;

use super::maps::{MapError, at, open};
use super::sys::{Table, open_pinned};

/// A pinned map of counters in blocks, and the block that was read last.
struct Blocks<V: Pod> {
    name: &'static str,
    array: PerCpuArray<MapData, V>,
    held: Option<(u32, PerCpuValues<V>)>,
}

impl<V: Pod> Blocks<V> {
    fn open(folder: &Path, name: &'static str) -> Result<Self, MapError> {
        let at = at(name);
        let fd = open_pinned(&folder.join(name)).map_err(&at)?;
        let data = MapData::from_fd(fd).map_err(|e| at(io::Error::other(e)))?;
        let array = PerCpuArray::try_from(Map::PerCpuArray(data)).map_err(|e| at(io::Error::other(e)))?;
        Ok(Self { name, array, held: None })
    }

    /// What each processor has in a block.
    fn read(&mut self, number: u32) -> Result<&[V], MapError> {
        let held = match self.held.take() {
            Some(held) if held.0 == number => held,
            _ => (number, self.array.get(&number, 0).map_err(|e| at(self.name)(io::Error::other(e)))?),
        };
        Ok(&self.held.insert(held).1)
    }
}

/// Sums by service id, in the order of `names`.
pub(super) fn of_services(
    folder: &Path,
    names: &BTreeMap<u32, Arc<str>>,
) -> Result<Vec<(ServiceCounters, ServiceBytes)>, MapError> {
    let mut flows = Blocks::<ServiceBlock>::open(folder, map::SERVICE_STATS)?;
    let mut bytes = Blocks::<BytesBlock>::open(folder, map::SERVICE_BYTES)?;
    let sum = |id: &u32| -> Result<_, MapError> {
        let (block, place) = (id / SERVICE_BLOCK, (id % SERVICE_BLOCK) as usize);
        let (mut counters, mut carried) = (ServiceCounters::default(), ServiceBytes::default());
        for one in flows.read(block)?.iter().filter_map(|block| block.get(place)) {
            counters.forwarded += one.forwarded;
            counters.rejected += one.rejected;
            counters.dropped += one.dropped;
        }
        for one in bytes.read(block)?.iter().filter_map(|block| block.get(place)) {
            carried.request += one.request;
            carried.response += one.response;
        }
        Ok((counters, carried))
    };
    names.keys().map(sum).collect()
}

/// New flows by endpoint. An id belongs to other endpoints in time, and its counter goes on: what counts is how much
/// has come since the last look.
#[derive(Default, Debug)]
pub(super) struct EndpointFlows {
    /// What was found last, where that was anything; nothing before the first look.
    seen: Option<BTreeMap<u32, u64>>,
}

impl EndpointFlows {
    /// Endpoints with ids of a parity that ever had a flow, by service id.
    pub(super) fn read(
        &mut self,
        folder: &Path,
        parity: u32,
    ) -> Result<BTreeMap<u32, Vec<CountedEndpoint>>, MapError> {
        let endpoints: Table<u32, Endpoint> = open(folder, map::ENDPOINTS)?;
        let mut blocks = BTreeSet::new();
        let owned = |id: u32, endpoint: &Endpoint| endpoint.service != 0 && id & 1 == parity;
        endpoints
            .read_array(|id, endpoint| {
                if owned(id, &endpoint) {
                    blocks.insert(id / ENDPOINT_BLOCK);
                }
            })
            .map_err(at(map::ENDPOINTS))?;
        let mut flows = Blocks::<EndpointBlock>::open(folder, map::ENDPOINT_STATS)?;
        if self.seen.is_none() {
            // Also those of endpoints that are no more: their ids will be used again.
            blocks.extend(0..flows.array.len());
        }
        let mut now = BTreeMap::new();
        for block in blocks {
            let mut sums = [0; ENDPOINT_BLOCK as usize];
            for counts in flows.read(block)? {
                sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            let ids = (block * ENDPOINT_BLOCK..).zip(sums);
            now.extend(ids.filter(|(id, sum)| *sum != 0 && id & 1 == parity));
        }
        let mut counted: BTreeMap<u32, Vec<CountedEndpoint>> = BTreeMap::new();
        if !now.is_empty() {
            endpoints
                .read_array(|id, endpoint| {
                    if owned(id, &endpoint)
                        && let Some(sum) = now.get(&id)
                    {
                        let address = IpAddr::from(endpoint.address);
                        let address = SocketAddr::new(address, u16::from_be(endpoint.port));
                        let flows = self
                            .seen
                            .as_ref()
                            .map_or(0, |seen| sum.saturating_sub(seen.get(&id).copied().unwrap_or_default()));
                        counted.entry(endpoint.service).or_default().push(CountedEndpoint { address, flows });
                    }
                })
                .map_err(at(map::ENDPOINTS))?;
        }
        self.seen.get_or_insert_default().extend(now);
        Ok(counted)
    }
}
