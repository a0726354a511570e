//! A node, a client and pods of one Service, `ns/web`, for what only ipvs mode has. For the kernel of a guest.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use shunt_core::compile::Context;
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, Node};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::Event;
use shunt_harness::lab::{Lab, Probe};
use shunt_mode::Backend as _;
use shunt_mode_ipvs::Ipvs;
use shunt_mode_ipvs::kernel::{Linux, Options};

use crate::driver::{Cluster, Synced};
use crate::random::{NODE, Step};

/// The family of everything here.
pub const FAMILY: IpFamily = IpFamily::V4;
/// The node's address.
pub const NODE_IP: [u8; 4] = [192, 168, 0, 2];
/// The Service's cluster IP; it serves port 80, TCP and UDP.
pub const VIP: [u8; 4] = [10, 96, 0, 1];
/// Pods that can be endpoints: `pod1` and so on.
pub const PODS: u8 = 4;
/// What pods serve.
const PORT: u16 = 8080;
/// A guest that gets no CPU is late with everything.
const PATIENCE: Duration = Duration::from_secs(10);

/// The address of a pod, from 1.
pub fn pod(n: u8) -> IpAddr {
    [10, 180, 0, n].into()
}

/// The endpoint of a pod.
pub fn at(n: u8) -> SocketAddr {
    SocketAddr::new(pod(n), PORT)
}

/// A TCP connection to an address.
pub fn probe(address: [u8; 4], port: u16) -> Probe {
    Probe::tcp((address, port).into()).timeout(PATIENCE)
}

/// The lab, what should be in its node's kernel, and that kernel.
#[derive(Debug)]
pub struct Web {
    /// The namespaces.
    pub lab: Lab,
    /// The Service and its endpoints.
    pub cluster: Cluster,
    /// The node's kernel.
    pub kernel: Synced<Ipvs<Linux>>,
    service: Service,
}

impl Web {
    /// With endpoints 1 and 2.
    pub fn new() -> Self {
        let mut builder = Lab::builder().node([NODE_IP.into()]).client(["203.0.113.2".parse().unwrap()]);
        for n in 1..=PODS {
            builder = builder.pod(&format!("pod{n}"), [pod(n)]);
        }
        let lab = builder.build().unwrap();
        for n in 1..=PODS {
            lab.pod(&format!("pod{n}")).unwrap().serve_ports([PORT]).unwrap();
        }
        let mut cluster = Cluster::new(Context::new(NODE, Config::default()));
        let addresses = vec![NODE_IP.into()];
        cluster.step(&Step::Event(Event::Node(Node { name: NODE.into(), addresses, ..Node::default() })));
        let port =
            |protocol, name: &str| ServicePort { name: name.into(), protocol, port: 80, node_port: None };
        let service = Service {
            name: NamespacedName::new("ns", "web"),
            created: 0,
            cluster_ips: vec![VIP.into()],
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges: Vec::new(),
            ports: vec![port(Protocol::Tcp, "tcp"), port(Protocol::Udp, "udp")],
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            scheduler: None,
            algorithm: None,
            health_check_node_port: None,
        };
        let kernel = adopt(&lab, Options::default());
        let mut web = Self { lab, cluster, kernel, service };
        web.edit(|_| {});
        web.pods(&[1, 2]);
        web
    }

    /// Another process takes over, with these settings.
    pub fn restart(&mut self, options: Options) {
        self.kernel = adopt(&self.lab, options);
    }

    /// Changes the Service; nothing is programmed yet.
    pub fn edit(&mut self, edit: impl FnOnce(&mut Service)) {
        edit(&mut self.service);
        self.cluster.step(&Step::Event(Event::Service(self.service.clone())));
    }

    /// Programs what has changed.
    pub fn sync(&mut self) {
        let change = self.cluster.take_change(FAMILY);
        self.kernel.sync(self.cluster.table(FAMILY), &change).unwrap();
    }

    /// Makes these pods the endpoints, and programs that.
    pub fn pods(&mut self, pods: &[u8]) {
        let endpoint = |n: &u8| Endpoint {
            pod: None,
            address: pod(*n),
            conditions: Conditions::default(),
            node: Some(NODE.into()),
            zone: None,
            hints: None,
        };
        let port = |protocol, name: &str| EndpointPort { name: name.into(), protocol, port: PORT };
        self.cluster.step(&Step::Event(Event::Slice(EndpointSlice {
            name: NamespacedName::new("ns", "web-1"),
            service: self.service.name.clone(),
            family: FAMILY,
            ports: vec![port(Protocol::Tcp, "tcp"), port(Protocol::Udp, "udp")],
            endpoints: pods.iter().map(endpoint).collect(),
            last_change_trigger: None,
        })));
        self.sync();
    }

    /// Weights of the destinations of a protocol, as the kernel has them.
    pub fn weights(&mut self, protocol: ipvs_netlink::Protocol) -> Vec<(SocketAddr, u32)> {
        let state = self.kernel.backend.observe().unwrap();
        assert_eq!(state, self.kernel.mirror);
        let key = ipvs_netlink::ServiceKey::Address { address: VIP.into(), protocol, port: 80 };
        state.servers[&key].destinations.values().map(|d| (d.address, d.weight)).collect()
    }

    /// Does what is due by this time.
    pub fn tend(&mut self, now: Instant) {
        let (plan, _) = self.kernel.backend.ripen(&self.kernel.mirror, now).unwrap();
        for transaction in &plan.transactions {
            self.kernel.apply(transaction).unwrap();
        }
    }
}

impl Default for Web {
    fn default() -> Self {
        Self::new()
    }
}

fn adopt(lab: &Lab, options: Options) -> Synced<Ipvs<Linux>> {
    lab.node().run(|| Ok(Synced::adopt(Ipvs::new(Linux::open(FAMILY, options)?))?)).unwrap()
}
