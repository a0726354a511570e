//! The Kubernetes source against the fake API server, in good times and bad.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod common;

use std::time::Duration;

use common::{Source, cidr, named, node, options, service, slice};
use serde_json::json;
use shunt_core::store::Event;
use shunt_harness::apiserver::{ApiServer, Fault, Inject, Lists, Resource, Verb};
use shunt_watch::{KubeOptions, Update, WatchError, watch_kube};

async fn server() -> ApiServer {
    ApiServer::start().await.unwrap()
}

/// A server with a bit of everything.
async fn full_server() -> ApiServer {
    let server = server().await;
    server.put_all([
        service("a", "10.96.0.1"),
        service("b", "10.96.0.2"),
        slice("a-1", "a", &["10.0.0.1", "10.0.0.2"]),
        node("me", "zone-a"),
        node("other", "zone-b"),
        cidr("kubernetes", "10.96.0.0/16"),
    ]);
    server
}

#[tokio::test]
async fn everything_is_listed_before_synced_which_comes_once() {
    for streaming in [true, false] {
        let server = full_server().await;
        server.set_streaming_lists(streaming);
        let mut source = Source::kube(options(&server));
        source.synced().await;
        assert_eq!(source.events().len(), 5, "{:#?}", source.log);
        assert!(source.has("a") && source.has("b"));
        assert_eq!(source.endpoints("a"), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(source.store.node().unwrap().zone.as_deref(), Some("zone-a"));
        assert_eq!(source.store.service_cidrs().len(), 1);
        source.quiet().await;
        let counts = server.counts(Resource::Services);
        assert_eq!((counts.lists, counts.streamed), if streaming { (0, 1) } else { (1, 1) });
        assert_eq!(source.log.iter().filter(|u| **u == Update::Synced).count(), 1);
    }
}

#[tokio::test]
async fn nothing_is_synced_while_one_kind_is_missing() {
    let server = full_server().await;
    server.set_fault_on(Resource::EndpointSlices, Verb::List, Fault::Hang);
    server.set_fault_on(Resource::EndpointSlices, Verb::Watch, Fault::Hang);
    let mut source = Source::kube(options(&server));
    source.until("services", |s| s.has("a") && s.has("b")).await;
    source.until("a timeout", |s| s.lost() > 0).await;
    assert!(!source.log.contains(&Update::Synced));
    server.clear_faults();
    source.synced().await;
    assert_eq!(source.endpoints("a").len(), 2);
}

#[tokio::test]
async fn changes_arrive() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    for resource in Resource::ALL {
        server.wait_for_watchers(resource, 1).await;
    }
    server.put(service("c", "10.96.0.3"));
    assert!(matches!(source.next().await, Update::Event(Event::Service(s)) if s.name == named("c")));
    server.put(slice("a-1", "a", &["10.0.0.9"]));
    assert!(matches!(source.next().await, Update::Event(Event::Slice(s)) if s.endpoints.len() == 1));
    server.delete(Resource::Services, "ns", "b");
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("b"))));
    server.put(node("me", "zone-b"));
    assert!(
        matches!(source.next().await, Update::Event(Event::Node(n)) if n.zone.as_deref() == Some("zone-b"))
    );
    server.delete(Resource::Nodes, "", "me");
    assert_eq!(source.next().await, Update::Event(Event::NodeGone));
    server.delete(Resource::ServiceCidrs, "", "kubernetes");
    assert_eq!(source.next().await, Update::Event(Event::ServiceCidrGone("kubernetes".into())));
    server.put(node("other", "zone-c"));
    source.quiet().await;
}

#[tokio::test]
async fn labels_take_objects_away_and_give_them_back() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    server.wait_for_watchers(Resource::Services, 1).await;
    server.wait_for_watchers(Resource::EndpointSlices, 1).await;
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let mut labelled = service("a", "10.96.0.1");
        labelled["metadata"]["labels"] = json!({label: ""});
        server.put(labelled);
        assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("a"))), "{label}");
        server.put(service("a", "10.96.0.1"));
        assert!(matches!(source.next().await, Update::Event(Event::Service(_))), "{label}");
    }
    let mut headless = slice("a-1", "a", &["10.0.0.1"]);
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = "".into();
    server.put(headless);
    assert_eq!(source.next().await, Update::Event(Event::SliceGone(named("a-1"))));
    server.put(slice("a-1", "a", &["10.0.0.1"]));
    assert!(matches!(source.next().await, Update::Event(Event::Slice(_))));
    // An existing Service that turns into one without cluster IPs.
    let mut external = service("a", "");
    external["spec"] = json!({"type": "ExternalName", "externalName": "example.org"});
    server.put(external);
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("a"))));
    server.put(service("b", "None"));
    assert_eq!(source.next().await, Update::Event(Event::ServiceGone(named("b"))));
}

#[tokio::test]
async fn what_vanished_during_a_gap_is_sent_as_gone() {
    for streaming in [true, false] {
        // The server forgets while connected (an ERROR event) and while not (HTTP 410).
        for connected in [true, false] {
            let server = full_server().await;
            server.set_streaming_lists(streaming);
            let mut source = Source::kube(options(&server));
            source.synced().await;
            for resource in Resource::ALL {
                server.wait_for_watchers(resource, 1).await;
            }
            if !connected {
                server.refuse_connections();
                source.until("loss", |s| s.lost() >= 4).await;
                server.delete(Resource::Services, "ns", "b");
                server.delete(Resource::EndpointSlices, "ns", "a-1");
                server.delete(Resource::Nodes, "", "me");
                server.put(service("c", "10.96.0.3"));
            }
            server.expire_history();
            server.clear_faults();
            if connected {
                source.until("410", |s| s.lost() >= 4).await;
                source.quiet_after_relist().await;
                assert!(source.has("a") && source.has("b"));
            } else {
                source.until("the new state", |s| !s.has("b") && s.has("c")).await;
                source.until("the slice to go", |s| s.endpoints("a").is_empty()).await;
                source.until("the node to go", |s| s.store.node().is_none()).await;
                assert!(source.has("a"));
            }
            assert_eq!(source.log.iter().filter(|u| **u == Update::Synced).count(), 1);
        }
    }
}

impl Source {
    /// A new list sends objects again, but nothing that changes the store.
    async fn quiet_after_relist(&mut self) {
        let before = self.store.clone();
        while self.receive(Duration::from_millis(150)).await.is_some() {}
        assert_eq!(self.store, before);
    }
}

#[tokio::test]
async fn a_broken_connection_is_resumed_where_it_was() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    let events = source.events().len();
    for i in 0..5 {
        server.wait_for_watchers(Resource::Services, 1).await;
        server.drop_connections();
        let name = format!("new-{i}");
        server.put(service(&name, &format!("10.96.1.{i}")));
        source.until(&name, |s| s.has(&name)).await;
    }
    assert_eq!(source.events().len(), events + 5, "nothing was listed again");
    assert_eq!(server.counts(Resource::Services).streamed, 1);
}

#[tokio::test]
async fn half_lines_and_garbage_and_errors_lose_nothing() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    let bad = [
        Inject::HalfLine,
        Inject::Line("<html>garbage</html>".to_owned()),
        Inject::Line(r#"{"type":"ADDED","object":"#.to_owned()),
        Inject::Line(r#"{"type":"BOOKMARK","object":7}"#.to_owned()),
        Inject::Line("\u{0}\u{1}".to_owned()),
        Inject::Error(500),
        Inject::Error(410),
        Inject::End,
    ];
    for (i, inject) in bad.into_iter().enumerate() {
        server.wait_for_watchers(Resource::Services, 1).await;
        server.inject(Resource::Services, inject.clone());
        let name = format!("after-{i}");
        server.put(service(&name, &format!("10.96.1.{i}")));
        source.until(&format!("{name} after {inject:?}"), |s| s.has(&name)).await;
    }
    assert!(source.has("a") && source.has("b"));
}

#[tokio::test]
async fn one_bad_object_spoils_only_itself() {
    for streaming in [true, false] {
        let server = full_server().await;
        server.set_streaming_lists(streaming);
        server.put_raw(
            Resource::Services,
            "ns",
            "bad",
            r#"{"metadata":{"namespace":"ns","name":"bad","resourceVersion":"{rv}"},"spec":"what?"}"#,
        );
        server.put_raw(
            Resource::Services,
            "ns",
            "half",
            r#"{"metadata":{"namespace":"ns","name":"half","resourceVersion":"{rv}"},
                "spec":{"clusterIP":"10.96.0.7","ports":[{"port":"http"},{"port":443}],"externalIPs":["1.2.3.4",{}]}}"#
                .replace('\n', "")
                .as_str(),
        );
        server.put_raw(Resource::Services, "ns", "zz", "[1,2]");
        let mut source = Source::kube(options(&server));
        source.synced().await;
        assert!(source.has("a") && source.has("b") && !source.has("bad"));
        let half = source.store.service(&named("half")).unwrap();
        assert_eq!(half.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [443]);
        assert_eq!(half.external_ips.len(), 1);
        let problems: Vec<_> = source.problems().iter().map(ToString::to_string).collect();
        for wanted in [
            "Service ns/bad: spec: ",
            "Service ns/half: spec.ports[0].port: ",
            "Service ns/half: spec.externalIPs[1]: ",
            "Service ?: ",
        ] {
            assert!(problems.iter().any(|p| p.starts_with(wanted)), "{wanted} in {problems:#?}");
        }

        // A known object that becomes unreadable stays as it was, also over a new list.
        server.wait_for_watchers(Resource::Services, 1).await;
        server.put_raw(
            Resource::Services,
            "ns",
            "a",
            r#"{"metadata":{"namespace":"ns","name":"a","resourceVersion":"{rv}"},"spec":"?"}"#,
        );
        source.until("the problem", |s| s.problems().iter().any(|p| p.name == "ns/a")).await;
        server.expire_history();
        source
            .until("the problem again", |s| s.problems().iter().filter(|p| p.name == "ns/a").count() > 1)
            .await;
        server.wait_for_watchers(Resource::Services, 1).await;
        assert!(source.has("a"));
        server.put(service("a", "10.96.0.1"));
        source
            .until("a", |s| matches!(s.events().last(), Some(Event::Service(x)) if x.name == named("a")))
            .await;
    }
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = server().await;
    server.set_streaming_lists(false);
    server.put_all((0..25).map(|i| service(&format!("s{i}"), &format!("10.96.0.{i}"))));
    let mut source = Source::kube(KubeOptions { page_size: 10, ..options(&server) });
    source.synced().await;
    assert_eq!(source.store.services().count(), 25);
    assert_eq!(server.counts(Resource::Services).lists, 3);
}

#[tokio::test]
async fn old_servers_are_asked_in_their_own_way() {
    let server = full_server().await;
    server.set_streaming_lists(false);
    server.set_service_fields(false);
    server.set_absent(Resource::ServiceCidrs, true);
    server.put(service("headless", "None"));
    let mut source =
        Source::kube(KubeOptions { absent_retry: Duration::from_millis(50), ..options(&server) });
    source.synced().await;
    assert!(source.has("a") && !source.has("headless"));
    assert!(source.store.service_cidrs().is_empty());
    assert_eq!(source.problems(), Vec::<&shunt_watch::Problem>::new());
    // The server learns the kind later.
    server.set_absent(Resource::ServiceCidrs, false);
    source.until("the range", |s| s.store.service_cidrs().len() == 1).await;
}

#[tokio::test]
async fn failing_servers_are_left_alone() {
    let server = full_server().await;
    server.set_fault(&Fault::Status { code: 500, retry_after: None });
    let mut source = Source::kube(options(&server));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let counts = server.counts(Resource::Services);
    let requests = counts.lists + counts.watches;
    // 10, 20, 40, 80, 160, 200, 200, ... ms, each halved at the luckiest.
    assert!((4..=18).contains(&requests), "{requests}");
    server.clear_faults();
    source.synced().await;
    assert!(source.lost() > 4);

    server.wait_for_watchers(Resource::Services, 1).await;
    server.set_fault(&Fault::Status { code: 429, retry_after: Some(1) });
    let before = server.counts(Resource::Services);
    server.drop_connections();
    tokio::time::sleep(Duration::from_millis(600)).await;
    let after = server.counts(Resource::Services);
    // The longest wait of the options (200 ms) limits what the server asks for.
    assert!((1..=6).contains(&(after.watches - before.watches)), "{before:?} {after:?}");
    server.clear_faults();
    server.put(service("late", "10.96.0.9"));
    source.until("late", |s| s.has("late")).await;
}

#[tokio::test]
async fn faults_before_the_first_list_delay_it_only() {
    for fault in [
        Fault::Hang,
        Fault::Truncate,
        Fault::Garbage,
        Fault::Drip { bytes: 200, every: Duration::from_millis(2) },
        Fault::Status { code: 401, retry_after: None },
        Fault::Status { code: 404, retry_after: None },
        Fault::Status { code: 410, retry_after: None },
        Fault::Status { code: 400, retry_after: None },
    ] {
        for streaming in [true, false] {
            let server = full_server().await;
            server.set_fault(&fault);
            let mut source = Source::kube(KubeOptions { streaming_lists: streaming, ..options(&server) });
            tokio::time::sleep(Duration::from_millis(300)).await;
            if !matches!(fault, Fault::Drip { .. }) {
                while source.receive(Duration::from_millis(1)).await.is_some() {}
                assert!(!source.log.contains(&Update::Synced), "{fault:?}");
            }
            server.clear_faults();
            source.synced().await;
            source.until("all", |s| s.has("a") && s.has("b") && s.endpoints("a").len() == 2).await;
        }
    }
}

#[tokio::test]
async fn a_page_cut_short_takes_nothing_away() {
    let server = full_server().await;
    server.set_streaming_lists(false);
    let mut source = Source::kube(options(&server));
    source.synced().await;
    for fault in [Fault::Truncate, Fault::Garbage] {
        server.wait_for_watchers(Resource::Services, 1).await;
        for resource in Resource::ALL {
            server.set_fault_on(resource, Verb::List, fault.clone());
        }
        server.expire_history();
        let lost = source.lost();
        source.until("failures", |s| s.lost() > lost + 12).await;
        assert!(source.has("a") && source.has("b") && source.endpoints("a").len() == 2);
        server.clear_faults();
    }
}

#[tokio::test]
async fn stale_lists_do_not_turn_back_time() {
    for streaming in [true, false] {
        let server = full_server().await;
        server.set_streaming_lists(streaming);
        let mut source =
            Source::kube(KubeOptions { backoff_min: Duration::from_millis(100), ..options(&server) });
        source.synced().await;
        server.wait_for_watchers(Resource::Services, 1).await;
        server.set_lists(Resource::Services, Lists::Frozen);
        server.put(service("new", "10.96.0.8"));
        source.until("new", |s| s.has("new")).await;
        // The next lists come from a replica that lags.
        server.inject(Resource::Services, Inject::Error(410));
        let lost = source.lost();
        source.until("refusal", |s| s.lost() > lost + 1).await;
        assert!(source.has("new"));
        server.clear_faults();
        server.put(service("newer", "10.96.0.9"));
        source.until("newer", |s| s.has("newer")).await;
        assert!(source.has("new"));
    }
}

#[tokio::test]
async fn an_etcd_restored_from_backup_is_believed_in_the_end() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    server.wait_for_watchers(Resource::Services, 1).await;
    server.set_lists(Resource::Services, Lists::Frozen);
    server.put(service("new", "10.96.0.8"));
    source.until("new", |s| s.has("new")).await;
    server.inject(Resource::Services, Inject::Error(410));
    source.until("the older state", |s| !s.has("new")).await;
    assert!(source.has("a"));
}

#[tokio::test]
async fn duplicate_events_and_bookmarks_are_harmless() {
    let server = full_server().await;
    server.set_duplicate_events(true);
    server.set_bookmark_every(Duration::from_millis(20));
    let mut source = Source::kube(options(&server));
    source.synced().await;
    server.wait_for_watchers(Resource::Services, 1).await;
    server.put(service("c", "10.96.0.3"));
    source.until("c", |s| s.has("c")).await;
    server.delete(Resource::Services, "ns", "c");
    source.until("c to go", |s| !s.has("c")).await;
    source.quiet().await;
    let contacts = source.log.iter().filter(|u| matches!(u, Update::Contact(c) if c.lost.is_none())).count();
    assert!(contacts > 10, "bookmarks are signs of life: {contacts}");
    // Bookmarks carry the watch past what other kinds do: no 410 after a break.
    for i in 0..20 {
        server.put(slice("a-1", "a", &[&format!("10.0.0.{i}")]));
    }
    tokio::time::sleep(Duration::from_millis(60)).await;
    let before = server.counts(Resource::Services).streamed;
    server.drop_connections();
    server.wait_for_watchers(Resource::Services, 1).await;
    assert_eq!(server.counts(Resource::Services).streamed, before);
}

#[tokio::test]
async fn watches_end_and_begin_again_without_fuss() {
    let server = full_server().await;
    let mut source = Source::kube(KubeOptions { watch_timeout: Duration::from_secs(1), ..options(&server) });
    source.synced().await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    server.put(service("c", "10.96.0.3"));
    source.until("c", |s| s.has("c")).await;
    let counts = server.counts(Resource::Services);
    assert!((2..=12).contains(&counts.watches) && counts.streamed == 1, "{counts:?}");
}

#[tokio::test]
async fn everything_can_be_listed_again_now_and_then() {
    let server = full_server().await;
    let every = Some(Duration::from_millis(200));
    let mut source = Source::kube(KubeOptions { relist_every: every, ..options(&server) });
    source.synced().await;
    source.quiet_after_relist_for(Duration::from_millis(700)).await;
    assert!(
        (2..=6).contains(&server.counts(Resource::Services).streamed),
        "{:?}",
        server.counts(Resource::Services)
    );
}

impl Source {
    async fn quiet_after_relist_for(&mut self, time: Duration) {
        let before = self.store.clone();
        let end = tokio::time::Instant::now() + time;
        while tokio::time::Instant::now() < end {
            self.receive(Duration::from_millis(50)).await;
        }
        assert_eq!(self.store, before);
        assert_eq!(self.lost(), 0);
    }
}

#[tokio::test]
async fn kubeconfigs_are_read_and_bad_ones_refused() {
    let server = full_server().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    std::fs::write(&path, server.kubeconfig()).unwrap();
    let mut source =
        Source::kube(KubeOptions { kubeconfig: Some(path.clone()), master: None, ..options(&server) });
    source.synced().await;

    std::fs::write(&path, "a: [").unwrap();
    let (tx, _rx) = tokio::sync::mpsc::channel(1);
    let bad = KubeOptions { kubeconfig: Some(path), ..KubeOptions::new("me") };
    let error = watch_kube(bad, tx.clone()).await.unwrap_err();
    assert!(matches!(error, WatchError::Kubeconfig { .. }), "{error}");
    let error =
        watch_kube(KubeOptions { master: Some("http://[".into()), ..KubeOptions::new("me") }, tx.clone())
            .await;
    assert!(matches!(error, Err(WatchError::Master { .. })));
    let error = watch_kube(KubeOptions::new("me"), tx).await;
    assert!(matches!(error, Err(WatchError::InCluster(_))));
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let server = full_server().await;
    let mut source = Source::kube(options(&server));
    source.synced().await;
    source.rx.close();
    while source.rx.recv().await.is_some() {}
    tokio::time::timeout(Duration::from_secs(2), &mut source.task).await.unwrap().unwrap().unwrap();
}
