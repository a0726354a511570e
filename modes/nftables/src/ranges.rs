//! Ranges of plain addresses as the kernel keeps them: a start and an end for each.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use nft_netlink::Element;
use shunt_core::id::IpFamily;

use crate::layout::{self, KeyReader};

/// The range from `from` to `to`, if it is one prefix.
pub(crate) fn range_between(from: IpAddr, to: IpAddr) -> Option<IpNet> {
    let full = if from.is_ipv4() { 32 } else { 128 };
    (0..=full)
        .filter_map(|len| IpNet::new(from, len).ok())
        .find(|net| net.network() == from && net.broadcast() == to)
}

/// The elements that make up ranges of plain addresses: each range is a start and, unless it reaches
/// the last address, an end that is the first address after it.
pub fn range_elements(range: &IpNet) -> Vec<Element> {
    let key = |a: IpAddr| layout::Key::default().address(a).done();
    let mut elements = vec![Element::new(key(range.network()))];
    if let Some(end) = next_address(range.broadcast()) {
        elements.push(Element { interval_end: true, ..Element::new(key(end)) });
    }
    elements
}

fn next_address(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|a| IpAddr::V4(a.into())),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|a| IpAddr::V6(a.into())),
    }
}

/// Reads ranges back from the elements of their set; the second list is what makes no sense.
pub fn ranges_of(family: IpFamily, elements: &[Element]) -> (BTreeSet<IpNet>, Vec<Element>) {
    let address = |e: &Element| KeyReader::new(&e.key).address(family);
    let mut sorted: Vec<(IpAddr, bool, &Element)> =
        elements.iter().filter_map(|e| Some((address(e)?, !e.interval_end, e))).collect();
    sorted.sort_by_key(|(address, start, _)| (*address, *start));
    let (mut ranges, mut strays) = (BTreeSet::new(), Vec::new());
    let mut open: Option<(IpAddr, &Element)> = None;
    for (at, is_start, element) in sorted {
        match (is_start, open.take()) {
            (true, before) => {
                strays.extend(before.map(|(_, e)| e.clone()));
                open = Some((at, element));
            }
            (false, Some((from, start))) => match previous_address(at).and_then(|to| range_between(from, to))
            {
                Some(range) => {
                    ranges.insert(range);
                }
                None => strays.extend([start.clone(), element.clone()]),
            },
            // The first element of the kernel's tree of ranges: "nothing before the first one".
            (false, None) if at.is_unspecified() => {}
            (false, None) => strays.push(element.clone()),
        }
    }
    if let Some((from, start)) = open {
        let last: IpAddr = match family {
            IpFamily::V4 => std::net::Ipv4Addr::BROADCAST.into(),
            IpFamily::V6 => std::net::Ipv6Addr::from(u128::MAX).into(),
        };
        match range_between(from, last) {
            Some(range) => {
                ranges.insert(range);
            }
            None => strays.push(start.clone()),
        }
    }
    (ranges, strays)
}

fn previous_address(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_sub(1).map(|a| IpAddr::V4(a.into())),
        IpAddr::V6(a) => u128::from(a).checked_sub(1).map(|a| IpAddr::V6(a.into())),
    }
}
