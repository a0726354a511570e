//! The cases in `tests/cases`: objects in, packets and what becomes of them out.
//!
//! ```text
//!   NNN-name/ meta.json     which modes, what is known of the node
//!             input.yaml    Node, ServiceCIDR, Services, EndpointSlices, KubeProxyConfiguration
//!             packets.json  first packets of connections and their expected fate
//!             step1/ ...    the same after each change, where there are several
//! ```
//!
//! `tests/cases/README.md` says what the fields mean. This module must never decide what a Service
//! means; it only reads.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::Config;
use shunt_core::store::Event;
use shunt_core::walk::{Outcome, Packet};
use shunt_mode::Mode;
use shunt_watch::read_manifests;

use crate::settings;

/// The node under test, in every case.
pub const NODE: &str = "test-node";

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Name of its folder.
    pub name: String,
    /// Modes for which its outcomes are claimed.
    pub modes: Vec<Mode>,
    /// What is claimed: `packet-flow` when somebody has run these packets.
    pub claim: String,
    /// Addresses of the node.
    pub node_ips: Vec<IpAddr>,
    /// Whether a new process takes over between the steps.
    pub restart_between_steps: bool,
    /// States of the cluster, one after the other.
    pub steps: Vec<Step>,
}

/// One state of the cluster.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its folder.
    pub folder: PathBuf,
    /// All objects.
    pub objects: Vec<Event>,
    /// What could not be used of them.
    pub problems: Vec<String>,
    /// The `KubeProxyConfiguration`.
    pub configuration: Value,
    /// Packets to send.
    pub packets: Vec<CasePacket>,
}

/// A packet with what should become of it.
#[derive(Clone, Debug)]
pub struct CasePacket {
    /// Its name within the step.
    pub name: String,
    /// Modes for which the outcome is claimed.
    pub modes: Vec<Mode>,
    /// What its source is.
    pub source_kind: SourceKind,
    /// The packet.
    pub packet: Packet,
    /// What should become of it.
    pub expect: Outcome,
}

/// What the source of a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// A pod.
    Pod,
    /// The node itself.
    Node,
    /// A process of the node that talks to itself.
    Loopback,
    /// A process of the node whose packet carries a load balancer's address.
    LbVip,
    /// Somebody outside of the cluster.
    External,
}

#[derive(Deserialize)]
struct Meta {
    modes: Vec<String>,
    claim: String,
    node_ips: Vec<IpAddr>,
    #[serde(default)]
    steps: Vec<String>,
    #[serde(default)]
    restart_between_steps: bool,
}

#[derive(Deserialize)]
struct PacketText {
    name: String,
    src: IpAddr,
    src_kind: SourceKind,
    dst: IpAddr,
    dport: u16,
    proto: Protocol,
    expect: ExpectText,
    modes: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct ExpectText {
    verdict: String,
    endpoints: Vec<SocketAddr>,
    masquerade: bool,
}

/// The folder of the cases.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cases")
}

/// All cases, by name; with `SHUNT_CASES=008,044` only those whose names contain one of these, for a
/// closer look. (Tests count what they did, so that they do not pass so.)
pub fn all() -> Result<Vec<Case>> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(folder())?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, std::io::Error>>()?;
    folders.retain(|path| path.join("meta.json").exists());
    if let Ok(wanted) = std::env::var("SHUNT_CASES") {
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        folders.retain(|path| wanted.split(',').any(|part| name(path).contains(part)));
    }
    folders.sort();
    ensure!(!folders.is_empty(), "no cases in {}", folder().display());
    folders.iter().map(|path| Case::read(path)).collect()
}

impl Case {
    /// Reads one case.
    pub fn read(folder: &Path) -> Result<Self> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self::read_named(folder, name.clone()).with_context(|| format!("case {name}"))
    }

    fn read_named(folder: &Path, name: String) -> Result<Self> {
        let meta: Meta = json(&folder.join("meta.json"))?;
        let modes = modes(&meta.modes)?;
        let folders = if meta.steps.is_empty() {
            vec![folder.to_owned()]
        } else {
            meta.steps.iter().map(|step| folder.join(step)).collect()
        };
        let steps = folders.into_iter().map(|folder| Step::read(folder, &modes));
        Ok(Self {
            name,
            claim: meta.claim,
            node_ips: meta.node_ips,
            restart_between_steps: meta.restart_between_steps,
            steps: steps.collect::<Result<_>>()?,
            modes,
        })
    }
}

impl Step {
    fn read(folder: PathBuf, modes: &[Mode]) -> Result<Self> {
        let input = folder.join("input.yaml");
        let manifests = read_manifests(&input, Some(NODE))?;
        let configuration = manifests
            .config
            .into_iter()
            .next()
            .with_context(|| format!("{}: no KubeProxyConfiguration", input.display()))?;
        let packets = folder.join("packets.json");
        let packets: Vec<PacketText> = if packets.exists() { json(&packets)? } else { Vec::new() };
        let packets = packets.into_iter().map(|packet| packet.typed(modes));
        Ok(Self {
            objects: manifests.events,
            problems: manifests.problems.iter().map(ToString::to_string).collect(),
            configuration: configuration.value,
            packets: packets.collect::<Result<_>>()?,
            folder,
        })
    }

    /// The compiler's settings for a mode.
    pub fn config(&self, mode: Mode) -> Result<Config> {
        settings::config(&self.configuration, mode)
    }

    /// One of its packets with what should become of it, for people.
    pub fn describe(&self, packet: &CasePacket) -> String {
        format!("{} {}: {}, expected {}", self.folder.display(), packet.name, packet.packet, packet.expect)
    }

    /// The events that lead here from the step before, in the order of an API server that is asked
    /// about one kind after the other.
    pub fn events_since(&self, before: Option<&Self>) -> Vec<Event> {
        let kept: BTreeSet<String> = self.objects.iter().filter_map(gone).map(|e| format!("{e:?}")).collect();
        let before = before.map(|step| step.objects.as_slice()).unwrap_or_default();
        let vanished = before.iter().filter_map(gone).filter(|gone| !kept.contains(&format!("{gone:?}")));
        vanished.chain(self.objects.iter().cloned()).collect()
    }

    /// The families in which some Service has an address.
    pub fn families(&self) -> BTreeSet<IpFamily> {
        let of_event = |event: &Event| match event {
            Event::Service(service) => service.cluster_ips.iter().copied().map(IpFamily::of).collect(),
            _ => Vec::new(),
        };
        self.objects.iter().flat_map(of_event).collect()
    }
}

/// The event that takes back what an event said.
fn gone(event: &Event) -> Option<Event> {
    match event {
        Event::Service(service) => Some(Event::ServiceGone(service.name.clone())),
        Event::Slice(slice) => Some(Event::SliceGone(slice.name.clone())),
        Event::Node(_) => Some(Event::NodeGone),
        Event::ServiceCidr(name, _) => Some(Event::ServiceCidrGone(name.clone())),
        _ => None,
    }
}

impl PacketText {
    fn typed(self, of_case: &[Mode]) -> Result<CasePacket> {
        let masquerade = self.expect.masquerade;
        let mut endpoints: Vec<_> = self.expect.endpoints.iter().map(|e| (*e, masquerade)).collect();
        endpoints.sort_unstable();
        let expect = match self.expect.verdict.as_str() {
            "forward" => Outcome::Forward(endpoints),
            "reject" => Outcome::Reject,
            "drop" => Outcome::Drop,
            other => {
                ensure!(other == "none", "packet {}: unknown verdict {other:?}", self.name);
                Outcome::None
            }
        };
        Ok(CasePacket {
            modes: self.modes.map_or_else(|| Ok(of_case.to_vec()), |m| modes(&m))?,
            source_kind: self.src_kind,
            packet: Packet {
                source: self.src,
                interface: None,
                destination: self.dst,
                port: self.dport,
                protocol: self.proto,
            },
            expect,
            name: self.name,
        })
    }
}

/// Packets mean in ebpf mode what they mean in nftables mode; upstream has no such mode to name.
fn modes(names: &[String]) -> Result<Vec<Mode>> {
    let mut modes = names.iter().map(|name| Ok(name.parse()?)).collect::<Result<Vec<Mode>>>()?;
    if modes.contains(&Mode::Nftables) {
        modes.push(Mode::Ebpf);
    }
    Ok(modes)
}

fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
