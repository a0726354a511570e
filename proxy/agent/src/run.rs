//! `shunt run`: starts everything, waits for changes, and hands them to the engine.

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use shunt_core::compile::Context;
use shunt_core::id::IpFamily;
use shunt_mode::Mode;
use shunt_node::health::Health;
use shunt_node::sysctl::{self, Sysctls};
use shunt_watch::{
    EventType, KubeOptions, Notice, Observer, Regarding, Update, send_events, watch_kube, watch_manifests,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use crate::account::Account;
use crate::admin::{self, Asked};
use crate::cli::RunArgs;
use crate::config::{self, Configuration};
use crate::connections;
use crate::engine::Engine;
use crate::families;
use crate::flows::Flows;
use crate::leftovers;
use crate::metrics::Metrics;
use crate::servers;
use crate::settings::Settings;

/// kube-proxy says that of itself (KEP-5495), and who watches for the event does so for the way back.
const IPVS_DEPRECATION: &str = "kube-proxy's ipvs mode is deprecated: off by default in Kubernetes 1.40, removed in 1.43. Shunt keeps the mode; kube-proxy cannot take this node back in it then";
/// Events that may wait to be sent; more are dropped.
const EVENTS_MAX: usize = 64;
/// Updates that may wait between source and loop: enough for a burst, little enough for memory.
const UPDATES_MAX: usize = 1024;

pub(crate) fn run(args: &RunArgs, configuration: Configuration, mut settings: Settings) -> Result<()> {
    if settings.auto {
        let choice = shunt_modes::choose().map_err(|e| anyhow!("no mode can run here: {e}"))?;
        tracing::info!("mode chosen: {}", choice.reason);
        settings.mode = choice.mode;
    }
    let node_name = node_name(&settings)?;
    if args.init_only == Some(true) {
        return prepare(&settings, &node_name);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(run_async(args, configuration, settings, node_name));
    runtime.shutdown_background();
    match result? {
        End::Stopped => Ok(()),
        End::Reconfigured => {
            let _held = leftovers::stop();
            Err(restart())
        }
    }
}

/// `--init-only`: sets every sysctl that the node and the mode need, so that the agent itself needs no
/// writable /proc/sys, and tries the mode, so that its tools load their modules.
fn prepare(settings: &Settings, node_name: &str) -> Result<()> {
    sysctl::configure(&Sysctls::default(), &settings.conntrack);
    let context = Context::new(node_name, settings.config.clone());
    for family in IpFamily::ALL {
        let mut driver = shunt_modes::open(settings.mode, family, &settings.options)?;
        driver.prepare(&context.facts(family))?;
        if let Err(error) = driver.probe() {
            // A kernel without one family serves the other; the agent itself says when none works.
            tracing::warn!(%family, "{error}");
        }
    }
    tracing::info!(mode = %settings.mode, "the node is prepared");
    Ok(())
}

/// Why the loop ended.
enum End {
    /// It was told to.
    Stopped,
    /// There is another configuration.
    Reconfigured,
}

/// Starts this program anew in this process, with the same arguments. Rules stay in place meanwhile,
/// and the new start adopts them. Returns only if that fails.
fn restart() -> anyhow::Error {
    use std::os::unix::process::CommandExt as _;
    let mut arguments = std::env::args_os();
    let mut command = std::process::Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    let error = command.args(arguments).exec();
    anyhow!("content of the proxy server's configuration file was updated, and starting anew failed: {error}")
}

/// The node's name: that of flag or configuration, else the host name.
fn node_name(settings: &Settings) -> Result<String> {
    if let Some(name) = &settings.hostname_override {
        return Ok(name.clone());
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("read the host name")?;
    Ok(name.trim().to_lowercase())
}

async fn run_async(
    args: &RunArgs,
    configuration: Configuration,
    settings: Settings,
    node_name: String,
) -> Result<End> {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        mode = %settings.mode,
        node = node_name,
        "starting"
    );
    let families = families::open(&settings)?;
    if let Some(Err(error)) = settings.oom_score_adj.map(sysctl::set_oom_score_adj) {
        tracing::warn!("oom_score_adj stays as it is: {error}");
    }
    sysctl::configure(&Sysctls::default(), &settings.conntrack);
    // The kernel is read while the objects are on their way.
    let mut reading = tokio::task::spawn_blocking(|| families::read_ahead(families));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let (updates_tx, mut updates) = mpsc::channel(UPDATES_MAX);
    let (metrics, registry) = Metrics::new(settings.mode, settings.config.allow_external_ips);
    let options = kube_options(args, &settings, &node_name, &metrics);
    let source = start_source(args, options.clone(), updates_tx);
    let (events, notices) = mpsc::channel(EVENTS_MAX);
    let sender = start_events(args, options, notices);
    let health = Health::new(2 * settings.sync_period);
    let (failed_tx, mut failed) = mpsc::channel(1);
    let kube_proxy = &configuration.kube_proxy;
    let servers = servers::start(&settings, kube_proxy, &health, &metrics, registry, &events, &failed_tx);
    let say = |event_type, reason, note: &str| {
        // There is room: nothing was sent yet.
        let _ = events.try_send(Notice {
            regarding: Regarding::Node,
            event_type,
            reason,
            action: "StartKubeProxy",
            note: note.to_owned(),
        });
    };
    say(EventType::Normal, "Starting", "");
    if settings.mode == Mode::Ipvs {
        tracing::info!("{IPVS_DEPRECATION}");
        say(EventType::Warning, "IPVSDeprecation", IPVS_DEPRECATION);
    }
    let wanted = metrics.read.clone();
    let account = Account::new(metrics, health, events, node_name.clone());
    let (reconfigured_tx, mut reconfigured) = mpsc::channel(1);
    let configuration_watch = tokio::spawn(config::watch(args.clone(), configuration, reconfigured_tx));
    let (addresses_tx, mut addresses) = mpsc::channel(1);
    let watcher = tokio::spawn(shunt_node::addresses::watch(addresses_tx));
    let (asked_tx, mut asked) = mpsc::channel(1);
    let admin_socket = settings.admin_socket.clone();
    if !admin_socket.is_empty()
        && let Err(error) = admin::listen(admin_socket.as_ref(), asked_tx.clone())
    {
        tracing::warn!("{error:#}: `shunt dump` and `shunt explain` cannot reach this agent");
    }

    let (done_tx, mut done) = mpsc::unbounded_channel();
    let flows = settings.mode.uses_conntrack().then(|| Flows::start(done_tx)).transpose()?;
    let (counts_tx, mut counts) = mpsc::channel(1);
    if settings.mode.uses_conntrack()
        && settings.metrics_bind_address.is_some()
        && let Err(error) = connections::start(wanted, counts_tx)
    {
        tracing::warn!("connections are not counted: {error}");
    }
    let mut engine = Engine::new(settings, node_name, flows, account);
    let mut batch = Vec::with_capacity(UPDATES_MAX);
    tokio::pin!(source);
    tokio::pin!(watcher);
    let end = loop {
        let deadline = engine.deadline().map(tokio::time::Instant::from_std);
        let sleep = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = terminate.recv() => break End::Stopped,
            _ = interrupt.recv() => break End::Stopped,
            Some(_) = reconfigured.recv() => break End::Reconfigured,
            Some(error) = failed.recv() => return Err(error),
            received = updates.recv_many(&mut batch, UPDATES_MAX), if !updates.is_closed() || !updates.is_empty() => {
                if received > 0 {
                    engine.updates(&mut batch);
                }
            }
            read = &mut reading, if engine.families.is_empty() => {
                engine.opened(read.context("read the kernel")?);
            }
            Some(found) = addresses.recv() => block_in_place(|| engine.addresses(found)),
            Some(ended) = done.recv() => engine.cleaned(ended),
            Some(counted) = counts.recv() => engine.counted(&counted),
            Some(Asked { request, answer }) = asked.recv() => {
                // Nobody may be waiting any more; that is their business.
                let _ = answer.send(block_in_place(|| engine.answer(&request)));
            }
            ended = &mut source => return Err(ended_source(ended)),
            ended = &mut watcher => {
                let reason = match ended {
                    Ok(Ok(())) => "it ended".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(error) => error.to_string(),
                };
                return Err(anyhow!("watching the node's addresses: {reason}"));
            }
            () = sleep => {}
        }
        block_in_place(|| engine.tick(Instant::now()));
    };
    match end {
        End::Stopped => tracing::info!("stopping; rules stay in place"),
        End::Reconfigured => tracing::info!("the configuration changed: starting anew; rules stay in place"),
    }
    source.abort();
    watcher.abort();
    configuration_watch.abort();
    sender.abort();
    for server in &servers {
        server.abort();
    }
    drop(asked_tx);
    if !admin_socket.is_empty() {
        let _ = std::fs::remove_file(&admin_socket);
    }
    Ok(end)
}

type Source = tokio::task::JoinHandle<std::result::Result<(), shunt_watch::WatchError>>;

fn start_source(args: &RunArgs, options: KubeOptions, tx: mpsc::Sender<Update>) -> Source {
    if let Some(path) = &args.manifests {
        tokio::spawn(watch_manifests(path.clone(), options.node_name, tx))
    } else {
        tokio::spawn(watch_kube(options, tx))
    }
}

/// Sends events, if there is an API server to send them to.
fn start_events(
    args: &RunArgs,
    options: KubeOptions,
    notices: mpsc::Receiver<Notice>,
) -> tokio::task::JoinHandle<()> {
    let is_there = args.manifests.is_none();
    tokio::spawn(async move {
        if is_there && let Err(error) = send_events(options, notices).await {
            tracing::warn!("no events will be sent: {error}");
        }
    })
}

fn kube_options(args: &RunArgs, settings: &Settings, node_name: &str, metrics: &Metrics) -> KubeOptions {
    let mut options = KubeOptions::new(node_name);
    options.kubeconfig.clone_from(&settings.kubeconfig);
    options.master.clone_from(&args.master);
    let metrics = metrics.clone();
    options.observer = Some(Observer::new(move |answered| metrics.answered(answered)));
    options
}

fn ended_source(
    ended: std::result::Result<std::result::Result<(), shunt_watch::WatchError>, tokio::task::JoinError>,
) -> anyhow::Error {
    match ended {
        Ok(Ok(())) => anyhow!("the source of objects ended"),
        Ok(Err(error)) => error.into(),
        Err(error) => anyhow!("the source of objects failed: {error}"),
    }
}
