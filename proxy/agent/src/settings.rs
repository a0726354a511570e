//! Flags and `KubeProxyConfiguration` become settings.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use serde::Deserialize;
use shunt_core::node::{Config, LocalDetector, Node, NodePortAddresses};
use shunt_mode::Mode;

use crate::cli::SettingArgs;

/// Everything that flags and configuration decide.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    pub mode: Mode,
    /// What the compiler needs. A `NodeCIDR` detector is only known with the Node object.
    pub config: Config,
    /// The pod ranges of the Node object say what is a local pod (`NodeCIDR`).
    pub detect_by_node_cidr: bool,
    /// Least time between two syncs; `None` for the mode's own.
    pub min_sync_period: Option<Duration>,
    /// Time between two looks whether our rules are still there; `None` for the default.
    pub sync_period: Option<Duration>,
    /// Most time between two looks at the whole kernel state.
    pub hostname_override: Option<String>,
}

/// The fields of `KubeProxyConfiguration` that are used. Durations are texts such as `30s`.
#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct KubeProxyConfiguration {
    mode: String,
    hostname_override: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: String,
    detect_local: DetectLocal,
    node_port_addresses: Option<Vec<String>>,
    feature_gates: BTreeMap<String, bool>,
    iptables: ModeSection,
    ipvs: ModeSection,
    nftables: ModeSection,
}

#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
struct DetectLocal {
    bridge_interface: String,
    interface_name_prefix: String,
}

#[derive(Deserialize, Clone, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
struct ModeSection {
    masquerade_bit: Option<u8>,
    masquerade_all: bool,
    localhost_node_ports: Option<bool>,
    min_sync_period: Option<String>,
    sync_period: Option<String>,
}

impl Settings {
    /// Settings from flags alone, or from a configuration document, which then wins over flags
    /// (kube-proxy's rule).
    pub(crate) fn new(args: &SettingArgs, document: Option<&serde_json::Value>) -> Result<Self> {
        match document {
            Some(document) => Self::from_document(document, args.mode.as_deref()),
            None => Self::from_document_parts(&Self::of_flags(args), None),
        }
        .context("settings")
    }

    fn of_flags(args: &SettingArgs) -> KubeProxyConfiguration {
        let section = ModeSection {
            masquerade_bit: args.iptables_masquerade_bit,
            masquerade_all: args.masquerade_all,
            localhost_node_ports: None,
            min_sync_period: None,
            sync_period: None,
        };
        let text = |t: &Option<String>| t.clone().unwrap_or_default();
        KubeProxyConfiguration {
            mode: text(&args.mode),
            hostname_override: String::new(),
            cluster_cidr: text(&args.cluster_cidr),
            detect_local_mode: text(&args.detect_local_mode),
            detect_local: DetectLocal {
                bridge_interface: text(&args.pod_bridge_interface),
                interface_name_prefix: text(&args.pod_interface_name_prefix),
            },
            node_port_addresses: (!args.node_port_addresses.is_empty())
                .then(|| args.node_port_addresses.clone()),
            feature_gates: BTreeMap::new(),
            iptables: section.clone(),
            ipvs: section.clone(),
            nftables: section,
        }
    }

    /// Settings from a configuration document. `mode` overrides the document's.
    pub(crate) fn from_document(document: &serde_json::Value, mode: Option<&str>) -> Result<Self> {
        let parsed: KubeProxyConfiguration =
            serde_json::from_value(document.clone()).context("KubeProxyConfiguration")?;
        Self::from_document_parts(&parsed, mode)
    }

    fn from_document_parts(document: &KubeProxyConfiguration, mode: Option<&str>) -> Result<Self> {
        let named = match mode {
            Some(mode) => mode,
            None => &document.mode,
        };
        let mode = if named.is_empty() { Mode::Nftables } else { named.parse().context("mode")? };
        let section = match mode {
            Mode::Iptables => &document.iptables,
            Mode::Ipvs => &document.ipvs,
            Mode::Nftables | Mode::Ebpf => &document.nftables,
        };
        let masquerade_bit = section.masquerade_bit.unwrap_or(14);
        ensure!(masquerade_bit < 32, "masqueradeBit: {masquerade_bit} is not in 0 to 31");
        let ranges = parse_ranges("clusterCIDR", document.cluster_cidr.split(','))?;
        let mut detect_by_node_cidr = false;
        let local_detector = match document.detect_local_mode.as_str() {
            "" | "ClusterCIDR" if ranges.is_empty() => LocalDetector::None,
            "" | "ClusterCIDR" => LocalDetector::Cidr(ranges),
            "NodeCIDR" => {
                detect_by_node_cidr = true;
                LocalDetector::None
            }
            "BridgeInterface" => LocalDetector::BridgeInterface(
                interface("detectLocal.bridgeInterface", &document.detect_local.bridge_interface)?.into(),
            ),
            "InterfaceNamePrefix" => LocalDetector::InterfaceNamePrefix(
                interface("detectLocal.interfaceNamePrefix", &document.detect_local.interface_name_prefix)?
                    .into(),
            ),
            other => bail!(
                "detectLocalMode: unknown {other:?}: want ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix"
            ),
        };
        let period = |field, text: &Option<String>| {
            text.as_deref().map(|text| parse_duration(text).context(field)).transpose()
        };
        let min_sync_period = period("minSyncPeriod", &section.min_sync_period)?;
        // kube-proxy takes 0 for its default.
        let sync_period = period("syncPeriod", &section.sync_period)?.filter(|period| !period.is_zero());
        Ok(Self {
            mode,
            config: Config {
                masquerade_all: section.masquerade_all,
                masquerade_bit,
                local_detector,
                node_port_addresses: node_ports(document.node_port_addresses.as_deref())?,
                // KEP-5707: on by default until Kubernetes 1.40.
                allow_external_ips: document
                    .feature_gates
                    .get("AllowServiceExternalIPs")
                    .copied()
                    .unwrap_or(true),
                localhost_node_ports: mode == Mode::Iptables && section.localhost_node_ports.unwrap_or(true),
            },
            detect_by_node_cidr,
            min_sync_period,
            sync_period,
            hostname_override: Some(document.hostname_override.trim().to_lowercase())
                .filter(|name| !name.is_empty()),
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

fn interface<'a>(field: &str, name: &'a str) -> Result<&'a str> {
    ensure!(!name.is_empty(), "{field}: an interface name is needed");
    ensure!(name.len() <= 15, "{field}: {name:?} is longer than 15 characters");
    Ok(name)
}

fn parse_ranges<'a>(field: &str, texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>> {
    texts
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(|text| {
            let range: IpNet = text.parse().with_context(|| format!("{field}: {text:?} is no CIDR"))?;
            Ok(range.trunc())
        })
        .collect()
}

/// Without a list node ports answer on the node's primary addresses, in every mode.
fn node_ports(list: Option<&[String]>) -> Result<NodePortAddresses> {
    match list {
        None | Some([]) => Ok(NodePortAddresses::Primary),
        Some([word]) if word == "primary" => Ok(NodePortAddresses::Primary),
        Some([word]) if word == "all" => Ok(NodePortAddresses::All),
        Some(list) => {
            let ranges = parse_ranges("nodePortAddresses", list.iter().map(String::as_str))?;
            Ok(NodePortAddresses::Ranges(ranges))
        }
    }
}

/// Reads a duration as Go prints it: `1h2m3.5s`, `100ms`, `0`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration> {
    let mut rest = text.trim();
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    ensure!(!rest.is_empty(), "an empty text is no duration");
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest[..digits]
            .parse()
            .with_context(|| format!("{text:?} is no duration: want 30s, 1m30s, 100ms"))?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            unit => bail!("{text:?} is no duration: unknown unit {unit:?}"),
        };
        total += number * unit;
        rest = &rest[letters..];
    }
    Duration::try_from_secs_f64(total).with_context(|| format!("{text:?} is no duration"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn durations_are_read_as_go_prints_them() {
        assert_eq!(parse_duration("1h2m3.5s").unwrap(), Duration::from_millis(3_723_500));
        assert_eq!(parse_duration("100ms").unwrap(), Duration::from_millis(100));
        assert_eq!(parse_duration("0").unwrap(), Duration::ZERO);
        for bad in ["", "5", "5x", "s", "-1s", "1e400s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_section_of_the_mode_counts() {
        let document = json!({
            "mode": "nftables",
            "clusterCIDR": "10.0.0.0/8,fd00::/48",
            "iptables": { "masqueradeAll": true },
            "nftables": { "masqueradeBit": 3, "minSyncPeriod": "2s", "syncPeriod": "10s" },
            "someFieldOfTheFuture": 1,
        });
        let settings = Settings::from_document(&document, None).unwrap();
        assert!(!settings.config.masquerade_all);
        assert_eq!(settings.config.masquerade_bit, 3);
        assert_eq!(settings.min_sync_period, Some(Duration::from_secs(2)));
        assert_eq!(settings.sync_period, Some(Duration::from_secs(10)));
        let LocalDetector::Cidr(ranges) = settings.config.local_detector else { panic!() };
        assert_eq!(ranges.len(), 2);
    }

    #[test]
    fn external_ips_can_be_switched_off() {
        let of = |document| Settings::from_document(&document, None).unwrap().config.allow_external_ips;
        assert!(of(json!({})));
        assert!(!of(json!({ "featureGates": { "AllowServiceExternalIPs": false } })));
    }

    #[test]
    fn errors_name_the_field() {
        for (document, field) in [
            (json!({ "clusterCIDR": "10.0.0.0/33" }), "clusterCIDR"),
            (json!({ "mode": "userspace" }), "mode"),
            (json!({ "detectLocalMode": "BridgeInterface" }), "detectLocal.bridgeInterface"),
            (json!({ "nodePortAddresses": ["10.0.0.1"] }), "nodePortAddresses"),
            (json!({ "nftables": { "masqueradeBit": 32 } }), "masqueradeBit"),
        ] {
            let error = format!("{:#}", Settings::from_document(&document, None).unwrap_err());
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn node_ports_answer_on_primary_addresses_unless_told_otherwise() {
        let of = |list| {
            let document = json!({ "nodePortAddresses": list });
            Settings::from_document(&document, None).unwrap().config.node_port_addresses
        };
        assert_eq!(of(json!(null)), NodePortAddresses::Primary);
        assert_eq!(of(json!([])), NodePortAddresses::Primary);
        assert_eq!(of(json!(["primary"])), NodePortAddresses::Primary);
        assert_eq!(of(json!(["all"])), NodePortAddresses::All);
        assert_eq!(
            of(json!(["192.168.0.0/24"])),
            NodePortAddresses::Ranges(vec!["192.168.0.0/24".parse().unwrap()])
        );
    }
}
