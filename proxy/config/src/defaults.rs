//! What absent fields mean: kube-proxy's defaults (`pkg/proxy/apis/config/v1alpha1/defaults.go`),
//! except for the least time between syncs.

use std::net::IpAddr;

use crate::types::{FlushFrequency, KubeProxyConfiguration};
use crate::{API_VERSION, Duration, KIND};

/// Port of /healthz and /livez.
const HEALTHZ_PORT: u16 = 10256;
/// Port of /metrics.
const METRICS_PORT: u16 = 10249;
/// A change costs what it touches, so the pause only lets a burst gather; kube-proxy waits a second.
const MIN_SYNC_PERIOD: Duration = Duration::from_millis(1);
const SYNC_PERIOD: Duration = Duration::from_secs(30);

impl KubeProxyConfiguration {
    /// Fills in what is absent.
    pub fn set_defaults(&mut self) {
        API_VERSION.clone_into(&mut self.api_version);
        KIND.clone_into(&mut self.kind);
        if self.bind_address.is_empty() {
            "0.0.0.0".clone_into(&mut self.bind_address);
        }
        let v4 = matches!(self.bind_address.parse(), Ok(IpAddr::V4(_)));
        let (any, loopback) = if v4 { ("0.0.0.0", "127.0.0.1") } else { ("::", "::1") };
        default_address(&mut self.healthz_bind_address, any, HEALTHZ_PORT);
        default_address(&mut self.metrics_bind_address, loopback, METRICS_PORT);

        default_duration(&mut self.iptables.sync_period, SYNC_PERIOD);
        default_duration(&mut self.iptables.min_sync_period, MIN_SYNC_PERIOD);
        default_duration(&mut self.ipvs.sync_period, SYNC_PERIOD);
        default_duration(&mut self.nftables.sync_period, SYNC_PERIOD);
        default_duration(&mut self.nftables.min_sync_period, MIN_SYNC_PERIOD);
        default_duration(&mut self.config_sync_period, Duration::from_secs(15 * 60));
        self.iptables.masquerade_bit.get_or_insert(14);
        self.iptables.localhost_node_ports.get_or_insert(true);
        self.nftables.masquerade_bit.get_or_insert(14);

        self.oom_score_adj.get_or_insert(-999);
        self.conntrack.max_per_core.get_or_insert(32 * 1024);
        self.conntrack.min.get_or_insert(128 * 1024);
        self.conntrack.tcp_established_timeout.get_or_insert(Duration::from_secs(24 * 3600));
        self.conntrack.tcp_close_wait_timeout.get_or_insert(Duration::from_secs(3600));

        let client = &mut self.client_connection;
        if client.content_type.is_empty() {
            "application/vnd.kubernetes.protobuf".clone_into(&mut client.content_type);
        }
        if client.qps == 0.0 {
            client.qps = 5.0;
        }
        if client.burst == 0 {
            client.burst = 10;
        }
        if self.logging.format.is_empty() {
            "text".clone_into(&mut self.logging.format);
        }
        if self.logging.flush_frequency == FlushFrequency::default() {
            self.logging.flush_frequency = FlushFrequency::Text(Duration::from_secs(5));
        }
    }

    /// The configuration that an empty file means.
    pub fn with_defaults() -> Self {
        let mut config = Self::default();
        config.set_defaults();
        config
    }
}

fn default_duration(value: &mut Duration, default: Duration) {
    if *value == Duration::ZERO {
        *value = default;
    }
}

fn default_address(value: &mut String, ip: &str, port: u16) {
    let given = if value.is_empty() { ip } else { value.as_str() };
    if let Ok(ip) = given.parse::<IpAddr>() {
        *value = std::net::SocketAddr::new(ip, port).to_string();
    }
}
