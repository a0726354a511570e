//! API objects as they come over the wire, with only the fields that are read.
//!
//! Decoding goes straight from the text into these, without a tree in between, and borrows its
//! strings. Only an object that does not fit is read again the slow way, [`repair`]: the first
//! field that does not fit is noted and set to null, until the rest fits. Every field may be
//! null or absent, so that this always ends.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_path_to_error::{Path, Segment};

/// A string that is borrowed where the text allows it. (`Option<Cow<str>>` never borrows.)
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Text<'a>(Cow<'a, str>);

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: Error>(self, v: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(v)))
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(Strings)
    }
}

/// Null is the same as absent.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// Null is the same as absent, and an empty list is no object: serde would read a struct from the
/// elements of a list, and `spec: []` as a `spec` without fields.
fn fields<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    struct Fields<T>(PhantomData<T>);
    impl<'de, T: Default + Deserialize<'de>> Visitor<'de> for Fields<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_unit<E: Error>(self) -> Result<T, E> {
            Ok(T::default())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    d.deserialize_any(Fields(PhantomData))
}

/// A key whose presence is all that counts, whatever its value.
fn present<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(d).map(|_| true)
}

/// A list. An element that is null (or was unfit) keeps its place, so that the index in a message
/// is the index in the object.
pub(crate) type List<T> = Vec<Option<T>>;

/// `metadata`.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Meta<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) name: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) namespace: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) resource_version: Text<'a>,
    #[serde(borrow)]
    pub(crate) creation_timestamp: Option<Text<'a>>,
    #[serde(borrow)]
    pub(crate) deletion_timestamp: Option<Text<'a>>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) labels: Labels<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) annotations: Annotations<'a>,
}

/// The labels that are read.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Labels<'a> {
    #[serde(rename = "service.kubernetes.io/service-proxy-name", deserialize_with = "present")]
    pub(crate) other_proxy: bool,
    #[serde(rename = "service.kubernetes.io/headless", deserialize_with = "present")]
    pub(crate) headless: bool,
    #[serde(rename = "kubernetes.io/service-name", borrow)]
    pub(crate) service: Option<Text<'a>>,
    #[serde(rename = "topology.kubernetes.io/zone", borrow)]
    pub(crate) zone: Option<Text<'a>>,
}

/// The annotations that are read.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Annotations<'a> {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time", borrow)]
    pub(crate) last_change_trigger: Option<Text<'a>>,
    #[serde(rename = "k8s.io/initial-events-end", borrow)]
    pub(crate) initial_events_end: Option<Text<'a>>,
    #[serde(rename = "kube-router.io/service.scheduler", borrow)]
    pub(crate) scheduler: Option<Text<'a>>,
    #[serde(rename = "kube-router.io/service.schedflags", borrow)]
    pub(crate) scheduler_flags: Option<Text<'a>>,
    #[serde(rename = "shunt/lb-algorithm", borrow)]
    pub(crate) algorithm: Option<Text<'a>>,
    #[serde(rename = "service.cilium.io/lb-algorithm", borrow)]
    pub(crate) cilium_algorithm: Option<Text<'a>>,
}

/// Any object, its metadata only: bookmarks, and the name of what does not fit otherwise.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct AnyObject<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) metadata: Meta<'a>,
}

/// A Service.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Service<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) metadata: Meta<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) spec: ServiceSpec<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) status: ServiceStatus<'a>,
}

/// `spec` of a Service.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceSpec<'a> {
    #[serde(borrow, deserialize_with = "nullable", rename = "type")]
    pub(crate) type_: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable", rename = "clusterIP")]
    pub(crate) cluster_ip: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable", rename = "clusterIPs")]
    pub(crate) cluster_ips: List<Text<'a>>,
    #[serde(borrow, deserialize_with = "nullable", rename = "externalIPs")]
    pub(crate) external_ips: List<Text<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) load_balancer_source_ranges: List<Text<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) ports: List<ServicePort<'a>>,
    #[serde(borrow)]
    pub(crate) internal_traffic_policy: Option<Text<'a>>,
    #[serde(borrow)]
    pub(crate) external_traffic_policy: Option<Text<'a>>,
    #[serde(borrow)]
    pub(crate) session_affinity: Option<Text<'a>>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) session_affinity_config: AffinityConfig,
    pub(crate) health_check_node_port: Option<i64>,
}

/// A port of a Service.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServicePort<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) name: Text<'a>,
    #[serde(borrow)]
    pub(crate) protocol: Option<Text<'a>>,
    pub(crate) port: Option<i64>,
    pub(crate) node_port: Option<i64>,
}

/// `spec.sessionAffinityConfig`.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct AffinityConfig {
    #[serde(rename = "clientIP", deserialize_with = "nullable")]
    pub(crate) client_ip: ClientIp,
}

/// `spec.sessionAffinityConfig.clientIP`.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ClientIp {
    pub(crate) timeout_seconds: Option<i64>,
}

/// `status` of a Service.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ServiceStatus<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) load_balancer: LoadBalancer<'a>,
}

/// `status.loadBalancer`.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct LoadBalancer<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) ingress: List<Ingress<'a>>,
}

/// An element of `status.loadBalancer.ingress`.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Ingress<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) ip: Text<'a>,
    #[serde(borrow)]
    pub(crate) ip_mode: Option<Text<'a>>,
}

/// An `EndpointSlice`.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Slice<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) metadata: Meta<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) address_type: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) ports: List<SlicePort<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) endpoints: List<Endpoint<'a>>,
}

/// A port of an `EndpointSlice`.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct SlicePort<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) name: Text<'a>,
    #[serde(borrow)]
    pub(crate) protocol: Option<Text<'a>>,
    pub(crate) port: Option<i64>,
}

/// An endpoint.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Endpoint<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) addresses: List<Text<'a>>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) conditions: Conditions,
    #[serde(borrow)]
    pub(crate) node_name: Option<Text<'a>>,
    #[serde(borrow)]
    pub(crate) zone: Option<Text<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) hints: Hints<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) target_ref: TargetRef<'a>,
}

/// What an endpoint is.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct TargetRef<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) kind: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) namespace: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) name: Text<'a>,
}

/// Conditions of an endpoint.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Conditions {
    pub(crate) ready: Option<bool>,
    pub(crate) serving: Option<bool>,
    pub(crate) terminating: Option<bool>,
}

/// Hints of an endpoint.
#[derive(Deserialize, Default, Debug)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Hints<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) for_zones: List<Named<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) for_nodes: List<Named<'a>>,
}

/// Something with a name.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Named<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) name: Text<'a>,
}

/// A Node.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Node<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) metadata: Meta<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) spec: NodeSpec<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) status: NodeStatus<'a>,
}

/// `spec` of a Node.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct NodeSpec<'a> {
    #[serde(borrow, deserialize_with = "nullable", rename = "podCIDR")]
    pub(crate) pod_cidr: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable", rename = "podCIDRs")]
    pub(crate) pod_cidrs: List<Text<'a>>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) taints: List<Taint<'a>>,
}

/// A taint of a Node.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct Taint<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) key: Text<'a>,
}

/// `status` of a Node.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct NodeStatus<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) addresses: List<NodeAddress<'a>>,
}

/// An address of a Node.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct NodeAddress<'a> {
    #[serde(borrow, deserialize_with = "nullable", rename = "type")]
    pub(crate) type_: Text<'a>,
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) address: Text<'a>,
}

/// A `ServiceCIDR`.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct ServiceCidr<'a> {
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) metadata: Meta<'a>,
    #[serde(borrow, deserialize_with = "fields")]
    pub(crate) spec: ServiceCidrSpec<'a>,
}

/// `spec` of a `ServiceCIDR`.
#[derive(Deserialize, Default, Debug)]
#[serde(default)]
pub(crate) struct ServiceCidrSpec<'a> {
    #[serde(borrow, deserialize_with = "nullable")]
    pub(crate) cidrs: List<Text<'a>>,
}

/// A field that does not fit, and why.
#[derive(Debug)]
pub(crate) struct Unfit {
    pub(crate) field: String,
    pub(crate) message: String,
    /// Without this part the object says nothing that can be trusted.
    pub(crate) vital: bool,
}

/// Result of trying to read an object as one of the types above.
pub(crate) type Check = Result<(), serde_path_to_error::Error<serde_json::Error>>;

/// Sets every field to null that keeps `check` from reading the object, and names them.
pub(crate) fn repair(object: &mut Value, check: fn(&Value) -> Check) -> Vec<Unfit> {
    let mut unfit = Vec::new();
    while let Err(error) = check(object) {
        clear(object, error.path());
        unfit.push(Unfit {
            field: match error.path().to_string() {
                path if path == "." => String::new(),
                path => path,
            },
            message: error.inner().to_string(),
            vital: is_vital(error.path()),
        });
    }
    unfit
}

/// Name, namespace, labels, the whole of `spec` or of `endpoints`: without them it is unknown
/// what object this is, whose, or what it says.
fn is_vital(path: &Path) -> bool {
    let mut keys = path.iter().map(|segment| match segment {
        Segment::Map { key } => key.as_str(),
        _ => "",
    });
    match (keys.next(), keys.next(), keys.next()) {
        (Some("metadata"), Some("labels"), label) => {
            label.is_none_or(|key| key == "kubernetes.io/service-name")
        }
        (Some("metadata"), Some(key), _) => matches!(key, "name" | "namespace"),
        (Some("status"), ..) => false,
        (_, deeper, _) => deeper.is_none(),
    }
}

/// Sets what the path leads to to null. If it leads nowhere, or to a null already, the nearest
/// parent is taken: some progress is always made.
fn clear(object: &mut Value, path: &Path) {
    let mut segments: Vec<&Segment> = path.iter().collect();
    while !segments.is_empty() {
        if let Some(found) = find(object, &segments)
            && !found.is_null()
        {
            *found = Value::Null;
            return;
        }
        segments.pop();
    }
    // It is no object: make it one without fields, which fits everything.
    *object = Value::Object(serde_json::Map::new());
}

fn find<'v>(object: &'v mut Value, path: &[&Segment]) -> Option<&'v mut Value> {
    path.iter().try_fold(object, |value, segment| match segment {
        Segment::Seq { index } => value.get_mut(index),
        Segment::Map { key } => value.get_mut(key),
        Segment::Enum { .. } | Segment::Unknown => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn repair_names_each_field_that_does_not_fit_and_keeps_the_rest() {
        let mut object = json!({
            "metadata": {"name": "a", "namespace": "ns", "labels": {"service.kubernetes.io/headless": 7}},
            "spec": {"clusterIPs": ["10.0.0.1", 5], "ports": [{"port": "http"}, 3, {"port": 80}], "type": {}},
            "status": "?"
        });
        let unfit = repair(&mut object, |v| serde_path_to_error::deserialize::<_, Service<'_>>(v).map(drop));
        let mut fields: Vec<_> = unfit.iter().map(|u| (u.field.as_str(), u.vital)).collect();
        fields.sort_unstable();
        assert_eq!(
            fields,
            [
                ("spec.clusterIPs[1]", false),
                ("spec.ports[0].port", false),
                ("spec.ports[1]", false),
                ("spec.type", false),
                ("status", false),
            ]
        );
        let service = Service::deserialize(&object).unwrap();
        assert!(service.metadata.labels.headless);
        assert_eq!(service.spec.ports[2].as_ref().unwrap().port, Some(80));
        assert_eq!(&*service.spec.cluster_ips[0].clone().unwrap(), "10.0.0.1");
    }

    #[test]
    fn repair_ends_on_what_is_no_object_at_all() {
        for mut object in [json!(null), json!("x"), json!([1, 2]), json!(7)] {
            let unfit =
                repair(&mut object, |v| serde_path_to_error::deserialize::<_, Service<'_>>(v).map(drop));
            assert!(unfit.iter().any(|u| u.vital), "{unfit:?}");
        }
    }
}
