//! Which mode `auto` means on this kernel: asked by a trial, not by version numbers.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use shunt_core::compile::{Compiler, Context};
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::{Config, LocalDetector};
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::{Event, Store};
use shunt_mode::Mode;
use shunt_mode::sync::Step;

use crate::{AUTO, Options, open};

/// A mode that this kernel can run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The mode.
    pub mode: Mode,
    /// Why it is this one, for the log.
    pub reason: String,
}

/// The first mode of [`AUTO`] that this kernel can run, for at least one family. The error says what
/// each of them lacks.
pub fn choose() -> Result<Choice, String> {
    let mut refused: Vec<String> = Vec::new();
    for mode in AUTO {
        match try_out(*mode) {
            Ok(how) => {
                let reasons = refused.join("; not ");
                let others = if reasons.is_empty() { String::new() } else { format!("; not {reasons}") };
                return Ok(Choice { mode: *mode, reason: format!("{mode}: {how}{others}") });
            }
            Err(why) => refused.push(format!("{mode}: {why}")),
        }
    }
    Err(refused.join("; "))
}

/// Whether everything that a mode puts into the kernel belongs to a network namespace, so that a trial
/// in one of its own touches nothing else.
const fn is_namespaced(mode: Mode) -> bool {
    !matches!(mode, Mode::Ebpf)
}

/// Tries a mode, on a thread of its own that may leave the network namespace.
fn try_out(mode: Mode) -> Result<String, String> {
    let thread = std::thread::Builder::new().name("trial".to_owned()).spawn(move || {
        // Without CAP_SYS_ADMIN there is no namespace to try in: then the kernel is only asked.
        let private = is_namespaced(mode) && unshare(CloneFlags::CLONE_NEWNET).is_ok();
        let mut errors = Vec::new();
        for family in IpFamily::ALL {
            match try_family(mode, family, private) {
                Ok(()) if private => return Ok("a trial in a private network namespace worked".to_owned()),
                Ok(()) => return Ok("the kernel has what it needs".to_owned()),
                Err(error) => errors.push(format!("{family}: {error}")),
            }
        }
        Err(errors.join(", "))
    });
    match thread {
        Ok(thread) => thread.join().unwrap_or_else(|_| Err("the trial panicked".to_owned())),
        Err(error) => Err(error.to_string()),
    }
}

fn try_family(mode: Mode, family: IpFamily, private: bool) -> Result<(), String> {
    let mut driver = open(mode, family, &Options::default()).map_err(|e| e.to_string())?;
    driver.probe().map_err(|e| e.to_string())?;
    if !private {
        return Ok(());
    }
    let compiler = trial(family);
    driver.sync(compiler.table(family), &Step::Resync).map_err(|e| e.to_string())?;
    driver.cleanup().map_err(|e| e.to_string())
}

/// A table with one of everything.
fn trial(family: IpFamily) -> Compiler {
    let address = |n: u8| match family {
        IpFamily::V4 => IpAddr::V4(Ipv4Addr::new(198, 51, 100, n)),
        IpFamily::V6 => IpAddr::V6(std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into())),
    };
    let range = |n: u8| match family {
        IpFamily::V4 => ipnet(address(n), 25),
        IpFamily::V6 => ipnet(address(n), 64),
    };
    let mut store = Store::default();
    for (n, affinity) in [(1, None), (2, Some(Duration::from_hours(3)))] {
        let name = NamespacedName::new("trial", if n == 1 { "plain" } else { "affinity" });
        let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        store.apply(Event::Service(Service {
            scheduler: None,
            algorithm: None,
            name: name.clone(),
            created: 0,
            cluster_ips: vec![address(n)],
            external_ips: vec![address(n + 10)],
            load_balancer_ips: vec![address(n + 20)],
            source_ranges: vec![range(128)],
            ports: protocols
                .map(|protocol| ServicePort {
                    name: protocol.to_string().into(),
                    protocol,
                    port: 80,
                    node_port: Some(30000 + u16::from(n)),
                })
                .to_vec(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Local,
            affinity,
            health_check_node_port: None,
        }));
        store.apply(Event::Slice(EndpointSlice {
            name: name.clone(),
            service: name,
            family,
            ports: protocols
                .map(|protocol| EndpointPort { name: protocol.to_string().into(), protocol, port: 8080 })
                .to_vec(),
            endpoints: (1..=2)
                .map(|n| Endpoint {
                    address: address(100 + n),
                    conditions: Conditions::default(),
                    node: Some("trial".into()),
                    zone: None,
                    hints: None,
                    pod: None,
                })
                .collect(),
            last_change_trigger: None,
        }));
    }
    store.apply(Event::ServiceCidr("trial".into(), vec![range(1)]));
    let config = Config { local_detector: LocalDetector::Cidr(vec![range(128)]), ..Config::default() };
    let mut context = Context::new("trial", config);
    context.node_addresses = vec![address(200)];
    Compiler::full(context, &store)
}

fn ipnet(address: IpAddr, length: u8) -> ipnet::IpNet {
    ipnet::IpNet::new_assert(address, length).trunc()
}
