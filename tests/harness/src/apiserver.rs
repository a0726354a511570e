//! A Kubernetes API server in the test process: real HTTP, objects in memory, faults on demand.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use serde_json::json;
//! use shunt_harness::apiserver::{ApiServer, Fault, Resource};
//!
//! let server = ApiServer::start().await?;
//! server.put(json!({
//!     "apiVersion": "v1", "kind": "Service",
//!     "metadata": {"namespace": "default", "name": "web"},
//!     "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]},
//! }));
//! server.wait_for_watchers(Resource::Services, 1).await;
//! server.expire_history();
//! server.set_fault(&Fault::Status { code: 429, retry_after: Some(1) });
//! # Ok(()) }
//! ```
//!
//! It knows as much of the API's rules as a client can notice: selectors (also applied to watch
//! events: an object that leaves the selection is `DELETED`, one that enters it `ADDED`), pages,
//! resource versions and their expiry (410), bookmarks, streaming lists. `store.rs` holds the
//! objects, `http.rs` answers requests.

mod http;
mod inside;
// Tests want to be told at once that they put nonsense in.
#[allow(clippy::panic)]
mod store;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use inside::ApiServerInside;
use store::Store;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

/// Collections of objects that the server has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Resource {
    /// `/api/v1/services`
    Services,
    /// `/apis/discovery.k8s.io/v1/endpointslices`
    EndpointSlices,
    /// `/api/v1/nodes`
    Nodes,
    /// `/apis/networking.k8s.io/v1/servicecidrs`
    ServiceCidrs,
}

impl Resource {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Services, Self::EndpointSlices, Self::Nodes, Self::ServiceCidrs];

    const fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::ServiceCidrs => "ServiceCIDR",
        }
    }

    const fn plural(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::ServiceCidrs => "servicecidrs",
        }
    }

    const fn group_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::ServiceCidrs => "networking.k8s.io/v1",
        }
    }

    const fn namespaced(self) -> bool {
        matches!(self, Self::Services | Self::EndpointSlices)
    }
}

/// What a request is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verb {
    /// Pages of a list.
    List,
    /// A watch, also one that begins with a streamed list.
    Watch,
}

/// How the server misbehaves, from now on and until told otherwise.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Answers so, with a `Status` body.
    Status {
        /// HTTP status.
        code: u16,
        /// `Retry-After` header, in seconds.
        retry_after: Option<u32>,
    },
    /// Takes the request and never answers.
    Hang,
    /// Sends its answers a few bytes at a time.
    Drip {
        /// Bytes in a piece.
        bytes: usize,
        /// Pause between pieces.
        every: Duration,
    },
    /// Sends the first half of each answer and closes the connection.
    Truncate,
    /// Answers 200 with something that is no JSON.
    Garbage,
}

/// How lists are answered.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Lists {
    /// Truthfully.
    #[default]
    True,
    /// As if there were no objects, at the current version.
    Empty,
    /// As things were at the moment of this setting, version included.
    Frozen,
}

/// What is written into the running watches of a resource, once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Inject {
    /// Any line, as it is.
    Line(String),
    /// The first half of the next event's JSON, then the connection is closed.
    HalfLine,
    /// An `ERROR` event with this code; then the watch ends.
    Error(u16),
    /// The watch ends in good order.
    End,
}

/// Requests that were seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Pages of lists.
    pub lists: usize,
    /// Watches, streamed lists included.
    pub watches: usize,
    /// Watches that asked for a streamed list.
    pub streamed: usize,
}

/// Objects as they were, and at which version.
pub(crate) type Snapshot = (u64, Vec<Arc<store::Stored>>);

// Independent switches of a test double.
#[allow(clippy::struct_excessive_bools)]
pub(crate) struct State {
    pub(crate) store: Store,
    pub(crate) faults: HashMap<(Resource, Verb), Fault>,
    pub(crate) lists: HashMap<Resource, (Lists, Option<Snapshot>)>,
    pub(crate) counts: HashMap<Resource, Counts>,
    pub(crate) watchers: HashMap<Resource, usize>,
    pub(crate) injections: Vec<(Resource, Inject)>,
    pub(crate) absent: Vec<Resource>,
    pub(crate) streaming_lists: bool,
    pub(crate) service_fields: bool,
    pub(crate) duplicate_events: bool,
    pub(crate) bookmark_every: Duration,
    pub(crate) events: Vec<Value>,
    pub(crate) queries: Vec<String>,
    refuse: bool,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    /// Counts changes of anything that a watch or a waiting test may want to know.
    changed: watch::Sender<u64>,
    /// Counts the times that all connections were cut.
    cut: watch::Sender<u64>,
    /// Speaks TLS.
    tls: Option<tokio_rustls::TlsAcceptor>,
    /// What clients must say to be let in.
    token: Option<String>,
}

impl Shared {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = change(&mut self.state());
        self.changed.send_modify(|n| *n += 1);
        result
    }
}

/// The server. Dropping it cuts all connections and frees the port.
pub struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: JoinHandle<()>,
    /// The certificate that clients trust, in PEM.
    certificate: Option<String>,
}

impl ApiServer {
    /// Starts a server without objects on a free port of 127.0.0.1.
    pub async fn start() -> io::Result<Self> {
        Self::start_with(None, None, None).await
    }

    /// The same with TLS, and for clients that know the token.
    pub async fn start_tls(token: &str) -> io::Result<Self> {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).map_err(io::Error::other)?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(io::Error::other)?;
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .map_err(io::Error::other)?;
        let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Self::start_with(Some(tls), Some(token.to_owned()), Some(made.cert.pem())).await
    }

    async fn start_with(
        tls: Option<tokio_rustls::TlsAcceptor>,
        token: Option<String>,
        certificate: Option<String>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                store: Store::default(),
                faults: HashMap::new(),
                lists: HashMap::new(),
                counts: HashMap::new(),
                watchers: HashMap::new(),
                injections: Vec::new(),
                absent: Vec::new(),
                streaming_lists: true,
                service_fields: true,
                duplicate_events: false,
                bookmark_every: Duration::from_mins(1),
                events: Vec::new(),
                queries: Vec::new(),
                refuse: false,
            }),
            changed: watch::channel(0).0,
            cut: watch::channel(0).0,
            tls,
            token,
        });
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let accepting = tokio::spawn(http::accept(shared.clone(), listener));
        Ok(Self { shared, address, accepting, certificate })
    }

    /// `http://127.0.0.1:port`, or `https`.
    pub fn url(&self) -> String {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The certificate that clients must trust, in PEM; with TLS only.
    pub fn certificate(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// Text of a kubeconfig for this server.
    pub fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: fake\n\
             clusters:\n- name: fake\n  cluster: {{server: \"{}\"}}\n\
             users:\n- name: fake\n  user: {{token: fake}}\n\
             contexts:\n- name: fake\n  context: {{cluster: fake, user: fake}}\n",
            self.url()
        )
    }

    /// Adds or replaces an object; its kind says where.
    ///
    /// # Panics
    /// Without a known `kind` or without a name.
    pub fn put(&self, object: Value) {
        self.put_all([object]);
    }

    /// Adds or replaces many objects at once.
    ///
    /// # Panics
    /// As [`ApiServer::put`].
    pub fn put_all(&self, objects: impl IntoIterator<Item = Value>) {
        self.shared.change(|state| {
            for object in objects {
                state.store.put(object);
            }
        });
    }

    /// Adds or replaces an object with any text at all for its JSON. `{rv}` in it stands for the
    /// resource version.
    pub fn put_raw(&self, resource: Resource, namespace: &str, name: &str, json: &str) {
        self.shared.change(|state| state.store.put_raw(resource, namespace, name, json));
    }

    /// Deletes an object; answers whether there was one.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) -> bool {
        self.shared.change(|state| state.store.delete(resource, namespace, name))
    }

    /// Forgets all changes so far: whoever watches from a version before now gets 410.
    pub fn expire_history(&self) {
        self.shared.change(|state| state.store.expire());
    }

    /// The current resource version.
    pub fn version(&self) -> u64 {
        self.shared.state().store.version()
    }

    /// Misbehaves on every list and watch.
    pub fn set_fault(&self, fault: &Fault) {
        for resource in Resource::ALL {
            for verb in [Verb::List, Verb::Watch] {
                self.set_fault_on(resource, verb, fault.clone());
            }
        }
    }

    /// Misbehaves on some requests.
    pub fn set_fault_on(&self, resource: Resource, verb: Verb, fault: Fault) {
        self.shared.change(|state| state.faults.insert((resource, verb), fault));
    }

    /// Behaves again, and listens again.
    pub fn clear_faults(&self) {
        self.shared.change(|state| {
            state.faults.clear();
            state.lists.clear();
            state.refuse = false;
        });
    }

    /// Cuts all connections at once.
    pub fn drop_connections(&self) {
        self.shared.cut.send_modify(|n| *n += 1);
    }

    /// Stops listening: new connections are refused, old ones cut, until [`Self::clear_faults`].
    pub fn refuse_connections(&self) {
        self.shared.change(|state| state.refuse = true);
        self.drop_connections();
    }

    /// Lies in lists (not in watches).
    pub fn set_lists(&self, resource: Resource, lists: Lists) {
        self.shared.change(|state| {
            let frozen = (lists == Lists::Frozen)
                .then(|| (state.store.version(), state.store.all(resource).collect()));
            state.lists.insert(resource, (lists, frozen));
        });
    }

    /// Writes something into the running watches of a resource.
    pub fn inject(&self, resource: Resource, inject: Inject) {
        self.shared.change(|state| state.injections.push((resource, inject)));
    }

    /// With false, streamed lists are refused as servers before 1.32 do.
    pub fn set_streaming_lists(&self, on: bool) {
        self.shared.change(|state| state.streaming_lists = on);
    }

    /// With false, field selectors on Services are refused, as old servers do.
    pub fn set_service_fields(&self, on: bool) {
        self.shared.change(|state| state.service_fields = on);
    }

    /// The server does not have this resource (404).
    pub fn set_absent(&self, resource: Resource, absent: bool) {
        self.shared.change(|state| {
            state.absent.retain(|r| *r != resource);
            if absent {
                state.absent.push(resource);
            }
        });
    }

    /// Sends every watch event twice.
    pub fn set_duplicate_events(&self, on: bool) {
        self.shared.change(|state| state.duplicate_events = on);
    }

    /// How often watches get a bookmark.
    pub fn set_bookmark_every(&self, every: Duration) {
        self.shared.change(|state| state.bookmark_every = every);
    }

    /// Requests so far.
    pub fn counts(&self, resource: Resource) -> Counts {
        self.shared.state().counts.get(&resource).copied().unwrap_or_default()
    }

    /// Path and query of every request so far.
    pub fn queries(&self) -> Vec<String> {
        self.shared.state().queries.clone()
    }

    /// Objects that were posted to `events.k8s.io`.
    pub fn events(&self) -> Vec<Value> {
        self.shared.state().events.clone()
    }

    /// Watches that are past their initial list and running.
    pub fn watchers(&self, resource: Resource) -> usize {
        self.shared.state().watchers.get(&resource).copied().unwrap_or_default()
    }

    /// Waits until at least so many watches run.
    pub async fn wait_for_watchers(&self, resource: Resource, count: usize) {
        let mut changed = self.shared.changed.subscribe();
        while self.watchers(resource) < count {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.accepting.abort();
        self.drop_connections();
    }
}

/// Services `ns-N/svc-M` with so many endpoints each, as in the scale tests.
pub fn many_services(services: usize, endpoints: usize) -> impl Iterator<Item = Value> {
    (0..services).flat_map(move |s| {
        let (a, b) = (s / 250, s % 250 + 1);
        let namespace = format!("ns-{}", s % 100);
        let service = serde_json::json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": format!("svc-{s}"), "namespace": namespace,
                "uid": format!("00000000-0000-4000-8000-{s:012}"),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"app": format!("app-{s}")},
                "managedFields": [{"manager": "kubectl", "operation": "Update", "apiVersion": "v1",
                    "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:ports": {}, "f:selector": {}}}}],
            },
            "spec": {
                "clusterIP": format!("10.96.{a}.{b}"), "clusterIPs": [format!("10.96.{a}.{b}")],
                "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "type": "ClusterIP",
                "internalTrafficPolicy": "Cluster", "sessionAffinity": "None",
                "selector": {"app": format!("app-{s}")},
                "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}],
            },
            "status": {"loadBalancer": {}},
        });
        let list: Vec<Value> = (0..endpoints)
            .map(|e| {
                let n = s * endpoints + e;
                serde_json::json!({
                    "addresses": [format!("10.{}.{}.{}", 100 + n / 65_000, n / 255 % 255, n % 255)],
                    "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": format!("node-{}", n % 1000),
                    "zone": format!("zone-{}", n % 3),
                    "targetRef": {"kind": "Pod", "namespace": namespace, "name": format!("app-{s}-{e}"),
                        "uid": format!("00000000-0000-4000-9000-{n:012}")},
                })
            })
            .collect();
        let slice = serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("svc-{s}-abcde"), "namespace": namespace,
                "labels": {"kubernetes.io/service-name": format!("svc-{s}"),
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": list,
        });
        [service, slice]
    })
}

pub(crate) fn status(code: u16, message: &str) -> Bytes {
    let reason = match code {
        400 => "BadRequest",
        403 => "Forbidden",
        404 => "NotFound",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        _ => "InternalError",
    };
    let status = serde_json::json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code});
    Bytes::from(status.to_string())
}
