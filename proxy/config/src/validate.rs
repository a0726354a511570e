//! Which values make no sense: kube-proxy's checks with its messages
//! (`pkg/proxy/apis/config/validation/validation.go`), for the values that it does not have, our own.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::Duration;
use crate::shunt::ShuntConfiguration;
use crate::types::{Conntrack, Ipvs, KubeProxyConfiguration};

/// One value that makes no sense, printed as Kubernetes prints it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invalid {
    /// Path of the field, as kube-proxy names it.
    pub field: String,
    /// The value as it is shown.
    pub value: String,
    /// What is wrong with it.
    pub message: String,
    /// It is none of a list of values.
    unsupported: bool,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.unsupported { "Unsupported" } else { "Invalid" };
        write!(f, "{}: {what} value: {}: {}", self.field, self.value, self.message)
    }
}

/// What can be written as `mode`.
const MODES: [&str; 6] = ["auto", "ebpf", "iptables", "ipvs", "nftables", ""];
const LOCAL_MODES: [&str; 5] = ["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix", ""];
/// Schedulers of the kernel's IPVS.
const SCHEDULERS: [&str; 15] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "twos", ""];
/// Longest name of an interface (`IFNAMSIZ` less the final zero).
const INTERFACE_MAX: usize = 15;
const NOT_NEGATIVE: &str = "must be greater than or equal to 0";
const POSITIVE: &str = "must be greater than 0";
const DUAL_STACK: &str =
    "must be a either a single CIDR or dual-stack pair of CIDRs (e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]";

#[derive(Default)]
struct Problems(Vec<Invalid>);

impl Problems {
    fn add(&mut self, field: &str, value: impl fmt::Display, message: impl Into<String>) {
        self.0.push(Invalid {
            field: format!("KubeProxyConfiguration.{field}"),
            value: value.to_string(),
            message: message.into(),
            unsupported: false,
        });
    }

    fn text(&mut self, field: &str, value: &str, message: impl Into<String>) {
        self.add(field, format!("{value:?}"), message);
    }

    fn not_negative(&mut self, field: &str, value: Duration) {
        if value < Duration::ZERO {
            self.add(field, value, NOT_NEGATIVE);
        }
    }
}

impl KubeProxyConfiguration {
    /// Everything that is wrong with a defaulted configuration.
    pub fn validate(&self) -> Vec<Invalid> {
        let mut problems = Problems::default();
        let p = &mut problems;
        masquerade_bit(p, "KubeProxyIPTablesConfiguration", self.iptables.masquerade_bit);
        match self.mode.as_str() {
            "ipvs" => ipvs(p, &self.ipvs),
            "nftables" | "ebpf" => {
                masquerade_bit(p, "KubeProxyNFTablesConfiguration", self.nftables.masquerade_bit);
            }
            _ => {}
        }
        conntrack(p, &self.conntrack);
        if let Some(score) = self.oom_score_adj.filter(|s| !(-1000..=1000).contains(s)) {
            p.add("KubeProxyLinuxConfiguration.OOMScoreAdj", score, "must be within the range [-1000, 1000]");
        }
        if !MODES.contains(&self.mode.as_str()) {
            p.text(
                "Mode.ProxyMode",
                &self.mode,
                format!(
                    "must be {} or blank (blank means the best-available proxy)",
                    MODES.into_iter().filter(|m| !m.is_empty()).collect::<Vec<_>>().join(", ")
                ),
            );
        }
        if self.client_connection.burst < 0 {
            p.add("ClientConnection.Burst", self.client_connection.burst, NOT_NEGATIVE);
        }
        self.periods(p);
        if self.bind_address.parse::<IpAddr>().is_err() {
            p.text("BindAddress", &self.bind_address, "not a valid textual representation of an IP address");
        }
        for (field, address) in [
            ("HealthzBindAddress", &self.healthz_bind_address),
            ("MetricsBindAddress", &self.metrics_bind_address),
        ] {
            host_port(p, field, address);
        }
        if !is_port_range(&self.port_range) {
            p.text("PortRange", &self.port_range, "must be a valid port range (e.g. 300-2000)");
        }
        self.node_port_addresses(p);
        self.detect_local(p);
        if !matches!(self.logging.format.as_str(), "text" | "json") {
            p.text("logging.format", &self.logging.format, "Unsupported log format");
        }
        problems.0
    }

    fn periods(&self, p: &mut Problems) {
        if self.config_sync_period <= Duration::ZERO {
            p.add("ConfigSyncPeriod", self.config_sync_period, POSITIVE);
        }
        let of_mode = self.of_mode();
        if of_mode.sync_period <= Duration::ZERO {
            p.add("SyncPeriod", of_mode.sync_period, POSITIVE);
        }
        p.not_negative("MinSyncPeriod", of_mode.min_sync_period);
        if of_mode.min_sync_period > of_mode.sync_period {
            p.add(
                "SyncPeriod",
                of_mode.min_sync_period,
                "must be greater than or equal to KubeProxyConfiguration.MinSyncPeriod",
            );
        }
    }

    fn node_port_addresses(&self, p: &mut Problems) {
        let list = self.node_port_addresses.as_deref().unwrap_or_default();
        for (i, item) in list.iter().enumerate() {
            let field = format!("NodePortAddresses[{i}]");
            match item.as_str() {
                "primary" | "all" | "localhost" => {}
                cidr if cidr.parse::<IpNet>().is_err() => p.text(&field, item, "must be a valid CIDR"),
                _ => {}
            }
        }
    }

    fn detect_local(&self, p: &mut Problems) {
        let mode = self.detect_local_mode.as_str();
        if !LOCAL_MODES.contains(&mode) {
            let values = LOCAL_MODES.map(|m| format!("{m:?}")).join(", ");
            p.text("DetectLocalMode", mode, format!("supported values: {values}"));
            if let Some(last) = p.0.last_mut() {
                last.unsupported = true;
            }
        }
        match mode {
            "BridgeInterface" => {
                interface(p, "DetectLocalConfiguration.InterfaceName", &self.detect_local.bridge_interface);
            }
            "InterfaceNamePrefix" => {
                let prefix = &self.detect_local.interface_name_prefix;
                interface(p, "DetectLocalConfiguration.InterfacePrefix", prefix);
            }
            "" | "ClusterCIDR" if !self.cluster_cidr.is_empty() => self.cluster_cidrs(p),
            _ => {}
        }
    }

    fn cluster_cidrs(&self, p: &mut Problems) {
        let field = "DetectLocalConfiguration.ClusterCIDRs";
        let texts: Vec<&str> = self.cluster_cidr.split(',').map(str::trim).collect();
        let shown = || {
            format!("[]string{{{}}}", texts.iter().map(|t| format!("{t:?}")).collect::<Vec<_>>().join(", "))
        };
        if texts.len() > 2 {
            p.add(field, shown(), DUAL_STACK);
            return;
        }
        let mut families = Vec::new();
        for (i, text) in texts.iter().enumerate() {
            match text.parse::<IpNet>() {
                Ok(range) => families.push(range.addr().is_ipv4()),
                Err(_) => p.text(
                    &format!("{field}[{i}]"),
                    text,
                    "must be a valid CIDR block (e.g. 10.100.0.0/16 or fde4:8dba:82e1::/48)",
                ),
            }
        }
        if families.len() == 2 && families[0] == families[1] {
            p.add(field, shown(), DUAL_STACK);
        }
    }

    /// What is valid and yet has no effect here.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for (gate, on) in &self.feature_gates {
            if gate != "AllowServiceExternalIPs" {
                warnings.push(format!("featureGates: {gate}={on} means nothing here: ignored"));
            }
        }
        if self.enable_profiling {
            warnings.push("enableProfiling: there is no Go profiler here: ignored".to_owned());
        }
        if !self.logging.vmodule.is_empty() {
            warnings.push("logging.vmodule: there are no Go source files here: ignored".to_owned());
        }
        warnings
    }
}

/// Elements of the largest map.
const EBPF_SIZE_MAX: u32 = 4_194_304;

impl ShuntConfiguration {
    /// Everything that is wrong with it.
    pub fn validate(&self) -> Vec<Invalid> {
        let mut problems = Vec::new();
        let mut add = |field: &str, value: String, message: &str| {
            problems.push(Invalid {
                field: format!("ShuntConfiguration.{field}"),
                value,
                message: message.to_owned(),
                unsupported: false,
            });
        };
        if let Some(mode) = self.mode.as_ref().filter(|m| !MODES.contains(&m.as_str())) {
            add("mode", format!("{mode:?}"), "must be auto, ebpf, iptables, ipvs, nftables or blank");
        }
        let flavours = ["legacy", "nft"];
        if let Some(flavour) = self.iptables_flavour.as_deref().filter(|f| !flavours.contains(f)) {
            add("iptablesFlavour", format!("{flavour:?}"), "must be legacy or nft");
        }
        if let Some(period) = self.min_sync_period.filter(|p| *p < Duration::ZERO) {
            add("minSyncPeriod", period.to_string(), NOT_NEGATIVE);
        }
        if self.resync_period <= Duration::ZERO {
            add("resyncPeriod", self.resync_period.to_string(), POSITIVE);
        }
        let ebpf = &self.ebpf;
        for (field, size, least) in [
            ("ebpf.frontendsMax", ebpf.frontends_max, 64),
            ("ebpf.endpointsMax", ebpf.endpoints_max, 64),
            ("ebpf.flowsMax", ebpf.flows_max, 64),
            ("ebpf.clientsMax", ebpf.clients_max, 64),
            ("ebpf.maglevMax", ebpf.maglev_max, 1),
        ] {
            if let Some(size) = size.filter(|size| !(least..=EBPF_SIZE_MAX).contains(size)) {
                add(field, size.to_string(), &format!("must be within the range [{least}, {EBPF_SIZE_MAX}]"));
            }
        }
        for (field, time) in [
            ("ebpf.tcpTimeout", ebpf.tcp_timeout),
            ("ebpf.tcpTransientTimeout", ebpf.tcp_transient_timeout),
            ("ebpf.udpTimeout", ebpf.udp_timeout),
        ] {
            if time < Duration::from_secs(1) {
                add(field, time.to_string(), "must be at least 1s");
            }
        }
        problems
    }
}

fn masquerade_bit(p: &mut Problems, section: &str, bit: Option<i32>) {
    if let Some(bit) = bit.filter(|b| !(0..32).contains(b)) {
        p.add(&format!("{section}.MasqueradeBit"), bit, "must be within the range [0, 31]");
    }
}

fn ipvs(p: &mut Problems, ipvs: &Ipvs) {
    const AT: &str = "KubeProxyIPVSConfiguration";
    p.not_negative(&format!("{AT}.TCPTimeout"), ipvs.tcp_timeout);
    p.not_negative(&format!("{AT}.TCPFinTimeout"), ipvs.tcp_fin_timeout);
    p.not_negative(&format!("{AT}.UDPTimeout"), ipvs.udp_timeout);
    if !SCHEDULERS.contains(&ipvs.scheduler.as_str()) {
        p.text(
            &format!("{AT}.Scheduler.Scheduler"),
            &ipvs.scheduler,
            format!(
                "must be in [{}], blank means the default algorithm method (currently rr)",
                SCHEDULERS.join(" ")
            ),
        );
    }
    for (i, cidr) in ipvs.exclude_cidrs.iter().flatten().enumerate() {
        if cidr.parse::<IpNet>().is_err() {
            p.text(&format!("{AT}.ExcludeCidrs[{i}]"), cidr, "must be a valid CIDR");
        }
    }
}

fn conntrack(p: &mut Problems, conntrack: &Conntrack) {
    const AT: &str = "KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration";
    for (field, value) in [("MaxPerCore", conntrack.max_per_core), ("Min", conntrack.min)] {
        if let Some(value) = value.filter(|v| *v < 0) {
            p.add(&format!("{AT}.{field}"), value, NOT_NEGATIVE);
        }
    }
    for (field, value) in [
        ("TCPEstablishedTimeout", conntrack.tcp_established_timeout.unwrap_or_default()),
        ("TCPCloseWaitTimeout", conntrack.tcp_close_wait_timeout.unwrap_or_default()),
        ("UDPTimeout", conntrack.udp_timeout),
        ("UDPStreamTimeout", conntrack.udp_stream_timeout),
    ] {
        p.not_negative(&format!("{AT}.{field}"), value);
    }
}

fn interface(p: &mut Problems, field: &str, name: &str) {
    if name.is_empty() {
        p.text(field, name, "must not be empty");
    } else if name.len() > INTERFACE_MAX {
        p.text(field, name, format!("must not be longer than {INTERFACE_MAX} characters"));
    }
}

/// An address and a port; empty where the server is switched off.
fn host_port(p: &mut Problems, field: &str, text: &str) {
    if text.is_empty() {
        return;
    }
    let split = text.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.starts_with('['));
    let Some((host, port)) = split else {
        p.text(field, text, "must be IP:port");
        return;
    };
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if bare.parse::<IpAddr>().is_err() {
        p.text(field, bare, "must be a valid IP");
    }
    if !port.parse::<u16>().is_ok_and(|port| port > 0) {
        p.text(field, port, "must be a valid port");
    }
}

/// `utilnet.ParsePortRange`: nothing, `80`, `80-90`, `80+10`.
fn is_port_range(text: &str) -> bool {
    let text = text.trim();
    if text.is_empty() {
        return true;
    }
    let port = |t: &str| t.parse::<u16>().ok();
    if let Some((low, high)) = text.split_once('-') {
        return matches!((port(low), port(high)), (Some(low), Some(high)) if low <= high);
    }
    if let Some((low, more)) = text.split_once('+') {
        return matches!((port(low), port(more)), (Some(low), Some(more)) if low.checked_add(more).is_some());
    }
    port(text).is_some()
}
