//! kube-proxy's flags under their names, and the configuration that they mean.

// Doc comments here are help texts: backticks would be printed.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::Args;
use shunt_config::{Duration, KubeProxyConfiguration};

use crate::cli::{LogArgs, LogFormat, SettingArgs};

/// Flags of kube-proxy besides those in [`SettingArgs`] and [`LogArgs`]. With `--config`, they are
/// ignored (kube-proxy's rule).
#[derive(Args, Clone, PartialEq, Debug, Default)]
#[command(next_help_heading = "Flags of kube-proxy")]
pub(crate) struct KubeProxyFlags {
    /// Kubeconfig; without one, the pod's service account.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Feature gates, such as AllowServiceExternalIPs=false.
    #[arg(long, value_name = "NAME=BOOL[,...]", value_delimiter = ',', value_parser = gate)]
    pub feature_gates: Vec<(String, bool)>,
    /// Ignored: what is read from the API server is always JSON.
    #[arg(long, value_name = "TYPE")]
    pub kube_api_content_type: Option<String>,
    /// Ignored: four watches need no limit.
    #[arg(long, value_name = "N")]
    pub kube_api_burst: Option<i32>,
    /// Ignored, likewise.
    #[arg(long, value_name = "N")]
    pub kube_api_qps: Option<f32>,
    /// The node's primary address, if it is not that of the Node; nothing is bound to it.
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<String>,
    /// Where /healthz and /livez answer; empty for nowhere. Default: 0.0.0.0:10256.
    #[arg(long, value_name = "IP:PORT")]
    pub healthz_bind_address: Option<String>,
    /// Where /metrics answers; empty for nowhere. Default: 127.0.0.1:10249.
    #[arg(long, value_name = "IP:PORT")]
    pub metrics_bind_address: Option<String>,
    /// Exit when a port cannot be bound, instead of trying again.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub bind_address_hard_fail: Option<bool>,
    /// Ignored: there is no Go profiler here.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub profiling: Option<bool>,
    /// Ignored: no metrics are hidden here.
    #[arg(long, value_name = "VERSION")]
    pub show_hidden_metrics_for_version: Option<String>,
    /// Whether node ports answer on 127.0.0.0/8 in iptables mode.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub iptables_localhost_nodeports: Option<bool>,
    /// Health is judged by twice this time, in all modes but ipvs.
    #[arg(long, value_name = "DURATION")]
    pub iptables_sync_period: Option<Duration>,
    /// Least time between two syncs, in all modes but ipvs.
    #[arg(long, value_name = "DURATION")]
    pub iptables_min_sync_period: Option<Duration>,
    /// Health is judged by twice this time, in ipvs mode.
    #[arg(long, value_name = "DURATION")]
    pub ipvs_sync_period: Option<Duration>,
    /// Least time between two syncs, in ipvs mode.
    #[arg(long, value_name = "DURATION")]
    pub ipvs_min_sync_period: Option<Duration>,
    /// Scheduler of ipvs mode.
    #[arg(long, value_name = "NAME")]
    pub ipvs_scheduler: Option<String>,
    /// Virtual servers in these ranges are not cleaned up in ipvs mode.
    #[arg(long, value_name = "CIDR[,CIDR...]", value_delimiter = ',')]
    pub ipvs_exclude_cidrs: Vec<String>,
    /// Sets arp_ignore and arp_announce in ipvs mode.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub ipvs_strict_arp: Option<bool>,
    /// Timeout of idle TCP connections in ipvs mode; 0 leaves the kernel's.
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcp_timeout: Option<Duration>,
    /// Timeout of TCP connections after a FIN in ipvs mode; 0 leaves the kernel's.
    #[arg(long, value_name = "DURATION")]
    pub ipvs_tcpfin_timeout: Option<Duration>,
    /// Timeout of UDP in ipvs mode; 0 leaves the kernel's.
    #[arg(long, value_name = "DURATION")]
    pub ipvs_udp_timeout: Option<Duration>,
    /// Score for the kernel's out-of-memory killer. Default: -999.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub oom_score_adj: Option<i32>,
    /// Tracked connections per CPU; 0 leaves the kernel's limit. Default: 32768.
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<i32>,
    /// Least number of tracked connections. Default: 131072.
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<i32>,
    /// Timeout of idle TCP connections; 0 leaves the kernel's. Default: 24h.
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_established: Option<Duration>,
    /// Timeout of TCP connections in CLOSE_WAIT; 0 leaves the kernel's. Default: 1h.
    #[arg(long, value_name = "DURATION")]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,
    /// Do not call packets outside of the window INVALID.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub conntrack_tcp_be_liberal: Option<bool>,
    /// Timeout of UDP without an answer; 0 leaves the kernel's.
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout: Option<Duration>,
    /// Timeout of UDP with answers; 0 leaves the kernel's.
    #[arg(long, value_name = "DURATION")]
    pub conntrack_udp_timeout_stream: Option<Duration>,
    /// Ignored: watches here need no resync.
    #[arg(long, value_name = "DURATION")]
    pub config_sync_period: Option<Duration>,
    /// Deprecated: 0 switches the health server off.
    #[arg(long, value_name = "PORT", hide = true)]
    pub healthz_port: Option<u16>,
    /// Deprecated: 0 switches the metrics server off.
    #[arg(long, value_name = "PORT", hide = true)]
    pub metrics_port: Option<u16>,
}

fn gate(text: &str) -> Result<(String, bool)> {
    let (name, value) = text.split_once('=').ok_or_else(|| anyhow!("want NAME=true or NAME=false"))?;
    let value = value.trim().parse().map_err(|_| anyhow!("{name}: {value:?} is neither true nor false"))?;
    Ok((name.trim().to_owned(), value))
}

fn set<T: Clone>(value: &mut T, flag: Option<&T>) {
    if let Some(flag) = flag {
        flag.clone_into(value);
    }
}

fn set_some<T: Clone>(value: &mut Option<T>, flag: Option<&T>) {
    if flag.is_some() {
        *value = flag.cloned();
    }
}

/// A bare address gets the port; an address with a port, and an empty one, stay.
fn with_port(text: &str, port: u16) -> String {
    match text.parse() {
        Ok(ip) => std::net::SocketAddr::new(ip, port).to_string(),
        Err(_) => text.to_owned(),
    }
}

/// The configuration that flags mean; its own values need not be valid. Where the flag of a mode
/// serves several modes, it is in all their sections.
pub(crate) fn configuration(settings: &SettingArgs, flags: &KubeProxyFlags) -> KubeProxyConfiguration {
    let mut c = KubeProxyConfiguration::with_defaults();
    let f = flags;
    set(&mut c.mode, settings.mode.as_ref());
    set(&mut c.cluster_cidr, settings.cluster_cidr.as_ref());
    set(&mut c.detect_local_mode, settings.detect_local_mode.as_ref());
    set(&mut c.detect_local.bridge_interface, settings.pod_bridge_interface.as_ref());
    set(&mut c.detect_local.interface_name_prefix, settings.pod_interface_name_prefix.as_ref());
    set(&mut c.iptables.masquerade_all, settings.masquerade_all.as_ref());
    c.nftables.masquerade_all = c.iptables.masquerade_all;
    if let Some(bit) = settings.iptables_masquerade_bit {
        c.iptables.masquerade_bit = Some(bit.into());
        c.nftables.masquerade_bit = Some(bit.into());
    }
    if !settings.node_port_addresses.is_empty() {
        c.node_port_addresses = Some(settings.node_port_addresses.clone());
    }

    if let Some(path) = &f.kubeconfig {
        c.client_connection.kubeconfig = path.to_string_lossy().into_owned();
    }
    c.feature_gates.extend(f.feature_gates.iter().cloned());
    set(&mut c.client_connection.content_type, f.kube_api_content_type.as_ref());
    set(&mut c.client_connection.burst, f.kube_api_burst.as_ref());
    set(&mut c.client_connection.qps, f.kube_api_qps.as_ref());
    set(&mut c.bind_address, f.bind_address.as_ref());
    set(&mut c.healthz_bind_address, f.healthz_bind_address.as_ref());
    set(&mut c.metrics_bind_address, f.metrics_bind_address.as_ref());
    c.healthz_bind_address = with_port(&c.healthz_bind_address, 10256);
    c.metrics_bind_address = with_port(&c.metrics_bind_address, 10249);
    if f.healthz_port == Some(0) {
        c.healthz_bind_address.clear();
    }
    if f.metrics_port == Some(0) {
        c.metrics_bind_address.clear();
    }
    set(&mut c.bind_address_hard_fail, f.bind_address_hard_fail.as_ref());
    set(&mut c.enable_profiling, f.profiling.as_ref());
    set(&mut c.show_hidden_metrics_for_version, f.show_hidden_metrics_for_version.as_ref());
    set_some(&mut c.iptables.localhost_node_ports, f.iptables_localhost_nodeports.as_ref());
    set(&mut c.iptables.sync_period, f.iptables_sync_period.as_ref());
    set(&mut c.nftables.sync_period, f.iptables_sync_period.as_ref());
    set(&mut c.iptables.min_sync_period, f.iptables_min_sync_period.as_ref());
    set(&mut c.nftables.min_sync_period, f.iptables_min_sync_period.as_ref());
    set(&mut c.ipvs.sync_period, f.ipvs_sync_period.as_ref());
    set(&mut c.ipvs.min_sync_period, f.ipvs_min_sync_period.as_ref());
    set(&mut c.ipvs.scheduler, f.ipvs_scheduler.as_ref());
    if !f.ipvs_exclude_cidrs.is_empty() {
        c.ipvs.exclude_cidrs = Some(f.ipvs_exclude_cidrs.clone());
    }
    set(&mut c.ipvs.strict_arp, f.ipvs_strict_arp.as_ref());
    set(&mut c.ipvs.tcp_timeout, f.ipvs_tcp_timeout.as_ref());
    set(&mut c.ipvs.tcp_fin_timeout, f.ipvs_tcpfin_timeout.as_ref());
    set(&mut c.ipvs.udp_timeout, f.ipvs_udp_timeout.as_ref());
    set_some(&mut c.oom_score_adj, f.oom_score_adj.as_ref());
    set_some(&mut c.conntrack.max_per_core, f.conntrack_max_per_core.as_ref());
    set_some(&mut c.conntrack.min, f.conntrack_min.as_ref());
    set_some(&mut c.conntrack.tcp_established_timeout, f.conntrack_tcp_timeout_established.as_ref());
    set_some(&mut c.conntrack.tcp_close_wait_timeout, f.conntrack_tcp_timeout_close_wait.as_ref());
    set(&mut c.conntrack.tcp_be_liberal, f.conntrack_tcp_be_liberal.as_ref());
    set(&mut c.conntrack.udp_timeout, f.conntrack_udp_timeout.as_ref());
    set(&mut c.conntrack.udp_stream_timeout, f.conntrack_udp_timeout_stream.as_ref());
    set(&mut c.config_sync_period, f.config_sync_period.as_ref());
    c
}

/// Whether there are flags that `--config` makes void. Those of single modes are our own.
pub(crate) fn ignored_with_config(settings: &SettingArgs, flags: &KubeProxyFlags) -> bool {
    let of_config = SettingArgs {
        config: settings.config.clone(),
        modes: settings.modes.clone(),
        ..SettingArgs::default()
    };
    *settings != of_config || *flags != KubeProxyFlags::default()
}

/// Logging flags win over the file.
pub(crate) fn apply_log_flags(config: &mut KubeProxyConfiguration, log: &LogArgs) {
    if let Some(verbosity) = log.verbosity {
        config.logging.verbosity = verbosity.into();
    }
    if let Some(format) = log.logging_format {
        let name = match format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        name.clone_into(&mut config.logging.format);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    use crate::cli::{Cli, Command, RunArgs};

    fn run(arguments: &[&str]) -> RunArgs {
        let all = ["shunt", "run"].into_iter().chain(arguments.iter().copied());
        match Cli::try_parse_from(all).unwrap().command {
            Command::Run(args) => *args,
            _ => panic!("not run"),
        }
    }

    fn config(arguments: &[&str]) -> KubeProxyConfiguration {
        let args = run(arguments);
        configuration(&args.settings, &args.kube_proxy)
    }

    /// Every flag of kube-proxy 1.36, with a value that is not its default.
    const ALL: &[&str] = &[
        "--feature-gates=AllowServiceExternalIPs=false,AllAlpha=true",
        "--kubeconfig=/k",
        "--kube-api-content-type=application/json",
        "--kube-api-burst=11",
        "--kube-api-qps=6.5",
        "--bind-address=192.0.2.1",
        "--healthz-bind-address=192.0.2.1",
        "--metrics-bind-address=[::1]:9",
        "--bind-address-hard-fail",
        "--profiling=true",
        "--show-hidden-metrics-for-version=1.35",
        "--proxy-mode=ipvs",
        "--iptables-masquerade-bit=15",
        "--masquerade-all",
        "--iptables-localhost-nodeports=false",
        "--iptables-sync-period=31s",
        "--iptables-min-sync-period=2s",
        "--ipvs-sync-period=32s",
        "--ipvs-min-sync-period=3s",
        "--ipvs-scheduler=lc",
        "--ipvs-exclude-cidrs=198.51.100.0/24,203.0.113.0/24",
        "--ipvs-strict-arp",
        "--ipvs-tcp-timeout=1m",
        "--ipvs-tcpfin-timeout=2m",
        "--ipvs-udp-timeout=3m",
        "--detect-local-mode=BridgeInterface",
        "--pod-bridge-interface=cni0",
        "--pod-interface-name-prefix=veth",
        "--cluster-cidr=10.244.0.0/16,fd00::/48",
        "--nodeport-addresses=192.0.2.0/24,2001:db8::/64",
        "--oom-score-adj=-500",
        "--conntrack-max-per-core=1",
        "--conntrack-min=2",
        "--conntrack-tcp-timeout-established=1s",
        "--conntrack-tcp-timeout-close-wait=2s",
        "--conntrack-tcp-be-liberal",
        "--conntrack-udp-timeout=3s",
        "--conntrack-udp-timeout-stream=4s",
        "--config-sync-period=1m",
    ];

    #[test]
    fn every_flag_changes_what_it_names_and_nothing_else() {
        let defaults = serde_json::to_value(KubeProxyConfiguration::with_defaults()).unwrap();
        let mut changed = std::collections::BTreeSet::new();
        for flag in ALL {
            let value = serde_json::to_value(config(&[flag])).unwrap();
            let differences = different(&value, &defaults, "");
            assert!(!differences.is_empty(), "{flag} changes nothing");
            // A flag of iptables serves nftables mode, too.
            assert!(differences.len() <= 2, "{flag} changes {differences:?}");
            changed.extend(differences);
        }
        let all = serde_json::to_value(config(ALL)).unwrap();
        assert_eq!(
            different(&all, &defaults, "").into_iter().collect::<std::collections::BTreeSet<_>>(),
            changed
        );
        assert_eq!(all["healthzBindAddress"], "192.0.2.1:10256");
        assert_eq!(all["conntrack"]["udpStreamTimeout"], "4s");
        assert!(config(ALL).validate().is_empty());
    }

    fn different(a: &serde_json::Value, b: &serde_json::Value, path: &str) -> Vec<String> {
        match (a.as_object(), b.as_object()) {
            (Some(a), Some(b)) if path != ".featureGates" => {
                a.iter().flat_map(|(key, v)| different(v, &b[key], &format!("{path}.{key}"))).collect()
            }
            _ if a == b => Vec::new(),
            _ => vec![path.to_owned()],
        }
    }

    #[test]
    fn booleans_and_servers_are_switched_off_as_with_kube_proxy() {
        assert!(!config(&["--masquerade-all=false"]).iptables.masquerade_all);
        assert_eq!(config(&["--healthz-bind-address="]).healthz_bind_address, "");
        assert_eq!(config(&["--metrics-port=0"]).metrics_bind_address, "");
        assert_eq!(config(&["--healthz-port=77"]).healthz_bind_address, "0.0.0.0:10256");
        assert_eq!(config(&["--mode", "ebpf"]).mode, config(&["--proxy-mode", "ebpf"]).mode);
    }

    #[test]
    fn with_a_file_only_some_flags_count() {
        let args = run(&["--config=/c", "--hostname-override=n", "-v=4", "--master=http://x"]);
        assert!(!ignored_with_config(&args.settings, &args.kube_proxy));
        let args = run(&["--config=/c", "--mode=nftables"]);
        assert!(ignored_with_config(&args.settings, &args.kube_proxy));
        let args = run(&["--config=/c", "--oom-score-adj=1"]);
        assert!(ignored_with_config(&args.settings, &args.kube_proxy));
    }
}
