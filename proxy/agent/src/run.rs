//! `shunt run`: waits for changes, hands them on, and says how it went. It decides nothing.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use shunt_core::compile::{Compiler, Context, unguarded_family};
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::store::{Dirty, Store};
use shunt_core::table::{Change, Conflict};
use shunt_mode::Mode;
use shunt_mode::driver::{Driver, Report};
use shunt_mode::sync::{Periods, Step, SyncLoop};
use shunt_node::health::Health;
use shunt_node::sysctl::{self, Sysctls};
use shunt_watch::{
    EventType, KubeOptions, Notice, Regarding, Update, send_events, watch_kube, watch_manifests,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use crate::account::{Account, Note};
use crate::admin::{self, Asked, Request};
use crate::cli::RunArgs;
use crate::config::{self, Configuration};
use crate::connections::{self, Counts};
use crate::dump;
use crate::explain;
use crate::flows::{Done, Flows};
use crate::metrics::Metrics;
use crate::servers;
use crate::settings::Settings;

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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(run_async(args, configuration, settings, node_name));
    runtime.shutdown_background();
    match result? {
        End::Stopped => Ok(()),
        End::Reconfigured => Err(restart()),
    }
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
    let families = open_families(&settings)?;
    if let Some(Err(error)) = settings.oom_score_adj.map(sysctl::set_oom_score_adj) {
        tracing::warn!("oom_score_adj stays as it is: {error}");
    }
    sysctl::configure(&Sysctls::default(), &settings.conntrack);
    if args.init_only == Some(true) {
        return Ok(End::Stopped);
    }
    // The kernel is read while the objects are on their way.
    let mut reading = tokio::task::spawn_blocking(|| read_ahead(families));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let (updates_tx, mut updates) = mpsc::channel(UPDATES_MAX);
    let source = start_source(args, &settings, &node_name, updates_tx);
    let (events, notices) = mpsc::channel(EVENTS_MAX);
    let sender = start_events(args, &settings, &node_name, notices);
    let (metrics, registry) = Metrics::new(settings.mode);
    let health = Health::new(2 * settings.sync_period);
    let (failed_tx, mut failed) = mpsc::channel(1);
    let kube_proxy = &configuration.kube_proxy;
    let servers = servers::start(&settings, kube_proxy, &health, &metrics, registry, &events, &failed_tx);
    let _ = events.try_send(Notice {
        regarding: Regarding::Node,
        event_type: EventType::Normal,
        reason: "Starting",
        action: "StartKubeProxy",
        note: String::new(),
    });
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
        && let Err(error) = connections::start(counts_tx)
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

fn start_source(args: &RunArgs, settings: &Settings, node_name: &str, tx: mpsc::Sender<Update>) -> Source {
    if let Some(path) = &args.manifests {
        tokio::spawn(watch_manifests(path.clone(), node_name.to_owned(), tx))
    } else {
        tokio::spawn(watch_kube(kube_options(args, settings, node_name), tx))
    }
}

/// Sends events, if there is an API server to send them to.
fn start_events(
    args: &RunArgs,
    settings: &Settings,
    node_name: &str,
    notices: mpsc::Receiver<Notice>,
) -> tokio::task::JoinHandle<()> {
    let options = args.manifests.is_none().then(|| kube_options(args, settings, node_name));
    tokio::spawn(async move {
        let Some(options) = options else { return };
        if let Err(error) = send_events(options, notices).await {
            tracing::warn!("no events will be sent: {error}");
        }
    })
}

fn kube_options(args: &RunArgs, settings: &Settings, node_name: &str) -> KubeOptions {
    let mut options = KubeOptions::new(node_name);
    options.kubeconfig.clone_from(&settings.kubeconfig);
    options.master.clone_from(&args.master);
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

/// Opens the mode for both families. A kernel without one family serves the other.
fn open_families(settings: &Settings) -> Result<Vec<Family>> {
    let periods = Periods {
        min_sync: settings.min_sync_period,
        check: settings.sync_period,
        resync: settings.resync_period,
        ..Periods::default()
    };
    let mut families = Vec::new();
    let mut errors = Vec::new();
    for family in IpFamily::ALL {
        let mut driver = shunt_modes::open(settings.mode, family, &settings.options)?;
        match driver.probe() {
            Ok(()) => families.push(Family {
                driver,
                sync: SyncLoop::new(periods),
                tend_at: None,
                leftovers: settings.remove_leftovers.then(|| settings.options.clone()),
            }),
            Err(error) => {
                tracing::warn!(%family, "{error}");
                errors.push(error);
            }
        }
    }
    match (families.is_empty(), errors.pop()) {
        (true, Some(error)) => Err(error.into()),
        _ => Ok(families),
    }
}

/// Reads what the kernel holds. What goes wrong here is said when the first sync reads again.
fn read_ahead(mut families: Vec<Family>) -> Vec<Family> {
    for family in &mut families {
        if let Err(error) = family.driver.read_ahead() {
            tracing::debug!(family = %family.driver.family(), "{error}");
        }
    }
    families
}

/// One family's kernel and when to sync it.
struct Family {
    driver: Box<dyn Driver>,
    sync: SyncLoop,
    /// Rules of others are to be removed once ours are in place, with these settings.
    leftovers: Option<shunt_modes::Options>,
    /// When the mode has something to do on its own, if so.
    tend_at: Option<Instant>,
}

impl Family {
    /// Whether the kernel holds what the table asks for, as far as known.
    const fn in_sync(&self) -> bool {
        self.sync.queued_since().is_none()
    }
}

/// Everything between a source and the kernel.
struct Engine {
    settings: Settings,
    node_name: String,
    store: Store,
    /// Exists once all first lists are complete.
    compiler: Option<Compiler>,
    synced: bool,
    addresses: Option<BTreeSet<IpAddr>>,
    /// Empty until the kernel was read.
    families: Vec<Family>,
    /// `None` in modes that track no flows.
    flows: Option<Flows>,
    account: Account,
    /// What was complained about lately, so that it is said once.
    said: VecDeque<String>,
}

/// How long after a change a mode is asked what else there is to do.
const TEND_AFTER: Duration = Duration::from_secs(10);

/// Complaints to remember.
const SAID_MAX: usize = 1000;

impl Engine {
    fn new(settings: Settings, node_name: String, flows: Option<Flows>, account: Account) -> Self {
        Self {
            settings,
            node_name,
            store: Store::default(),
            compiler: None,
            synced: false,
            addresses: None,
            families: Vec::new(),
            flows,
            account,
            said: VecDeque::new(),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let flows = self.flows.as_ref();
        let of_flows = |f: &Family| flows?.deadline(f.driver.family()).filter(|_| f.in_sync());
        let of_families = self
            .families
            .iter()
            .flat_map(|f| [f.sync.deadline(), of_flows(f), f.tend_at.filter(|_| f.in_sync())])
            .flatten();
        of_families.chain(self.account.deadline()).min()
    }

    fn updates(&mut self, batch: &mut Vec<Update>) {
        let mut dirty = Dirty::default();
        for update in batch.drain(..) {
            match update {
                Update::Event(event) => {
                    let note = Note::of(&event);
                    let touched = self.store.apply(event);
                    self.account.took(note, &touched);
                    dirty.merge(touched);
                }
                Update::Synced => self.synced = true,
                Update::Problem(problem) => {
                    self.account.metrics.problem();
                    self.complain(problem.to_string());
                }
                Update::Contact(contact) => {
                    // The source logs what it waits for; rules stay in place meanwhile.
                    tracing::debug!("{contact}");
                    self.account.metrics.contact(contact.kind, contact.lost.is_some());
                }
            }
        }
        for name in &dirty.services {
            let service = self.store.service(name);
            if let Some(family) = service.and_then(|s| unguarded_family(s)) {
                self.complain(format!(
                    "Service {name}: spec.loadBalancerSourceRanges has no {family} range: its {family} load-balancer address is open to everybody"
                ));
            }
        }
        if self.compiler.is_none() {
            self.start();
        } else if !dirty.is_empty() {
            self.compile(&dirty);
        }
    }

    /// Addresses or devices of the node have changed.
    fn addresses(&mut self, found: BTreeSet<IpAddr>) {
        let same = self.addresses.as_ref() == Some(&found);
        self.addresses = Some(found);
        if self.compiler.is_none() {
            self.start();
        } else if !same {
            self.refresh_context();
        }
        let errors: Vec<String> = self
            .families
            .iter_mut()
            .filter_map(|family| family.driver.refresh().err())
            .map(|error| format!("devices of the node: {error}"))
            .collect();
        for error in errors {
            self.complain(error);
        }
    }

    /// What is known of the node by now.
    fn context(&self) -> Context {
        let config = self.settings.config_for(self.store.node());
        let mut context = Context::new(self.node_name.as_str(), config).with_node(self.store.node());
        context.interface_addresses = self.addresses.clone().unwrap_or_default();
        if let Some(address) = self.settings.bind_address {
            // The first of a family is its primary one.
            context.node_addresses.retain(|a| *a != address);
            context.node_addresses.insert(0, address);
        }
        if context.node_addresses.is_empty() {
            // Without a Node object the interfaces say what the node's addresses are.
            context.node_addresses =
                context.interface_addresses.iter().copied().filter(|a| is_global(*a)).collect();
        }
        context
    }

    /// The kernel was read.
    fn opened(&mut self, families: Vec<Family>) {
        self.families = families;
        self.start();
    }

    /// Compiles everything and starts syncing, once all first lists and the addresses are there and the
    /// kernel was read.
    fn start(&mut self) {
        if !self.synced || self.addresses.is_none() || self.families.is_empty() {
            return;
        }
        let started = Instant::now();
        let compiler = Compiler::full(self.context(), &self.store);
        let [v4, v6] = IpFamily::ALL.map(|f| compiler.table(f).len());
        tracing::info!(
            services_ipv4 = v4,
            services_ipv6 = v6,
            milliseconds = milliseconds(started.elapsed()),
            "all objects are known"
        );
        let conflicts: Vec<Conflict> =
            IpFamily::ALL.iter().flat_map(|f| compiler.table(*f).conflicts()).collect();
        for conflict in conflicts {
            self.complain(conflict.to_string());
        }
        let now = Instant::now();
        for family in &mut self.families {
            family.sync.start(now);
            self.account.waiting(family.driver.family(), family.sync.queued_since());
        }
        self.account.compiled(None, &self.store, &compiler);
        if let Some(flows) = &mut self.flows {
            flows.all_known(&self.store, &compiler, now);
        }
        self.compiler = Some(compiler);
    }

    fn compile(&mut self, dirty: &Dirty) {
        let context = self.context();
        let Some(compiler) = &mut self.compiler else { return };
        let mut changes = compiler.set_context(context, &self.store);
        for (change, more) in changes.iter_mut().zip(compiler.update(&self.store, dirty)) {
            change.merge(more);
        }
        let conflicts: Vec<String> = dirty
            .services
            .iter()
            .flat_map(|name| IpFamily::ALL.map(|f| compiler.table(f).conflicts_of(name)))
            .flatten()
            .map(|conflict| conflict.to_string())
            .collect();
        for conflict in conflicts {
            self.complain(conflict);
        }
        self.changed(&dirty.services, &changes);
    }

    fn refresh_context(&mut self) {
        let context = self.context();
        let Some(compiler) = &mut self.compiler else { return };
        let changes = compiler.set_context(context, &self.store);
        self.changed(&BTreeSet::new(), &changes);
    }

    fn changed(&mut self, services: &BTreeSet<NamespacedName>, changes: &[Change; 2]) {
        let now = Instant::now();
        for family in &mut self.families {
            let of = family.driver.family();
            family.sync.changed(changes[of as usize].clone(), now);
            self.account.waiting(of, family.sync.queued_since());
        }
        if let Some(compiler) = &self.compiler {
            self.account.compiled(Some(services), &self.store, compiler);
        }
        if let (Some(flows), Some(compiler)) = (&mut self.flows, &self.compiler) {
            flows.changed(services, changes, &self.store, compiler, now);
        }
    }

    fn cleaned(&mut self, ended: Done) {
        self.account.metrics.flows(ended.family(), ended.report(), ended.took());
        let complaint = self.flows.as_mut().and_then(|flows| flows.done(ended, Instant::now()));
        if let Some(complaint) = complaint {
            self.complain(complaint);
        }
    }

    fn counted(&self, counts: &Counts) {
        if let Some(compiler) = &self.compiler {
            self.account.metrics.connections(counts.family, &counts.by_service(compiler));
        }
    }

    /// Does what is due.
    fn tick(&mut self, now: Instant) {
        self.account.tick(now);
        let Some(compiler) = &self.compiler else { return };
        let mut problems = Vec::new();
        for family in &mut self.families {
            let of = family.driver.family();
            // A look at the kernel for which nothing waits finds what nobody asked for.
            let idle = family.in_sync();
            if let Some(step) = family.sync.next(now) {
                match family.driver.sync(compiler.table(of), &step) {
                    Ok(mut report) => {
                        log_sync(of, &step, &report);
                        let full = step == Step::Resync;
                        if idle && full && report.operations > 0 {
                            tracing::warn!(family = %of, operations = report.operations, "the kernel held something else than we put there: mended");
                            self.account.metrics.drift(of, report.operations);
                        }
                        if step != Step::Check {
                            self.account.synced(&*family.driver, full, &report, now);
                        }
                        self.account.count(&mut *family.driver, now);
                        problems.append(&mut report.problems);
                        family.sync.finished(Ok(step), Instant::now());
                        if let Some(options) = family.leftovers.take() {
                            remove_leftovers(family.driver.mode(), of, options);
                        }
                        family.tend_at.get_or_insert(now + TEND_AFTER);
                    }
                    Err(error) => {
                        self.account.metrics.failed(of);
                        family.sync.finished(Err(error.remedy), Instant::now());
                        tracing::error!(
                            family = %of,
                            failures = family.sync.failures(),
                            "sync failed: {error}; reading the kernel again soon"
                        );
                    }
                }
                self.account.waiting(of, family.sync.queued_since());
            }
            if family.in_sync() {
                self.account.serve(of, now);
            }
            if family.tend_at.is_some_and(|at| at <= now) && family.in_sync() {
                family.tend_at = match family.driver.tend(now) {
                    Ok(next) => next,
                    Err(error) => {
                        tracing::error!(family = %of, "{error}; reading the kernel again soon");
                        family.sync.start(now);
                        Some(now + TEND_AFTER)
                    }
                };
            }
            // A flow that is deleted too early would be bound to the old endpoint again.
            if let Some(flows) = self.flows.as_mut().filter(|_| family.in_sync()) {
                flows.tick(of, compiler, now);
            }
        }
        for problem in problems {
            if !self.said.contains(&problem) {
                self.account.no_room(&problem);
            }
            self.complain(problem);
        }
    }

    /// Answers what came in by the admin socket.
    fn answer(&mut self, request: &Request) -> Result<String> {
        let compiler = self.compiler.as_ref().context("not all objects are known yet")?;
        let mut drivers: Vec<&mut Box<dyn Driver>> =
            self.families.iter_mut().map(|f| &mut f.driver).collect();
        match request {
            Request::Dump(request) => dump::live(compiler, &mut drivers, request),
            Request::Explain(request) => explain::live(&self.store, compiler, &mut drivers, request),
        }
    }

    /// Warns of something, unless it was said lately.
    fn complain(&mut self, what: String) {
        if self.said.contains(&what) {
            return;
        }
        tracing::warn!("{what}");
        if self.said.len() == SAID_MAX {
            self.said.pop_front();
        }
        self.said.push_back(what);
    }
}

/// Removes what kube-proxy and other modes left, on a thread of its own: their tools may take a while.
/// Connections that they translated go on, as the kernel remembers how.
fn remove_leftovers(in_use: Mode, family: IpFamily, options: shunt_modes::Options) {
    let remove = move || {
        for error in shunt_modes::remove_leftovers(Some(in_use), family, &options) {
            tracing::warn!(%family, "leftovers of another mode may remain: {error}");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("leftovers".to_owned()).spawn(remove) {
        tracing::warn!(%family, "leftovers of other modes remain: {error}");
    }
}

/// Whether an address can stand for the node: neither loopback nor link-local.
const fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => !a.is_loopback() && !a.is_link_local(),
        IpAddr::V6(a) => !a.is_loopback() && !a.is_unicast_link_local(),
    }
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn log_sync(family: IpFamily, step: &Step, report: &Report) {
    let observing = milliseconds(report.observing);
    let planning = milliseconds(report.planning);
    let applying = milliseconds(report.applying);
    let (operations, transactions) = (report.operations, report.transactions);
    let waiting = milliseconds(report.waiting);
    if *step == Step::Resync {
        tracing::info!(%family, operations, transactions, observing, planning, applying, waiting, "in sync with the kernel");
    } else if let Step::Apply(_) = step {
        tracing::debug!(%family, operations, transactions, planning, applying, waiting, "change programmed");
    }
}
