//! Flows whose time is over are deleted before somebody needs their room: the table forgets what was used least
//! recently, and that may be a connection which is open and quiet rather than one that has just ended.

use std::path::Path;
use std::time::{Duration, Instant};

use shunt_core::id::IpFamily;
use shunt_ebpf_abi::{Config, Flow, FlowKey, map};
use shunt_mode::KernelError;

use super::maps::{MapError, at, now, open};
use super::sys::{Reader, Table};
use super::{Bpf, of_map};
use crate::idle::last_seen;

/// Entries that are looked at in a row.
const BATCH: usize = 1024;
/// Until the next ones are looked at, which bounds what a full table costs.
const STEP: Duration = Duration::from_millis(100);
/// Between one look at all entries and the next, if there was something to do.
const PAUSE: Duration = Duration::from_secs(15);
/// The same if there was little: a table full of connections that are open is not looked at for nothing.
const LONG_PAUSE: Duration = Duration::from_mins(1);
/// What is little.
const FEW: usize = 1024;

/// Goes through the table of flows bit by bit.
#[derive(Debug)]
pub(super) struct Sweeper {
    flows: Table<FlowKey, Flow>,
    reader: Reader<FlowKey, Flow>,
    /// Entries deleted since the start of the table.
    deleted: usize,
}

impl Sweeper {
    pub(super) fn new(folder: &Path) -> Result<Self, MapError> {
        Ok(Self { flows: open(folder, map::FLOWS)?, reader: Reader::new(BATCH), deleted: 0 })
    }

    /// Looks at the next entries and deletes those whose time is over; how long to wait then.
    pub(super) fn step(&mut self, config: &Config) -> Result<Duration, MapError> {
        let at = at(map::FLOWS);
        let now = now().map_err(&at)?;
        let is_over = |key: &FlowKey, flow: &Flow| last_seen(config, key.protocol, flow, now).is_none();
        let (entries, end) = self.reader.next(&self.flows).map_err(&at)?;
        let over: Vec<_> = entries.filter(|(key, flow)| is_over(key, flow)).collect();
        for (key, flow) in over {
            // The other direction may be in use, and this one be needed again.
            let answers = FlowKey { tuple: flow.tuple.reversed(), hook: 1 - key.hook.min(1), ..key };
            let other = self.flows.get(&answers).map_err(&at)?;
            if other.is_some_and(|other| !is_over(&answers, &other)) {
                continue;
            }
            for key in [key, answers] {
                // It was read a while ago.
                if self.flows.get(&key).map_err(&at)?.is_some_and(|flow| is_over(&key, &flow)) {
                    self.flows.remove(&key).map_err(&at)?;
                    self.deleted += 1;
                }
            }
        }
        if !end {
            return Ok(STEP);
        }
        let deleted = std::mem::take(&mut self.deleted);
        if deleted > 0 {
            tracing::debug!(deleted, "flows whose time is over were forgotten");
        }
        Ok(if deleted < FEW { LONG_PAUSE } else { PAUSE })
    }
}

impl Bpf {
    /// Writes down flows that nobody has seen, seconds ago.
    #[cfg(feature = "testkit")]
    pub fn remember_flows(&mut self, count: u32, seconds: u64) -> Result<(), KernelError> {
        let flows: Table<FlowKey, Flow> = open(&self.pins.maps(), map::FLOWS).map_err(of_map)?;
        let seen = now().map_err(at(map::FLOWS)).map_err(of_map)?.saturating_sub(seconds * 1_000_000_000);
        let key = |n: u32| {
            let source = shunt_ebpf_abi::Address([0xfd00, 0, 0, n]);
            let tuple = shunt_ebpf_abi::Tuple { source, ..Default::default() };
            FlowKey { tuple, protocol: 6, ..FlowKey::default() }
        };
        let keys: Vec<FlowKey> = (0..count).map(key).collect();
        let flow = Flow { last_seen: seen, ..Flow::default() };
        flows.update(&keys, &vec![flow; keys.len()]).map_err(at(map::FLOWS)).map_err(of_map)
    }

    /// Deletes some flows whose time is over; when to come again. Of both families one does that.
    pub(super) fn sweep_flows(&mut self, now: Instant) -> Result<Option<Instant>, KernelError> {
        let family = self.family;
        if self.replacing {
            return Ok(Some(now + PAUSE));
        }
        let Some(maps) = self.open_maps()? else { return Ok(None) };
        let config = maps.config().map_err(of_map)?;
        if family == IpFamily::V6 && maps.in_use(IpFamily::V4).map_err(of_map)? {
            return Ok(Some(now + PAUSE));
        }
        let pause = maps.sweeper().and_then(|sweeper| sweeper.step(&config)).map_err(of_map)?;
        Ok(Some(now + pause))
    }
}
