//! Keeps what is known of one kind the same as what the API server has.
//!
//! ```text
//!          ┌── 410 Gone, or resuming does not help ──┐
//!          v                                         │
//!   list (streamed or in pages) ── version ──> watch from there ──> ... ──> again, same version
//!          │                                         │
//!   objects, then what vanished             one event a change
//! ```
//!
//! A watch that breaks is resumed where it was; only when the server has forgotten that place is
//! everything listed again. Names that were sent and are not in the new list have vanished
//! meanwhile: they are sent as gone. Until the list is complete nothing is.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{Request, StatusCode, header};
use kube::Client;
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;
use shunt_core::id::NamespacedName;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::KubeOptions;
use super::backoff::Backoff;
use super::lines::{Lines, NoLine};
use super::resource::Resource;
use crate::Update;
use crate::convert::{Converted, Converter};
use crate::kind::{Kind, is_gone};
use crate::problem::Contact;
use crate::wire::AnyObject;

/// A stream that lived this long was a good one, however it ended.
const GOOD_LIFE: Duration = Duration::from_secs(5);
/// How much longer than asked for a watch may last before it counts as dead.
const WATCH_GRACE: Duration = Duration::from_secs(30);
/// After so many failures in a row something else is tried: list instead of resuming, pages
/// instead of a stream, the whole list instead of pages, an older list instead of none.
const STUBBORN: u32 = 3;

/// What the reflectors of all kinds share.
pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) options: KubeOptions,
    pub(super) converter: Mutex<Converter>,
    pub(super) tx: mpsc::Sender<Update>,
    /// How many kinds have not completed their first list.
    pub(super) waiting: AtomicUsize,
}

/// Why a list or a watch did not go on.
enum Failure {
    /// The receiver is gone: nobody wants to know any more.
    Closed,
    /// The server has forgotten the version that we are at (410).
    Expired(String),
    /// The server does not have this kind (404).
    Absent(String),
    /// The server does not understand the question (400, 422 and the like).
    Refused(String),
    /// What comes makes no sense. If that goes on, resuming at the same place does not help.
    Garbled(String),
    /// Anything else: try again, not before the time that the server asked for.
    Broken(String, Option<Duration>),
}

impl Failure {
    fn broken(reason: impl Into<String>) -> Self {
        Self::Broken(reason.into(), None)
    }
}

pub(super) struct Reflector {
    kind: Kind,
    shared: std::sync::Arc<Shared>,
    resource: Resource,
    /// Names that were sent and not taken back, with the number of the last list that had them.
    known: HashMap<NamespacedName, u32>,
    /// Number of the current list.
    list: u32,
    /// Where the watch goes on; empty when everything has to be listed.
    version: String,
    /// The newest version seen, for telling an outdated list from a new one.
    newest: u64,
    listed_at: Instant,
    synced: bool,
    streaming: bool,
    paging: bool,
    backoff: Backoff,
    /// Failures since anything came through.
    stuck: u32,
}

impl Reflector {
    pub(super) fn new(kind: Kind, shared: std::sync::Arc<Shared>) -> Self {
        let options = &shared.options;
        Self {
            kind,
            resource: Resource::of(kind, &options.node_name),
            known: HashMap::new(),
            list: 0,
            version: String::new(),
            newest: 0,
            listed_at: Instant::now(),
            synced: false,
            streaming: options.streaming_lists,
            paging: true,
            backoff: Backoff::new(options.backoff_min, options.backoff_max),
            stuck: 0,
            shared,
        }
    }

    /// Runs until nobody listens.
    pub(super) async fn run(mut self) {
        loop {
            let started = Instant::now();
            let listing = self.version.is_empty();
            let result = if !self.version.is_empty() {
                self.watch(false).await
            } else if self.streaming {
                self.watch(true).await
            } else {
                self.list().await
            };
            if started.elapsed() >= GOOD_LIFE {
                self.backoff.reset();
            }
            let wait = match result {
                // A server that ends each watch at once must not be asked again in a tight loop.
                Ok(()) if started.elapsed() < GOOD_LIFE && !listing => Some(self.shared.options.backoff_min),
                Ok(()) => None,
                Err(Failure::Closed) => return,
                Err(failure) => match self.failed(failure).await {
                    Ok(wait) => Some(wait),
                    Err(_) => return,
                },
            };
            if let Some(wait) = wait {
                sleep(wait).await;
            }
        }
    }

    /// What to do after a failure: how long to wait, and what to do differently then.
    async fn failed(&mut self, failure: Failure) -> Result<Duration, Failure> {
        let kind = self.kind;
        self.stuck = self.stuck.saturating_add(1);
        let (reason, wait) = match failure {
            Failure::Closed => return Err(Failure::Closed),
            Failure::Absent(reason) if self.resource.optional => {
                tracing::debug!(%kind, reason, "the API server does not have this kind");
                self.begin_list();
                self.complete_list().await?;
                self.version.clear();
                let wait = self.shared.options.absent_retry;
                return Ok(wait.mul_f64(0.8 + 0.4 * fastrand::f64()));
            }
            Failure::Expired(reason) => {
                if self.version.is_empty() && self.stuck >= STUBBORN {
                    // The continuation of a list expires: the server is too slow for pages.
                    self.paging = false;
                }
                self.version.clear();
                // Listing again is right at once, but only once.
                let first = self.backoff.failures() == 0;
                let wait = self.backoff.next(None);
                (reason, if first { Duration::ZERO } else { wait })
            }
            Failure::Refused(reason) => {
                if self.resource.without_fields(kind) && reason.contains("field") {
                    (reason, Duration::ZERO)
                } else if self.version.is_empty() && self.streaming {
                    tracing::debug!(%kind, reason, "no streaming lists here, listing in pages");
                    self.streaming = false;
                    return Ok(Duration::ZERO);
                } else {
                    self.version.clear();
                    (reason, self.backoff.next(None))
                }
            }
            Failure::Absent(reason) => (reason, self.backoff.next(None)),
            Failure::Garbled(reason) => {
                if !self.version.is_empty() && self.stuck >= STUBBORN {
                    self.version.clear();
                }
                self.other_way_to_list();
                (reason, self.backoff.next(None))
            }
            Failure::Broken(reason, asked) => {
                self.other_way_to_list();
                (reason, self.backoff.next(asked))
            }
        };
        tracing::warn!(%kind, reason, wait = ?wait, "lost the API server");
        self.send(Update::Contact(Contact { kind, lost: Some(reason) })).await?;
        Ok(wait)
    }

    /// If a list does not come, it may be the streaming (or the lack of it) that does not work.
    fn other_way_to_list(&mut self) {
        if self.version.is_empty() && self.stuck >= STUBBORN {
            self.streaming = !self.streaming && self.shared.options.streaming_lists;
        }
    }

    /// Lists in pages.
    async fn list(&mut self) -> Result<(), Failure> {
        self.begin_list();
        let limit = self.shared.options.page_size.to_string();
        let mut next = String::new();
        let mut version = String::new();
        loop {
            let mut parameters = Vec::new();
            if self.paging {
                parameters.push(("limit", limit.as_str()));
            }
            if !next.is_empty() {
                parameters.push(("continue", next.as_str()));
            }
            // No resourceVersion: the list is as new as can be, never one from a cache that lags.
            let body = self.get(&self.resource.uri(&parameters)).await?;
            let page = body.all(self.patience(), usize::MAX).await.map_err(Failure::broken)?;
            let page = read_page(&page).map_err(Failure::broken)?;
            if version.is_empty() {
                self.not_outdated(&page.metadata.resource_version)?;
                version = page.metadata.resource_version.into_owned();
            }
            for item in page.items {
                self.take(item.get(), false).await?;
            }
            next = page.metadata.next.into_owned();
            if next.is_empty() {
                break;
            }
        }
        self.complete_list().await?;
        self.at(version);
        self.stuck = 0;
        self.backoff.reset();
        Ok(())
    }

    /// Watches; with `from_start` the server sends all objects first.
    async fn watch(&mut self, from_start: bool) -> Result<(), Failure> {
        let asked = self.shared.options.watch_timeout.mul_f64(0.8 + 0.4 * fastrand::f64());
        let seconds = asked.as_secs().max(1).to_string();
        let mut parameters =
            vec![("watch", "true"), ("allowWatchBookmarks", "true"), ("timeoutSeconds", seconds.as_str())];
        if from_start {
            self.begin_list();
            parameters.extend([("sendInitialEvents", "true"), ("resourceVersionMatch", "NotOlderThan")]);
        } else {
            parameters.push(("resourceVersion", self.version.as_str()));
        }
        let started = Instant::now();
        let mut lines = self.get(&self.resource.uri(&parameters)).await?;
        if !from_start {
            self.in_touch().await?;
        }
        let mut listing = from_start;
        let end = started + asked + WATCH_GRACE;
        let patience = self.patience();
        let mut heard = false;
        loop {
            let relist = self.shared.options.relist_every;
            let relist = relist.filter(|_| !listing).map(|every| self.listed_at + every);
            let deadline = || {
                if listing { patience() } else { relist.map_or(end, |at| at.min(end)) }
            };
            let line = match lines.next(deadline).await {
                Ok(line) => line,
                Err(_) if relist.is_some_and(|at| at <= Instant::now()) => {
                    self.version.clear();
                    return Ok(());
                }
                // Servers end watches as a matter of course; only one that ends at once is odd.
                Err(NoLine::End) if !listing && (heard || started.elapsed() >= GOOD_LIFE) => return Ok(()),
                Err(NoLine::End) => return Err(Failure::broken("the server ended the watch early")),
                Err(NoLine::Broken(reason)) => return Err(Failure::Broken(reason, None)),
            };
            let event: WatchEvent<'_> =
                serde_json::from_slice(line).map_err(|e| Failure::Garbled(format!("watch: {e}")))?;
            match event.type_ {
                "ADDED" | "MODIFIED" => self.take(event.object.get(), false).await?,
                "DELETED" => self.take(event.object.get(), true).await?,
                "BOOKMARK" => {
                    let object: AnyObject<'_> = serde_json::from_str(event.object.get())
                        .map_err(|e| Failure::Garbled(format!("bookmark: {e}")))?;
                    let meta = object.metadata;
                    let ends = meta.annotations.initial_events_end.is_some_and(|v| &*v == "true");
                    let version = meta.resource_version.to_string();
                    if listing && ends {
                        self.not_outdated(&version)?;
                        self.complete_list().await?;
                        listing = false;
                    } else {
                        self.in_touch().await?;
                    }
                    if !listing && !version.is_empty() {
                        self.at(version);
                    }
                }
                "ERROR" => return Err(status_failure(event.object.get())),
                other => tracing::debug!(kind = %self.kind, r#type = other, "unknown type of watch event"),
            }
            if !listing {
                self.stuck = 0;
            }
            if !heard && !listing {
                heard = true;
                // What was wrong with the watch before is over once something comes through,
                // but a server that breaks off after each event does not get us for free.
                if started.elapsed() >= GOOD_LIFE || from_start {
                    self.backoff.reset();
                }
            }
        }
    }

    /// Takes in one object.
    async fn take(&mut self, json: &str, deleted: bool) -> Result<(), Failure> {
        let (converted, version) = match self.shared.converter.lock() {
            Ok(mut converter) => converter.text(self.kind, json),
            Err(poisoned) => poisoned.into_inner().text(self.kind, json),
        };
        let Converted { name, event, problems } = converted;
        // While everything is being listed, a break must lead to a new list, not to a watch.
        if !version.is_empty() && !self.version.is_empty() {
            self.at(version);
        }
        if !deleted {
            for problem in problems {
                self.send(Update::Problem(problem)).await?;
            }
        }
        let Some(name) = name else { return Ok(()) };
        match event {
            Some(event) if !deleted && !is_gone(&event) => {
                self.known.insert(name, self.list);
                self.send(Update::Event(event)).await
            }
            None if !deleted => {
                // Unreadable, but it exists: it stays as it was known.
                self.known.entry(name).and_modify(|list| *list = self.list);
                Ok(())
            }
            _ => match self.known.remove(&name) {
                Some(_) => self.send(Update::Event(self.kind.gone(&name))).await,
                None => Ok(()),
            },
        }
    }

    fn begin_list(&mut self) {
        self.list = self.list.wrapping_add(1);
    }

    /// All objects have been seen: what was known and is not among them has vanished.
    async fn complete_list(&mut self) -> Result<(), Failure> {
        let list = self.list;
        let mut vanished: Vec<_> =
            self.known.extract_if(|_, seen| *seen != list).map(|(name, _)| name).collect();
        vanished.sort_unstable();
        for name in vanished {
            self.send(Update::Event(self.kind.gone(&name))).await?;
        }
        self.listed_at = Instant::now();
        self.in_touch().await?;
        if !self.synced {
            self.synced = true;
            // Every kind sends through the same channel, so all first lists are in it before this.
            if self.shared.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.send(Update::Synced).await?;
            }
        }
        Ok(())
    }

    /// Refuses a list that is older than what has been seen (from a replica that lags). A server
    /// that insists has been restored from a backup, and is right.
    fn not_outdated(&mut self, version: &str) -> Result<(), Failure> {
        let Ok(number) = version.parse::<u64>() else { return Ok(()) };
        if number < self.newest && self.stuck < STUBBORN {
            return Err(Failure::broken(format!(
                "list of version {number} is older than version {} seen before",
                self.newest
            )));
        }
        self.newest = number;
        Ok(())
    }

    /// The watch goes on from here.
    fn at(&mut self, version: String) {
        if let Ok(number) = version.parse() {
            self.newest = self.newest.max(number);
        }
        self.version = version;
    }

    async fn in_touch(&mut self) -> Result<(), Failure> {
        self.send(Update::Contact(Contact { kind: self.kind, lost: None })).await
    }

    async fn send(&self, update: Update) -> Result<(), Failure> {
        self.shared.tx.send(update).await.map_err(|_| Failure::Closed)
    }

    /// Time for the next piece of an answer, counted from when it is awaited.
    fn patience(&self) -> impl Fn() -> Instant + use<> {
        let longest = self.shared.options.response_timeout;
        move || Instant::now() + longest
    }

    /// Asks; a body comes only with success.
    async fn get(&self, uri: &str) -> Result<Lines, Failure> {
        let request = Request::get(uri)
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, concat!("shunt/", env!("CARGO_PKG_VERSION")))
            .body(Body::empty())
            .map_err(|e| Failure::broken(e.to_string()))?;
        let answer = timeout(self.shared.options.response_timeout, self.shared.client.send(request)).await;
        let response = match answer {
            Err(_) => return Err(Failure::broken("no answer in time")),
            Ok(Err(error)) => return Err(Failure::Broken(chain(&error), None)),
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after = retry_after.and_then(|v| v.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        let body = Lines::new(response.into_body());
        if status.is_success() {
            return Ok(body);
        }
        let text = body.all(self.patience(), 64 << 10).await.unwrap_or_default();
        let message = serde_json::from_slice::<Status<'_>>(&text).map_or_else(
            |_| String::from_utf8_lossy(&text).chars().take(200).collect(),
            |s| s.message.into_owned(),
        );
        let reason = format!("{} answered {status}: {message}", self.resource.path);
        Err(match status {
            StatusCode::GONE => Failure::Expired(reason),
            StatusCode::NOT_FOUND => Failure::Absent(reason),
            // Without the right to see an optional kind, we have to do without it too.
            StatusCode::FORBIDDEN if self.resource.optional => Failure::Absent(reason),
            StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY | StatusCode::NOT_ACCEPTABLE => {
                Failure::Refused(reason)
            }
            _ => Failure::Broken(reason, retry_after),
        })
    }
}

/// A line of a watch.
#[derive(Deserialize)]
struct WatchEvent<'a> {
    #[serde(rename = "type")]
    type_: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// A page of a list: its objects are looked at one by one, so that a bad one spoils only itself.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow, default)]
    metadata: PageMeta<'a>,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PageMeta<'a> {
    #[serde(borrow)]
    resource_version: std::borrow::Cow<'a, str>,
    #[serde(borrow, rename = "continue")]
    next: std::borrow::Cow<'a, str>,
}

struct ReadPage<'a> {
    metadata: PageMeta<'a>,
    items: Vec<&'a RawValue>,
}

fn read_page(text: &[u8]) -> Result<ReadPage<'_>, String> {
    let page: Page<'_> = serde_json::from_slice(text).map_err(|e| format!("list: {e}"))?;
    if page.metadata.resource_version.is_empty() {
        // An answer that is no list (a proxy's login page, a Status) must not empty everything.
        return Err("list: it has no resourceVersion".to_owned());
    }
    Ok(ReadPage { metadata: page.metadata, items: page.items.unwrap_or_default() })
}

/// `metav1.Status`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Status<'a> {
    code: u16,
    #[serde(borrow)]
    reason: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    message: std::borrow::Cow<'a, str>,
}

fn status_failure(json: &str) -> Failure {
    let status: Status<'_> = serde_json::from_str(json).unwrap_or_default();
    let reason = format!("watch ended with {} {}: {}", status.code, status.reason, status.message);
    if status.code == 410 || matches!(&*status.reason, "Expired" | "Gone") {
        Failure::Expired(reason)
    } else {
        Failure::Garbled(reason)
    }
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
