//! Requests and answers.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use super::store::{Change, Selector, Stored};
use super::{Counts, Fault, Inject, Lists, Resource, Shared, Verb, status};

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Accepts connections until dropped. While connections are to be refused there is no listener.
pub(super) async fn accept(shared: Arc<Shared>, listener: TcpListener) {
    let address = listener.local_addr();
    let mut listener = Some(listener);
    let mut changed = shared.changed.subscribe();
    loop {
        if shared.state().refuse {
            listener = None;
            if changed.changed().await.is_err() {
                return;
            }
            continue;
        }
        let Some(open) = &listener else {
            if let Ok(address) = address {
                listener = TcpListener::bind(address).await.ok();
            }
            sleep(Duration::from_millis(1)).await;
            continue;
        };
        tokio::select! {
            _ = changed.changed() => {}
            connection = open.accept() => {
                let Ok((stream, _)) = connection else { continue };
                let shared = shared.clone();
                match shared.tls.clone() {
                    None => drop(tokio::spawn(serve(shared, stream))),
                    Some(tls) => drop(tokio::spawn(async move {
                        // A client that does not trust us has said so itself.
                        if let Ok(stream) = tls.accept(stream).await {
                            serve(shared, stream).await;
                        }
                    })),
                }
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, stream: impl AsyncRead + AsyncWrite + Unpin + Send) {
    let mut cut = shared.cut.subscribe();
    let service = service_fn(|request| answer(shared.clone(), request));
    let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // The connection ends on both sides when its future is dropped.
    tokio::select! {
        _ = serving => {}
        _ = cut.changed() => {}
    }
}

fn full(code: u16, body: impl Into<Bytes>) -> Response<Body> {
    let body: Full<Bytes> = Full::new(body.into());
    let mut response = Response::new(body.map_err(|never: Infallible| match never {}).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn stream(receiver: mpsc::Receiver<io::Result<Bytes>>) -> Response<Body> {
    let pieces = futures::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|piece| (piece.map(Frame::data), receiver))
    });
    let mut response = full(200, Bytes::new());
    *response.body_mut() = StreamBody::new(pieces.boxed()).boxed_unsync();
    response
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let query = parse_query(request.uri().query().unwrap_or_default());
    if let Some(token) = &shared.token {
        let given = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        if given.and_then(|v| v.strip_prefix("Bearer ")) != Some(token) {
            return Ok(full(401, status(401, "Unauthorized")));
        }
    }
    shared.state().queries.push(request.uri().to_string());
    if request.method() == Method::POST && path.starts_with("/apis/events.k8s.io/v1/") {
        let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
        let event = body.ok().and_then(|b| serde_json::from_slice::<serde_json::Value>(&b).ok());
        let Some(event) = event else { return Ok(full(400, status(400, "no JSON"))) };
        let text = event.to_string();
        shared.change(|state| state.events.push(event));
        return Ok(full(201, text));
    }
    if request.method() != Method::GET {
        return Ok(full(405, status(405, "only GET, and POST of events")));
    }
    if let Some(found) = discovery(&path) {
        return Ok(full(200, found.to_string()));
    }
    let Some((resource, key)) = route(&path) else {
        return Ok(full(404, status(404, "the server could not find the requested resource")));
    };
    if let Some(key) = key {
        let found = shared.state().store.get(resource, &key);
        return Ok(found.map_or_else(|| full(404, status(404, "not found")), |o| full(200, o.json.clone())));
    }
    Ok(collection(&shared, resource, &query).await)
}

async fn collection(
    shared: &Arc<Shared>,
    resource: Resource,
    query: &HashMap<String, String>,
) -> Response<Body> {
    let get = |key: &str| query.get(key).map_or("", String::as_str);
    let verb = if matches!(get("watch"), "true" | "1") { Verb::Watch } else { Verb::List };
    let streamed = get("sendInitialEvents") == "true";
    let (fault, absent, streaming_lists, service_fields) = shared.change(|state| {
        let counts: &mut Counts = state.counts.entry(resource).or_default();
        match verb {
            Verb::List => counts.lists += 1,
            Verb::Watch => counts.watches += 1,
        }
        counts.streamed += usize::from(streamed);
        let fault = state.faults.get(&(resource, verb)).cloned();
        (fault, state.absent.contains(&resource), state.streaming_lists, state.service_fields)
    });
    match &fault {
        Some(Fault::Status { code, retry_after }) => {
            let mut response = full(*code, status(*code, "fault on demand"));
            if let Some(seconds) = retry_after {
                response.headers_mut().insert(header::RETRY_AFTER, (*seconds).into());
            }
            return response;
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Garbage) => return full(200, "<html>sign in, please</html>\n"),
        _ => {}
    }
    if absent {
        return full(404, status(404, "the server could not find the requested resource"));
    }
    let fields = get("fieldSelector");
    if resource == Resource::Services && !service_fields && !fields.is_empty() {
        return full(400, status(400, "field label not supported: spec.clusterIP"));
    }
    let selector = match Selector::parse(resource, get("labelSelector"), fields) {
        Ok(selector) => selector,
        Err(message) => return full(400, status(400, &message)),
    };
    match verb {
        Verb::List => list(shared, resource, &selector, get("limit"), get("continue"), fault),
        Verb::Watch => {
            if streamed && !streaming_lists {
                let message = "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled";
                return full(422, status(422, message));
            }
            if streamed && get("resourceVersionMatch") != "NotOlderThan" {
                return full(
                    422,
                    status(422, "sendInitialEvents requires resourceVersionMatch NotOlderThan"),
                );
            }
            let version = get("resourceVersion").parse::<u64>().unwrap_or(0);
            let timeout = get("timeoutSeconds").parse().unwrap_or(1800);
            let watch = Watch {
                shared: shared.clone(),
                resource,
                selector,
                bookmarks: get("allowWatchBookmarks") == "true",
                end: Instant::now() + Duration::from_secs(timeout),
                version,
                fault,
            };
            watch.start(streamed)
        }
    }
}

fn list(
    shared: &Shared,
    resource: Resource,
    selector: &Selector,
    limit: &str,
    next: &str,
    fault: Option<Fault>,
) -> Response<Body> {
    let state = shared.state();
    let (version, all): (u64, Vec<Arc<Stored>>) = match state.lists.get(&resource) {
        Some((Lists::Empty, _)) => (state.store.version(), Vec::new()),
        Some((Lists::Frozen, Some(frozen))) => frozen.clone(),
        _ => (state.store.version(), state.store.all(resource).collect()),
    };
    // The continuation is the version of the first page and the last key seen.
    let mut from = None;
    let mut at = version;
    if !next.is_empty() {
        let mut parts = next.splitn(3, '|');
        at = parts.next().and_then(|v| v.parse().ok()).unwrap_or(0);
        from =
            Some((parts.next().unwrap_or_default().to_owned(), parts.next().unwrap_or_default().to_owned()));
        if at < state.store.oldest() {
            return full(410, status(410, "The provided continue parameter is too old"));
        }
    }
    drop(state);
    let limit = limit.parse::<usize>().ok().filter(|l| *l > 0).unwrap_or(usize::MAX);
    let mut selected = all.iter().filter(|o| from.as_ref().is_none_or(|f| o.key > *f) && selector.selects(o));
    let page: Vec<_> = selected.by_ref().take(limit).collect();
    let more = selected.count();
    let next = match page.last() {
        Some(last) if more > 0 => format!("{at}|{}|{}", last.key.0, last.key.1),
        _ => String::new(),
    };
    let mut body = BytesMut::new();
    let meta = json!({"resourceVersion": at.to_string(), "continue": next, "remainingItemCount": more});
    body.put_slice(
        format!(
            "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{meta},\"items\":[",
            resource.kind(),
            resource.group_version()
        )
        .as_bytes(),
    );
    for (i, object) in page.iter().enumerate() {
        if i > 0 {
            body.put_u8(b',');
        }
        body.put_slice(&object.json);
    }
    body.put_slice(b"]}\n");
    let body = body.freeze();
    match fault {
        Some(fault @ (Fault::Drip { .. } | Fault::Truncate)) => {
            let (tx, rx) = mpsc::channel(1);
            tokio::spawn(async move {
                let mut out = Out { tx, fault: Some(fault) };
                out.send(body).await;
            });
            stream(rx)
        }
        _ => full(200, body),
    }
}

/// The way out, which may be faulty.
struct Out {
    tx: mpsc::Sender<io::Result<Bytes>>,
    fault: Option<Fault>,
}

impl Out {
    /// Answers whether the client is still there.
    async fn send(&mut self, mut bytes: Bytes) -> bool {
        match self.fault {
            Some(Fault::Drip { bytes: size, every }) => {
                while !bytes.is_empty() {
                    let piece = bytes.split_to(size.clamp(1, bytes.len()));
                    if self.tx.send(Ok(piece)).await.is_err() {
                        return false;
                    }
                    sleep(every).await;
                }
                true
            }
            Some(Fault::Truncate) => {
                let half = bytes.split_to(bytes.len() / 2);
                let _ = self.tx.send(Ok(half)).await;
                self.cut().await;
                false
            }
            _ => self.tx.send(Ok(bytes)).await.is_ok(),
        }
    }

    /// Breaks the connection within the body.
    async fn cut(&self) {
        // Lets hyper write what came before.
        sleep(Duration::from_millis(10)).await;
        let _ = self.tx.send(Err(io::Error::other("cut on demand"))).await;
    }
}

struct Watch {
    shared: Arc<Shared>,
    resource: Resource,
    selector: Selector,
    bookmarks: bool,
    end: Instant,
    version: u64,
    fault: Option<Fault>,
}

/// Counts a running watch for as long as it lives.
struct Running(Arc<Shared>, Resource);

impl Running {
    fn new(shared: &Arc<Shared>, resource: Resource) -> Self {
        shared.change(|state| *state.watchers.entry(resource).or_default() += 1);
        Self(shared.clone(), resource)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.change(|state| *state.watchers.entry(self.1).or_default() -= 1);
    }
}

impl Watch {
    fn start(mut self, streamed: bool) -> Response<Body> {
        let first = {
            let state = self.shared.state();
            let first: Vec<_> = if streamed || self.version == 0 {
                let (version, all) = match state.lists.get(&self.resource) {
                    Some((Lists::Empty, _)) => (state.store.version(), Vec::new()),
                    Some((Lists::Frozen, Some(frozen))) => frozen.clone(),
                    _ => (state.store.version(), state.store.all(self.resource).collect()),
                };
                self.version = version;
                all.into_iter().filter(|o| self.selector.selects(o)).collect()
            } else {
                Vec::new()
            };
            if self.version < state.store.oldest() {
                return full(410, status(410, &format!("too old resource version: {}", self.version)));
            }
            first
        };
        let (tx, rx) = mpsc::channel(64);
        tokio::spawn(self.run(first, streamed, tx));
        stream(rx)
    }

    async fn run(mut self, first: Vec<Arc<Stored>>, streamed: bool, tx: mpsc::Sender<io::Result<Bytes>>) {
        let mut out = Out { tx, fault: self.fault.take() };
        let mut changed = self.shared.changed.subscribe();
        for object in first {
            if !out.send(event("ADDED", &object.json)).await {
                return;
            }
        }
        if streamed && !out.send(self.bookmark(true)).await {
            return;
        }
        // Injections from now on, and those only.
        let mut injected = self.shared.state().injections.len();
        let _running = Running::new(&self.shared, self.resource);
        let mut next_bookmark = Instant::now() + self.shared.state().bookmark_every;
        loop {
            let (changes, injections, duplicate, expired, every) = {
                let state = self.shared.state();
                let changes: Vec<Arc<Change>> = state.store.since(self.version).to_vec();
                let injections: Vec<Inject> = state.injections[injected..]
                    .iter()
                    .filter(|(resource, _)| *resource == self.resource)
                    .map(|(_, inject)| inject.clone())
                    .collect();
                injected = state.injections.len();
                let expired = changes.is_empty() && self.version < state.store.oldest();
                (changes, injections, state.duplicate_events, expired, state.bookmark_every)
            };
            if expired {
                let error = status(410, &format!("too old resource version: {}", self.version));
                out.send(event("ERROR", &error)).await;
                return;
            }
            for change in changes {
                self.version = change.version;
                for _ in 0..=u8::from(duplicate) {
                    if let Some(line) = self.line(&change)
                        && !out.send(line).await
                    {
                        return;
                    }
                }
            }
            for inject in injections {
                match inject {
                    Inject::Line(line) => {
                        if !out.send(format!("{line}\n").into()).await {
                            return;
                        }
                    }
                    Inject::HalfLine => {
                        out.send(Bytes::from_static(b"{\"type\":\"ADDED\",\"object\":{\"kin")).await;
                        out.cut().await;
                        return;
                    }
                    Inject::Error(code) => {
                        out.send(event("ERROR", &status(code, "error on demand"))).await;
                        return;
                    }
                    Inject::End => return,
                }
            }
            if self.bookmarks && Instant::now() >= next_bookmark {
                self.version = self.version.max(self.shared.state().store.version());
                if !out.send(self.bookmark(false)).await {
                    return;
                }
                next_bookmark = Instant::now() + every;
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = sleep_until(next_bookmark.min(self.end)) => {}
                () = out.tx.closed() => return,
            }
            if Instant::now() >= self.end {
                return;
            }
        }
    }

    /// What a change means to who watches with a selector.
    fn line(&self, change: &Change) -> Option<Bytes> {
        if change.resource != self.resource {
            return None;
        }
        let before = change.old.as_ref().is_some_and(|old| self.selector.selects(old));
        let after = !change.deleted && self.selector.selects(&change.new);
        let type_ = match (before, after) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return None,
        };
        Some(event(type_, &change.new.json))
    }

    fn bookmark(&self, initial: bool) -> Bytes {
        let mut object = json!({"kind": self.resource.kind(), "apiVersion": self.resource.group_version(),
            "metadata": {"resourceVersion": self.version.to_string(), "creationTimestamp": null}});
        if initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        event("BOOKMARK", object.to_string().as_bytes())
    }
}

fn event(type_: &str, object: &[u8]) -> Bytes {
    let mut line = BytesMut::with_capacity(object.len() + 40);
    line.put_slice(b"{\"type\":\"");
    line.put_slice(type_.as_bytes());
    line.put_slice(b"\",\"object\":");
    line.put_slice(object);
    line.put_slice(b"}\n");
    line.freeze()
}

/// A collection, or one object of it.
fn route(path: &str) -> Option<(Resource, Option<(String, String)>)> {
    Resource::ALL.into_iter().find_map(|resource| {
        let root = match resource.group_version() {
            "v1" => "/api/v1/".to_owned(),
            group_version => format!("/apis/{group_version}/"),
        };
        let rest: Vec<&str> = path.strip_prefix(&root)?.split('/').collect();
        match rest[..] {
            [plural] if plural == resource.plural() => Some((resource, None)),
            [plural, name] if plural == resource.plural() && !resource.namespaced() => {
                Some((resource, Some((String::new(), name.to_owned()))))
            }
            ["namespaces", namespace, plural, name] if plural == resource.plural() => {
                Some((resource, Some((namespace.to_owned(), name.to_owned()))))
            }
            _ => None,
        }
    })
}

fn discovery(path: &str) -> Option<serde_json::Value> {
    let group = |name: &str| {
        let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
        json!({"name": name, "versions": [version], "preferredVersion": version})
    };
    let resources = |group_version: &str| {
        let list: Vec<_> = Resource::ALL
            .into_iter()
            .filter(|r| r.group_version() == group_version)
            .map(|r| json!({"name": r.plural(), "kind": r.kind(), "namespaced": r.namespaced(), "verbs": ["get", "list", "watch"]}))
            .collect();
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list})
    };
    Some(match path {
        "/version" => json!({"major": "1", "minor": "36", "gitVersion": "v1.36.2"}),
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"]}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1",
            "groups": [group("discovery.k8s.io"), group("networking.k8s.io"), group("events.k8s.io")]}),
        "/api/v1" => resources("v1"),
        "/apis/discovery.k8s.io/v1" => resources("discovery.k8s.io/v1"),
        "/apis/networking.k8s.io/v1" => resources("networking.k8s.io/v1"),
        "/healthz" | "/readyz" | "/livez" => json!("ok"),
        _ => return None,
    })
}

fn parse_query(query: &str) -> HashMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (unescape(key), unescape(value))).collect()
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
                if let (Some(high), Some(low)) = (digit(rest.next()), digit(rest.next())) {
                    bytes.push((high * 16 + low) as u8);
                }
            }
            b'+' => bytes.push(b' '),
            other => bytes.push(other),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
