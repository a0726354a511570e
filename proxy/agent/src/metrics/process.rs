//! What is read when it is asked for: the process (`process_*`, as Prometheus' clients name it), the
//! kernel's table of tracked connections, and packets that it counts.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use shunt_mode::Mode;
use shunt_node::sysctl::Sysctls;

/// Reads /proc at each scrape.
#[derive(Debug, Default)]
pub(crate) struct Process {
    sysctls: Sysctls,
}

/// Clock ticks of /proc/self/stat: 100 a second on every architecture that Kubernetes runs on.
const TICKS: f64 = 100.0;
const PAGE: u64 = 4096;

impl Process {
    fn encode_process(encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(stat) = Stat::read() else { return Ok(()) };
        counter(
            encoder,
            "process_cpu_seconds",
            "Total user and system CPU time spent in seconds",
            stat.cpu_seconds,
        )?;
        gauge(encoder, "process_resident_memory_bytes", "Resident memory size in bytes", stat.resident)?;
        gauge(encoder, "process_virtual_memory_bytes", "Virtual memory size in bytes", stat.virtual_memory)?;
        if let Some(start) = stat.start_seconds {
            gauge(
                encoder,
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds",
                start,
            )?;
        }
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            // One of them is that of this reading.
            gauge(
                encoder,
                "process_open_fds",
                "Number of open file descriptors",
                float(open.count() as u64) - 1.0,
            )?;
        }
        if let Some(max) = max_fds() {
            gauge(encoder, "process_max_fds", "Maximum number of open file descriptors", max)?;
        }
        Ok(())
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        Self::encode_process(&mut encoder)?;
        for (file, name, help) in [
            (
                "nf_conntrack_count",
                "shunt_conntrack_entries",
                "Connections that the kernel tracks in this network namespace",
            ),
            (
                "nf_conntrack_max",
                "shunt_conntrack_entries_limit",
                "Connections that the kernel tracks at most",
            ),
        ] {
            if let Ok(value) = self.sysctls.number(&format!("proc/sys/net/netfilter/{file}")) {
                gauge(&mut encoder, name, help, float(value))?;
            }
        }
        Ok(())
    }
}

/// Packets that the kernel counts in rules of a mode: read at each scrape.
#[derive(Debug)]
pub(crate) struct CountedPackets(pub(crate) Mode);

impl Collector for CountedPackets {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, packets) in shunt_modes::counted_packets(self.0) {
            let (metric, help) = match name {
                "ct_state_invalid_dropped_pkts" => (
                    "kubeproxy_iptables_ct_state_invalid_dropped_packets",
                    "packets dropped by iptables to work around conntrack problems",
                ),
                "localhost_nps_accepted_pkts" => (
                    "kubeproxy_iptables_localhost_nodeports_accepted_packets",
                    "Number of packets accepted on nodeports of loopback interface",
                ),
                _ => continue,
            };
            counter(&mut encoder, metric, help, float(packets))?;
        }
        Ok(())
    }
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

/// Prometheus knows floats only.
#[allow(clippy::cast_precision_loss)]
pub(crate) const fn float(value: u64) -> f64 {
    value as f64
}

/// What /proc/self/stat says.
struct Stat {
    cpu_seconds: f64,
    start_seconds: Option<f64>,
    virtual_memory: f64,
    resident: f64,
}

impl Stat {
    fn read() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the program may have anything in it, and ends with the last parenthesis.
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        // Numbered from 3 in proc(5).
        let number = |n: usize| fields.get(n - 3).and_then(|field| field.parse::<u64>().ok());
        let started = float(number(22)?) / TICKS;
        Some(Self {
            cpu_seconds: float(number(14)? + number(15)?) / TICKS,
            start_seconds: boot_seconds().map(|boot| boot + started),
            virtual_memory: float(number(23)?),
            resident: float(number(24)? * PAGE),
        })
    }
}

fn boot_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

fn max_fds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}
