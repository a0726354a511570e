//! Every packet of every case through the very programs and maps that ebpf mode makes of the case, by
//! `BPF_PROG_TEST_RUN`: no device, no server, each byte of what comes out is looked at.
//!
//! The kernel runs programs at devices so, those at sockets not ([`the_kernel_test_runs_no_program_at_sockets`]):
//! `ebpf_sockets.rs` covers them with processes in cgroups.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result, anyhow, ensure};
use shunt_core::id::IpFamily;
use shunt_core::walk::Outcome;
use shunt_ebpf_tests::Pinned;
use shunt_ebpf_tests::packet::{Packet, Seen, read};
use shunt_harness::cases::{self, Case, CasePacket, SourceKind};
use shunt_harness::lab::{Lab, require_kernel};
use shunt_mode::Backend;
use shunt_suites::driver::{CaseRun, adopt};
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::{EbpfMode, ModeUnderTest};

/// `TC_ACT_UNSPEC`: the next program, or the stack.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const DROPPED: i32 = 2;
/// `TC_ACT_REDIRECT`.
const REDIRECTED: i32 = 7;

/// Most packets for one of a case: of two endpoints, one is missed once in 2^63 runs.
const TRIES: usize = 64;

/// A node's programs, and who the node is.
struct Node<'a> {
    programs: Pinned,
    addresses: &'a [IpAddr],
    /// The next source port: every packet begins a flow of its own. None is among those that masqueraded packets
    /// get: a process of the node whose port one of these has would get another one.
    port: AtomicU16,
}

impl Node<'_> {
    /// The first packet of a flow as a case describes it.
    fn packet(&self, of: &CasePacket) -> Packet {
        let port = self.port.fetch_add(1, Ordering::Relaxed);
        let source = SocketAddr::new(of.packet.source, port);
        let destination = SocketAddr::new(of.packet.destination, of.packet.port);
        Packet::new(source, destination, of.packet.protocol.number())
    }

    /// A packet of a process of the node leaves by a device; others come in first, and leave later.
    fn begins_at(of: &CasePacket) -> &'static str {
        if of.source_kind == SourceKind::Node { "egress" } else { "ingress" }
    }

    /// What is to become of the packet becomes of it.
    fn check(&self, of: &CasePacket, affinity: bool) -> Result<()> {
        match &of.expect {
            Outcome::Forward(endpoints) => {
                let wanted: BTreeSet<SocketAddr> = endpoints.iter().map(|(e, _)| *e).collect();
                let reached =
                    (0..TRIES).map(|_| self.forwarded(of, endpoints)).collect::<Result<BTreeSet<_>>>()?;
                let expected = if affinity { 1 } else { wanted.len() };
                ensure!(reached.len() == expected, "reached {reached:?} of {wanted:?}");
            }
            Outcome::Reject => {
                let packet = self.packet(of);
                let (action, out) = self.programs.run(Self::begins_at(of), &packet.bytes())?;
                ensure!(action == REDIRECTED, "not refused: action {action}");
                let error = read(&out)?;
                let kind = if packet.source.is_ipv4() { [3, 3] } else { [1, 4] };
                let header = if packet.source.is_ipv4() { 20 } else { 40 };
                ensure!(
                    out[14 + header..][..2] == kind,
                    "not port unreachable: {:?}",
                    &out[14 + header..][..2]
                );
                let ends = (error.source.ip(), error.destination.ip());
                ensure!(ends == (packet.destination.ip(), packet.source.ip()), "the error goes {ends:?}");
                let quoted = error.quoted.context("an error quotes")?;
                ensure!(ends_of(&quoted) == (packet.source, packet.destination), "it quotes {quoted:?}");
            }
            Outcome::Drop => {
                let (action, _) = self.programs.run(Self::begins_at(of), &self.packet(of).bytes())?;
                ensure!(action == DROPPED, "not dropped: action {action}");
            }
            Outcome::None => {
                let packet = self.packet(of).bytes();
                let (action, out) = self.programs.run(Self::begins_at(of), &packet)?;
                ensure!((action, &out) == (NEXT, &packet), "not left alone: action {action}");
            }
        }
        Ok(())
    }

    /// Sends a packet to one of the endpoints, and its answer back.
    fn forwarded(&self, of: &CasePacket, endpoints: &[(SocketAddr, bool)]) -> Result<SocketAddr> {
        let question = self.packet(of);
        let from_node = of.source_kind == SourceKind::Node;
        let (action, mut out) = self.programs.run(Self::begins_at(of), &question.bytes())?;
        // The node's own packets were routed to the frontend: they may be sent on from there.
        ensure!(action == NEXT || from_node && action == REDIRECTED, "not forwarded: action {action}");
        if !from_node {
            let inside = read(&out)?;
            ensure!(inside.source.ip() == question.source.ip(), "the stack sees it from {}", inside.source);
            out = self.pass("egress", &out)?;
        }
        let sent = read(&out)?;
        let masquerade = endpoints.iter().find(|(e, _)| *e == sent.destination).map(|(_, m)| *m);
        let masquerade =
            masquerade.with_context(|| format!("sent to {}, not to {endpoints:?}", sent.destination))?;
        let by_node = self.addresses.contains(&sent.source.ip());
        ensure!(
            if masquerade { by_node } else { sent.source == question.source },
            "masquerade {masquerade}, but the endpoint sees {}",
            sent.source
        );
        let answer = Packet::new(sent.destination, sent.source, sent.protocol).flags(question.answer().flags);
        let mut back = self.pass("ingress", &answer.bytes())?;
        if !from_node {
            back = self.pass("egress", &back)?;
        }
        let back = ends_of(&read(&back)?);
        ensure!(back == (question.destination, question.source), "the answer goes {back:?}");
        Ok(sent.destination)
    }

    fn pass(&self, program: &str, packet: &[u8]) -> Result<Vec<u8>> {
        let (action, out) = self.programs.run(program, packet)?;
        ensure!(action == NEXT, "{program} returned {action}");
        Ok(out)
    }
}

const fn ends_of(seen: &Seen) -> (SocketAddr, SocketAddr) {
    (seen.source, seen.destination)
}

/// Runs a case; answers how many packets, and what went wrong.
fn run_case(case: &Case) -> Result<(usize, Vec<String>)> {
    let lab = Lab::builder().node(case.node_ips.iter().copied()).build()?;
    let mut kernels = Vec::new();
    for family in IpFamily::ALL {
        kernels.push((family, adopt::<EbpfMode>(lab.node(), family)?));
    }
    let pins = lab.node().run(place::options)?.bpf_root.join("shunt/programs");
    let node = Node { programs: Pinned::new(pins), addresses: &case.node_ips, port: AtomicU16::new(30_000) };
    let (mut packets, mut failures) = (0, Vec::new());
    let mut run = CaseRun::new(case, EbpfMode::MODE);
    while let Some(step) = run.next_step() {
        for (family, kernel) in &mut kernels {
            let change = run.cluster.take_change(*family);
            kernel.sync(run.cluster.table(*family), &change)?;
        }
        let at_devices = |packet: &&CasePacket| {
            // A process that talks from one of the node's addresses to the same one sends nothing to a device.
            let inside = matches!(packet.source_kind, SourceKind::LbVip | SourceKind::Loopback);
            packet.modes.contains(&EbpfMode::MODE) && !inside
        };
        for packet in step.packets.iter().filter(at_devices) {
            packets += 1;
            let affinity = run.cluster.has_affinity(&packet.packet);
            if let Err(error) = lab.node().run(|| node.check(packet, affinity)) {
                failures.push(format!("{}: {error:#}", step.describe(packet)));
            }
        }
    }
    for (_, kernel) in &mut kernels {
        kernel.backend.cleanup()?;
    }
    Ok((packets, failures))
}

#[test]
fn packets_of_the_cases_meet_their_fate() {
    if !require_kernel() {
        return;
    }
    let (mut packets, mut failures) = (0, Vec::new());
    for case in cases::all().unwrap().iter().filter(|case| case.modes.contains(&EbpfMode::MODE)) {
        match run_case(case) {
            Ok((of_case, wrong)) => {
                packets += of_case;
                failures.extend(wrong);
            }
            Err(error) => failures.push(format!("{}: {:#}", case.name, anyhow!(error))),
        }
    }
    println!("{packets} packets");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(packets > 250, "only {packets} packets were run");
}

/// `cg_sock_addr_prog_ops` has no `test_run` (net/core/filter.c): when a kernel has it one day, the programs at
/// sockets can be tested so, too.
#[test]
fn the_kernel_test_runs_no_program_at_sockets() {
    const ENOTSUPP: i32 = 524;
    if !require_kernel() {
        return;
    }
    let mut loaded = shunt_ebpf_tests::Loaded::new().unwrap();
    for hook in shunt_ebpf_tests::SOCKET_HOOKS {
        assert_eq!(loaded.test_run_error(hook).unwrap(), ENOTSUPP, "{hook}");
    }
}
