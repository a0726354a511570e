//! The pinned maps: what they hold as a [`State`], and operations on them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use aya::maps::MapData;
use ipnet::IpNet;
use shunt_core::id::IpFamily;
use shunt_ebpf_abi::{
    Address, Affinity, AffinityKey, Config, Endpoint, FIRST_SERVICE_ID, Frontend, FrontendKey, Interface,
    Name, RangeKey, address_flags, map,
};

use super::filter;
use super::sweep::Sweeper;
use super::sys::{BATCH, Prefix, Table};
use crate::op::Op;
use crate::sizes::Extent;
use crate::state::{FamilyFlags, Sizes, State, parity};

/// Number under which `names` holds what the programs were loaded from.
pub(super) const OBJECT: u32 = 0;

/// Number under which `names` holds by which interface local pods are known.
const fn pods_number(family: IpFamily) -> u32 {
    match family {
        IpFamily::V4 => 2,
        IpFamily::V6 => 3,
    }
}

/// The maps that the agent writes.
#[derive(Debug)]
pub(super) struct Maps {
    config: Table<u32, Config>,
    frontends: Table<FrontendKey, Frontend>,
    slots: Table<u32, u32>,
    endpoints: Table<u32, Endpoint>,
    addresses: Table<Address, u32>,
    ranges: Table<Prefix, u32>,
    interfaces: Table<u32, Interface>,
    names: Table<u32, Name>,
    pub(super) maglev: Table<u32, u32>,
    /// Of addresses, where the programs have one.
    filter: Option<Table<u32, u64>>,
    /// Where the tables of `maglev` are pinned.
    pub(super) tables: PathBuf,
    /// Local addresses that `addresses` knows.
    local: BTreeSet<Address>,
    /// Where they are pinned, and when something there became another one.
    folder: PathBuf,
    changed: Option<SystemTime>,
    /// Once somebody has asked for it.
    sweeper: Option<Sweeper>,
}

fn changed(folder: &Path) -> Option<SystemTime> {
    std::fs::metadata(folder).and_then(|folder| folder.modified()).ok()
}

/// What went wrong with which map.
#[derive(Debug, thiserror::Error)]
#[error("map {map}: {source}")]
pub(super) struct MapError {
    map: &'static str,
    source: io::Error,
}

impl MapError {
    /// Whether there is no room for another element.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }

    /// Whether the map is not there.
    pub(super) fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

pub(super) fn at(map: &'static str) -> impl Fn(io::Error) -> MapError {
    move |source| MapError { map, source }
}

pub(super) fn open<K: aya::Pod + Default, V: aya::Pod + Default>(
    folder: &Path,
    name: &'static str,
) -> Result<Table<K, V>, MapError> {
    let fd = super::sys::open_pinned(&folder.join(name)).map_err(at(name))?;
    let data = MapData::from_fd(fd).map_err(|e| at(name)(io::Error::other(e)))?;
    Table::new(data).map_err(at(name))
}

/// What the programs were loaded from, by the maps pinned in a folder.
pub(super) fn object_of(folder: &Path) -> Result<Option<String>, MapError> {
    let names: Table<u32, Name> = open(folder, map::NAMES)?;
    let name = names.get(&OBJECT).map_err(at(map::NAMES))?;
    Ok(name.map(|name| name_text(&name).to_string()))
}

/// Makes the map that the object does not have, unless it is pinned already.
pub(super) fn pin_names(path: &Path, size: u32) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    let names = aya::maps::HashMap::<MapData, u32, Name>::create(size, 1 /* BPF_F_NO_PREALLOC */)
        .map_err(io::Error::other)?;
    names.pin(path).map_err(io::Error::other)
}

impl Maps {
    /// Opens the maps pinned in a folder.
    pub(super) fn open(folder: &Path) -> Result<Self, MapError> {
        let changed = changed(folder);
        let mut maps = Self {
            config: open(folder, map::CONFIG)?,
            frontends: open(folder, map::FRONTENDS)?,
            slots: open(folder, map::SLOTS)?,
            endpoints: open(folder, map::ENDPOINTS)?,
            addresses: open(folder, map::ADDRESSES)?,
            ranges: open(folder, map::RANGES)?,
            interfaces: open(folder, map::INTERFACES)?,
            names: open(folder, map::NAMES)?,
            maglev: open(folder, map::MAGLEV)?,
            filter: filter::of_addresses(folder)?,
            tables: folder.with_file_name(super::pins::TABLES),
            local: BTreeSet::new(),
            folder: folder.to_owned(),
            changed,
            sweeper: None,
        };
        maps.read_local(|_, _| {})?;
        Ok(maps)
    }

    /// Whether other maps may be pinned by now.
    pub(super) fn is_stale(&self) -> bool {
        self.changed.is_none() || changed(&self.folder) != self.changed
    }

    /// What goes through the table of flows.
    pub(super) fn sweeper(&mut self) -> Result<&mut Sweeper, MapError> {
        let sweeper = match self.sweeper.take() {
            Some(sweeper) => sweeper,
            None => Sweeper::new(&self.folder)?,
        };
        Ok(self.sweeper.insert(sweeper))
    }

    /// Reads what is known of addresses, and remembers which are the node's.
    fn read_local(&mut self, mut each: impl FnMut(Address, u32)) -> Result<(), MapError> {
        let mut local = BTreeSet::new();
        self.addresses
            .read(|address, flags| {
                if flags & address_flags::LOCAL != 0 {
                    local.insert(address);
                }
                each(address, flags);
            })
            .map_err(at(map::ADDRESSES))?;
        self.local = local;
        Ok(())
    }

    /// What the programs were loaded from.
    pub(super) fn object(&self) -> Result<Option<String>, MapError> {
        let name = self.names.get(&OBJECT).map_err(at(map::NAMES))?;
        Ok(name.map(|name| name_text(&name).to_string()))
    }

    /// Forgets what the programs were loaded from: whoever starts next loads them.
    pub(super) fn forget_object(&self) -> Result<(), MapError> {
        self.names.remove(&OBJECT).map_err(at(map::NAMES))
    }

    /// How much the maps hold of both families.
    pub(super) fn extent(&self) -> Result<Extent, MapError> {
        let mut held = Extent::default();
        let slots = self.slots.size().map_err(at(map::SLOTS))?;
        let count = |entries: &mut u32| *entries = entries.saturating_add(1);
        self.frontends
            .read(|_, frontend| {
                count(&mut held.frontends);
                held.services = held.services.max(frontend.service.saturating_add(1));
                held.group(frontend.cluster, slots);
                held.group(frontend.local, slots);
            })
            .map_err(at(map::FRONTENDS))?;
        let names = self.names.read(|id, _| held.services = held.services.max(id.saturating_add(1)));
        names.map_err(at(map::NAMES))?;
        self.endpoints
            .read_array(|id, endpoint| {
                if endpoint.service != 0 {
                    held.endpoints = id + 1;
                }
            })
            .map_err(at(map::ENDPOINTS))?;
        self.addresses.read(|_, _| count(&mut held.addresses)).map_err(at(map::ADDRESSES))?;
        self.maglev.read(|_, _| count(&mut held.tables)).map_err(at(map::MAGLEV))?;
        Ok(held)
    }

    /// Remembers what the programs were loaded from.
    pub(super) fn set_object(&self, object: &str) -> Result<(), MapError> {
        self.names.update(&[OBJECT], &[name_value(object)]).map_err(at(map::NAMES))
    }

    /// Names of Service ports of both families.
    pub(super) fn names(&self) -> Result<BTreeMap<u32, Arc<str>>, MapError> {
        let mut names = BTreeMap::new();
        self.names
            .read(|number, name| {
                if number >= FIRST_SERVICE_ID {
                    names.insert(number, name_text(&name));
                }
            })
            .map_err(at(map::NAMES))?;
        Ok(names)
    }

    /// Frontends of a family by service id, where there is session affinity.
    fn with_affinity(&self, family: IpFamily) -> Result<BTreeMap<u32, Frontend>, MapError> {
        let mut found = BTreeMap::new();
        self.frontends
            .read(|_, frontend| {
                if frontend.affinity != 0 && frontend.service & 1 == parity(family) {
                    found.insert(frontend.service, frontend);
                }
            })
            .map_err(at(map::FRONTENDS))?;
        Ok(found)
    }

    /// How many clients of a family are remembered whose time is not over.
    pub(super) fn affinity_clients(&self, folder: &Path, family: IpFamily) -> Result<usize, MapError> {
        let frontends = self.with_affinity(family)?;
        let records: Table<AffinityKey, Affinity> = open(folder, map::AFFINITY)?;
        let (now, mut clients) = (now().map_err(at(map::AFFINITY))?, 0);
        records
            .read(|key, record| {
                let timeout =
                    frontends.get(&key.service).map_or(0, |f| u64::from(f.affinity) * 1_000_000_000);
                clients += usize::from(now.saturating_sub(record.last_used) < timeout);
            })
            .map_err(at(map::AFFINITY))?;
        Ok(clients)
    }

    /// Remembers clients for the first Service port with session affinity, with its first endpoint.
    #[cfg(feature = "testkit")]
    pub(super) fn remember_clients(
        &self,
        folder: &Path,
        family: IpFamily,
        clients: &[IpAddr],
    ) -> Result<(), MapError> {
        let records: Table<AffinityKey, Affinity> = open(folder, map::AFFINITY)?;
        let service = self.with_affinity(family)?.keys().next().copied().unwrap_or_default();
        let key = |client: &IpAddr| AffinityKey { client: (*client).into(), netns: 0, service, reserved: 0 };
        let keys: Vec<AffinityKey> = clients.iter().map(key).collect();
        let last_used = now().map_err(at(map::AFFINITY))?;
        let record = Affinity { last_used, endpoint: 2 + parity(family), generation: 1 };
        records.update(&keys, &vec![record; keys.len()]).map_err(at(map::AFFINITY))
    }

    /// The settings.
    pub(super) fn config(&self) -> Result<Config, MapError> {
        let mut config = Config::DEFAULT;
        self.config.read(|_, value| config = value).map_err(at(map::CONFIG))?;
        Ok(config)
    }

    /// Changes the settings.
    pub(super) fn edit_config(&self, edit: impl FnOnce(&mut Config)) -> Result<(), MapError> {
        let before = self.config()?;
        let mut config = before;
        edit(&mut config);
        if config == before { Ok(()) } else { self.config.update(&[0], &[config]).map_err(at(map::CONFIG)) }
    }

    /// Whether new flows of the family are served.
    pub(super) fn in_use(&self, family: IpFamily) -> Result<bool, MapError> {
        Ok(self.config()?.flags & FamilyFlags::of(family).in_use != 0)
    }

    /// Whether new flows of any family are served.
    pub(super) fn are_in_use(&self) -> Result<bool, MapError> {
        Ok(self.in_use(IpFamily::V4)? || self.in_use(IpFamily::V6)?)
    }

    /// What the maps hold for a family. `installed` is left to the caller.
    pub(super) fn observe(&mut self, family: IpFamily) -> Result<State, MapError> {
        let mut state = State::empty(family);
        let mut others = 0_u32;
        let mut frontends = Vec::new();
        self.frontends
            .read(|key, frontend| {
                if state.owns_address(&key.address) {
                    frontends.push((key, frontend));
                } else {
                    others += 1;
                }
            })
            .map_err(at(map::FRONTENDS))?;
        let frontends_size = self.frontends.size().map_err(at(map::FRONTENDS))?;
        state.sizes = Sizes {
            frontends: frontends_size.saturating_sub(others),
            services: frontends_size,
            endpoints: self.endpoints.size().map_err(at(map::ENDPOINTS))?,
            slots: self.slots.size().map_err(at(map::SLOTS))?,
            maglev: 0,
            addresses: self.addresses.size().map_err(at(map::ADDRESSES))?,
            ranges: self.ranges.size().map_err(at(map::RANGES))?,
        };
        for (key, frontend) in frontends {
            state.set_frontend(key, Some(frontend));
        }
        state.flags = self.config()?.flags & FamilyFlags::of(family).settings();
        self.names
            .read(|number, name| {
                if number == pods_number(family) {
                    state.pods = Some(name_text(&name));
                } else if number >= FIRST_SERVICE_ID && state.owns_id(number) {
                    state.set_name(number, Some(name_text(&name)));
                }
            })
            .map_err(at(map::NAMES))?;
        self.slots
            .read_array(|number, id| {
                if id != 0 {
                    state.set_slot(number, id);
                }
            })
            .map_err(at(map::SLOTS))?;
        self.endpoints
            .read_array(|id, endpoint| {
                if endpoint != Endpoint::default() {
                    state.set_endpoint(id, endpoint);
                }
            })
            .map_err(at(map::ENDPOINTS))?;
        let mut others = 0_u32;
        self.ranges
            .read(|prefix, _| {
                if state.owns_range(prefix.key.owner)
                    && let Some(range) = range_of(&prefix, family)
                {
                    state.add_range(prefix.key.owner, range);
                } else {
                    others += 1;
                }
            })
            .map_err(at(map::RANGES))?;
        state.sizes.ranges = state.sizes.ranges.saturating_sub(others);
        self.observe_maglev(&mut state)?;
        // The node may get more addresses.
        let mut others = state.sizes.addresses / 16;
        self.read_local(|address, flags| {
            if state.owns_address(&address) {
                state.set_address(address, flags & !address_flags::LOCAL);
            }
            others += u32::from(!state.owns_address(&address) || flags == address_flags::LOCAL);
        })?;
        state.sizes.addresses = state.sizes.addresses.saturating_sub(others);
        Ok(state)
    }

    /// Carries out operations on the maps, in order; those on one map that follow each other, together.
    pub(super) fn carry_out(&self, family: IpFamily, ops: &[Op]) -> Result<(), MapError> {
        for run in ops.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            match run.first() {
                Some(Op::SetFrontend(..)) => self.set_frontends(run)?,
                Some(Op::SetSlots(..)) => {
                    let slots = run.iter().filter_map(|op| match op {
                        Op::SetSlots(first, ids) => Some((*first..).zip(ids.iter().copied())),
                        _ => None,
                    });
                    let (numbers, ids): (Vec<u32>, Vec<u32>) = slots.flatten().unzip();
                    self.slots.update(&numbers, &ids).map_err(at(map::SLOTS))?;
                }
                Some(Op::SetEndpoints(..)) => {
                    let mut entries = run.iter().flat_map(Op::endpoints).peekable();
                    while entries.peek().is_some() {
                        let (ids, endpoints): (Vec<u32>, Vec<Endpoint>) =
                            entries.by_ref().take(BATCH).unzip();
                        self.endpoints.update(&ids, &endpoints).map_err(at(map::ENDPOINTS))?;
                    }
                }
                Some(Op::SetMaglev(..)) => self.set_maglev(run)?,
                Some(Op::SetAddress(..)) => self.set_addresses(run)?,
                Some(Op::SetName(..)) => self.set_names(run)?,
                Some(Op::AddRange(..)) => {
                    let (keys, values): (Vec<Prefix>, Vec<u32>) =
                        run.iter().filter_map(range_key).map(|key| (key, 1)).unzip();
                    self.ranges.update(&keys, &values).map_err(at(map::RANGES))?;
                }
                Some(Op::DeleteRange(..)) => {
                    let keys: Vec<Prefix> = run.iter().filter_map(range_key).collect();
                    self.ranges.delete(&keys).map_err(at(map::RANGES))?;
                }
                _ => {
                    for op in run {
                        self.carry_out_setting(family, op)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn carry_out_setting(&self, family: IpFamily, op: &Op) -> Result<(), MapError> {
        let in_use = FamilyFlags::of(family).in_use;
        match op {
            Op::Attach => self.edit_config(|config| config.flags |= in_use),
            Op::Detach => self.edit_config(|config| config.flags &= !in_use),
            Op::SetFlags { mask, to } => {
                self.edit_config(|config| config.flags = config.flags & !mask | to & mask)
            }
            Op::SetPods(Some(pods)) => {
                let (number, name) = (pods_number(family), name_value(pods));
                self.names.update(&[number], &[name]).map_err(at(map::NAMES))
            }
            Op::SetPods(None) => self.names.delete(&[pods_number(family)]).map_err(at(map::NAMES)),
            _ => Ok(()),
        }
    }

    fn set_frontends(&self, run: &[Op]) -> Result<(), MapError> {
        for run in run.chunk_by(|a, b| is_removal(a) == is_removal(b)) {
            let mut keys = Vec::with_capacity(run.len());
            let mut values = Vec::with_capacity(run.len());
            for op in run {
                if let Op::SetFrontend(key, to) = op {
                    keys.push(*key);
                    values.extend(*to);
                }
            }
            let done = if values.is_empty() {
                self.frontends.delete(&keys)
            } else {
                filter::add(self.filter.as_ref(), keys.iter().map(|key| &key.address))?;
                self.frontends.update(&keys, &values)
            };
            done.map_err(at(map::FRONTENDS))?;
        }
        Ok(())
    }

    fn set_names(&self, run: &[Op]) -> Result<(), MapError> {
        let runs = run.chunk_by(|a, b| is_removal(a) == is_removal(b));
        for run in runs.flat_map(|run| run.chunks(NAMES)) {
            let mut keys = Vec::with_capacity(run.len());
            let mut values = Vec::with_capacity(run.len());
            for op in run {
                if let Op::SetName(id, to) = op {
                    keys.push(*id);
                    values.extend(to.as_deref().map(name_value));
                }
            }
            let done =
                if values.is_empty() { self.names.delete(&keys) } else { self.names.update(&keys, &values) };
            done.map_err(at(map::NAMES))?;
        }
        Ok(())
    }

    fn set_addresses(&self, run: &[Op]) -> Result<(), MapError> {
        let mut addresses = BTreeMap::new();
        for op in run {
            if let Op::SetAddress(address, flags) = op {
                let local = if self.local.contains(address) { address_flags::LOCAL } else { 0 };
                addresses.insert(*address, flags | local);
            }
        }
        self.write_addresses(addresses)
    }

    fn write_addresses(&self, addresses: BTreeMap<Address, u32>) -> Result<(), MapError> {
        let (set, gone): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|(_, flags)| *flags != 0);
        let (keys, values): (Vec<Address>, Vec<u32>) = set.into_iter().unzip();
        filter::add(self.filter.as_ref(), keys.iter())?;
        self.addresses.update(&keys, &values).map_err(at(map::ADDRESSES))?;
        let gone: Vec<Address> = gone.into_iter().map(|(address, _)| address).collect();
        self.addresses.delete(&gone).map_err(at(map::ADDRESSES))
    }

    /// Tells the programs which addresses are the node's.
    pub(super) fn set_local(&mut self, local: BTreeSet<Address>) -> Result<(), MapError> {
        let mut flags = BTreeMap::new();
        self.addresses
            .read(|address, bits| {
                flags.insert(address, bits);
            })
            .map_err(at(map::ADDRESSES))?;
        let of = |address: &Address| flags.get(address).copied().unwrap_or(0);
        let come = local.iter().map(|address| (*address, of(address) | address_flags::LOCAL));
        let gone = flags
            .iter()
            .filter(|(address, bits)| **bits & address_flags::LOCAL != 0 && !local.contains(address))
            .map(|(address, bits)| (*address, bits & !address_flags::LOCAL));
        let changed: BTreeMap<Address, u32> =
            come.chain(gone).filter(|(address, bits)| of(address) != *bits).collect();
        if !changed.is_empty() {
            self.write_addresses(changed)?;
        }
        self.local = local;
        Ok(())
    }

    /// Tells the programs about the node's devices.
    pub(super) fn set_interfaces(&self, wanted: &BTreeMap<u32, Interface>) -> Result<(), MapError> {
        let mut held = BTreeMap::new();
        self.interfaces
            .read(|index, interface| {
                held.insert(index, interface);
            })
            .map_err(at(map::INTERFACES))?;
        let (keys, values): (Vec<u32>, Vec<Interface>) =
            wanted.iter().filter(|(index, to)| held.get(index) != Some(*to)).map(|(i, to)| (*i, *to)).unzip();
        self.interfaces.update(&keys, &values).map_err(at(map::INTERFACES))?;
        let gone: Vec<u32> = held.into_keys().filter(|index| !wanted.contains_key(index)).collect();
        self.interfaces.delete(&gone).map_err(at(map::INTERFACES))
    }

    /// By which interface local pods are known, as the families say.
    pub(super) fn pods(&self) -> Result<BTreeSet<Arc<str>>, MapError> {
        let numbers = IpFamily::ALL.map(pods_number);
        let mut pods = BTreeSet::new();
        self.names
            .read(|number, name| {
                if numbers.contains(&number) {
                    pods.insert(name_text(&name));
                }
            })
            .map_err(at(map::NAMES))?;
        Ok(pods)
    }
}

/// Names that are written by one call: they are long.
const NAMES: usize = 1024;

/// Whether an operation deletes an element.
const fn is_removal(op: &Op) -> bool {
    matches!(op, Op::SetFrontend(_, None) | Op::SetName(_, None))
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which programs read too.
pub(super) fn now() -> io::Result<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let (seconds, nanoseconds) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
    Ok(seconds * 1_000_000_000 + nanoseconds)
}

fn name_value(name: &str) -> Name {
    let mut value = Name::default();
    let len = name.len().min(value.0.len());
    value.0[..len].copy_from_slice(&name.as_bytes()[..len]);
    value
}

fn name_text(name: &Name) -> Arc<str> {
    let len = name.0.iter().position(|byte| *byte == 0).unwrap_or(name.0.len());
    String::from_utf8_lossy(&name.0[..len]).into()
}

fn range_key(op: &Op) -> Option<Prefix> {
    let (Op::AddRange(owner, range) | Op::DeleteRange(owner, range)) = op else { return None };
    let length = RangeKey::prefix(range.addr().is_ipv4(), range.prefix_len());
    Some(Prefix { length, key: RangeKey { owner: *owner, address: range.network().into() } })
}

/// The range of a key; `None` for one that we would not write.
fn range_of(prefix: &Prefix, family: IpFamily) -> Option<IpNet> {
    let v4 = family == IpFamily::V4;
    let length = u8::try_from(prefix.length.checked_sub(RangeKey::prefix(v4, 0))?).ok()?;
    let address = IpAddr::from(prefix.key.address);
    let range = IpNet::new(address, length).ok()?;
    (address.is_ipv4() == v4).then_some(range)
}
