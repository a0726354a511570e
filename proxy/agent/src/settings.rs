//! What configuration and flags decide, in the terms of those who act on it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use ipnet::IpNet;
use shunt_config::shunt::Leftovers;
use shunt_config::{ConfigError, KubeProxyConfiguration, ShuntConfiguration};
use shunt_core::node::{Config, LocalDetector, Node, NodePortAddresses};
use shunt_core::service::{Algorithm, Scheduler};
use shunt_mode::Mode;
use shunt_modes::{IpvsOptions, Options};
use shunt_node::sysctl::Sizing;

use crate::cli::{ExternalAlgorithm, ModeArgs, SettingArgs};
use crate::flags::{self, KubeProxyFlags};

/// Everything that flags and configuration decide.
#[derive(Clone, PartialEq, Eq, Debug)]
// Switches of their own, as the operator sets them.
#[allow(clippy::struct_excessive_bools)]
pub(crate) struct Settings {
    /// The mode; if it is to be found out, the one that is preferred.
    pub mode: Mode,
    /// The mode is to be found out by asking the kernel.
    pub auto: bool,
    /// What the compiler needs. A `NodeCIDR` detector is only known with the Node object.
    pub config: Config,
    /// The pod ranges of the Node object say what is a local pod (`NodeCIDR`).
    pub detect_by_node_cidr: bool,
    /// Least time between two syncs.
    pub min_sync_period: Duration,
    /// Time between two looks whether our rules are still there; health is judged by twice this time.
    pub sync_period: Duration,
    /// Most time between two looks at the whole kernel state.
    pub resync_period: Duration,
    /// Name of the node, if it is not the host name.
    pub hostname_override: Option<String>,
    /// The node's primary address, if it is not that of the Node.
    pub bind_address: Option<IpAddr>,
    /// Where /healthz and /livez answer.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Where /metrics answers.
    pub metrics_bind_address: Option<SocketAddr>,
    /// Exit when a port cannot be bound.
    pub bind_address_hard_fail: bool,
    /// Kubeconfig; without one, the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Score for the out-of-memory killer.
    pub oom_score_adj: Option<i32>,
    /// Where dumps and explanations are asked for; empty for nowhere.
    pub admin_socket: String,
    /// Sizes and timeouts of connection tracking.
    pub conntrack: Sizing,
    /// Rules of kube-proxy and of other modes go once ours are in place.
    pub remove_leftovers: bool,
    /// Settings that only one mode has.
    pub options: Options,
}

impl Settings {
    /// Settings from flags alone, or from a configuration document, whose mode a flag overrides.
    pub(crate) fn new(args: &SettingArgs, document: Option<&serde_json::Value>) -> Result<Self> {
        let mut warnings = Vec::new();
        let mut kube_proxy = match document {
            Some(document) => shunt_config::from_value(document, &mut warnings).context("settings")?,
            None => flags::configuration(args, &KubeProxyFlags::default()),
        };
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        if let Some(mode) = &args.mode {
            kube_proxy.mode.clone_from(mode);
        }
        Self::of(&kube_proxy, &ShuntConfiguration::default(), &args.modes).context("settings")
    }

    /// Settings from configurations.
    pub(crate) fn of(
        kube_proxy: &KubeProxyConfiguration,
        shunt: &ShuntConfiguration,
        modes: &ModeArgs,
    ) -> Result<Self> {
        let invalid = kube_proxy.validate();
        if !invalid.is_empty() {
            return Err(ConfigError::Invalid(invalid).into());
        }
        let named = shunt.mode.as_ref().unwrap_or(&kube_proxy.mode);
        let auto = matches!(named.as_str(), "" | "auto");
        let mode = if auto { shunt_modes::AUTO[0] } else { named.parse().context("mode")? };
        let of_mode = kube_proxy.of_mode();
        let ranges = parse_ranges(kube_proxy.cluster_cidr.split(','))?;
        let interface = |name: &str| name.into();
        let local_detector = match kube_proxy.detect_local_mode.as_str() {
            "BridgeInterface" => {
                LocalDetector::BridgeInterface(interface(&kube_proxy.detect_local.bridge_interface))
            }
            "InterfaceNamePrefix" => {
                LocalDetector::InterfaceNamePrefix(interface(&kube_proxy.detect_local.interface_name_prefix))
            }
            "NodeCIDR" => LocalDetector::None,
            _ if ranges.is_empty() => LocalDetector::None,
            _ => LocalDetector::Cidr(ranges),
        };
        let of_modes = options(kube_proxy, shunt, modes)?;
        // KEP-5707: on by default until Kubernetes 1.40.
        let allow_external_ips =
            kube_proxy.feature_gates.get("AllowServiceExternalIPs").copied().unwrap_or(true);
        Ok(Self {
            mode,
            auto,
            config: Config {
                masquerade_all: of_mode.masquerade_all,
                masquerade_bit: of_mode.masquerade_bit.and_then(|b| u8::try_from(b).ok()).unwrap_or(14),
                local_detector,
                node_port_addresses: node_ports(kube_proxy.node_port_addresses.as_deref())?,
                allow_external_ips,
                scheduler: scheduler(&kube_proxy.ipvs.scheduler),
                external_algorithm: external_algorithm(shunt, modes),
                localhost_node_ports: mode == Mode::Iptables
                    && kube_proxy.iptables.localhost_node_ports.unwrap_or(true),
                drop_invalid: mode == Mode::Iptables && !kube_proxy.conntrack.tcp_be_liberal,
                keep_listed: mode == Mode::Ebpf && of_modes.ebpf.destroy_sockets,
            },
            detect_by_node_cidr: kube_proxy.detect_local_mode == "NodeCIDR",
            min_sync_period: shunt.min_sync_period.unwrap_or(of_mode.min_sync_period).to_std(),
            sync_period: of_mode.sync_period.to_std(),
            resync_period: shunt.resync_period.to_std(),
            hostname_override: node_name(&kube_proxy.hostname_override),
            bind_address: kube_proxy.bind_address.parse().ok().filter(|a: &IpAddr| !a.is_unspecified()),
            healthz_bind_address: socket_address(&kube_proxy.healthz_bind_address)?,
            metrics_bind_address: socket_address(&kube_proxy.metrics_bind_address)?,
            bind_address_hard_fail: kube_proxy.bind_address_hard_fail,
            kubeconfig: Some(&kube_proxy.client_connection.kubeconfig)
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            oom_score_adj: kube_proxy.oom_score_adj,
            admin_socket: shunt.admin_socket.clone().unwrap_or_else(|| crate::cli::ADMIN_SOCKET.to_owned()),
            conntrack: sizing(&kube_proxy.conntrack, shunt.lower_sysctls),
            remove_leftovers: shunt.leftovers == Leftovers::Remove,
            options: of_modes,
        })
    }

    /// What the compiler needs, now that the Node object is known or not.
    pub(crate) fn config_for(&self, node: Option<&Node>) -> Config {
        let mut config = self.config.clone();
        if self.detect_by_node_cidr {
            config.local_detector = match node {
                Some(node) if !node.pod_cidrs.is_empty() => LocalDetector::Cidr(node.pod_cidrs.clone()),
                _ => LocalDetector::None,
            };
        }
        config
    }
}

/// A flag goes first.
fn external_algorithm(shunt: &ShuntConfiguration, modes: &ModeArgs) -> Algorithm {
    match (modes.ebpf_external_algorithm, shunt.ebpf.external_algorithm) {
        (Some(ExternalAlgorithm::Maglev), _) | (None, shunt_config::shunt::Algorithm::Maglev) => {
            Algorithm::Maglev
        }
        _ => Algorithm::Random,
    }
}

/// kube-proxy lets `mh` hash source ports too.
fn scheduler(name: &str) -> Option<Arc<Scheduler>> {
    (!name.is_empty()).then(|| Arc::new(Scheduler { name: name.into(), flags: [false, name == "mh", false] }))
}

fn options(
    kube_proxy: &KubeProxyConfiguration,
    shunt: &ShuntConfiguration,
    modes: &ModeArgs,
) -> Result<Options> {
    let mut options = modes.options(&shunt.ebpf);
    options.ipvs = ipvs(&kube_proxy.ipvs)?;
    if let Some(flavour) = &shunt.iptables_flavour {
        options.flavour = Some(flavour.parse().map_err(|error| anyhow!("iptablesFlavour: {error}"))?);
    }
    Ok(options)
}

fn ipvs(section: &shunt_config::types::Ipvs) -> Result<IpvsOptions> {
    let seconds = |time: shunt_config::Duration| u32::try_from(time.to_std().as_secs()).unwrap_or(u32::MAX);
    Ok(IpvsOptions {
        exclude_cidrs: parse_ranges(section.exclude_cidrs.iter().flatten().map(String::as_str))?,
        strict_arp: section.strict_arp,
        tcp_timeout: seconds(section.tcp_timeout),
        tcp_fin_timeout: seconds(section.tcp_fin_timeout),
        udp_timeout: seconds(section.udp_timeout),
    })
}

fn sizing(conntrack: &shunt_config::types::Conntrack, lower: bool) -> Sizing {
    let count = |n: Option<i32>| n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let time = |t: Option<shunt_config::Duration>| t.unwrap_or_default().to_std();
    Sizing {
        max_per_core: count(conntrack.max_per_core),
        min: count(conntrack.min),
        tcp_established: time(conntrack.tcp_established_timeout),
        tcp_close_wait: time(conntrack.tcp_close_wait_timeout),
        tcp_be_liberal: conntrack.tcp_be_liberal,
        udp: conntrack.udp_timeout.to_std(),
        udp_stream: conntrack.udp_stream_timeout.to_std(),
        lower,
    }
}

/// The name of a node as it is written somewhere; empty is none.
pub(crate) fn node_name(text: &str) -> Option<String> {
    Some(text.trim().to_lowercase()).filter(|name| !name.is_empty())
}

fn socket_address(text: &str) -> Result<Option<SocketAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| anyhow!("{text:?} is not an address and a port"))
}

fn parse_ranges<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>> {
    texts
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(|text| {
            let range: IpNet = text.parse().with_context(|| format!("{text:?} is no CIDR"))?;
            Ok(range.trunc())
        })
        .collect()
}

/// Without a list node ports answer on the node's primary addresses, in every mode. Words and ranges may be
/// mixed (kube-proxy 1.37); `all` is the longest.
fn node_ports(list: Option<&[String]>) -> Result<NodePortAddresses> {
    let list = list.unwrap_or_default();
    let has = |word: &str| list.iter().any(|item| item == word);
    if has("all") {
        return Ok(NodePortAddresses::All);
    }
    let mut ranges = Vec::new();
    for item in list {
        match item.as_str() {
            "primary" => {}
            "localhost" => ranges.extend(parse_ranges(["127.0.0.0/8", "::1/128"].into_iter())?),
            range => ranges.extend(parse_ranges([range].into_iter())?),
        }
    }
    Ok(match (ranges.is_empty(), has("primary")) {
        (true, _) => NodePortAddresses::Primary,
        (false, true) => NodePortAddresses::PrimaryAnd(ranges),
        (false, false) => NodePortAddresses::Ranges(ranges),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(document: &serde_json::Value) -> Settings {
        Settings::new(&SettingArgs::default(), Some(document)).unwrap()
    }

    #[test]
    fn the_section_of_the_mode_counts() {
        let settings = of(&json!({
            "mode": "nftables",
            "clusterCIDR": "10.0.0.0/8,fd00::/48",
            "iptables": { "masqueradeAll": true },
            "nftables": { "masqueradeBit": 3, "minSyncPeriod": "2s", "syncPeriod": "10s" },
            "someFieldOfTheFuture": 1,
        }));
        assert!(!settings.config.masquerade_all);
        assert_eq!(settings.config.masquerade_bit, 3);
        assert_eq!(settings.min_sync_period, Duration::from_secs(2));
        assert_eq!(settings.sync_period, Duration::from_secs(10));
        let LocalDetector::Cidr(ranges) = settings.config.local_detector else { panic!() };
        assert_eq!(ranges.len(), 2);
    }

    #[test]
    fn what_is_not_said_is_the_best_mode_without_a_pause() {
        let settings = of(&json!({}));
        assert!(settings.auto);
        assert_eq!(settings.min_sync_period, Duration::from_millis(1));
        assert_eq!(settings.sync_period, Duration::from_secs(30));
        assert_eq!(settings.healthz_bind_address.unwrap().to_string(), "0.0.0.0:10256");
        assert_eq!(settings.bind_address, None);
    }

    #[test]
    fn our_own_configuration_overrides() {
        let kube_proxy = KubeProxyConfiguration::with_defaults();
        let shunt = ShuntConfiguration {
            mode: Some("nftables".to_owned()),
            min_sync_period: Some(shunt_config::Duration::from_secs(3)),
            leftovers: Leftovers::Keep,
            ..ShuntConfiguration::default()
        };
        let settings = Settings::of(&kube_proxy, &shunt, &ModeArgs::default()).unwrap();
        assert!(!settings.auto && !settings.remove_leftovers);
        assert_eq!((settings.mode, settings.min_sync_period), (Mode::Nftables, Duration::from_secs(3)));
    }

    #[test]
    fn flags_of_ebpf_mode_override_its_section() {
        let kube_proxy = KubeProxyConfiguration::with_defaults();
        let ebpf = shunt_config::shunt::Ebpf {
            external_algorithm: shunt_config::shunt::Algorithm::Maglev,
            flows_max: Some(1000),
            clients_max: Some(2000),
            cgroup_root: Some("/file".to_owned()),
            udp_timeout: shunt_config::Duration::from_secs(30),
            destroy_sockets: true,
            ..Default::default()
        };
        let shunt = ShuntConfiguration { ebpf, ..ShuntConfiguration::default() };
        let flags = ModeArgs {
            cgroup_root: Some("/flag".into()),
            ebpf_flows_max: Some(3000),
            ebpf_destroy_sockets: Some(false),
            ebpf_external_algorithm: Some(ExternalAlgorithm::Random),
            ..ModeArgs::default()
        };
        let of = |flags: &ModeArgs| Settings::of(&kube_proxy, &shunt, flags).unwrap();
        let (file, both) = (of(&ModeArgs::default()), of(&flags));
        assert_eq!(file.config.external_algorithm, Algorithm::Maglev);
        assert_eq!(both.config.external_algorithm, Algorithm::Random);
        let of_nothing =
            Settings::of(&kube_proxy, &ShuntConfiguration::default(), &ModeArgs::default()).unwrap();
        // The compiler is only asked where the mode acts on it.
        assert!(!file.config.keep_listed);
        let ebpf = |settings: &Settings| settings.options.ebpf.clone();
        assert_eq!((ebpf(&file).flows, ebpf(&file).cgroup_root.clone()), (1000, Some("/file".into())));
        assert_eq!((ebpf(&both).flows, ebpf(&both).cgroup_root.clone()), (3000, Some("/flag".into())));
        let destroys = |settings: &Settings| settings.options.ebpf.destroy_sockets;
        assert_eq!([destroys(&file), destroys(&both), destroys(&of_nothing)], [true, false, false]);
        assert_eq!((ebpf(&both).clients, ebpf(&both).udp_timeout), (2000, 30));
        assert_eq!(ebpf(&file).endpoints, shunt_modes::EbpfOptions::default().endpoints);
    }

    #[test]
    fn external_ips_can_be_switched_off() {
        assert!(of(&json!({})).config.allow_external_ips);
        let off = of(&json!({ "featureGates": { "AllowServiceExternalIPs": false } }));
        assert!(!off.config.allow_external_ips);
    }

    #[test]
    fn a_flag_overrides_the_mode_of_a_document() {
        let args = SettingArgs { mode: Some("nftables".to_owned()), ..SettingArgs::default() };
        let settings = Settings::new(&args, Some(&json!({ "mode": "ipvs" }))).unwrap();
        assert_eq!((settings.mode, settings.auto), (Mode::Nftables, false));
    }

    #[test]
    fn node_ports_answer_on_primary_addresses_unless_told_otherwise() {
        let of = |list| of(&json!({ "nodePortAddresses": list })).config.node_port_addresses;
        let ranges =
            |texts: &[&str]| NodePortAddresses::Ranges(texts.iter().map(|t| t.parse().unwrap()).collect());
        assert_eq!(of(json!(null)), NodePortAddresses::Primary);
        assert_eq!(of(json!([])), NodePortAddresses::Primary);
        assert_eq!(of(json!(["primary"])), NodePortAddresses::Primary);
        assert_eq!(of(json!(["all"])), NodePortAddresses::All);
        assert_eq!(of(json!(["primary", "all"])), NodePortAddresses::All);
        assert_eq!(of(json!(["primary", "primary"])), NodePortAddresses::Primary);
        let mixed = |texts: &[&str]| {
            NodePortAddresses::PrimaryAnd(texts.iter().map(|t| t.parse().unwrap()).collect())
        };
        assert_eq!(of(json!(["192.168.0.0/24", "primary"])), mixed(&["192.168.0.0/24"]));
        assert_eq!(of(json!(["primary", "localhost"])), mixed(&["127.0.0.0/8", "::1/128"]));
        assert_eq!(of(json!(["192.168.0.0/24"])), ranges(&["192.168.0.0/24"]));
        assert_eq!(
            of(json!(["localhost", "192.168.0.0/24"])),
            ranges(&["127.0.0.0/8", "::1/128", "192.168.0.0/24"])
        );
    }
}
