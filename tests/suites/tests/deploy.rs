//! What stands in deploy/: manifests are checked field by field against the API's types, kustomize's overlays
//! and the Helm chart are put together as those tools do it, and all of them say the same.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

fn documents(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    Ok(documents.into_iter().filter(|d| !d.is_null()).collect())
}

fn read(path: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    documents(&text).with_context(|| path.display().to_string())
}

/// Fails unless the object is of its kind's type, and has no field that the type lacks.
fn check(object: &Value) -> Result<()> {
    fn of<T: DeserializeOwned + Serialize>(object: &Value) -> Result<()> {
        let typed: T = serde_json::from_value(object.clone())?;
        subset(object, &serde_json::to_value(&typed)?, "")
    }
    let kind = object["kind"].as_str().unwrap_or_default();
    let checked = match (object["apiVersion"].as_str().unwrap_or_default(), kind) {
        ("v1", "ServiceAccount") => of::<ServiceAccount>(object),
        ("v1", "ConfigMap") => of::<ConfigMap>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => of::<ClusterRole>(object),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => of::<ClusterRoleBinding>(object),
        ("apps/v1", "DaemonSet") => of::<DaemonSet>(object),
        other => bail!("no type for {other:?}"),
    };
    checked.with_context(|| format!("{kind} {}", object["metadata"]["name"]))
}

/// Fails on a part of `object` that is not in `typed`.
fn subset(object: &Value, typed: &Value, path: &str) -> Result<()> {
    match (object, typed) {
        (Value::Object(fields), Value::Object(typed)) => {
            for (key, value) in fields {
                let path = format!("{path}.{key}");
                subset(value, typed.get(key).with_context(|| format!("{path}: unknown field"))?, &path)?;
            }
            Ok(())
        }
        (Value::Array(items), Value::Array(typed)) if items.len() == typed.len() => items
            .iter()
            .zip(typed)
            .enumerate()
            .try_for_each(|(i, (a, b))| subset(a, b, &format!("{path}[{i}]"))),
        _ => {
            ensure!(object == typed, "{path}: {object} becomes {typed}");
            Ok(())
        }
    }
}

/// A patch as kustomize applies it: objects are merged, lists of things with names by name, the rest is
/// replaced.
fn merge(object: &mut Value, patch: &Value) {
    let named = |list: &[Value]| !list.is_empty() && list.iter().all(|item| item["name"].is_string());
    match (object, patch) {
        (Value::Object(fields), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(fields.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(items), Value::Array(patch)) if named(items) && named(patch) => {
            for item in patch {
                match items.iter_mut().find(|known| known["name"] == item["name"]) {
                    Some(known) => merge(known, item),
                    None => items.push(item.clone()),
                }
            }
        }
        (object, patch) => *object = patch.clone(),
    }
}

/// Builds a kustomization: resources, patches, images. Anything else in it is an error.
fn kustomize(folder: &Path) -> Result<Vec<Value>> {
    let mut built = Vec::new();
    let [kustomization] =
        read(&folder.join("kustomization.yaml"))?.try_into().map_err(|_| anyhow::anyhow!("one document"))?;
    let list = |key: &str| kustomization[key].as_array().cloned().unwrap_or_default();
    for key in kustomization.as_object().context("no object")?.keys() {
        ensure!(
            ["apiVersion", "kind", "namespace", "resources", "patches", "images"].contains(&key.as_str()),
            "{key}: this test does not know what it does"
        );
    }
    for resource in list("resources") {
        let path = folder.join(resource.as_str().context("resource")?);
        built.extend(if path.is_dir() { kustomize(&path)? } else { read(&path)? });
    }
    for patch in list("patches") {
        for patch in read(&folder.join(patch["path"].as_str().context("path")?))? {
            let target = built
                .iter_mut()
                .find(|o| o["kind"] == patch["kind"] && o["metadata"]["name"] == patch["metadata"]["name"])
                .with_context(|| format!("nothing to patch: {patch}"))?;
            merge(target, &patch);
        }
    }
    for image in list("images") {
        let new = format!(
            "{}:{}",
            image["newName"].as_str().context("newName")?,
            image["newTag"].as_str().context("newTag")?
        );
        for object in &mut built {
            for list in ["initContainers", "containers"] {
                let containers = object.pointer_mut(&format!("/spec/template/spec/{list}"));
                for container in containers.and_then(Value::as_array_mut).into_iter().flatten() {
                    if container["image"] == image["name"] {
                        container["image"] = new.clone().into();
                    }
                }
            }
        }
    }
    Ok(built)
}

fn find<'o>(objects: &'o [Value], kind: &str) -> Result<&'o Value> {
    objects.iter().find(|o| o["kind"] == kind).with_context(|| format!("no {kind}"))
}

/// The agent's settings in a `ConfigMap`; they must be valid and without warnings.
fn configuration(
    objects: &[Value],
) -> Result<(shunt_config::KubeProxyConfiguration, shunt_config::ShuntConfiguration)> {
    let data = &find(objects, "ConfigMap")?["data"];
    let load = |key: &str| -> Result<shunt_config::Loaded> {
        let loaded =
            shunt_config::decode(data[key].as_str().context("no such key")?).context(key.to_owned())?;
        ensure!(loaded.warnings.is_empty(), "{key}: {:?}", loaded.warnings);
        Ok(loaded)
    };
    let kube_proxy = load("config.conf")?.kube_proxy.context("no KubeProxyConfiguration")?;
    let shunt = load("shunt.conf")?.shunt.context("no ShuntConfiguration")?;
    Ok((kube_proxy, shunt))
}

#[test]
fn manifests_have_the_fields_of_the_api_and_settings_that_are_valid() -> Result<()> {
    let base = kustomize(&deploy().join("base"))?;
    base.iter().try_for_each(check)?;
    assert_eq!(base.len(), 5);
    let (kube_proxy, shunt) = configuration(&base)?;
    assert_eq!((kube_proxy.mode.as_str(), shunt.mode), ("", None));

    let daemon_set = find(&base, "DaemonSet")?;
    let pod = &daemon_set["spec"]["template"]["spec"];
    let [container] = pod["containers"].as_array().context("containers")?.as_slice() else {
        bail!("one container")
    };
    assert!(container["image"].as_str().context("image")?.contains("/shunt:"));
    assert_eq!(container["securityContext"].get("privileged"), None, "the proxy itself is not privileged");
    assert_eq!(pod["hostNetwork"], true);
    assert_eq!(pod["priorityClassName"], "system-node-critical");
    let ports: Vec<String> = container["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| format!(":{}", p["containerPort"]))
        .collect();
    let defaults = shunt_config::KubeProxyConfiguration::with_defaults();
    assert!(defaults.healthz_bind_address.ends_with(&ports[0]));
    assert!(defaults.metrics_bind_address.ends_with(&ports[1]));
    Ok(())
}

#[test]
fn rights_are_those_that_are_used() -> Result<()> {
    let base = kustomize(&deploy().join("base"))?;
    let rules = find(&base, "ClusterRole")?["rules"].as_array().context("rules")?;
    let mut rights = Vec::new();
    for rule in rules {
        for resource in rule["resources"].as_array().into_iter().flatten() {
            let (group, resource) =
                (rule["apiGroups"][0].as_str().unwrap_or("?"), resource.as_str().unwrap_or("?"));
            rights.push(format!("{group}/{resource} {}", rule["verbs"]));
        }
    }
    let watched = |what: &str| format!("{what} [\"list\",\"watch\"]");
    assert_eq!(
        rights,
        [
            watched("/services"),
            watched("/nodes"),
            watched("discovery.k8s.io/endpointslices"),
            watched("networking.k8s.io/servicecidrs"),
            "events.k8s.io/events [\"create\",\"patch\"]".to_owned(),
        ]
    );
    Ok(())
}

#[test]
fn each_mode_has_an_overlay() -> Result<()> {
    let base = kustomize(&deploy().join("base"))?;
    for mode in shunt_mode::Mode::ALL {
        let built = kustomize(&deploy().join("modes").join(mode.name())).context(mode)?;
        built.iter().try_for_each(check).context(mode)?;
        let (kube_proxy, shunt) = configuration(&built)?;
        assert_eq!(shunt.mode.as_deref(), Some(mode.name()));
        assert_eq!(kube_proxy, configuration(&base)?.0);
        for container in ["initContainers", "containers"] {
            let container = &find(&built, "DaemonSet")?["spec"]["template"]["spec"][container][0];
            assert!(
                container["image"].as_str().is_some_and(|i| i.starts_with("registry.example/")),
                "{container}"
            );
        }
        // The tools of iptables, which every mode may need to remove kube-proxy's rules, share a lock.
        let pod = &find(&built, "DaemonSet")?["spec"]["template"]["spec"];
        assert!(pod.to_string().contains("/run/xtables.lock"), "{mode}: {pod}");
    }
    Ok(())
}

/// kubeadm's own DaemonSet, and what ebpf mode needs besides.
#[test]
fn kubeadms_daemon_set_takes_the_patch_for_ebpf_mode() -> Result<()> {
    let [mut daemon_set] = documents(KUBEADM)?.try_into().map_err(|_| anyhow::anyhow!("one document"))?;
    check(&daemon_set)?;
    let [patch] = read(&deploy().join("modes/ebpf/kubeadm.yaml"))?
        .try_into()
        .map_err(|_| anyhow::anyhow!("one patch"))?;
    merge(&mut daemon_set, &patch);
    check(&daemon_set)?;
    let pod = &daemon_set["spec"]["template"]["spec"];
    let [container] = pod["containers"].as_array().context("containers")?.as_slice() else {
        bail!("one container")
    };
    let mounts = |container: &Value| -> Result<Vec<(String, String)>> {
        let text = |v: &Value| v.as_str().map(str::to_owned).context("text");
        let list = container["volumeMounts"].as_array().context("volumeMounts")?;
        list.iter().map(|m| Ok((text(&m["name"])?, text(&m["mountPath"])?))).collect()
    };
    let patched = mounts(container)?;
    assert_eq!(patched.len(), 5, "{patched:?}");
    // The same as in our own manifest.
    let base = kustomize(&deploy().join("base"))?;
    let own = &find(&base, "DaemonSet")?["spec"]["template"]["spec"];
    for name in ["bpf", "cgroup"] {
        let volume = |pod: &Value| {
            let list = pod["volumes"].as_array().into_iter().flatten();
            list.filter(|v| v["name"] == name).map(|v| v["hostPath"]["path"].clone()).next()
        };
        assert_eq!(volume(pod), volume(own), "{name}");
        let mount = |list: Vec<(String, String)>| list.into_iter().find(|(of, _)| of == name);
        assert_eq!(mount(patched.clone()), mount(mounts(&own["containers"][0])?), "{name}");
    }
    Ok(())
}

/// As kubeadm 1.36 writes it (cmd/kubeadm/app/phases/addons/proxy/manifests.go).
const KUBEADM: &str = r"
apiVersion: apps/v1
kind: DaemonSet
metadata:
  labels:
    k8s-app: kube-proxy
  name: kube-proxy
  namespace: kube-system
spec:
  selector:
    matchLabels:
      k8s-app: kube-proxy
  updateStrategy:
    type: RollingUpdate
  template:
    metadata:
      labels:
        k8s-app: kube-proxy
    spec:
      priorityClassName: system-node-critical
      containers:
      - name: kube-proxy
        image: registry.k8s.io/kube-proxy:v1.36.0
        imagePullPolicy: IfNotPresent
        command:
        - /usr/local/bin/kube-proxy
        - --config=/var/lib/kube-proxy/config.conf
        - --hostname-override=$(NODE_NAME)
        securityContext:
          privileged: true
        volumeMounts:
        - mountPath: /var/lib/kube-proxy
          name: kube-proxy
        - mountPath: /run/xtables.lock
          name: xtables-lock
        - mountPath: /lib/modules
          name: lib-modules
          readOnly: true
        env:
        - name: NODE_NAME
          valueFrom:
            fieldRef:
              fieldPath: spec.nodeName
      hostNetwork: true
      serviceAccountName: kube-proxy
      volumes:
      - name: kube-proxy
        configMap:
          name: kube-proxy
      - name: xtables-lock
        hostPath:
          path: /run/xtables.lock
          type: FileOrCreate
      - name: lib-modules
        hostPath:
          path: /lib/modules
      tolerations:
      - operator: Exists
      nodeSelector:
        kubernetes.io/os: linux
";

#[test]
fn cleaning_up_after_a_switch_back_has_a_manifest() -> Result<()> {
    let built = kustomize(&deploy().join("cleanup"))?;
    built.iter().try_for_each(check)?;
    let container = &find(&built, "DaemonSet")?["spec"]["template"]["spec"]["initContainers"][0];
    assert_eq!(container["args"], json!(["cleanup", "--mode", "nftables"]));
    assert!(container["image"].as_str().is_some_and(|i| i.starts_with("registry.example/")));
    Ok(())
}

#[test]
fn a_field_that_the_api_lacks_is_found() -> Result<()> {
    let mut base = kustomize(&deploy().join("base"))?;
    let daemon_set = base.iter_mut().find(|o| o["kind"] == "DaemonSet").context("DaemonSet")?;
    daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] =
        true.into();
    let error = format!("{:#}", check(daemon_set).expect_err("a typing error"));
    assert!(error.contains("securityContext.readOnlyRootFileSystem: unknown field"), "{error}");
    Ok(())
}

/// As much of Helm's templates as the chart uses; anything else is an error.
fn render(template: &str, values: &Value) -> Result<String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (expression, after) = after.split_once("}}").context("no end of {{")?;
        let (before, expression) = match expression.strip_prefix('-') {
            Some(expression) => (before.trim_end(), expression),
            None => (before, expression),
        };
        text.push_str(before);
        let mut stages = expression.split('|').map(str::trim);
        let path = stages.next().and_then(|p| p.strip_prefix('.')).context("no path")?;
        let value = path
            .split('.')
            .try_fold(values, |v, key| v.get(key).with_context(|| format!("no value .{path}")))?;
        let mut result = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        for stage in stages {
            result = match stage.split_once(' ').unwrap_or((stage, "")) {
                ("quote", "") => json!(result).to_string(),
                ("toYaml", "") => serde_saphyr::to_string(value)?.trim_end().to_owned(),
                ("nindent", n) => {
                    let indent = format!("\n{}", " ".repeat(n.parse()?));
                    indent.clone() + &result.lines().collect::<Vec<_>>().join(&indent)
                }
                other => bail!("{other:?}: this test does not know what it does"),
            };
        }
        text.push_str(&result);
        rest = after;
    }
    text.push_str(rest);
    Ok(text)
}

#[test]
fn the_chart_says_what_the_base_says() -> Result<()> {
    let chart = deploy().join("chart");
    let [values] =
        read(&chart.join("values.yaml"))?.try_into().map_err(|_| anyhow::anyhow!("one document"))?;
    let [about] = read(&chart.join("Chart.yaml"))?.try_into().map_err(|_| anyhow::anyhow!("one document"))?;
    assert_eq!(about["version"], env!("CARGO_PKG_VERSION"));
    let context =
        json!({ "Values": values, "Release": { "Name": "kube-proxy", "Namespace": "kube-system" } });
    let mut rendered = Vec::new();
    for file in std::fs::read_dir(chart.join("templates"))? {
        let path = file?.path();
        let text =
            render(&std::fs::read_to_string(&path)?, &context).with_context(|| path.display().to_string())?;
        rendered.extend(documents(&text).with_context(|| format!("{}: {text}", path.display()))?);
    }
    rendered.iter().try_for_each(check)?;
    let (kube_proxy, shunt) = configuration(&rendered)?;
    let base = kustomize(&deploy().join("base"))?;
    assert_eq!(kube_proxy, configuration(&base)?.0);
    assert_eq!(shunt.mode.as_deref(), Some("auto"));
    assert_eq!(rendered.len(), base.len());

    let mut daemon_set = find(&rendered, "DaemonSet")?.clone();
    for list in ["initContainers", "containers"] {
        let container =
            daemon_set["spec"]["template"]["spec"][list][0].as_object_mut().context("container")?;
        container.remove("imagePullPolicy");
    }
    assert_eq!(&daemon_set, find(&base, "DaemonSet")?);
    assert_eq!(find(&rendered, "ClusterRole")?["rules"], find(&base, "ClusterRole")?["rules"]);
    Ok(())
}

#[test]
fn the_schema_of_our_configuration_has_its_fields() -> Result<()> {
    let path = deploy().join("../docs/shuntconfiguration.schema.json");
    let schema: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let defaults = serde_json::to_value(shunt_config::ShuntConfiguration::default())?;
    has_its_fields(&schema, &defaults)
}

fn has_its_fields(schema: &Value, defaults: &Value) -> Result<()> {
    let keys = |v: &Value| v.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>());
    assert_eq!(keys(&schema["properties"]), keys(defaults));
    for (key, value) in defaults.as_object().context("object")? {
        let of = &schema["properties"][key];
        assert!(of["description"].is_string(), "{key}");
        if value.is_object() {
            has_its_fields(of, value)?;
            continue;
        }
        let default = of.get("default").or_else(|| of.get("const")).unwrap_or(&Value::Null);
        assert_eq!(default, value, "{key}");
    }
    Ok(())
}

/// The image as `make image` packs it, with something small in place of the binary.
#[test]
fn the_image_holds_both_names_and_the_tools() -> Result<()> {
    // Room for the binary, which is about 25 MB.
    const TOOLS_MAX: u64 = 15_000_000;
    let missing = ["iptables-nft", "ipset", "kmod"].into_iter().find(|name| !installed(name));
    if let Some(missing) = missing.filter(|_| std::env::var_os("SHUNT_REQUIRE_KERNEL").is_none()) {
        eprintln!("skipped: {missing} is not installed");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("shunt"), "#!/bin/sh\n")?;
    let pack = || run(Command::new(deploy().join("build-image")).arg(path("shunt")).arg(path("image.tar")));
    // A binary that makes it too large is not packed.
    std::fs::File::options().write(true).open(path("shunt"))?.set_len(30_000_000)?;
    let error = format!("{:#}", pack().expect_err("an image that is too large"));
    assert!(error.contains("more than 40000000 bytes"), "{error}");
    assert!(!path("image.tar").exists());
    std::fs::write(path("shunt"), "#!/bin/sh\n")?;
    pack()?;
    std::fs::create_dir(path("image"))?;
    run(Command::new("tar").arg("xf").arg(path("image.tar")).arg("-C").arg(path("image")))?;
    // Every descriptor leads to a blob of its size and digest.
    let blob = |of: &Value| -> Result<PathBuf> {
        let digest = of["digest"].as_str().and_then(|d| d.strip_prefix("sha256:")).context("digest")?;
        let blob = path("image/blobs/sha256").join(digest);
        ensure!(run(Command::new("sha256sum").arg(&blob))?.starts_with(digest), "{digest}");
        ensure!(Some(blob.metadata()?.len()) == of["size"].as_u64(), "size of {digest}");
        Ok(blob)
    };
    let json =
        |path: PathBuf| -> Result<Value> { Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?) };
    let manifest = json(blob(&json(path("image/index.json"))?["manifests"][0])?)?;
    let config = json(blob(&manifest["config"])?)?;
    assert_eq!(config["config"]["Entrypoint"], json!(["/usr/local/bin/shunt"]));
    let layer = blob(&manifest["layers"][0])?;
    let root = path("root");
    std::fs::create_dir(&root)?;
    run(Command::new("tar").arg("xzf").arg(&layer).arg("-C").arg(&root))?;
    assert_eq!(std::fs::read_link(root.join("usr/local/bin/kube-proxy"))?, Path::new("shunt"));
    let size: u64 =
        run(Command::new("du").args(["-sb"]).arg(&root))?.split_whitespace().next().context("du")?.parse()?;
    assert!(size < TOOLS_MAX, "{size}");
    let is_root = run(Command::new("id").arg("-u"))?.trim() == "0";
    for tool in ["iptables-nft -V", "ip6tables-legacy-restore -V", "/sbin/modprobe -V"] {
        if is_root {
            run(Command::new("chroot").arg(&root).args(tool.split(' ')))?;
        }
    }
    Ok(())
}

fn installed(program: &str) -> bool {
    std::env::split_paths("/usr/sbin:/sbin:/usr/bin:/bin").any(|folder| folder.join(program).exists())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn alert_rules_are_sound() -> Result<()> {
    let rules = deploy().join("dashboards/alerts.yaml");
    assert_eq!(read(&rules)?.len(), 1);
    match Command::new("promtool").args(["check", "rules"]).arg(&rules).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            let required = std::env::var_os("SHUNT_REQUIRE_KERNEL").is_some_and(|v| v == "1");
            ensure!(!required, "promtool (Debian package prometheus): {error}");
            eprintln!("skipped: promtool: {error}");
        }
    }
    Ok(())
}
