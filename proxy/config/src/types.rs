//! `KubeProxyConfiguration` v1alpha1, field by field (kubernetes 1.36,
//! `staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go`). As in Go, null means the same as absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::Duration;

fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// kube-proxy's configuration. A value of this type need not be defaulted or valid:
/// [`decode`](crate::decode()) gives one that is both.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KubeProxyConfiguration {
    /// `kubeproxy.config.k8s.io/v1alpha1`.
    #[serde(deserialize_with = "nullable")]
    pub api_version: String,
    /// `KubeProxyConfiguration`.
    #[serde(deserialize_with = "nullable")]
    pub kind: String,
    /// Feature gates by name.
    #[serde(deserialize_with = "nullable")]
    pub feature_gates: BTreeMap<String, bool>,
    /// How to reach the API server.
    #[serde(deserialize_with = "nullable")]
    pub client_connection: ClientConnection,
    /// Logging.
    #[serde(deserialize_with = "nullable")]
    pub logging: Logging,
    /// Name of the Node, if it is not the host name.
    #[serde(deserialize_with = "nullable")]
    pub hostname_override: String,
    /// The node's primary address; no socket is bound to it.
    #[serde(deserialize_with = "nullable")]
    pub bind_address: String,
    /// Where /healthz and /livez answer; after decoding, empty only if switched off by flag.
    #[serde(deserialize_with = "nullable")]
    pub healthz_bind_address: String,
    /// Where /metrics answers; after decoding, empty only if switched off by flag.
    #[serde(deserialize_with = "nullable")]
    pub metrics_bind_address: String,
    /// Exit when a port cannot be bound.
    #[serde(deserialize_with = "nullable")]
    pub bind_address_hard_fail: bool,
    /// Go's profiler; it has no counterpart here.
    #[serde(deserialize_with = "nullable")]
    pub enable_profiling: bool,
    /// Kubernetes version of which hidden metrics are shown; none are hidden here.
    #[serde(deserialize_with = "nullable")]
    pub show_hidden_metrics_for_version: String,
    /// `iptables`, `ipvs`, `nftables`, `ebpf`, `auto` or empty.
    #[serde(deserialize_with = "nullable")]
    pub mode: String,
    /// Settings of iptables mode; of ipvs mode, too, as far as it uses iptables.
    #[serde(deserialize_with = "nullable")]
    pub iptables: Iptables,
    /// Settings of ipvs mode.
    #[serde(deserialize_with = "nullable")]
    pub ipvs: Ipvs,
    /// Settings of nftables mode.
    #[serde(deserialize_with = "nullable")]
    pub nftables: Nftables,
    /// Windows only; read and ignored.
    #[serde(deserialize_with = "nullable")]
    pub winkernel: Winkernel,
    /// How local pods are recognised: `ClusterCIDR` (also if empty), `NodeCIDR`, `BridgeInterface`,
    /// `InterfaceNamePrefix`.
    #[serde(deserialize_with = "nullable")]
    pub detect_local_mode: String,
    /// What the last two of these need.
    #[serde(deserialize_with = "nullable")]
    pub detect_local: DetectLocal,
    /// Range of pod addresses, or one of each family, separated by a comma.
    #[serde(rename = "clusterCIDR", deserialize_with = "nullable")]
    pub cluster_cidr: String,
    /// On which addresses node ports answer.
    pub node_port_addresses: Option<Vec<String>>,
    /// Score for the kernel's out-of-memory killer.
    pub oom_score_adj: Option<i32>,
    /// The kernel's connection tracking.
    #[serde(deserialize_with = "nullable")]
    pub conntrack: Conntrack,
    /// How often kube-proxy's informers resync; watches here need none.
    #[serde(deserialize_with = "nullable")]
    pub config_sync_period: Duration,
    /// Unused since the userspace mode went.
    #[serde(deserialize_with = "nullable")]
    pub port_range: String,
    /// Windows only; read and ignored.
    #[serde(deserialize_with = "nullable")]
    pub windows_run_as_service: bool,
}

/// `clientConnection`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientConnection {
    /// Path of a kubeconfig; empty for the pod's service account.
    #[serde(deserialize_with = "nullable")]
    pub kubeconfig: String,
    /// Ignored: what is read is always JSON.
    #[serde(deserialize_with = "nullable")]
    pub accept_content_types: String,
    /// Ignored, likewise.
    #[serde(deserialize_with = "nullable")]
    pub content_type: String,
    /// Ignored: four watches need no limit.
    #[serde(deserialize_with = "nullable")]
    pub qps: f32,
    /// Ignored, likewise.
    #[serde(deserialize_with = "nullable")]
    pub burst: i32,
}

/// `logging` (`component-base`'s `LoggingConfiguration`).
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Logging {
    /// `text` or `json`.
    #[serde(deserialize_with = "nullable")]
    pub format: String,
    /// A duration, or nanoseconds. Lines are written at once here.
    #[serde(deserialize_with = "nullable")]
    pub flush_frequency: FlushFrequency,
    /// klog's verbosity.
    #[serde(deserialize_with = "nullable")]
    pub verbosity: u32,
    /// Verbosity by Go source file; such files do not exist here.
    #[serde(deserialize_with = "nullable")]
    pub vmodule: Vec<VModule>,
    /// Options of klog's formats; ignored.
    pub options: Value,
}

/// `logging.flushFrequency`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FlushFrequency {
    /// Nanoseconds.
    Nanoseconds(i64),
    /// As text.
    Text(Duration),
}

impl Default for FlushFrequency {
    fn default() -> Self {
        Self::Nanoseconds(0)
    }
}

/// An item of `logging.vmodule`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VModule {
    /// Pattern of Go source file names.
    pub file_pattern: String,
    /// Verbosity there.
    pub verbosity: u32,
}

/// `iptables`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Iptables {
    /// Bit of the packet mark that asks for masquerade.
    pub masquerade_bit: Option<i32>,
    /// Masquerade all traffic to cluster IPs.
    #[serde(deserialize_with = "nullable")]
    pub masquerade_all: bool,
    /// Node ports answer on 127.0.0.0/8, too.
    pub localhost_node_ports: Option<bool>,
    /// Health is judged by twice this time.
    #[serde(deserialize_with = "nullable")]
    pub sync_period: Duration,
    /// Least time between two syncs.
    #[serde(deserialize_with = "nullable")]
    pub min_sync_period: Duration,
}

/// `ipvs`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ipvs {
    /// Health is judged by twice this time.
    #[serde(deserialize_with = "nullable")]
    pub sync_period: Duration,
    /// Least time between two syncs.
    #[serde(deserialize_with = "nullable")]
    pub min_sync_period: Duration,
    /// The kernel's scheduler; empty for `rr`.
    #[serde(deserialize_with = "nullable")]
    pub scheduler: String,
    /// Virtual servers in these ranges are never cleaned up.
    #[serde(rename = "excludeCIDRs")]
    pub exclude_cidrs: Option<Vec<String>>,
    /// Sets `arp_ignore` and `arp_announce`.
    #[serde(rename = "strictARP", deserialize_with = "nullable")]
    pub strict_arp: bool,
    /// Idle TCP connections; zero leaves the kernel's.
    #[serde(deserialize_with = "nullable")]
    pub tcp_timeout: Duration,
    /// TCP connections after a FIN; zero leaves the kernel's.
    #[serde(deserialize_with = "nullable")]
    pub tcp_fin_timeout: Duration,
    /// UDP; zero leaves the kernel's.
    #[serde(deserialize_with = "nullable")]
    pub udp_timeout: Duration,
}

/// `nftables`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Nftables {
    /// Bit of the packet mark that asks for masquerade.
    pub masquerade_bit: Option<i32>,
    /// Masquerade all traffic to cluster IPs.
    #[serde(deserialize_with = "nullable")]
    pub masquerade_all: bool,
    /// Health is judged by twice this time.
    #[serde(deserialize_with = "nullable")]
    pub sync_period: Duration,
    /// Least time between two syncs.
    #[serde(deserialize_with = "nullable")]
    pub min_sync_period: Duration,
}

/// `winkernel`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Winkernel {
    /// Ignored.
    #[serde(deserialize_with = "nullable")]
    pub network_name: String,
    /// Ignored.
    #[serde(deserialize_with = "nullable")]
    pub source_vip: String,
    /// Ignored.
    #[serde(rename = "enableDSR", deserialize_with = "nullable")]
    pub enable_dsr: bool,
    /// Ignored.
    #[serde(deserialize_with = "nullable")]
    pub root_hns_endpoint_name: String,
    /// Ignored.
    #[serde(deserialize_with = "nullable")]
    pub forward_health_check_vip: bool,
}

/// `detectLocal`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DetectLocal {
    /// Bridge over which local pods are reached.
    #[serde(deserialize_with = "nullable")]
    pub bridge_interface: String,
    /// How the names of local pods' interfaces start.
    #[serde(deserialize_with = "nullable")]
    pub interface_name_prefix: String,
}

/// `conntrack`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conntrack {
    /// Entries per CPU; zero leaves the kernel's limit.
    pub max_per_core: Option<i32>,
    /// Least entries.
    pub min: Option<i32>,
    /// Idle TCP connections; zero leaves the kernel's.
    pub tcp_established_timeout: Option<Duration>,
    /// TCP connections in `CLOSE_WAIT`; zero leaves the kernel's.
    pub tcp_close_wait_timeout: Option<Duration>,
    /// Do not call packets outside of the window INVALID.
    #[serde(deserialize_with = "nullable")]
    pub tcp_be_liberal: bool,
    /// UDP without an answer; zero leaves the kernel's.
    #[serde(deserialize_with = "nullable")]
    pub udp_timeout: Duration,
    /// UDP with answers; zero leaves the kernel's.
    #[serde(deserialize_with = "nullable")]
    pub udp_stream_timeout: Duration,
}

/// What the configuration says about the mode in use. kube-proxy's internal configuration takes
/// these from different sections, depending on `mode` as it is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OfMode {
    /// Masquerade all traffic to cluster IPs.
    pub masquerade_all: bool,
    /// Bit of the packet mark that asks for masquerade.
    pub masquerade_bit: Option<i32>,
    /// Health is judged by twice this time.
    pub sync_period: Duration,
    /// Least time between two syncs.
    pub min_sync_period: Duration,
}

impl KubeProxyConfiguration {
    /// The section of the mode that is written. Without one, and for `auto`, it is that of iptables:
    /// whoever wrote nothing configured kube-proxy's default mode.
    pub const fn of_mode(&self) -> OfMode {
        let Self { iptables, ipvs, nftables, .. } = self;
        match self.mode.as_bytes() {
            b"nftables" | b"ebpf" => OfMode {
                masquerade_all: nftables.masquerade_all,
                masquerade_bit: nftables.masquerade_bit,
                sync_period: nftables.sync_period,
                min_sync_period: nftables.min_sync_period,
            },
            b"ipvs" => OfMode {
                masquerade_all: iptables.masquerade_all,
                masquerade_bit: iptables.masquerade_bit,
                sync_period: ipvs.sync_period,
                min_sync_period: ipvs.min_sync_period,
            },
            _ => OfMode {
                masquerade_all: iptables.masquerade_all,
                masquerade_bit: iptables.masquerade_bit,
                sync_period: iptables.sync_period,
                min_sync_period: iptables.min_sync_period,
            },
        }
    }
}
