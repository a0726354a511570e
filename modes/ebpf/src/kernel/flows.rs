//! The connection table of tc, when another mode takes over or is taken over from.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::{io, mem};

use shunt_core::id::IpFamily;
use shunt_core::stale::Tuple;
use shunt_ebpf_abi::{Flow, FlowKey, Tuple as Packet, map};

use super::maps::{MapError, at, now, open};
use super::sys::Table;

const SECOND: u64 = 1_000_000_000;
/// A connection that is silent for so long is forgotten, as by conntrack.
const IDLE_MAX: u64 = 86_400 * SECOND;
/// One that one side has closed, or reset.
const HALF_MAX: u64 = 60 * SECOND;
/// One in which only one side has spoken.
const OPENING_MAX: u64 = 5 * SECOND;
/// One that both sides have closed: the last packets may have to be sent again. The last second of what was seen may
/// be missing.
const LAST_MAX: u64 = 2 * SECOND;
const TCP: u8 = 6;

type Flows = BTreeMap<FlowKey, Flow>;

/// How many TCP connections of both families go on, and how those of one family look inside the node and, if that is
/// different, behind it. The others of that family are forgotten.
pub(super) fn live(folder: &Path, family: IpFamily) -> Result<(usize, Vec<Tuple>), MapError> {
    let table: Table<FlowKey, Flow> = open(folder, map::FLOWS)?;
    let (now, mut flows) = (now().map_err(at(map::FLOWS))?, Flows::new());
    table
        .read(|key, flow| {
            flows.insert(key, flow);
        })
        .map_err(at(map::FLOWS))?;
    let (live, over) = sort(&flows, now);
    let of_family = |packet: &Packet| packet.source.is_v4() == (family == IpFamily::V4);
    for keys in over.iter().filter(|keys| keys.iter().any(|key| of_family(&key.tuple))) {
        forget(&table, keys, &flows).map_err(at(map::FLOWS))?;
    }
    let of_family = live.iter().filter(|(inside, _)| of_family(inside));
    let tuples = of_family.flat_map(|(inside, live)| {
        // What has ended is none to go on with, but its ports are taken.
        Some(inside).filter(|_| live.ended != [true, true]).into_iter().chain(&live.behind)
    });
    Ok((live.len(), tuples.map(tuple).collect()))
}

/// Removes the entries of a connection, unless another flow has taken the place of one since they were read.
fn forget(table: &Table<FlowKey, Flow>, keys: &[FlowKey], read: &Flows) -> io::Result<()> {
    for key in keys {
        if table.get(key)?.as_ref() != read.get(key) {
            return Ok(());
        }
    }
    keys.iter().try_for_each(|key| table.remove(key))
}

/// Enters answers to connections of others as they are: a flow of ours takes a port that has no entry, a masqueraded one
/// where answers come in, any other where they go out.
pub(super) fn keep_off(folder: &Path, answers: &[Tuple]) -> Result<(), MapError> {
    let table: Table<FlowKey, Flow> = open(folder, map::FLOWS)?;
    let last_seen = now().map_err(at(map::FLOWS))?;
    for answer in answers {
        let tuple = packet(answer);
        let flow = Flow { tuple, last_seen, flags: Flow::REPLY, state: Flow::OPEN, ..Flow::default() };
        for hook in [FlowKey::INGRESS, FlowKey::EGRESS] {
            let key = FlowKey { tuple, protocol: TCP, hook, reserved: 0 };
            table.insert_new(key, flow).map_err(at(map::FLOWS))?;
        }
    }
    Ok(())
}

/// What the entries of a TCP connection say together. What comes in may be dropped before it leaves (netfilter does so
/// with a FIN that is the first packet it sees of a connection), so that the entries of one hook tell of an end that
/// the others do not know.
#[derive(Default)]
struct Connection {
    keys: Vec<FlowKey>,
    last_seen: u64,
    /// Whether more than its first packet was seen: from the client, from the endpoint.
    flows: [bool; 2],
    /// Whether its last one was.
    ended: [bool; 2],
    /// What packets from the client are behind the node, if that is not what they are inside. Two, where an earlier
    /// connection between the same two was masqueraded: answers to that one are still recognized.
    behind: BTreeSet<Packet>,
}

impl Connection {
    fn is_over(&self, now: u64) -> bool {
        let silent = now.saturating_sub(self.last_seen);
        silent
            > match (self.flows, self.ended) {
                (_, [true, true]) => LAST_MAX,
                ([true, true], [false, false]) => IDLE_MAX,
                ([true, true], _) => HALF_MAX,
                _ => OPENING_MAX,
            }
    }
}

/// TCP connections that go on, by what packets from the client are inside the node, and the entries of all others, those
/// of a connection together. UDP is not waited for.
fn sort(flows: &Flows, now: u64) -> (BTreeMap<Packet, Connection>, Vec<Vec<FlowKey>>) {
    let twin = |key: &FlowKey, flow: &Flow| FlowKey {
        tuple: flow.tuple.reversed(),
        hook: 1 - key.hook.min(1),
        ..*key
    };
    let (mut connections, mut over) = (BTreeMap::<Packet, Connection>::new(), Vec::new());
    for (key, flow) in flows {
        let is_reply = flow.flags & Flow::REPLY != 0;
        // Another flow may have taken the other direction's entry over.
        let other_key = twin(key, flow);
        let is_replaced = flows.get(&other_key).is_some_and(|other| twin(&other_key, other) != *key);
        // What another mode goes on with stays as it is.
        let is_others = flow.tuple == key.tuple && flow.flags == Flow::REPLY;
        if key.protocol != TCP || is_replaced || is_others {
            over.push(vec![*key]);
            continue;
        }
        let inside = if key.hook == FlowKey::INGRESS { flow.tuple } else { key.tuple };
        let inside = if is_reply { inside.reversed() } else { inside };
        let connection = connections.entry(inside).or_default();
        connection.keys.push(*key);
        connection.last_seen = connection.last_seen.max(flow.last_seen);
        connection.flows[usize::from(is_reply)] |= flow.state != Flow::OPENING;
        connection.ended[usize::from(is_reply)] |= flow.state == Flow::CLOSING;
        let behind = match (key.hook == FlowKey::EGRESS, is_reply) {
            (true, false) => flow.tuple,
            (false, true) => key.tuple.reversed(),
            _ => inside,
        };
        if behind != inside {
            connection.behind.insert(behind);
        }
    }
    connections.retain(|_, connection| {
        let is_over = connection.is_over(now);
        if is_over {
            over.push(mem::take(&mut connection.keys));
        }
        !is_over
    });
    (connections, over)
}

fn tuple(packet: &Packet) -> Tuple {
    let end = |address, port| SocketAddr::new(IpAddr::from(address), u16::from_be(port));
    Tuple {
        source: end(packet.source, packet.source_port),
        destination: end(packet.destination, packet.destination_port),
    }
}

fn packet(tuple: &Tuple) -> Packet {
    Packet {
        source: tuple.source.ip().into(),
        destination: tuple.destination.ip().into(),
        source_port: tuple.source.port().to_be(),
        destination_port: tuple.destination.port().to_be(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "198.51.100.20:40000";
    const VIP: &str = "10.96.0.10:80";
    const ENDPOINT: &str = "10.244.1.11:8080";
    const NODE: &str = "192.0.2.11:2000";
    const NOW: u64 = 1_000_000 * SECOND;

    fn from_to(source: &str, destination: &str) -> Packet {
        packet(&Tuple { source: source.parse().unwrap(), destination: destination.parse().unwrap() })
    }

    fn entry(hook: u8, from: Packet, to: Packet, flags: u16, state: u8, silent: u64) -> (FlowKey, Flow) {
        let key = FlowKey { tuple: from, protocol: TCP, hook, reserved: 0 };
        let masquerade_port = if flags & Flow::MASQUERADE == 0 { 0 } else { to.source_port };
        (key, Flow { last_seen: NOW - silent, tuple: to, flags, state, masquerade_port, ..Flow::default() })
    }

    /// A masqueraded connection: states of what comes from the client, at both hooks, and of what comes from the
    /// endpoint.
    fn masqueraded(client: [u8; 2], endpoint: [u8; 2], silent: u64) -> Flows {
        Flows::from([
            entry(FlowKey::INGRESS, from_to(CLIENT, VIP), from_to(CLIENT, ENDPOINT), 0, client[0], silent),
            entry(
                FlowKey::EGRESS,
                from_to(CLIENT, ENDPOINT),
                from_to(NODE, ENDPOINT),
                Flow::MASQUERADE,
                client[1],
                silent,
            ),
            entry(
                FlowKey::INGRESS,
                from_to(ENDPOINT, NODE),
                from_to(ENDPOINT, CLIENT),
                Flow::REPLY,
                endpoint[0],
                silent,
            ),
            entry(
                FlowKey::EGRESS,
                from_to(ENDPOINT, CLIENT),
                from_to(VIP, CLIENT),
                Flow::REPLY,
                endpoint[1],
                silent,
            ),
        ])
    }

    fn lives(flows: &Flows) -> bool {
        let (live, over) = sort(flows, NOW);
        assert_eq!(live.values().map(|c| c.keys.len()).sum::<usize>() + over.concat().len(), flows.len());
        !live.is_empty()
    }

    #[test]
    fn all_entries_of_a_connection_go_together() {
        let (open, closing, opening) = (Flow::OPEN, Flow::CLOSING, Flow::OPENING);
        for (client, endpoint, limit) in [
            ([open, open], [open, open], IDLE_MAX),
            ([closing, closing], [closing, closing], LAST_MAX),
            // The stack has dropped the last packet of one side, or of both.
            ([closing, open], [closing, closing], LAST_MAX),
            ([closing, closing], [closing, open], LAST_MAX),
            ([closing, open], [closing, open], LAST_MAX),
            ([open, open], [closing, open], HALF_MAX),
            ([closing, open], [open, open], HALF_MAX),
            ([opening, opening], [opening, opening], OPENING_MAX),
            ([open, open], [opening, opening], OPENING_MAX),
            // Refused.
            ([opening, opening], [closing, closing], OPENING_MAX),
        ] {
            for (silent, expected) in [(limit, true), (limit + 1, false)] {
                let flows = masqueraded(client, endpoint, silent);
                assert_eq!(lives(&flows), expected, "{client:?} {endpoint:?} {silent}");
            }
        }
    }

    #[test]
    fn a_connection_is_known_by_what_it_is_inside_the_node_and_behind() {
        let open = [Flow::OPEN; 2];
        let (live, over) = sort(&masqueraded(open, open, 0), NOW);
        assert!(over.is_empty(), "{over:?}");
        let all = |live: BTreeMap<Packet, Connection>| -> Vec<_> {
            live.into_iter().map(|(inside, live)| (inside, Vec::from_iter(live.behind))).collect()
        };
        assert_eq!(all(live), [(from_to(CLIENT, ENDPOINT), vec![from_to(NODE, ENDPOINT)])]);

        // The client's next connection from the same port, by a node port, has taken the answers over.
        let mut flows = masqueraded(open, open, 0);
        flows.remove(&FlowKey {
            tuple: from_to(CLIENT, ENDPOINT),
            protocol: TCP,
            hook: FlowKey::EGRESS,
            reserved: 0,
        });
        let (live, _) = sort(&flows, NOW);
        assert_eq!(all(live), [(from_to(CLIENT, ENDPOINT), vec![from_to(NODE, ENDPOINT)])]);

        // One of the node's own is translated where it leaves, only.
        let flows = Flows::from([
            entry(
                FlowKey::EGRESS,
                from_to(NODE, VIP),
                from_to(NODE, ENDPOINT),
                Flow::FROM_NODE,
                Flow::OPEN,
                0,
            ),
            entry(FlowKey::INGRESS, from_to(ENDPOINT, NODE), from_to(VIP, NODE), Flow::REPLY, Flow::OPEN, 0),
        ]);
        let (live, over) = sort(&flows, NOW);
        assert!(over.is_empty(), "{over:?}");
        assert_eq!(all(live), [(from_to(NODE, VIP), vec![from_to(NODE, ENDPOINT)])]);
    }

    #[test]
    fn what_is_replaced_or_others_or_no_tcp_is_over() {
        let mut flows = masqueraded([Flow::OPEN; 2], [Flow::OPEN; 2], 0);
        // The same client from the same port had another frontend before.
        let before = from_to(CLIENT, "10.96.0.11:80");
        let (replaced, flow) =
            entry(FlowKey::INGRESS, before, from_to(CLIENT, ENDPOINT), 0, Flow::CLOSING, SECOND);
        flows.insert(replaced, flow);
        let others = from_to(ENDPOINT, "192.0.2.11:2001");
        let (others, flow) = entry(FlowKey::INGRESS, others, others, Flow::REPLY, Flow::OPEN, 0);
        flows.insert(others, flow);
        let (key, flow) = entry(FlowKey::INGRESS, from_to(CLIENT, VIP), from_to(CLIENT, ENDPOINT), 0, 1, 0);
        let udp = FlowKey { protocol: 17, ..key };
        flows.insert(udp, flow);
        let (live, over) = sort(&flows, NOW);
        let mut over = over.concat();
        assert_eq!(live.values().map(|live| live.keys.len()).collect::<Vec<_>>(), [4]);
        over.sort();
        let mut expected = vec![replaced, others, udp];
        expected.sort();
        assert_eq!(over, expected);
    }
}
