//! Connections that IPVS carries, as the kernel lists them.

use std::io;

use shunt_core::id::IpFamily;

/// Of the calling thread's network namespace.
const LIST: &str = "/proc/thread-self/net/ip_vs_conn";
/// States of TCP in which neither side is done.
const OPEN: [&str; 4] = ["SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT"];

/// How many TCP connections of a family go on.
pub(super) fn connections(family: IpFamily) -> io::Result<usize> {
    Ok(count(family, &std::fs::read_to_string(LIST)?))
}

/// Protocol, three times address and port, state, seconds until it is forgotten; all numbers but the last one in
/// hexadecimal.
fn count(family: IpFamily, list: &str) -> usize {
    let is_open = |line: &&str| {
        let mut fields = line.split_ascii_whitespace();
        let (protocol, client, state) = (fields.next(), fields.next(), fields.nth(5));
        let of_family = client.is_some_and(|client| client.contains(':') == (family == IpFamily::V6));
        protocol == Some("TCP") && of_family && state.is_some_and(|state| OPEN.contains(&state))
    };
    list.lines().filter(is_open).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_connections_are_counted_by_family() {
        let list = "\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C6336414 A3B4 0A60000A 0050 0AF4010B 1F90 ESTABLISHED     899
TCP C6336414 A3B5 0A60000A 0050 0AF4010C 1F90 TIME_WAIT       118
TCP C6336414 0000 0A60000A 0050 0AF4010C 1F90 NONE            118
UDP C6336414 A3B6 0A60000A 0035 0AF4010B 0035 UDP             299
TCP C6336414 A3B7 0A60000A 0050 0AF4010B 1F90 CLOSE_WAIT       59
TCP 2001:0db8:0001:0000:0000:0000:0000:0020 A3B4 fd00:0000:0000:0000:0000:0000:0000:000a 0050 fd01:0000:0000:0000:0000:0000:0000:000b 1F90 ESTABLISHED     899
";
        assert_eq!(count(IpFamily::V4, list), 2);
        assert_eq!(count(IpFamily::V6, list), 1);
        assert_eq!(count(IpFamily::V4, ""), 0);
    }
}
