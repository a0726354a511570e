//! The filters in front of the connection table and of frontends.

use std::io;
use std::path::Path;

use aya::maps::{Array, Map, MapData};
use shunt_ebpf_abi::{Address, AddressFilter, FlowFilter, Frontend, FrontendKey, map};

use super::maps::{MapError, at, now, open};
use super::sys::Table;

/// Makes every packet be looked up in the connection table until `timeout` seconds from now: others than our own
/// programs may have written flows down, and have not told the filter.
pub(super) fn fill(folder: &Path, timeout: u32) -> Result<(), MapError> {
    let at = at(map::FLOW_FILTER);
    let fd = super::sys::open_pinned(&folder.join(map::FLOW_FILTER)).map_err(&at)?;
    let data = MapData::from_fd(fd).map_err(|e| at(io::Error::other(e)))?;
    let array = Array::<MapData, FlowFilter>::try_from(Map::Array(data));
    let mut array = array.map_err(|e| at(io::Error::other(e)))?;
    let until = FlowFilter::until(now().map_err(&at)?, timeout);
    let filled = FlowFilter::filled(until);
    (0..array.len()).try_for_each(|block| array.set(block, filled, 0)).map_err(|e| at(io::Error::other(e)))
}

/// The filter of addresses, unless the programs that are there do without.
pub(super) fn of_addresses(folder: &Path) -> Result<Option<Table<u32, u64>>, MapError> {
    match open(folder, map::ADDRESS_FILTER) {
        Err(error) if error.is_missing() => Ok(None),
        opened => opened.map(Some),
    }
}

/// Lets addresses pass the filter. To be done before something is written for them.
pub(super) fn add<'a>(
    filter: Option<&Table<u32, u64>>,
    addresses: impl Iterator<Item = &'a Address>,
) -> Result<(), MapError> {
    let Some(filter) = filter else { return Ok(()) };
    filter.set_bits(addresses.map(AddressFilter::place)).map_err(at(map::ADDRESS_FILTER))
}

/// Lets all addresses pass that something is written for: who wrote it may not have known the filter.
pub(super) fn add_all(folder: &Path) -> Result<(), MapError> {
    let mut addresses = Vec::new();
    let frontends: Table<FrontendKey, Frontend> = open(folder, map::FRONTENDS)?;
    frontends.read(|key, _| addresses.push(key.address)).map_err(at(map::FRONTENDS))?;
    let known: Table<Address, u32> = open(folder, map::ADDRESSES)?;
    known.read(|address, _| addresses.push(address)).map_err(at(map::ADDRESSES))?;
    add(of_addresses(folder)?.as_ref(), addresses.iter())
}
