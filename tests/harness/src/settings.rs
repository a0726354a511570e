//! What a case's `KubeProxyConfiguration` says to the compiler.
//!
//! The agent has rules of its own for a whole configuration; a case needs these few fields.

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use shunt_core::node::{Config, LocalDetector, NodePortAddresses};
use shunt_mode::Mode;

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
struct Document {
    detect_local_mode: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    node_port_addresses: Option<Vec<String>>,
    iptables: Section,
    nftables: Section,
}

#[derive(Deserialize, Debug, Default)]
#[serde(rename_all = "camelCase", default)]
struct Section {
    masquerade_all: bool,
    masquerade_bit: Option<u8>,
}

/// The compiler's settings for a mode.
pub fn config(document: &Value, mode: Mode) -> Result<Config> {
    let document: Document = serde_json::from_value(document.clone()).context("KubeProxyConfiguration")?;
    let section = match mode {
        Mode::Iptables | Mode::Ipvs => &document.iptables,
        Mode::Nftables | Mode::Ebpf => &document.nftables,
    };
    let local_detector = match document.detect_local_mode.as_str() {
        "" | "ClusterCIDR" => {
            let texts = document.cluster_cidr.split(',').map(str::trim).filter(|t| !t.is_empty());
            let ranges = nets("clusterCIDR", texts)?;
            if ranges.is_empty() { LocalDetector::None } else { LocalDetector::Cidr(ranges) }
        }
        other => bail!("detectLocalMode {other:?}: no case needs it yet"),
    };
    // kube-proxy's defaults: only in nftables mode is it the primary addresses.
    let by_default = match mode {
        Mode::Nftables | Mode::Ebpf => NodePortAddresses::Primary,
        Mode::Iptables | Mode::Ipvs => NodePortAddresses::All,
    };
    let node_port_addresses = match document.node_port_addresses.as_deref() {
        None | Some([]) => by_default,
        Some([word]) if word == "primary" => NodePortAddresses::Primary,
        Some(list) => NodePortAddresses::Ranges(nets("nodePortAddresses", list.iter().map(String::as_str))?),
    };
    Ok(Config {
        masquerade_all: section.masquerade_all,
        masquerade_bit: section.masquerade_bit.unwrap_or(14),
        local_detector,
        node_port_addresses,
        ..Config::default()
    })
}

fn nets<'a>(field: &str, texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>> {
    texts.map(|text| text.parse().with_context(|| format!("{field}: {text:?} is no CIDR"))).collect()
}
