//! Clients that never change their port follow their Service: the agent's binary on a real kernel, in
//! network namespaces of its own, fed from a folder of manifests.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::expect_used)]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::{Flow, FlowFilter};
use shunt_harness::lab::{ChildGuard, Lab, Probe, require_kernel};
use shunt_node::conntrack::{Conntrack, Netlink};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
const LONG: Duration = Duration::from_secs(20);
/// As long as an answer may take to come, on one machine.
const SHORT: Duration = Duration::from_millis(50);
const VIPS: [&str; 2] = ["10.96.0.53", "fd00:96::53"];
const NODE: [&str; 2] = ["192.0.2.11", "2001:db8::11"];
const OTHER_ADDRESS: &str = "192.0.2.12";
const NODE_PORT: u16 = 30053;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Address of a pod, by its letter.
fn pod(family: IpFamily, letter: char) -> String {
    let number = letter as u32 - u32::from(b'a') + 1;
    match family {
        IpFamily::V4 => format!("10.244.1.{number}"),
        IpFamily::V6 => format!("fd00:244::{number}"),
    }
}

struct Cluster {
    lab: Lab,
    folder: tempfile::TempDir,
    elsewhere: tempfile::TempDir,
}

/// State of an endpoint.
#[derive(Clone, Copy, PartialEq)]
enum Is {
    Ready,
    Terminating,
}

impl Cluster {
    fn new() -> Result<Self> {
        let mut lab = Lab::builder()
            .node([ip(NODE[0]), ip(NODE[1]), ip(OTHER_ADDRESS)])
            .client([ip("198.51.100.20"), ip("2001:db8:1::20")])
            .remote("elsewhere", ["10.99.0.0/16".parse()?]);
        for letter in ['a', 'b', 'c'] {
            lab = lab.pod(&format!("pod-{letter}"), IpFamily::ALL.map(|f| ip(&pod(f, letter))));
        }
        let lab = lab.build()?;
        for letter in ["pod-a", "pod-b", "pod-c"] {
            lab.pod(letter)?.serve_ports([8080])?;
        }
        let cluster = Self { lab, folder: tempfile::tempdir()?, elsewhere: tempfile::tempdir()? };
        let addresses = NODE.map(|address| json!({ "type": "InternalIP", "address": address }));
        cluster.put(
            "node",
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
                "status": { "addresses": addresses },
            }),
        )?;
        cluster.service()?;
        Ok(cluster)
    }

    fn service(&self) -> Result<()> {
        let port = |protocol: &str| {
            json!({
                "name": format!("dns-{}", protocol.to_lowercase()), "port": 53, "protocol": protocol,
                "nodePort": NODE_PORT,
            })
        };
        self.put(
            "service",
            &json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": "dns", "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
                "spec": {
                    "type": "NodePort", "clusterIP": VIPS[0], "clusterIPs": VIPS,
                    "ipFamilies": ["IPv4", "IPv6"], "ports": [port("UDP"), port("TCP")],
                },
            }),
        )
    }

    /// Replaces the endpoints of both families.
    fn endpoints(&self, endpoints: &[(char, Is)]) -> Result<()> {
        for family in IpFamily::ALL {
            let endpoints: Vec<Value> = endpoints
                .iter()
                .map(|(letter, is)| {
                    let conditions = json!({
                        "ready": *is == Is::Ready, "serving": true, "terminating": *is == Is::Terminating,
                    });
                    json!({ "addresses": [pod(family, *letter)], "conditions": conditions, "nodeName": "worker-1" })
                })
                .collect();
            let ports = ["UDP", "TCP"].map(|protocol| {
                let name = format!("dns-{}", protocol.to_lowercase());
                json!({ "name": name, "port": 8080, "protocol": protocol })
            });
            let name = format!("dns-{}", family.to_string().to_lowercase());
            self.put(
                &name,
                &json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                    "metadata": {
                        "name": name, "namespace": "demo", "labels": { "kubernetes.io/service-name": "dns" },
                    },
                    "addressType": family,
                    "ports": ports,
                    "endpoints": endpoints,
                }),
            )?;
        }
        Ok(())
    }

    fn ready(&self, letters: &str) -> Result<()> {
        self.endpoints(&letters.chars().map(|letter| (letter, Is::Ready)).collect::<Vec<_>>())
    }

    fn put(&self, name: &str, object: &Value) -> Result<()> {
        let new = self.elsewhere.path().join("new");
        std::fs::write(&new, object.to_string())?;
        Ok(std::fs::rename(new, self.folder.path().join(format!("{name}.json")))?)
    }

    fn remove(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.folder.path().join(format!("{name}.json")))?)
    }

    /// Starts the agent; it is in sync for both families when this returns, and has looked at all flows.
    fn start(&self) -> Result<ChildGuard> {
        let mut command = Command::new(SHUNT);
        command
            .args(["run", "--hostname-override", "worker-1", "--cluster-cidr", "10.244.0.0/16,fd00:244::/64"])
            .args(["--logging-format", "json", "-v", "4", "--admin-socket"])
            .arg(self.elsewhere.path().join("socket"))
            .arg("--manifests")
            .arg(self.folder.path());
        let mut agent = self.lab.node().spawn(&command)?;
        let deadline = Instant::now() + LONG;
        while cleanups(&agent).len() < 2 {
            ensure!(agent.try_wait()?.is_none(), "ended: {agent}");
            ensure!(Instant::now() < deadline, "never in sync: {agent}");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(agent)
    }

    fn client(&self, to: &str, port: u16) -> Result<Client> {
        Client::new(&self.lab, SocketAddr::new(ip(to), port))
    }

    /// UDP flows to an address and port that the node tracks.
    fn flows(&self, to: SocketAddr) -> Result<BTreeSet<Flow>> {
        self.lab.node().run(|| {
            let (family, protocol) = (IpFamily::of(to.ip()), Protocol::Udp);
            let filter = FlowFilter { family, protocol, address: Some(to.ip()), port: Some(to.port()) };
            let mut flows = BTreeSet::new();
            Netlink::open()?.dump(&filter, &mut |flow| {
                if filter.matches(&flow) {
                    flows.insert(flow);
                }
            })?;
            Ok(flows)
        })
    }
}

/// The fields of the log lines about clean-ups.
fn cleanups(agent: &ChildGuard) -> Vec<Value> {
    agent
        .stderr()
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .map(|line| line["fields"].clone())
        .filter(|fields| fields["message"] == "flows cleaned up")
        .collect()
}

fn count(agent: &ChildGuard, field: &str) -> u64 {
    cleanups(agent).iter().filter_map(|fields| fields[field].as_u64()).sum()
}

/// What came back to a client.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Said {
    Pod(String),
    Refused,
    Nothing,
}

/// A client with one socket for all its life.
struct Client {
    socket: UdpSocket,
    to: SocketAddr,
}

impl Client {
    fn new(lab: &Lab, to: SocketAddr) -> Result<Self> {
        let socket = lab.client().run(|| {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            Ok(socket)
        })?;
        socket.set_read_timeout(Some(SHORT))?;
        Ok(Self { socket, to })
    }

    fn ask(&self) -> Result<Said> {
        let mut buffer = [0; 512];
        let received = self.socket.send(b"who\n").and_then(|_| self.socket.recv(&mut buffer));
        match received {
            Ok(length) => {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let pod = text.split_whitespace().find_map(|word| word.strip_prefix("pod="));
                Ok(Said::Pod(pod.with_context(|| format!("{text:?}"))?.to_owned()))
            }
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused => Ok(Said::Refused),
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(Said::Nothing),
                _ => bail!("{}: {error}", self.to),
            },
        }
    }

    /// Asks until it hears this; how long that took.
    fn hears(&self, expected: &Said) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let said = self.ask()?;
            if said == *expected {
                return Ok(started.elapsed());
            }
            ensure!(started.elapsed() < LONG, "{}: {said:?}, not {expected:?}", self.to);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn reaches(&self, letter: char) -> Result<Duration> {
        self.hears(&Said::Pod(format!("pod-{letter}")))
    }
}

#[test]
fn clients_follow_the_endpoints_without_changing_their_port() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.ready("a")?;
    let agent = cluster.start()?;
    let clients = VIPS.map(|vip| cluster.client(vip, 53));
    let clients: Vec<Client> = clients.into_iter().collect::<Result<_>>()?;
    let all = |expected: &Said| -> Result<()> {
        for client in &clients {
            let took = client.hears(expected)?;
            eprintln!("{} {expected:?} after {took:?}", client.to);
        }
        Ok(())
    };
    let pod = |letter: char| Said::Pod(format!("pod-{letter}"));
    all(&pod('a'))?;
    // Its endpoint is replaced, though the pod would still answer.
    cluster.ready("b")?;
    all(&pod('b'))?;
    // All endpoints go: refused at once rather than sent to a pod that is gone.
    cluster.ready("")?;
    all(&Said::Refused)?;
    for client in &clients {
        assert_eq!(cluster.flows(client.to)?, BTreeSet::new());
    }
    cluster.ready("c")?;
    all(&pod('c'))?;
    // The Service goes; what is sent then is tracked with the Service's own address.
    cluster.remove("service")?;
    all(&Said::Nothing)?;
    let deadline = Instant::now() + LONG;
    while clients.iter().any(|client| {
        let _ = client.ask();
        !cluster.flows(client.to).is_ok_and(|flows| flows.iter().all(|f| !f.is_translated()))
    }) {
        ensure!(Instant::now() < deadline, "translated flows stay: {agent}");
    }
    cluster.service()?;
    all(&pod('c'))?;
    let log = agent.stderr();
    assert!(log.contains("deleted stale flows") && log.contains("demo/dns:dns-udp/udp"), "{log}");
    assert_eq!(count(&agent, "refused"), 0, "{log}");
    Ok(())
}

#[test]
fn flows_whose_endpoint_serves_are_left_alone() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.ready("ab")?;
    let agent = cluster.start()?;
    let clients: Vec<Client> = (0..20).map(|_| cluster.client(VIPS[0], 53)).collect::<Result<_>>()?;
    let answers = || clients.iter().map(Client::ask).collect::<Result<Vec<_>>>();
    let before = answers()?;
    assert!(before.contains(&Said::Pod("pod-a".into())) && before.contains(&Said::Pod("pod-b".into())));
    let flows = cluster.flows(clients[0].to)?;
    assert_eq!(flows.len(), 20);
    let probe = Probe::tcp(SocketAddr::new(ip(VIPS[0]), 53)).timeout(LONG);
    let mut connections = Vec::new();
    while connections.len() < 2 {
        let mut connection = cluster.lab.client().converse(&probe)?;
        if connection.ask()?.pod == "pod-a" {
            connections.push(connection);
        }
    }

    // Another endpoint comes; one goes that has no flows; one terminates, but serves.
    for endpoints in [
        &[('a', Is::Ready), ('b', Is::Ready), ('c', Is::Ready)][..],
        &[('a', Is::Ready), ('b', Is::Ready)],
        &[('a', Is::Terminating), ('b', Is::Ready)],
    ] {
        let looked = cleanups(&agent).len();
        cluster.endpoints(endpoints)?;
        let deadline = Instant::now() + LONG;
        while cleanups(&agent).len() < looked + 2 {
            ensure!(Instant::now() < deadline, "{agent}");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(answers()?, before);
        assert_eq!(cluster.flows(clients[0].to)?, flows);
    }
    assert_eq!(count(&agent, "deleted"), 0);

    // The endpoint that terminated is gone: the table of new flows does not change, that of old ones does.
    cluster.ready("b")?;
    for client in &clients {
        client.reaches('b')?;
    }
    let kept = flows.intersection(&cluster.flows(clients[0].to)?).count();
    assert_eq!(kept, before.iter().filter(|said| **said == Said::Pod("pod-b".into())).count());
    // Connections are none of our business.
    for connection in &mut connections {
        assert_eq!(connection.ask()?.pod, "pod-a");
    }
    Ok(())
}

#[test]
fn node_ports_are_cleaned_by_address_and_port() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.ready("a")?;
    let agent = cluster.start()?;
    let clients: Vec<Client> =
        NODE.iter().map(|address| cluster.client(address, NODE_PORT)).collect::<Result<_>>()?;
    // Others use the same port number: elsewhere, and on an address where node ports do not answer.
    let port = SocketAddr::new(ip("0.0.0.0"), NODE_PORT);
    cluster.lab.pod("elsewhere")?.serve([(shunt_harness::lab::Proto::Udp, port)])?;
    let own = SocketAddr::new(ip(OTHER_ADDRESS), NODE_PORT);
    cluster.lab.node().serve([(shunt_harness::lab::Proto::Udp, own)])?;
    let others = [cluster.client("10.99.0.7", NODE_PORT)?, cluster.client(OTHER_ADDRESS, NODE_PORT)?];
    for client in &clients {
        client.reaches('a')?;
    }
    others[0].hears(&Said::Pod("elsewhere".into()))?;
    others[1].hears(&Said::Pod("node".into()))?;
    let unrelated = || others.iter().map(|o| cluster.flows(o.to)).collect::<Result<Vec<_>>>();
    let before = unrelated()?;
    assert!(before.iter().all(|flows| flows.len() == 1), "{before:?}");

    for (endpoints, expected) in
        [("b", Said::Pod("pod-b".into())), ("", Said::Refused), ("c", Said::Pod("pod-c".into()))]
    {
        cluster.ready(endpoints)?;
        for client in &clients {
            let took = client.hears(&expected)?;
            eprintln!("{} {expected:?} after {took:?}", client.to);
        }
    }
    assert_eq!(unrelated()?, before);
    assert!(count(&agent, "deleted") > 0);
    Ok(())
}

#[test]
fn a_start_deletes_what_became_stale_meanwhile() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.ready("a")?;
    let mut agent = cluster.start()?;
    let client = cluster.client(VIPS[0], 53)?;
    client.reaches('a')?;
    agent.kill()?;
    cluster.ready("b")?;
    std::thread::sleep(Duration::from_millis(100));
    client.reaches('a')?;
    let mut agent = cluster.start()?;
    client.reaches('b')?;
    // Nothing changed: nothing is deleted.
    agent.stop()?;
    let flows = cluster.flows(client.to)?;
    let agent = cluster.start()?;
    client.reaches('b')?;
    assert_eq!(cluster.flows(client.to)?, flows);
    assert_eq!(count(&agent, "deleted"), 0);
    Ok(())
}

#[test]
fn among_many_flows_only_those_of_the_service_are_read() -> Result<()> {
    const OTHERS: u32 = 20_000;
    if !require_kernel() {
        return Ok(());
    }
    let cluster = Cluster::new()?;
    cluster.ready("a")?;
    let agent = cluster.start()?;
    cluster.lab.client().run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        for number in 0..OTHERS {
            let to = IpAddr::from((0x0a63_0000 | number).to_be_bytes());
            socket.send_to(b"hello", (to, 53))?;
        }
        Ok(())
    })?;
    let clients: Vec<Client> = (0..100).map(|_| cluster.client(VIPS[0], 53)).collect::<Result<_>>()?;
    for client in &clients {
        client.reaches('a')?;
    }
    // The second look at the start is over, so that what follows is about the change alone.
    std::thread::sleep(Duration::from_millis(1200));
    let looked = cleanups(&agent).len();
    cluster.ready("b")?;
    let took = clients[0].reaches('b')?;
    for client in &clients {
        client.reaches('b')?;
    }
    std::thread::sleep(Duration::from_millis(1500));
    let all = cleanups(&agent);
    let cleanups = &all[looked..];
    for cleanup in cleanups {
        eprintln!("{cleanup}");
    }
    let deleted: u64 = cleanups.iter().filter_map(|c| c["deleted"].as_u64()).sum();
    assert_eq!(deleted, 100);
    assert!(cleanups.iter().all(|c| c["received"].as_u64().is_some_and(|n| n <= 100)), "{cleanups:?}");
    let others = FlowFilter { family: IpFamily::V4, protocol: Protocol::Udp, address: None, port: Some(53) };
    let left = cluster.lab.node().run(|| Ok(Netlink::open()?.dump(&others, &mut |_| {})?))?;
    assert!(left.received >= u64::from(OTHERS), "{left:?}");
    eprintln!("followed after {took:?}");
    Ok(())
}
