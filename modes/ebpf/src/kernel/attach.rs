//! Programs and their links: pinned, adopted by the next process, replaced under their links.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;

use aya::programs::links::{FdLink, LinkError};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{CgroupAttachMode, LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use shunt_ebpf_abi::map;

use super::clsact::{self, Filters};
use super::devices::Device;
use super::pins::{Pins, names, remove_folder};
use super::sys;
use crate::sizes::MapSizes;

/// Why programs cannot be loaded or attached.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    /// A file or link could not be used.
    #[error("{0}: {1}")]
    Io(String, #[source] io::Error),
    /// The object was refused.
    #[error("load the programs: {0}")]
    Load(#[from] aya::EbpfError),
    /// A program was refused.
    #[error("program {0}: {1}")]
    Program(String, #[source] aya::programs::ProgramError),
    /// A link could not be used.
    #[error("link of {0}: {1}")]
    Link(String, #[source] LinkError),
    /// Something could not be pinned.
    #[error("pin {0}: {1}")]
    Pin(String, #[source] aya::pin::PinError),
}

pub(super) fn io_at(what: impl Into<String>) -> impl FnOnce(io::Error) -> AttachError {
    move |error| AttachError::Io(what.into(), error)
}

/// Loads the object over the maps that are pinned, pins those that are not, and loads and pins its programs, in
/// place of those pinned before; those of [`load_headerless`] when they are asked for.
pub(super) fn load(pins: &Pins, object: &[u8], sizes: &MapSizes) -> Result<(), AttachError> {
    pins.make()?;
    let mut object = open_object(pins, object, sizes)?;
    let size = sizes.get(map::NAMES).copied().unwrap_or(shunt_ebpf_abi::size::FRONTENDS);
    super::maps::pin_names(&pins.map(map::NAMES), size).map_err(io_at(map::NAMES))?;
    for name in HEADERLESS {
        let path = pins.programs().join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(AttachError::Io(path.display().to_string(), error));
            }
            _ => {}
        }
    }
    load_programs(pins, &mut object, |name| !HEADERLESS.contains(&name))
}

/// Loads and pins the programs for devices without Ethernet headers, unless that was done since [`load`]. The verifier
/// takes as long for them as for all others, and many nodes have no such device.
pub(super) fn load_headerless(pins: &Pins, object: &[u8], sizes: &MapSizes) -> Result<(), AttachError> {
    let pinned = names(&pins.programs()).map_err(io_at(pins.programs().display().to_string()))?;
    if HEADERLESS.iter().all(|name| pinned.contains(*name)) {
        return Ok(());
    }
    load_programs(pins, &mut open_object(pins, object, sizes)?, |name| HEADERLESS.contains(&name))
}

/// Programs for devices without Ethernet headers.
const HEADERLESS: [&str; 2] = ["ingress_l3", "egress_l3"];

/// A loader reads the kernel's own types when it is made, which takes 20 MiB for a moment. The programs need none of
/// them, but there is no other way to have one.
static LOADER: LazyLock<Mutex<EbpfLoader<'static>>> = LazyLock::new(|| {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    sys::return_memory();
    Mutex::new(loader)
});

/// Makes the loader ahead of time, while there is little else in memory.
pub(super) fn prepare() {
    thread::spawn(|| LazyLock::force(&LOADER));
}

/// Opens the object over the maps that are pinned; pins those that are not.
fn open_object(pins: &Pins, object: &[u8], sizes: &MapSizes) -> Result<Ebpf, AttachError> {
    let mut loader = LOADER.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, size) in sizes.iter().filter(|(name, _)| OBJECT_MAPS.contains(name)) {
        loader.map_max_entries(name, *size);
    }
    for name in OBJECT_MAPS {
        loader.map_pin_path(name, pins.map(name));
    }
    Ok(loader.load(object)?)
}

/// Maps of the object.
const OBJECT_MAPS: [&str; 19] = [
    map::CONFIG,
    map::FRONTENDS,
    map::SLOTS,
    map::ENDPOINTS,
    map::ADDRESSES,
    map::RANGES,
    map::INTERFACES,
    map::MAGLEV,
    map::AFFINITY,
    map::SOCKETS,
    map::PEERS,
    map::FLOWS,
    map::FLOW_FILTER,
    map::ADDRESS_FILTER,
    map::FRAGMENTS,
    map::SERVICE_STATS,
    map::SERVICE_BYTES,
    map::ENDPOINT_STATS,
    map::EVENTS,
];

/// Loads and pins programs, all at the same time: nearly all of the time is the verifier's, which looks at a program on
/// the CPU that asks.
fn load_programs(pins: &Pins, object: &mut Ebpf, which: impl Fn(&str) -> bool) -> Result<(), AttachError> {
    thread::scope(|scope| {
        let programs = object.programs_mut().filter(|(name, _)| which(name));
        let loads = programs.map(|(name, program)| scope.spawn(|| load_program(pins, name, program)));
        // All are begun before the first is waited for.
        let loads: Vec<_> = loads.collect();
        loads.into_iter().try_for_each(|load| {
            let panicked = |_| Err(AttachError::Io("load".to_owned(), io::Error::other("a thread panicked")));
            load.join().unwrap_or_else(panicked)
        })
    })
}

fn load_program(pins: &Pins, name: &str, program: &mut Program) -> Result<(), AttachError> {
    let refused = |error| AttachError::Program(name.to_owned(), error);
    match program {
        Program::CgroupSockAddr(program) => uninterrupted(|| program.load()).map_err(refused)?,
        Program::SchedClassifier(program) => uninterrupted(|| program.load()).map_err(refused)?,
        _ => return Ok(()),
    }
    // A pin cannot be replaced: the new one is made beside, then takes the name.
    let (path, beside) = (pins.programs().join(name), pins.programs().join(format!("{name}-new")));
    let _ = std::fs::remove_file(&beside);
    program.pin(&beside).map_err(|error| AttachError::Pin(name.to_owned(), error))?;
    std::fs::rename(&beside, &path).map_err(io_at(path.display().to_string()))
}

/// The verifier gives up with EAGAIN when a signal waits for the thread (`bpf_check` in kernel/bpf/verifier.c); like
/// libbpf, whose number of attempts this is, tries again.
fn uninterrupted(mut load: impl FnMut() -> Result<(), ProgramError>) -> Result<(), ProgramError> {
    for _ in 1..5 {
        match load() {
            Err(ProgramError::LoadError { io_error, .. }) if io_error.kind() == io::ErrorKind::WouldBlock => {
            }
            result => return result,
        }
    }
    load()
}

/// The kind of a program by its name in the object.
#[derive(Clone, Copy, Debug)]
enum Hook {
    Cgroup(aya::programs::CgroupSockAddrAttachType),
    Tc(TcAttachType),
}

const HOOKS: [(&str, Hook); 12] = {
    use aya::programs::CgroupSockAddrAttachType as At;
    [
        ("connect4", Hook::Cgroup(At::Connect4)),
        ("connect6", Hook::Cgroup(At::Connect6)),
        ("sendmsg4", Hook::Cgroup(At::UDPSendMsg4)),
        ("sendmsg6", Hook::Cgroup(At::UDPSendMsg6)),
        ("recvmsg4", Hook::Cgroup(At::UDPRecvMsg4)),
        ("recvmsg6", Hook::Cgroup(At::UDPRecvMsg6)),
        ("getpeername4", Hook::Cgroup(At::GetPeerName4)),
        ("getpeername6", Hook::Cgroup(At::GetPeerName6)),
        ("bind4", Hook::Cgroup(At::Bind4)),
        ("bind6", Hook::Cgroup(At::Bind6)),
        // Flows begin at ingress: what leaves must be translated by then, at whatever device.
        ("egress", Hook::Tc(TcAttachType::Egress)),
        ("ingress", Hook::Tc(TcAttachType::Ingress)),
    ]
};

/// How programs are put at devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// By links.
    Tcx,
    /// By filters ([`clsact`]): before Linux 6.6.
    Clsact,
}

impl Way {
    /// What the kernel can, asked by a trial: whoever has links misses the device that there is not, others
    /// do not know what is meant.
    pub(super) fn of_kernel(pins: &Pins) -> io::Result<Self> {
        let program = sys::open_pinned(&pins.programs().join("ingress"))?;
        Ok(if sys::has_tcx(program.as_fd()) { Self::Tcx } else { Self::Clsact })
    }
}

/// What there is to attach to, and how.
#[derive(Debug)]
pub(super) struct Places<'a> {
    /// Its processes are served, with those of all cgroups below.
    pub(super) cgroup: &'a Path,
    /// Devices by index.
    pub(super) devices: &'a BTreeMap<u32, Device>,
    /// How programs are put at these.
    pub(super) way: Way,
}

/// Whether links or filters lead traffic to programs.
pub(super) fn is_attached(pins: &Pins) -> io::Result<bool> {
    Ok(!held_links(pins)?.is_empty())
}

/// Makes the links that are missing: at the cgroup, and at each device. Those of devices that are gone are
/// removed. With `replace`, links that are there get the pinned programs in place of theirs.
pub(super) fn attach(pins: &Pins, places: &Places<'_>, replace: bool) -> Result<(), AttachError> {
    let links = held_links(pins).map_err(io_at(pins.links().display().to_string()))?;
    let mut filters = match places.way {
        Way::Tcx => None,
        Way::Clsact => Some(Filters::open(&pins.notes).map_err(io_at("clsact"))?),
    };
    let programs = names(&pins.programs()).map_err(io_at(pins.programs().display().to_string()))?;
    let mut wanted = BTreeSet::new();
    for (name, hook) in HOOKS.iter().filter(|(name, _)| programs.contains(*name)) {
        match hook {
            Hook::Cgroup(at) => {
                wanted.insert((*name).to_owned());
                if links.contains(*name) {
                    if replace {
                        update(pins, name, name)?;
                    }
                } else {
                    attach_cgroup(pins, name, *at, places.cgroup)?;
                }
            }
            Hook::Tc(at) => {
                for (index, device) in places.devices {
                    let link = device_link(places.way, name, *index);
                    let program = if device.ethernet { (*name).to_owned() } else { format!("{name}_l3") };
                    if let Some(filters) = &mut filters {
                        if replace || !links.contains(&link) {
                            let attached = filters.attach(*index, name, &pins.programs().join(&program));
                            if attached.is_err() && is_gone(&device.name) {
                                continue;
                            }
                            attached.map_err(io_at(format!("{program} at {}", device.name)))?;
                        }
                    } else if links.contains(&link) {
                        if replace {
                            update(pins, &program, &link)?;
                        }
                    } else {
                        attach_device(pins, &program, &link, *at, &device.name, LinkOrder::first())?;
                    }
                    wanted.insert(link);
                }
            }
        }
    }
    let but = if filters.is_some() { places.devices.keys().copied().collect() } else { BTreeSet::new() };
    remove_filters(pins, &but).map_err(io_at("clsact"))?;
    for gone in links.difference(&wanted).filter(|name| !name.starts_with("clsact-")) {
        let path = pins.links().join(gone);
        std::fs::remove_file(&path).map_err(io_at(path.display().to_string()))?;
    }
    Ok(())
}

/// The name of what puts a program at a device.
fn device_link(way: Way, hook: &str, index: u32) -> String {
    match way {
        Way::Tcx => format!("{hook}-{index}"),
        Way::Clsact => clsact::name(hook, index),
    }
}

/// Names of links and filters that there are.
pub(super) fn held_links(pins: &Pins) -> io::Result<BTreeSet<String>> {
    let mut held = pins.link_names()?;
    if pins.notes.exists() {
        held.extend(Filters::open(&pins.notes)?.held()?);
    }
    Ok(held)
}

/// Removes filters from all devices but some.
pub(super) fn remove_filters(pins: &Pins, but: &BTreeSet<u32>) -> io::Result<()> {
    if !pins.notes.exists() {
        return Ok(());
    }
    Filters::open(&pins.notes)?.remove(but)?;
    if but.is_empty() { remove_folder(&pins.notes) } else { Ok(()) }
}

/// The links that there should be.
pub(super) fn wanted_links(
    pins: &Pins,
    way: Way,
    devices: &BTreeMap<u32, Device>,
) -> io::Result<BTreeSet<String>> {
    let programs = names(&pins.programs())?;
    let hooks = HOOKS.iter().filter(|(name, _)| programs.contains(*name));
    Ok(hooks
        .flat_map(|(name, hook)| match hook {
            Hook::Cgroup(_) => vec![(*name).to_owned()],
            Hook::Tc(_) => devices.keys().map(|index| device_link(way, name, *index)).collect(),
        })
        .collect())
}

fn update(pins: &Pins, program: &str, link: &str) -> Result<(), AttachError> {
    let at = |path: &Path| {
        let text = path.display().to_string();
        sys::open_pinned(path).map_err(io_at(text))
    };
    let link = pins.links().join(link);
    let (held, new) = (at(&link)?, at(&pins.programs().join(program))?);
    sys::update_link(held.as_fd(), new.as_fd()).map_err(io_at(link.display().to_string()))
}

fn attach_cgroup(
    pins: &Pins,
    name: &str,
    at: aya::programs::CgroupSockAddrAttachType,
    cgroup: &Path,
) -> Result<(), AttachError> {
    let refused = |error| AttachError::Program(name.to_owned(), error);
    let path = pins.programs().join(name);
    let mut program = aya::programs::CgroupSockAddr::from_pin(path, at).map_err(refused)?;
    let folder = File::open(cgroup).map_err(io_at(cgroup.display().to_string()))?;
    let id = program.attach(folder.as_fd(), CgroupAttachMode::Single).map_err(refused)?;
    let link = program.take_link(id).map_err(refused)?;
    pin_link(pins, name, link.try_into())
}

/// Leads traffic to programs that come with other flow tables: from now on they see each packet before those that
/// go, and those still see what only they know.
///
/// A flow has entries for several hooks. So that those which old programs have made and those which new ones have made
/// are found at every hook at any time, the new programs come behind the old ones first, everywhere, and do nothing
/// there but serve flows that new programs elsewhere have begun; then once more before them. `catch_up` is called in
/// between. Sockets have no order: there the old programs come once more behind themselves, and the new ones take the
/// place of the first. What a process before has done of it is not done again.
pub(super) fn put_before(
    pins: &Pins,
    coming: &Pins,
    places: &Places<'_>,
    catch_up: impl FnOnce() -> Result<(), AttachError>,
) -> Result<(), AttachError> {
    let held = pins.link_names().map_err(io_at(pins.links().display().to_string()))?;
    for folder in [coming.front().links(), coming.behind().links()] {
        std::fs::create_dir_all(&folder).map_err(io_at(folder.display().to_string()))?;
    }
    let devices = |pins: &Pins, order: fn() -> LinkOrder| {
        for (name, hook) in HOOKS {
            let Hook::Tc(at) = hook else { continue };
            for (index, device) in places.devices {
                let link = device_link(Way::Tcx, name, *index);
                if held.contains(&link) && !pins.links().join(&link).exists() {
                    let program = if device.ethernet { name.to_owned() } else { format!("{name}_l3") };
                    attach_device(pins, &program, &link, at, &device.name, order())?;
                }
            }
        }
        Ok(())
    };
    devices(&coming.back(), LinkOrder::last)?;
    // Those that look up what others write are the first to look into the new maps, too.
    let mut at_sockets = HOOKS;
    at_sockets.sort_by_key(|(name, _)| !(name.starts_with("recvmsg") || name.starts_with("getpeername")));
    let again = pins.behind();
    for (name, hook) in at_sockets {
        if let Hook::Cgroup(at) = hook
            && held.contains(name)
            && !again.links().join(name).exists()
        {
            attach_cgroup(&again, name, at, places.cgroup)?;
        }
    }
    catch_up()?;
    for (name, hook) in at_sockets {
        if matches!(hook, Hook::Cgroup(_)) && held.contains(name) {
            update(coming, name, name)?;
        }
    }
    devices(&coming.front(), LinkOrder::first)
}

fn is_gone(device: &str) -> bool {
    nix::net::if_::if_nametoindex(device).is_err()
}

fn attach_device(
    pins: &Pins,
    name: &str,
    link_name: &str,
    at: TcAttachType,
    device: &str,
    order: LinkOrder,
) -> Result<(), AttachError> {
    let refused = |error| AttachError::Program(format!("{name} at {device}"), error);
    let mut program = SchedClassifier::from_pin(pins.programs().join(name)).map_err(refused)?;
    let id = match program.attach_with_options(device, at, TcAttachOptions::TcxOrder(order)) {
        // Gone meanwhile: the next look at the devices will not find it.
        Err(_) if is_gone(device) => return Ok(()),
        attached => attached.map_err(refused)?,
    };
    let link = program.take_link(id).map_err(refused)?;
    pin_link(pins, link_name, link.try_into())
}

fn pin_link(pins: &Pins, name: &str, link: Result<FdLink, LinkError>) -> Result<(), AttachError> {
    let link = link.map_err(|error| AttachError::Link(name.to_owned(), error))?;
    link.pin(pins.links().join(name)).map_err(|error| AttachError::Pin(name.to_owned(), error))?;
    Ok(())
}
