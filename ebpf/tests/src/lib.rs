//! Loads the committed object and fills its maps, for tests of the programs alone. The mode's own code
//! has no part in this.

pub mod cgroup;
pub mod packet;
pub mod tun;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, HashOfMaps, MapData, PerCpuArray};
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramInfo, SchedClassifier, TcAttachType,
    TestRun, TestRunOptions,
};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use shunt_ebpf_abi::{
    Address, AddressFilter, BytesBlock, Config, ENDPOINT_BLOCK, Endpoint, EndpointBlock, Event,
    FIRST_SERVICE_ID, FlowFilter, Frontend, FrontendKey, Group, Interface, MAGLEV_SIZE, MaglevTable, Peer,
    RangeKey, SERVICE_BLOCK, ServiceBlock, ServiceBytes, ServiceCounters, Verdict, config_flags,
    endpoint_flags, maglev, map,
};

/// The object that the product embeds.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!("../../shunt.o");

/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// SCTP.
pub const SCTP: u8 = 132;

/// The hooks at sockets.
pub const SOCKET_HOOKS: [&str; 10] = [
    "bind4",
    "bind6",
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];
/// The hooks at devices.
pub const DEVICE_HOOKS: [&str; 4] = ["ingress", "egress", "ingress_l3", "egress_l3"];

/// The loaded object.
#[derive(Debug)]
pub struct Loaded {
    ebpf: Ebpf,
    services: u32,
    slots: u32,
    endpoints: u32,
}

/// One Service port to be written.
#[derive(Clone, Debug)]
pub struct Service {
    /// Endpoints of the Cluster policy, with whether they run on this node.
    pub cluster: Vec<(SocketAddr, bool)>,
    /// Endpoints of the Local policy; must be among those of the Cluster policy.
    pub local: Vec<SocketAddr>,
    /// Protocol number.
    pub protocol: u8,
    /// Affinity timeout in seconds.
    pub affinity: u32,
}

impl Service {
    /// A Service port with remote endpoints.
    pub fn new(protocol: u8, endpoints: impl IntoIterator<Item = SocketAddr>) -> Self {
        let cluster = endpoints.into_iter().map(|e| (e, false)).collect();
        Self { cluster, local: Vec::new(), protocol, affinity: 0 }
    }
}

/// A Service port that was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Its id.
    pub id: u32,
    /// Ids of its endpoints.
    pub endpoints: BTreeMap<SocketAddr, u32>,
    /// What its frontends say, with verdicts of DROP.
    pub frontend: Frontend,
    protocol: u8,
}

/// The verdict that forwards to the cluster's group.
pub const FORWARD: Verdict = Verdict::forward(false, false);
/// The same with masquerade.
pub const MASQUERADE: Verdict = Verdict::forward(false, true);

/// The key of an address and port.
pub fn key(address: SocketAddr, protocol: u8) -> FrontendKey {
    FrontendKey { address: address.ip().into(), port: address.port().to_be(), protocol, reserved: 0 }
}

impl Loaded {
    /// Loads the object with small maps. All programs pass the verifier, or the error has its words.
    pub fn new() -> Result<Self> {
        Self::with_log(VerifierLogLevel::default())
    }

    /// The same with a log of the verifier.
    pub fn with_log(level: VerifierLogLevel) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for (name, size) in [
            (map::FRONTENDS, 1024),
            (map::SLOTS, 4096),
            (map::ENDPOINTS, 4096),
            (map::ADDRESSES, 1024),
            (map::AFFINITY, 1024),
            (map::SOCKETS, 4096),
            (map::FLOWS, 4096),
            (map::FRAGMENTS, 1024),
            (map::SERVICE_STATS, 16),
            (map::SERVICE_BYTES, 16),
            (map::ENDPOINT_STATS, 8),
            (map::MAGLEV, 16),
        ] {
            loader.map_max_entries(name, size);
        }
        loader.verifier_log_level(level);
        let mut ebpf = loader.load(OBJECT)?;
        for (name, program) in ebpf.programs_mut() {
            match program {
                Program::SchedClassifier(p) => p.load(),
                Program::CgroupSockAddr(p) => p.load(),
                other => return Err(anyhow!("{name} is of type {:?}", other.prog_type())),
            }
            .with_context(|| format!("load {name}"))?;
        }
        let mut loaded = Self { ebpf, services: FIRST_SERVICE_ID, slots: 0, endpoints: 2 };
        loaded.set_config(Config::DEFAULT)?;
        Ok(loaded)
    }

    /// The object as aya has it.
    pub const fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// A program at devices.
    pub fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(name).with_context(|| name.to_owned())?.try_into()?)
    }

    fn hash<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, K, V>> {
        Ok(HashMap::try_from(self.ebpf.map_mut(name).with_context(|| name.to_owned())?)?)
    }

    fn array<V: aya::Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, V>> {
        Ok(Array::try_from(self.ebpf.map_mut(name).with_context(|| name.to_owned())?)?)
    }

    /// Replaces the settings; both families are in use.
    pub fn set_config(&mut self, config: Config) -> Result<()> {
        let flags = config.flags | config_flags::IN_USE_V4 | config_flags::IN_USE_V6;
        self.set_config_as_is(Config { flags, ..config })
    }

    /// Replaces the settings; a family is in use only if they say so.
    pub fn set_config_as_is(&mut self, config: Config) -> Result<()> {
        Ok(self.array(map::CONFIG)?.set(0, config, 0)?)
    }

    /// Says what is known of an address.
    pub fn set_address(&mut self, address: IpAddr, flags: u32) -> Result<()> {
        let address = Address::from(address);
        self.let_pass(&address)?;
        Ok(self.hash(map::ADDRESSES)?.insert(address, flags, 0)?)
    }

    /// Has the programs look for elements of an address.
    pub fn let_pass(&mut self, address: &Address) -> Result<()> {
        let (word, bit) = AddressFilter::place(address);
        let mut filter = self.array::<u64>(map::ADDRESS_FILTER)?;
        let bits = filter.get(&word, 0)?;
        Ok(filter.set(word, bits | bit, 0)?)
    }

    /// Says what is known of a device.
    pub fn set_interface(&mut self, ifindex: u32, interface: Interface) -> Result<()> {
        Ok(self.hash(map::INTERFACES)?.insert(ifindex, interface, 0)?)
    }

    /// Gives a range to an owner.
    pub fn add_range(&mut self, owner: u32, address: IpAddr, length: u8) -> Result<()> {
        let key = RangeKey { owner, address: address.into() };
        let data = self.ebpf.map_mut(map::RANGES).context(map::RANGES)?;
        let mut ranges: LpmTrie<_, RangeKey, u32> = LpmTrie::try_from(data)?;
        Ok(ranges.insert(&Key::new(RangeKey::prefix(address.is_ipv4(), length), key), 1, 0)?)
    }

    /// Writes a Service port without frontends.
    pub fn add_service(&mut self, service: &Service) -> Result<Written> {
        let id = self.services;
        self.services += 2;
        let mut endpoints = BTreeMap::new();
        let mut frontend = Frontend { service: id, affinity: service.affinity, ..Frontend::default() };
        for (address, here) in &service.cluster {
            let local = service.local.contains(address);
            let flags = endpoint_flags::CLUSTER
                | endpoint_flags::SERVING
                | if local { endpoint_flags::LOCAL } else { 0 }
                | if *here { endpoint_flags::HERE } else { 0 };
            let number = self.endpoints;
            self.endpoints += 2;
            self.set_endpoint(number, *address, id, flags)?;
            endpoints.insert(*address, number);
        }
        let cluster: Vec<u32> = service.cluster.iter().map(|(a, _)| endpoints[a]).collect();
        let local: Vec<u32> = service.local.iter().map(|a| endpoints[a]).collect();
        frontend.cluster = self.add_group(&cluster)?;
        frontend.local = self.add_group(&local)?;
        Ok(Written { id, endpoints, frontend, protocol: service.protocol })
    }

    fn add_group(&mut self, ids: &[u32]) -> Result<Group> {
        let group = Group { base: self.slots, count: u32::try_from(ids.len())? };
        self.slots += group.count;
        let mut slots = self.array(map::SLOTS)?;
        for (slot, id) in (group.base..).zip(ids) {
            slots.set(slot, *id, 0)?;
        }
        Ok(group)
    }

    /// Writes one endpoint.
    pub fn set_endpoint(&mut self, id: u32, address: SocketAddr, service: u32, flags: u16) -> Result<()> {
        let endpoint = Endpoint {
            address: address.ip().into(),
            port: address.port().to_be(),
            flags,
            service,
            generation: 1,
            reserved: 0,
        };
        Ok(self.array(map::ENDPOINTS)?.set(id, endpoint, 0)?)
    }

    /// Writes a frontend of a Service port. The verdicts are for pods, the node and others.
    pub fn add_frontend(
        &mut self,
        written: &Written,
        address: SocketAddr,
        verdicts: [Verdict; 3],
        flags: u8,
    ) -> Result<()> {
        self.put_frontend(key(address, written.protocol), Frontend { verdicts, flags, ..written.frontend })
    }

    /// Writes a node port of a Service port, of the family of `any`.
    pub fn add_node_port(
        &mut self,
        written: &Written,
        any: IpAddr,
        port: u16,
        verdicts: [Verdict; 3],
    ) -> Result<()> {
        let key = key(SocketAddr::new(any, port), written.protocol).node_port();
        self.put_frontend(key, Frontend { verdicts, ..written.frontend })
    }

    /// Writes a frontend.
    pub fn put_frontend(&mut self, key: FrontendKey, frontend: Frontend) -> Result<()> {
        self.let_pass(&key.address)?;
        Ok(self.hash(map::FRONTENDS)?.insert(key, frontend, 0)?)
    }

    /// Gives a group of a Service port its Maglev table.
    pub fn set_maglev(&mut self, written: &Written, local: bool, seed: u32) -> Result<()> {
        let members = written.endpoints.iter().map(|(address, id)| {
            maglev::Member::new(seed, *id, &address.ip().into(), address.port().to_be())
        });
        let mut table: Box<MaglevTable> =
            vec![0; MAGLEV_SIZE].into_boxed_slice().try_into().map_err(|_| anyhow!("size of the table"))?;
        maglev::fill(&mut members.collect::<Vec<_>>(), &mut table);
        let mut inner: Array<MapData, MaglevTable> = Array::create(1, 0)?;
        inner.set(0, *table, 0)?;
        let data = self.ebpf.map_mut(map::MAGLEV).context(map::MAGLEV)?;
        let mut outer: HashOfMaps<_, u32, Array<MapData, MaglevTable>> = HashOfMaps::try_from(data)?;
        Ok(outer.insert(Group::id(written.id, local), &inner, 0)?)
    }

    /// All elements of a hash map that programs write.
    pub fn dump<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Result<Vec<(K, V)>> {
        let map: HashMap<_, K, V> = self.hash(name)?;
        Ok(map.iter().collect::<Result<_, _>>()?)
    }

    /// Replaces an element of a hash map that programs write.
    pub fn put<K: aya::Pod, V: aya::Pod>(&mut self, name: &str, key: K, value: V) -> Result<()> {
        Ok(self.hash(name)?.insert(key, value, 0)?)
    }

    /// The filter in front of the connection table.
    pub fn flow_filter(&mut self) -> Result<Vec<FlowFilter>> {
        Ok(self.array(map::FLOW_FILTER)?.iter().collect::<Result<_, _>>()?)
    }

    /// Replaces the filter.
    pub fn set_flow_filter(&mut self, filter: &[FlowFilter]) -> Result<()> {
        let mut array = self.array::<FlowFilter>(map::FLOW_FILTER)?;
        for (number, block) in (0..).zip(filter) {
            array.set(number, block, 0)?;
        }
        Ok(())
    }

    /// Replaces the filter by one with the same in all entries.
    pub fn fill_flow_filter(&mut self, until: u16) -> Result<()> {
        self.set_flow_filter(&vec![FlowFilter::filled(until); FlowFilter::BLOCKS as usize])
    }

    /// What the socket with a cookie was promised when it connected.
    pub fn peer(&mut self, cookie: u64) -> Result<Option<Peer>> {
        let peer: Peer = self.array(map::PEERS)?.get(&Peer::place(cookie), 0)?;
        Ok(Some(peer).filter(|peer| peer.cookie == cookie))
    }

    /// Puts another socket's record in the place of a socket's.
    pub fn forget_peer(&mut self, cookie: u64) -> Result<()> {
        let other = Peer { cookie: cookie + u64::from(shunt_ebpf_abi::size::PEERS), ..Peer::default() };
        Ok(self.array(map::PEERS)?.set(Peer::place(cookie), other, 0)?)
    }

    /// Counters of a Service.
    pub fn service_stats(&mut self, id: u32) -> Result<ServiceCounters> {
        let data = self.ebpf.map(map::SERVICE_STATS).context(map::SERVICE_STATS)?;
        let map: PerCpuArray<_, ServiceBlock> = PerCpuArray::try_from(data)?;
        let all = map.get(&(id / SERVICE_BLOCK), 0)?;
        let all = all.iter().map(|block| block[(id % SERVICE_BLOCK) as usize]);
        Ok(all.fold(ServiceCounters::default(), |sum, c| ServiceCounters {
            forwarded: sum.forwarded + c.forwarded,
            rejected: sum.rejected + c.rejected,
            dropped: sum.dropped + c.dropped,
        }))
    }

    /// Bytes of a Service that programs at devices have seen.
    pub fn service_bytes(&mut self, id: u32) -> Result<ServiceBytes> {
        let data = self.ebpf.map(map::SERVICE_BYTES).context(map::SERVICE_BYTES)?;
        let map: PerCpuArray<_, BytesBlock> = PerCpuArray::try_from(data)?;
        let all = map.get(&(id / SERVICE_BLOCK), 0)?;
        let all = all.iter().map(|block| block[(id % SERVICE_BLOCK) as usize]);
        Ok(all.fold(ServiceBytes::default(), |sum, b| ServiceBytes {
            request: sum.request + b.request,
            response: sum.response + b.response,
        }))
    }

    /// New flows of an endpoint.
    pub fn endpoint_stats(&mut self, id: u32) -> Result<u64> {
        let data = self.ebpf.map(map::ENDPOINT_STATS).context(map::ENDPOINT_STATS)?;
        let map: PerCpuArray<_, EndpointBlock> = PerCpuArray::try_from(data)?;
        let all = map.get(&(id / ENDPOINT_BLOCK), 0)?;
        Ok(all.iter().map(|block| block[(id % ENDPOINT_BLOCK) as usize]).sum())
    }

    /// How often something happened.
    pub fn events(&mut self, event: Event) -> Result<u64> {
        let data = self.ebpf.map(map::EVENTS).context(map::EVENTS)?;
        let map: PerCpuArray<_, u64> = PerCpuArray::try_from(data)?;
        Ok(map.get(&(event as u32), 0)?.iter().sum())
    }

    /// Runs a program at devices over a packet, without a device: what it returns, and the packet then.
    pub fn run(&mut self, program: &str, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        test_run(self.classifier(program)?, packet)
    }

    /// The error of the kernel when a program at sockets is to be run over a packet; 0 if it does.
    pub fn test_run_error(&mut self, name: &str) -> Result<i32> {
        const BPF_PROG_TEST_RUN: nix::libc::c_long = 10;
        let program: &mut CgroupSockAddr =
            self.ebpf.program_mut(name).context(name.to_owned())?.try_into()?;
        // The program's descriptor and zeroes: no data, no context, once.
        let mut attr = [0_u32; 20];
        attr[0] = program.fd()?.as_fd().as_raw_fd().cast_unsigned();
        // SAFETY: `attr` is `union bpf_attr` as far as this command looks at it, and outlives the call.
        #[allow(unsafe_code)]
        let result = unsafe {
            nix::libc::syscall(nix::libc::SYS_bpf, BPF_PROG_TEST_RUN, attr.as_mut_ptr(), size_of_val(&attr))
        };
        if result >= 0 {
            return Ok(0);
        }
        std::io::Error::last_os_error().raw_os_error().context("an error")
    }

    /// Attaches all hooks at sockets to a cgroup; they are gone with `self`.
    pub fn attach_sockets(&mut self, cgroup: &File) -> Result<()> {
        for name in SOCKET_HOOKS {
            let program: &mut CgroupSockAddr = self.ebpf.program_mut(name).context(name)?.try_into()?;
            // Links always allow others beside them; a flag that says so is refused.
            program.attach(cgroup.as_fd(), CgroupAttachMode::Single)?;
        }
        Ok(())
    }

    /// Attaches both hooks to a device of the calling thread's namespace, by TCX where the kernel has it. They are gone
    /// with `self`.
    pub fn attach_device(&mut self, name: &str) -> Result<()> {
        self.attach(name, ["ingress", "egress"], has_tcx())
    }

    /// The same for a device without Ethernet headers.
    pub fn attach_device_l3(&mut self, name: &str) -> Result<()> {
        self.attach(name, ["ingress_l3", "egress_l3"], has_tcx())
    }

    /// The same as [`Loaded::attach_device`] in the way of kernels before 6.6.
    pub fn attach_device_clsact(&mut self, name: &str) -> Result<()> {
        self.attach(name, ["ingress", "egress"], false)
    }

    fn attach(&mut self, name: &str, programs: [&str; 2], tcx: bool) -> Result<()> {
        if !tcx {
            qdisc_add_clsact(name).with_context(|| format!("clsact at {name}"))?;
        }
        for (program, direction) in programs.into_iter().zip([TcAttachType::Ingress, TcAttachType::Egress]) {
            let how = if tcx {
                TcAttachOptions::TcxOrder(LinkOrder::default())
            } else {
                TcAttachOptions::Netlink(NlOptions::default())
            };
            self.classifier(program)?
                .attach_with_options(name, direction, how)
                .with_context(|| format!("attach {program} to {name}"))?;
        }
        Ok(())
    }
}

/// Whether the kernel has links at devices.
fn has_tcx() -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0))
}

/// Makes tests of functions that return a `Result`: each runs in the machine's own kernel, and those before
/// `here only:` once more, one after the other, in the oldest kernel that is supported: the guest's.
///
/// ```ignore
/// in_both_kernels!(packets_are_forwarded; here only: connections_of_netfilter_go_on);
/// ```
#[macro_export]
macro_rules! in_both_kernels {
    ($($test:ident),+ $(,)? $(; here only: $($here:ident),+ $(,)?)?) => {
        mod own_kernel {
            $crate::in_both_kernels!(@own $($test,)+ $($($here,)+)?);
        }
        mod oldest_kernel {
            #[test]
            fn takes_it_all() {
                shunt_harness::guest::test_in_guest(module_path!(), "takes_it_all", || {
                    $(println!("{}", stringify!($test)); super::$test().unwrap();)+
                });
            }
        }
    };
    (@own $($test:ident,)+) => {
        $(#[test] fn $test() -> anyhow::Result<()> {
            if shunt_harness::lab::require_kernel() { super::$test() } else { Ok(()) }
        })+
    };
}

/// Programs at devices that somebody has loaded and pinned.
#[derive(Debug)]
pub struct Pinned {
    programs: PathBuf,
}

impl Pinned {
    /// Those in a folder.
    pub fn new(programs: impl Into<PathBuf>) -> Self {
        Self { programs: programs.into() }
    }

    /// The same as [`Loaded::run`], in the calling thread's network namespace.
    pub fn run(&self, program: &str, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        test_run(&SchedClassifier::from_pin(self.programs.join(program))?, packet)
    }
}

fn test_run(program: &SchedClassifier, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
    let mut out = vec![0; packet.len() + 256];
    let mut options = TestRunOptions::new();
    options.data_in = Some(packet);
    options.data_out = Some(&mut out);
    let result = program.test_run(options)?;
    out.truncate(result.data_size_out as usize);
    Ok((result.return_value.cast_signed(), out))
}

/// What the kernel calls the instructions of a pinned program: a hash of them.
pub fn tag(program: &Path) -> Result<u64> {
    Ok(ProgramInfo::from_pin(program)?.tag())
}
