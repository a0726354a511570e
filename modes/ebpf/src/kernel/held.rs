//! What is pinned: whose layout it has, and how large it is.

use std::io;
use std::path::Path;

use aya::maps::MapData;
use shunt_ebpf_abi::{
    Address, Affinity, AffinityKey, BytesBlock, Config, Endpoint, EndpointBlock, Flow, FlowFilter, FlowKey,
    Fragment, FragmentKey, Frontend, FrontendKey, Interface, Name, Peer, ServiceBlock, SocketKey,
    SocketRecord, VERSION, map,
};

use super::maps::{MapError, at, object_of};
use super::sys::{self, Prefix};
use crate::sizes::{Limits, MapSizes};

const fn layout<K, V>(name: &'static str) -> (&'static str, usize, usize) {
    (name, size_of::<K>(), size_of::<V>())
}

/// Bytes of keys and values.
const LAYOUT: [(&str, usize, usize); 20] = [
    layout::<u32, Config>(map::CONFIG),
    layout::<FrontendKey, Frontend>(map::FRONTENDS),
    layout::<u32, u32>(map::SLOTS),
    layout::<u32, Endpoint>(map::ENDPOINTS),
    layout::<Address, u32>(map::ADDRESSES),
    layout::<Prefix, u32>(map::RANGES),
    layout::<u32, Interface>(map::INTERFACES),
    layout::<u32, Name>(map::NAMES),
    layout::<u32, u32>(map::MAGLEV),
    layout::<AffinityKey, Affinity>(map::AFFINITY),
    layout::<SocketKey, SocketRecord>(map::SOCKETS),
    layout::<u32, Peer>(map::PEERS),
    layout::<FlowKey, Flow>(map::FLOWS),
    layout::<u32, FlowFilter>(map::FLOW_FILTER),
    layout::<u32, u64>(map::ADDRESS_FILTER),
    layout::<FragmentKey, Fragment>(map::FRAGMENTS),
    layout::<u32, ServiceBlock>(map::SERVICE_STATS),
    layout::<u32, BytesBlock>(map::SERVICE_BYTES),
    layout::<u32, EndpointBlock>(map::ENDPOINT_STATS),
    layout::<u32, u64>(map::EVENTS),
];

/// Names of all maps.
pub(super) fn all_maps() -> impl Iterator<Item = &'static str> {
    LAYOUT.iter().map(|(name, ..)| *name)
}

/// The maps that are pinned in a folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Held {
    /// Sizes of those that are there.
    pub(super) sizes: MapSizes,
    /// What the programs were loaded from, once they are attached.
    pub(super) object: Option<String>,
    /// Why nothing of it can be read: another layout.
    pub(super) foreign: Option<String>,
}

impl Held {
    /// Looks at what is pinned; `None` where there are no maps.
    pub(super) fn look(folder: &Path) -> Result<Option<Self>, MapError> {
        let mut held = Self { sizes: MapSizes::new(), object: None, foreign: None };
        for (name, key, value) in LAYOUT {
            let fd = match sys::open_pinned(&folder.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(at(name))?,
            };
            let data = MapData::from_fd(fd).map_err(|e| at(name)(io::Error::other(e)))?;
            let info = data.info().map_err(|e| at(name)(io::Error::other(e)))?;
            held.sizes.insert(name, info.max_entries());
            let bytes = (info.key_size() as usize, info.value_size() as usize);
            if bytes != (key, value) {
                let (k, v) = bytes;
                let why = format!("elements of map {name} have {k}+{v} bytes, not {key}+{value}");
                held.foreign.get_or_insert(why);
            }
        }
        if held.sizes.is_empty() {
            return Ok(None);
        }
        if held.sizes.contains_key(map::NAMES) {
            // An agent of any version says there which one it is.
            held.object = object_of(folder).unwrap_or_default();
        }
        let version = held.object.as_deref().and_then(version_of);
        if let Some(version) = version.filter(|version| *version != VERSION) {
            held.foreign.get_or_insert(format!("the maps have layout version {version}"));
        }
        Ok(Some(held))
    }

    /// The limits that the sizes follow from; `None` where a map is missing.
    pub(super) fn limits(&self) -> Option<Limits> {
        let of = |name| self.sizes.get(name).copied();
        Some(Limits {
            frontends: of(map::FRONTENDS)?,
            endpoints: of(map::ENDPOINTS)?,
            flows: of(map::FLOWS)?,
            clients: of(map::AFFINITY)?,
            maglev: of(map::MAGLEV)?,
        })
    }
}

/// What says from what the programs were loaded, with the version of the maps' layout.
pub(super) fn object_name(object: &[u8]) -> String {
    let hash = object.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("version {VERSION} object {hash:016x}")
}

fn version_of(object: &str) -> Option<u32> {
    object.strip_prefix("version ")?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_names_its_version() {
        assert_eq!(version_of(&object_name(b"")), Some(VERSION));
        assert_eq!(version_of("version 77 object 0"), Some(77));
        assert_eq!(version_of("nonsense"), None);
    }
}
