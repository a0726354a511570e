//! Maps that become others, because of their sizes or their layout, while programs run.

use std::collections::BTreeSet;
use std::io;
use std::time::Instant;

use shunt_ebpf_abi::{Config, map};
use shunt_mode::KernelError;

use super::attach::{self, AttachError, Way};
use super::copy::{Copier, Ended};
use super::held::{Held, all_maps};
use super::maps::now;
use super::pins::Pins;
use super::{Bpf, Places, failed, of_attach, of_map};
use crate::sizes::{Limits, MapSizes};
use crate::state::State;

/// What is pinned, and what should become of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Look {
    /// No maps: some are to be made.
    Nothing,
    /// Maps whose layout is known.
    Known {
        /// What the programs were loaded from.
        object: Option<String>,
        /// Limits that there are.
        held: Limits,
        /// Limits that there should be.
        limits: Limits,
        /// Maps that become others.
        fresh: BTreeSet<&'static str>,
    },
    /// Maps that nobody here can read, and why.
    Foreign(String),
}

impl Bpf {
    /// Looks at what is pinned.
    pub(super) fn look(&mut self) -> Result<Look, KernelError> {
        let Some(held) = Held::look(&self.pins.maps()).map_err(of_map)? else { return Ok(Look::Nothing) };
        if let Some(why) = held.foreign {
            return Ok(Look::Foreign(why));
        }
        let (Some(limits), true) = (held.limits(), self.open_maps()?.is_some()) else {
            return Ok(Look::Nothing);
        };
        let fresh = |to: &Limits| differing(&held.sizes, to);
        let wanted = self.options.limits();
        if fresh(&wanted).is_empty() {
            let fresh = BTreeSet::new();
            return Ok(Look::Known { object: held.object, held: limits, limits: wanted, fresh });
        }
        let needed = self.maps()?.extent().map_err(of_map)?.needed();
        let (fitting, problems) = wanted.fitting(&limits, &needed);
        for problem in &problems {
            if self.said.insert(problem.clone()) {
                tracing::error!("{problem}");
            }
        }
        let fresh = fresh(&fitting);
        Ok(Look::Known { object: held.object, held: limits, limits: fitting, fresh })
    }

    /// Limits of the maps that are pinned; `None` where there are none.
    pub fn held_limits(&self) -> Result<Option<Limits>, KernelError> {
        Ok(Held::look(&self.pins.maps()).map_err(of_map)?.and_then(|held| held.limits()))
    }

    /// Why nobody here can read the maps that are pinned, if so.
    pub fn foreign(&self) -> Result<Option<String>, KernelError> {
        Ok(Held::look(&self.pins.maps()).map_err(of_map)?.and_then(|held| held.foreign))
    }

    /// Has the maps say that another agent made them.
    #[cfg(feature = "testkit")]
    pub fn pretend(&mut self, object: &str) -> Result<(), KernelError> {
        self.maps()?.set_object(object).map_err(of_map)
    }

    /// Limits that the settings ask for and that are not given, since what is there needs more: why.
    pub fn refused_limits(&self) -> impl Iterator<Item = &str> {
        self.said.iter().map(String::as_str)
    }

    /// Ends what a process that has ended has begun: it had filled maps, and was putting programs over them in the
    /// place of others. Whether there was something: then what is there has changed.
    pub(super) fn recover(&mut self) -> Result<bool, KernelError> {
        let pins = self.pins.clone();
        if !pins.is_changing() {
            pins.discard().map_err(|e| failed("remove pins", e))?;
            return Ok(false);
        }
        tracing::info!("going on with maps that a process before was taking into use");
        if !pins.next_maps().exists() {
            self.inside(|| pins.finish())?;
            return Ok(true);
        }
        let known = matches!(self.look()?, Look::Known { .. });
        let config = if known { self.maps()?.config().map_err(of_map)? } else { Config::DEFAULT };
        let copier = Copier::new(pins.maps(), pins.next_maps(), pins.tables(), config, 0).map_err(of_map)?;
        let coming = pins.resuming(copier.fresh());
        // Sizes are those of maps that are there.
        self.load_all(&coming, &self.options.limits().maps())?;
        if known {
            self.fill_filters()?;
        }
        self.take_over(&coming, known.then_some(&copier))?;
        Ok(true)
    }

    /// Makes maps of other sizes, fills them and puts programs over them in the place of those that run.
    pub(super) fn migrate(
        &mut self,
        held: &Limits,
        limits: &Limits,
        mut fresh: BTreeSet<&'static str>,
    ) -> Result<(), KernelError> {
        let began = Instant::now();
        if fresh.contains(map::SLOTS) {
            // Frontends say where the slots are.
            fresh.insert(map::FRONTENDS);
        }
        let maps = self.maps()?;
        let config = maps.config().map_err(of_map)?;
        // Whoever comes after a crash loads the programs anew.
        maps.forget_object().map_err(of_map)?;
        let pins = self.pins.clone();
        self.load_all(&pins.coming(&fresh), &limits.maps())?;
        self.fill_filters()?;
        let since = now().map_err(|e| failed("read the clock", e))?;
        let copier = |to| Copier::new(pins.maps(), to, pins.tables(), config, since).map_err(of_map);
        let first = copier(pins.fresh_maps())?;
        first.tables().map_err(of_map)?;
        let copied = first.flows().map_err(of_map)?;
        pins.begin().map_err(|e| failed("rename the folder of maps", e))?;
        self.take_over(&pins.resuming(&fresh), Some(&copier(pins.next_maps())?))?;
        for (map, copied) in &copied {
            let left_out = copied.before.saturating_sub(copied.now);
            if left_out > 0 {
                tracing::warn!(
                    map,
                    entries = copied.now,
                    left_out,
                    "not all entries fit into the smaller map: those used last were kept"
                );
            }
        }
        let entries: usize = copied.iter().map(|(_, copied)| copied.now).sum();
        let milliseconds = began.elapsed().as_millis() as u64;
        let maps = fresh.into_iter().collect::<Vec<_>>().join(" ");
        tracing::info!(?held, ?limits, maps, entries, milliseconds, "maps have other sizes");
        Ok(())
    }

    /// Takes maps that are filled and programs over them into use, and forgets those before. `copier` where what
    /// programs have written into the maps before can be read.
    fn take_over(&mut self, coming: &Pins, copier: Option<&Copier>) -> Result<(), KernelError> {
        let pins = self.pins.clone();
        let attached = self.inside(|| attach::is_attached(&pins))?;
        if attached {
            let (cgroup, way) = (self.cgroup()?, self.way(coming)?);
            let beside = way == Way::Tcx && copier.is_some_and(Copier::has_flows);
            if beside {
                self.load_all(&coming.back(), &self.options.limits().maps())?;
            }
            let places = Places { cgroup: &cgroup, devices: &self.devices.by_index, way };
            let copy = |error| AttachError::Io("copy".to_owned(), io::Error::other(error));
            let catch_up = |ended| copier.map_or(Ok(()), |copier| copier.catch_up(ended).map_err(copy));
            self.inside(|| {
                let swapped = if beside {
                    attach::put_before(&pins, coming, &places, || catch_up(Ended::Stay))
                } else {
                    catch_up(Ended::Come).and_then(|()| attach::attach(coming, &places, true))
                };
                swapped.map_err(io::Error::other)
            })?;
        }
        if let Some(copier) = copier {
            copier.catch_up(Ended::Come).map_err(of_map)?;
        }
        self.inside(|| pins.finish())?;
        self.maps = None;
        self.loaded = !attached;
        if attached {
            let name = self.options.object_name();
            self.maps()?.set_object(&name).map_err(of_map)?;
        }
        Ok(())
    }

    /// Makes maps beside those that nobody here can read. What is written from now on goes there; the programs change when
    /// they are attached.
    pub(super) fn replace(&mut self, why: &str) -> Result<(), KernelError> {
        tracing::warn!(
            "{why}, which this version cannot read: all maps are made anew, and flows at devices, UDP sockets and clients with session affinity choose endpoints again"
        );
        let coming = self.pins.coming(&all_maps().collect());
        let sizes = self.options.limits().maps();
        attach::load(&coming, &self.options.object, &sizes).map_err(of_attach)?;
        self.replacing = true;
        self.loaded = true;
        self.maps = None;
        Ok(())
    }

    /// Loads programs, also those for devices without Ethernet headers if there is such a device.
    fn load_all(&mut self, pins: &Pins, sizes: &MapSizes) -> Result<(), KernelError> {
        attach::load(pins, &self.options.object, sizes).map_err(of_attach)?;
        if self.devices.by_index.is_empty() {
            self.look_at_devices()?;
        }
        if self.devices.by_index.values().any(|device| !device.ethernet) {
            attach::load_headerless(pins, &self.options.object, sizes).map_err(of_attach)?;
        }
        Ok(())
    }

    /// What there will be of `state` once the maps have other limits.
    pub(super) fn resized(state: &mut State, held: &Limits, limits: &Limits) {
        state.resize(limits.room(held, &state.sizes));
    }
}

/// Maps whose size is another one than limits ask for.
fn differing(held: &MapSizes, limits: &Limits) -> BTreeSet<&'static str> {
    let wanted = limits.maps();
    wanted
        .iter()
        .filter(|(name, size)| held.get(*name).is_some_and(|held| held != *size))
        .map(|(n, _)| *n)
        .collect()
}
