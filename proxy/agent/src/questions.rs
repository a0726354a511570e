//! Which packets `shunt explain` is asked about: flags and files become questions, questions become
//! packets of a node.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use shunt_core::compile::Compiler;
use shunt_core::explain::VerdictKind;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::table::SourceClass;
use shunt_core::walk::{Packet, source_class};

use crate::cli::ExplainArgs;
use crate::pods::{Directory, PodName};

/// Who sends a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Sender {
    /// Whoever has this address.
    Address(IpAddr),
    /// A pod, from its address of the destination's family.
    Pod(PodName),
    /// The node, from its primary address.
    Node,
    /// Somebody outside of the cluster.
    External,
}

/// A packet as it is asked about; only the node knows all of its addresses.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Question {
    /// Its name in the file.
    pub name: Option<String>,
    pub sender: Sender,
    pub interface: Option<String>,
    pub destination: SocketAddr,
    pub protocol: Protocol,
}

/// What somebody expects to become of a packet; what is left out is not compared.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Expect {
    pub verdict: Option<VerdictKind>,
    pub endpoints: Option<BTreeSet<SocketAddr>>,
    pub masquerade: Option<bool>,
}

/// A question and the answer that is expected, if any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Asked {
    pub question: Question,
    expect: Option<Expect>,
    /// For which modes it is expected; `None` for all.
    modes: Option<Vec<String>>,
}

impl Asked {
    /// The answer that is expected of a mode.
    pub(crate) fn expect(&self, mode: &str) -> Option<&Expect> {
        let applies = self.modes.as_ref().is_none_or(|modes| modes.iter().any(|m| m == mode));
        self.expect.as_ref().filter(|_| applies)
    }
}

/// One packet of a file. Other fields are for other readers.
#[derive(Deserialize)]
struct Entry {
    name: Option<String>,
    src: Option<String>,
    /// Says who sends the packet where no address does.
    src_kind: Option<String>,
    interface: Option<String>,
    dst: IpAddr,
    dport: u16,
    #[serde(default)]
    proto: Protocol,
    modes: Option<Vec<String>>,
    expect: Option<Expect>,
}

/// The questions of a command line.
pub(crate) fn of_arguments(args: &ExplainArgs) -> Result<Vec<Asked>> {
    if let Some(file) = &args.packets {
        return of_file(file);
    }
    let from = args.from.as_deref().unwrap_or_default();
    let sender = sender(from).context("--from")?;
    ensure!(
        sender != Sender::Node || args.from_interface.is_none(),
        "--from-interface: packets of the node itself come in by no interface"
    );
    let (destination, protocol) = destination(args.to.as_deref().unwrap_or_default()).context("--to")?;
    let interface = args.from_interface.clone();
    if let Some(name) = &interface {
        ensure!(
            !name.is_empty() && name.len() <= 15,
            "--from-interface: {name:?} is no interface name: want 1 to 15 characters"
        );
    }
    let question = Question { name: None, sender, interface, destination, protocol };
    Ok(vec![Asked { question, expect: None, modes: None }])
}

fn of_file(file: &Path) -> Result<Vec<Asked>> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("--packets: standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("--packets {}", file.display()))?;
    }
    let entries: Vec<Value> = serde_json::from_str(&text)
        .with_context(|| format!("--packets {}: want a JSON list of packets", file.display()))?;
    let of_entry = |(i, entry): (usize, Value)| {
        let name = entry["name"].as_str().map(|name| format!(" ({name:?})")).unwrap_or_default();
        asked(entry).with_context(|| format!("--packets {}: [{i}]{name}", file.display()))
    };
    entries.into_iter().enumerate().map(of_entry).collect()
}

fn asked(entry: Value) -> Result<Asked> {
    let entry: Entry = serde_json::from_value(entry)?;
    let sender = match (&entry.src, entry.src_kind.as_deref()) {
        (Some(src), _) => sender(src).context("src")?,
        (None, Some("node")) => Sender::Node,
        (None, Some("external")) => Sender::External,
        (None, _) => bail!("src: an address is missing"),
    };
    Ok(Asked {
        question: Question {
            name: entry.name,
            sender,
            interface: entry.interface,
            destination: SocketAddr::new(entry.dst, entry.dport),
            protocol: entry.proto,
        },
        expect: entry.expect,
        modes: entry.modes,
    })
}

fn sender(text: &str) -> Result<Sender> {
    match text {
        "node" => return Ok(Sender::Node),
        "external" => return Ok(Sender::External),
        _ => {}
    }
    let Some(pod) = text.strip_prefix("pod/") else {
        let address = text.trim_start_matches('[').trim_end_matches(']').parse();
        return Ok(Sender::Address(address.ok().with_context(|| {
            format!("{text:?} is none of an IP address, node, external, pod/ADDRESS, pod/NAME")
        })?));
    };
    if let Ok(address) = pod.parse() {
        return Ok(Sender::Address(address));
    }
    Ok(Sender::Pod(PodName::parse(pod)))
}

fn destination(text: &str) -> Result<(SocketAddr, Protocol)> {
    let (socket, protocol) = match text.split_once('/') {
        Some((socket, protocol)) => (socket, protocol.parse()?),
        None => (text, Protocol::Tcp),
    };
    let socket = socket.parse().ok().with_context(|| {
        format!("{text:?} is not ADDRESS:PORT[/PROTOCOL], such as 10.96.0.10:80 or [fd00::10]:53/udp")
    })?;
    Ok((socket, protocol))
}

impl Question {
    /// The pod that sends it, if it is named.
    pub(crate) fn pod(&self) -> Option<&PodName> {
        match &self.sender {
            Sender::Pod(pod) => Some(pod),
            _ => None,
        }
    }

    /// The packet that is meant, on the node that `compiler` compiles for.
    pub(crate) fn packet(&self, compiler: &Compiler, pods: &Directory<'_>) -> Result<Packet> {
        let destination = self.destination.ip();
        let mut packet = Packet {
            source: destination,
            interface: self.interface.clone(),
            destination,
            port: self.destination.port(),
            protocol: self.protocol,
        };
        let family = IpFamily::of(destination);
        packet.source = match &self.sender {
            Sender::Address(address) => *address,
            Sender::Pod(pod) => pods.address(pod, family)?,
            Sender::Node => {
                let node = &compiler.context().node_name;
                compiler.context().primary_address(family).with_context(|| {
                    format!("no {family} address of node {node:?} is known: give an address instead")
                })?
            }
            Sender::External => outsider(compiler, &packet).with_context(|| {
                format!("no documentation address of {family} is off-cluster here: give an address instead")
            })?,
        };
        ensure!(
            IpFamily::of(packet.source) == family,
            "the source {} and the destination {destination} are not of one family",
            packet.source
        );
        Ok(packet)
    }
}

/// A documentation address that is neither a pod's nor the node's nor a Service's.
fn outsider(compiler: &Compiler, packet: &Packet) -> Option<IpAddr> {
    let family = IpFamily::of(packet.destination);
    let table = compiler.table(family);
    let taken: BTreeSet<IpAddr> = table.frontends().filter_map(|(_, entry)| entry.frontend.address).collect();
    (1..=254_u8)
        .map(|last| match family {
            IpFamily::V4 => IpAddr::from(Ipv4Addr::new(203, 0, 113, last)),
            IpFamily::V6 => IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, last.into())),
        })
        .find(|address| {
            let packet = Packet { source: *address, ..packet.clone() };
            !taken.contains(address) && source_class(table, &packet) == SourceClass::Other
        })
}
