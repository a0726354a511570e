//! `shunt explain`, as an operator or a pipeline calls it: offline, over the cases and the examples; and of
//! a running agent that is asked for pods by name.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shunt_harness::apiserver::ApiServer;
use shunt_harness::lab::{Lab, require_kernel};

const SHUNT: &str = env!("CARGO_BIN_EXE_shunt");
/// Exit status when something differs.
const DIFFER: Option<i32> = Some(3);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn explain(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(SHUNT).arg("explain").args(arguments).output()?)
}

/// Exit status, standard output, standard error.
fn texts(output: Output) -> Result<(Option<i32>, String, String)> {
    Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
}

fn examples(arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let folder = root().join("examples");
    let folder = folder.to_str().context("path")?;
    texts(explain(&[&["--manifests", folder, "--node", "worker-1"], arguments].concat())?)
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

fn names_nftables(modes: &Value) -> bool {
    modes.as_array().is_none_or(|modes| modes.iter().any(|m| m == "nftables"))
}

/// Folders with objects and packets: those of the cases, or of their steps.
fn scenarios() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for case in std::fs::read_dir(root().join("tests/cases"))? {
        let case = case?.path();
        if !case.join("meta.json").exists() || !names_nftables(&read(&case.join("meta.json"))?["modes"]) {
            continue;
        }
        let steps = std::fs::read_dir(&case)?.map(|e| Ok(e?.path()));
        found.extend(steps.collect::<Result<Vec<_>>>()?);
        found.push(case);
    }
    found.retain(|folder| folder.join("packets.json").exists());
    found.sort();
    Ok(found)
}

fn cases_are_answered(more: &[&str]) -> Result<()> {
    let mut asked = 0;
    for folder in scenarios()? {
        let (input, packets) = (folder.join("input.yaml"), folder.join("packets.json"));
        let (input, file) = (input.to_str().context("path")?, packets.to_str().context("path")?);
        let base = ["--manifests", input, "--node", "test-node", "--packets", file, "-o", "json"];
        let (code, answers, error) = texts(explain(&[&base, more].concat())?)?;
        assert_eq!(code, Some(0), "{file}: {error}");
        let answers: Vec<Value> = serde_json::from_str(&answers)?;
        let packets = read(&packets)?;
        let packets = packets.as_array().context("no list")?;
        assert_eq!(answers.len(), packets.len());
        for (packet, answer) in packets.iter().zip(&answers) {
            assert_eq!(answer["name"], packet["name"]);
            assert!(answer["reason"].as_str().is_some_and(|r| !r.is_empty()), "{answer}");
            if names_nftables(&packet["modes"]) {
                for field in ["verdict", "endpoints", "masquerade"] {
                    assert_eq!(answer[field], packet["expect"][field], "{file}: {answer}");
                }
                asked += 1;
            }
        }
    }
    assert!(asked > 250, "only {asked} packets were asked");
    Ok(())
}

#[test]
fn the_table_answers_as_the_cases_say() -> Result<()> {
    cases_are_answered(&[])
}

#[test]
fn the_rules_answer_as_the_cases_say() -> Result<()> {
    cases_are_answered(&["--mode", "nftables"])
}

#[test]
fn people_read_who_what_and_why() -> Result<()> {
    let (code, text, error) = examples(&["--from", "pod/10.244.1.11", "--to", "10.96.0.50:80"])?;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    let expected = "\
10.244.1.11 -> 10.96.0.50:80/tcp: forward to one of 2 endpoints
  source      a pod: inside 10.244.0.0/16
  frontend    ClusterIP 10.96.0.50:80/tcp of Service demo/api:http/tcp
  policy      internalTrafficPolicy Cluster
  endpoints   10.244.1.11:8080 (here), 10.244.1.12:8080 (here)
  left out    10.244.1.13:8080 (here): not ready
  masquerade  depends on the pick: yes if 10.244.1.11:8080 is chosen, which meets its own packet (hairpin); otherwise no: the source is a pod of the cluster
";
    assert_eq!(text, expected);
    let (code, text, _) =
        examples(&["--from", "external", "--to", "203.0.113.80:443", "--mode", "nftables"])?;
    assert_eq!(code, Some(0));
    assert!(
        text.contains("because     the source is not in loadBalancerSourceRanges (198.51.100.0/24)"),
        "{text}"
    );
    assert!(text.contains("  table       drop\n  nftables    drop\n"), "{text}");
    let (_, text, _) = examples(&["--from", "node", "--to", "[fd00:10:96::70]:80"])?;
    assert!(text.starts_with("2001:db8::11 -> [fd00:10:96::70]:80/tcp: forward"), "{text}");
    let (_, text, _) = examples(&["--from", "external", "--to", "[fd00:10:96::70]:80"])?;
    assert!(text.starts_with("2001:db8:ffff::1 -> "), "{text}");
    Ok(())
}

#[test]
fn programs_read_json() -> Result<()> {
    let (code, text, _) = examples(&["--from", "10.244.1.12", "--to", "10.96.0.50:80", "-o", "json"])?;
    let mut answers: Value = serde_json::from_str(&text)?;
    let reason = answers[0]["reason"].take();
    assert!(reason.as_str().is_some_and(|r| r.contains("depends on the pick")), "{reason}");
    let expected = json!([{
        "name": "10.244.1.12 -> 10.96.0.50:80/tcp",
        "verdict": "forward",
        "endpoints": ["10.244.1.11:8080", "10.244.1.12:8080"],
        "masquerade": true,
        "frontend": "10.96.0.50:80/tcp",
        "reason": null,
        "service": "demo/api:http/tcp",
        "kind": "ClusterIP",
        "leftOut": [{ "endpoint": "10.244.1.13:8080", "reason": "not ready" }],
    }]);
    assert_eq!((code, answers), (Some(0), expected));
    Ok(())
}

#[test]
fn a_wrong_expectation_is_named() -> Result<()> {
    let packets = json!([
        { "name": "right", "src": "10.244.1.12", "dst": "10.96.0.10", "dport": 80, "expect": { "verdict": "forward" } },
        { "name": "wrong", "src": "external", "dst": "10.96.0.10", "dport": 80, "proto": "tcp",
          "expect": { "verdict": "drop", "endpoints": ["10.244.1.11:8080"], "masquerade": false } },
        { "name": "of another mode", "src_kind": "node", "dst": "10.96.0.10", "dport": 80,
          "modes": ["ipvs"], "expect": { "verdict": "drop" } },
    ]);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("packets.json");
    std::fs::write(&file, packets.to_string())?;
    let file = file.to_str().context("path")?;
    let (code, text, _) = examples(&["--packets", file])?;
    assert_eq!(code, DIFFER, "{text}");
    let got = "DIFFERS     endpoints: expected 10.244.1.11:8080, got 10.244.1.11:8080, 10.244.1.12:8080, 10.244.1.13:8080";
    assert!(text.contains(got), "{text}");
    assert!(text.ends_with("\n3 packets, 2 with an expectation: 1 differ\n"), "{text}");
    let (code, text, error) = examples(&["--packets", file, "-o", "json"])?;
    assert_eq!(code, DIFFER);
    assert_eq!(serde_json::from_str::<Vec<Value>>(&text)?.len(), 3);
    assert!(error.starts_with("shunt: wrong: verdict: expected drop, got forward\n"), "{error}");
    assert!(error.contains("masquerade: expected no, got yes") && !error.contains("right"), "{error}");
    Ok(())
}

const CLUSTER: &str = "
{kind: Node, apiVersion: v1, metadata: {name: n1}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}
---
{kind: KubeProxyConfiguration, apiVersion: kubeproxy.config.k8s.io/v1alpha1,
 detectLocalMode: InterfaceNamePrefix, detectLocal: {interfaceNamePrefix: veth}}
---
{kind: Service, apiVersion: v1, metadata: {name: web, namespace: a},
 spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], ports: [{port: 80}]}}
---
{kind: EndpointSlice, apiVersion: discovery.k8s.io/v1, addressType: IPv4,
 metadata: {name: web-1, namespace: a, labels: {kubernetes.io/service-name: web}}, ports: [{name: '', port: 8080}],
 endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: web-0, namespace: a}}]}
---
{kind: Pod, apiVersion: v1, metadata: {name: client, namespace: a},
 status: {podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.9}]}}
---
{kind: Pod, apiVersion: v1, metadata: {name: client, namespace: b}, status: {podIP: 10.0.0.8}}
";

#[test]
fn pods_have_names_and_interfaces_make_pods() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("all.yaml");
    std::fs::write(&file, CLUSTER)?;
    let file = file.to_str().context("path")?;
    let ask = |arguments: &[&str]| {
        let base = ["--manifests", file, "--node", "n1", "--to", "10.96.0.10:80"];
        texts(explain(&[&base, arguments].concat())?)
    };
    for (from, address) in
        [("pod/web-0", "10.0.0.1"), ("pod/a/web-0", "10.0.0.1"), ("pod/b/client", "10.0.0.8")]
    {
        let (code, text, error) = ask(&["--from", from, "--mode", "nftables"])?;
        assert_eq!((code, error.as_str()), (Some(0), ""));
        assert!(text.starts_with(&format!("{address} -> 10.96.0.10:80/tcp")), "{text}");
        assert!(text.contains("off-cluster: did not come in by veth*"), "{text}");
    }
    let (code, text, _) = ask(&["--from", "pod/web-0", "--from-interface", "veth12", "--mode", "nftables"])?;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("a pod: came in by veth*") && text.contains("masquerade  no"), "{text}");
    for (arguments, expected) in [
        (&["--from", "pod/client"][..], "which of pod/a/client, pod/b/client?"),
        (&["--from", "pod/nobody"], "give pod/ADDRESS"),
        (&["--from", "node", "--from-interface", "veth0"], "come in by no interface"),
        (&["--from", "external", "--from-interface", "veth0"], "give an address instead"),
        (&["--from", "pod/web-0", "--from-interface", "a-name-that-is-too-long"], "--from-interface"),
    ] {
        let (code, _, error) = ask(arguments)?;
        assert_eq!((code, error.contains(expected)), (Some(1), true), "{arguments:?}: {error}");
    }
    Ok(())
}

/// A slice of a Service of the same name; endpoints are an address and what it refers to.
fn slice(namespace: &str, name: &str, family: &str, endpoints: &[(&str, Value)]) -> Value {
    let endpoint = |(address, target): &(&str, Value)| json!({ "addresses": [address], "targetRef": target });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-{}", family.to_lowercase()), "namespace": namespace,
            "labels": { "kubernetes.io/service-name": name },
        },
        "addressType": family,
        "ports": [{ "name": "", "port": 8080 }],
        "endpoints": endpoints.iter().map(endpoint).collect::<Vec<_>>(),
    })
}

fn pod(namespace: &str, name: &str) -> Value {
    json!({ "kind": "Pod", "namespace": namespace, "name": name })
}

#[test]
fn the_running_agent_knows_endpoints_by_the_names_of_their_pods() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let lab = Lab::builder().node(["192.0.2.11".parse()?, "2001:db8::11".parse()?]).build()?;
    let server = ApiServer::start_inside(lab.node())?;
    server.put_all([
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "worker-1" },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "a" },
            "spec": {
                "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10", "fd00::10"], "ports": [{ "port": 80 }],
            },
        }),
        slice(
            "a",
            "web",
            "IPv4",
            &[
                ("10.244.1.1", pod("a", "web-0")),
                ("10.244.1.2", pod("a", "web-1")),
                ("10.244.1.8", json!({ "kind": "Node", "name": "worker-2" })),
                ("10.244.1.9", pod("c", "far")),
            ],
        ),
        slice("a", "web", "IPv6", &[("fd00:244::1", pod("a", "web-0"))]),
        // The same pod behind another Service; another pod of the same name; a pod that moved.
        slice("a", "api", "IPv4", &[("10.244.1.1", pod("a", "web-0")), ("10.244.1.3", pod("a", "moved"))]),
        slice("a", "old", "IPv4", &[("10.244.1.4", pod("a", "moved"))]),
        slice("b", "web", "IPv4", &[("10.244.1.5", pod("b", "web-1"))]),
    ]);
    let folder = tempfile::tempdir()?;
    let (kubeconfig, socket) = (folder.path().join("kubeconfig"), folder.path().join("shunt.sock"));
    std::fs::write(&kubeconfig, server.kubeconfig())?;
    let mut command = Command::new(SHUNT);
    command.args(["run", "--node", "worker-1", "--cluster-cidr", "10.244.0.0/16,fd00:244::/64"]);
    command.arg("--kubeconfig").arg(&kubeconfig).arg("--admin-socket").arg(&socket);
    let agent = lab.node().spawn(&command)?;
    let socket = socket.to_str().context("path")?;
    let ask = |from: &str, to: &str| texts(explain(&["--admin-socket", socket, "--from", from, "--to", to])?);
    let (vip, vip6) = ("10.96.0.10:80", "[fd00::10]:80");
    let deadline = Instant::now() + Duration::from_secs(20);
    while ask("node", vip)?.0 != Some(0) {
        ensure!(Instant::now() < deadline, "does not answer: {agent}");
        std::thread::sleep(Duration::from_millis(10));
    }
    for (from, to, address) in [
        ("pod/web-0", vip, "10.244.1.1"),
        ("pod/a/web-0", vip, "10.244.1.1"),
        ("pod/web-0", vip6, "fd00:244::1"),
        ("pod/a/web-1", vip, "10.244.1.2"),
        ("pod/b/web-1", vip, "10.244.1.5"),
    ] {
        let (code, text, error) = ask(from, to)?;
        assert_eq!((code, error.as_str()), (Some(0), ""), "{from}");
        assert!(text.starts_with(&format!("{address} -> {to}/tcp: forward")), "{from}: {text}");
        assert!(text.contains("a pod: inside"), "{from}: {text}");
    }
    let unknown =
        "no endpoint of a Service is this pod, and the running agent knows no other pods: give pod/ADDRESS";
    for (from, to, expected) in [
        ("pod/web-1", vip, "pod \"web-1\": which of pod/a/web-1, pod/b/web-1?"),
        (
            "pod/moved",
            vip,
            "pod a/moved has several IPv4 addresses: give one of pod/10.244.1.3, pod/10.244.1.4",
        ),
        ("pod/a/web-1", vip6, "pod a/web-1 has no IPv6 address that is known, but pod/10.244.1.2"),
        ("pod/nobody", vip, &format!("pod \"nobody\": {unknown}")),
        ("pod/b/web-0", vip, &format!("pod \"b/web-0\": {unknown}")),
        ("pod/worker-2", vip, unknown),
        ("pod/far", vip, unknown),
    ] {
        let (code, _, error) = ask(from, to)?;
        assert_eq!((code, error.contains(expected)), (Some(1), true), "{from}: {error}");
    }

    // Many at once; and the name follows the pod.
    server.put(slice("a", "old", "IPv4", &[("10.244.1.3", pod("a", "moved"))]));
    while ask("pod/moved", vip)?.0 != Some(0) {
        ensure!(Instant::now() < deadline, "does not follow: {agent}");
        std::thread::sleep(Duration::from_millis(10));
    }
    let packets = ["pod/web-0", "pod/moved", "10.244.1.7"]
        .map(|src| json!({ "name": src, "src": src, "dst": "10.96.0.10", "dport": 80 }));
    let file = folder.path().join("packets.json");
    std::fs::write(&file, json!(packets).to_string())?;
    let file = file.to_str().context("path")?;
    let (code, text, error) = texts(explain(&["--admin-socket", socket, "--packets", file])?)?;
    assert_eq!((code, error.as_str()), (Some(0), ""));
    for line in ["10.244.1.1 -> ", "10.244.1.3 -> ", "10.244.1.7 -> "] {
        assert!(text.contains(&format!("\n{line}")), "{text}");
    }
    Ok(())
}

#[test]
fn errors_name_what_is_wrong() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("packets.json");
    std::fs::write(&file, r#"[{"name": "a", "src": "10.0.0.1", "dst": "10.96.0.10", "dport": 80000}]"#)?;
    let file = file.to_str().context("path")?;
    for (arguments, expected) in [
        (&["--from", "frog", "--to", "10.96.0.10:80"][..], "--from: \"frog\" is none of"),
        (&["--from", "node", "--to", "10.96.0.10"], "--to: \"10.96.0.10\" is not ADDRESS:PORT"),
        (&["--from", "node", "--to", "10.96.0.10:80/icmp"], "--to: unknown protocol \"icmp\""),
        (&["--from", "10.0.0.1", "--to", "[fd00:10:96::70]:80"], "are not of one family"),
        (
            &["--from", "node", "--to", "10.96.0.10:80", "--mode", "frog"],
            "Invalid value: \"frog\": must be auto, ebpf, iptables, ipvs, nftables",
        ),
        (&["--packets", "/nowhere.json"], "--packets /nowhere.json: No such file"),
        (&["--packets", file], "[0] (\"a\"): invalid value: integer `80000`"),
    ] {
        let (code, _, error) = examples(arguments)?;
        assert_eq!((code, error.contains(expected)), (Some(1), true), "{arguments:?}: {error}");
    }
    let lost = ["--from", "node", "--to", "10.96.0.10:80", "--admin-socket", "/nowhere"];
    let (code, _, error) = texts(explain(&lost)?)?;
    assert_eq!((code, error.contains("--manifests PATH --node NAME")), (Some(1), true), "{error}");
    Ok(())
}

#[test]
fn packets_come_from_standard_input() -> Result<()> {
    let examples = root().join("examples");
    let mut child = Command::new(SHUNT)
        .args(["explain", "--node", "worker-1", "--packets", "-", "--manifests"])
        .arg(&examples)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let packets = json!([{ "src": "node", "dst": "10.96.0.53", "dport": 53, "proto": "udp" }]);
    child.stdin.take().context("stdin")?.write_all(packets.to_string().as_bytes())?;
    let (code, text, _) = texts(child.wait_with_output()?)?;
    assert_eq!((code, text.contains("demo/dns:dns/udp")), (Some(0), true), "{text}");
    Ok(())
}

/// What docs/explain.md shows is what is printed.
#[test]
fn the_documentation_shows_what_is_printed() -> Result<()> {
    let text = std::fs::read_to_string(root().join("docs/explain.md"))?;
    let mut samples = 0;
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(arguments) = line.strip_prefix("    $ shunt ").filter(|a| a.contains("--manifests")) else {
            continue;
        };
        let mut shown = String::new();
        while let Some(line) = lines.next_if(|line| line.starts_with("    ")) {
            shown.push_str(&line[4..]);
            shown.push('\n');
        }
        let arguments = arguments.split_whitespace();
        let output = Command::new(SHUNT).args(arguments).current_dir(root()).output()?;
        assert_eq!(String::from_utf8(output.stdout)?, shown, "{line}");
        samples += 1;
    }
    assert!(samples > 4, "only {samples} samples were found");
    Ok(())
}
