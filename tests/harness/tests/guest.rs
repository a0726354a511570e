//! The guest-kernel runner itself, and the lab inside the guest.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use shunt_harness::guest::{Guest, INSIDE, require_guest, test_in_guest};
use shunt_harness::lab::{Lab, Probe, Proto, StormSpec};

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// The processes of the machine whose command line names this.
fn processes(word: &str) -> Vec<String> {
    let lines = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = lines.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|l| l.contains(word)).collect()
}

#[test]
fn a_command_means_and_says_the_same_inside() {
    let Some(guest) = require_guest() else { return };
    let mut command = shell(
        "printf '%s|' \"$@\" \"$WORD\" \"$PWD\" \"${HIDDEN-unset}\"; echo complaint >&2; \
         cat /proc/net/ip_vs >/dev/null || exit 9; exit 42",
    );
    let words = ["sh", "two words", "it's", "$HOME `id` \\ \"", "", "line\nbreak", "ünïcode"];
    command.args(words).env("WORD", "a 'b' $c").env_remove("HIDDEN").current_dir("/usr/share");
    let output = guest.run(&command).unwrap();
    assert_eq!(output.status.code(), Some(42), "{output:?}");
    let expected = format!("{}|a 'b' $c|/usr/share|unset|", words[1..].join("|"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "complaint\n");
}

/// Bytes of every kind, more than any buffer on the way holds, and none of them lost at the power-off.
#[test]
fn all_output_arrives() {
    let Some(guest) = require_guest() else { return };
    let script = "seq 0 299999; printf '\\000\\003\\004\\r\\377end'";
    let output = guest.run(&shell(script)).unwrap();
    let mut expected: Vec<u8> = (0..300_000).flat_map(|i| format!("{i}\n").into_bytes()).collect();
    expected.extend(b"\0\x03\x04\r\xffend");
    assert_eq!(output.stdout.len(), expected.len());
    assert!(output.stdout == expected);
}

#[test]
fn what_is_written_vanishes() {
    let Some(guest) = require_guest() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "before").unwrap();
    let mut command =
        shell("cat file && echo after > file && cat file && echo > new && rm /etc/hostname; exit 0");
    let output = guest.run(command.current_dir(folder.path())).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "beforeafter\n", "{output:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "before");
    assert!(!folder.path().join("new").exists());
    assert!(Path::new("/etc/hostname").exists());
}

#[test]
fn failures_are_told_apart() {
    let Some(guest) = require_guest() else { return };
    assert_eq!(guest.run(&Command::new("no-such-program")).unwrap().status.code(), Some(127));
    assert_eq!(guest.run(&shell("kill -ABRT $$")).unwrap().status.code(), Some(134));
    let error = guest.run(&shell("echo o > /proc/sysrq-trigger; sleep 60")).unwrap_err();
    assert!(format!("{error:#}").contains("ended without a result"), "{error:#}");
    let begin = Instant::now();
    let error = guest.run(&shell("echo c > /proc/sysrq-trigger")).unwrap_err();
    assert!(format!("{error:#}").contains("Kernel panic"), "{error:#}");
    assert!(begin.elapsed() < Duration::from_mins(1), "{:?}", begin.elapsed());
}

#[test]
fn a_command_has_its_time() {
    let Some(guest) = require_guest() else { return };
    let word = format!("patience-{}", std::process::id());
    let begin = Instant::now();
    let script = format!("echo {word} began; sleep 1000 & sleep 1001 & sleep 1002");
    let error = guest.timeout(Duration::from_secs(8)).run(&shell(&script)).unwrap_err();
    assert!((8..20).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    let error = format!("{error:#}");
    assert!(error.contains("not done after 8s") && error.contains(&format!("{word} began")), "{error}");
}

/// Not a test: what `a_killed_process_leaves_no_guest` runs and kills.
#[test]
#[ignore = "waits to be killed"]
fn helper_waits_to_be_killed() {
    let Some(folder) = std::env::var_os("SHUNT_GUEST_HELPER") else { return };
    // The guest's control folder lies in TMPDIR, which is how its processes are found.
    let mut script = shell("echo began; sleep 1000 & sleep 1000");
    drop(Guest::new().unwrap().pass(script.current_dir(folder), std::io::stdout(), std::io::stderr()));
}

#[test]
fn a_killed_process_leaves_no_guest() {
    if require_guest().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let word = folder.path().display().to_string();
    let mut helper = Command::new(std::env::current_exe().unwrap());
    helper.args(["--exact", "helper_waits_to_be_killed", "--ignored", "--nocapture"]);
    helper.env("SHUNT_GUEST_HELPER", folder.path()).env("TMPDIR", folder.path());
    let lab = Lab::builder().build().unwrap();
    let mut helper = lab.node().spawn(&helper).unwrap();
    helper.wait_for("began", Duration::from_mins(1)).unwrap();
    assert!(processes(&word).len() > 1, "{:?}", processes(&word));
    helper.kill().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes(&word).is_empty() {
        assert!(Instant::now() < deadline, "left behind: {:?}", processes(&word));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_test_that_fails_inside_fails_outside() {
    if require_guest().is_none() {
        return;
    }
    for (helper, why) in
        [("helper_fails_inside", "failed in the guest"), ("nobody", "did not run in the guest")]
    {
        let failed =
            std::panic::catch_unwind(|| test_in_guest(module_path!(), helper, || panic!("ran outside")));
        let message = *failed.unwrap_err().downcast::<String>().unwrap();
        assert!(message.contains(why), "{message}");
    }
}

/// Not a test: what `a_test_that_fails_inside_fails_outside` runs.
#[test]
#[ignore = "fails"]
fn helper_fails_inside() {
    assert!(std::env::var_os(INSIDE).is_none());
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

const NODE: [&str; 2] = ["192.168.0.2", "fd00:192::2"];
const CLIENT: [&str; 2] = ["203.0.113.2", "2001:db8::2"];
const PODS: [[&str; 2]; 2] = [["10.180.0.1", "fd00:10:180::1"], ["10.180.0.2", "fd00:10:180::2"]];

/// The lab with two pods that answer on port 80.
fn lab() -> Lab {
    let mut builder = Lab::builder().node(NODE.map(ip)).client(CLIENT.map(ip));
    for (number, addresses) in PODS.into_iter().enumerate() {
        builder = builder.pod(&format!("pod-{number}"), addresses.map(ip));
    }
    let lab = builder.build().unwrap();
    for number in 0..PODS.len() {
        lab.pod(&format!("pod-{number}")).unwrap().serve_ports([80]).unwrap();
    }
    lab
}

#[test]
fn the_lab_works_inside() {
    test_in_guest(module_path!(), "the_lab_works_inside", || {
        let lab = lab();
        for from in [lab.client(), lab.node(), lab.pod("pod-1").unwrap()] {
            for address in PODS[0] {
                for proto in [Proto::Tcp, Proto::Udp] {
                    let outcome = from.probe(Probe::new(proto, at(address, 80))).unwrap();
                    assert_eq!(outcome.pod(), Some("pod-0"), "{} {proto} {address}: {outcome}", from.name());
                    let closed = from.probe(Probe::new(proto, at(address, 81))).unwrap();
                    assert!(closed.is_refused(), "{} {proto} {address}: {closed}", from.name());
                }
            }
        }
        let nobody = lab.client().probe(Probe::tcp(at("198.18.0.1", 80))).unwrap();
        assert!(nobody.is_timeout(), "{nobody}");
    });
}

/// IPVS as ipvsadm and the kernel's own modules have it: round robin over two pods, in both families and
/// protocols, to an address that only a dummy link holds.
#[test]
fn ipvs_works_inside() {
    test_in_guest(module_path!(), "ipvs_works_inside", || ipvs().unwrap());
}

fn ipvs() -> Result<()> {
    let lab = lab();
    let node = lab.node();
    let run = |line: &str| {
        let mut words = line.split_whitespace();
        node.exec(words.next().unwrap(), words, "")
    };
    run("ip link add kube-ipvs0 type dummy")?;
    for (vip, family) in [("10.96.0.10", 0), ("fd00:96::a", 1)] {
        run(&format!("ip address add {vip} dev kube-ipvs0 nodad"))?;
        for protocol in ["-t", "-u"] {
            let service = at(vip, 8080);
            run(&format!("ipvsadm -A {protocol} {service} -s rr"))?;
            for pod in PODS {
                run(&format!("ipvsadm -a {protocol} {service} -r {} -m", at(pod[family], 80)))?;
            }
        }
        for proto in [Proto::Tcp, Proto::Udp] {
            let mut answers: BTreeMap<String, u32> = BTreeMap::new();
            for _ in 0..8 {
                let outcome =
                    lab.client().probe(Probe::new(proto, at(vip, 8080)).timeout(Duration::from_secs(2)))?;
                let answer = outcome.answer().unwrap_or_else(|| panic!("{proto} {vip}: {outcome}"));
                assert_eq!(answer.peer.ip(), ip(CLIENT[family]));
                *answers.entry(answer.pod.clone()).or_default() += 1;
            }
            assert_eq!(answers, BTreeMap::from([("pod-0".to_owned(), 4), ("pod-1".to_owned(), 4)]));
        }
    }
    let probe = Probe::tcp(at("10.96.0.10", 8080)).timeout(Duration::from_secs(2));
    let report =
        lab.client().storm(StormSpec { probe, rate: 200, duration: Duration::from_secs(2) })?.join()?;
    println!("{report}");
    assert!(report.failures.is_empty() && report.attempted > 380, "{report}");
    // Each namespace has its own.
    assert_eq!(lab.client().exec("ipvsadm", ["-Sn"], "")?, "");
    Ok(())
}

/// The programs and modules that the ipvs and iptables modes and their tests use, each loaded by its first use.
#[test]
fn sets_and_rules_work_inside() {
    test_in_guest(module_path!(), "sets_and_rules_work_inside", || {
        let lab = lab();
        let types =
            ["hash:ip", "hash:ip,port", "hash:ip,port,ip", "hash:ip,port,net", "hash:net", "hash:net,port"];
        for (number, kind) in types.into_iter().enumerate() {
            for family in ["inet", "inet6"] {
                let set = format!("s{number}-{family}");
                lab.node().exec("ipset", ["create", &set, kind, "family", family], "").unwrap();
            }
        }
        lab.node().exec("ipset", ["create", "ports", "bitmap:port", "range", "0-65535"], "").unwrap();
        for (tool, set) in [("iptables", "s1-inet"), ("ip6tables", "s1-inet6")] {
            for rule in [
                format!(
                    "-t nat -A PREROUTING -m comment --comment x -m set --match-set {set} dst,dst -j MARK --set-xmark 0x4000/0x4000"
                ),
                "-t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully".to_owned(),
                "-t nat -A OUTPUT -m addrtype --dst-type LOCAL -j RETURN".to_owned(),
                "-t nat -A PREROUTING -m statistic --mode random --probability 0.5 -j RETURN".to_owned(),
                "-t nat -A PREROUTING -m recent --name r --rcheck --seconds 9 --reap -j RETURN".to_owned(),
                "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned(),
                "-A INPUT -m ipvs --ipvs -j RETURN".to_owned(),
                "-A INPUT -p tcp --dport 9 -j REJECT".to_owned(),
            ] {
                lab.node().exec(tool, ["-w"].into_iter().chain(rule.split_whitespace()), "").unwrap();
            }
        }
        let rules = lab.node().exec("iptables-save", ["-t", "nat"], "").unwrap();
        assert!(rules.contains("--match-set s1-inet dst,dst"), "{rules}");
    });
}
