//! Configurations as operators have them, and every value that is refused.

// Helpers of tests are no tests to clippy.
#![allow(clippy::expect_used, clippy::panic)]

use serde_json::{Value, json};
use shunt_config::shunt::Algorithm;
use shunt_config::{ConfigError, Duration, KubeProxyConfiguration, Loaded, decode, from_value, write};

const KUBEADM: &str = include_str!("data/kubeadm.yaml");
const DEFAULTS: &str = include_str!("data/defaults.yaml");
const EVERY_FIELD: &str = include_str!("data/every-field.yaml");

fn kube_proxy(loaded: Loaded) -> KubeProxyConfiguration {
    loaded.kube_proxy.expect("the file has a KubeProxyConfiguration")
}

/// A document with these fields besides version and kind.
fn document(fields: Value) -> Value {
    let mut document = json!({ "apiVersion": shunt_config::API_VERSION, "kind": shunt_config::KIND });
    let (Value::Object(all), Value::Object(fields)) = (&mut document, fields) else { panic!() };
    all.extend(fields);
    document
}

fn message(fields: Value) -> String {
    let mut warnings = Vec::new();
    from_value(&document(fields), &mut warnings).expect_err("this is invalid").to_string()
}

#[test]
fn an_empty_file_means_the_defaults() {
    let config = kube_proxy(decode(&serde_json::to_string(&document(json!({}))).unwrap()).unwrap());
    assert_eq!(config, KubeProxyConfiguration::with_defaults());
    assert_eq!(write(&config).unwrap(), DEFAULTS);
}

#[test]
fn kubeadms_file_means_the_defaults_but_for_what_it_says() {
    let loaded = decode(KUBEADM).unwrap();
    assert_eq!(loaded.warnings, Vec::<String>::new());
    let config = kube_proxy(loaded);
    let mut expected = KubeProxyConfiguration::with_defaults();
    expected.cluster_cidr = "10.244.0.0/16".to_owned();
    expected.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".to_owned();
    expected.logging.options = config.logging.options.clone();
    assert_eq!(config, expected);
}

#[test]
fn every_field_is_read_and_written() {
    let loaded = decode(EVERY_FIELD).unwrap();
    // Every key of the file is a field, and every field is a key of the file.
    let unknown: Vec<_> = loaded.warnings.iter().filter(|w| w.contains("unknown")).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    let config = kube_proxy(loaded);
    let mut defaults = serde_json::to_value(KubeProxyConfiguration::with_defaults()).unwrap();
    let mut fields = serde_json::to_value(&config).unwrap();
    for same in ["apiVersion", "kind"] {
        defaults[same].take();
        fields[same].take();
    }
    assert_no_leaf_is_equal(&fields, &defaults, "");
    assert_eq!(write(&config).unwrap(), EVERY_FIELD);
}

fn assert_no_leaf_is_equal(a: &Value, b: &Value, path: &str) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                assert_no_leaf_is_equal(value, b.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"));
            }
        }
        (Value::Null, Value::Null) => {}
        _ => assert_ne!(a, b, "{path} has its default"),
    }
}

#[test]
fn what_is_written_reads_back_equal() {
    for text in [KUBEADM, DEFAULTS, EVERY_FIELD] {
        let config = kube_proxy(decode(text).unwrap());
        let again = kube_proxy(decode(&write(&config).unwrap()).unwrap());
        assert_eq!(again, config);
    }
}

#[test]
fn unknown_and_repeated_fields_are_named_and_ignored() {
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                mode: iptables\nmode: nftables\nnftables: {masqueradeBits: 3}\nfuture: null\n";
    let loaded = decode(text).unwrap();
    let warnings = loaded.warnings.join("\n");
    for part in ["mode", "\"nftables.masqueradeBits\"", "\"future\"", "the last one counts"] {
        assert!(warnings.contains(part), "{part}: {warnings}");
    }
    assert_eq!(kube_proxy(loaded).mode, "nftables");
}

#[test]
fn both_kinds_in_one_file_or_one_alone() {
    let ours = "apiVersion: shunt/v1alpha1\nkind: ShuntConfiguration\nmode: auto\nleftovers: Keep\n\
                resyncPeriod: 10m\nadminSocket: null\nfuture: 1\n\
                ebpf: {externalAlgorithm: Maglev, flowsMax: 1000, cgroupRoot: null, more: 1}\n";
    let both = format!("{DEFAULTS}---\n{ours}---\napiVersion: v1\nkind: ConfigMap\n");
    let loaded = decode(&both).unwrap();
    assert_eq!(
        loaded.warnings,
        [
            "ShuntConfiguration: unknown field \"ebpf.more\": ignored",
            "ShuntConfiguration: unknown field \"future\": ignored",
            "document of kind \"ConfigMap\": ignored"
        ]
    );
    let shunt = loaded.shunt.clone().unwrap();
    let ebpf = &shunt.ebpf;
    assert_eq!((ebpf.external_algorithm, ebpf.flows_max), (Algorithm::Maglev, Some(1000)));
    assert_eq!(ebpf.udp_timeout, Duration::from_secs(120));
    assert_eq!((shunt.mode.as_deref(), shunt.resync_period), (Some("auto"), Duration::from_secs(600)));
    assert_eq!(kube_proxy(loaded), KubeProxyConfiguration::with_defaults());
    let alone = decode(ours).unwrap();
    assert!(alone.kube_proxy.is_none());
    assert_eq!(alone.shunt, Some(shunt));
}

#[test]
fn what_is_no_configuration_is_refused() {
    for (text, expected) in [
        ("{", "failed to decode: "),
        ("mode: ipvs\n", "Object 'Kind' is missing"),
        ("kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1beta1\n", "v1beta1"),
        ("kind: ShuntConfiguration\napiVersion: shunt/v9\n", "shunt/v9"),
        (&format!("{DEFAULTS}---\n{DEFAULTS}"), "more than one document"),
        (
            "kind: ShuntConfiguration\napiVersion: shunt/v1alpha1\nresyncPeriod: 0s\nmode: userspace\n",
            "[ShuntConfiguration.mode: Invalid value: \"userspace\": must be auto, ebpf, iptables, ipvs, nftables or blank, \
             ShuntConfiguration.resyncPeriod: Invalid value: 0s: must be greater than 0]",
        ),
        (
            "kind: ShuntConfiguration\napiVersion: shunt/v1alpha1\nebpf: {flowsMax: 1, udpTimeout: 0s}\n",
            "[ShuntConfiguration.ebpf.flowsMax: Invalid value: 1: must be within the range [64, 4194304], \
             ShuntConfiguration.ebpf.udpTimeout: Invalid value: 0s: must be at least 1s]",
        ),
        (
            "kind: ShuntConfiguration\napiVersion: shunt/v1alpha1\nebpf: {externalAlgorithm: chance}\n",
            "ebpf.externalAlgorithm",
        ),
    ] {
        let error = decode(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn values_of_a_wrong_type_are_refused_by_name() {
    for (fields, field) in [
        (json!({ "mode": 7 }), "mode"),
        (json!({ "iptables": { "masqueradeBit": "x" } }), "iptables.masqueradeBit"),
        (json!({ "iptables": { "masqueradeBit": 99_999_999_999_i64 } }), "iptables.masqueradeBit"),
        (json!({ "nftables": { "syncPeriod": "soon" } }), "nftables.syncPeriod"),
        (json!({ "conntrack": [] , "bindAddress": {} }), "bindAddress"),
        (json!({ "nodePortAddresses": "primary" }), "nodePortAddresses"),
        (json!({ "featureGates": { "A": "yes" } }), "featureGates.A"),
    ] {
        let error = from_value(&document(fields), &mut Vec::new()).unwrap_err();
        let ConfigError::Field { field: named, .. } = &error else { panic!("{error}") };
        assert_eq!(named, field, "{error}");
    }
}

#[test]
fn every_invalid_value_has_its_message() {
    const NOT_NEGATIVE: &str = "must be greater than or equal to 0";
    const CONNTRACK: &str =
        "KubeProxyConfiguration.KubeProxyLinuxConfiguration.KubeProxyConntrackConfiguration";
    const IPVS: &str = "KubeProxyConfiguration.KubeProxyIPVSConfiguration";
    const PAIR: &str = "must be a either a single CIDR or dual-stack pair of CIDRs (e.g. [10.100.0.0/16, fde4:8dba:82e1::/48]";
    let at = |field: &str| format!("KubeProxyConfiguration.{field}");
    let cases = [
        (
            json!({ "iptables": { "masqueradeBit": 32 } }),
            format!(
                "{}: Invalid value: 32: must be within the range [0, 31]",
                at("KubeProxyIPTablesConfiguration.MasqueradeBit")
            ),
        ),
        (
            json!({ "mode": "nftables", "nftables": { "masqueradeBit": -1 } }),
            format!(
                "{}: Invalid value: -1: must be within the range [0, 31]",
                at("KubeProxyNFTablesConfiguration.MasqueradeBit")
            ),
        ),
        (
            json!({ "iptables": { "syncPeriod": "-5s" } }),
            format!(
                "[{}: Invalid value: -5s: must be greater than 0, {}: Invalid value: 1ms: must be greater than or equal to KubeProxyConfiguration.MinSyncPeriod]",
                at("SyncPeriod"),
                at("SyncPeriod")
            ),
        ),
        (
            json!({ "mode": "nftables", "nftables": { "minSyncPeriod": "-1s" } }),
            format!("{}: Invalid value: -1s: {NOT_NEGATIVE}", at("MinSyncPeriod")),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "minSyncPeriod": "31s" } }),
            format!(
                "{}: Invalid value: 31s: must be greater than or equal to KubeProxyConfiguration.MinSyncPeriod",
                at("SyncPeriod")
            ),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "tcpTimeout": "-1s" } }),
            format!("{IPVS}.TCPTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "tcpFinTimeout": "-1s" } }),
            format!("{IPVS}.TCPFinTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "udpTimeout": "-1s" } }),
            format!("{IPVS}.UDPTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "scheduler": "fastest" } }),
            format!(
                "{IPVS}.Scheduler.Scheduler: Invalid value: \"fastest\": must be in [rr wrr lc wlc lblc lblcr sh dh sed nq mh fo ovf twos ], blank means the default algorithm method (currently rr)"
            ),
        ),
        (
            json!({ "mode": "ipvs", "ipvs": { "excludeCIDRs": ["10.0.0.0/8", "x"] } }),
            format!("{IPVS}.ExcludeCidrs[1]: Invalid value: \"x\": must be a valid CIDR"),
        ),
        (
            json!({ "conntrack": { "maxPerCore": -1 } }),
            format!("{CONNTRACK}.MaxPerCore: Invalid value: -1: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "conntrack": { "min": -1 } }),
            format!("{CONNTRACK}.Min: Invalid value: -1: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "conntrack": { "tcpEstablishedTimeout": "-1s" } }),
            format!("{CONNTRACK}.TCPEstablishedTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "conntrack": { "tcpCloseWaitTimeout": "-1m" } }),
            format!("{CONNTRACK}.TCPCloseWaitTimeout: Invalid value: -1m0s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "conntrack": { "udpTimeout": "-1s" } }),
            format!("{CONNTRACK}.UDPTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "conntrack": { "udpStreamTimeout": "-1s" } }),
            format!("{CONNTRACK}.UDPStreamTimeout: Invalid value: -1s: {NOT_NEGATIVE}"),
        ),
        (
            json!({ "oomScoreAdj": 1001 }),
            format!(
                "{}: Invalid value: 1001: must be within the range [-1000, 1000]",
                at("KubeProxyLinuxConfiguration.OOMScoreAdj")
            ),
        ),
        (
            json!({ "mode": "userspace" }),
            format!(
                "{}: Invalid value: \"userspace\": must be auto, ebpf, iptables, ipvs, nftables or blank (blank means the best-available proxy)",
                at("Mode.ProxyMode")
            ),
        ),
        (
            json!({ "clientConnection": { "burst": -5 } }),
            format!("{}: Invalid value: -5: {NOT_NEGATIVE}", at("ClientConnection.Burst")),
        ),
        (
            json!({ "configSyncPeriod": "-1s" }),
            format!("{}: Invalid value: -1s: must be greater than 0", at("ConfigSyncPeriod")),
        ),
        (
            json!({ "bindAddress": "here", "healthzBindAddress": "0.0.0.0:1", "metricsBindAddress": "0.0.0.0:2" }),
            format!(
                "{}: Invalid value: \"here\": not a valid textual representation of an IP address",
                at("BindAddress")
            ),
        ),
        (
            json!({ "healthzBindAddress": "x" }),
            format!("{}: Invalid value: \"x\": must be IP:port", at("HealthzBindAddress")),
        ),
        (
            json!({ "healthzBindAddress": "x:80" }),
            format!("{}: Invalid value: \"x\": must be a valid IP", at("HealthzBindAddress")),
        ),
        (
            json!({ "metricsBindAddress": "127.0.0.1:0" }),
            format!("{}: Invalid value: \"0\": must be a valid port", at("MetricsBindAddress")),
        ),
        (
            json!({ "metricsBindAddress": "[::1]:65536" }),
            format!("{}: Invalid value: \"65536\": must be a valid port", at("MetricsBindAddress")),
        ),
        (
            json!({ "metricsBindAddress": "::1:80:x" }),
            format!("{}: Invalid value: \"::1:80:x\": must be IP:port", at("MetricsBindAddress")),
        ),
        (
            json!({ "portRange": "9-3" }),
            format!(
                "{}: Invalid value: \"9-3\": must be a valid port range (e.g. 300-2000)",
                at("PortRange")
            ),
        ),
        (
            json!({ "nodePortAddresses": ["10.0.0.1"] }),
            format!("{}: Invalid value: \"10.0.0.1\": must be a valid CIDR", at("NodePortAddresses[0]")),
        ),
        (
            json!({ "nodePortAddresses": ["primary", "localhost", "all", "10.0.0.0/8", "secondary"] }),
            format!("{}: Invalid value: \"secondary\": must be a valid CIDR", at("NodePortAddresses[4]")),
        ),
        (
            json!({ "detectLocalMode": "Magic" }),
            format!(
                "{}: Unsupported value: \"Magic\": supported values: \"ClusterCIDR\", \"NodeCIDR\", \"BridgeInterface\", \"InterfaceNamePrefix\", \"\"",
                at("DetectLocalMode")
            ),
        ),
        (
            json!({ "detectLocalMode": "BridgeInterface" }),
            format!(
                "{}: Invalid value: \"\": must not be empty",
                at("DetectLocalConfiguration.InterfaceName")
            ),
        ),
        (
            json!({ "detectLocalMode": "InterfaceNamePrefix", "detectLocal": { "interfaceNamePrefix": "sixteen-letters-" } }),
            format!(
                "{}: Invalid value: \"sixteen-letters-\": must not be longer than 15 characters",
                at("DetectLocalConfiguration.InterfacePrefix")
            ),
        ),
        (
            json!({ "clusterCIDR": "192.168.59.0" }),
            format!(
                "{}: Invalid value: \"192.168.59.0\": must be a valid CIDR block (e.g. 10.100.0.0/16 or fde4:8dba:82e1::/48)",
                at("DetectLocalConfiguration.ClusterCIDRs[0]")
            ),
        ),
        (
            json!({ "clusterCIDR": "10.0.0.0/8,192.168.0.0/16" }),
            format!(
                "{}: Invalid value: []string{{\"10.0.0.0/8\", \"192.168.0.0/16\"}}: {PAIR}",
                at("DetectLocalConfiguration.ClusterCIDRs")
            ),
        ),
        (
            json!({ "clusterCIDR": "10.0.0.0/8,fd00::/64,11.0.0.0/8" }),
            format!(
                "{}: Invalid value: []string{{\"10.0.0.0/8\", \"fd00::/64\", \"11.0.0.0/8\"}}: {PAIR}",
                at("DetectLocalConfiguration.ClusterCIDRs")
            ),
        ),
        (
            json!({ "logging": { "format": "xml" } }),
            format!("{}: Invalid value: \"xml\": Unsupported log format", at("logging.format")),
        ),
    ];
    for (fields, expected) in cases {
        assert_eq!(message(fields.clone()), expected, "{fields}");
    }
}

#[test]
fn addresses_follow_the_family_of_the_bind_address() {
    let of = |fields| {
        let config = from_value(&document(fields), &mut Vec::new()).unwrap();
        (config.healthz_bind_address, config.metrics_bind_address)
    };
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(of(json!({ "bindAddress": "::" })), pair("[::]:10256", "[::1]:10249"));
    assert_eq!(of(json!({ "bindAddress": "192.0.2.1" })), pair("0.0.0.0:10256", "127.0.0.1:10249"));
    assert_eq!(
        of(json!({ "healthzBindAddress": "192.0.2.1", "metricsBindAddress": "2001:db8::1" })),
        pair("192.0.2.1:10256", "[2001:db8::1]:10249")
    );
}

#[test]
fn the_section_of_the_mode_counts() {
    let of = |mode: &str| {
        let mut fields = serde_json::to_value(kube_proxy(decode(EVERY_FIELD).unwrap())).unwrap();
        fields["mode"] = mode.into();
        let of = from_value(&fields, &mut Vec::new()).unwrap().of_mode();
        (of.masquerade_bit, of.sync_period.as_secs(), of.min_sync_period.as_secs())
    };
    assert_eq!(of(""), (Some(15), 40, 2));
    assert_eq!(of("auto"), (Some(15), 40, 2));
    assert_eq!(of("iptables"), (Some(15), 40, 2));
    assert_eq!(of("ipvs"), (Some(15), 50, 3));
    assert_eq!(of("nftables"), (Some(16), 60, 4));
    assert_eq!(of("ebpf"), (Some(16), 60, 4));
}
