//! Objects from a Kubernetes API server.
//!
//! `kube` gives the way to the server: kubeconfig, service account, TLS, authentication and its
//! renewal. Lists and watches are read here and not by `kube::runtime`, because that fails a whole
//! list for one object that does not decode, keeps decoded pages, and does not say which objects
//! vanished during a break.

mod backoff;
mod client;
mod lines;
mod observed;
mod reflector;
mod resource;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::mpsc;

use crate::convert::Converter;
use crate::error::WatchError;
use crate::kind::Kind;
pub(crate) use client::connect;

pub use observed::{Answered, Observer};

use crate::{Update, api::reflector::Reflector};

/// How to reach an API server and how to treat it.
#[derive(Clone, Debug)]
pub struct KubeOptions {
    /// Path of a kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server; overrides the kubeconfig's. With neither, the pod's service account
    /// is used.
    pub master: Option<String>,
    /// Name of this node.
    pub node_name: String,
    /// Ask for streaming lists (`sendInitialEvents`); falls back to pages by itself.
    pub streaming_lists: bool,
    /// Objects in a page of a list.
    pub page_size: u32,
    /// How long a watch lasts before it is opened again; varied by a fifth either way, so that
    /// the nodes of a cluster do not come back at the same time.
    pub watch_timeout: Duration,
    /// How long the server may take to begin an answer, or to go on with a list.
    pub response_timeout: Duration,
    /// Shortest wait after a failure; doubles with each.
    pub backoff_min: Duration,
    /// Longest wait after a failure.
    pub backoff_max: Duration,
    /// When to ask again for a kind of object that the server does not have.
    pub absent_retry: Duration,
    /// List everything again after this time even if the watch is well. `None`: never.
    pub relist_every: Option<Duration>,
    /// Who is told of every request.
    pub observer: Option<Observer>,
}

impl KubeOptions {
    /// Usual options for a node.
    pub fn new(node_name: impl Into<String>) -> Self {
        Self {
            kubeconfig: None,
            master: None,
            node_name: node_name.into(),
            streaming_lists: true,
            page_size: 500,
            watch_timeout: Duration::from_mins(5),
            response_timeout: Duration::from_secs(30),
            backoff_min: Duration::from_millis(250),
            backoff_max: Duration::from_secs(30),
            absent_retry: Duration::from_mins(10),
            relist_every: None,
            observer: None,
        }
    }
}

/// Watches Services, `EndpointSlice`s, the own Node and `ServiceCIDR`s until dropped.
///
/// Returns `Ok` when the receiver is closed, and an error only when the client cannot be made;
/// everything else is tried again for ever. All work is done in this future: it spawns no task of
/// its own besides those of the HTTP connections.
pub async fn watch_kube(options: KubeOptions, tx: mpsc::Sender<Update>) -> Result<(), WatchError> {
    let client = connect(&options).await?;
    let shared = reflector::Shared {
        client,
        converter: Mutex::new(Converter::new(&options.node_name)),
        waiting: std::sync::atomic::AtomicUsize::new(Kind::ALL.len()),
        options,
        tx,
    };
    let shared = Arc::new(shared);
    let reflectors = join_all(Kind::ALL.map(|kind| Reflector::new(kind, shared.clone()).run()));
    tokio::select! {
        _ = reflectors => {}
        () = shared.tx.closed() => {}
    }
    Ok(())
}
