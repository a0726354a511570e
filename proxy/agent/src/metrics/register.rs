//! Under which names metrics are shown, and what they say of themselves.

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use shunt_mode::Mode;

use super::Metrics;

/// Kubernetes version whose kube-proxy this is compatible with.
const KUBERNETES: (&str, &str) = ("1", "36");

/// The feature gates that mean something here, with stages as component-base writes them.
pub(super) fn register_features(registry: &mut Registry, external_ips: bool) {
    let features: Family<[(&str, &str); 2], Gauge> = Family::default();
    let allow = [("name", "AllowServiceExternalIPs"), ("stage", "DEPRECATED")];
    features.get_or_create(&allow).set(external_ips.into());
    registry.register(
        "kubernetes_feature_enabled",
        "This metric records the data about the stage and enablement of a k8s feature",
        features,
    );
}

impl Metrics {
    pub(super) fn register_kube_proxy(&self, mode: Mode, registry: &mut Registry) {
        let build: Family<[(&str, String); 5], Gauge> = Family::default();
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let (major, minor) = KUBERNETES;
        build
            .get_or_create(&[
                ("major", major.to_owned()),
                ("minor", minor.to_owned()),
                ("git_version", format!("v{major}.{minor}.0+shunt-{}", env!("CARGO_PKG_VERSION"))),
                ("platform", format!("linux/{architecture}")),
                ("compiler", "rustc".to_owned()),
            ])
            .set(1);
        registry.register("kubernetes_build_info", "A metric with a constant '1' value labeled by major, minor, git version, platform, and compiler from which Kubernetes was built", build);

        self.register_client(registry);
        let r = registry.sub_registry_with_prefix("kubeproxy");
        r.register(
            "sync_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds",
            self.sync.clone(),
        );
        r.register(
            "sync_full_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for full resyncs",
            self.full_sync.clone(),
        );
        r.register(
            "sync_partial_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for partial resyncs",
            self.partial_sync.clone(),
        );
        r.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "The last time proxy rules were successfully synced",
            self.last_sync.clone(),
        );
        r.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "The last time a sync of proxy rules was queued",
            self.last_queued.clone(),
        );
        r.register(
            "network_programming_duration_seconds",
            "In Cluster Network Programming Latency in seconds",
            self.programming.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes_pending",
            "Pending proxy rules Endpoint changes",
            self.endpoint_changes_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_endpoint_changes",
            "Cumulative proxy rules Endpoint changes",
            self.endpoint_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes_pending",
            "Pending proxy rules Service changes",
            self.service_changes_pending.clone(),
        );
        r.register(
            "sync_proxy_rules_service_changes",
            "Cumulative proxy rules Service changes",
            self.service_changes.clone(),
        );
        r.register(
            "sync_proxy_rules_no_local_endpoints_total",
            "Number of services with a Local traffic policy and no endpoints",
            self.no_local_endpoints.clone(),
        );
        r.register("proxy_healthz", "Cumulative proxy healthz HTTP status", self.healthz.clone());
        r.register("proxy_livez", "Cumulative proxy livez HTTP status", self.livez.clone());
        let (failures, failures_help) = match mode {
            Mode::Nftables => {
                ("sync_proxy_rules_nftables_sync_failures", "Cumulative proxy nftables sync failures")
            }
            Mode::Iptables | Mode::Ipvs => {
                ("sync_proxy_rules_iptables_restore_failures", "Cumulative proxy iptables restore failures")
            }
            Mode::Ebpf => ("sync_proxy_rules_ebpf_sync_failures", "Cumulative proxy eBPF sync failures"),
        };
        r.register(failures, failures_help, self.sync_failures.clone());
        if mode == Mode::Nftables {
            r.register(
                "sync_proxy_rules_nftables_cleanup_failures",
                "Cumulative proxy nftables cleanup failures",
                self.cleanup_failures.clone(),
            );
        }
        if mode == Mode::Iptables {
            r.register(
                "sync_proxy_rules_iptables_partial_restore_failures",
                "Cumulative proxy iptables partial restore failures",
                self.partial_failures.clone(),
            );
            r.register(
                "sync_proxy_rules_iptables_total",
                "Total number of iptables rules owned by kube-proxy",
                self.rules.clone(),
            );
            r.register(
                "sync_proxy_rules_iptables_last",
                "Number of iptables rules written by kube-proxy in last sync",
                self.rules_written.clone(),
            );
        }
        if mode.uses_conntrack() {
            r.register(
                "conntrack_reconciler_sync_duration_seconds",
                "ReconcileConntrackFlowsLatency latency in seconds",
                self.conntrack_sync.clone(),
            );
            r.register(
                "conntrack_reconciler_deleted_entries",
                "Cumulative conntrack flows deleted by conntrack reconciler",
                self.conntrack_deleted.clone(),
            );
        }
    }

    /// Those of client-go (`component-base/metrics/prometheus/restclient`).
    fn register_client(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("rest_client");
        r.register(
            "requests",
            "Number of HTTP requests, partitioned by status code, method, and host",
            self.requests.clone(),
        );
        r.register(
            "request_duration_seconds",
            "Request latency in seconds. Broken down by verb, and host",
            self.request_times.clone(),
        );
    }

    pub(super) fn register_own(&self, mode: Mode, registry: &mut Registry) {
        let info: Family<[(&str, &str); 2], Gauge> = Family::default();
        info.get_or_create(&[("version", env!("CARGO_PKG_VERSION")), ("mode", mode.name())]).set(1);
        let r = registry.sub_registry_with_prefix("shunt");
        r.register("info", "Version and mode in use; always 1", info);
        r.register(
            "sync_phase_duration_seconds",
            "Time spent in one phase of a sync: observe, plan, apply, and wait, the part of apply in which others held a lock",
            self.phases.clone(),
        );
        r.register(
            "sync_operations",
            "Operations that syncs carried out in the kernel",
            self.operations.clone(),
        );
        r.register(
            "drift_repaired",
            "Differences between the kernel and what belongs there, found by looking and put right",
            self.drift.clone(),
        );
        r.register("services", "Services in the forwarding table", self.services.clone());
        r.register(
            "kernel_table_entries",
            "Entries in a table of the kernel that has a limit",
            self.table_entries.clone(),
        );
        r.register(
            "kernel_table_entries_limit",
            "Entries that a table of the kernel takes before it must be replaced by a larger one",
            self.table_capacity.clone(),
        );
        r.register(
            "watch_last_contact_timestamp_seconds",
            "When the API server was heard from last, by kind of object",
            self.contact.clone(),
        );
        r.register(
            "watch_connected",
            "1 while the API server is heard, 0 while it is lost, by kind of object",
            self.connected.clone(),
        );
        if mode.uses_conntrack() {
            r.register(
                "service_connections",
                "Connections to a Service port that the kernel tracks",
                self.service_connections.clone(),
            );
            r.register(
                "service_bytes",
                "Bytes so far of the connections to a Service port that the kernel tracks",
                self.service_bytes.clone(),
            );
        }
        if mode == Mode::Ebpf {
            r.register(
                "not_programmed",
                "Service ports and frontends for which the kernel's tables have no room, wholly or in part",
                self.not_programmed.clone(),
            );
            r.register_collector(Box::new(self.service_flows.clone()));
            r.register(
                "endpoint_flows",
                "New flows to an endpoint of a Service port",
                self.endpoint_flows.clone(),
            );
        }
        r.register("object_problems", "Fields of objects that could not be used", self.problems.clone());
    }
}
