//! New flows and bytes by Service port, as the programs of ebpf mode count them. There are five numbers for each of
//! them, used or not: a [`Family`](prometheus_client::metrics::family::Family) for each of two metrics would hold
//! the labels of each number apart.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use shunt_core::id::{IpFamily, ServicePortName};

use super::{DIRECTIONS, OfService};

/// What becomes of a new flow.
const RESULTS: [&str; 3] = ["forwarded", "rejected", "dropped"];

/// Counted since the agent's first look.
#[derive(Clone, Copy, Default, Debug)]
struct Counts {
    /// New flows by [`RESULTS`].
    flows: [u64; 3],
    /// Bytes by [`DIRECTIONS`].
    bytes: [u64; 2],
}

/// Flows of all Service ports. Clones are one and the same.
#[derive(Clone, Default, Debug)]
pub(super) struct ServiceFlows(Arc<Mutex<BTreeMap<(IpFamily, ServicePortName), Counts>>>);

impl ServiceFlows {
    /// Adds what was counted meanwhile.
    pub(super) fn add(&self, family: IpFamily, port: &ServicePortName, flows: [u64; 3], bytes: [u64; 2]) {
        let Ok(mut all) = self.0.lock() else { return };
        let counts = all.entry((family, port.clone())).or_default();
        counts.flows.iter_mut().zip(flows).for_each(|(sum, more)| *sum += more);
        counts.bytes.iter_mut().zip(bytes).for_each(|(sum, more)| *sum += more);
    }

    /// A Service port is no more.
    pub(super) fn remove(&self, family: IpFamily, port: &ServicePortName) {
        if let Ok(mut all) = self.0.lock() {
            all.remove(&(family, port.clone()));
        }
    }

    fn encode_metric<const N: usize>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        label: &'static str,
        values: [&'static str; N],
        of: impl Fn(&Counts) -> [u64; N],
    ) -> fmt::Result {
        let all = self.0.lock().map_err(|_| fmt::Error)?;
        let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for ((family, port), counts) in all.iter() {
            let mut labels = OfService(*family, port.clone(), None);
            for (value, count) in values.into_iter().zip(of(counts)) {
                labels.2 = Some((label, value));
                ConstCounter::new(count).encode(encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collector for ServiceFlows {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let flows = (
            "service_flows",
            "New flows to a Service port, by what became of them: forwarded, rejected, dropped",
        );
        self.encode_metric(&mut encoder, flows, "result", RESULTS, |counts| counts.flows)?;
        let bytes = (
            "service_flow_bytes",
            "Bytes of packets to and from a Service port that were translated at the node's devices",
        );
        self.encode_metric(&mut encoder, bytes, "direction", DIRECTIONS, |counts| counts.bytes)
    }
}
