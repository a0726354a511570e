//! Services choose their scheduler by annotation, in ipvs mode: what the kernel has is used, what it lacks is named.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use shunt_harness::guest::test_in_guest;
use shunt_harness::lab::{Lab, Probe};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
const LONG: Duration = Duration::from_mins(2);

/// A Service at `10.96.0.NUMBER:80` with these annotations, and its endpoint.
fn manifest(name: &str, number: u8, annotations: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: {name}, namespace: demo, annotations: {{ {annotations} }} }}
spec:
  clusterIP: 10.96.0.{number}
  clusterIPs: [10.96.0.{number}]
  ipFamilies: [IPv4]
  ports: [{{ port: 80, targetPort: 8080 }}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: {name}-1, namespace: demo, labels: {{ kubernetes.io/service-name: {name} }} }}
addressType: IPv4
ports: [{{ port: 8080 }}]
endpoints: [{{ addresses: [10.244.1.11], conditions: {{ ready: true }} }}]
---
"
    )
}

fn chosen() -> Result<()> {
    let lab = Lab::builder()
        .node(["192.0.2.11".parse()?])
        .client(["198.51.100.20".parse()?])
        .pod("pod", ["10.244.1.11".parse()?])
        .build()?;
    lab.pod("pod")?.serve_ports([8080])?;
    let folder = tempfile::tempdir()?;
    let router = "kube-router.io/service";
    let services = [
        manifest("plain", 1, ""),
        manifest("hashed", 2, &format!("{router}.scheduler: mh, {router}.schedflags: 'flag-1,flag-2'")),
        // The guest's kernel does not have this one, and no kernel the next one.
        manifest("absent", 3, &format!("{router}.scheduler: twos")),
        manifest("unknown", 4, &format!("{router}.scheduler: fastest")),
    ];
    std::fs::write(folder.path().join("services.yaml"), services.concat())?;
    let mut command = Command::new(SHUNT);
    command.args(["run", "--mode", "ipvs", "--hostname-override", "n", "--manifests"]).arg(folder.path());
    let mut agent = lab.node().spawn(&command)?;
    agent.wait_for("demo/absent/tcp: the kernel has no scheduler twos (module ip_vs_twos)", LONG)?;
    agent.wait_for("\"fastest\" is no scheduler of IPVS", LONG)?;
    let deadline = Instant::now() + LONG;
    for (number, scheduler) in [(1, "rr"), (2, "mh -b mh-fallback,mh-port"), (3, "rr"), (4, "rr")] {
        let line = format!("-A -t 10.96.0.{number}:80 -s {scheduler}");
        loop {
            let servers = lab.node().exec("ipvsadm", ["-Sn"], "")?;
            if servers.lines().any(|found| found.trim_end() == line) {
                break;
            }
            ensure!(Instant::now() < deadline, "no {line} in {servers}, {agent}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let probe = Probe::tcp(format!("10.96.0.{number}:80").parse()?).timeout(LONG);
        let seen = lab.client().probe(probe)?;
        ensure!(seen.pod() == Some("pod"), "{number}: {seen}");
    }
    ensure!(agent.stop()?.success(), "{agent}");
    Ok(())
}

mod ipvs {
    use super::*;

    #[test]
    fn services_choose_their_scheduler() {
        test_in_guest(module_path!(), "services_choose_their_scheduler", || chosen().unwrap());
    }
}
