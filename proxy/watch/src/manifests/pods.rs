//! Names of pods among manifests. The proxy never looks at pods; commands that are told a pod's name
//! want its addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::Value;
use shunt_core::id::NamespacedName;

use crate::address::parse_ip;

/// Addresses of pods by name, as `EndpointSlice`s (`targetRef`) and Pod objects tell them.
pub type Pods = BTreeMap<NamespacedName, BTreeSet<IpAddr>>;

/// Notes the pods that an object names.
pub(super) fn note(pods: &mut Pods, kind: &str, object: &Value) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let namespace = object["metadata"]["namespace"].as_str().filter(|n| !n.is_empty()).unwrap_or("default");
    let mut add = |namespace: &str, name: &Value, address: Option<&str>| {
        if let (Some(name), Some(address)) = (name.as_str(), address.and_then(parse_ip)) {
            pods.entry(NamespacedName::new(namespace, name)).or_default().insert(address);
        }
    };
    match kind {
        "EndpointSlice" => {
            for endpoint in list(&object["endpoints"]) {
                let target = &endpoint["targetRef"];
                if target["kind"] == "Pod" {
                    let namespace = target["namespace"].as_str().unwrap_or(namespace);
                    add(namespace, &target["name"], endpoint["addresses"][0].as_str());
                }
            }
        }
        "Pod" => {
            let name = &object["metadata"]["name"];
            add(namespace, name, object["status"]["podIP"].as_str());
            for address in list(&object["status"]["podIPs"]) {
                add(namespace, name, address["ip"].as_str());
            }
        }
        _ => {}
    }
}
