//! Most packets that a node forwards concern no Service: those of pods whose sockets are served go to an endpoint
//! from the start. They are told from others by a look at their first bytes, without the connection table.

use shunt_ebpf_abi::lookup::{Found, find};
use shunt_ebpf_abi::{Address, Fragment, FrontendKey};

use super::ETHERNET_HEADER;
use super::frame::{Frame, Skb};
use super::packet::{ICMP, Ip4AndPorts, Ip6AndPorts, begins, has_ports, is_error, kind_at};
use crate::filter::have_no_flow;
use crate::tables::Kernel;

/// Whether the packet goes on as it is: it has no flow, and, where it may begin one, goes to no Service. Whoever looks
/// closely at other packets finds the same. For packets that do not, `now` may be set to what the clock says.
#[inline(always)]
pub(crate) fn passes<const ETHERNET: bool>(skb: Skb, v4: bool, may_begin: bool, now: &mut u64) -> bool {
    if ETHERNET {
        judge(skb, ETHERNET_HEADER, v4, may_begin, now).unwrap_or(false)
    } else {
        headerless(skb, v4, may_begin, now) != 0
    }
}

/// Without an Ethernet header the IP header is read byte by byte, which takes more of the stack than is left to one
/// function.
#[inline(never)]
fn headerless(skb: Skb, v4: bool, may_begin: bool, now: &mut u64) -> u32 {
    u32::from(judge(skb, 0, v4, may_begin, now).unwrap_or(false))
}

/// `None` for packets that take a closer look: options, fragments, errors, pieces.
#[inline(always)]
fn judge(skb: Skb, l3: u32, v4: bool, may_begin: bool, now: &mut u64) -> Option<bool> {
    if v4 {
        let Ip4AndPorts { ip, ports } = skb.peek(l3, 0)?;
        if !ip.is_plain() {
            return None;
        }
        if !has_ports(ip.protocol) {
            return Some(ip.protocol != ICMP || !is_error(true, skb.peek(l3, 20)?));
        }
        let (source, destination) = (Address::v4(ip.source), Address::v4(ip.destination));
        Some(concerns_nobody(skb, l3, 20, ip.protocol, &source, &destination, ports, may_begin, now))
    } else {
        let Ip6AndPorts { ip, ports } = skb.peek(l3, 0)?;
        if !has_ports(ip.next) || !ip.is_sound() {
            return None;
        }
        let (source, destination) = (Address(ip.source), Address(ip.destination));
        Some(concerns_nobody(skb, l3, 40, ip.next, &source, &destination, ports, may_begin, now))
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)] // Inlined; a structure would be built on the stack.
fn concerns_nobody(
    skb: Skb,
    l3: u32,
    header: u32,
    protocol: u8,
    source: &Address,
    destination: &Address,
    ports: Fragment,
    may_begin: bool,
    now: &mut u64,
) -> bool {
    if !have_no_flow(source, destination, now) {
        return false;
    }
    if !may_begin {
        return true;
    }
    if let Some(at) = kind_at(protocol) {
        let Some(kind) = skb.peek::<u8>(l3, header + at) else { return false };
        if !begins(protocol, kind) {
            return true;
        }
    }
    let key = FrontendKey { address: *destination, port: ports.destination_port, protocol, reserved: 0 };
    Kernel::open().is_some_and(|kernel| matches!(find(&kernel, &key), Found::Nothing))
}
