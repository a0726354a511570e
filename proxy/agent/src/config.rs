//! The configuration files of `shunt run`: read, merged with flags, and watched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use shunt_config::{KubeProxyConfiguration, ShuntConfiguration};
use shunt_watch::FileWatcher;
use tokio::sync::mpsc;

use crate::cli::{ModeArgs, RunArgs};
use crate::families;
use crate::flags;
use crate::settings::Settings;

/// What files and flags say together.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Configuration {
    /// kube-proxy's configuration.
    pub kube_proxy: KubeProxyConfiguration,
    /// Our own.
    pub shunt: ShuntConfiguration,
    /// Flags of single modes.
    pub modes: ModeArgs,
    /// What is said and means nothing.
    pub warnings: Vec<String>,
}

impl Configuration {
    /// Reads the files that flags name, and applies the flags.
    pub(crate) fn load(args: &RunArgs) -> Result<Self> {
        let mut warnings = Vec::new();
        let mut shunt = None;
        let mut kube_proxy = match &args.settings.config {
            Some(path) => {
                let loaded = read(path)?;
                warnings.extend(loaded.warnings);
                shunt = loaded.shunt;
                if flags::ignored_with_config(&args.settings, &args.kube_proxy) {
                    warnings.push(
                        "with --config, all flags but those of logging, --hostname-override and Shunt's own are ignored"
                            .to_owned(),
                    );
                }
                match loaded.kube_proxy {
                    Some(kube_proxy) => kube_proxy,
                    None => {
                        bail!("configuration {}: no document of kind KubeProxyConfiguration", path.display())
                    }
                }
            }
            None => flags::configuration(&args.settings, &args.kube_proxy),
        };
        if let Some(path) = &args.shunt_config {
            let loaded = read(path)?;
            warnings.extend(loaded.warnings);
            match (loaded.shunt, &shunt) {
                (Some(ours), None) => shunt = Some(ours),
                (Some(_), Some(_)) => bail!("{}: --config has a ShuntConfiguration already", path.display()),
                (None, _) => bail!("{}: no document of kind ShuntConfiguration", path.display()),
            }
        }
        let mut shunt = shunt.unwrap_or_default();
        if let Some(name) = &args.hostname_override {
            kube_proxy.hostname_override.clone_from(name);
        }
        flags::apply_log_flags(&mut kube_proxy, &args.log);
        if args.min_sync_period.is_some() {
            shunt.min_sync_period = args.min_sync_period;
        }
        if args.admin_socket.is_some() {
            shunt.admin_socket.clone_from(&args.admin_socket);
        }
        Ok(Self { kube_proxy, shunt, modes: args.settings.modes.clone(), warnings })
    }

    /// The same in the terms of those who act on it; an error if it is not valid.
    pub(crate) fn settings(&self) -> Result<Settings> {
        Settings::of(&self.kube_proxy, &self.shunt, &self.modes)
    }
}

fn read(path: &Path) -> Result<shunt_config::Loaded> {
    let context = || format!("configuration {}", path.display());
    let text = std::fs::read_to_string(path).with_context(context)?;
    shunt_config::decode(&text).with_context(context)
}

/// Quiet time after a change before files are read: a `ConfigMap` is replaced in several steps.
const SETTLE: Duration = Duration::from_millis(100);

/// Reads the configuration anew. An error unless it is the one in use, or valid and of a mode that can run here.
async fn reload(args: &RunArgs, current: &Configuration) -> Result<Configuration> {
    let new = Configuration::load(args)?;
    let settings = new.settings()?;
    // Which one `auto` means is found out at the start.
    if new != *current && !settings.auto {
        tokio::task::spawn_blocking(move || families::open(&settings).map(drop)).await??;
    }
    Ok(new)
}

/// Tells of every configuration that differs from the one in use and is valid. One that is not is
/// complained about, and the one in use stays. Ends only if nobody listens any more.
pub(crate) async fn watch(args: RunArgs, mut current: Configuration, tx: mpsc::Sender<Configuration>) {
    let files: Vec<PathBuf> = args.settings.config.iter().chain(&args.shunt_config).cloned().collect();
    if files.is_empty() {
        return std::future::pending().await;
    }
    let mut watcher = FileWatcher::new(files);
    let mut last_error = String::new();
    loop {
        watcher.changed().await;
        tokio::time::sleep(SETTLE).await;
        match reload(&args, &current).await {
            Ok(new) if new == current => last_error.clear(),
            Ok(new) => {
                last_error.clear();
                current = new.clone();
                if tx.send(new).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let error = format!("{error:#}");
                if error != last_error {
                    tracing::error!("{error}: the configuration in use stays");
                    last_error = error;
                }
            }
        }
    }
}
