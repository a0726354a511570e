//! Everything between a source and the kernel, on one task. It decides nothing.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use shunt_core::compile::{Compiler, Context, unguarded_family};
use shunt_core::id::{IpFamily, NamespacedName};
use shunt_core::store::{Dirty, Store};
use shunt_core::table::{Change, Conflict};
use shunt_mode::driver::Driver;
use shunt_mode::sync::Step;
use shunt_watch::Update;

use crate::account::{Account, Note};
use crate::admin::Request;
use crate::connections::Counts;
use crate::dump;
use crate::explain;
use crate::families::{Family, log_sync, milliseconds};
use crate::flows::{Done, Flows};
use crate::leftovers;
use crate::settings::Settings;

/// Everything between a source and the kernel.
pub(crate) struct Engine {
    settings: Settings,
    node_name: String,
    store: Store,
    /// Exists once all first lists are complete.
    compiler: Option<Compiler>,
    synced: bool,
    addresses: Option<BTreeSet<IpAddr>>,
    /// Empty until the kernel was read.
    pub families: Vec<Family>,
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
    pub(crate) fn new(settings: Settings, node_name: String, flows: Option<Flows>, account: Account) -> Self {
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

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let flows = self.flows.as_ref();
        let of_flows = |f: &Family| flows?.deadline(f.driver.family()).filter(|_| f.in_sync());
        let of_families = self
            .families
            .iter()
            .flat_map(|f| [f.sync.deadline(), of_flows(f), f.tend_at.filter(|_| f.in_sync())])
            .flatten();
        of_families.chain(self.account.deadline()).min()
    }

    pub(crate) fn updates(&mut self, batch: &mut Vec<Update>) {
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
    pub(crate) fn addresses(&mut self, found: BTreeSet<IpAddr>) {
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
    pub(crate) fn opened(&mut self, families: Vec<Family>) {
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

    pub(crate) fn cleaned(&mut self, ended: Done) {
        self.account.metrics.flows(ended.family(), ended.report(), ended.took());
        let complaint = self.flows.as_mut().and_then(|flows| flows.done(ended, Instant::now()));
        if let Some(complaint) = complaint {
            self.complain(complaint);
        }
    }

    pub(crate) fn counted(&self, counts: &Counts) {
        if let Some(compiler) = &self.compiler {
            self.account.metrics.connections(counts.family, &counts.by_service(compiler));
        }
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) {
        self.account.tick(now);
        let Some(compiler) = &self.compiler else { return };
        let mut problems = Vec::new();
        for family in &mut self.families {
            let of = family.driver.family();
            // A look at the kernel for which nothing waits finds what nobody asked for.
            let idle = family.in_sync();
            if let Some(step) = family.sync.next(now) {
                if let Some(options) = &family.leftovers {
                    leftovers::announce(&mut *family.driver, of, options);
                }
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
                            leftovers::remove(family.driver.mode(), of, options);
                        }
                        family.tend_at.get_or_insert(now + TEND_AFTER);
                    }
                    Err(error) => {
                        self.account.metrics.failed(of, matches!(step, Step::Apply(_)));
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
    pub(crate) fn answer(&mut self, request: &Request) -> Result<String> {
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
