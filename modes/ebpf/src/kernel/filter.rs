//! The filter in front of the connection table.

use std::io;
use std::path::Path;

use aya::maps::{Array, Map, MapData};
use shunt_ebpf_abi::{FlowFilter, map};

use super::maps::{MapError, at, now};

/// Makes every packet be looked up in the connection table until `timeout` seconds from now: others than our own
/// programs may have written flows down, and have not told the filter.
pub(super) fn fill(folder: &Path, timeout: u32) -> Result<(), MapError> {
    let at = at(map::FLOW_FILTER);
    let fd = super::sys::open_pinned(&folder.join(map::FLOW_FILTER)).map_err(&at)?;
    let data = MapData::from_fd(fd).map_err(|e| at(io::Error::other(e)))?;
    let array = Array::<MapData, FlowFilter>::try_from(Map::Array(data));
    let mut array = array.map_err(|e| at(io::Error::other(e)))?;
    let until = FlowFilter::until(now().map_err(&at)?, timeout);
    array.set(0, FlowFilter::filled(until), 0).map_err(|e| at(io::Error::other(e)))
}
