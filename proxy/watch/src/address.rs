//! IP addresses and ranges as Kubernetes has always read them ("sloppily").
//!
//! Old clusters hold addresses that today's parsers refuse or read as something else. Kubernetes
//! reads `010.0.0.1` as 10.0.0.1 (decimal, not octal; `netutils.ParseIPSloppy`) and treats
//! `::ffff:1.2.3.4` as the IPv4 address 1.2.3.4.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Reads an address; IPv4-mapped ones come out as IPv4.
pub(crate) fn parse_ip(text: &str) -> Option<IpAddr> {
    Some(match parse_any(text)? {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    })
}

/// Reads a range; bits beyond the prefix are cleared, mapped IPv4 ranges come out as IPv4.
pub(crate) fn parse_net(text: &str) -> Option<IpNet> {
    let (address, length) = text.split_once('/')?;
    // Go's parser takes digits only: no sign, no blank.
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let length: u8 = length.parse().ok()?;
    Some(match parse_any(address)? {
        IpAddr::V4(v4) => IpNet::V4(Ipv4Net::new(v4, length).ok()?.trunc()),
        IpAddr::V6(v6) => match (v6.to_ipv4_mapped(), length) {
            (Some(v4), 96..=128) => IpNet::V4(Ipv4Net::new(v4, length - 96).ok()?.trunc()),
            _ => IpNet::V6(Ipv6Net::new(v6, length).ok()?.trunc()),
        },
    })
}

fn parse_any(text: &str) -> Option<IpAddr> {
    if !text.contains(':') {
        return parse_v4(text).map(IpAddr::V4);
    }
    // An IPv4 tail may have leading zeros too: `::ffff:010.0.0.1`.
    let text: Cow<'_, str> = match text.rsplit_once(':') {
        Some((head, tail)) if tail.contains('.') => Cow::Owned(format!("{head}:{}", parse_v4(tail)?)),
        _ => Cow::Borrowed(text),
    };
    text.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

fn parse_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_kubernetes_reads_them() {
        for (text, want) in [
            ("10.0.0.1", Some("10.0.0.1")),
            ("010.000.00.01", Some("10.0.0.1")),
            ("192.168.010.8", Some("192.168.10.8")),
            ("0000010.0.0.1", Some("10.0.0.1")),
            ("::ffff:1.2.3.4", Some("1.2.3.4")),
            ("::ffff:001.2.3.4", Some("1.2.3.4")),
            ("::ffff:0102:0304", Some("1.2.3.4")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("2001:DB8:0:0::1", Some("2001:db8::1")),
            ("::1.2.3.4", Some("::102:304")),
            ("10.0.0", None),
            ("10.0.0.1.2", None),
            ("10.0.0.256", None),
            ("10.0.0.+1", None),
            (" 10.0.0.1", None),
            ("10.0.0.1 ", None),
            ("fe80::1%eth0", None),
            ("", None),
            ("None", None),
            ("a.b.c.d", None),
            ("10..0.1", None),
            ("１.2.3.4", None),
        ] {
            assert_eq!(parse_ip(text), want.map(|w| w.parse().unwrap()), "{text:?}");
        }
    }

    #[test]
    fn ranges_are_read_as_kubernetes_reads_them() {
        for (text, want) in [
            ("10.0.0.0/8", Some("10.0.0.0/8")),
            ("010.1.2.3/8", Some("10.0.0.0/8")),
            ("0.0.0.0/0", Some("0.0.0.0/0")),
            ("::/0", Some("::/0")),
            ("fd00::1/64", Some("fd00::/64")),
            ("::ffff:1.2.3.4/120", Some("1.2.3.0/24")),
            ("::ffff:1.2.3.4/95", Some("::fffe:0:0/95")),
            ("10.0.0.1", None),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0/", None),
            ("10.0.0.0/999", None),
            ("fd00::/129", None),
            ("/8", None),
        ] {
            assert_eq!(parse_net(text), want.map(|w| w.parse().unwrap()), "{text:?}");
        }
    }
}
