//! The source that reads files: one-shot and live.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Source, named};
use shunt_core::store::Event;
use shunt_watch::{Update, WatchError, read_manifests, watch_manifests};
use tempfile::TempDir;

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  namespace: ns\n  name: {name}\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n---\n"
    )
}

fn slice(name: &str, service: &str, address: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  namespace: ns\n  name: {name}\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\nports: [{{name: \"\", port: 8080}}]\nendpoints:\n- addresses: [{address}]\n---\n"
    )
}

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n---\n")
}

fn folder() -> (TempDir, PathBuf) {
    let temporary = tempfile::tempdir().unwrap();
    let path = temporary.path().join("manifests");
    fs::create_dir(&path).unwrap();
    (temporary, path)
}

fn live(path: &Path) -> Source {
    let path = path.to_owned();
    Source::of(|tx| watch_manifests(path, "me".to_owned(), tx))
}

/// As `kubectl apply` of a `ConfigMap`, editors and other careful writers do it.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("tmp");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_folder_is_read_in_all_its_forms() {
    let (_temporary, path) = folder();
    fs::create_dir_all(path.join("sub/deeper")).unwrap();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1") + &slice("a-1", "a", "10.0.0.1")).unwrap();
    fs::write(
        path.join("sub/b.json"),
        r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Service",
            "metadata":{"name":"b"},"spec":{"clusterIP":"10.96.0.2"}}]}"#,
    )
    .unwrap();
    fs::write(
        path.join("sub/deeper/c.yml"),
        "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: c, namespace: ns}\n  spec: {clusterIP: 10.96.0.3}\n",
    )
    .unwrap();
    fs::write(
        path.join("config.yaml"),
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n---\nkind: ConfigMap\napiVersion: v1\n---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: knative}\n",
    )
    .unwrap();
    fs::write(path.join("nodes.yaml"), node("me") + &node("other")).unwrap();
    fs::write(path.join("cidr.yaml"), "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: k}\nspec: {cidrs: [10.96.0.0/16]}\n").unwrap();
    fs::write(path.join("notes.txt"), "{{{").unwrap();
    fs::write(path.join(".hidden.yaml"), service("hidden", "10.96.0.9")).unwrap();

    let manifests = read_manifests(&path, Some("me")).unwrap();
    assert_eq!(manifests.problems, []);
    let names: Vec<String> = manifests
        .events
        .iter()
        .map(|event| match event {
            Event::Service(s) => s.name.to_string(),
            Event::Slice(s) => s.name.to_string(),
            Event::Node(n) => n.name.to_string(),
            Event::ServiceCidr(name, _) => name.to_string(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["default/b", "ns/a", "ns/c", "ns/a-1", "me", "k"]);
    assert_eq!(manifests.config.len(), 1);
    assert_eq!(manifests.config[0].value["mode"], "nftables");
    assert_eq!(manifests.config[0].path, path.join("config.yaml"));

    // A single file; and which Node is ours, if nobody says.
    assert_eq!(read_manifests(&path.join("a.yaml"), None).unwrap().events.len(), 2);
    let nodes = read_manifests(&path.join("nodes.yaml"), None).unwrap();
    assert!(nodes.events.is_empty() && nodes.problems.len() == 1, "{nodes:?}");
    fs::write(path.join("nodes.yaml"), node("only")).unwrap();
    assert_eq!(read_manifests(&path.join("nodes.yaml"), None).unwrap().events.len(), 1);

    assert!(matches!(read_manifests(&path.join("absent"), None), Err(WatchError::Manifests { .. })));
}

#[test]
fn problems_name_file_line_object_and_field() {
    let (_temporary, path) = folder();
    fs::write(path.join("broken.yaml"), "kind: Service\nmetadata:\n  name: [x\n").unwrap();
    fs::write(path.join("broken.json"), "{\n\"kind\": }").unwrap();
    fs::write(path.join("latin.yaml"), b"kind: \xff\xfe").unwrap();
    fs::write(path.join("scalar.yaml"), "just text\n").unwrap();
    fs::write(
        path.join("odd.yaml"),
        service("odd", "10.96.0.300") + &service("odd2", "10.96.0.2").replace("port: 80", "port: http"),
    )
    .unwrap();
    let manifests = read_manifests(&path, None).unwrap();
    assert_eq!(manifests.events.len(), 2);
    let problems: Vec<_> = manifests.problems.iter().map(ToString::to_string).collect();
    let at = |file: &str| path.join(file).display().to_string();
    for wanted in [
        format!("file {}: line ", at("broken.yaml")),
        format!("file {}: line 2: ", at("broken.json")),
        format!("file {}: ", at("latin.yaml")),
        format!("file {}: ", at("scalar.yaml")),
        "Service ns/odd: spec.clusterIP: \"10.96.0.300\" is not an IP address".to_owned(),
        "Service ns/odd2: spec.ports[0].port: ".to_owned(),
    ] {
        assert!(problems.iter().any(|p| p.starts_with(&wanted)), "{wanted} in {problems:#?}");
    }
    assert!(problems.iter().all(|p| !p.contains('\n')));
}

#[tokio::test]
async fn changes_are_followed_and_only_changes_are_sent() {
    let (_temporary, path) = folder();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1") + &service("b", "10.96.0.2") + &node("me"))
        .unwrap();
    let mut source = live(&path);
    source.synced().await;
    assert_eq!(source.events().len(), 3);

    // In place.
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1") + &service("b", "10.96.0.3") + &node("me"))
        .unwrap();
    assert!(matches!(source.next().await, Update::Event(Event::Service(s)) if s.name == named("b")));
    // By rename.
    replace(&path.join("a.yaml"), &(service("a", "10.96.0.1") + &node("me")));
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("b"))));
    // A new file, and a new folder.
    fs::write(path.join("c.yaml"), slice("a-1", "a", "10.0.0.1")).unwrap();
    assert!(matches!(source.next().await, Update::Event(Event::Slice(_))));
    fs::create_dir(path.join("sub")).unwrap();
    fs::write(path.join("sub/d.yaml"), service("d", "10.96.0.4")).unwrap();
    assert!(matches!(source.next().await, Update::Event(Event::Service(s)) if s.name == named("d")));
    // Moved to another file and reformatted: nothing has changed.
    fs::rename(path.join("c.yaml"), path.join("e.yaml")).unwrap();
    fs::write(path.join("e.yaml"), format!("# moved\n{}", slice("a-1", "a", "10.0.0.1"))).unwrap();
    source.quiet().await;
    // Deleted.
    fs::remove_dir_all(path.join("sub")).unwrap();
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("d"))));
    fs::remove_file(path.join("a.yaml")).unwrap();
    source.until("all to go", |s| !s.has("a") && s.store.node().is_none()).await;
    source.quiet().await;
    assert_eq!(source.log.iter().filter(|u| **u == Update::Synced).count(), 1);
}

#[tokio::test]
async fn a_change_is_seen_soon() {
    let (_temporary, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, service("a", "10.96.0.1")).unwrap();
    let mut source = live(&file);
    source.synced().await;
    let mut times = Vec::new();
    for i in 2..12 {
        let start = std::time::Instant::now();
        replace(&file, &service("a", &format!("10.96.0.{i}")));
        assert!(matches!(source.next().await, Update::Event(Event::Service(_))));
        times.push(start.elapsed());
    }
    times.sort();
    println!("manifest change to event: median {:?}, worst {:?}", times[5], times[9]);
    assert!(times[5] < Duration::from_millis(300), "{times:?}");
}

#[tokio::test]
async fn a_broken_file_keeps_its_objects() {
    let (_temporary, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, service("a", "10.96.0.1")).unwrap();
    fs::write(path.join("b.yaml"), service("b", "10.96.0.2")).unwrap();
    let mut source = live(&path);
    source.synced().await;
    replace(&file, "kind: Service\nmetadata: {name: [\n");
    let Update::Problem(problem) = source.next().await else { panic!("{:#?}", source.log) };
    assert_eq!((problem.kind, problem.name), ("file", file.display().to_string()));
    assert!(problem.field.starts_with("line "), "{}", problem.field);
    assert!(source.has("a"));
    // Other files go on.
    replace(&path.join("b.yaml"), &service("c", "10.96.0.3"));
    source.until("c", |s| s.has("c") && !s.has("b")).await;
    // Mended: only what is different is sent.
    replace(&file, &(service("a", "10.96.0.1") + &service("d", "10.96.0.4")));
    assert!(matches!(source.next().await, Update::Event(Event::Service(s)) if s.name == named("d")));
    source.quiet().await;
    assert!(source.has("a"));
    assert_eq!(source.problems().len(), 1);
}

#[tokio::test]
async fn an_unreadable_object_stays_as_it_was() {
    let (_temporary, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, service("a", "10.96.0.1")).unwrap();
    let mut source = live(&path);
    source.synced().await;
    replace(&file, "apiVersion: v1\nkind: Service\nmetadata: {namespace: ns, name: a}\nspec: oops\n");
    source.until("a problem", |s| s.problems().len() >= 2).await;
    source.quiet().await;
    assert!(source.has("a"));
}

#[tokio::test]
async fn the_later_of_two_files_wins() {
    let (_temporary, path) = folder();
    fs::write(path.join("1.yaml"), service("a", "10.96.0.1")).unwrap();
    fs::write(path.join("2.yaml"), service("a", "10.96.0.2")).unwrap();
    let mut source = live(&path);
    source.synced().await;
    let ip = |s: &Source| s.store.service(&named("a")).map(|s| s.cluster_ips[0].to_string());
    assert_eq!(ip(&source).as_deref(), Some("10.96.0.2"));
    assert_eq!(source.problems().len(), 1, "{:#?}", source.problems());
    assert_eq!(source.problems()[0].name, "ns/a");
    // The loser does not matter, and is not complained of again.
    replace(&path.join("1.yaml"), &service("a", "10.96.0.7"));
    source.quiet().await;
    fs::remove_file(path.join("2.yaml")).unwrap();
    source.until("the other", |s| ip(s).as_deref() == Some("10.96.0.7")).await;
    assert!(source.events().iter().all(|e| !matches!(e, Event::ServiceGone(_))));
}

#[tokio::test]
async fn a_config_map_volume_is_followed() {
    let (_temporary, path) = folder();
    let version = |name: &str, text: &str| {
        fs::create_dir(path.join(name)).unwrap();
        fs::write(path.join(name).join("a.yaml"), text).unwrap();
    };
    version("..1", &service("a", "10.96.0.1"));
    symlink("..1", path.join("..data")).unwrap();
    symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
    // The whole volume, and one file of it.
    for given in [path.clone(), path.join("a.yaml")] {
        let mut source = live(&given);
        source.synced().await;
        assert_eq!(source.problems(), Vec::<&shunt_watch::Problem>::new());
        assert_eq!(source.events().len(), 1);
        let next = if given == path { ("..2", "b") } else { ("..3", "c") };
        version(next.0, &service(next.1, "10.96.0.2"));
        symlink(next.0, path.join("..data_tmp")).unwrap();
        let start = std::time::Instant::now();
        fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
        source.until("the swap", |s| s.has(next.1)).await;
        assert!(start.elapsed() < Duration::from_secs(1), "not by polling: {:?}", start.elapsed());
        source.until("the old to go", |s| s.store.services().count() == 1).await;
    }
}

#[tokio::test]
async fn a_file_that_is_emptied_and_written_again_is_not_taken_for_gone() {
    let (_temporary, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, service("a", "10.96.0.1")).unwrap();
    let mut source = live(&path);
    source.synced().await;
    for i in 2..6 {
        fs::write(&file, "").unwrap();
        tokio::time::sleep(Duration::from_millis(25)).await;
        fs::write(&file, service("a", &format!("10.96.0.{i}"))).unwrap();
        assert!(matches!(source.next().await, Update::Event(Event::Service(_))));
        fs::rename(&file, path.join("a.yaml~")).unwrap();
        tokio::time::sleep(Duration::from_millis(25)).await;
        fs::rename(path.join("a.yaml~"), &file).unwrap();
        source.quiet().await;
    }
    // For good.
    fs::write(&file, "").unwrap();
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("a"))));
}

#[tokio::test]
async fn a_path_that_vanishes_takes_nothing_away() {
    let (_temporary, path) = folder();
    let file = path.join("a.yaml");
    fs::write(&file, service("a", "10.96.0.1")).unwrap();
    let mut source = live(&file);
    source.synced().await;
    fs::remove_file(&file).unwrap();
    assert!(matches!(source.next().await, Update::Problem(p) if p.name == file.display().to_string()));
    source.quiet().await;
    assert!(source.has("a"));
    fs::write(&file, service("b", "10.96.0.2")).unwrap();
    source.until("the new", |s| s.has("b") && !s.has("a")).await;
}

#[tokio::test]
async fn an_absent_path_is_an_error_and_an_unheard_source_ends() {
    let (_temporary, path) = folder();
    let (tx, _rx) = tokio::sync::mpsc::channel(1);
    let absent = watch_manifests(path.join("absent"), "me".to_owned(), tx).await;
    assert!(matches!(absent, Err(WatchError::Manifests { .. })));

    let mut source = live(&path);
    source.synced().await;
    source.rx.close();
    tokio::time::timeout(Duration::from_secs(1), &mut source.task).await.unwrap().unwrap().unwrap();
}
