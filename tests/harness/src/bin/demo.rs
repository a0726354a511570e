//! `make demo`: Shunt's main job on one machine, in network namespaces that vanish with this process.
//!
//! ```text
//!   client 198.51.100.20 ──┐                 ┌── pod-a 10.244.1.11
//!                          ├── node worker-1 ┼── pod-b 10.244.1.12
//!                          │   192.0.2.11    └── pod-c 10.244.1.13
//! ```
//!
//! Usage: `shunt-demo PATH-TO-SHUNT PATH-TO-EXAMPLES`.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use shunt_harness::lab::{ChildGuard, Lab, Namespace, Probe, Proto};

/// Modes that this build has and every kernel with nftables and iptables can run.
const MODES: &[&str] = &["nftables", "iptables"];

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(shunt), Some(examples)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: shunt-demo PATH-TO-SHUNT PATH-TO-EXAMPLES");
        return ExitCode::from(2);
    };
    match demo(&shunt, &examples) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(shunt: &Path, examples: &Path) -> Result<()> {
    for mode in MODES {
        demo_mode(shunt, examples, mode).with_context(|| format!("mode {mode}"))?;
    }
    Ok(())
}

fn demo_mode(shunt: &Path, examples: &Path, mode: &str) -> Result<()> {
    heading(&format!("A node, a client and three pods in network namespaces (mode {mode})"));
    let lab = lab()?;
    println!("  client  198.51.100.20  2001:db8:1::20   outside the cluster, routed through the node");
    println!("  node    192.0.2.11     2001:db8::11     worker-1: `shunt run` is started here");
    for (pod, last) in PODS {
        println!(
            "  {pod}   10.244.1.{last}    fd00:10:244:1::{last}  answers with its name on 8080, 8053, 8090, 8443"
        );
    }

    let folder = tempfile::tempdir().context("make a folder for manifests")?;
    remove_on_signal(folder.path().to_owned())?;
    let manifests = folder.path().join("manifests");
    copy(examples, &manifests)?;
    let socket = folder.path().join("shunt.sock");

    heading("shunt run --manifests examples, instead of an API server");
    let started = Instant::now();
    let mut agent = start(&lab, shunt, mode, &manifests, &socket)?;
    agent.wait_for("in sync with the kernel", Duration::from_secs(20))?;
    // One line a family.
    agent.wait_for("family=IPv6", Duration::from_secs(20))?;
    println!("  programmed {} ms after the start of the process", started.elapsed().as_millis());

    heading("Thirty new connections to each Service: who answered?");
    who_answers(&lab)?;

    heading("An EndpointSlice changes: traffic follows");
    let change = examples_slice(&manifests, "pod-c alone", &["10.244.1.13"])?;
    println!(
        "  web is served by pod-c alone {:.1} ms after the file was written",
        follow(&lab, change, "pod-c")?
    );
    let change = examples_slice(&manifests, "pod-a alone", &["10.244.1.11"])?;
    println!(
        "  web is served by pod-a alone {:.1} ms after the file was written",
        follow(&lab, change, "pod-a")?
    );

    heading("shunt dump --service demo/web: what the Service means on this node");
    print_indented(&ask(&lab, shunt, &socket, &["--service", "demo/web"])?);
    heading("shunt dump --service demo/web --stage kernel: what the kernel holds for it");
    print_indented(&ask(&lab, shunt, &socket, &["--service", "demo/web", "--stage", "kernel"])?);
    heading("shunt dump --stage plan: what would be changed now");
    print_indented(&ask(&lab, shunt, &socket, &["--stage", "plan"])?);

    heading("Stopping shunt: rules stay in place, connections go on");
    let status = agent.stop()?;
    ensure!(status.success(), "shunt ended with {status}: {agent}");
    let probe = Probe::tcp("10.96.0.10:80".parse()?);
    let outcome = lab.client().probe(probe)?;
    println!("  a new connection to 10.96.0.10:80 without shunt running: {outcome}");
    ensure!(outcome.pod() == Some("pod-a"), "expected pod-a");
    println!("\nAll of it is gone now: the namespaces ended with this process.");
    Ok(())
}

const PODS: [(&str, u8); 3] = [("pod-a", 11), ("pod-b", 12), ("pod-c", 13)];

fn lab() -> Result<Lab> {
    let mut builder = Lab::builder()
        .node(["192.0.2.11".parse()?, "2001:db8::11".parse()?])
        .client(["198.51.100.20".parse()?, "2001:db8:1::20".parse()?]);
    for (pod, last) in PODS {
        let addresses: [IpAddr; 2] =
            [format!("10.244.1.{last}").parse()?, format!("fd00:10:244:1::{last}").parse()?];
        builder = builder.pod(pod, addresses);
    }
    let lab = builder.build().context("make network namespaces (this needs root)")?;
    for (pod, _) in PODS {
        lab.pod(pod)?.serve_ports([8080, 8053, 8090, 8443])?;
    }
    Ok(lab)
}

fn start(lab: &Lab, shunt: &Path, mode: &str, manifests: &Path, socket: &Path) -> Result<ChildGuard> {
    let mut command = Command::new(shunt);
    command
        .args(["run", "--mode", mode, "--hostname-override", "worker-1"])
        .args(["--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"])
        .arg("--manifests")
        .arg(manifests)
        .arg("--admin-socket")
        .arg(socket);
    lab.node().spawn(&command)
}

fn ask(lab: &Lab, shunt: &Path, socket: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(shunt);
    command.arg("dump").args(arguments).arg("--admin-socket").arg(socket);
    let mut child = lab.node().spawn(&command)?;
    let status = child.wait(Duration::from_secs(10))?;
    ensure!(status.success(), "shunt dump: {child}");
    Ok(child.stdout())
}

fn who_answers(lab: &Lab) -> Result<()> {
    println!("  {:<34} {:<26} {:>6} {:>6} {:>6}", "Service", "address", "pod-a", "pod-b", "pod-c");
    let pod_a = lab.pod("pod-a")?;
    let rows: [(&str, &Namespace, Proto, &str, &[&str]); 9] = [
        ("ClusterIP, from a pod", pod_a, Proto::Tcp, "10.96.0.10:80", &["pod-a", "pod-b", "pod-c"]),
        ("ClusterIP, from the node", lab.node(), Proto::Tcp, "10.96.0.10:80", &["pod-a", "pod-b", "pod-c"]),
        ("NodePort, from the client", lab.client(), Proto::Tcp, "192.0.2.11:30080", &["pod-a", "pod-b"]),
        ("LoadBalancer, from the client", lab.client(), Proto::Tcp, "203.0.113.80:443", &["pod-b", "pod-c"]),
        ("UDP, from a pod", pod_a, Proto::Udp, "10.96.0.53:53", &["pod-b", "pod-c"]),
        ("the same port over TCP", pod_a, Proto::Tcp, "10.96.0.53:53", &["pod-b", "pod-c"]),
        ("second port of a Service", pod_a, Proto::Tcp, "10.96.0.50:9090", &["pod-a", "pod-b"]),
        ("dual-stack, IPv6 cluster IP", pod_a, Proto::Tcp, "[fd00:10:96::70]:80", &["pod-a", "pod-b"]),
        ("dual-stack, IPv6 node port", lab.client(), Proto::Tcp, "[2001:db8::11]:30070", &["pod-a", "pod-b"]),
    ];
    for (what, from, proto, address, expected) in rows {
        let destination: SocketAddr = address.parse()?;
        let probes = vec![Probe::new(proto, destination).timeout(Duration::from_secs(2)); 30];
        let mut answers: BTreeMap<&str, usize> = BTreeMap::new();
        let outcomes = from.probe_all(probes)?;
        for outcome in &outcomes {
            match outcome.pod() {
                Some(pod) if expected.contains(&pod) => *answers.entry(pod).or_default() += 1,
                _ => bail!("{what} {address}: {outcome}, expected an answer of {expected:?}"),
            }
        }
        let count = |pod| answers.get(pod).copied().unwrap_or(0);
        println!(
            "  {what:<34} {address:<26} {:>6} {:>6} {:>6}",
            count("pod-a"),
            count("pod-b"),
            count("pod-c")
        );
    }
    let refused = pod_a.probe(Probe::tcp("10.96.0.10:81".parse()?))?;
    println!("  {:<34} {:<26} {refused}", "a port that the Service lacks", "10.96.0.10:81");
    ensure!(refused.is_refused(), "expected a refusal");
    Ok(())
}

/// Rewrites the slice of Service web; answers when.
fn examples_slice(manifests: &Path, what: &str, addresses: &[&str]) -> Result<Instant> {
    println!("  the endpoints of demo/web become {what}");
    let file = manifests.join("10-clusterip.yaml");
    let text = std::fs::read_to_string(&file)?;
    let (head, _) = text.split_once("endpoints:\n").context("no endpoints in 10-clusterip.yaml")?;
    let mut new = format!("{head}endpoints:\n");
    for address in addresses {
        new.push_str("- { addresses: [\"");
        new.push_str(address);
        new.push_str("\"], nodeName: worker-1, conditions: { ready: true } }\n");
    }
    // As an editor does it: write beside, then rename.
    let beside = manifests.join(".10-clusterip.yaml.new");
    std::fs::write(&beside, new)?;
    std::fs::rename(&beside, &file)?;
    Ok(Instant::now())
}

/// Milliseconds from a change until new connections reach `pod`; from then on, only that pod.
fn follow(lab: &Lab, change: Instant, pod: &str) -> Result<f64> {
    let probe = || Probe::tcp(SocketAddr::from(([10, 96, 0, 10], 80)));
    let reached = loop {
        if lab.client().probe(probe())?.pod() == Some(pod) {
            break change.elapsed();
        }
        ensure!(change.elapsed() < Duration::from_secs(5), "traffic does not follow to {pod}");
    };
    std::thread::sleep(Duration::from_millis(50));
    let pods = lab.client().pods_reached(&probe(), 30)?;
    ensure!(pods.len() == 1 && pods.contains(pod), "expected {pod} alone, not {pods:?}");
    Ok(reached.as_secs_f64() * 1e3)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Removes the folder also when the demo is interrupted; namespaces and children end by themselves.
fn remove_on_signal(folder: PathBuf) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            let _ = std::fs::remove_dir_all(&folder);
            std::process::exit(130);
        });
    });
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

fn print_indented(text: &str) {
    for line in text.lines() {
        println!("  {line}");
    }
}
