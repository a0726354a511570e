//! From the forwarding table to what the maps should hold. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use ipnet::IpNet;
use shunt_core::id::{IpFamily, NamespacedName, Protocol, ServicePortName};
use shunt_core::node::LocalDetector;
use shunt_core::service::{Algorithm, TrafficPolicy};
use shunt_core::table::{
    self, Change, ForwardingTable, Frontend, FrontendEntry, LocalEndpoint, NodePortMatch, PortEntry, Target,
};
use shunt_ebpf_abi::{Address, FrontendKey, Name, Verdict, address_flags, endpoint_flags, frontend_flags};

use crate::state::{FamilyFlags, frontend_key};

/// An endpoint that a Service port should have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Member {
    /// Address.
    pub address: Address,
    /// Port, network byte order.
    pub port: u16,
    /// Bits of [`endpoint_flags`].
    pub flags: u16,
}

/// What a Service port should get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Its protocol.
    pub protocol: Protocol,
    /// Its endpoints, by address and port.
    pub members: Vec<Member>,
    /// The groups, of the Cluster and of the Local policy, among which some frontend chooses by hash.
    pub maglev: [bool; 2],
    /// Sources that frontends with [`frontend_flags::SOURCE_RANGES`] let pass.
    pub ranges: BTreeSet<IpNet>,
}

/// What a frontend should get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Dispatch {
    /// Its Service port, a key of [`Desired::ports`].
    pub port: Arc<str>,
    /// Verdicts by class of source.
    pub verdicts: [Verdict; 3],
    /// Timeout of the session affinity in seconds; 0 for none.
    pub affinity: u32,
    /// Bits of [`frontend_flags`].
    pub flags: u8,
}

/// What the maps should hold, for the part of the table that a change touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Desired {
    /// The family.
    pub family: IpFamily,
    /// Everything is listed below: what is not listed should not be there.
    pub everything: bool,
    /// False when the table asks for nothing at all.
    pub active: bool,
    /// The family's bits in the settings.
    pub flags: u32,
    /// By which interface local pods are known: `bridge NAME` or `prefix NAME`.
    pub pods: Option<Arc<str>>,
    /// Service ports to which frontends in question belong, by name.
    pub ports: BTreeMap<Arc<str>, Port>,
    /// Frontends in question; `None` for one that should not be there.
    pub frontends: BTreeMap<FrontendKey, Option<Dispatch>>,
    /// What should be known of addresses in question; 0 for nothing.
    pub addresses: BTreeMap<Address, u32>,
    /// Ranges of local pods: all of them.
    pub pod_ranges: BTreeSet<IpNet>,
    /// Ranges of cluster IPs: all of them.
    pub service_cidrs: BTreeSet<IpNet>,
    /// Local endpoints in question, and whether they are there. With `everything`, the members say it.
    pub local_endpoints: BTreeMap<LocalEndpoint, bool>,
}

impl Desired {
    /// What a family should have that the table asks nothing for.
    fn nothing(family: IpFamily) -> Self {
        Self {
            family,
            everything: true,
            active: false,
            flags: 0,
            pods: None,
            ports: BTreeMap::new(),
            frontends: BTreeMap::new(),
            addresses: BTreeMap::new(),
            pod_ranges: BTreeSet::new(),
            service_cidrs: BTreeSet::new(),
            local_endpoints: BTreeMap::new(),
        }
    }
}

/// What the maps should hold for the part of `table` that `change` touches.
pub fn render(table: &ForwardingTable, change: &Change) -> Desired {
    let family = table.family();
    if table.is_empty() && table.service_cidrs().is_empty() {
        return Desired::nothing(family);
    }
    let mut desired = Desired {
        everything: change.everything,
        active: true,
        service_cidrs: table.service_cidrs().iter().map(IpNet::trunc).filter(is_plain).collect(),
        ..Desired::nothing(family)
    };
    settings(table, &mut desired);
    let node_ports = match &table.node().node_ports {
        NodePortMatch::AllLocal => BTreeSet::new(),
        NodePortMatch::Addresses(addresses) => addresses.clone(),
    };
    let address_bits = |ip| {
        let cluster_ip = if table.is_cluster_ip(ip) { address_flags::CLUSTER_IP } else { 0 };
        cluster_ip | if node_ports.contains(&ip) { address_flags::NODE_PORT } else { 0 }
    };
    if change.everything {
        for (port, entry) in table.frontends() {
            frontend(table, &entry.frontend, Some((port, entry)), &mut desired);
        }
        let addresses = table.cluster_ips().chain(node_ports.iter().copied());
        desired.addresses = addresses.map(|ip| (Address::from(ip), address_bits(ip))).collect();
    } else {
        for key in &change.frontends {
            frontend(table, key, table.frontend(key), &mut desired);
        }
        // The Service may be the first: nothing is there yet.
        let addresses = change.cluster_ips.iter().copied().chain(node_ports.iter().copied());
        desired.addresses = addresses.map(|ip| (Address::from(ip), address_bits(ip))).collect();
        let is_there = |e: &LocalEndpoint| (*e, table.is_local_endpoint(e));
        desired.local_endpoints = change.local_endpoints.iter().map(is_there).collect();
    }
    // A mapped address in the table of IPv6 would be one of IPv4 in the maps.
    desired.addresses.retain(|address, _| is_of(address, family));
    desired
}

fn is_of(address: &Address, family: IpFamily) -> bool {
    address.is_v4() == (family == IpFamily::V4) && !address.is_unspecified()
}

/// Ranges of mapped addresses hold no address that a packet of IPv6 can have.
fn is_plain(range: &IpNet) -> bool {
    !matches!(range, IpNet::V6(r) if r.prefix_len() >= 96 && r.addr().to_ipv4_mapped().is_some())
}

fn settings(table: &ForwardingTable, desired: &mut Desired) {
    let of = FamilyFlags::of(table.family());
    if !desired.service_cidrs.is_empty() {
        desired.flags |= of.service_cidrs;
    }
    if table.node().node_ports == NodePortMatch::AllLocal {
        desired.flags |= of.all_local;
    }
    match &table.node().local_detector {
        LocalDetector::None => {}
        LocalDetector::Cidr(ranges) => {
            desired.flags |= of.pods_by_range;
            desired.pod_ranges = ranges.iter().map(IpNet::trunc).filter(is_plain).collect();
        }
        LocalDetector::BridgeInterface(name) => {
            desired.flags |= of.pods_by_interface;
            desired.pods = Some(format!("bridge {name}").into());
        }
        LocalDetector::InterfaceNamePrefix(name) => {
            desired.flags |= of.pods_by_interface;
            desired.pods = Some(format!("prefix {name}").into());
        }
    }
}

fn frontend(
    table: &ForwardingTable,
    frontend: &Frontend,
    served: Option<(&PortEntry, &FrontendEntry)>,
    desired: &mut Desired,
) {
    let key = frontend_key(frontend, table.family());
    if frontend.address.is_some() && !is_of(&key.address, table.family()) {
        return;
    }
    let dispatch = served.map(|(port, entry)| {
        let name = label(&port.name);
        desired.ports.entry(name.clone()).or_insert_with(|| render_port(table, &port.name));
        let mut flags = 0;
        if let Some(ranges) = &entry.source_ranges {
            flags |= frontend_flags::SOURCE_RANGES;
            if ranges.allow_vip_source {
                flags |= frontend_flags::ALLOW_OWN_SOURCE;
            }
        }
        if entry.algorithm == Algorithm::Maglev {
            flags |= frontend_flags::MAGLEV;
        }
        let affinity = port.affinity.map_or(0, |t| u32::try_from(t.as_secs()).unwrap_or(u32::MAX).max(1));
        Dispatch { port: name, verdicts: entry.verdicts.map(verdict), affinity, flags }
    });
    desired.frontends.insert(key, dispatch);
}

const fn verdict(verdict: table::Verdict) -> Verdict {
    match verdict {
        table::Verdict::Forward { policy, masquerade } => {
            Verdict::forward(matches!(policy, TrafficPolicy::Local), masquerade)
        }
        table::Verdict::Reject => Verdict::REJECT,
        table::Verdict::Drop => Verdict::DROP,
    }
}

/// What a Service port should get. Two ports of one name are nothing that the API server lets pass; if
/// they are there, they share their endpoints.
fn render_port(table: &ForwardingTable, name: &ServicePortName) -> Port {
    let service = table.service(&name.service);
    let same = || service.into_iter().flat_map(|s| &s.ports).filter(|p| p.name == *name);
    let mut members: BTreeMap<(Address, u16), u16> = BTreeMap::new();
    for (policy, flag) in
        [(TrafficPolicy::Cluster, endpoint_flags::CLUSTER), (TrafficPolicy::Local, endpoint_flags::LOCAL)]
    {
        let group = same().map(|port| port.group(policy)).find(|group| !group.is_empty());
        for target in group.unwrap_or_default() {
            let address = Address::from(target.address);
            if is_of(&address, table.family()) {
                let flags = members.entry((address, target.port.to_be())).or_default();
                *flags |= flag | endpoint_flags::SERVING | here(table, name.protocol, target);
            }
        }
    }
    let leaving =
        same().flat_map(|port| port.terminating.iter()).map(|target| (target, endpoint_flags::SERVING));
    let listed = same().flat_map(|port| port.listed.iter()).map(|target| (target, 0));
    for (target, flag) in leaving.chain(listed) {
        let address = Address::from(target.address);
        if is_of(&address, table.family()) {
            let flags = members.entry((address, target.port.to_be())).or_default();
            *flags |= flag | here(table, name.protocol, target);
        }
    }
    let mut maglev = [false; 2];
    let hashing = same().flat_map(|port| &port.frontends).filter(|f| f.algorithm == Algorithm::Maglev);
    for verdict in hashing.flat_map(|entry| entry.verdicts).map(verdict).filter(|v| v.is_forward()) {
        maglev[usize::from(verdict.is_local())] = true;
    }
    let entries = same().flat_map(|port| &port.frontends);
    let ranges = entries.filter_map(|entry| entry.source_ranges.as_deref()).flat_map(|r| &r.ranges);
    Port {
        protocol: name.protocol,
        members: members
            .into_iter()
            .map(|((address, port), flags)| Member { address, port, flags })
            .collect(),
        maglev,
        ranges: ranges.map(IpNet::trunc).filter(is_plain).collect(),
    }
}

fn here(table: &ForwardingTable, protocol: Protocol, target: &Target) -> u16 {
    let endpoint = LocalEndpoint { address: target.address, protocol, port: target.port };
    if table.is_local_endpoint(&endpoint) { endpoint_flags::HERE } else { 0 }
}

/// The name of a Service port as the maps hold it. What the API server would not let pass is written as
/// `_` and the byte in hexadecimal.
pub fn label(port: &ServicePortName) -> Arc<str> {
    const MAX: usize = size_of::<Name>();
    let mut label = String::new();
    let escape = |label: &mut String, part: &str| {
        for byte in part.bytes() {
            if byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.' {
                label.push(char::from(byte));
            } else {
                // Writing to a string does not fail.
                let _ = write!(label, "_{byte:02x}");
            }
        }
    };
    escape(&mut label, &port.service.namespace);
    label.push('/');
    escape(&mut label, &port.service.name);
    if !port.port.is_empty() {
        label.push(':');
        escape(&mut label, &port.port);
    }
    let _ = write!(label, "/{}", port.protocol);
    if label.len() > MAX {
        let hash = label.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let end = format!("__{hash:016x}/{}", port.protocol);
        label.truncate(MAX - end.len());
        label += &end;
    }
    label.into()
}

/// The Service port of a [`label`]; `None` if that was shortened, or is none.
pub fn unlabel(label: &str) -> Option<ServicePortName> {
    let (rest, protocol) = label.rsplit_once('/')?;
    let (namespace, rest) = rest.split_once('/')?;
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    let plain = |part: &str| -> Option<String> {
        let mut bytes = Vec::new();
        let mut rest = part.bytes();
        while let Some(byte) = rest.next() {
            if byte == b'_' {
                let hex = [rest.next()?, rest.next()?];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?);
            } else {
                bytes.push(byte);
            }
        }
        String::from_utf8(bytes).ok()
    };
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = protocols.into_iter().find(|p| p.to_string() == protocol)?;
    let service = NamespacedName::new(plain(namespace)?, plain(name)?);
    Some(ServicePortName { service, port: plain(port)?.into(), protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_written() {
        for (name, port) in [("web", ""), ("web", "http"), ("a.b-c", "p_1:x/y"), ("\u{e9}", "A")] {
            let service = NamespacedName::new("ns", name);
            let port = ServicePortName { service, port: port.into(), protocol: Protocol::Udp };
            assert_eq!(unlabel(&label(&port)), Some(port));
        }
        let service = NamespacedName::new("ns", "x".repeat(300));
        let long = ServicePortName { service, port: "".into(), protocol: Protocol::Tcp };
        assert_eq!(unlabel(&label(&long)), None);
        assert_eq!(unlabel("prefix veth"), None);
    }
}
