//! `shunt run`: waits for changes, hands them on, and says how it went. It decides nothing.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use shunt_core::compile::{Compiler, Context, unguarded_family};
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::store::{Dirty, Store};
use shunt_core::table::{Change, Conflict};
use shunt_mode::driver::{Driver, Report};
use shunt_mode::sync::{Periods, Step, SyncLoop};
use shunt_watch::{KubeOptions, Update, watch_kube, watch_manifests};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::block_in_place;

use crate::admin::{self, Asked, Request};
use crate::cli::RunArgs;
use crate::dump;
use crate::explain;
use crate::flows::{Done, Flows};
use crate::offline;
use crate::settings::{Settings, parse_duration};

/// Updates that may wait between source and loop: enough for a burst, little enough for memory.
const UPDATES_MAX: usize = 1024;

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    let document = args.settings.config.as_deref().map(offline::read_config).transpose()?;
    let mut settings = Settings::new(&args.settings, document.as_ref())?;
    if let Some(period) = &args.min_sync_period {
        settings.min_sync_period = Some(parse_duration(period).context("--min-sync-period")?);
    }
    let node_name = node_name(args, &settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(run_async(args, settings, node_name));
    runtime.shutdown_background();
    result
}

/// The node's name: the flag wins over the configuration, the configuration over the host name.
fn node_name(args: &RunArgs, settings: &Settings) -> Result<String> {
    let named = args.hostname_override.as_deref().map(|n| n.trim().to_lowercase());
    if let Some(name) = named.filter(|n| !n.is_empty()).or_else(|| settings.hostname_override.clone()) {
        return Ok(name);
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").context("read the host name")?;
    Ok(name.trim().to_lowercase())
}

async fn run_async(args: &RunArgs, settings: Settings, node_name: String) -> Result<()> {
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        mode = %settings.mode,
        node = node_name,
        "starting"
    );
    let families = open_families(&settings, &args.settings.ebpf.options())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let (updates_tx, mut updates) = mpsc::channel(UPDATES_MAX);
    let source = start_source(args, &node_name, updates_tx);
    let (addresses_tx, mut addresses) = mpsc::channel(1);
    let watcher = tokio::spawn(shunt_node::addresses::watch(addresses_tx));
    let (asked_tx, mut asked) = mpsc::channel(1);
    if !args.admin_socket.is_empty()
        && let Err(error) = admin::listen(args.admin_socket.as_ref(), asked_tx.clone())
    {
        tracing::warn!("{error:#}: `shunt dump` and `shunt explain` cannot reach this agent");
    }

    let (done_tx, mut done) = mpsc::unbounded_channel();
    let flows = settings.mode.uses_conntrack().then(|| Flows::start(done_tx)).transpose()?;
    let mut engine = Engine::new(settings, node_name, families, flows);
    let mut batch = Vec::with_capacity(UPDATES_MAX);
    tokio::pin!(source);
    tokio::pin!(watcher);
    loop {
        let deadline = engine.deadline().map(tokio::time::Instant::from_std);
        let sleep = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            received = updates.recv_many(&mut batch, UPDATES_MAX), if !updates.is_closed() || !updates.is_empty() => {
                if received > 0 {
                    engine.updates(&mut batch);
                }
            }
            Some(found) = addresses.recv() => block_in_place(|| engine.addresses(found)),
            Some(ended) = done.recv() => engine.cleaned(ended),
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
    }
    tracing::info!("stopping; rules stay in place");
    source.abort();
    watcher.abort();
    drop(asked_tx);
    if !args.admin_socket.is_empty() {
        let _ = std::fs::remove_file(&args.admin_socket);
    }
    Ok(())
}

type Source = tokio::task::JoinHandle<std::result::Result<(), shunt_watch::WatchError>>;

fn start_source(args: &RunArgs, node_name: &str, tx: mpsc::Sender<Update>) -> Source {
    if let Some(path) = &args.manifests {
        tokio::spawn(watch_manifests(path.clone(), node_name.to_owned(), tx))
    } else {
        let mut options = KubeOptions::new(node_name);
        options.kubeconfig.clone_from(&args.kubeconfig);
        options.master.clone_from(&args.master);
        tokio::spawn(watch_kube(options, tx))
    }
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
fn open_families(settings: &Settings, options: &shunt_modes::Options) -> Result<Vec<Family>> {
    let periods = Periods {
        min_sync: settings.min_sync_period.unwrap_or(Periods::default().min_sync),
        ..Periods::default()
    };
    let mut families = Vec::new();
    let mut errors = Vec::new();
    for family in IpFamily::ALL {
        let mut driver = shunt_modes::open(settings.mode, family, options)?;
        match driver.probe() {
            Ok(()) => families.push(Family { driver, sync: SyncLoop::new(periods) }),
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

/// One family's kernel and when to sync it.
struct Family {
    driver: Box<dyn Driver>,
    sync: SyncLoop,
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
    families: Vec<Family>,
    /// `None` in modes that track no flows.
    flows: Option<Flows>,
    /// What was complained about lately, so that it is said once.
    said: VecDeque<String>,
}

/// Complaints to remember.
const SAID_MAX: usize = 1000;

impl Engine {
    fn new(settings: Settings, node_name: String, families: Vec<Family>, flows: Option<Flows>) -> Self {
        Self {
            settings,
            node_name,
            store: Store::default(),
            compiler: None,
            synced: false,
            addresses: None,
            families,
            flows,
            said: VecDeque::new(),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let flows = self.flows.as_ref();
        let of_flows = |f: &Family| flows?.deadline(f.driver.family()).filter(|_| f.in_sync());
        self.families.iter().flat_map(|f| [f.sync.deadline(), of_flows(f)]).flatten().min()
    }

    fn updates(&mut self, batch: &mut Vec<Update>) {
        let mut dirty = Dirty::default();
        for update in batch.drain(..) {
            match update {
                Update::Event(event) => dirty.merge(self.store.apply(event)),
                Update::Synced => self.synced = true,
                Update::Problem(problem) => self.complain(problem.to_string()),
                // The source logs what it waits for; rules stay in place meanwhile.
                Update::Contact(contact) => tracing::debug!("{contact}"),
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
        if context.node_addresses.is_empty() {
            // Without a Node object the interfaces say what the node's addresses are.
            context.node_addresses =
                context.interface_addresses.iter().copied().filter(|a| is_global(*a)).collect();
        }
        context
    }

    /// Compiles everything and starts syncing, once all first lists and the addresses are there.
    fn start(&mut self) {
        if !self.synced || self.addresses.is_none() {
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
        }
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
            family.sync.changed(changes[family.driver.family() as usize].clone(), now);
        }
        if let (Some(flows), Some(compiler)) = (&mut self.flows, &self.compiler) {
            flows.changed(services, changes, &self.store, compiler, now);
        }
    }

    fn cleaned(&mut self, ended: Done) {
        let complaint = self.flows.as_mut().and_then(|flows| flows.done(ended, Instant::now()));
        if let Some(complaint) = complaint {
            self.complain(complaint);
        }
    }

    /// Does what is due.
    fn tick(&mut self, now: Instant) {
        let Some(compiler) = &self.compiler else { return };
        let mut problems = Vec::new();
        for family in &mut self.families {
            let of = family.driver.family();
            if let Some(step) = family.sync.next(now) {
                match family.driver.sync(compiler.table(of), &step) {
                    Ok(mut report) => {
                        log_sync(of, &step, &report);
                        problems.append(&mut report.problems);
                        family.sync.finished(Ok(step), Instant::now());
                    }
                    Err(error) => {
                        family.sync.finished(Err(error.remedy), Instant::now());
                        tracing::error!(
                            family = %of,
                            failures = family.sync.failures(),
                            "sync failed: {error}; reading the kernel again soon"
                        );
                    }
                }
            }
            // A flow that is deleted too early would be bound to the old endpoint again.
            if let Some(flows) = self.flows.as_mut().filter(|_| family.in_sync()) {
                flows.tick(of, compiler, now);
            }
        }
        for problem in problems {
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
    if *step == Step::Resync {
        tracing::info!(%family, operations, transactions, observing, planning, applying, "in sync with the kernel");
    } else {
        tracing::debug!(%family, operations, transactions, planning, applying, "change programmed");
    }
}
