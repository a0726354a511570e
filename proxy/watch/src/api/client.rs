//! The HTTP client.

use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::BoxError;

use super::KubeOptions;
use super::observed::{Observer, observed};
use crate::error::WatchError;

/// A dead peer is noticed after `KEEPALIVE_IDLE` + 3 × `KEEPALIVE_INTERVAL`: a watch is silent for
/// minutes in good health, so silence alone says nothing.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) async fn connect(options: &KubeOptions) -> Result<Client, WatchError> {
    let mut config = config(options).await?;
    // Waits are ours to decide; two layers of retries multiply.
    config.default_retry = false;
    if config.proxy_url.is_some() {
        // The way through a proxy is kube's own; it has no TCP keepalive, only our timeouts, and
        // nobody observes it.
        return Client::try_from(config).map_err(|e| WatchError::Client(Box::new(e)));
    }
    own_stack(&config, options.observer.clone()).map_err(|e| WatchError::Client(Box::new(e)))
}

/// kube's stack with a connector that notices dead peers.
fn own_stack(config: &Config, observer: Option<Observer>) -> Result<Client, kube::Error> {
    use tower::Layer;

    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    connector.set_keepalive(Some(KEEPALIVE_IDLE));
    connector.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    connector.set_keepalive_retries(Some(3));
    #[cfg(target_os = "linux")]
    connector.set_tcp_user_timeout(Some(KEEPALIVE_IDLE + 3 * KEEPALIVE_INTERVAL));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let http: hyper_util::client::legacy::Client<_, Body> =
        hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector);

    let stack = config.extra_headers_layer()?.layer(observed(http, observer));
    let stack = tower::util::MapErrLayer::new(BoxError::from).layer(stack);
    let namespace = config.default_namespace.clone();
    Ok(match config.auth_layer()? {
        Some(auth) => Client::new(config.base_uri_layer().layer(auth.layer(stack)), namespace),
        None => Client::new(config.base_uri_layer().layer(stack), namespace),
    })
}

async fn config(options: &KubeOptions) -> Result<Config, WatchError> {
    let mut config = match (&options.kubeconfig, &options.master) {
        (Some(path), _) => {
            let failed = |source| WatchError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        }
        (None, Some(master)) => Config::new(master_url(master)?),
        (None, None) => Config::incluster().map_err(|e| WatchError::InCluster(Box::new(e)))?,
    };
    if let Some(master) = &options.master {
        config.cluster_url = master_url(master)?;
    }
    Ok(config)
}

/// `--master` may lack a scheme; client-go takes that for http.
fn master_url(master: &str) -> Result<http::Uri, WatchError> {
    let with_scheme = if master.contains("://") { master.to_owned() } else { format!("http://{master}") };
    with_scheme.parse().map_err(|source| WatchError::Master { url: master.to_owned(), source })
}
