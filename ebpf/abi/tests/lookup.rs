//! The lookup over maps held in memory.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use shunt_ebpf_abi::lookup::{
    Class, Found, Judgement, Tables, choose, class, find, hairpin, judge, maglev_entry, may_pass, scale,
};
use shunt_ebpf_abi::{
    Address, Endpoint, Frontend, FrontendKey, Group, MAGLEV_SIZE, Tuple, Verdict, address_flags,
    config_flags, endpoint_flags, frontend_flags, range_owner,
};

#[derive(Default)]
struct Memory {
    frontends: BTreeMap<FrontendKey, Frontend>,
    addresses: BTreeMap<Address, u32>,
    /// Single addresses are enough here: prefixes are the kernel's business.
    ranges: BTreeSet<(u32, Address)>,
    slots: BTreeMap<u32, u32>,
    endpoints: BTreeMap<u32, Endpoint>,
    flags: u32,
    /// Frontends as they are after each of the next lookups.
    later: RefCell<VecDeque<Frontend>>,
}

impl Tables for Memory {
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        if let Some(later) = self.later.borrow_mut().pop_front() {
            return Some(later);
        }
        self.frontends.get(key).copied()
    }
    fn address(&self, address: &Address) -> u32 {
        self.addresses.get(address).copied().unwrap_or(0)
    }
    fn in_range(&self, owner: u32, address: &Address) -> bool {
        self.ranges.contains(&(owner, *address))
    }
    fn slot(&self, number: u32) -> Option<u32> {
        self.slots.get(&number).copied()
    }
    fn endpoint(&self, id: u32) -> Option<Endpoint> {
        self.endpoints.get(&id).copied()
    }
    fn maglev(&self, _group: u32, _entry: u32) -> Option<u32> {
        None
    }

    fn flags(&self) -> u32 {
        self.flags
    }
}

fn ip(text: &str) -> Address {
    text.parse::<IpAddr>().map(Address::from).unwrap_or_default()
}

fn to(address: &str, port: u16) -> FrontendKey {
    FrontendKey { address: ip(address), port: port.to_be(), protocol: 6, reserved: 0 }
}

fn of(service: u32) -> Frontend {
    Frontend { service, ..Frontend::default() }
}

/// Addresses of both families: own, cluster IP, unallocated, loopback, elsewhere.
const FAMILIES: [[&str; 5]; 2] = [
    ["192.168.0.2", "10.96.0.1", "10.96.0.9", "127.0.0.1", "8.8.8.8"],
    ["fd00::2", "fd00:96::1", "fd00:96::9", "::1", "2001:db8::8"],
];

#[test]
fn a_frontend_of_the_address_comes_before_a_node_port() {
    for [own, cluster_ip, unallocated, loopback, elsewhere] in FAMILIES {
        let served = config_flags::in_use(ip(own).is_v4());
        let mut memory = Memory { flags: config_flags::SERVICE_CIDRS | served, ..Memory::default() };
        memory.frontends.insert(to(own, 80), of(16));
        memory.frontends.insert(to(own, 80).node_port(), of(18));
        memory.frontends.insert(to(own, 30080).node_port(), of(20));
        memory.addresses.insert(ip(own), address_flags::LOCAL);
        memory.addresses.insert(ip(cluster_ip), address_flags::CLUSTER_IP);
        for address in [cluster_ip, unallocated] {
            memory.ranges.insert((range_owner::service_cidr(ip(address).is_v4()), ip(address)));
        }
        assert_eq!(find(&memory, &to(own, 80)), Found::Frontend(of(16)));
        // No node port answers on an address that was not chosen.
        assert_eq!(find(&memory, &to(own, 30080)), Found::Nothing);
        memory.addresses.insert(ip(own), address_flags::LOCAL | address_flags::NODE_PORT);
        assert_eq!(find(&memory, &to(own, 80)), Found::Frontend(of(16)));
        assert_eq!(find(&memory, &to(own, 30080)), Found::Frontend(of(20)));
        assert_eq!(find(&memory, &to(own, 30081)), Found::Nothing);
        assert_eq!(find(&memory, &to(cluster_ip, 81)), Found::UnknownPort);
        assert_eq!(find(&memory, &to(unallocated, 81)), Found::Unallocated);
        assert_eq!(find(&memory, &to(elsewhere, 30080)), Found::Nothing);
        // A node-local cache is bound to a cluster IP.
        memory.addresses.insert(ip(cluster_ip), address_flags::CLUSTER_IP | address_flags::LOCAL);
        assert_eq!(find(&memory, &to(cluster_ip, 81)), Found::Nothing);
        memory.flags = served;
        assert_eq!(find(&memory, &to(unallocated, 81)), Found::Nothing);
        memory.flags = config_flags::SERVICE_CIDRS | config_flags::in_use(!ip(own).is_v4());
        assert_eq!(find(&memory, &to(own, 80)), Found::Nothing);
        memory.flags = served;
        // The keys of node ports are no destinations.
        let any = if ip(own).is_v4() { "0.0.0.0" } else { "::" };
        assert_eq!(find(&memory, &to(any, 30080)), Found::Nothing);
        assert_eq!(find(&memory, &to(loopback, 30080)), Found::Nothing);
    }
}

#[test]
fn node_ports_on_all_local_addresses_of_one_family() {
    for (n, [own, _, _, loopback, elsewhere]) in FAMILIES.into_iter().enumerate() {
        let served = config_flags::IN_USE_V4 | config_flags::IN_USE_V6;
        let flags = [config_flags::NODE_PORTS_ALL_LOCAL_V4, config_flags::NODE_PORTS_ALL_LOCAL_V6]
            .map(|flags| flags | served);
        let mut memory = Memory { flags: flags[n], ..Memory::default() };
        memory.frontends.insert(to(own, 30080).node_port(), of(16));
        memory.addresses.insert(ip(own), address_flags::LOCAL);
        assert_eq!(find(&memory, &to(own, 30080)), Found::Frontend(of(16)));
        assert_eq!(find(&memory, &to(elsewhere, 30080)), Found::Nothing);
        assert_eq!(find(&memory, &to(loopback, 30080)), Found::Nothing);
        // Unless loopback was chosen by name.
        memory.addresses.insert(ip(loopback), address_flags::NODE_PORT);
        assert_eq!(find(&memory, &to(loopback, 30080)), Found::Frontend(of(16)));
        memory.flags = flags[1 - n];
        assert_eq!(find(&memory, &to(own, 30080)), Found::Nothing);
    }
}

#[test]
fn sources_are_of_the_first_class_that_fits() {
    for (n, [own, pod, _, loopback, elsewhere]) in FAMILIES.into_iter().enumerate() {
        let flags = [config_flags::PODS_BY_RANGE_V4, config_flags::PODS_BY_RANGE_V6];
        let mut memory = Memory::default();
        memory.addresses.insert(ip(own), address_flags::LOCAL);
        for address in [own, pod] {
            memory.ranges.insert((range_owner::pods(ip(address).is_v4()), ip(address)));
        }
        let ask = |memory: &Memory, address, by_interface| class(memory, &ip(address), by_interface);
        // Without a way to tell, nobody is a pod.
        assert_eq!(ask(&memory, pod, true), Class::Other);
        memory.flags = flags[1 - n];
        assert_eq!(ask(&memory, pod, false), Class::Other);
        memory.flags = flags[n];
        assert_eq!(ask(&memory, pod, false), Class::Pod);
        assert_eq!(ask(&memory, own, false), Class::Pod);
        assert_eq!(ask(&memory, loopback, false), Class::Node);
        assert_eq!(ask(&memory, elsewhere, true), Class::Other);
        memory.flags = config_flags::PODS_BY_INTERFACE;
        assert_eq!(ask(&memory, elsewhere, true), Class::Pod);
        assert_eq!(ask(&memory, pod, false), Class::Other);
        assert_eq!(ask(&memory, own, false), Class::Node);
    }
}

#[test]
fn verdicts_and_source_ranges() {
    let verdicts = [Verdict::forward(true, false), Verdict::REJECT, Verdict::forward(false, true)];
    let mut frontend = Frontend { verdicts, ..of(16) };
    assert_eq!(judge(&frontend, Class::Pod), Judgement::Forward { local: true, masquerade: false });
    assert_eq!(judge(&frontend, Class::Node), Judgement::Reject);
    assert_eq!(judge(&frontend, Class::Other), Judgement::Forward { local: false, masquerade: true });
    assert_eq!(judge(&of(16), Class::Other), Judgement::Drop, "what nobody filled in forwards nothing");

    let mut memory = Memory::default();
    memory.ranges.insert((16, ip("10.0.0.1")));
    memory.ranges.insert((18, ip("10.0.0.2")));
    let (vip, within, without) = (ip("1.1.1.1"), ip("10.0.0.1"), ip("10.0.0.2"));
    assert!(may_pass(&memory, &frontend, &without, &vip));
    frontend.flags = frontend_flags::SOURCE_RANGES;
    assert!(may_pass(&memory, &frontend, &within, &vip));
    assert!(!may_pass(&memory, &frontend, &without, &vip));
    assert!(!may_pass(&memory, &frontend, &vip, &vip));
    frontend.flags |= frontend_flags::ALLOW_OWN_SOURCE;
    assert!(may_pass(&memory, &frontend, &vip, &vip));
    assert!(!may_pass(&memory, &frontend, &without, &vip));
}

fn endpoint(service: u32, address: &str, flags: u16) -> Endpoint {
    Endpoint { address: ip(address), service, flags, generation: 1, ..Endpoint::default() }
}

#[test]
fn a_frontend_met_half_way_is_read_again() {
    let key = to("10.96.0.1", 80);
    let group = |base, count| Frontend { cluster: Group { base, count }, ..of(16) };
    let mut memory = Memory { flags: config_flags::IN_USE_V4, ..Memory::default() };
    memory.endpoints.insert(2, endpoint(16, "10.0.0.1", endpoint_flags::CLUSTER));
    memory.endpoints.insert(4, endpoint(18, "10.0.0.2", endpoint_flags::CLUSTER));
    memory.endpoints.insert(6, endpoint(16, "10.0.0.3", endpoint_flags::SERVING));
    memory.slots = BTreeMap::from([(0, 4), (8, 2), (9, 6)]);
    // Its extent belongs to another Service by now: the frontend leads to a new one.
    memory.frontends.insert(key, group(8, 1));
    assert_eq!(choose(&memory, &key, &group(0, 1), false, 0).map(|(id, _)| id), Some(2));
    // Then it shrinks once more: the slot holds an endpoint that is no member any more; the first one does.
    memory.later.borrow_mut().push_back(group(8, 2));
    assert_eq!(choose(&memory, &key, &group(0, 1), false, u32::MAX).map(|(id, _)| id), Some(2));
    // Nobody is left, or the frontend is gone.
    memory.slots.remove(&8);
    assert_eq!(choose(&memory, &key, &group(8, 1), false, 0), None);
    memory.frontends.clear();
    assert_eq!(choose(&memory, &key, &group(0, 1), false, 0), None);
}

#[test]
fn choices_are_even_and_in_bounds() {
    for count in [1, 2, 3, 7, 1000] {
        let step = usize::try_from(u32::MAX / 100_000).unwrap_or(1);
        let mut seen = vec![0_u32; count as usize];
        for random in (0..=u32::MAX).step_by(step) {
            seen[scale(random, count) as usize] += 1;
        }
        let (least, most) = (seen.iter().min(), seen.iter().max());
        assert!(least.zip(most).is_some_and(|(least, most)| most - least <= 2), "{least:?} to {most:?}");
    }
    assert_eq!(scale(u32::MAX, 0), 0);

    let tuple = |port: u16| Tuple { source_port: port, ..Tuple::default() };
    let entries: BTreeSet<u32> = (0..10_000).map(|port| maglev_entry(1, &tuple(port), 6)).collect();
    assert!(entries.iter().all(|e| (*e as usize) < MAGLEV_SIZE));
    // 10,000 balls into 16,381 boxes hit 7,480 on average.
    assert!((7_300..7_700).contains(&entries.len()), "{}", entries.len());
}

#[test]
fn hairpin_is_a_local_endpoint_that_reaches_itself() {
    let here = endpoint(16, "10.0.0.1", endpoint_flags::HERE);
    assert!(hairpin(&ip("10.0.0.1"), &here));
    assert!(!hairpin(&ip("10.0.0.2"), &here));
    assert!(!hairpin(&ip("10.0.0.1"), &endpoint(16, "10.0.0.1", 0)));
}
