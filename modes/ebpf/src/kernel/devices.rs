//! The node's devices and addresses, as the calling thread's network namespace has them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use shunt_ebpf_abi::{Address, Interface};

/// A device that packets pass.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Device {
    /// Its name.
    pub(super) name: String,
    /// Whether its packets have Ethernet headers.
    pub(super) ethernet: bool,
    /// What programs should know of it.
    pub(super) interface: Interface,
}

/// What there is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Devices {
    /// Devices that packets pass, by index: all but the loopback device.
    pub(super) devices: BTreeMap<u32, Device>,
    /// All addresses of the node.
    pub(super) addresses: BTreeSet<Address>,
}

impl Devices {
    /// Reads devices and addresses. `pods` says by which interface local pods are known.
    pub(super) fn read(pods: &BTreeSet<Arc<str>>) -> io::Result<Self> {
        let mut found = Self::default();
        let mut by_name: BTreeMap<String, Device> = BTreeMap::new();
        for entry in nix::ifaddrs::getifaddrs()? {
            let address = entry.address.as_ref().and_then(|address| {
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            });
            found.addresses.extend(address.map(Address::from));
            // Its processes' packets to the node's own addresses are served at sockets; answers that come
            // in with a source of its own would be martians.
            if entry.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK) {
                continue;
            }
            let device = by_name.entry(entry.interface_name).or_default();
            if let Some(link) = entry.address.as_ref().and_then(|address| address.as_link_addr()) {
                device.ethernet = link.hatype() == libc::ARPHRD_ETHER;
            }
            let interface = &mut device.interface;
            match address {
                Some(IpAddr::V4(a)) if interface.address4.is_unspecified() => {
                    interface.address4 = IpAddr::V4(a).into();
                }
                Some(IpAddr::V6(a)) if interface.address6.is_unspecified() && !a.is_unicast_link_local() => {
                    interface.address6 = IpAddr::V6(a).into();
                }
                _ => {}
            }
        }
        for (name, mut device) in by_name {
            // One that has just gone is none.
            let Ok(index) = nix::net::if_::if_nametoindex(name.as_str()) else { continue };
            if pods.iter().any(|pods| is_pods_interface(pods, &name)) {
                device.interface.flags |= Interface::POD;
            }
            found.devices.insert(index, Device { name, ..device });
        }
        Ok(found)
    }

    /// An address of the node for packets that leave by a device without one.
    pub(super) fn fallback(&self, v4: bool) -> Address {
        let of = |interface: &Interface| if v4 { interface.address4 } else { interface.address6 };
        let mut addresses = self.devices.values().map(|device| of(&device.interface));
        addresses.find(|address| !address.is_unspecified()).unwrap_or(Address::ANY)
    }
}

/// Whether only local pods send by a device: the bridge, its ports, or a device with the prefix.
fn is_pods_interface(pods: &str, name: &str) -> bool {
    match pods.split_once(' ') {
        Some(("bridge", bridge)) => name == bridge || master(name).as_deref() == Some(bridge),
        Some(("prefix", prefix)) => name.starts_with(prefix),
        _ => false,
    }
}

fn master(name: &str) -> Option<String> {
    let link = std::fs::read_link(Path::new("/sys/class/net").join(name).join("master")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}
