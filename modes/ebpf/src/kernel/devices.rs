//! The node's devices and addresses, as the calling thread's network namespace has them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use shunt_ebpf_abi::{Address, Config, Interface};

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
    pub(super) by_index: BTreeMap<u32, Device>,
    /// All addresses of the node.
    pub(super) addresses: BTreeSet<Address>,
    /// First and last port for masqueraded packets.
    pub(super) ports: (u16, u16),
}

impl Devices {
    /// Reads devices and addresses. `pods` says by which interface local pods are known.
    pub(super) fn read(pods: &BTreeSet<Arc<str>>) -> io::Result<Self> {
        // Shows that of the thread's network namespace.
        let local = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
        let mut found = Self { ports: masquerade_ports(&local), ..Self::default() };
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
            found.by_index.insert(index, Device { name, ..device });
        }
        Ok(found)
    }

    /// An address of the node for packets that leave by a device without one.
    pub(super) fn fallback(&self, v4: bool) -> Address {
        let of = |interface: &Interface| if v4 { interface.address4 } else { interface.address6 };
        let mut addresses = self.by_index.values().map(|device| of(&device.interface));
        addresses.find(|address| !address.is_unspecified()).unwrap_or(Address::ANY)
    }
}

/// Ports for masqueraded packets: apart from those that the kernel gives to the node's own sockets
/// (`ip_local_port_range`), for a packet from there would be one and the same with theirs, and below those
/// of node ports. Without enough room on either side the two share the most of what there is.
fn masquerade_ports(local: &str) -> (u16, u16) {
    const LEAST: u16 = 2048;
    let default = (Config::DEFAULT.masquerade_port_min, Config::DEFAULT.masquerade_port_max);
    let mut numbers = local.split_whitespace().filter_map(|number| number.parse::<u16>().ok());
    let (Some(first), Some(last)) = (numbers.next(), numbers.next()) else { return default };
    let below = (default.0, default.1.min(first.saturating_sub(1)));
    let above = (last.saturating_add(1), u16::MAX);
    let room = |(first, last): (u16, u16)| last.saturating_sub(first);
    match (room(below) >= LEAST, room(above) >= LEAST) {
        (true, _) => below,
        (false, true) => above,
        (false, false) => {
            tracing::warn!(
                "ip_local_port_range {} leaves no ports for masqueraded packets: now and then one will meet a port of the node's own",
                local.trim()
            );
            default
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masqueraded_packets_keep_off_the_ports_of_sockets() {
        assert_eq!(masquerade_ports("32768\t60999\n"), (1024, 29_999));
        assert_eq!(masquerade_ports("10000\t65535\n"), (1024, 9999));
        assert_eq!(masquerade_ports("1024\t50000\n"), (50_001, 65_535));
        assert_eq!(masquerade_ports("1024\t65535\n"), (1024, 29_999));
        assert_eq!(masquerade_ports(""), (1024, 29_999));
    }

    #[test]
    fn interfaces_of_pods() {
        assert!(is_pods_interface("prefix veth", "veth1") && !is_pods_interface("prefix veth", "eth0"));
        assert!(is_pods_interface("bridge cni0", "cni0") && !is_pods_interface("bridge cni0", "cni1"));
        assert!(!is_pods_interface("", "cni0"));
    }
}
