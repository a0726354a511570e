//! Fills maps that take the place of others of another size.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{Map, MapData, PerCpuArray};
use shunt_ebpf_abi::{
    Address, Affinity, AffinityKey, BytesBlock, Config, Endpoint, EndpointBlock, Flow, FlowKey, Frontend,
    FrontendKey, Name, ServiceBlock, SocketKey, SocketRecord, map,
};

use super::held::all_maps;
use super::maglev;
use super::maps::{MapError, OBJECT, at, now, open};
use super::sys::{self, Table};
use crate::idle::{has_ended, kept_from, last_seen, supersedes};
use crate::sizes::{moved_frontend, moved_slot};

/// Elements that are gathered before they are written.
const BATCH: usize = 16_384;

/// An entry changes at once, but the time at which it was seen only every second, and the clock is a coarse one.
const CLOCK_SLACK: u64 = 2_000_000_000;

/// Maps that programs write.
const OF_PROGRAMS: [&str; 3] = [map::FLOWS, map::SOCKETS, map::AFFINITY];

/// What became of the entries of a map.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Copied {
    /// Entries that count, before.
    pub(super) before: usize,
    /// Entries in the map that takes its place.
    pub(super) now: usize,
}

/// What becomes of flows that have ended.
///
/// The same client may begin another one from the same port. The programs that go would write that down in the maps that
/// go, and those that come, once they are before them, would find the copy of the one that has ended and translate what
/// follows as that says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ended {
    /// They stay where they are for as long as flows begin there. The programs that go find them.
    Stay,
    /// They come along, for half of a connection may go on for long.
    Come,
}

/// Copies between two folders of maps.
#[derive(Debug)]
pub(super) struct Copier {
    from: PathBuf,
    to: PathBuf,
    tables: PathBuf,
    /// Names of the maps in `to`.
    fresh: BTreeSet<&'static str>,
    config: Config,
    /// What was written before that is copied already.
    since: u64,
}

impl Copier {
    /// Copies what is pinned in `from` to maps of the same names in `to`. `tables` has what is in `maglev`; what was
    /// written before `since` (nanoseconds of `CLOCK_MONOTONIC`) need not be copied again.
    pub(super) fn new(
        from: PathBuf,
        to: PathBuf,
        tables: PathBuf,
        config: Config,
        since: u64,
    ) -> Result<Self, MapError> {
        let entries = std::fs::read_dir(&to).map_err(at("folder"))?;
        let names: BTreeSet<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        let fresh = all_maps().filter(|name| names.contains(*name)).collect();
        Ok(Self { from, to, tables, fresh, config, since })
    }

    /// Names of the maps to which is copied.
    pub(super) const fn fresh(&self) -> &BTreeSet<&'static str> {
        &self.fresh
    }

    /// Whether a map of those that programs write has another one's place to take.
    pub(super) fn has_flows(&self) -> bool {
        OF_PROGRAMS.iter().any(|name| self.fresh.contains(name))
    }

    fn copy<K: Pod + Default, V: Pod + Default>(
        &self,
        name: &'static str,
        map: impl Fn(K, V) -> Option<(K, V)>,
    ) -> Result<(), MapError> {
        if !self.fresh.contains(name) {
            return Ok(());
        }
        let (from, to) = (open::<K, V>(&self.from, name)?, open(&self.to, name)?);
        let mut writer = Writer::new(&to);
        let read = from.read(|key, value| writer.take(map(key, value)));
        read.and_then(|()| writer.finish()).map_err(at(name))
    }

    /// Copies what the agent has written, as it is.
    pub(super) fn tables(&self) -> Result<(), MapError> {
        let slots: Table<u32, u32> = open(&self.from, map::SLOTS)?;
        let before = slots.size().map_err(at(map::SLOTS))?;
        let after = if self.fresh.contains(map::SLOTS) {
            let to: Table<u32, u32> = open(&self.to, map::SLOTS)?;
            let after = to.size().map_err(at(map::SLOTS))?;
            let mut writer = Writer::new(&to);
            let read = slots.read_array(|number, id| {
                let moved = moved_slot(number, before, after);
                writer.take((id != 0 && moved < after).then_some((moved, id)));
            });
            read.and_then(|()| writer.finish()).map_err(at(map::SLOTS))?;
            after
        } else {
            before
        };
        if self.fresh.contains(map::ENDPOINTS) {
            let from: Table<u32, Endpoint> = open(&self.from, map::ENDPOINTS)?;
            let to: Table<u32, Endpoint> = open(&self.to, map::ENDPOINTS)?;
            let size = to.size().map_err(at(map::ENDPOINTS))?;
            let mut writer = Writer::new(&to);
            let read = from.read_array(|id, endpoint| {
                writer.take((endpoint != Endpoint::default() && id < size).then_some((id, endpoint)));
            });
            read.and_then(|()| writer.finish()).map_err(at(map::ENDPOINTS))?;
        }
        self.copy(map::FRONTENDS, |key: FrontendKey, held: Frontend| {
            Some((key, moved_frontend(&held, before, after)))
        })?;
        if before != after && !self.fresh.contains(map::FRONTENDS) {
            // Frontends lead to the slots as they will be: the map is another one as well.
            return Err(at(map::FRONTENDS)(io::Error::other("slots move, and frontends stay")));
        }
        self.copy(map::ADDRESSES, |address: Address, flags: u32| Some((address, flags)))?;
        // What the programs were loaded from is said when they are attached.
        self.copy(map::NAMES, |id: u32, name: Name| (id != OBJECT).then_some((id, name)))?;
        if self.fresh.contains(map::MAGLEV) {
            maglev::put_pinned(&self.tables, &open(&self.from, map::MAGLEV)?, &open(&self.to, map::MAGLEV)?)
                .map_err(at(map::MAGLEV))?;
        }
        self.counters::<ServiceBlock>(map::SERVICE_STATS)?;
        self.counters::<BytesBlock>(map::SERVICE_BYTES)?;
        self.counters::<EndpointBlock>(map::ENDPOINT_STATS)
    }

    /// Counters go on from where they are, but for what is counted until the programs change.
    fn counters<T: Pod>(&self, name: &'static str) -> Result<(), MapError> {
        if !self.fresh.contains(name) {
            return Ok(());
        }
        let of = |folder: &PathBuf| {
            let data = MapData::from_fd(sys::open_pinned(&folder.join(name))?).map_err(io::Error::other)?;
            PerCpuArray::<MapData, T>::try_from(Map::PerCpuArray(data)).map_err(io::Error::other)
        };
        let (from, mut to) = (of(&self.from).map_err(at(name))?, of(&self.to).map_err(at(name))?);
        for number in 0..from.len().min(to.len()) {
            let copied = from.get(&number, 0).and_then(|values| to.set(number, values, 0));
            copied.map_err(|error| at(name)(io::Error::other(error)))?;
        }
        Ok(())
    }

    /// Copies what the programs have written, as far as it counts: what was used last, if there is not room for all.
    /// Flows that have ended stay ([`Ended`]). Says of each map what became of it.
    pub(super) fn flows(&self) -> Result<Vec<(&'static str, Copied)>, MapError> {
        let (config, now) = (self.config, self.since);
        let flow = |key: &FlowKey, flow: &Flow| {
            last_seen(&config, key.protocol, flow, now).filter(|_| !has_ended(flow))
        };
        let copied = [
            self.latest(map::FLOWS, flow)?,
            self.latest(map::SOCKETS, |_: &SocketKey, _: &SocketRecord| Some(0))?,
            self.latest(map::AFFINITY, |_: &AffinityKey, client: &Affinity| Some(client.last_used))?,
        ];
        Ok(copied.into_iter().flatten().collect())
    }

    fn latest<K: Pod + Default, V: Pod + Default>(
        &self,
        name: &'static str,
        used: impl Fn(&K, &V) -> Option<u64>,
    ) -> Result<Option<(&'static str, Copied)>, MapError> {
        if !self.fresh.contains(name) {
            return Ok(None);
        }
        let at = at(name);
        let (from, to) = (open::<K, V>(&self.from, name)?, open::<K, V>(&self.to, name)?);
        let mut times = Vec::new();
        from.read(|key, value| times.extend(used(&key, &value))).map_err(&at)?;
        let (before, room) = (times.len(), to.size().map_err(&at)? as usize);
        let first = if before > room { *times.select_nth_unstable(before - room).1 } else { 0 };
        drop(times);
        let mut writer = Writer::new(&to);
        let read = from.read(|key, value| {
            let counts = used(&key, &value).is_some_and(|time| time >= first);
            writer.take(counts.then_some((key, value)));
        });
        read.and_then(|()| writer.finish()).map_err(&at)?;
        let mut now = 0;
        to.read(|_, _| now += 1).map_err(&at)?;
        Ok(Some((name, Copied { before, now })))
    }

    /// Copies what the programs have written since [`Copier::flows`], unless what is there is newer.
    pub(super) fn catch_up(&self, ended: Ended) -> Result<(), MapError> {
        let (config, since) = (self.config, self.since.saturating_sub(CLOCK_SLACK));
        let now = now().map_err(at(map::FLOWS))?;
        let seen = |key: &FlowKey, flow: &Flow| last_seen(&config, key.protocol, flow, now);
        let counts = |key: &FlowKey, flow: &Flow| seen(key, flow).is_some_and(|seen| seen >= since);
        self.newer(map::FLOWS, |key, flow| !has_ended(flow) && counts(key, flow), supersedes)?;
        if self.fresh.contains(map::FLOWS) {
            let seen = |key: &FlowKey, flow: &Flow| seen(key, flow).filter(|_| has_ended(flow));
            match ended {
                Ended::Stay => self.take_back(|key, flow| has_ended(flow) && counts(key, flow)),
                Ended::Come => self.bring(seen),
            }
            .map_err(at(map::FLOWS))?;
        }
        self.newer(map::SOCKETS, |_: &SocketKey, _: &SocketRecord| true, |_, _| false)?;
        self.newer(
            map::AFFINITY,
            |_: &AffinityKey, client: &Affinity| client.last_used >= since,
            |client, copy| client.last_used > copy.last_used,
        )
    }

    /// Deletes copies of flows.
    fn take_back(&self, which: impl Fn(&FlowKey, &Flow) -> bool) -> io::Result<()> {
        let (from, to) = (open_flows(&self.from)?, open_flows(&self.to)?);
        let mut result = Ok(());
        from.read(|key, flow: Flow| {
            if result.is_ok() && which(&key, &flow) {
                result = to.get(&key).and_then(|held| match held {
                    Some(held) if held.last_seen <= flow.last_seen => to.remove(&key),
                    // Another one, which programs that come have begun.
                    _ => Ok(()),
                });
            }
        })?;
        result
    }

    /// Copies flows that have ended, those last that were seen last, as far as there is room. `seen` says when.
    fn bring(&self, seen: impl Fn(&FlowKey, &Flow) -> Option<u64>) -> io::Result<()> {
        let (from, to) = (open_flows(&self.from)?, open_flows(&self.to)?);
        let mut first = 0;
        if to.size()? < from.size()? {
            let mut room = to.size()? as usize;
            to.read(|_, _| room = room.saturating_sub(1))?;
            let mut times = Vec::new();
            from.read(|key, flow| times.extend(seen(&key, &flow)))?;
            first = kept_from(&mut times, room);
        }
        let mut result = Ok(());
        from.read(|key, flow| {
            if result.is_ok() && seen(&key, &flow).is_some_and(|seen| seen >= first) {
                result = put(&to, &key, &flow, &supersedes);
            }
        })?;
        result
    }

    fn newer<K: Pod + Default, V: Pod + Default>(
        &self,
        name: &'static str,
        counts: impl Fn(&K, &V) -> bool,
        supersedes: impl Fn(&V, &V) -> bool,
    ) -> Result<(), MapError> {
        if !self.fresh.contains(name) {
            return Ok(());
        }
        let at = at(name);
        let (from, to) = (open::<K, V>(&self.from, name)?, open::<K, V>(&self.to, name)?);
        let mut result = Ok(());
        from.read(|key, value| {
            if result.is_err() || !counts(&key, &value) {
                return;
            }
            result = put(&to, &key, &value, &supersedes);
        })
        .map_err(&at)?;
        result.map_err(&at)
    }
}

fn open_flows(folder: &Path) -> io::Result<Table<FlowKey, Flow>> {
    open(folder, map::FLOWS).map_err(io::Error::other)
}

/// Writes an element unless there is one that it does not supersede. One that a program writes meanwhile stays.
fn put<K: Pod + Default, V: Pod + Default>(
    to: &Table<K, V>,
    key: &K,
    value: &V,
    supersedes: &impl Fn(&V, &V) -> bool,
) -> io::Result<()> {
    if to.insert_new(*key, *value)? {
        return Ok(());
    }
    match to.get(key)? {
        Some(held) if supersedes(value, &held) => to.set(key, value),
        _ => Ok(()),
    }
}

/// Writes elements in batches. An error is kept until the end.
struct Writer<'a, K, V> {
    to: &'a Table<K, V>,
    keys: Vec<K>,
    values: Vec<V>,
    result: io::Result<()>,
}

impl<'a, K: Pod + Default, V: Pod + Default> Writer<'a, K, V> {
    const fn new(to: &'a Table<K, V>) -> Self {
        Self { to, keys: Vec::new(), values: Vec::new(), result: Ok(()) }
    }

    fn take(&mut self, element: Option<(K, V)>) {
        if let Some((key, value)) = element {
            self.keys.push(key);
            self.values.push(value);
            if self.keys.len() == BATCH {
                self.write();
            }
        }
    }

    fn write(&mut self) {
        if self.result.is_ok() {
            self.result = self.to.update(&self.keys, &self.values);
        }
        self.keys.clear();
        self.values.clear();
    }

    fn finish(mut self) -> io::Result<()> {
        self.write();
        self.result
    }
}
