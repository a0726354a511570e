//! What other modes and kube-proxy left, and the connections that only the mode before can go on with.
//!
//! Modes of netfilter hand over to each other: conntrack knows how connections are translated, and the hooks that do
//! so stay. It forgets neither in ebpf mode, but has its hooks only while there are chains of type nat; and what the
//! programs at devices translate is known to them alone, as what IPVS translates is to IPVS. So what is left of the old
//! kind stays until no connection needs it; a start during that time goes on with that.
//!
//! Meanwhile both look at the same packets. The programs leave alone what they have no flow for. netfilter is told of
//! their flows: it would take a packet from the middle of a connection for the first of a new one, which it would
//! translate, or for an invalid one, which iptables mode drops.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_mode::driver::Driver;
use shunt_mode::{Mode, Remains};
use shunt_modes::Options;
use shunt_node::conntrack::{Connections, Conntrack as _, Netlink};

/// Connections are waited for at most this long.
const CONNECTIONS_MAX: Duration = Duration::from_hours(24);
/// Within this time a handshake ends that was under way, with a packet lost.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);
/// Time between two looks whether connections are left: at first, and later. Looking may take this share of time.
const LOOK_OFTEN: Duration = Duration::from_millis(100);
const LOOK_SELDOM: Duration = Duration::from_secs(10);
const SHARE: u32 = 4;
/// What netfilter was told of connections of ebpf mode it forgets after so long, unless it is told again or sees their
/// packets.
const KNOWN_SECONDS: u32 = 300;
/// How often it is told again.
const TELL_AGAIN: Duration = Duration::from_mins(2);
/// Time between two messages that say how many connections are left.
const SAY_EVERY: Duration = Duration::from_mins(5);

/// Leftovers that cannot be removed are tried again after so long each: others may be using them.
const REMOVAL_PAUSES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(10), Duration::from_mins(1), Duration::from_mins(10)];

/// Held while something of other modes is changed.
static AT_WORK: Mutex<()> = Mutex::new(());

fn at_work() -> MutexGuard<'static, ()> {
    AT_WORK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets the removal of leftovers come to an end where it is under way, and none begin any more: the next start may be
/// in the mode that is being removed.
pub(crate) fn stop() -> MutexGuard<'static, ()> {
    at_work()
}

/// Removes what kube-proxy and other modes left, on a thread of its own: their tools may take a while, and so may
/// connections that would break.
pub(crate) fn remove(in_use: Mode, family: IpFamily, options: Options) {
    let work = move || {
        let said = |waited: Result<()>| {
            if let Err(error) = waited {
                tracing::warn!(%family, "connections of the mode before are not waited for: {error:#}");
            }
        };
        if in_use.uses_conntrack() {
            for before in [Mode::Ebpf, Mode::Ipvs].into_iter().filter(|before| *before != in_use) {
                said(leave(before, family, &options));
            }
        } else {
            said(enter(in_use, family, &options));
        }
        for pause in REMOVAL_PAUSES.map(Some).into_iter().chain([None]) {
            let held = at_work();
            let errors = shunt_modes::remove_leftovers(Some(in_use), family, &options);
            drop(held);
            if errors.is_empty() {
                return;
            }
            let again = pause
                .map_or_else(|| "not tried again".to_owned(), |pause| format!("tried again in {pause:?}"));
            for error in errors {
                tracing::warn!(%family, "leftovers of another mode may remain: {error}; {again}");
            }
            std::thread::sleep(pause.unwrap_or_default());
        }
    };
    if let Err(error) = std::thread::Builder::new().name("leftovers".to_owned()).spawn(work) {
        tracing::warn!(%family, "leftovers of other modes remain: {error}");
    }
}

/// To be called before a mode takes over for the first time. To the rules of a mode of netfilter, connections of ebpf mode
/// would be new ones from the middle of nowhere; and ebpf mode must not masquerade a new connection as one that netfilter
/// has masqueraded.
pub(crate) fn announce(driver: &mut dyn Driver, family: IpFamily, options: &Options) {
    let announced = if driver.mode().uses_conntrack() {
        announce_flows(family, options)
    } else {
        announce_connections(driver, family, options)
    };
    if let Err(error) = announced {
        tracing::warn!(%family, "connections of the mode before may break: {error:#}");
    }
}

fn announce_flows(family: IpFamily, options: &Options) -> Result<()> {
    match Leaving::open(Mode::Ebpf, family, options)? {
        Some(mut leaving) => leaving.look().map(drop),
        None => Ok(()),
    }
}

fn announce_connections(ebpf: &mut dyn Driver, family: IpFamily, options: &Options) -> Result<()> {
    match Others::open(family, options)? {
        Some(mut others) => others.hand_over(ebpf).map(drop),
        None => Ok(()),
    }
}

/// Connections that modes of netfilter have translated, which ebpf mode takes over from.
struct Others {
    family: IpFamily,
    conntrack: Netlink,
    ipvs: Option<Box<dyn Driver>>,
}

impl Others {
    /// `None` where no rules are left.
    fn open(family: IpFamily, options: &Options) -> Result<Option<Self>> {
        if !shunt_modes::has_rules_of_netfilter(family, options) {
            return Ok(None);
        }
        Ok(Some(Self { family, conntrack: Netlink::open()?, ipvs: open_before(Mode::Ipvs, family, options) }))
    }

    /// Tells ebpf mode of connections that netfilter goes on with or IPVS remembers, and has conntrack forget those that
    /// are closed: it would give a new connection other ports, or drop it, whose client uses its port again. IPVS
    /// forgets none on demand. Says how many go on.
    fn hand_over(&mut self, ebpf: &mut dyn Driver) -> Result<usize> {
        let Connections { open, closed } = self.conntrack.connections(self.family)?;
        let masqueraded = open.iter().filter(|flow| flow.reply.destination != flow.original.source);
        let mut answers: Vec<Tuple> = masqueraded.map(|flow| flow.reply).collect();
        if let Some(remains) = self.ipvs.as_mut().map(|ipvs| ipvs.remains()).transpose()?.flatten() {
            answers.extend(remains.answers);
        }
        ebpf.keep_off(&answers)?;
        self.conntrack.delete(&closed)?;
        Ok(open.len())
    }
}

/// `None` where the mode cannot even be opened: then it has left nothing.
fn open_before(mode: Mode, family: IpFamily, options: &Options) -> Option<Box<dyn Driver>> {
    let opened = shunt_modes::open(mode, family, options);
    opened.inspect_err(|error| tracing::debug!(%family, "{error}")).ok()
}

/// Connections of a mode that others cannot go on with, which another mode takes over from.
struct Leaving {
    before: Box<dyn Driver>,
    conntrack: Netlink,
    /// Those that netfilter was told of, and since when.
    told: BTreeSet<Tuple>,
    told_since: Instant,
}

impl Leaving {
    /// `None` where the mode cannot even be opened: then it has left nothing.
    fn open(mode: Mode, family: IpFamily, options: &Options) -> Result<Option<Self>> {
        let Some(before) = open_before(mode, family, options) else { return Ok(None) };
        let conntrack = Netlink::open()?;
        Ok(Some(Self { before, conntrack, told: BTreeSet::new(), told_since: Instant::now() }))
    }

    /// Says what is left, and tells netfilter of connections that it was not told of.
    fn look(&mut self) -> Result<Option<Remains>> {
        let Some(remains) = self.before.remains()? else { return Ok(None) };
        if self.told_since.elapsed() > TELL_AGAIN {
            self.told.clear();
            self.told_since = Instant::now();
        }
        let news: Vec<Tuple> =
            remains.tuples.iter().filter(|tuple| self.told.insert(**tuple)).copied().collect();
        if let Err(error) = self.conntrack.enter(&news, KNOWN_SECONDS) {
            // Most of them go on without.
            tracing::warn!("conntrack does not know all connections of the mode before: {error}");
        }
        Ok(Some(remains))
    }
}

/// Waits for connections of a mode that another one has taken over from.
fn leave(before: Mode, family: IpFamily, options: &Options) -> Result<()> {
    let Some(mut leaving) = Leaving::open(before, family, options)? else { return Ok(()) };
    let mut wait = Wait::new(family);
    let mut retired = false;
    loop {
        let held = at_work();
        let started = Instant::now();
        let Some(remains) = leaving.look()? else { return Ok(()) };
        if !retired {
            leaving.before.retire()?;
            retired = true;
            continue;
        }
        drop(held);
        // The other family's connections go with the programs as well.
        if !remains.serves && remains.connections == 0 || wait.is_over(remains.connections) {
            return Ok(());
        }
        wait.next(started, remains.connections);
    }
}

/// Waits for connections that netfilter has translated before the programs of ebpf mode took over.
fn enter(in_use: Mode, family: IpFamily, options: &Options) -> Result<()> {
    let Some(mut others) = Others::open(family, options)? else { return Ok(()) };
    let mut ebpf = shunt_modes::open(in_use, family, options)?;
    let mut wait = Wait::new(family);
    loop {
        let started = Instant::now();
        let open = others.hand_over(&mut *ebpf)?;
        // Handshakes that are under way may not be known yet.
        if open == 0 && wait.since.elapsed() > HANDSHAKE_MAX || wait.is_over(open) {
            return Ok(());
        }
        wait.next(started, open);
    }
}

/// How long was waited, and when that was last said.
struct Wait {
    family: IpFamily,
    since: Instant,
    said: Option<Instant>,
}

impl Wait {
    fn new(family: IpFamily) -> Self {
        Self { family, since: Instant::now(), said: None }
    }

    fn is_over(&self, connections: usize) -> bool {
        let is_over = self.since.elapsed() > CONNECTIONS_MAX;
        if is_over {
            let hours = CONNECTIONS_MAX.as_secs() / 3600;
            tracing::warn!(family = %self.family, connections, "the mode before is removed after {hours} hours: connections that need it break");
        }
        is_over
    }

    /// Sleeps until it is time for another look, and says now and then what is waited for.
    fn next(&mut self, started: Instant, connections: usize) {
        if connections > 0 && self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            tracing::info!(family = %self.family, connections, "the mode before stays until its connections have ended");
        }
        let often = self.since.elapsed() < Duration::from_mins(1);
        let pause = if often { LOOK_OFTEN } else { LOOK_SELDOM };
        std::thread::sleep(pause.max(started.elapsed() * SHARE).min(LOOK_SELDOM));
    }
}
