//! Why a source of objects cannot run at all.

use std::path::PathBuf;

/// Why a source cannot start. Once started, it goes on for ever: what goes wrong later is sent
/// as `Update::Contact` or `Update::Problem` and tried again. All of these are fatal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {path}: {source}")]
    Kubeconfig {
        /// Path of the file.
        path: PathBuf,
        /// Why.
        source: Box<kube::config::KubeconfigError>,
    },
    /// There is neither a kubeconfig, nor a master URL, nor a pod's service account.
    #[error("neither a kubeconfig nor a master URL is given, and this is not a pod: {0}")]
    InCluster(#[source] Box<kube::config::InClusterError>),
    /// The master URL is none.
    #[error("master URL {url:?}: {source}")]
    Master {
        /// The URL.
        url: String,
        /// Why.
        source: http::uri::InvalidUri,
    },
    /// The client cannot be made (certificates, keys, authentication).
    #[error("client of the API server: {0}")]
    Client(#[from] Box<kube::Error>),
    /// The manifests cannot be read.
    #[error("manifests {path}: {source}")]
    Manifests {
        /// Path of the file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}
