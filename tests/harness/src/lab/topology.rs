//! Which namespaces a lab has and how they are joined.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;

use super::namespace::{Namespace, write_sysctl};
use super::netlink::{End, LOOPBACK, Netlink, Via};

/// A namespace's only link besides loopback, on the far side of its veth. No link of the node may have this number:
/// the kernel would then take neither for one end of a pair and let it wait a second for its carrier.
const GUEST_LINK: u32 = 99;
/// The node's links are numbered from here, so that they never meet a device the kernel makes by itself.
const FIRST_NODE_LINK: u32 = 100;
/// The node as its guests see it; assigned to no device, known only as neighbour entries.
const NODE_GATEWAY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1)), IpAddr::V6(link_local(1))];
/// A guest with many addresses as the node sees it, likewise.
const GUEST_GATEWAY: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::new(169, 254, 1, 2)), IpAddr::V6(link_local(2))];

const fn link_local(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host)
}

/// Sysctls of every namespace.
const COMMON: &[(&str, &str)] = &[
    // Addresses are ours alone: no duplicate address detection, no waiting for it.
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    // The machine's own choice is inherited otherwise, and strict filtering drops what a proxy sends the long way.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    // The kernel limits ICMP errors to one a second for each destination; a test sends many rejected probes.
    ("net/ipv4/icmp_ratelimit", "0"),
    ("net/ipv4/icmp_ratemask", "0"),
    ("net/ipv6/icmp/ratelimit", "0"),
    // Storms of short connections must not run out of ports in TIME_WAIT.
    ("net/ipv4/ip_local_port_range", "10000 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
];

/// Sysctls which older kernels do not have.
const OPTIONAL: &[(&str, &str)] =
    &[("net/ipv4/icmp_msgs_per_sec", "1000000"), ("net/ipv4/icmp_msgs_burst", "1000000")];

/// Sysctls of the node.
const NODE: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    // A packet may go back through the link it came from; its sender needs no advice about that.
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
];

/// How a guest hangs on the node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    /// Outside the cluster; everything the node knows no better way for goes here.
    Client,
    /// A pod on the node: one route for each address, as a CNI plugin makes.
    Pod,
    /// Pods of another node: routed through a gateway, whole prefixes possible.
    Remote,
}

#[derive(Clone, Debug)]
struct GuestSpec {
    role: Role,
    name: String,
    networks: Vec<IpNet>,
    pods: Vec<(IpAddr, String)>,
}

#[derive(Debug)]
struct Guest {
    role: Role,
    namespace: Namespace,
    node_end: End,
}

/// Describes a [`Lab`] before it exists.
#[derive(Clone, Debug)]
pub struct LabBuilder {
    node: Vec<IpAddr>,
    guests: Vec<GuestSpec>,
    prefix: String,
}

impl LabBuilder {
    /// Adds addresses of the node, on its `eth0`; the first of each family is the one it sends from.
    #[must_use]
    pub fn node(mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        self.node.extend(addresses);
        self
    }

    /// Adds addresses of the client outside the cluster.
    #[must_use]
    pub fn client(mut self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let client = self.guest(Role::Client, "client");
        client.networks.extend(addresses.into_iter().map(IpNet::from));
        self
    }

    /// Adds a pod on the node, in a namespace of its own, or more addresses of the pod of this name.
    #[must_use]
    pub fn pod(mut self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let pod = self.guest(Role::Pod, name);
        pod.networks.extend(addresses.into_iter().map(IpNet::from));
        self
    }

    /// Adds a namespace which stands for another node's pods, or more addresses to the one of this name: it takes
    /// every address of these networks as its own.
    #[must_use]
    pub fn remote(mut self, name: &str, networks: impl IntoIterator<Item = IpNet>) -> Self {
        self.guest(Role::Remote, name).networks.extend(networks);
        self
    }

    /// Adds a pod to a remote namespace: its addresses, and its name in the answers they give.
    #[must_use]
    pub fn remote_pod(mut self, name: &str, pod: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let remote = self.guest(Role::Remote, name);
        for address in addresses {
            remote.networks.push(address.into());
            remote.pods.push((address, pod.to_owned()));
        }
        self
    }

    /// How the names of the node's links to pods begin (`veth` otherwise).
    #[must_use]
    pub fn link_prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    fn guest(&mut self, role: Role, name: &str) -> &mut GuestSpec {
        let position = self.guests.iter().position(|guest| guest.role == role && guest.name == name);
        let position = position.unwrap_or_else(|| {
            let (name, networks, pods) = (name.to_owned(), Vec::new(), Vec::new());
            self.guests.push(GuestSpec { role, name, networks, pods });
            self.guests.len() - 1
        });
        &mut self.guests[position]
    }

    /// Builds the namespaces and joins them.
    pub fn build(mut self) -> Result<Lab> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("shunt-{}-{number}", std::process::id());
        self.guest(Role::Client, "client");
        // The client's link comes first: it carries the node's addresses.
        self.guests.sort_by_key(|guest| guest.role != Role::Client);

        let node = Namespace::create("node", || {
            write_all(COMMON)?;
            write_all(NODE)?;
            Netlink::open()?.set_up(LOOPBACK)
        })?;
        let mut lab = Lab { name, node, guests: BTreeMap::new(), next: 0, prefix: self.prefix };
        lab.attach(&self.guests, &self.node).with_context(|| format!("build lab {}", lab.name))?;
        Ok(lab)
    }
}

/// A node, a client and pods, each in a network namespace; gone when dropped.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use shunt_harness::lab::{Lab, Probe};
///
/// let lab = Lab::builder()
///     .node(["192.168.0.2".parse()?, "fd00:192::2".parse()?])
///     .client(["203.0.113.2".parse()?])
///     .pod("pod-a", ["10.180.0.1".parse()?])
///     .remote("node-2", ["10.180.1.0/24".parse()?])
///     .build()?;
/// lab.pod("pod-a")?.serve_ports([8080])?;
/// let outcome = lab.client().probe(Probe::tcp("10.180.0.1:8080".parse()?))?;
/// assert_eq!(outcome.pod(), Some("pod-a"));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Lab {
    name: String,
    node: Namespace,
    guests: BTreeMap<String, Guest>,
    next: u32,
    prefix: String,
}

impl Lab {
    /// Starts the description of a lab; node and client are part of every lab.
    pub fn builder() -> LabBuilder {
        LabBuilder { node: Vec::new(), guests: Vec::new(), prefix: "veth".to_owned() }
    }

    /// This lab's name, unique on the machine.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node under test.
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// The client outside the cluster.
    pub fn client(&self) -> &Namespace {
        &self.guests["client"].namespace
    }

    /// The pod or remote namespace of this name.
    pub fn pod(&self, name: &str) -> Result<&Namespace> {
        let guest = self.guests.get(name).with_context(|| format!("no pod {name} in lab {}", self.name))?;
        Ok(&guest.namespace)
    }

    /// Every namespace: the node, then the others by name.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        std::iter::once(&self.node).chain(self.guests.values().map(|guest| &guest.namespace))
    }

    /// The node's link to this pod, remote namespace or the client (`eth0`).
    pub fn link(&self, name: &str) -> Option<&str> {
        self.guests.get(name).map(|guest| guest.node_end.name.as_str())
    }

    /// Adds a pod on the node while the lab runs.
    pub fn add_pod(&mut self, name: &str, addresses: &[IpAddr]) -> Result<&Namespace> {
        let networks = addresses.iter().copied().map(IpNet::from).collect();
        let spec = GuestSpec { role: Role::Pod, name: name.to_owned(), networks, pods: Vec::new() };
        self.attach(&[spec], &[])?;
        self.pod(name)
    }

    /// Removes a pod or remote namespace with its link, as when its node kills it: no goodbye on its connections.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let guest = self.guests.remove(name).with_context(|| format!("no pod {name}"))?;
        self.node.run(|| Netlink::open()?.remove_link(guest.node_end.index))
    }

    /// Gives the node another address.
    pub fn add_node_address(&self, address: IpAddr) -> Result<()> {
        self.node.run(|| {
            let mut netlink = Netlink::open()?;
            netlink.add_address(FIRST_NODE_LINK, address)?;
            wait_until("address", || netlink.is_local(address))
        })
    }

    /// Takes an address from the node.
    pub fn remove_node_address(&self, address: IpAddr) -> Result<()> {
        self.node.run(|| Netlink::open()?.remove_address(FIRST_NODE_LINK, address))
    }

    /// Gives the client, a pod or a remote namespace another address (or a whole network), and the node its route.
    pub fn add_address(&self, name: &str, network: IpNet) -> Result<()> {
        let guest = self.guests.get(name).with_context(|| format!("no pod {name}"))?;
        guest.namespace.run(|| add_networks(&mut Netlink::open()?, &[network]))?;
        self.node.run(|| guest.add_route(&mut Netlink::open()?, network))
    }

    /// Takes an address from a pod, with the node's route.
    pub fn remove_address(&self, name: &str, address: IpAddr) -> Result<()> {
        let guest = self.guests.get(name).with_context(|| format!("no pod {name}"))?;
        let via = guest.via(address);
        self.node.run(|| Netlink::open()?.remove_route(address.into(), guest.node_end.index, via))?;
        guest.namespace.run(|| Netlink::open()?.remove_address(GUEST_LINK, address))
    }

    /// Creates guests' namespaces, joins them to the node and gives both sides addresses and routes.
    fn attach(&mut self, specs: &[GuestSpec], node_addresses: &[IpAddr]) -> Result<()> {
        let mut added = Vec::new();
        for spec in specs {
            if self.guests.contains_key(&spec.name) || spec.name == "node" {
                bail!("two namespaces called {}", spec.name);
            }
            let index = FIRST_NODE_LINK + self.next;
            let name = match spec.role {
                Role::Client => "eth0".to_owned(),
                Role::Pod | Role::Remote => format!("{}{}", self.prefix, self.next),
            };
            self.next += 1;
            let namespace = Namespace::create(&spec.name, || {
                write_all(COMMON)?;
                Netlink::open()?.set_up(LOOPBACK)
            })?;
            for (address, pod) in &spec.pods {
                namespace.name_address(*address, pod);
            }
            let node_end = End { name, index, mac: mac(index, 1) };
            let guest_end = End { name: "eth0".to_owned(), index: GUEST_LINK, mac: mac(index, 2) };
            added.push((spec, Guest { role: spec.role, namespace, node_end }, guest_end));
        }

        self.node.run(|| {
            let mut netlink = Netlink::open()?;
            for (_, guest, guest_end) in &added {
                netlink.add_veth(&guest.node_end, guest_end, guest.namespace.handle().as_raw_fd())?;
            }
            Ok(())
        })?;
        for (spec, guest, _) in &added {
            guest
                .namespace
                .run(|| set_up_guest(&spec.networks, &guest.node_end))
                .with_context(|| format!("set up {}", spec.name))?;
        }
        self.node.run(|| {
            let mut netlink = Netlink::open()?;
            wait_until("links", || netlink.links_ready())?;
            for address in node_addresses {
                netlink.add_address(FIRST_NODE_LINK, *address)?;
            }
            for (spec, guest, guest_end) in &added {
                for gateway in GUEST_GATEWAY {
                    netlink.add_neighbour(guest.node_end.index, gateway, guest_end.mac)?;
                }
                if spec.role == Role::Client {
                    for gateway in GUEST_GATEWAY {
                        let everything = everything(gateway);
                        netlink.add_route(everything, guest.node_end.index, Via::Gateway(gateway))?;
                    }
                }
                for network in &spec.networks {
                    guest.add_route(&mut netlink, *network)?;
                }
            }
            for address in node_addresses {
                wait_until("address", || netlink.is_local(*address))?;
            }
            Ok(())
        })?;
        self.guests.extend(added.into_iter().map(|(spec, guest, _)| (spec.name.clone(), guest)));
        Ok(())
    }
}

impl Guest {
    /// How the node reaches an address of this guest.
    fn via(&self, address: IpAddr) -> Via {
        match self.role {
            Role::Pod => Via::Link,
            Role::Client | Role::Remote => Via::Gateway(GUEST_GATEWAY[usize::from(address.is_ipv6())]),
        }
    }

    /// Adds the node's route to a network of this guest.
    fn add_route(&self, netlink: &mut Netlink, network: IpNet) -> Result<()> {
        let index = self.node_end.index;
        if self.role == Role::Pod {
            // Pod addresses are on the link itself: each needs its own neighbour entry.
            netlink.add_neighbour(index, network.addr(), mac(index, 2))?;
        }
        netlink.add_route(network, index, self.via(network.addr()))
    }
}

/// Runs inside a guest once its `eth0` exists.
fn set_up_guest(networks: &[IpNet], node_end: &End) -> Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.set_up(GUEST_LINK)?;
    wait_until("link", || netlink.links_ready())?;
    add_networks(&mut netlink, networks)?;
    for gateway in NODE_GATEWAY {
        netlink.add_neighbour(GUEST_LINK, gateway, node_end.mac)?;
        netlink.add_route(everything(gateway), GUEST_LINK, Via::Gateway(gateway))?;
    }
    Ok(())
}

/// Makes networks a guest's own: single addresses on its link, larger ones as a local route (`AnyIP`).
fn add_networks(netlink: &mut Netlink, networks: &[IpNet]) -> Result<()> {
    for network in networks {
        if network.prefix_len() == network.max_prefix_len() {
            netlink.add_address(GUEST_LINK, network.addr())?;
        } else {
            netlink.add_route(*network, LOOPBACK, Via::Local)?;
            if network.addr().is_ipv6() {
                // IPv4 asks its routes whether an address may be a source, IPv6 asks its links.
                write_sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
            }
        }
    }
    for network in networks {
        wait_until("address", || netlink.is_local(network.addr()))?;
    }
    Ok(())
}

/// The default route of an address's family.
fn everything(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// A locally administered MAC address: which link, which side.
fn mac(index: u32, side: u8) -> [u8; 6] {
    let [a, b, c, d] = index.to_be_bytes();
    [0x02, a ^ side, b, c, d, side]
}

fn write_all(sysctls: &[(&str, &str)]) -> Result<()> {
    for (key, value) in sysctls {
        write_sysctl(key, value)?;
    }
    if std::ptr::eq(sysctls, COMMON) {
        for (key, value) in OPTIONAL {
            // Absent in kernels before 6.12, where the limit is the machine's and not the namespace's.
            drop(write_sysctl(key, value));
        }
    }
    Ok(())
}

/// Polls for what the kernel does from its work queues; normally true at the first look.
fn wait_until(what: &str, mut ready: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !ready().with_context(|| format!("wait for {what}"))? {
        if Instant::now() > deadline {
            bail!("{what} not ready after 5 s");
        }
        thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}
