//! The cluster that is measured: the same API objects for Shunt, for kube-proxy and for the layouts.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result};
use ipnet::IpNet;
use serde_json::{Value, json};
use shunt_harness::apiserver::many_services;

/// Name of the node.
pub(crate) const NODE: &str = "node-1";
/// The node's address.
pub(crate) const NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
/// Sources in this range are pods; others are masqueraded on their way to a cluster IP.
pub(crate) const POD_RANGE: &str = "10.0.0.0/8";
/// Range of cluster IPs.
pub(crate) const SERVICE_RANGE: &str = "10.96.0.0/16";
/// Where endpoints are: everything that [`many_services`] hands out.
pub(crate) const ENDPOINT_RANGES: [&str; 2] = ["10.100.0.0/14", "10.104.0.0/14"];
/// Port on which endpoints listen.
pub(crate) const ENDPOINT_PORT: u16 = 8080;
/// Size of the default range of node ports, 30000 to 32767.
const NODE_PORTS: usize = 2_768;

/// How large a cluster is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    /// Number of Services.
    pub services: usize,
    /// Endpoints of each.
    pub endpoints: usize,
    /// One Service in ten is of type NodePort, as far as ports go.
    pub node_ports: bool,
    /// UDP instead of TCP.
    pub udp: bool,
}

impl Shape {
    /// TCP Services without node ports.
    pub(crate) const fn new(services: usize, endpoints: usize) -> Self {
        Self { services, endpoints, node_ports: false, udp: false }
    }
}

/// One Service with one port.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// `namespace/name`.
    pub name: String,
    /// Address and port.
    pub frontend: SocketAddrV4,
    /// Port on the node.
    pub node_port: Option<u16>,
    /// Where it leads.
    pub endpoints: Vec<SocketAddrV4>,
}

/// Objects, and what they mean.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// How large it is.
    pub shape: Shape,
    /// Node, Services, `EndpointSlice`s.
    pub objects: Vec<Value>,
    /// The Services.
    pub services: Vec<Service>,
}

impl Cluster {
    /// Makes a cluster.
    pub(crate) fn new(shape: Shape) -> Result<Self> {
        let mut objects = vec![json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE },
            "spec": { "podCIDR": POD_RANGE, "podCIDRs": [POD_RANGE] },
            "status": { "addresses": [{ "type": "InternalIP", "address": NODE_ADDRESS }] },
        })];
        let mut services: Vec<Service> = Vec::with_capacity(shape.services);
        for mut object in many_services(shape.services, shape.endpoints) {
            let protocol = if shape.udp { "UDP" } else { "TCP" };
            if object["kind"] == "Service" {
                let number = services.len();
                let node_port = (shape.node_ports && number.is_multiple_of(10) && number / 10 < NODE_PORTS)
                    .then(|| 30_000 + (number / 10) as u16);
                object["spec"]["ports"][0]["protocol"] = protocol.into();
                if let Some(port) = node_port {
                    object["spec"]["type"] = "NodePort".into();
                    object["spec"]["externalTrafficPolicy"] = "Cluster".into();
                    object["spec"]["ports"][0]["nodePort"] = port.into();
                }
                let name = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
                let address = object["spec"]["clusterIP"].as_str().context("no cluster IP")?;
                services.push(Service {
                    name: format!("{}/{}", name("namespace"), name("name")),
                    frontend: SocketAddrV4::new(address.parse()?, 80),
                    node_port,
                    endpoints: Vec::with_capacity(shape.endpoints),
                });
            } else {
                object["ports"][0]["protocol"] = protocol.into();
                // An object without a Service before it has nobody to belong to.
                let service = services.last_mut().context("a slice without a Service")?;
                for endpoint in object["endpoints"].as_array().into_iter().flatten() {
                    let address = endpoint["addresses"][0].as_str().context("no address")?;
                    service.endpoints.push(SocketAddrV4::new(address.parse()?, ENDPOINT_PORT));
                }
            }
            objects.push(object);
        }
        Ok(Self { shape, objects, services })
    }

    /// All cluster IPs with their ports.
    pub(crate) fn frontends(&self) -> Vec<SocketAddrV4> {
        self.services.iter().map(|service| service.frontend).collect()
    }

    /// All node ports, on the node's address.
    pub(crate) fn node_ports(&self) -> Vec<SocketAddrV4> {
        let ports = self.services.iter().filter_map(|service| service.node_port);
        ports.map(|port| SocketAddrV4::new(NODE_ADDRESS, port)).collect()
    }

    /// The first endpoint of each Service.
    pub(crate) fn pods(&self) -> Vec<SocketAddrV4> {
        self.services.iter().filter_map(|service| service.endpoints.first().copied()).collect()
    }
}

/// The ranges of endpoints as networks.
pub(crate) fn endpoint_networks() -> Result<Vec<IpNet>> {
    ENDPOINT_RANGES.iter().map(|range| range.parse().context("range")).collect()
}
