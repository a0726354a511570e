//! Where each kind lives on the server, and which objects of it are asked for.

use std::fmt::Write;

use crate::kind::Kind;

/// The request for the objects of one kind.
#[derive(Clone, Debug)]
pub(super) struct Resource {
    pub(super) path: &'static str,
    labels: Option<&'static str>,
    fields: Option<String>,
    /// An API server may not have it: that is the same as having none of its objects.
    pub(super) optional: bool,
}

impl Resource {
    pub(super) fn of(kind: Kind, node_name: &str) -> Self {
        match kind {
            Kind::Service => Self {
                path: "/api/v1/services",
                labels: Some("!service.kubernetes.io/service-proxy-name"),
                fields: Some("spec.clusterIP!=None".to_owned()),
                optional: false,
            },
            Kind::EndpointSlice => Self {
                path: "/apis/discovery.k8s.io/v1/endpointslices",
                labels: Some("!service.kubernetes.io/headless"),
                fields: None,
                optional: false,
            },
            Kind::Node => Self {
                path: "/api/v1/nodes",
                labels: None,
                fields: Some(format!("metadata.name={node_name}")),
                optional: false,
            },
            Kind::ServiceCidr => Self {
                path: "/apis/networking.k8s.io/v1/servicecidrs",
                labels: None,
                fields: None,
                optional: true,
            },
        }
    }

    /// Stops asking the server to choose by fields (old ones refuse `spec.clusterIP`); the
    /// conversion leaves the same objects out. Answers whether there was anything to stop.
    pub(super) fn without_fields(&mut self, kind: Kind) -> bool {
        kind == Kind::Service && self.fields.take().is_some()
    }

    /// Path and query of a request.
    pub(super) fn uri(&self, parameters: &[(&str, &str)]) -> String {
        let mut uri = self.path.to_owned();
        let selectors = [("labelSelector", self.labels), ("fieldSelector", self.fields.as_deref())];
        let selectors = selectors.into_iter().filter_map(|(key, value)| Some((key, value?)));
        let mut separator = '?';
        for (key, value) in selectors.chain(parameters.iter().copied()) {
            uri.push(separator);
            separator = '&';
            uri.push_str(key);
            uri.push('=');
            for byte in value.bytes() {
                if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                    uri.push(char::from(byte));
                } else {
                    // Writing to a String cannot fail.
                    let _ = write!(uri, "%{byte:02X}");
                }
            }
        }
        uri
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_and_parameters_are_escaped() {
        let mut services = Resource::of(Kind::Service, "n");
        assert_eq!(
            services.uri(&[("limit", "5"), ("continue", "a+b/=")]),
            "/api/v1/services?labelSelector=%21service.kubernetes.io%2Fservice-proxy-name\
             &fieldSelector=spec.clusterIP%21%3DNone&limit=5&continue=a%2Bb%2F%3D"
        );
        assert!(services.without_fields(Kind::Service));
        assert!(!services.without_fields(Kind::Service));
        assert_eq!(Resource::of(Kind::ServiceCidr, "n").uri(&[]), "/apis/networking.k8s.io/v1/servicecidrs");
    }
}
