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
        }
    }
}
