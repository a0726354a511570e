//! The only module that touches the kernel.
//!
//! Everything is pinned under `<bpf-root>/shunt`: `maps`, `programs`, `links`. Both families share it;
//! whichever comes first makes it, the other one adopts it, and so does the next process.

mod attach;
mod clsact;
mod copy;
mod counters;
mod destroy;
mod devices;
mod diag;
mod filter;
mod flows;
mod held;
mod maglev;
mod maps;
mod migrate;
mod pins;
mod probe;
mod sweep;
mod sys;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nix::sched::{CloneFlags, setns};
use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_ebpf_abi::{Config, ServiceCounters, config_flags, size};
use shunt_mode::{Counted, KernelError, Remains, Remedy, Unsupported};

use self::attach::{AttachError, Places, Way};
use self::counters::EndpointFlows;
use self::devices::Devices;
use self::maps::{MapError, Maps};
use self::migrate::Look;
use self::pins::Pins;
use crate::op::Op;
use crate::render::unlabel;
use crate::sizes::Limits;
use crate::state::{State, parity};

/// The programs, built by `make ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../ebpf/shunt.o");

/// The calling thread's network namespace.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// What the mode needs of a kernel, in the mode's own types.
pub trait Kernel {
    /// Whether this kernel has what the mode needs.
    fn probe(&mut self) -> Result<(), Unsupported>;
    /// Makes maps and loads programs where there are none, but leads no traffic there.
    fn make_ready(&mut self) -> Result<(), KernelError>;
    /// Reads what the maps hold for the family.
    fn observe(&mut self) -> Result<State, KernelError>;
    /// Carries out operations in order. After an error those before the one that failed have their
    /// effect.
    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError>;
    /// Takes in that the node's devices or addresses have changed.
    fn refresh(&mut self) -> Result<(), KernelError>;
    /// Deletes some of what the programs have written and nobody needs any more; when to come again.
    fn sweep(&mut self, now: Instant) -> Result<Option<Instant>, KernelError>;
    /// What the programs have counted of the family's Service ports.
    fn counted(&mut self) -> Result<Vec<Counted>, KernelError>;
    /// What of both families is left; flows of the family that are over are forgotten.
    fn remains(&mut self) -> Result<Option<Remains>, KernelError>;
    /// Empties what begins flows of the family.
    fn retire(&mut self) -> Result<(), KernelError>;
    /// Lets no flow have answers with one of these tuples.
    fn keep_off(&mut self, answers: &[Tuple]) -> Result<(), KernelError>;
    /// Removes programs and maps of both families if they are there.
    fn remove(&mut self) -> Result<(), KernelError>;
}

/// Where things are, and how large.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// A bpffs: everything is pinned in its folder `shunt`.
    pub bpf_root: PathBuf,
    /// The cgroup whose processes the socket hooks serve, with those of all cgroups below; `None` for
    /// the root of the first cgroup2 that is mounted.
    pub cgroup_root: Option<PathBuf>,
    /// Most frontends, and service ids.
    pub frontends: u32,
    /// Most endpoints.
    pub endpoints: u32,
    /// Most entries of the connection table of tc; that of sockets has half as many.
    pub flows: u32,
    /// Most clients with session affinity, counted once for each Service port.
    pub clients: u32,
    /// Most groups of endpoints that are chosen by hash: 64 KiB each.
    pub maglev: u32,
    /// Seconds after which an idle established flow of TCP or SCTP is forgotten.
    pub tcp_timeout: u32,
    /// Seconds after which a flow that is opening or closing is forgotten.
    pub tcp_transient_timeout: u32,
    /// Seconds after which an idle flow of UDP is forgotten.
    pub udp_timeout: u32,
    /// Destroy sockets that the programs sent to an endpoint when it is gone.
    pub destroy_sockets: bool,
    /// Put programs at devices by filters, as where the kernel has no links for them.
    pub clsact: bool,
    /// The programs' object.
    pub object: Cow<'static, [u8]>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpf_root: "/sys/fs/bpf".into(),
            cgroup_root: None,
            frontends: size::FRONTENDS,
            endpoints: size::ENDPOINTS,
            flows: size::FLOWS,
            clients: size::AFFINITY,
            maglev: size::MAGLEV,
            tcp_timeout: Config::DEFAULT.tcp_timeout,
            tcp_transient_timeout: Config::DEFAULT.tcp_transient_timeout,
            udp_timeout: Config::DEFAULT.udp_timeout,
            destroy_sockets: false,
            clsact: false,
            object: Cow::Borrowed(OBJECT),
        }
    }
}

impl Options {
    const fn limits(&self) -> Limits {
        let Self { frontends, endpoints, flows, clients, maglev, .. } = *self;
        Limits { frontends, endpoints, flows, clients, maglev }
    }

    /// What the programs are loaded from: version of the maps' layout and a hash of the object.
    fn object_name(&self) -> String {
        held::object_name(&self.object)
    }
}

/// The kernel of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Bpf {
    family: IpFamily,
    options: Arc<Options>,
    pins: Pins,
    netns: File,
    maps: Option<Maps>,
    devices: Devices,
    /// Programs were loaded that no link has yet.
    loaded: bool,
    /// All maps are being made anew, beside those that are in use.
    replacing: bool,
    /// Limits that cannot be had, as it was logged.
    said: BTreeSet<String>,
    /// What endpoints were counted to have.
    endpoints: EndpointFlows,
}

impl Bpf {
    /// A handle for the calling thread's network namespace. Nothing is looked at yet.
    pub fn open(family: IpFamily, options: Arc<Options>) -> Result<Self, KernelError> {
        let netns = File::open(OWN_NAMESPACE).map_err(|e| failed("open network namespace", e))?;
        let pins = Pins::new(&options.bpf_root);
        Ok(Self {
            family,
            pins,
            options,
            netns,
            maps: None,
            devices: Devices::default(),
            loaded: false,
            replacing: false,
            said: BTreeSet::new(),
            endpoints: EndpointFlows::default(),
        })
    }

    /// What the programs have counted, by Service port, of both families.
    pub fn counters(&mut self) -> Result<Vec<(Arc<str>, ServiceCounters)>, KernelError> {
        let names = self.maps()?.names().map_err(of_map)?;
        let counted = counters::of_services(&self.pins.maps(), &names).map_err(of_map)?;
        Ok(names.into_values().zip(counted.into_iter().map(|(counters, _)| counters)).collect())
    }

    /// How many clients of the family are remembered for Services with session affinity, as far as their
    /// time is not over.
    pub fn affinity_clients(&mut self) -> Result<usize, KernelError> {
        let (pins, family) = (self.pins.maps(), self.family);
        self.maps()?.affinity_clients(&pins, family).map_err(of_map)
    }

    /// Remembers clients that nobody has seen, for the first Service port with session affinity.
    #[cfg(feature = "testkit")]
    pub fn remember_clients(&mut self, clients: &[std::net::IpAddr]) -> Result<(), KernelError> {
        let (pins, family) = (self.pins.maps(), self.family);
        self.maps()?.remember_clients(&pins, family, clients).map_err(of_map)
    }

    /// Runs something in the network namespace of the handle. To go there from another one takes
    /// `CAP_SYS_ADMIN`, which the agent does not have: it is there.
    fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T, KernelError> {
        let context = |error| failed("look at the node's devices", error);
        let (here, there) =
            (std::fs::metadata(OWN_NAMESPACE).map_err(context)?, self.netns.metadata().map_err(context)?);
        if (here.dev(), here.ino()) == (there.dev(), there.ino()) {
            return work().map_err(context);
        }
        let result = std::thread::scope(|scope| {
            let enter = || {
                setns(&self.netns, CloneFlags::CLONE_NEWNET)?;
                work()
            };
            scope.spawn(enter).join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        });
        result.map_err(context)
    }

    /// The maps, if they are there.
    fn open_maps(&mut self) -> Result<Option<&mut Maps>, KernelError> {
        if self.maps.as_ref().is_none_or(Maps::is_stale) {
            let folder = if self.replacing { self.pins.fresh_maps() } else { self.pins.maps() };
            self.maps = match Maps::open(&folder) {
                Ok(maps) => Some(maps),
                Err(error) if error.is_missing() => None,
                Err(error) => return Err(of_map(error)),
            };
        }
        Ok(self.maps.as_mut())
    }

    fn maps(&mut self) -> Result<&mut Maps, KernelError> {
        let missing = || KernelError {
            context: "open maps".to_owned(),
            source: "they are not there".into(),
            remedy: Remedy::Resync,
        };
        self.open_maps()?.ok_or_else(missing)
    }

    /// Loads programs and maps unless those that are there are of the same object and of the right sizes.
    fn install(&mut self) -> Result<(), KernelError> {
        self.maps = None;
        self.replacing = false;
        if self.recover()? {
            return Err(KernelError {
                context: "take maps into use".to_owned(),
                source: "a process before had begun it: now they are read again".into(),
                remedy: Remedy::Resync,
            });
        }
        let sizes = self.options.limits().maps();
        let (pins, options) = (self.pins.clone(), self.options.clone());
        let load = || attach::load(&pins, &options.object, &sizes).map_err(of_attach);
        match self.look()? {
            Look::Known { object, held, limits, fresh } => {
                self.maps = None;
                let same = object.as_deref() == Some(&*self.options.object_name());
                if fresh.is_empty() && (same || self.loaded) {
                    return Ok(());
                }
                if fresh.is_empty() {
                    load()?;
                    self.loaded = true;
                    // Programs of before may not know the filters.
                    self.fill_filters()?;
                } else {
                    self.migrate(&held, &limits, fresh)?;
                }
            }
            Look::Nothing => {
                load()?;
                self.loaded = true;
                filter::add_all(&self.pins.maps()).map_err(of_map)?;
            }
            Look::Foreign(why) => self.replace(&why)?,
        }
        let cookie = self.inside(sys::netns_cookie)?;
        let maps = self.maps()?;
        // What runs meanwhile under the programs of before goes on with what it knows of the node.
        maps.edit_config(|config| {
            *config = Config {
                flags: config.flags | config_flags::PROTECT_NODE_PORTS,
                host_netns: cookie,
                masquerade4: config.masquerade4,
                masquerade6: config.masquerade6,
                masquerade_port_min: config.masquerade_port_min,
                masquerade_port_max: config.masquerade_port_max,
                tcp_timeout: options.tcp_timeout,
                tcp_transient_timeout: options.tcp_transient_timeout,
                udp_timeout: options.udp_timeout,
                ..Config::DEFAULT
            };
        })
        .map_err(of_map)
    }

    /// Has the programs look every packet up until the flows that others than they may have written down are over, and
    /// all addresses that others may have written.
    fn fill_filters(&self) -> Result<(), KernelError> {
        let Options { tcp_timeout, tcp_transient_timeout, udp_timeout, .. } = *self.options;
        let longest = tcp_timeout.max(tcp_transient_timeout).max(udp_timeout);
        filter::fill(&self.pins.maps(), longest).map_err(of_map)?;
        filter::add_all(&self.pins.maps()).map_err(of_map)
    }

    /// The cgroup whose processes are served.
    fn cgroup(&self) -> Result<PathBuf, KernelError> {
        let found = self.options.cgroup_root.clone().or_else(probe::cgroup2);
        found.ok_or_else(|| failed("find the cgroup", io::ErrorKind::NotFound.into()))
    }

    /// Attaches the programs to the cgroup and to the devices that there are.
    fn attach(&mut self) -> Result<(), KernelError> {
        self.look_at_devices()?;
        if self.replacing {
            let family = self.family;
            // The programs that are there serve until others are in their place.
            self.maps()?.carry_out(family, &[Op::Attach]).map_err(of_map)?;
        }
        let coming = self.replacing.then(|| self.pins.coming(&held::all_maps().collect()));
        let (pins, replace) = (coming.as_ref().unwrap_or(&self.pins), self.loaded);
        if self.devices.by_index.values().any(|device| !device.ethernet) {
            attach::load_headerless(pins, &self.options.object, &self.options.limits().maps())
                .map_err(of_attach)?;
        }
        let cgroup = self.cgroup()?;
        if self.replacing {
            self.pins.begin().map_err(|e| failed("rename the folder of maps", e))?;
        }
        let places = Places { cgroup: &cgroup, devices: &self.devices.by_index, way: self.way(pins)? };
        self.inside(|| attach::attach(pins, &places, replace).map_err(io::Error::other))?;
        if self.replacing {
            self.replacing = false;
            self.inside(|| self.pins.finish())?;
        }
        if self.loaded {
            // Only now: whoever comes after a crash in between starts over.
            let name = self.options.object_name();
            self.maps()?.set_object(&name).map_err(of_map)?;
            self.loaded = false;
        }
        Ok(())
    }

    /// How programs are put at devices.
    fn way(&self, pins: &Pins) -> Result<Way, KernelError> {
        if self.options.clsact {
            return Ok(Way::Clsact);
        }
        Way::of_kernel(pins).map_err(|e| failed("ask for links at devices", e))
    }

    /// Reads devices and addresses and tells the programs.
    fn look_at_devices(&mut self) -> Result<(), KernelError> {
        let pods = self.maps()?.pods().map_err(of_map)?;
        let devices = self.inside(|| Devices::read(&pods))?;
        let options = self.options.clone();
        let maps = self.maps()?;
        let interfaces = devices.by_index.iter().map(|(index, device)| (*index, device.interface)).collect();
        maps.set_interfaces(&interfaces).map_err(of_map)?;
        maps.set_local(devices.addresses.clone()).map_err(of_map)?;
        maps.edit_config(|config| {
            config.masquerade4 = devices.fallback(true);
            config.masquerade6 = devices.fallback(false);
            (config.masquerade_port_min, config.masquerade_port_max) = devices.ports;
            config.tcp_timeout = options.tcp_timeout;
            config.tcp_transient_timeout = options.tcp_transient_timeout;
            config.udp_timeout = options.udp_timeout;
        })
        .map_err(of_map)?;
        self.devices = devices;
        Ok(())
    }
}

impl Kernel for Bpf {
    fn probe(&mut self) -> Result<(), Unsupported> {
        probe::probe(&self.options)?;
        let held = maps::object_of(&self.pins.maps()).ok().flatten();
        if held.as_deref() != Some(&*self.options.object_name()) {
            attach::prepare();
        }
        Ok(())
    }

    fn make_ready(&mut self) -> Result<(), KernelError> {
        // Most of it is the verifier's, who takes a fifth of a second.
        if matches!(self.look()?, Look::Nothing) { self.install() } else { Ok(()) }
    }

    fn observe(&mut self) -> Result<State, KernelError> {
        // Somebody may have made them anew.
        self.maps = None;
        self.replacing = false;
        let (family, name) = (self.family, self.options.object_name());
        let Look::Known { object, held, limits, fresh } = self.look()? else {
            let mut state = State::empty(family);
            state.sizes = self.options.limits().all_room();
            return Ok(state);
        };
        let changing = self.pins.is_changing();
        let maps = self.maps()?;
        let mut state = maps.observe(family).map_err(of_map)?;
        let in_use = maps.in_use(family).map_err(of_map)?;
        if !fresh.is_empty() {
            Self::resized(&mut state, &held, &limits);
        } else if in_use && object.as_deref() == Some(&*name) && !changing {
            let pods = maps.pods().map_err(of_map)?;
            self.devices = self.inside(|| Devices::read(&pods))?;
            let wanted = attach::wanted_links(&self.pins, self.way(&self.pins)?, &self.devices.by_index);
            let wanted = wanted.map_err(|e| failed("list programs", e))?;
            let held = self.inside(|| attach::held_links(&self.pins))?;
            state.installed = wanted == held;
        }
        Ok(state)
    }

    fn carry_out(&mut self, ops: &[Op]) -> Result<(), KernelError> {
        let family = self.family;
        for run in ops.chunk_by(|a, b| is_structural(a) == is_structural(b)) {
            for op in run.iter().filter(|op| is_structural(op)) {
                match op {
                    Op::Install => self.install()?,
                    _ => self.attach()?,
                }
            }
            let pods = run.iter().any(|op| matches!(op, Op::SetPods(_)));
            self.maps()?.carry_out(family, run).map_err(of_map)?;
            if pods {
                self.look_at_devices()?;
            }
        }
        let gone = if self.options.destroy_sockets { destroy::gone(ops) } else { BTreeMap::new() };
        if !gone.is_empty() {
            let own = self.netns.try_clone().map_err(|e| failed("network namespace", e))?;
            destroy::start(self.pins.maps(), own, gone);
        }
        Ok(())
    }

    fn refresh(&mut self) -> Result<(), KernelError> {
        if self.replacing || self.open_maps()?.is_none() || self.options.object_name() != self.object()? {
            return Ok(());
        }
        self.attach()
    }

    fn sweep(&mut self, now: Instant) -> Result<Option<Instant>, KernelError> {
        self.sweep_flows(now)
    }

    fn counted(&mut self) -> Result<Vec<Counted>, KernelError> {
        let family = self.family;
        let Some(maps) = self.open_maps()? else { return Ok(Vec::new()) };
        let mut names = maps.names().map_err(of_map)?;
        names.retain(|id, _| id & 1 == parity(family));
        let services = counters::of_services(&self.pins.maps(), &names).map_err(of_map)?;
        let mut endpoints = self.endpoints.read(&self.pins.maps(), parity(family)).map_err(of_map)?;
        // A name that was shortened to fit cannot be read back.
        let named = names.into_iter().zip(services).filter_map(|((counter, name), (counters, bytes))| {
            let ServiceCounters { forwarded, rejected, dropped } = counters;
            let bytes = [bytes.request, bytes.response];
            let endpoints = endpoints.remove(&counter).unwrap_or_default();
            Some(Counted { port: unlabel(&name)?, counter, forwarded, rejected, dropped, bytes, endpoints })
        });
        Ok(named.collect())
    }

    fn remains(&mut self) -> Result<Option<Remains>, KernelError> {
        let (family, pins) = (self.family, self.pins.maps());
        let Some(maps) = self.open_maps()? else { return Ok(None) };
        let serves = maps.are_in_use().map_err(of_map)?;
        match flows::live(&pins, family) {
            Ok((connections, tuples)) => {
                Ok(Some(Remains { serves, connections, tuples, ..Remains::default() }))
            }
            // Removed with the other family's.
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(of_map(error)),
        }
    }

    fn retire(&mut self) -> Result<(), KernelError> {
        let family = self.family;
        let Some(maps) = self.open_maps()? else { return Ok(()) };
        maps.carry_out(family, &[Op::Detach]).map_err(of_map)
    }

    fn keep_off(&mut self, answers: &[Tuple]) -> Result<(), KernelError> {
        if self.open_maps()?.is_none() {
            self.install()?;
        }
        flows::keep_off(&self.pins.maps(), answers).map_err(of_map)
    }

    fn remove(&mut self) -> Result<(), KernelError> {
        self.maps = None;
        self.inside(|| attach::remove_filters(&self.pins, &BTreeSet::new()))?;
        self.pins.remove().map_err(|e| failed("remove pins", e))
    }
}

impl Bpf {
    fn object(&mut self) -> Result<String, KernelError> {
        Ok(self.maps()?.object().map_err(of_map)?.unwrap_or_default())
    }
}

/// The cookie of the calling thread's network namespace: a number that no other one has or had.
pub fn network_namespace_cookie() -> io::Result<u64> {
    sys::netns_cookie()
}

const fn is_structural(op: &Op) -> bool {
    matches!(op, Op::Install | Op::Attach)
}

fn failed(context: &str, error: io::Error) -> KernelError {
    KernelError { context: context.to_owned(), source: Box::new(error), remedy: Remedy::Retry }
}

fn of_map(error: MapError) -> KernelError {
    let context = if error.is_full() { "a map is full; see the flags for its size" } else { "BPF maps" };
    // What is believed about a map that refuses is wrong.
    KernelError { context: context.to_owned(), source: Box::new(error), remedy: Remedy::Resync }
}

fn of_attach(error: AttachError) -> KernelError {
    KernelError { context: "BPF programs".to_owned(), source: Box::new(error), remedy: Remedy::Retry }
}
