//! The control plane: start, changes, memory, locks, restart; all seen from outside the program.

mod churn;
mod cold;
mod lock;
mod memory;

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub(crate) use churn::Churn;
pub(crate) use cold::{Cold, Restart};

use crate::agent::{Agent, Api, Program};
use crate::bed::Bed;
use crate::cluster::{Cluster, Shape};
use crate::subject::PATIENCE;

/// What to measure.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Programs.
    pub programs: Vec<Program>,
    /// Cold starts: Services and endpoints of each.
    pub shapes: Vec<(usize, usize)>,
    /// Repetitions of each cold start; the fastest counts, the first of all warms up memory.
    pub repetitions: u32,
    /// Numbers of Services under which changes are measured, with ten endpoints each.
    pub churn: Vec<usize>,
    /// Changes a second.
    pub rates: Vec<u32>,
    /// For how long at each rate.
    pub duration: Duration,
    /// To come to rest after a start or a burst; idling is measured for three times as long.
    pub rest: Duration,
}

/// Shapes with so many endpoints have goals.
const JUDGED_ENDPOINTS: usize = 10;

/// What was measured.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Control {
    /// Cold starts.
    pub cold: Vec<Cold>,
    /// Restarts over what is there.
    pub restart: Vec<Restart>,
    /// Changes.
    pub churn: Vec<Churn>,
}

/// Measures all programs; what cannot be measured is said in `failures`.
pub(crate) fn measure(plan: &Plan, failures: &mut Vec<String>) -> Result<Control> {
    let mut control = Control::default();
    // What has goals first: when time runs out, the rest is left out.
    let (judged, others): (Vec<_>, Vec<_>) =
        plan.shapes.iter().partition(|shape| shape.1 == JUDGED_ENDPOINTS);
    cold_starts(plan, &judged, &mut control, failures)?;
    for &services in &plan.churn {
        let cluster = churn::with_probes(Cluster::new(Shape::new(services, 10))?);
        for program in plan.programs.iter().filter(|program| program.can_take(services, 10)) {
            let what = format!("{}, changes among {services} Services", program.name());
            crate::say(format_args!("{what}"));
            let measured = crate::in_time().and_then(|()| changes(plan, program, &cluster, &mut control));
            if let Err(error) = measured {
                failures.push(format!("{what}: {error:#}"));
            }
        }
    }
    cold_starts(plan, &others, &mut control, failures)?;
    Ok(control)
}

fn cold_starts(
    plan: &Plan,
    shapes: &[(usize, usize)],
    control: &mut Control,
    failures: &mut Vec<String>,
) -> Result<()> {
    for &(services, endpoints) in shapes {
        let cluster = Cluster::new(Shape::new(services, endpoints))?;
        for program in plan.programs.iter().filter(|program| program.can_take(services, endpoints)) {
            let what = format!("{}, cold start with {services} x {endpoints}", program.name());
            crate::say(format_args!("{what}"));
            let measured = crate::in_time().and_then(|()| cold::measure(program, &cluster, plan.repetitions));
            match measured {
                Ok(cold) => control.cold.push(cold),
                Err(error) => failures.push(format!("{what}: {error:#}")),
            }
        }
    }
    Ok(())
}

/// Changes, then a restart over what is there.
fn changes(plan: &Plan, program: &Program, cluster: &Cluster, control: &mut Control) -> Result<()> {
    let bed = Bed::new(false, program.works_on_sockets())?;
    let probes = churn::Probes::new(&bed)?;
    let api = Api::start(&bed, cluster)?;
    let mut agent = Agent::start(&bed, &api, program)?;
    agent.wait_until_served(&bed, &crate::subject::sample(&cluster.frontends()), PATIENCE)?;
    // Let it finish what a start brings besides: the other family, and what is done ten seconds later.
    if matches!(program, Program::Shunt { .. }) {
        agent.first_sync(PATIENCE)?;
    }
    std::thread::sleep(plan.rest);
    control.churn.push(probes.measure(plan, program, &agent, &api, cluster)?);
    agent.stop().context("before the restart")?;
    if matches!(program, Program::Shunt { .. }) {
        control.restart.push(cold::restart(program, &bed, &api, cluster.shape, plan.repetitions + 1)?);
    }
    Ok(())
}
