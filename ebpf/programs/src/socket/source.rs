//! What a socket will send from, as far as that is known before the kernel has chosen.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use shunt_ebpf_abi::lookup::is_local;
use shunt_ebpf_abi::{Address, Endpoint, Flow, FlowKey, FrontendKey, Tuple};

use super::{Call, Family};
use crate::filter::mark;
use crate::maps::FLOWS;
use crate::tables::Kernel;

impl Call<'_> {
    /// The address that the socket is bound to; the unspecified one where it is bound to none.
    #[inline(always)]
    fn bound_address(&self) -> Address {
        // SAFETY: the verifier knows the context and its socket, which is always there; words are read one by one,
        // as it asks.
        unsafe {
            let socket = (&raw const (*self.raw()).__bindgen_anon_1.sk).read_volatile();
            match self.family {
                Family::V4 => Address::v4((&raw const (*socket).src_ip4).read_volatile()),
                Family::V6 => Address([
                    (&raw const (*socket).src_ip6[0]).read_volatile(),
                    (&raw const (*socket).src_ip6[1]).read_volatile(),
                    (&raw const (*socket).src_ip6[2]).read_volatile(),
                    (&raw const (*socket).src_ip6[3]).read_volatile(),
                ]),
            }
        }
    }

    /// The port that the socket is bound to, network byte order; 0 where it is bound to none.
    #[inline(always)]
    fn bound_port(&self) -> u16 {
        // SAFETY: as above.
        unsafe {
            let socket = (&raw const (*self.raw()).__bindgen_anon_1.sk).read_volatile();
            ((&raw const (*socket).src_port).read_volatile() as u16).to_be()
        }
    }

    /// The source of what the socket sends to `destination`: the address that it is bound to, or, on the node, the
    /// destination itself where that is one of the node's own. The unspecified address where it is not known yet.
    #[inline(always)]
    pub(super) fn source(&self, kernel: &Kernel, on_node: bool, destination: &Address) -> Address {
        let bound = self.bound_address();
        if bound.is_unspecified() && on_node && is_local(kernel, destination) { *destination } else { bound }
    }
}

/// Sees to it that what leaves the node from a socket that is bound to an address and a port is masqueraded: tc finds
/// the flow as if it had come in by a device. A socket that is not bound is given a node address by the kernel.
#[inline(always)]
pub(super) fn masquerade(
    kernel: &Kernel,
    call: &Call<'_>,
    key: &FrontendKey,
    id: u32,
    endpoint: &Endpoint,
    service: u32,
) {
    let (source, port) = (call.bound_address(), call.bound_port());
    let node = if source.is_v4() { &kernel.config.masquerade4 } else { &kernel.config.masquerade6 };
    if port == 0 || source.is_unspecified() || source.is_loopback() || source.same(node) {
        return;
    }
    let tuple =
        Tuple { source, destination: endpoint.address, source_port: port, destination_port: endpoint.port };
    let flow_key = FlowKey { tuple, protocol: key.protocol, hook: FlowKey::EGRESS, reserved: 0 };
    // SAFETY: the helper reads a clock.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    mark(kernel, &tuple, now);
    let flow = Flow {
        last_seen: now,
        tuple,
        service,
        endpoint: id,
        generation: endpoint.generation,
        flags: Flow::MASQUERADE,
        state: Flow::OPENING,
        reserved: 0,
        masquerade_port: 0,
        reserved2: 0,
    };
    // Without an entry it leaves as it is.
    let _ = FLOWS.insert(&flow_key, &flow, BPF_ANY.into());
}
