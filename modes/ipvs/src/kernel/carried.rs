//! Connections that IPVS carries, as the kernel lists them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use shunt_core::id::{IpFamily, Protocol};
use xtables_tools::Namespace;

use crate::layout::Place;

/// Of the calling thread's network namespace.
const LIST: &str = "/proc/thread-self/net/ip_vs_conn";
/// States of TCP in which neither side is done.
const OPEN: [&str; 4] = ["SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT"];

/// How many TCP connections of a family go on, at places that are meant.
pub(super) fn connections(
    namespace: &Namespace,
    family: IpFamily,
    is_meant: impl Fn(Place) -> bool,
) -> io::Result<usize> {
    let list = namespace.inside(|| std::fs::read_to_string(LIST))?;
    Ok(count(family, &list, is_meant))
}

fn count(family: IpFamily, list: &str, is_meant: impl Fn(Place) -> bool) -> usize {
    let places = list.lines().filter_map(open).filter(|place| IpFamily::of(place.address) == family);
    places.filter(|place| is_meant(*place)).count()
}

/// Where the client of an open TCP connection connected to. A line has the protocol, three times address and port, the
/// state, and seconds until it is forgotten; all numbers but the last one are hexadecimal.
fn open(line: &str) -> Option<Place> {
    let fields: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
    let ["TCP", _, _, address, port, _, _, state] = fields[..] else { return None };
    if !OPEN.contains(&state) {
        return None;
    }
    let address = if address.contains(':') {
        address.parse().ok()?
    } else {
        IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?))
    };
    Some(Place { address, protocol: Protocol::Tcp, port: u16::from_str_radix(port, 16).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_connections_are_counted_by_family_and_place() {
        let list = "\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C6336414 A3B4 0A60000A 0050 0AF4010B 1F90 ESTABLISHED     899
TCP C6336414 A3B5 0A60000A 0050 0AF4010C 1F90 TIME_WAIT       118
TCP C6336414 0000 0A60000A 0050 0AF4010C 1F90 NONE            118
UDP C6336414 A3B6 0A60000A 0035 0AF4010B 0035 UDP             299
TCP C6336414 A3B7 0A60000A 0050 0AF4010B 1F90 CLOSE_WAIT       59
TCP 2001:0db8:0001:0000:0000:0000:0000:0020 A3B4 fd00:0000:0000:0000:0000:0000:0000:000a 0050 fd01:0000:0000:0000:0000:0000:0000:000b 1F90 ESTABLISHED     899
";
        assert_eq!(count(IpFamily::V4, list, |_| true), 2);
        assert_eq!(count(IpFamily::V6, list, |_| true), 1);
        assert_eq!(count(IpFamily::V4, "", |_| true), 0);
        let at = |address: &str| {
            let place = Place { address: address.parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
            move |other| place == other
        };
        assert_eq!(count(IpFamily::V4, list, at("10.96.0.10")), 2);
        assert_eq!(count(IpFamily::V4, list, at("10.96.0.11")), 0);
        assert_eq!(count(IpFamily::V6, list, at("fd00::a")), 1);
    }
}
