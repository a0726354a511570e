//! The table as text: what `shunt dump` prints and what goldens hold. Equal tables print equal text.

use std::fmt;

use super::{ForwardingTable, NodeFacts, NodePortMatch, ServiceEntry};
use crate::node::LocalDetector;
use crate::service::Algorithm;

impl fmt::Display for ForwardingTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {}", self.family)?;
        writeln!(f, "  {}", self.node)?;
        if !self.service_cidrs.is_empty() {
            let ranges: Vec<_> = self.service_cidrs.iter().map(ToString::to_string).collect();
            writeln!(f, "  service-cidrs {}", ranges.join(", "))?;
        }
        for service in self.services.values() {
            write!(f, "{}", self.display_service(service))?;
        }
        Ok(())
    }
}

impl fmt::Display for NodeFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.local_detector {
            LocalDetector::None => f.write_str("detect-local none")?,
            LocalDetector::Cidr(ranges) => {
                let ranges: Vec<_> = ranges.iter().map(ToString::to_string).collect();
                write!(f, "detect-local cidr {}", ranges.join(", "))?;
            }
            LocalDetector::BridgeInterface(name) => write!(f, "detect-local bridge {name}")?,
            LocalDetector::InterfaceNamePrefix(name) => write!(f, "detect-local interface {name}*")?,
        }
        if self.masquerade_all {
            f.write_str("; masquerade-all")?;
        }
        if self.localhost_node_ports {
            f.write_str("; node-ports on 127.0.0.0/8")?;
        }
        if self.drop_invalid {
            f.write_str("; drop invalid")?;
        }
        match &self.node_ports {
            NodePortMatch::AllLocal => f.write_str("; node-ports on all local addresses"),
            NodePortMatch::Addresses(a) if a.is_empty() => f.write_str("; node-ports nowhere"),
            NodePortMatch::Addresses(a) => {
                let a: Vec<_> = a.iter().map(ToString::to_string).collect();
                write!(f, "; node-ports on {}", a.join(", "))
            }
        }
    }
}

impl ForwardingTable {
    /// What one Service contributes, as text.
    pub fn display_service<'a>(&'a self, service: &'a ServiceEntry) -> impl fmt::Display + 'a {
        DisplayService { table: self, service }
    }
}

struct DisplayService<'a> {
    table: &'a ForwardingTable,
    service: &'a ServiceEntry,
}

impl fmt::Display for DisplayService<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(port) = self.service.health_check_node_port {
            writeln!(f, "service {} health check node port {port}", self.service.name)?;
        }
        for port in &self.service.ports {
            write!(f, "service {}", port.name)?;
            if let Some(timeout) = port.affinity {
                write!(f, " affinity {}s", timeout.as_secs())?;
            }
            f.write_str("\n")?;
            for entry in &port.frontends {
                write!(f, "  {} {}:", entry.kind, entry.frontend)?;
                let held = self.table.frontend(&entry.frontend).is_some_and(|(p, _)| p.name == port.name);
                if !held {
                    f.write_str(" (held by another Service)")?;
                }
                let [pod, node, other] = entry.verdicts;
                if pod == node && node == other {
                    write!(f, " {pod}")?;
                } else {
                    write!(f, " pod {pod}; node {node}; other {other}")?;
                }
                if let Some(guard) = &entry.source_ranges {
                    let ranges: Vec<_> = guard.ranges.iter().map(ToString::to_string).collect();
                    let vip = if guard.allow_vip_source { ", or the VIP itself" } else { "" };
                    write!(f, "; only from {}{vip}", ranges.join(", "))?;
                }
                if entry.algorithm == Algorithm::Maglev {
                    f.write_str("; maglev")?;
                }
                f.write_str("\n")?;
            }
            for (name, group) in [("cluster", &port.cluster), ("local", &port.local)] {
                let Some(group) = group else { continue };
                let targets: Vec<_> = group
                    .iter()
                    .map(|t| if t.local { format!("{t} (here)") } else { t.to_string() })
                    .collect();
                let targets = if targets.is_empty() { "none".to_owned() } else { targets.join(", ") };
                writeln!(f, "  {name} endpoints: {targets}")?;
            }
            if !port.terminating.is_empty() {
                let targets: Vec<_> = port.terminating.iter().map(ToString::to_string).collect();
                writeln!(f, "  terminating endpoints: {}", targets.join(", "))?;
            }
        }
        Ok(())
    }
}
