//! Objects from files: a file or a folder of YAML and JSON, read once or followed.

mod folder;
mod live;
mod parse;
mod pods;

use std::path::{Path, PathBuf};

use serde_json::Value;
use shunt_core::store::Event;
use tokio::sync::mpsc;

use crate::Update;
use crate::error::WatchError;
use crate::problem::Problem;
use folder::Folder;
pub use live::FileWatcher;
pub use pods::Pods;

/// A document that configures the proxy rather than describing the cluster
/// (`KubeProxyConfiguration`, `ShuntConfiguration`), as it stands in the file.
#[derive(Clone, PartialEq, Debug)]
pub struct ConfigDocument {
    /// The file.
    pub path: PathBuf,
    /// The document.
    pub value: Value,
}

/// What a file or folder holds.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Manifests {
    /// The objects; by kind, then name.
    pub events: Vec<Event>,
    /// What cannot be used.
    pub problems: Vec<Problem>,
    /// Configuration documents, in the order of their files.
    pub config: Vec<ConfigDocument>,
    /// Pods that are named in them.
    pub pods: Pods,
}

/// Reads a file, or all `*.yaml`, `*.yml` and `*.json` below a folder, once.
///
/// `node_name` tells which Node is ours; without it, the only Node that there is. This reads
/// files and blocks meanwhile: it is meant for commands.
pub fn read_manifests(path: &Path, node_name: Option<&str>) -> Result<Manifests, WatchError> {
    let mut folder = Folder::new(path.to_owned(), node_name).noting_pods();
    let mut manifests = Manifests::default();
    for update in folder.scan(true).map_err(|source| unreadable(path, source))? {
        match update {
            Update::Event(event) => manifests.events.push(event),
            Update::Problem(problem) => manifests.problems.push(problem),
            Update::Synced | Update::Contact(_) => {}
        }
    }
    manifests.config = folder.config();
    manifests.pods = folder.pods();
    Ok(manifests)
}

/// Follows a file or folder until dropped: sends what it holds, `Synced`, and then each change.
///
/// Returns `Ok` when the receiver is closed, and an error only if the path cannot be read at the
/// start.
pub async fn watch_manifests(
    path: PathBuf,
    node_name: String,
    tx: mpsc::Sender<Update>,
) -> Result<(), WatchError> {
    live::follow(path, &node_name, tx).await
}

fn unreadable(path: &Path, source: std::io::Error) -> WatchError {
    WatchError::Manifests { path: path.to_owned(), source }
}
