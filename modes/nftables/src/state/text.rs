//! The state as text: a file that `nft -f` loads.

use std::fmt;

use nft_netlink::{FieldType, MapData, Set, SetFlags, Verdict};
use shunt_core::id::IpFamily;
use shunt_core::table::Frontend;

use super::State;
use crate::affinity;
use crate::layout::{Endpoint, List, SetKey, TABLE, TABLE_COMMENT};

/// A frontend as an element's key in nft's words.
pub(crate) fn frontend_text(frontend: &Frontend) -> String {
    match frontend.address {
        Some(address) => format!("{address} . {} . {}", frontend.protocol, frontend.port),
        None => format!("{} . {}", frontend.protocol, frontend.port),
    }
}

/// An endpoint as an element's data in nft's words.
pub(crate) fn endpoint_text(endpoint: &Endpoint) -> String {
    format!("{} . {}", endpoint.address, endpoint.port)
}

/// Where a class leads, in nft's words.
pub(crate) fn verdict_text(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Goto(chain) => format!("goto {chain}"),
        other => other.to_string(),
    }
}

impl State {
    pub(super) fn elements_text(&self, set: SetKey) -> Vec<String> {
        let wants_address = matches!(set, SetKey::Services(_) | SetKey::Endpoints(_));
        let frontends = || self.frontends.iter().filter(|(f, _)| f.address.is_some() == wants_address);
        match set {
            SetKey::Services(_) | SetKey::NodePorts => frontends()
                .filter_map(|(f, held)| Some(format!("{} : {}", frontend_text(f), held.class?)))
                .collect(),
            SetKey::Endpoints(_) | SetKey::NodePortEndpoints => frontends()
                .flat_map(|(f, held)| {
                    List::ALL.into_iter().flat_map(move |list| {
                        held.list(list).iter().enumerate().filter_map(move |(i, slot)| {
                            let slot = slot.as_ref()?;
                            let number = list.base() as usize + i;
                            Some(format!("{} . {number} : {}", frontend_text(f), endpoint_text(slot)))
                        })
                    })
                })
                .collect(),
            SetKey::Classes => {
                self.classes.iter().map(|c| format!("{c} : {}", verdict_text(&self.leads_to(*c)))).collect()
            }
            SetKey::NodePortIps => self.node_port_ips.iter().map(ToString::to_string).collect(),
            SetKey::ClusterIps => self.cluster_ips.iter().map(ToString::to_string).collect(),
            SetKey::ServiceCidrs => self.service_cidrs.iter().map(ToString::to_string).collect(),
            SetKey::Hairpin => self
                .hairpins
                .iter()
                .map(|h| format!("{0} . {0} . {1} . {2}", h.address, h.protocol, h.port))
                .collect(),
            SetKey::Guarded => self.guarded.iter().map(frontend_text).collect(),
            SetKey::SourceRanges => self
                .sources
                .iter()
                .flat_map(|(f, ranges)| ranges.iter().map(|r| format!("{} . {r}", frontend_text(f))))
                .collect(),
            SetKey::Affinity => Vec::new(),
            SetKey::AffinityEndpoints => self
                .affinity
                .iter()
                .flat_map(|(id, a)| {
                    a.endpoints.iter().map(|((list, number), endpoint)| {
                        let key = affinity::classid(affinity::token_key(*id, *list, *number));
                        format!("{key} : {}", endpoint_text(endpoint))
                    })
                })
                .collect(),
            SetKey::AffinitySlots => self
                .affinity
                .iter()
                .flat_map(|(id, a)| List::ALL.map(|list| (*id, list, &a.slots[list as usize])))
                .flat_map(|(id, list, slots)| {
                    let with_number = slots.iter().zip(0_u32..).filter_map(|(n, i)| Some(((*n)?, i)));
                    with_number.map(move |(number, index)| choice_text(id, list, index, Some(number)))
                })
                .collect(),
        }
    }
}

/// A slot of a Service port with affinity as an element in nft's words; without data for `None`.
pub(crate) fn choice_text(id: u32, list: List, index: u32, number: Option<u32>) -> String {
    let key = format!("{} . {}", affinity::classid(affinity::id_part(id)), list.base() + index);
    match number {
        Some(number) => format!("{key} : {}", affinity::classid(affinity::token(id, number))),
        None => key,
    }
}

/// The type line of a set. A slot is declared by what makes it, which is how nft wants it where it
/// also is the key of a rule.
fn declaration_text(set: &Set, ip: &str) -> String {
    let words = |fields: &[FieldType]| {
        let words: Vec<String> = fields.iter().map(ToString::to_string).collect();
        words.join(" . ")
    };
    if set.key == [FieldType::ClassId, FieldType::Mark] {
        return "typeof meta priority . numgen random mod 65536 : meta priority".to_owned();
    }
    if set.key.last() == Some(&FieldType::Mark) {
        let address = if set.key.len() == 4 { format!("{ip} daddr . ") } else { String::new() };
        return format!(
            "typeof {address}meta l4proto . th dport . numgen random mod 65536 : {ip} daddr . th dport"
        );
    }
    match &set.data {
        None => format!("type {}", words(&set.key)),
        Some(MapData::Verdict) => format!("type {} : verdict", words(&set.key)),
        Some(MapData::Fields(data)) => format!("type {} : {}", words(&set.key), words(data)),
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ip = match self.family {
            IpFamily::V4 => "ip",
            IpFamily::V6 => "ip6",
        };
        if !self.exists {
            return writeln!(f, "# no table {ip} {TABLE}");
        }
        writeln!(f, "table {ip} {TABLE} {{")?;
        writeln!(f, "\tcomment \"{TABLE_COMMENT}\"")?;
        for set in &self.sets {
            let declaration = set.declaration(self.family);
            let word = if declaration.data.is_some() { "map" } else { "set" };
            writeln!(f, "\t{word} {set} {{\n\t\t{}", declaration_text(&declaration, ip))?;
            if declaration.flags.contains(SetFlags::INTERVAL) {
                writeln!(f, "\t\tflags interval")?;
            }
            if declaration.flags.contains(SetFlags::DYNAMIC) {
                writeln!(f, "\t\tflags dynamic,timeout")?;
            }
            if let Some(size) = declaration.size {
                writeln!(f, "\t\tsize {size}")?;
            }
            let elements = self.elements_text(*set);
            if !elements.is_empty() {
                writeln!(f, "\t\telements = {{\n\t\t\t{}\n\t\t}}", elements.join(",\n\t\t\t"))?;
            }
            writeln!(f, "\t}}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "\tchain {name} {{")?;
            if let Some(base) = &chain.base {
                writeln!(
                    f,
                    "\t\ttype {} hook {} priority {}; policy accept;",
                    base.kind, base.hook, base.priority
                )?;
            }
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        writeln!(f, "}}")?;
        for stray in &self.strays {
            writeln!(f, "# element of {} that is not ours: {}", stray.set, stray.key)?;
        }
        Ok(())
    }
}
