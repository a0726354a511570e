//! The kinds of objects that are watched.

use std::fmt;

use shunt_core::id::NamespacedName;
use shunt_core::store::Event;

/// A kind of API object that a source gives.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` `EndpointSlice`.
    EndpointSlice,
    /// `v1` Node; only the node's own.
    Node,
    /// `networking.k8s.io/v1` `ServiceCIDR`.
    ServiceCidr,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::ServiceCidr];

    /// The name of the kind in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }

    /// Whether objects of this kind live in namespaces.
    pub const fn namespaced(self) -> bool {
        matches!(self, Self::Service | Self::EndpointSlice)
    }

    /// The kind of a manifest. Manifests may carry any version of a group: what is read of the
    /// objects is the same in all of them.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        Self::ALL.into_iter().find(|k| k.name() == kind && k.group() == group)
    }

    const fn group(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::ServiceCidr => "networking.k8s.io",
        }
    }

    /// The event that says that an object is no more (or not ours any more).
    pub fn gone(self, name: &NamespacedName) -> Event {
        match self {
            Self::Service => Event::ServiceGone(name.clone()),
            Self::EndpointSlice => Event::SliceGone(name.clone()),
            Self::Node => Event::NodeGone,
            Self::ServiceCidr => Event::ServiceCidrGone(name.name.clone()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether an event takes an object away.
pub(crate) fn is_gone(event: &Event) -> bool {
    matches!(event, Event::ServiceGone(_) | Event::SliceGone(_) | Event::NodeGone | Event::ServiceCidrGone(_))
}
