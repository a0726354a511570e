//! The kernel's settings for IPVS.

use std::fs;
use std::io;

/// What must be so: connections are tracked, so that they can be masqueraded; packets of connections whose
/// destination is gone, and clients who are remembered for a drained one, go to another; answers of pods are
/// passed on.
const ALWAYS: [(&str, &str); 4] = [
    ("net/ipv4/vs/conntrack", "1"),
    ("net/ipv4/vs/expire_nodest_conn", "1"),
    ("net/ipv4/vs/expire_quiescent_template", "1"),
    ("net/ipv4/ip_forward", "1"),
];

/// Answer ARP only for addresses of the asked interface, and ask with them.
const STRICT_ARP: [(&str, &str); 2] =
    [("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")];

/// Before 5.9 a SYN from the port of a connection that just ended waited a second for the old one to go
/// (kernel commit f0a5e4d7a594); with mode 0 it goes on with the old one at once.
const REUSE: (&str, &str) = ("net/ipv4/vs/conn_reuse_mode", "0");
const REUSE_SINCE: (u32, u32) = (4, 1);
const REUSE_SOUND_SINCE: (u32, u32) = (5, 9);

fn path(key: &str) -> String {
    format!("/proc/sys/{key}")
}

fn wanted(release: &str, strict_arp: bool) -> Vec<(&'static str, &'static str)> {
    let mut wanted = ALWAYS.to_vec();
    if strict_arp {
        wanted.extend(STRICT_ARP);
    }
    if version(release).is_some_and(|version| (REUSE_SINCE..REUSE_SOUND_SINCE).contains(&version)) {
        wanted.push(REUSE);
    }
    wanted
}

/// Major and minor number of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn holds(key: &str, value: &str) -> bool {
    fs::read_to_string(path(key)).is_ok_and(|held| held.trim() == value)
}

fn release() -> String {
    fs::read_to_string(path("kernel/osrelease")).unwrap_or_default()
}

/// Whether the kernel has what the mode needs.
pub(super) fn check() -> io::Result<()> {
    fs::read_to_string(path("net/ipv4/vs/conntrack")).map(drop)
}

/// Whether everything is as it should be.
pub(super) fn is_tuned(strict_arp: bool) -> bool {
    wanted(&release(), strict_arp).iter().all(|(key, value)| holds(key, value))
}

/// Writes what is not as it should be.
pub(super) fn tune(strict_arp: bool) -> io::Result<()> {
    for (key, value) in wanted(&release(), strict_arp).into_iter().filter(|(key, value)| !holds(key, value)) {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{key}: {error}"));
        fs::write(path(key), value).map_err(named)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_depend_on_the_kernel() {
        for (release, reuse) in
            [("3.10.0", false), ("4.1", true), ("5.8.18", true), ("5.9.0", false), ("6.1.176", false)]
        {
            assert_eq!(wanted(release, false).contains(&REUSE), reuse, "{release}");
            assert!(ALWAYS.iter().all(|setting| wanted(release, false).contains(setting)));
            assert!(!wanted(release, false).contains(&STRICT_ARP[0]));
            assert!(STRICT_ARP.iter().all(|setting| wanted(release, true).contains(setting)));
        }
    }

    #[test]
    fn releases_are_read() {
        assert_eq!(version("6.1.176"), Some((6, 1)));
        assert_eq!(version("5.9-rc1"), Some((5, 9)));
        assert_eq!(version("4.19.0-amd64\n"), Some((4, 19)));
        assert_eq!(version(""), None);
        assert!(version("5.10.2").unwrap() > REUSE_SOUND_SINCE);
    }
}
