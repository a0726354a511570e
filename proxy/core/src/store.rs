//! What the API server (or a folder of manifests) says, kept as it groups it.
//!
//! Every change answers with the Services that it touches, so that the work that follows is
//! proportional to the change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::endpoint::{EndpointSlice, PodHash};
use crate::id::NamespacedName;
use crate::node::Node;
use crate::service::Service;

/// One change of one object. Sources of objects send these and nothing else.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A Service was added or changed.
    Service(Service),
    /// A Service went away, or is not ours any more (headless, `ExternalName`, another proxy's).
    ServiceGone(NamespacedName),
    /// An `EndpointSlice` was added or changed.
    Slice(EndpointSlice),
    /// An `EndpointSlice` went away, or is not ours any more.
    SliceGone(NamespacedName),
    /// This node's own Node object.
    Node(Node),
    /// This node's own Node object went away.
    NodeGone,
    /// A `ServiceCIDR` object (`networking.k8s.io/v1`) with its ranges.
    ServiceCidr(Arc<str>, Vec<IpNet>),
    /// A `ServiceCIDR` object went away.
    ServiceCidrGone(Arc<str>),
}

/// What a change touches.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Dirty {
    /// Services to compile again.
    pub services: BTreeSet<NamespacedName>,
    /// The Node object changed: everything that depends on it is to be looked at again.
    pub node: bool,
    /// The Service ranges changed.
    pub service_cidrs: bool,
}

impl Dirty {
    /// True when nothing is touched.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node && !self.service_cidrs
    }

    /// Adds what another change touches.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.node |= other.node;
        self.service_cidrs |= other.service_cidrs;
    }
}

/// All objects known, slices kept apart as the API groups them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Store {
    services: BTreeMap<NamespacedName, Arc<Service>>,
    /// Slices by Service, sorted by name of the slice. Most Services have one.
    slices: BTreeMap<NamespacedName, Vec<Arc<EndpointSlice>>>,
    /// To which Service a slice belongs, so that a deletion and a move find it.
    slice_owner: BTreeMap<NamespacedName, NamespacedName>,
    node: Option<Node>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
}

impl Store {
    /// Takes in one change and says what it touches; an event that changes nothing touches nothing.
    pub fn apply(&mut self, event: Event) -> Dirty {
        let mut dirty = Dirty::default();
        match event {
            Event::Service(service) => {
                if self.services.get(&service.name).is_none_or(|old| **old != service) {
                    dirty.services.insert(service.name.clone());
                    self.services.insert(service.name.clone(), Arc::new(service));
                }
            }
            Event::ServiceGone(name) => {
                if self.services.remove(&name).is_some() {
                    dirty.services.insert(name);
                }
            }
            Event::Slice(slice) => {
                if self.slice_owner.get(&slice.name).is_some_and(|owner| *owner != slice.service) {
                    dirty.services.extend(self.remove_slice(&slice.name));
                }
                let of_service = self.slices.entry(slice.service.clone()).or_default();
                let place = place_of(of_service, &slice.name.name);
                if place.is_ok_and(|i| *of_service[i] == slice) {
                    return dirty;
                }
                dirty.services.insert(slice.service.clone());
                self.slice_owner.insert(slice.name.clone(), slice.service.clone());
                let slice = Arc::new(slice);
                match place {
                    Ok(i) => of_service[i] = slice,
                    Err(i) => of_service.insert(i, slice),
                }
            }
            Event::SliceGone(name) => dirty.services.extend(self.remove_slice(&name)),
            Event::Node(node) => {
                if self.node.as_ref() != Some(&node) {
                    self.node = Some(node);
                    dirty.node = true;
                }
            }
            Event::NodeGone => dirty.node = self.node.take().is_some(),
            Event::ServiceCidr(name, ranges) => {
                if self.service_cidrs.get(&name) != Some(&ranges) {
                    self.service_cidrs.insert(name, ranges);
                    dirty.service_cidrs = true;
                }
            }
            Event::ServiceCidrGone(name) => {
                dirty.service_cidrs = self.service_cidrs.remove(&name).is_some();
            }
        }
        dirty
    }

    fn remove_slice(&mut self, name: &NamespacedName) -> Option<NamespacedName> {
        let owner = self.slice_owner.remove(name)?;
        if let Some(of_service) = self.slices.get_mut(&owner) {
            if let Ok(i) = place_of(of_service, &name.name) {
                of_service.remove(i);
            }
            if of_service.is_empty() {
                self.slices.remove(&owner);
            }
        }
        Some(owner)
    }

    /// A Service by name.
    pub fn service(&self, name: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All Services, by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The slices of a Service, by name of the slice.
    pub fn slices(&self, service: &NamespacedName) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices.get(service).into_iter().flatten()
    }

    /// All slices, by Service and name.
    pub fn all_slices(&self) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices.values().flatten()
    }

    /// Addresses of the endpoints that are these pods, by the pod's hash and namespace. Looks at every
    /// endpoint: this is for people who ask.
    pub fn pods(&self, wanted: &BTreeSet<PodHash>) -> BTreeMap<(PodHash, Arc<str>), BTreeSet<IpAddr>> {
        let mut found: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        if wanted.is_empty() {
            return found;
        }
        for slice in self.all_slices() {
            for endpoint in &slice.endpoints {
                if let Some(pod) = endpoint.pod.filter(|pod| wanted.contains(pod)) {
                    let key = (pod, slice.name.namespace.clone());
                    found.entry(key).or_default().insert(endpoint.address);
                }
            }
        }
        found
    }

    /// This node's own Node object, once known.
    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// Ranges of all `ServiceCIDR`s, by name of the object.
    pub fn service_cidrs(&self) -> &BTreeMap<Arc<str>, Vec<IpNet>> {
        &self.service_cidrs
    }
}

/// Where a slice is, or belongs, among those of its Service.
fn place_of(slices: &[Arc<EndpointSlice>], name: &Arc<str>) -> Result<usize, usize> {
    slices.binary_search_by(|slice| slice.name.name.cmp(name))
}
