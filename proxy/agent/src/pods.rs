//! Pods by name, for questions that say by it who sends a packet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use shunt_core::endpoint::PodHash;
use shunt_core::id::IpFamily;
use shunt_core::store::Store;
use shunt_watch::Pods;

/// A pod as somebody names it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(crate) struct PodName {
    /// `None` for the only pod of the name.
    namespace: Option<String>,
    name: String,
}

impl PodName {
    /// Of `NAME` or `NAMESPACE/NAME`.
    pub(crate) fn parse(text: &str) -> Self {
        match text.split_once('/') {
            Some((namespace, name)) => Self { namespace: Some(namespace.to_owned()), name: name.to_owned() },
            None => Self { namespace: None, name: text.to_owned() },
        }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Who knows pods.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PodSource<'a> {
    /// Manifests, with the pods that are named in them.
    Manifests(&'a Pods),
    /// The running agent, by the hashes that its endpoints have.
    Endpoints(&'a Store),
}

/// The pods that some questions name.
#[derive(Debug)]
pub(crate) struct Directory<'a> {
    source: PodSource<'a>,
    /// Addresses by name, then namespace.
    found: BTreeMap<&'a str, BTreeMap<Arc<str>, BTreeSet<IpAddr>>>,
}

impl<'a> Directory<'a> {
    /// Looks through the source once, however many pods are named.
    pub(crate) fn new(source: PodSource<'a>, named: impl Iterator<Item = &'a PodName>) -> Self {
        let mut found: BTreeMap<_, BTreeMap<_, _>> =
            named.map(|pod| (pod.name.as_str(), BTreeMap::new())).collect();
        match source {
            PodSource::Manifests(pods) => {
                for (pod, addresses) in pods {
                    if let Some(found) = found.get_mut(&*pod.name) {
                        found.insert(pod.namespace.clone(), addresses.clone());
                    }
                }
            }
            PodSource::Endpoints(store) => {
                let mut hashed: BTreeMap<_, _> =
                    found.iter_mut().map(|(name, found)| (PodHash::of(name), found)).collect();
                for ((hash, namespace), addresses) in store.pods(&hashed.keys().copied().collect()) {
                    if let Some(found) = hashed.get_mut(&hash) {
                        found.insert(namespace, addresses);
                    }
                }
            }
        }
        Self { source, found }
    }

    /// The address of a pod in one family.
    pub(crate) fn address(&self, pod: &PodName, family: IpFamily) -> Result<IpAddr> {
        let asked = pod.namespace.as_deref();
        let of_name = self.found.get(pod.name.as_str()).into_iter().flatten();
        let found: Vec<_> = of_name.filter(|(n, _)| asked.is_none_or(|asked| ***n == *asked)).collect();
        let name = &pod.name;
        let (namespace, addresses) = match (found.as_slice(), self.source) {
            ([(namespace, addresses)], _) => (namespace, addresses),
            ([], PodSource::Manifests(_)) => bail!(
                "pod {:?}: no EndpointSlice (targetRef) and no Pod among the manifests has it: give pod/ADDRESS",
                pod.to_string()
            ),
            ([], PodSource::Endpoints(_)) => bail!(
                "pod {:?}: no endpoint of a Service is this pod, and the running agent knows no other pods: give \
                 pod/ADDRESS (`kubectl get pod -o wide` has it)",
                pod.to_string()
            ),
            (several, _) => {
                let several: Vec<_> = several.iter().map(|(ns, _)| format!("pod/{ns}/{name}")).collect();
                bail!("pod {name:?}: which of {}?", several.join(", "))
            }
        };
        let list = |addresses: &[&IpAddr]| {
            addresses.iter().map(|a| format!("pod/{a}")).collect::<Vec<_>>().join(", ")
        };
        let of_family: Vec<_> = addresses.iter().filter(|a| IpFamily::of(**a) == family).collect();
        match of_family.as_slice() {
            [address] => Ok(**address),
            [] => bail!(
                "pod {namespace}/{name} has no {family} address that is known, but {}",
                list(&addresses.iter().collect::<Vec<_>>())
            ),
            several => {
                bail!("pod {namespace}/{name} has several {family} addresses: give one of {}", list(several))
            }
        }
    }
}
