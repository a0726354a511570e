//! The kernel of each family: opened, read ahead, and what is left there by others.

use std::time::{Duration, Instant};

use anyhow::Result;
use shunt_core::id::IpFamily;
use shunt_mode::driver::{Driver, Report};
use shunt_mode::sync::{Periods, Step, SyncLoop};

use crate::settings::Settings;

/// Opens the mode for both families. A kernel without one family serves the other.
pub(crate) fn open(settings: &Settings) -> Result<Vec<Family>> {
    let periods = Periods {
        min_sync: settings.min_sync_period,
        check: settings.sync_period,
        resync: settings.resync_period,
        ..Periods::default()
    };
    let mut families = Vec::new();
    let mut errors = Vec::new();
    for family in IpFamily::ALL {
        let mut driver = shunt_modes::open(settings.mode, family, &settings.options)?;
        match driver.probe() {
            Ok(()) => families.push(Family {
                driver,
                sync: SyncLoop::new(periods),
                tend_at: None,
                leftovers: settings.remove_leftovers.then(|| settings.options.clone()),
            }),
            Err(error) => {
                tracing::warn!(%family, "{error}");
                errors.push(error);
            }
        }
    }
    match (families.is_empty(), errors.pop()) {
        (true, Some(error)) => Err(error.into()),
        _ => Ok(families),
    }
}

/// Reads what the kernel holds. What goes wrong here is said when the first sync reads again.
pub(crate) fn read_ahead(mut families: Vec<Family>) -> Vec<Family> {
    for family in &mut families {
        if let Err(error) = family.driver.read_ahead() {
            tracing::debug!(family = %family.driver.family(), "{error}");
        }
    }
    families
}

/// One family's kernel and when to sync it.
pub(crate) struct Family {
    pub driver: Box<dyn Driver>,
    pub sync: SyncLoop,
    /// Rules of others are to be removed once ours are in place, with these settings.
    pub leftovers: Option<shunt_modes::Options>,
    /// When the mode has something to do on its own, if so.
    pub tend_at: Option<Instant>,
}

impl Family {
    /// Whether the kernel holds what the table asks for, as far as known.
    pub(crate) const fn in_sync(&self) -> bool {
        self.sync.queued_since().is_none()
    }
}

pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

pub(crate) fn log_sync(family: IpFamily, step: &Step, report: &Report) {
    let observing = milliseconds(report.observing);
    let planning = milliseconds(report.planning);
    let applying = milliseconds(report.applying);
    let (operations, transactions) = (report.operations, report.transactions);
    let waiting = milliseconds(report.waiting);
    if *step == Step::Resync {
        tracing::info!(%family, operations, transactions, observing, planning, applying, waiting, "in sync with the kernel");
    } else if let Step::Apply(_) = step {
        tracing::debug!(%family, operations, transactions, planning, applying, waiting, "change programmed");
    }
}
