//! Reads rules as `iptables-save` prints them. Both flavours print the same conditions, in orders of their own.

use std::borrow::Cow;
use std::net::SocketAddr;

use ipnet::IpNet;
use shunt_core::id::Protocol;
use xtables_tools::words;

use crate::names::Name;
use crate::rule::{Key, Match, Rule, Side, States, Target, parse_chance};

/// Reads a rule. What our rules never say makes a rule with [`Target::Other`] and the whole text.
pub fn rule(text: &str) -> Rule {
    read(&words(text)).unwrap_or_else(|| Rule::always(Target::Other(text.into())))
}

#[derive(Default)]
struct Reader {
    matches: Vec<Match>,
    protocol: Option<Protocol>,
    ports: Option<(u16, u16)>,
    random: bool,
    target: Option<Target>,
}

fn read(words: &[Cow<'_, str>]) -> Option<Rule> {
    let mut reader = Reader::default();
    let mut words = words.iter().map(|word| &**word);
    let mut inverted = false;
    while let Some(word) = words.next() {
        if word == "!" {
            inverted = true;
            continue;
        }
        reader.option(word, inverted, &mut words)?;
        inverted = false;
    }
    let Reader { mut matches, protocol, ports, target, random } = reader;
    match (protocol, ports) {
        (Some(protocol), Some((from, to))) => matches.push(Match::Ports(protocol, from, to)),
        (Some(protocol), None) => matches.push(Match::Protocol(protocol)),
        (None, Some(_)) => return None,
        (None, None) => {}
    }
    // `--mode nth` would be another thing.
    if random != matches.iter().any(|m| matches!(m, Match::Chance(_))) {
        return None;
    }
    Some(Rule::new(matches, target?))
}

impl Reader {
    fn option<'a>(
        &mut self,
        word: &str,
        inverted: bool,
        rest: &mut impl Iterator<Item = &'a str>,
    ) -> Option<()> {
        let mut next = || rest.next();
        let found = match word {
            "-s" => Match::Source(inverted, net(next()?)?),
            "-d" => Match::Destination(inverted, net(next()?)?),
            "-i" => Match::Interface(inverted, next()?.into()),
            "--src-type" => local(inverted, Side::Source, next()?)?,
            "--dst-type" => local(inverted, Side::Destination, next()?)?,
            "--ctstate" => Match::State(inverted, States::parse(next()?)?),
            "--ctorigdst" => Match::OriginalDestination(inverted, net(next()?)?),
            "--mark" => {
                let (value, mask) = mark(next()?)?;
                Match::Mark(inverted, value, mask)
            }
            "--match-set" => Match::Set(inverted, next()?.into(), Key::parse(next()?)?),
            _ if inverted => return None,
            "-p" => {
                self.protocol = Some(protocol(next()?)?);
                return Some(());
            }
            "--dport" => {
                self.ports = Some(ports(next()?)?);
                return Some(());
            }
            "-m" => {
                let known = [
                    "addrtype",
                    "conntrack",
                    "mark",
                    "nfacct",
                    "set",
                    "statistic",
                    "comment",
                    "tcp",
                    "udp",
                    "sctp",
                ];
                return known.contains(&next()?).then_some(());
            }
            "--mode" => {
                self.random = true;
                return (next()? == "random").then_some(());
            }
            "--probability" => Match::Chance(parse_chance(next()?)?),
            "--nfacct-name" => Match::Counted(next()?.into()),
            "--comment" => Match::Comment(next()?.into()),
            "-g" => {
                self.target = Some(Target::Goto(next()?.into()));
                return Some(());
            }
            "-j" => {
                self.target = Some(target(next()?, rest)?);
                return Some(());
            }
            _ => return None,
        };
        self.matches.push(found);
        Some(())
    }
}

fn target<'a>(name: &str, rest: &mut impl Iterator<Item = &'a str>) -> Option<Target> {
    let words: Vec<&str> = rest.collect();
    Some(match (name, &*words) {
        ("RETURN", []) => Target::Return,
        ("ACCEPT", []) => Target::Accept,
        ("DROP", []) => Target::Drop,
        ("REJECT", ["--reject-with", "icmp-port-unreachable" | "icmp6-port-unreachable"]) => Target::Reject,
        ("DNAT", ["--to-destination", to]) => {
            let to: SocketAddr = to.parse().ok()?;
            Target::Dnat(to.ip(), to.port())
        }
        ("MASQUERADE", ["--random-fully"]) => Target::Masquerade,
        ("MARK", ["--set-xmark", value]) => {
            let (value, mask) = mark(value)?;
            Target::SetMark(value, mask)
        }
        ("SET", ["--add-set", set, "src", "--exist", "--timeout", seconds]) => {
            Target::AddSource(Name::from(*set), seconds.parse().ok()?)
        }
        ("REJECT" | "DNAT" | "MASQUERADE" | "MARK" | "SET", _) => return None,
        (chain, []) => Target::Jump(chain.into()),
        _ => return None,
    })
}

fn net(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| Some(IpNet::from(text.parse::<std::net::IpAddr>().ok()?)))
}

fn local(inverted: bool, side: Side, kind: &str) -> Option<Match> {
    (kind == "LOCAL").then_some(Match::Local(inverted, side))
}

fn protocol(text: &str) -> Option<Protocol> {
    text.parse().ok().or_else(|| Protocol::from_number(text.parse().ok()?))
}

fn ports(text: &str) -> Option<(u16, u16)> {
    let (from, to) = text.split_once(':').unwrap_or((text, text));
    Some((from.parse().ok()?, to.parse().ok()?))
}

fn mark(text: &str) -> Option<(u32, u32)> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    Some((number(value)?, number(mask)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_printed() {
        for text in [
            "! -s 10.0.0.0/8 -d 1.2.3.4/32 -p tcp -m tcp --dport 80:90 -m conntrack --ctstate NEW -m addrtype --dst-type LOCAL -m mark --mark 0x4000/0x4000 -m set --match-set S1 dst,dst -m set ! --match-set S2 dst,dst,src -m comment --comment \"a b:c\" -g KUBE-T2",
            "-i veth+ -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -m addrtype ! --src-type LOCAL -j DROP",
            "-p udp -m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination 10.0.0.1:80",
            "-j DNAT --to-destination [fd00::1]:80",
            "-m conntrack --ctstate INVALID -m nfacct --nfacct-name ct_state_invalid_dropped_pkts -j DROP",
            "-m conntrack ! --ctorigdst 127.0.0.0/8 -m mark --mark 0x1/0x1 -j RETURN",
            "-j MARK --set-xmark 0x4000/0x0",
            "-j MASQUERADE --random-fully",
            "-j SET --add-set S3 src --exist --timeout 20",
        ] {
            let read = rule(text);
            assert!(!matches!(read.target, Target::Other(_)), "{text}");
            assert_eq!(read.to_string(), text);
        }
        assert_eq!(
            rule("-p sctp -m sctp --dport 80 -j REJECT --reject-with icmp-port-unreachable").target,
            Target::Reject
        );
    }

    #[test]
    fn the_order_of_conditions_does_not_matter() {
        assert_eq!(
            rule("-m comment --comment a -m mark ! --mark 0x1/0x1 -j RETURN"),
            rule("-m mark ! --mark 0x1/0x1 -m comment --comment \"a\" -j RETURN"),
        );
    }

    #[test]
    fn what_we_never_write_is_kept_as_text() {
        for text in [
            "-j LOG --log-prefix \"a b\"",
            "-p icmp -j ACCEPT",
            "! -p tcp -j ACCEPT",
            "-m limit --limit 3/min -j ACCEPT",
            "-m statistic --mode nth --every 2 --packet 0 -j ACCEPT",
            "-m comment --comment \"no target\"",
            "-j REJECT --reject-with tcp-reset",
            "-j DNAT --to-destination 10.0.0.1",
            "",
            "!",
            "-j",
        ] {
            assert_eq!(rule(text), Rule::always(Target::Other(text.into())));
        }
    }
}
