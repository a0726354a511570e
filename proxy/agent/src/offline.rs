//! Manifests compiled for one node, without a cluster and without a kernel.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use shunt_core::compile::{Compiler, Context};
use shunt_core::node::NodePortAddresses;
use shunt_core::store::Store;
use shunt_watch::{Manifests, Pods};

use crate::cli::SettingArgs;
use crate::settings::Settings;

/// What manifests say.
pub(crate) struct Offline {
    /// The objects.
    pub store: Store,
    /// The tables made of them.
    pub compiler: Compiler,
    /// From the configuration file, else from one among the manifests, else from flags.
    pub settings: Settings,
    /// Pods that are named among them.
    pub pods: Pods,
}

impl Offline {
    /// Reads and compiles manifests.
    pub(crate) fn read(path: &Path, node: &str, args: &SettingArgs) -> Result<Self> {
        let manifests = shunt_watch::read_manifests(path, Some(node))?;
        for problem in &manifests.problems {
            tracing::warn!("{problem}");
        }
        let document = match &args.config {
            Some(file) => Some(read_config(file)?),
            None => configuration(&manifests).cloned(),
        };
        let settings = Settings::new(args, document.as_ref())?;
        let mut store = Store::default();
        for event in manifests.events {
            store.apply(event);
        }
        let compiler = Compiler::full(Context::new(node, settings.config_for(store.node())), &store);
        if settings.config.node_port_addresses == NodePortAddresses::Primary && store.node().is_none() {
            tracing::warn!(
                "no Node object named {node:?} among the manifests: its addresses are unknown, so node ports answer nowhere"
            );
        }
        Ok(Self { store, compiler, settings, pods: manifests.pods })
    }
}

/// Reads the first `KubeProxyConfiguration` of a file.
pub(crate) fn read_config(file: &Path) -> Result<Value> {
    let manifests = shunt_watch::read_manifests(file, None)
        .with_context(|| format!("configuration {}", file.display()))?;
    match configuration(&manifests) {
        Some(document) => Ok(document.clone()),
        None => match manifests.problems.first() {
            Some(problem) => bail!("configuration {}: {problem}", file.display()),
            None => bail!("configuration {}: no document of kind KubeProxyConfiguration", file.display()),
        },
    }
}

/// The first `KubeProxyConfiguration` among manifests.
fn configuration(manifests: &Manifests) -> Option<&Value> {
    manifests.config.iter().map(|c| &c.value).find(|v| v["kind"] == "KubeProxyConfiguration")
}
