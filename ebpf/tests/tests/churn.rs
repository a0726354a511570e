//! Two Services change as fast as they can be written, by the rules of `shunt_ebpf_abi`, while packets ask
//! for them: nobody is sent to the other one's endpoint, or to one that is gone.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, MapData};
use shunt_ebpf_abi::{Endpoint, Event, Frontend, FrontendKey, Group, endpoint_flags, map};
use shunt_ebpf_tests::packet::{Packet, read};
use shunt_ebpf_tests::{FORWARD, Loaded, UDP, key};
use shunt_harness::lab::require_kernel;

const EXTENT: u32 = 8;
const PACKETS: u32 = 15_000;

/// Numbers by chance, the same every time (xorshift).
struct Chance(u32);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0 as usize % n
    }
}

struct Writer {
    frontends: HashMap<MapData, FrontendKey, Frontend>,
    slots: Array<MapData, u32>,
    endpoints: Array<MapData, Endpoint>,
    free_extents: Vec<u32>,
    /// Ids with what is in their entries.
    free_ids: Vec<(u32, Endpoint)>,
    chance: Chance,
}

/// What a Service has now.
struct Now {
    service: u32,
    key: FrontendKey,
    /// The second byte of its endpoints' addresses.
    mark: u8,
    base: u32,
    /// Ids with what is in their entries.
    ids: Vec<(u32, Endpoint)>,
}

impl Writer {
    fn add_endpoint(&mut self, now: &Now) -> Result<(u32, Endpoint)> {
        let at = self.chance.below(self.free_ids.len());
        let (id, Endpoint { generation, .. }) = self.free_ids.swap_remove(at);
        let address = IpAddr::from([10, now.mark, 0, self.chance.below(250) as u8]);
        let endpoint = Endpoint {
            address: address.into(),
            port: 8080_u16.to_be(),
            flags: endpoint_flags::CLUSTER | endpoint_flags::SERVING,
            service: now.service,
            generation: generation + 1,
            reserved: 0,
        };
        if generation > 0 {
            self.endpoints.set(id, Endpoint { service: 0, ..endpoint }, 0)?;
        }
        self.endpoints.set(id, endpoint, 0)?;
        Ok((id, endpoint))
    }

    fn remove_endpoint(&mut self, (id, endpoint): (u32, Endpoint)) -> Result<()> {
        let free = Endpoint { service: 0, ..endpoint };
        self.endpoints.set(id, free, 0)?;
        self.free_ids.push((id, free));
        Ok(())
    }

    fn publish(&mut self, now: &Now) -> Result<()> {
        let cluster = Group { base: now.base, count: u32::try_from(now.ids.len())? };
        let tag = now.key.tag();
        let frontend =
            Frontend { service: now.service, cluster, verdicts: [FORWARD; 3], tag, ..Frontend::default() };
        Ok(self.frontends.insert(now.key, frontend, 0)?)
    }

    fn step(&mut self, now: &mut Now) -> Result<()> {
        let at = self.chance.below(now.ids.len());
        match self.chance.below(4) {
            0 if now.ids.len() < EXTENT as usize => {
                let id = self.add_endpoint(now)?;
                self.slots.set(now.base + u32::try_from(now.ids.len())?, id.0, 0)?;
                now.ids.push(id);
                self.publish(now)
            }
            1 if now.ids.len() > 1 => {
                let gone = now.ids.swap_remove(at);
                if let Some(moved) = now.ids.get(at) {
                    self.slots.set(now.base + u32::try_from(at)?, moved.0, 0)?;
                }
                self.publish(now)?;
                self.remove_endpoint(gone)
            }
            2 => {
                let base = self.free_extents.remove(0);
                for (slot, id) in (base..).zip(&now.ids) {
                    self.slots.set(slot, id.0, 0)?;
                }
                self.free_extents.push(std::mem::replace(&mut now.base, base));
                self.publish(now)
            }
            _ => {
                let id = self.add_endpoint(now)?;
                self.slots.set(now.base + u32::try_from(at)?, id.0, 0)?;
                let gone = std::mem::replace(&mut now.ids[at], id);
                self.remove_endpoint(gone)
            }
        }
    }
}

#[test]
fn nobody_is_sent_astray_while_services_change() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let mut loaded = Loaded::new()?;
    let vips: [SocketAddr; 2] = ["10.96.0.1:80".parse()?, "10.96.0.2:80".parse()?];
    for vip in vips {
        loaded.let_pass(&vip.ip().into())?;
    }
    let mut take = |name: &str| loaded.ebpf().take_map(name).with_context(|| name.to_owned());
    let mut writer = Writer {
        frontends: HashMap::try_from(take(map::FRONTENDS)?)?,
        slots: Array::try_from(take(map::SLOTS)?)?,
        endpoints: Array::try_from(take(map::ENDPOINTS)?)?,
        free_extents: (2..4).map(|n| n * EXTENT).collect(),
        free_ids: (1..20).map(|n| (n * 2, Endpoint::default())).collect(),
        chance: Chance(0x5eed),
    };
    let mut services: Vec<Now> = Vec::new();
    for (n, vip) in (0_u32..).zip(vips) {
        let mark = u8::try_from(n + 1)?;
        let (service, base) = (16 + 2 * n, n * EXTENT);
        let mut now = Now { service, key: key(vip, UDP), mark, base, ids: Vec::new() };
        let id = writer.add_endpoint(&now)?;
        writer.slots.set(now.base, id.0, 0)?;
        now.ids.push(id);
        writer.publish(&now)?;
        services.push(now);
    }

    let stop = AtomicBool::new(false);
    let (changes, [dropped, missed]) = thread::scope(|scope| -> Result<(u32, [u32; 2])> {
        let writing = scope.spawn(|| -> Result<u32> {
            let mut changes = 0;
            while !stop.load(Ordering::Relaxed) {
                for now in &mut services {
                    writer.step(now)?;
                    changes += 1;
                }
            }
            Ok(changes)
        });
        let asked = ask(&mut loaded, vips);
        stop.store(true, Ordering::Relaxed);
        let changes = writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok((changes, asked?))
    })?;
    assert_eq!(loaded.events(Event::NoEndpoint)?, u64::from(dropped));
    println!("{changes} changes, {dropped} dropped, {missed} missed");
    assert!(changes > 1000, "{changes} changes are no test");
    // A program that is held up long enough sees the second reading overtaken too; the client sends again.
    assert!(dropped * 1000 < PACKETS, "{dropped} of {PACKETS} dropped");
    // One that is held up while it compares a frontend's key may find that the kernel has given the memory to another
    // frontend, and finds none, although one was there all the time.
    assert!(missed * 5000 < PACKETS, "{missed} of {PACKETS} took a Service's address for nobody's");
    Ok(())
}

/// As when the kernel gives the memory of an element to another one while a program reads it.
#[test]
fn a_frontend_that_says_it_is_another_ones_leads_nowhere() -> Result<()> {
    if !require_kernel() {
        return Ok(());
    }
    let vips: [SocketAddr; 2] = ["10.96.0.1:80".parse()?, "10.96.0.2:80".parse()?];
    let tags = vips.map(|vip| key(vip, UDP).tag());
    ensure!(tags[0] != tags[1] && !tags.contains(&0), "{tags:?}");
    let mut loaded = Loaded::new()?;
    loaded.let_pass(&vips[0].ip().into())?;
    let mut take = |name: &str| loaded.ebpf().take_map(name).with_context(|| name.to_owned());
    let mut frontends = HashMap::<_, FrontendKey, Frontend>::try_from(take(map::FRONTENDS)?)?;
    let mut slots = Array::<_, u32>::try_from(take(map::SLOTS)?)?;
    let mut endpoints = Array::<_, Endpoint>::try_from(take(map::ENDPOINTS)?)?;
    let endpoint = Endpoint {
        address: IpAddr::from([10, 1, 0, 1]).into(),
        port: 8080_u16.to_be(),
        flags: endpoint_flags::CLUSTER | endpoint_flags::SERVING,
        service: 16,
        generation: 1,
        reserved: 0,
    };
    endpoints.set(2, endpoint, 0)?;
    slots.set(0, 2, 0)?;
    let cluster = Group { base: 0, count: 1 };
    // An agent that does not know tags writes 0.
    for (tag, to) in [(tags[0], "10.1.0.1:8080".parse()?), (tags[1], vips[0]), (0, "10.1.0.1:8080".parse()?)]
    {
        let frontend = Frontend { service: 16, cluster, verdicts: [FORWARD; 3], tag, ..Frontend::default() };
        frontends.insert(key(vips[0], UDP), frontend, 0)?;
        let client = SocketAddr::new([172, 16, 0, 1].into(), 1000 + tag as u16 % 1000);
        let (_, out) = loaded.run("ingress", &Packet::new(client, vips[0], UDP).bytes())?;
        assert_eq!(read(&out)?.destination, to, "tag {tag:#x}");
    }
    Ok(())
}

/// New flows to both Services; how many were dropped, and how many passed as if there were no Service.
fn ask(loaded: &mut Loaded, vips: [SocketAddr; 2]) -> Result<[u32; 2]> {
    let [mut dropped, mut missed] = [0; 2];
    let mut reached = BTreeSet::new();
    for n in 0..PACKETS {
        for (vip, mark) in vips.into_iter().zip(1_u8..) {
            let client =
                SocketAddr::new([172, 16, u8::try_from(n / 50_000)?, mark].into(), (n % 50_000) as u16 + 1);
            let (action, out) = loaded.run("ingress", &Packet::new(client, vip, UDP).bytes())?;
            if action == 2 {
                dropped += 1;
                continue;
            }
            let IpAddr::V4(to) = read(&out)?.destination.ip() else { continue };
            if IpAddr::V4(to) == vip.ip() {
                missed += 1;
                continue;
            }
            ensure!(to.octets()[..2] == [10, mark], "{vip} led to {to}");
            reached.insert(to);
        }
    }
    ensure!(reached.len() > 100, "only {} endpoints were reached", reached.len());
    Ok([dropped, missed])
}
