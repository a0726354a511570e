//! A cluster of one node, and the binary in kube-proxy's place on it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shunt_harness::apiserver::ApiServer;
use shunt_harness::lab::{ChildGuard, Lab, Namespace, Probe};

pub(crate) const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
pub(crate) const LONG: Duration = Duration::from_secs(30);
const TOKEN: &str = "a-token-of-the-service-account";
pub(crate) const KUBEADM: &str = include_str!("../../../config/tests/data/kubeadm.yaml");

/// A node with two pods, a client, and an API server with TLS in the node's namespace.
pub(crate) struct Cluster {
    pub lab: Lab,
    pub server: ApiServer,
    folder: tempfile::TempDir,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Cluster {
    pub(crate) fn new() -> Result<Self> {
        let address = |text: &str| text.parse::<IpAddr>();
        let lab = Lab::builder()
            .node([address("192.0.2.11")?, address("2001:db8::11")?])
            .client([address("198.51.100.20")?, address("198.51.100.21")?])
            .pod("pod-a", [address("10.244.1.11")?])
            .pod("pod-b", [address("10.244.1.12")?])
            .build()?;
        for pod in ["pod-a", "pod-b"] {
            lab.pod(pod)?.serve_ports([8080])?;
        }
        let (started, server) = mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = lab.node().thread(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
                started.send(ApiServer::start_tls(TOKEN).await?).ok();
                let _ = stopped.await;
                Ok(())
            })
        })?;
        let server = server.recv().context("the API server did not start")?;
        let folder = tempfile::tempdir()?;
        let cluster = Self { lab, server, folder, stop: Some(stop), thread: Some(thread) };
        cluster.node(&json!({}));
        cluster.server.put(service());
        cluster.endpoints(&["10.244.1.11", "10.244.1.12"]);
        cluster.write_files(KUBEADM)?;
        Ok(cluster)
    }

    /// Puts the Node, with some fields of `spec`.
    pub(crate) fn node(&self, spec: &Value) {
        self.server.put(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" }, "spec": spec,
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
        }));
    }

    pub(crate) fn endpoints(&self, addresses: &[&str]) {
        let endpoints: Vec<Value> = addresses
            .iter()
            .map(|a| json!({ "addresses": [a], "conditions": { "ready": true }, "nodeName": "worker-1" }))
            .collect();
        let now = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]).output();
        let now = now.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
        self.server.put(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "web-1", "namespace": "demo",
                "labels": { "kubernetes.io/service-name": "web" },
                "annotations": { "endpoints.kubernetes.io/last-change-trigger-time": now },
            },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }],
            "endpoints": endpoints,
        }));
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The files that kubeadm's DaemonSet mounts, and the binary under kube-proxy's name.
    pub(crate) fn write_files(&self, config: &str) -> Result<()> {
        let secrets = "/var/run/secrets/kubernetes.io/serviceaccount";
        std::fs::write(self.path("config.conf"), config)?;
        std::fs::write(
            self.path("kubeconfig.conf"),
            format!(
                "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    certificate-authority: {secrets}/ca.crt\n    \
                 server: {}\n  name: default\ncontexts:\n- context:\n    cluster: default\n    namespace: default\n    \
                 user: default\n  name: default\ncurrent-context: default\nusers:\n- name: default\n  user:\n    \
                 tokenFile: {secrets}/token\n",
                self.server.url()
            ),
        )?;
        std::fs::write(self.path("ca.crt"), self.server.certificate().context("no TLS")?)?;
        std::fs::write(self.path("token"), TOKEN)?;
        if !self.path("kube-proxy").exists() {
            std::os::unix::fs::symlink(SHUNT, self.path("kube-proxy"))?;
        }
        Ok(())
    }

    /// Starts kube-proxy as kubeadm does, with the mounts that it has, in a mount namespace of its own.
    pub(crate) fn start(&self, more: &[&str]) -> Result<ChildGuard> {
        self.start_with("", "", more)
    }

    /// Starts it as a DaemonSet of ours does: with no capability but some, on a read-only file system, /proc/sys
    /// included, which a container has so that is not privileged. `mounts` is what is mounted besides.
    pub(crate) fn start_confined(
        &self,
        capabilities: &[String],
        mounts: &str,
        more: &[&str],
    ) -> Result<ChildGuard> {
        const READ_ONLY: &str = "touch /run/xtables.lock
            for writable in /run/shunt /run/xtables.lock /proc/sys; do
                mount --bind $writable $writable
            done
            for read_only in /proc/sys /run /; do mount -o remount,bind,ro $read_only; done";
        let kept = ["-all".to_owned()]
            .into_iter()
            .chain(capabilities.iter().map(|c| format!("+{}", c.to_lowercase())));
        let kept = kept.collect::<Vec<_>>().join(",");
        let confine = format!("setpriv --bounding-set {kept} --inh-caps -all --no-new-privs");
        self.start_with(&format!("{mounts}\n{READ_ONLY}"), &confine, more)
    }

    /// Starts it as kubeadm does, with other mounts besides, by way of another program.
    pub(crate) fn start_with(&self, mounts: &str, confine: &str, more: &[&str]) -> Result<ChildGuard> {
        const MOUNTS: &str = "set -e
            mount -t tmpfs tmpfs /var/lib; mount -t tmpfs tmpfs /run
            mkdir -p /var/lib/kube-proxy /run/secrets/kubernetes.io/serviceaccount /run/shunt
            mount --bind \"$1\" /var/lib/kube-proxy
            cp \"$1/token\" \"$1/ca.crt\" /run/secrets/kubernetes.io/serviceaccount
            program=$2; shift 2";
        const RUN: &str = "\"$program\" --config=/var/lib/kube-proxy/config.conf \\
            --hostname-override=worker-1 \"$@\"";
        let script = format!("{MOUNTS}\n{mounts}\nexec {confine} {RUN}");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script, "sh"]);
        command.arg(self.folder.path()).arg(self.path("kube-proxy")).args(more);
        self.lab.node().spawn(&command)
    }

    /// Waits until connections to an address reach exactly these pods.
    pub(crate) fn reach(&self, address: &str, pods: &[&str]) -> Result<()> {
        let probe = Probe::tcp(address.parse::<SocketAddr>()?);
        let deadline = Instant::now() + LONG;
        loop {
            let reached = self.lab.client().pods_reached(&probe, 25);
            if reached.as_ref().is_ok_and(|r| r.iter().map(String::as_str).eq(pods.iter().copied())) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{address} reaches {reached:?}, not {pods:?}");
        }
    }

    pub(crate) fn get(&self, address: &str, path: &str) -> Result<Answer> {
        self.ask("GET", address, path)
    }

    pub(crate) fn ask(&self, method: &str, address: &str, path: &str) -> Result<Answer> {
        self.ask_with(method, address, path, "")
    }

    /// With more headers, each with its end of line.
    pub(crate) fn ask_with(&self, method: &str, address: &str, path: &str, headers: &str) -> Result<Answer> {
        ask(self.lab.node(), method, address, path, headers)
    }

    pub(crate) fn metrics(&self) -> Result<String> {
        Ok(self.get("127.0.0.1:10249", "/metrics")?.body)
    }

    /// Waits until something holds.
    pub(crate) fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + LONG;
        while !matches!(holds(self), Ok(true)) {
            ensure!(Instant::now() < deadline, "never: {what}: {:?}", holds(self));
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "web", "namespace": "demo", "creationTimestamp": "2026-01-01T00:00:00Z" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"], "externalTrafficPolicy": "Local", "healthCheckNodePort": 31234,
            "ports": [{ "name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080 }],
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "203.0.113.1" }] } },
    })
}

/// What an HTTP server answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

fn ask(namespace: &Namespace, method: &str, address: &str, path: &str, headers: &str) -> Result<Answer> {
    let address: SocketAddr = address.parse()?;
    let text = namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })?;
    let (head, body) = text.split_once("\r\n\r\n").context("no end of the head")?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|l| l.split(' ').nth(1)).context("no status")?.parse()?;
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    Ok(Answer { status, headers, body: body.to_owned() })
}
