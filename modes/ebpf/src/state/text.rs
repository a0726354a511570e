//! The state as text, one map entry a line, and as JSON.

use std::fmt::{self, Write as _};

use serde_json::{Value, json};
use shunt_core::id::Protocol;
use shunt_ebpf_abi::{
    Address, Endpoint, Frontend, FrontendKey, Group, Verdict, address_flags, endpoint_flags, frontend_flags,
    range_owner,
};

use super::{FamilyFlags, State};

/// Words for the bits of a number.
fn bits(flags: u32, words: &[(u32, &str)]) -> String {
    let words: Vec<&str> = words.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, word)| *word).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(" ") }
}

fn socket(address: Address, port: u16) -> std::net::SocketAddr {
    std::net::SocketAddr::new(address.into(), u16::from_be(port))
}

/// A frontend's key: `address:port/protocol`, `node:port/protocol` for node ports.
pub(crate) fn key_text(key: &FrontendKey) -> String {
    let protocol =
        Protocol::from_number(key.protocol).map_or_else(|| key.protocol.to_string(), |p| p.to_string());
    if key.address.is_unspecified() {
        format!("node:{}/{protocol}", u16::from_be(key.port))
    } else {
        format!("{}/{protocol}", socket(key.address, key.port))
    }
}

fn group_text(name: &str, group: Group) -> String {
    if group.count == 0 { String::new() } else { format!(" {name} {}+{}", group.base, group.count) }
}

fn verdict_text(verdict: Verdict) -> String {
    if verdict.is_forward() {
        let group = if verdict.is_local() { "local" } else { "cluster" };
        format!("{group}{}", if verdict.masquerades() { ",masquerade" } else { "" })
    } else if verdict == Verdict::REJECT {
        "reject".to_owned()
    } else {
        "drop".to_owned()
    }
}

/// A frontend's value.
pub(crate) fn frontend_text(frontend: &Frontend) -> String {
    let mut text = format!("service {}", frontend.service);
    text += &group_text("cluster", frontend.cluster);
    text += &group_text("local", frontend.local);
    for (class, verdict) in ["pod", "node", "other"].iter().zip(frontend.verdicts) {
        // Writing to a string does not fail.
        let _ = write!(text, " {class}={}", verdict_text(verdict));
    }
    if frontend.affinity != 0 {
        let _ = write!(text, " affinity {}s", frontend.affinity);
    }
    let words: [(u8, &str); 3] = [
        (frontend_flags::SOURCE_RANGES, " source-ranges"),
        (frontend_flags::ALLOW_OWN_SOURCE, " own-source"),
        (frontend_flags::MAGLEV, " maglev"),
    ];
    words.iter().filter(|(bit, _)| frontend.flags & bit != 0).for_each(|(_, word)| text += word);
    text
}

/// An endpoint's value.
pub(crate) fn endpoint_text(endpoint: &Endpoint) -> String {
    if endpoint.service == 0 {
        return format!("free, generation {}", endpoint.generation);
    }
    let words = [
        (endpoint_flags::CLUSTER.into(), "cluster"),
        (endpoint_flags::LOCAL.into(), "local"),
        (endpoint_flags::SERVING.into(), "serving"),
        (endpoint_flags::HERE.into(), "here"),
    ];
    format!(
        "{} service {} generation {}: {}",
        socket(endpoint.address, endpoint.port),
        endpoint.service,
        endpoint.generation,
        bits(endpoint.flags.into(), &words)
    )
}

/// What is known of an address.
pub(crate) fn address_text(flags: u32) -> String {
    bits(flags, &[(address_flags::CLUSTER_IP, "cluster-ip"), (address_flags::NODE_PORT, "node-ports")])
}

/// The owner of ranges.
pub(crate) fn owner_text(owner: u32) -> String {
    match owner {
        range_owner::PODS_V4 | range_owner::PODS_V6 => "pods".to_owned(),
        range_owner::SERVICE_CIDR_V4 | range_owner::SERVICE_CIDR_V6 => "service-cidrs".to_owned(),
        id => format!("service {id}"),
    }
}

fn ids_text(ids: &[u32]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    ids.join(" ")
}

/// A group, by its id among the Maglev tables.
pub(crate) fn maglev_text(group: u32) -> String {
    format!("service {} {}", group >> 1, if group & 1 == 0 { "cluster" } else { "local" })
}

impl State {
    /// A family's bits in the settings.
    pub(crate) fn flags_text(&self, flags: u32) -> String {
        let of = FamilyFlags::of(self.family);
        bits(
            flags,
            &[
                (of.all_local, "node-ports-all-local"),
                (of.pods_by_range, "pods-by-range"),
                (of.pods_by_interface, "pods-by-interface"),
                (of.service_cidrs, "service-cidrs"),
            ],
        )
    }

    /// Key and value of every entry, by map.
    fn entries(&self) -> Vec<(&'static str, Vec<(String, String)>)> {
        let config =
            [("flags".to_owned(), self.flags_text(self.flags))].into_iter().filter(|_| self.flags != 0);
        let pods = self.pods.iter().map(|pods| ("pods".to_owned(), pods.to_string()));
        let ranges = self.ranges.iter().flat_map(|(owner, ranges)| {
            ranges.iter().map(|range| (format!("{} {range}", owner_text(*owner)), "1".to_owned()))
        });
        vec![
            ("config", config.chain(pods).collect()),
            ("names", self.names.iter().map(|(id, name)| (id.to_string(), name.to_string())).collect()),
            ("frontends", self.frontends.iter().map(|(k, f)| (key_text(k), frontend_text(f))).collect()),
            ("slots", self.used_slots().map(|(number, id)| (number.to_string(), id.to_string())).collect()),
            ("endpoints", self.endpoints().map(|(id, e)| (id.to_string(), endpoint_text(e))).collect()),
            (
                "addresses",
                self.addresses.iter().map(|(a, flags)| (a.to_string(), address_text(*flags))).collect(),
            ),
            ("ranges", ranges.collect()),
            ("maglev", self.maglev.iter().map(|(group, ids)| (maglev_text(*group), ids_text(ids))).collect()),
        ]
    }

    /// The state for programs.
    pub fn json(&self) -> Value {
        let maps = self.entries().into_iter().map(|(map, entries)| {
            let entries = entries.into_iter().map(|(key, value)| (key, Value::from(value)));
            (map.to_owned(), Value::Object(entries.collect()))
        });
        json!({
            "family": self.family.to_string(),
            "installed": self.installed,
            "maps": Value::Object(maps.collect()),
        })
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let installed = if self.installed { "" } else { ", not installed" };
        writeln!(f, "# {}{installed}", self.family)?;
        for (map, entries) in self.entries() {
            for (key, value) in entries {
                writeln!(f, "{map} {key} = {value}")?;
            }
        }
        Ok(())
    }
}
