//! Connections that IPVS carries, as the kernel lists them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use shunt_core::id::{IpFamily, Protocol};
use shunt_core::stale::Tuple;
use xtables_tools::Namespace;

use crate::layout::Place;

/// Of the calling thread's network namespace.
const LIST: &str = "/proc/thread-self/net/ip_vs_conn";
/// States of TCP in which neither side is done.
const OPEN: [&str; 4] = ["SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT"];

/// TCP connections of a family that IPVS knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Carried {
    /// How many go on.
    pub open: usize,
    /// What IPVS takes for answers to one, which may have ended: for two minutes it looks at nothing else then, neither
    /// at flags nor at where the client connected to (`ip_vs_conn_out_get`).
    pub answers: Vec<Tuple>,
}

/// Those at places that are meant.
pub(super) fn connections(
    namespace: &Namespace,
    family: IpFamily,
    is_meant: impl Fn(Place) -> bool,
) -> io::Result<Carried> {
    let list = namespace.inside(|| std::fs::read_to_string(LIST))?;
    Ok(read(family, &list, is_meant))
}

fn read(family: IpFamily, list: &str, is_meant: impl Fn(Place) -> bool) -> Carried {
    let mut carried = Carried::default();
    let connections = list.lines().filter_map(connection);
    for (place, answer, is_open) in connections.filter(|(place, ..)| IpFamily::of(place.address) == family) {
        if is_meant(place) {
            carried.open += usize::from(is_open);
            carried.answers.push(answer);
        }
    }
    carried
}

/// Where the client of a TCP connection connected to, how answers to it come, and whether it goes on. A line has the
/// protocol, three times address and port (client, place, endpoint), the state, and seconds until it is forgotten; all
/// numbers but the last one are hexadecimal.
fn connection(line: &str) -> Option<(Place, Tuple, bool)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().take(8).collect();
    let ["TCP", client, client_port, at, port, endpoint, endpoint_port, state] = fields[..] else {
        return None;
    };
    let end = |address: &str, port| {
        let address = if address.contains(':') {
            address.parse().ok()?
        } else {
            IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?))
        };
        Some(SocketAddr::new(address, u16::from_str_radix(port, 16).ok()?))
    };
    let at = end(at, port)?;
    let answer = Tuple { source: end(endpoint, endpoint_port)?, destination: end(client, client_port)? };
    let place = Place { address: at.ip(), protocol: Protocol::Tcp, port: at.port() };
    Some((place, answer, OPEN.contains(&state)))
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
        let count = |family, list, is_meant: &dyn Fn(Place) -> bool| read(family, list, is_meant).open;
        assert_eq!(count(IpFamily::V4, list, &|_| true), 2);
        assert_eq!(count(IpFamily::V6, list, &|_| true), 1);
        assert_eq!(count(IpFamily::V4, "", &|_| true), 0);
        let at = |address: &str| {
            let place = Place { address: address.parse().unwrap(), protocol: Protocol::Tcp, port: 80 };
            move |other| place == other
        };
        assert_eq!(count(IpFamily::V4, list, &at("10.96.0.10")), 2);
        assert_eq!(count(IpFamily::V4, list, &at("10.96.0.11")), 0);
        assert_eq!(count(IpFamily::V6, list, &at("fd00::a")), 1);
    }
    #[test]
    fn answers_are_known_for_ended_connections_too() {
        let list = "\
TCP C6336414 A3B4 0A60000A 0050 0AF4010B 1F90 ESTABLISHED     899
TCP C6336414 A3B5 0A60000A 0050 0AF4010C 1F90 TIME_WAIT       118
TCP C6336414 A3B5 0A60000A 0050 0AF4010C 
UDP C6336414 A3B6 0A60000A 0035 0AF4010B 0035 UDP             299
TCP 2001:db8:1::20 A3B4 fd00::a 0050 fd01::b 1F90 TIME_WAIT 3
";
        let answer = |source: &str, destination: &str| Tuple {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        assert_eq!(
            read(IpFamily::V4, list, |_| true).answers,
            [
                answer("10.244.1.11:8080", "198.51.100.20:41908"),
                answer("10.244.1.12:8080", "198.51.100.20:41909")
            ]
        );
        assert_eq!(
            read(IpFamily::V6, list, |_| true).answers,
            [answer("[fd01::b]:8080", "[2001:db8:1::20]:41908")]
        );
        assert_eq!(read(IpFamily::V4, list, |_| false), Carried::default());
    }
}
