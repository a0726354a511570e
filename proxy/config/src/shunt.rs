//! `ShuntConfiguration`: what kube-proxy has no field for. A document of its own, in the same file as
//! `KubeProxyConfiguration` or in another one.

use serde::{Deserialize, Serialize};

use crate::Duration;

/// Our own settings. Absent fields have the values of [`ShuntConfiguration::default`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ShuntConfiguration {
    /// `shunt/v1alpha1`.
    pub api_version: String,
    /// `ShuntConfiguration`.
    pub kind: String,
    /// Overrides `mode` of `KubeProxyConfiguration`, so that one `ConfigMap` serves both proxies.
    pub mode: Option<String>,
    /// Flavour of iptables, `legacy` or `nft`; `None` for the kubelet's, else the one with more rules.
    pub iptables_flavour: Option<String>,
    /// Overrides the least time between two syncs.
    pub min_sync_period: Option<Duration>,
    /// Most time between two looks at everything that the kernel holds.
    pub resync_period: Duration,
    /// Where `shunt dump` and `shunt explain` reach the agent; empty for nowhere.
    pub admin_socket: Option<String>,
    /// What becomes of rules that kube-proxy or another mode left on the node.
    pub leftovers: Leftovers,
    /// Whether a larger value of a sysctl that an administrator set is lowered to the configured one,
    /// as kube-proxy does.
    pub lower_sysctls: bool,
    /// Settings of ebpf mode.
    pub ebpf: Ebpf,
}

/// `ebpf`. Flags override.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ebpf {
    /// cgroup2 folder whose processes are served at their sockets; null for the root of the first cgroup2.
    pub cgroup_root: Option<String>,
    /// bpffs in which maps, programs and links are kept; null for `/sys/fs/bpf`.
    pub bpf_fs_root: Option<String>,
    /// How endpoints are chosen for external traffic, where the Service does not say.
    pub external_algorithm: Algorithm,
    /// Most frontends; null for the default, as below.
    pub frontends_max: Option<u32>,
    /// Most endpoints, counted once for each Service port.
    pub endpoints_max: Option<u32>,
    /// Entries of the connection table.
    pub flows_max: Option<u32>,
    /// Most clients with session affinity.
    pub clients_max: Option<u32>,
    /// Most groups of endpoints among which Maglev chooses.
    pub maglev_max: Option<u32>,
    /// Idle established flows of TCP and SCTP are forgotten.
    pub tcp_timeout: Duration,
    /// Flows of TCP and SCTP that are opening or closing are forgotten.
    pub tcp_transient_timeout: Duration,
    /// Idle flows of UDP are forgotten.
    pub udp_timeout: Duration,
    /// Sockets of this node's processes that were sent to an endpoint are destroyed when it is gone.
    pub destroy_sockets: bool,
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Algorithm {
    /// By chance.
    #[default]
    Random,
    /// By a consistent hash of addresses and ports.
    Maglev,
}

impl Default for Ebpf {
    fn default() -> Self {
        Self {
            cgroup_root: None,
            bpf_fs_root: None,
            external_algorithm: Algorithm::Random,
            frontends_max: None,
            endpoints_max: None,
            flows_max: None,
            clients_max: None,
            maglev_max: None,
            tcp_timeout: Duration::from_secs(86_400),
            tcp_transient_timeout: Duration::from_secs(120),
            udp_timeout: Duration::from_secs(120),
            destroy_sockets: false,
        }
    }
}

/// What to do with rules of kube-proxy and of modes that are not in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Leftovers {
    /// They are removed as soon as our own rules are in place.
    #[default]
    Remove,
    /// They stay.
    Keep,
}

impl Default for ShuntConfiguration {
    fn default() -> Self {
        Self {
            api_version: crate::SHUNT_API_VERSION.to_owned(),
            kind: crate::SHUNT_KIND.to_owned(),
            mode: None,
            iptables_flavour: None,
            min_sync_period: None,
            resync_period: Duration::from_secs(3600),
            admin_socket: None,
            leftovers: Leftovers::Remove,
            lower_sysctls: false,
            ebpf: Ebpf::default(),
        }
    }
}
