//! Everything that packets are sent through: nothing, a layout of kube-proxy's, or a running program.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::Result;

use crate::agent::{Agent, Api, Program};
use crate::bed::Bed;
use crate::cluster::Cluster;
use crate::layouts::Layout;

/// What a bed's node does to packets.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Subject {
    /// Forwards them: packets go to the pod's own address.
    Direct,
    /// Has a layout of kube-proxy's, written once.
    Layout(Layout),
    /// Runs a program.
    Program(Program),
}

/// A subject at work.
pub(crate) struct Stage {
    _running: Option<(Agent, Api)>,
    /// The namespaces.
    pub bed: Bed,
}

/// Most time that a program gets to serve a cluster.
pub(crate) const PATIENCE: Duration = Duration::from_mins(5);

impl Subject {
    /// Name in reports.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Direct => "direct".to_owned(),
            Self::Layout(layout) => layout.name().to_owned(),
            Self::Program(program) => program.name(),
        }
    }

    /// Whether Services exist here.
    pub(crate) fn serves(&self) -> bool {
        *self != Self::Direct
    }

    /// Makes a bed and puts the subject to work in it.
    pub(crate) fn set_up(&self, cluster: &Cluster, echo: bool) -> Result<Stage> {
        let bed = Bed::new(echo, matches!(self, Self::Program(program) if program.works_on_sockets()))?;
        let running = match self {
            Self::Direct => None,
            Self::Layout(layout) => {
                layout.load(bed.node(), cluster)?;
                None
            }
            Self::Program(program) => {
                let api = Api::start(&bed, cluster)?;
                let mut agent = Agent::start(&bed, &api, program)?;
                if cluster.shape.udp {
                    // Few of them: the kernel sends no more than six such answers at once.
                    let last: Vec<_> = cluster.frontends().into_iter().rev().take(3).collect();
                    agent.wait_until_forwarded(&bed, &last)?;
                } else {
                    agent.wait_until_served(&bed, &sample(&cluster.frontends()), PATIENCE)?;
                }
                Some((agent, api))
            }
        };
        Ok(Stage { _running: running, bed })
    }
}

/// Some of many, the last one among them.
pub(crate) fn sample(targets: &[SocketAddrV4]) -> Vec<SocketAddrV4> {
    let step = (targets.len() / 32).max(1);
    targets.iter().rev().step_by(step).copied().collect()
}
