//! Sockets of endpoints that are gone, in ebpf mode: destroyed if that is asked for, and no others.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Stdio;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use shunt_core::endpoint::Conditions;
use shunt_core::id::{IpFamily, Protocol};
use shunt_core::node::Config;
use shunt_core::table::Change;
use shunt_harness::lab::{Lab, Namespace, require_kernel};
use shunt_mode::Backend as _;
use shunt_mode_ebpf::kernel::Options;
use shunt_suites::mode::ebpf::place;
use shunt_suites::mode::ebpf::small::{
    cluster, cluster_ip, lab, pod_of, ready, service_of, slice_of, start_of,
};

/// A socket that is connected, and the pod at its other end.
enum Open {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

struct Asker {
    open: Open,
    home: IpAddr,
    /// The programs have sent it there.
    by_service: bool,
}

impl Open {
    fn connect(from: &Namespace, protocol: Protocol, to: SocketAddr) -> Self {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let connect = || {
            Ok(if protocol == Protocol::Tcp {
                Self::Tcp(TcpStream::connect(to)?)
            } else {
                let socket = UdpSocket::bind(any)?;
                socket.connect(to)?;
                Self::Udp(socket)
            })
        };
        let open = from.run(connect).unwrap();
        let patience = Some(Duration::from_secs(2));
        match &open {
            Self::Tcp(stream) => stream.set_read_timeout(patience).unwrap(),
            Self::Udp(socket) => socket.set_read_timeout(patience).unwrap(),
        }
        open
    }

    /// Which pod answers.
    fn ask(&mut self) -> std::io::Result<String> {
        let mut answer = [0; 2048];
        let length = match self {
            Self::Tcp(stream) => {
                stream.write_all(b"who\n")?;
                stream.read(&mut answer)?
            }
            Self::Udp(socket) => {
                socket.send(b"who\n")?;
                socket.recv(&mut answer)?
            }
        };
        let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
        Ok(answer.split(' ').next().unwrap_or_default().trim_start_matches("pod=").to_owned())
    }

    /// What has happened to the socket.
    fn error(&self) -> Option<i32> {
        let error = match self {
            Self::Tcp(stream) => stream.take_error(),
            Self::Udp(socket) => socket.take_error(),
        };
        error.unwrap().and_then(|error| error.raw_os_error())
    }
}

/// Sockets of processes in a namespace, of both families and protocols: such as the Services' programs have sent to each of
/// both pods, and such as have gone there by themselves.
fn askers(from: &Namespace) -> Vec<Asker> {
    let mut askers = Vec::new();
    for (family, protocol, n) in SERVICES {
        let service = SocketAddr::new(cluster_ip(family, n), 80);
        let direct = [1, 2].map(|n| (SocketAddr::new(pod_of(family, n), 8080), false));
        for (to, by_service) in [(service, true); 12].into_iter().chain(direct) {
            let mut open = Open::connect(from, protocol, to);
            let home = open.ask().unwrap().parse().unwrap();
            askers.push(Asker { open, home, by_service });
        }
    }
    askers
}

const SERVICES: [(IpFamily, Protocol, u8); 4] = [
    (IpFamily::V4, Protocol::Tcp, 1),
    (IpFamily::V4, Protocol::Udp, 2),
    (IpFamily::V6, Protocol::Tcp, 3),
    (IpFamily::V6, Protocol::Udp, 4),
];

/// The pod that goes, as its answers name it.
const GONE: [u8; 4] = [10, 180, 0, 1];

/// One endpoint of two terminates, then goes.
fn run(lab: &Lab, options: &Arc<Options>, destroyed: bool) {
    let mut cluster = cluster(Config { keep_listed: options.destroy_sockets, ..Config::default() });
    let mut kernels = IpFamily::ALL.map(|family| start_of(family, lab, options));
    for (family, protocol, n) in SERVICES {
        cluster.step(&service_of(family, n, protocol, None));
    }
    let mut sync = |of: &dyn Fn(IpFamily) -> Vec<(IpAddr, Conditions)>| {
        for (family, protocol, n) in SERVICES {
            cluster.step(&slice_of(family, n, protocol, &of(family)));
        }
        for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
            kernel.sync(cluster.table(family), &Change::everything()).unwrap();
        }
    };
    sync(&|family| ready([1, 2].map(|n| pod_of(family, n))));
    let pod = lab.pod("10.180.0.3").unwrap();
    // As every container has: a process in its network namespace.
    let mut process = pod.command("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
    let mut askers: Vec<Asker> = [pod, lab.node()].into_iter().flat_map(askers).collect();
    let goes = |asker: &Asker| asker.by_service && asker.home == IpAddr::from(GONE);
    assert!(askers.iter().filter(|asker| goes(asker)).count() >= 8);
    // An endpoint that is not ready, or terminates, whether it still serves or not, is not gone.
    for [serving, terminating] in [[false, false], [true, true], [false, true]] {
        let leaving = Conditions { ready: false, serving, terminating };
        sync(&|family| vec![(pod_of(family, 1), leaving), (pod_of(family, 2), Conditions::default())]);
        sleep(Duration::from_millis(300));
        for asker in &mut askers {
            assert_eq!(asker.open.ask().unwrap().parse(), Ok(asker.home), "{leaving:?}");
        }
    }
    sync(&|family| ready([pod_of(family, 2)]));
    let until = Instant::now() + Duration::from_secs(if destroyed { 5 } else { 1 });
    for asker in &mut askers {
        let expected = (destroyed && goes(asker)).then_some(Errno::ECONNABORTED as i32);
        let mut error = asker.open.error();
        while error.is_none() && goes(asker) && Instant::now() < until {
            sleep(Duration::from_millis(20));
            error = asker.open.error();
        }
        assert_eq!(error, expected, "by Service: {}, at {}", asker.by_service, asker.home);
        if expected.is_none() {
            assert_eq!(asker.open.ask().unwrap().parse(), Ok(asker.home));
        }
    }
    process.kill().unwrap();
    process.wait().unwrap();
    kernels[0].backend.cleanup().unwrap();
}

#[test]
fn sockets_of_endpoints_that_are_gone_are_destroyed_if_asked_for() {
    if !require_kernel() {
        return;
    }
    for destroy_sockets in [false, true] {
        let lab = lab(3);
        place::settle_pods(&lab, [lab.pod("10.180.0.3").unwrap()]).unwrap();
        let options = lab.node().run(place::options).unwrap();
        assert!(!options.destroy_sockets, "the default");
        let options = Arc::new(Options { destroy_sockets, ..Options::clone(&options) });
        run(&lab, &options, destroy_sockets);
    }
}
