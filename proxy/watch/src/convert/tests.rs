use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use shunt_core::endpoint::{Conditions, EndpointSlice, PodHash};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::Node;
use shunt_core::service::{Service, TrafficPolicy};
use shunt_core::store::Event;

use super::*;

/// Converts as text and as a tree: both ways must say the same.
fn convert(kind: Kind, object: &Value) -> (Option<Event>, Vec<String>) {
    let mut converter = Converter::new("me");
    let (as_text, _) = converter.text(kind, &object.to_string());
    let as_value = converter.value(kind, object.clone());
    assert_eq!(as_text, as_value);
    (as_value.event, as_value.problems.iter().map(ToString::to_string).collect())
}

fn object(metadata: &Value, rest: &Value) -> Value {
    let mut object = json!({"metadata": {"name": "a", "namespace": "ns"}});
    merge(&mut object["metadata"], metadata);
    merge(&mut object, rest);
    object
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

fn service_and_problems(rest: &Value) -> (Service, Vec<String>) {
    let mut base = object(&json!({}), &json!({"spec": {"clusterIP": "10.96.0.1"}}));
    merge(&mut base, rest);
    match convert(Kind::Service, &base) {
        (Some(Event::Service(service)), problems) => (service, problems),
        other => panic!("{other:?}"),
    }
}

fn service(rest: &Value) -> Service {
    let (service, problems) = service_and_problems(rest);
    assert_eq!(problems, Vec::<String>::new());
    service
}

fn slice_and_problems(rest: &Value) -> (EndpointSlice, Vec<String>) {
    let mut base = object(
        &json!({"labels": {"kubernetes.io/service-name": "svc"}}),
        &json!({"addressType": "IPv4", "ports": [{"name": "http", "port": 80}]}),
    );
    merge(&mut base, rest);
    match convert(Kind::EndpointSlice, &base) {
        (Some(Event::Slice(slice)), problems) => (slice, problems),
        other => panic!("{other:?}"),
    }
}

fn slice(rest: &Value) -> EndpointSlice {
    let (slice, problems) = slice_and_problems(rest);
    assert_eq!(problems, Vec::<String>::new());
    slice
}

fn node(rest: &Value) -> (Node, Vec<String>) {
    let mut base = json!({"metadata": {"name": "me"}});
    merge(&mut base, rest);
    match convert(Kind::Node, &base) {
        (Some(Event::Node(node)), problems) => (node, problems),
        other => panic!("{other:?}"),
    }
}

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

#[test]
fn a_full_service_comes_through() {
    let full = service(&json!({
        "metadata": {"creationTimestamp": "2026-01-02T03:04:05Z", "resourceVersion": "9", "labels": {"x": "y"},
            "managedFields": [{"manager": "x"}]},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"],
            "ipFamilies": ["IPv4", "IPv6"], "externalIPs": ["192.0.2.1", "2001:db8::1"],
            "loadBalancerClass": "example.org/lb", "allocateLoadBalancerNodePorts": false,
            "loadBalancerSourceRanges": [" 192.0.2.0/24 ", "2001:db8::/32\n", "0.0.0.0/0"],
            "ports": [
                {"name": "http", "port": 80, "targetPort": "web", "nodePort": 30080, "protocol": "TCP"},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 0},
                {"name": "sctp", "port": 80, "protocol": "SCTP"}],
            "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "198.51.100.1"}, {"ip": "198.51.100.2", "ipMode": "VIP", "ports": []},
            {"ip": "198.51.100.3", "ipMode": "Proxy"}, {"hostname": "lb.example.org"}]}}
    }));
    assert_eq!(full.name, NamespacedName::new("ns", "a"));
    assert_eq!(full.created, 1_767_323_045);
    assert_eq!(full.cluster_ips, ips(&["10.96.0.1", "fd00::1"]));
    assert_eq!(full.external_ips, ips(&["192.0.2.1", "2001:db8::1"]));
    assert_eq!(full.load_balancer_ips, ips(&["198.51.100.1", "198.51.100.2"]));
    assert_eq!(texts(&full.source_ranges), ["192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"]);
    let ports: Vec<_> = full.ports.iter().map(|p| (&*p.name, p.protocol, p.port, p.node_port)).collect();
    assert_eq!(
        ports,
        [
            ("http", Protocol::Tcp, 80, Some(30080)),
            ("dns", Protocol::Udp, 53, None),
            ("sctp", Protocol::Sctp, 80, None)
        ]
    );
    assert_eq!(full.internal_policy, TrafficPolicy::Local);
    assert_eq!(full.external_policy, TrafficPolicy::Local);
    assert_eq!(full.affinity, Some(Duration::from_mins(1)));
    assert_eq!(full.health_check_node_port, Some(32000));
}

#[test]
fn absent_and_null_fields_have_the_defaults_of_the_api() {
    for nothing in [
        json!({}),
        json!({"spec": {"ports": null, "clusterIPs": null, "sessionAffinityConfig": null,
        "externalTrafficPolicy": null, "sessionAffinity": null}, "status": null}),
    ] {
        let plain = service(&nothing);
        assert_eq!(plain.cluster_ips, ips(&["10.96.0.1"]), "clusterIP stands in for clusterIPs");
        assert_eq!((plain.internal_policy, plain.external_policy), Default::default());
        assert_eq!((plain.created, plain.affinity, plain.health_check_node_port), (0, None, None));
    }
    let sticky = service(&json!({"spec": {"sessionAffinity": "ClientIP"}}));
    assert_eq!(sticky.affinity, Some(Duration::from_hours(3)));
    let duplicate = service(&json!({"spec": {"ports": [{"port": 80}, {"port": 80}]}}));
    assert_eq!(duplicate.ports.len(), 2);
}

#[test]
fn services_that_are_not_ours_are_gone() {
    for theirs in [
        json!({"spec": {"clusterIP": "None"}}),
        json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}),
        json!({"spec": {"clusterIPs": ["None"], "clusterIP": null}}),
        json!({"spec": {"clusterIP": ""}}),
        json!({"spec": {"clusterIP": null}}),
        json!({"spec": {"type": "ExternalName"}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": null}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": 5}}}),
    ] {
        let mut base = object(&json!({}), &json!({"spec": {"clusterIP": "10.96.0.1"}}));
        merge(&mut base, &theirs);
        let (event, problems) = convert(Kind::Service, &base);
        assert_eq!(event, Some(Event::ServiceGone(NamespacedName::new("ns", "a"))), "{theirs}");
        assert_eq!(problems, Vec::<String>::new(), "{theirs}");
    }
}

#[test]
fn sloppy_addresses_come_out_canonical_and_bad_ones_are_left_out() {
    let (odd, problems) = service_and_problems(&json!({
        "spec": {"clusterIPs": ["010.096.000.001"], "externalIPs": ["::ffff:1.2.3.4", "1.2.3", 7, "2001:DB8::1"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "x"}, {"ip": "01.1.1.1"}]}}
    }));
    assert_eq!(odd.cluster_ips, ips(&["10.96.0.1"]));
    assert_eq!(odd.external_ips, ips(&["1.2.3.4", "2001:db8::1"]));
    assert_eq!(odd.load_balancer_ips, ips(&["1.1.1.1"]));
    assert_eq!(problems.len(), 3, "{problems:#?}");
    assert!(problems.contains(
        &"Service ns/a: status.loadBalancer.ingress[0].ip: \"x\" is not an IP address: ignored".to_owned()
    ));
    assert!(problems[0].starts_with("Service ns/a: spec.externalIPs[2]: invalid type: "), "{problems:#?}");

    let (bad, problems) =
        service_and_problems(&json!({"spec": {"clusterIP": "1.2.3.400", "clusterIPs": ["1.2.3.400"]}}));
    assert!(bad.cluster_ips.is_empty());
    assert_eq!(problems, ["Service ns/a: spec.clusterIPs[0]: \"1.2.3.400\" is not an IP address: ignored"]);
    let (two, problems) =
        service_and_problems(&json!({"spec": {"clusterIPs": ["10.96.0.1", "10.96.0.2", "fd00::1"]}}));
    assert_eq!(two.cluster_ips, ips(&["10.96.0.1", "fd00::1"]));
    assert_eq!(problems.len(), 1);
}

#[test]
fn bad_source_ranges_never_open_a_service() {
    let ranges = |list: Value| {
        let (service, problems) = service_and_problems(&json!({"spec": {"loadBalancerSourceRanges": list}}));
        (texts(&service.source_ranges), problems)
    };
    assert_eq!(ranges(json!([])), (vec![], vec![]));
    assert_eq!(ranges(json!(["10.0.0.1/8", "x"])).0, ["10.0.0.0/8", "::/128"]);
    assert_eq!(ranges(json!(["10.0.0.0/8", "10.0.0.0/33"])).0, ["10.0.0.0/8"]);
    assert_eq!(ranges(json!(["10.0.0.0/33", "fd00::/8"])).0, ["fd00::/8", "255.255.255.255/32"]);
    assert_eq!(ranges(json!(["fd00::/129"])).0, ["::/128"]);
    let (closed, problems) = ranges(json!(["all", "192.0.2.1", null, 7]));
    assert_eq!(closed, ["255.255.255.255/32", "::/128"]);
    assert_eq!(problems.len(), 5, "{problems:#?}");
    assert!(
        problems.iter().any(|p| p.contains("nobody may reach the IPv4 and IPv6 load balancer addresses"))
    );
}

#[test]
fn bad_ports_and_choices_are_left_out() {
    let (odd, problems) = service_and_problems(&json!({"spec": {
        "ports": [{"port": 0}, {}, {"port": 70000}, {"port": -1}, {"port": "80"}, null,
            {"port": 81, "protocol": "ICMP"}, {"port": 82, "nodePort": 99999}, {"port": 83, "protocol": ""}],
        "internalTrafficPolicy": "Node", "externalTrafficPolicy": 5, "sessionAffinity": "Cookie"}}));
    let ports: Vec<_> = odd.ports.iter().map(|p| (p.port, p.node_port)).collect();
    assert_eq!(ports, [(82, None), (83, None)]);
    assert_eq!((odd.internal_policy, odd.external_policy, odd.affinity), Default::default());
    // The string is complained of twice: as a string, and as the missing port that is left.
    assert_eq!(problems.len(), 11, "{problems:#?}");
    for seconds in [0, -5, 86_401, i64::MAX] {
        let (sticky, problems) = service_and_problems(&json!({"spec": {"sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}}));
        assert_eq!(sticky.affinity, Some(Duration::from_hours(3)));
        assert_eq!(problems.len(), 1);
    }
}

#[test]
fn the_health_check_port_is_for_local_load_balancers_only() {
    for (type_, policy, want) in [
        ("LoadBalancer", "Local", Some(32000)),
        ("LoadBalancer", "Cluster", None),
        ("NodePort", "Local", None),
    ] {
        let rest =
            json!({"spec": {"type": type_, "externalTrafficPolicy": policy, "healthCheckNodePort": 32000}});
        assert_eq!(service(&rest).health_check_node_port, want);
    }
}

#[test]
fn objects_that_cannot_be_judged_say_nothing() {
    for broken in [
        json!({"metadata": {"name": "a", "namespace": "ns"}, "spec": "x"}),
        json!({"metadata": {"name": "a", "namespace": "ns", "labels": "x"}, "spec": {"clusterIP": "10.0.0.1"}}),
        json!({"metadata": {"name": "a", "namespace": "ns"}, "spec": []}),
    ] {
        let mut converter = Converter::new("me");
        let converted = converter.value(Kind::Service, broken);
        assert_eq!(converted.name, Some(NamespacedName::new("ns", "a")));
        assert_eq!(converted.event, None);
        assert_eq!(converted.problems.len(), 2);
    }
    for nameless in [json!({}), json!({"metadata": {"name": 5}}), json!([]), json!(null), json!("x")] {
        let (event, problems) = convert(Kind::Service, &nameless);
        assert_eq!(event, None, "{nameless}");
        assert!(!problems.is_empty(), "{nameless}");
    }
    // The second of two equal keys counts, as in Go.
    let twice = r#"{"metadata":{"name":"a","namespace":"ns","name":"b"},"spec":{"clusterIP":"10.0.0.1"}}"#;
    let (converted, _) = Converter::new("me").text(Kind::Service, twice);
    assert_eq!(converted.name, Some(NamespacedName::new("ns", "b")));
    assert_eq!(converted.problems, []);
}

#[test]
fn conditions_default_as_the_api_says() {
    let endpoints = [
        (json!({}), (true, true, false)),
        (json!({"conditions": null}), (true, true, false)),
        (json!({"conditions": {}}), (true, true, false)),
        (json!({"conditions": {"ready": null, "serving": null, "terminating": null}}), (true, true, false)),
        // serving does not follow ready.
        (json!({"conditions": {"ready": false}}), (false, true, false)),
        (json!({"conditions": {"ready": false, "serving": true, "terminating": true}}), (false, true, true)),
    ];
    for (endpoint, (ready, serving, terminating)) in endpoints {
        let mut with_address = json!({"addresses": ["10.0.0.1"]});
        merge(&mut with_address, &endpoint);
        let got = slice(&json!({"endpoints": [with_address]})).endpoints[0].conditions;
        assert_eq!(got, Conditions { ready, serving, terminating }, "{endpoint}");
    }
}

#[test]
fn a_full_slice_comes_through() {
    let full = slice(&json!({
        "metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-02T03:04:05.678901234Z"}},
        "ports": [{"name": "http", "port": 8080}, {"name": null, "port": 53, "protocol": "UDP", "appProtocol": "x"}],
        "endpoints": [
            {"addresses": ["10.0.0.1", "10.0.0.9"], "nodeName": "n1", "zone": "z1", "hostname": "h",
                "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": ["010.0.0.2"], "hints": {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]}},
            {"addresses": []}, {"addresses": null}, {},
            {"addresses": ["10.0.0.3"], "hints": {}, "nodeName": "", "zone": null}]
    }));
    assert_eq!((full.name, full.service), (NamespacedName::new("ns", "a"), NamespacedName::new("ns", "svc")));
    assert_eq!(full.family, IpFamily::V4);
    assert_eq!(full.last_change_trigger, Some(1_767_323_045_678));
    let ports: Vec<_> = full.ports.iter().map(|p| (&*p.name, p.protocol, p.port)).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 8080), ("", Protocol::Udp, 53)]);
    let addresses: Vec<_> = full.endpoints.iter().map(|e| e.address).collect();
    assert_eq!(addresses, ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]));
    let [first, second, third] = &full.endpoints[..] else { panic!() };
    assert_eq!((first.node.as_deref(), first.zone.as_deref()), (Some("n1"), Some("z1")));
    let hints = first.hints.as_ref().unwrap();
    assert_eq!((&*hints.zones[0], &*hints.nodes[0]), ("z1", "n1"));
    assert!(Arc::ptr_eq(hints, second.hints.as_ref().unwrap()), "equal hints are kept once");
    assert_eq!((&third.node, &third.zone, &third.hints), (&None, &None, &None));
}

#[test]
fn endpoints_remember_which_pod_they_are() {
    for (target, expected) in [
        (json!({"kind": "Pod", "namespace": "ns", "name": "web-0", "uid": "x"}), Some("web-0")),
        (json!({"kind": "Pod", "name": "web-0"}), Some("web-0")),
        (json!({"kind": "Pod", "namespace": "other", "name": "web-0"}), None),
        (json!({"kind": "Pod", "namespace": "ns", "name": ""}), None),
        (json!({"kind": "Pod", "namespace": "ns"}), None),
        (json!({"kind": "Node", "namespace": "ns", "name": "web-0"}), None),
        (json!({"name": "web-0"}), None),
        (json!(null), None),
    ] {
        let endpoints =
            json!([{"addresses": ["10.0.0.1"], "targetRef": target}, {"addresses": ["10.0.0.2"]}]);
        let pods: Vec<_> = slice(&json!({"endpoints": endpoints})).endpoints.iter().map(|e| e.pod).collect();
        assert_eq!(pods, [expected.map(PodHash::of), None], "{target}");
    }
    // An endpoint stays one, whatever it says of its pod.
    let odd = json!([{"addresses": ["10.0.0.1"], "targetRef": 5},
        {"addresses": ["10.0.0.2"], "targetRef": {"kind": "Pod", "name": 7}}]);
    let (odd, problems) = slice_and_problems(&json!({"endpoints": odd}));
    assert_eq!(odd.endpoints.iter().map(|e| e.pod).collect::<Vec<_>>(), [None, None]);
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(problems[0].starts_with("EndpointSlice ns/a: endpoints[0].targetRef: "), "{problems:#?}");
}

#[test]
fn slices_that_are_not_ours_are_gone() {
    for (theirs, complaints) in [
        (json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}), 0),
        (json!({"addressType": "FQDN"}), 0),
        (json!({"addressType": "IPv5"}), 1),
        (json!({"addressType": null}), 1),
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": null}}}), 1),
        (json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}), 1),
        (json!({"metadata": {"labels": null}}), 1),
    ] {
        let mut base = object(
            &json!({"labels": {"kubernetes.io/service-name": "svc"}}),
            &json!({"addressType": "IPv4", "ports": [{"name": "http", "port": 80}]}),
        );
        merge(&mut base, &theirs);
        let (event, problems) = convert(Kind::EndpointSlice, &base);
        assert_eq!(event, Some(Event::SliceGone(NamespacedName::new("ns", "a"))), "{theirs}");
        assert_eq!(problems.len(), complaints, "{theirs}: {problems:?}");
    }
}

#[test]
fn bad_parts_of_a_slice_are_left_out() {
    let (odd, problems) = slice_and_problems(&json!({
        "metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "yesterday"}},
        "ports": [{"name": "a"}, {"name": "b", "port": 0}, {"name": "c", "port": 65536}, {"name": "d", "port": 1, "protocol": "X"},
            {"name": "e", "port": 2}],
        "endpoints": [{"addresses": ["nowhere"]}, {"addresses": ["fd00::1"]}, 5, {"addresses": ["10.0.0.1"], "nodeName": 5},
            {"addresses": ["::ffff:10.0.0.2"], "conditions": {"ready": "yes"}}, {"addresses": "10.0.0.3"}]
    }));
    assert_eq!(odd.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [2]);
    assert_eq!(odd.endpoints.iter().map(|e| e.address).collect::<Vec<_>>(), ips(&["10.0.0.1", "10.0.0.2"]));
    assert_eq!(odd.last_change_trigger, None);
    assert_eq!(problems.len(), 11, "{problems:#?}");
    for wanted in [
        "EndpointSlice ns/a: endpoints[0].addresses[0]: \"nowhere\" is not an IP address: ignored",
        "EndpointSlice ns/a: endpoints[1].addresses[0]: fd00::1 is not an IPv4 address: ignored",
        "EndpointSlice ns/a: ports[2].port: 65536 is not a port number: ignored",
    ] {
        assert!(problems.iter().any(|p| p == wanted), "{wanted}: {problems:#?}");
    }
    // Losing all endpoints to a type error would empty the Service: it stays as it was.
    let whole = object(
        &json!({"labels": {"kubernetes.io/service-name": "svc"}}),
        &json!({"addressType": "IPv4", "endpoints": "none"}),
    );
    assert_eq!(convert(Kind::EndpointSlice, &whole).0, None);
}

#[test]
fn the_own_node_is_stripped() {
    let (own, problems) = node(&json!({
        "metadata": {"labels": {"topology.kubernetes.io/zone": "z1", "kubernetes.io/hostname": "me"}},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd01::/64"], "taints": [{"key": "x", "effect": "NoSchedule"}]},
        "status": {"addresses": [
            {"type": "ExternalIP", "address": "198.51.100.1"}, {"type": "Hostname", "address": "me"},
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "InternalIP", "address": "fd02::1"}]}
    }));
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!((&*own.name, own.zone.as_deref(), own.eligible), ("me", Some("z1"), true));
    assert_eq!(own.addresses, ips(&["192.0.2.1", "fd02::1", "198.51.100.1"]));
    assert_eq!(texts(&own.pod_cidrs), ["10.1.0.0/24", "fd01::/64"]);

    assert_eq!(texts(&node(&json!({"spec": {"podCIDR": "10.1.0.0/24"}})).0.pod_cidrs), ["10.1.0.0/24"]);
    let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let tainted = json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "value": "1"}]}});
    for not_eligible in [going, tainted] {
        assert!(!node(&not_eligible).0.eligible, "{not_eligible}");
    }
    let (_, problems) = node(
        &json!({"status": {"addresses": [{"type": "InternalIP", "address": "x"}]}, "spec": {"podCIDRs": ["y"]}}),
    );
    assert_eq!(problems.len(), 2);

    assert_eq!(convert(Kind::Node, &json!({"metadata": {"name": "other"}, "spec": 5})), (None, vec![]));
}

#[test]
fn service_cidrs_come_through() {
    let (event, problems) = convert(
        Kind::ServiceCidr,
        &json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00::/108", "x"]}}),
    );
    let ranges = vec!["10.96.0.0/12".parse().unwrap(), "fd00::/108".parse().unwrap()];
    assert_eq!(event, Some(Event::ServiceCidr("kubernetes".into(), ranges)));
    assert_eq!(problems, ["ServiceCIDR kubernetes: spec.cidrs[2]: \"x\" is not an IP range: ignored"]);
}

#[test]
fn manifests_without_a_namespace_are_in_default() {
    let object = json!({"metadata": {"name": "a"}, "spec": {"clusterIP": "10.0.0.1"}});
    let converted = Converter::for_manifests(None).value(Kind::Service, object);
    assert_eq!(converted.name, Some(NamespacedName::new("default", "a")));
    let node = Converter::for_manifests(None).value(Kind::Node, json!({"metadata": {"name": "any"}}));
    assert!(matches!(node.event, Some(Event::Node(_))));
}
