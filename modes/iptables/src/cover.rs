//! A few ranges in which many addresses are: comparing a packet with them costs next to nothing, so that they stand
//! before what costs more.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Most ranges.
pub const RANGES_MAX: usize = 8;

/// At most [`RANGES_MAX`] ranges, in order, in which all addresses are; these are of one family, in order. A range is
/// split as long as that leaves out three quarters of more than 256 addresses.
pub fn cover(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<IpNet> {
    let mut bits = 0;
    let addresses: Vec<u128> = addresses
        .into_iter()
        .map(|address| match address {
            IpAddr::V4(a) => (bits = 32, u128::from(a.to_bits()) << 96).1,
            IpAddr::V6(a) => (bits = 128, a.to_bits()).1,
        })
        .collect();
    let mut groups: Vec<&[u128]> = Vec::new();
    groups.extend((!addresses.is_empty()).then_some(&*addresses));
    while groups.len() < RANGES_MAX {
        let pairs = groups.iter().enumerate().filter_map(|(at, group)| Some((at, split(group, bits)?)));
        let Some((at, (left, right))) = pairs.min_by_key(|(at, _)| common(groups[*at])) else { break };
        groups.splice(at..=at, [left, right]);
    }
    groups.iter().filter_map(|group| range(*group.first()?, common(group).min(bits), bits)).collect()
}

/// How many bits all of a group have in common, which is in order.
fn common(group: &[u128]) -> u32 {
    match group {
        [first, .., last] => (first ^ last).leading_zeros(),
        _ => 128,
    }
}

/// The halves of a group, if that is worth a range more. Everything is no range: rules do not say it.
fn split(group: &[u128], bits: u32) -> Option<(&[u128], &[u128])> {
    let bit = common(group);
    if bit + 8 >= bits {
        return None;
    }
    let mask = 1_u128 << (127 - bit);
    let halves = group.split_at(group.partition_point(|address| address & mask == 0));
    let covered = |half: &[u128]| 0.5_f64.powi((common(half) - bit).cast_signed());
    (bit == 0 || covered(halves.0) + covered(halves.1) <= 0.25).then_some(halves)
}

fn range(address: u128, length: u32, bits: u32) -> Option<IpNet> {
    let address = match bits {
        32 => IpAddr::from(Ipv4Addr::from_bits((address >> 96) as u32)),
        _ => IpAddr::from(Ipv6Addr::from_bits(address)),
    };
    // The length is never more than the address has.
    Some(IpNet::new(address, length as u8).ok()?.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(addresses: &[&str]) -> Vec<String> {
        let mut addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        addresses.sort_unstable();
        cover(addresses).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_far_apart_is_told_apart() {
        assert_eq!(ranges(&[]), [""; 0]);
        assert_eq!(ranges(&["10.96.0.1"]), ["10.96.0.1/32"]);
        assert_eq!(ranges(&["10.96.0.1", "10.96.0.1", "10.96.0.2"]), ["10.96.0.0/30"]);
        assert_eq!(ranges(&["10.0.0.50", "10.43.0.1", "10.43.0.7"]), ["10.0.0.50/32", "10.43.0.0/29"]);
        assert_eq!(ranges(&["10.96.0.1", "192.168.0.1"]), ["10.96.0.1/32", "192.168.0.1/32"]);
        assert_eq!(ranges(&["fd00::1", "fd00::2", "2001:db8::1"]), ["2001:db8::1/128", "fd00::/126"]);
        // What is far apart all through is half and half.
        let spread: Vec<String> = (0..=255).map(|i| format!("{i}.0.0.1")).collect();
        assert_eq!(
            ranges(&spread.iter().map(String::as_str).collect::<Vec<_>>()),
            ["0.0.0.0/1", "128.0.0.0/1"]
        );
    }

    #[test]
    fn every_address_is_in_one_of_a_few_ranges() {
        for spread in [1, 5, 77, 1_000_003, 40_000_001] {
            let addresses: Vec<IpAddr> =
                (0..100_u32).map(|i| Ipv4Addr::from_bits(i * spread).into()).collect();
            let ranges = cover(addresses.iter().copied());
            assert!(
                (1..=RANGES_MAX).contains(&ranges.len()) && ranges.iter().all(|range| range.prefix_len() > 0)
            );
            for address in addresses {
                assert_eq!(ranges.iter().filter(|range| range.contains(&address)).count(), 1, "{address}");
            }
        }
    }
}
