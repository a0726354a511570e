//! Reads what `iptables-save` prints, as far as it concerns us.

use std::borrow::Cow;

use shunt_core::id::{IpFamily, Protocol};
use xtables_tools::{Held, Line, Table, is_hook, target, words};

use crate::layout::SetName;
use crate::rules::{Chain, Match, Rule, RuleProtocol, Rules, Target};
use crate::skeleton::is_ours;

/// Our chains, and rules in those of the kernel that lead to them. Rules of ours that are not understood are kept as
/// [`Target::Unknown`]. And which of the chains rules of others lead to; where only those do, and nothing of ours is
/// to be taken away, the chain is theirs.
pub fn parse(family: IpFamily, text: &str) -> (Rules, Held) {
    let mut rules = Rules::default();
    let mut table = None;
    for line in text.lines().filter_map(xtables_tools::line) {
        if let Line::Table(name) = line {
            table = Table::parse(name);
        }
        let Some(table) = table else { continue };
        match line {
            Line::Chain(name) if is_ours(table, name) => {
                rules.chains.push(Chain { table, name: name.to_owned(), rules: Vec::new() });
            }
            Line::Rule(name, text) => {
                let words = words(text);
                let list = if is_ours(table, name) {
                    &mut rules.chains
                } else if target(&words).is_some_and(|chain| is_ours(table, chain) && is_hook(name, chain)) {
                    &mut rules.hooks
                } else {
                    continue;
                };
                let unknown = || Rule::new([], Target::Unknown(text.to_owned()));
                let rule = rule(family, &words).unwrap_or_else(unknown);
                match list.iter_mut().find(|c| c.table == table && c.name == name) {
                    Some(chain) => chain.rules.push(rule),
                    None => list.push(Chain { table, name: name.to_owned(), rules: vec![rule] }),
                }
            }
            _ => {}
        }
    }
    let held = Held::read(text, is_ours);
    for (table, chain) in held.untouched() {
        if !rules.leads_to(table, chain) {
            rules.chains.retain(|c| (c.table, &*c.name) != (table, chain));
        }
    }
    rules.chains.sort();
    rules.hooks.sort();
    (rules, held)
}

struct Reader<'a> {
    family: IpFamily,
    words: std::iter::Peekable<std::slice::Iter<'a, Cow<'a, str>>>,
}

impl Reader<'_> {
    fn word(&mut self) -> Option<&str> {
        self.words.next().map(|word| &**word)
    }

    /// The next word must be this one.
    fn expect(&mut self, word: &str) -> Option<()> {
        (self.word()? == word).then_some(())
    }

    /// Skips a `!`; true if there was none.
    fn positive(&mut self) -> bool {
        self.words.next_if(|w| *w == "!").is_none()
    }

    fn set(&mut self) -> Option<(SetName, &'static str)> {
        let name = self.words.next()?;
        let set = SetName::from_name(self.family, name)?;
        let by = self.words.next()?;
        let by = ["dst", "src", "dst,dst", "dst,dst,src"].into_iter().find(|known| known == by)?;
        Some((set, by))
    }

    /// `value/mask`, or `value` alone.
    fn bits(&mut self) -> Option<(u32, u32)> {
        let word = self.word()?;
        let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
        match word.split_once('/') {
            Some((value, mask)) => Some((number(value)?, number(mask)?)),
            None => Some((number(word)?, u32::MAX)),
        }
    }

    fn module(&mut self) -> Option<Match> {
        let module = self.words.next()?;
        let positive = self.positive();
        match &**module {
            "set" => {
                self.expect("--match-set")?;
                let (set, by) = self.set()?;
                Some(Match::Set(set, by, positive))
            }
            "addrtype" if positive => {
                self.expect("--src-type")?;
                self.expect("LOCAL")?;
                Some(Match::SourceLocal)
            }
            "addrtype" => {
                self.expect("--dst-type")?;
                self.expect("LOCAL")?;
                Some(Match::DestinationNotLocal)
            }
            "conntrack" if positive => {
                self.expect("--ctstate")?;
                match self.word()? {
                    "NEW" => Some(Match::New),
                    "RELATED,ESTABLISHED" => Some(Match::Established),
                    _ => None,
                }
            }
            "mark" => {
                self.expect("--mark")?;
                let (value, mask) = self.bits()?;
                Some(Match::Mark(value, mask, positive))
            }
            "ipvs" => {
                self.expect("--ipvs")?;
                Some(Match::Ipvs(positive))
            }
            "comment" if positive => {
                self.expect("--comment")?;
                Some(Match::Comment(self.word()?.to_owned()))
            }
            _ => None,
        }
    }

    fn target(&mut self) -> Option<Target> {
        let target = self.words.next()?;
        Some(match &**target {
            "RETURN" => Target::Return,
            "ACCEPT" => Target::Accept,
            "DROP" => Target::Drop,
            "REJECT" => {
                self.expect("--reject-with")?;
                match self.word()? {
                    "icmp-port-unreachable" | "icmp6-port-unreachable" => Target::Reject,
                    _ => return None,
                }
            }
            "MARK" => {
                self.expect("--set-xmark")?;
                let (value, mask) = self.bits()?;
                Target::SetMark(value, mask)
            }
            "SET" => {
                self.expect("--map-set")?;
                let (set, by) = self.set()?;
                self.expect("--map-mark")?;
                Target::MapMark(set, by)
            }
            "MASQUERADE" => {
                self.expect("--random-fully")?;
                Target::Masquerade
            }
            chain => Target::Jump(chain.to_owned()),
        })
    }
}

/// A rule without `-A` and the chain; `None` if it is none that we would write.
fn rule(family: IpFamily, words: &[Cow<'_, str>]) -> Option<Rule> {
    let mut reader = Reader { family, words: words.iter().peekable() };
    let mut matches = Vec::new();
    loop {
        let word = reader.words.next()?;
        match &**word {
            "-s" => matches.push(Match::Source(reader.word()?.parse().ok()?)),
            "-i" => matches.push(Match::Interface(reader.word()?.to_owned())),
            "-p" => {
                let protocol = match reader.word()? {
                    "icmp" | "ipv6-icmp" => RuleProtocol::Icmp,
                    name => RuleProtocol::Transport(name.parse::<Protocol>().ok()?),
                };
                matches.push(Match::Protocol(protocol));
                // Repeated as a module by some versions, without options.
                let mut ahead = reader.words.clone();
                if ahead.next().is_some_and(|w| w == "-m")
                    && ahead.next().is_some_and(|w| w.parse::<Protocol>().is_ok())
                {
                    reader.words = ahead;
                }
            }
            "-m" => matches.push(reader.module()?),
            "-j" | "-g" => {
                let target = match (&**word, reader.target()?) {
                    ("-g", Target::Jump(chain)) => Target::Goto(chain),
                    ("-g", _) => return None,
                    (_, target) => target,
                };
                return reader.words.next().is_none().then_some(Rule { matches, target });
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shunt_core::node::LocalDetector;
    use shunt_core::table::NodeFacts;

    use super::*;
    use crate::skeleton::skeleton;

    #[test]
    fn skeletons_are_read_as_written() {
        let detectors = [
            LocalDetector::None,
            LocalDetector::Cidr(vec!["10.244.0.0/16".parse().unwrap(), "10.245.0.0/16".parse().unwrap()]),
            LocalDetector::BridgeInterface("cni0".into()),
            LocalDetector::InterfaceNamePrefix("veth".into()),
        ];
        for family in IpFamily::ALL {
            for local_detector in detectors.clone() {
                for masquerade_all in [false, true] {
                    for masquerade_bit in [0, 14, 27, 31] {
                        let local_detector = local_detector.clone();
                        let facts = NodeFacts {
                            local_detector,
                            masquerade_all,
                            masquerade_bit,
                            ..NodeFacts::unknown()
                        };
                        let rules = skeleton(&facts);
                        assert_eq!(parse(family, &rules.text(family)).0, rules);
                    }
                }
            }
        }
    }

    #[test]
    fn rules_of_others_are_left_out_and_strange_ones_of_ours_kept() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:CNI-X - [0:0]\n\
            -A PREROUTING -j CNI-X\n-A PREROUTING -m comment --comment \"a \\\"b\\\"\" -j KUBE-SERVICES\n\
            -A CNI-X -j ACCEPT\n-A KUBE-SERVICES -d 1.2.3.4/32 -j ACCEPT\nCOMMIT\n";
        let (rules, _) = parse(IpFamily::V4, text);
        assert_eq!(rules.chains.len(), 1);
        assert_eq!(rules.chains[0].rules[0].target, Target::Unknown("-d 1.2.3.4/32 -j ACCEPT".to_owned()));
        assert_eq!(rules.hooks.len(), 1);
        assert_eq!(rules.hooks[0].rules[0].matches, [Match::Comment("a \"b\"".to_owned())]);
    }

    #[test]
    fn what_leads_to_chains_that_others_keep_is_forgotten_whatever_its_conditions() {
        let text = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -d 192.0.2.0/24 -j KUBE-SERVICES\n\
            -A OUTPUT -j KUBE-SERVICES\nCOMMIT\n";
        let (mut rules, _) = parse(IpFamily::V4, text);
        assert_eq!(rules.hooks.len(), 2);
        rules.forget(&|_, chain| chain == "KUBE-SERVICES");
        assert_eq!(rules, Rules::default());
    }

    #[test]
    fn a_chain_that_only_what_goes_leads_to_goes_too() {
        let text = "*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-LOAD-BALANCER - [0:0]\n:KUBE-SERVICES - [0:0]\n\
            -A OUTPUT -j KUBE-SERVICES\n-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ\n\
            -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n";
        let is_kept = |_, chain: &str| chain != "KUBE-LOAD-BALANCER";
        let gone = |text: &str| {
            let mut rules = parse(IpFamily::V4, text).0;
            rules.forget(&is_kept);
            assert!(rules.hooks.is_empty(), "{rules:?}");
            rules.chains.into_iter().map(|chain| chain.name).collect::<Vec<_>>()
        };
        assert_eq!(gone(text), ["KUBE-LOAD-BALANCER", "KUBE-MARK-MASQ"]);
        let used = text.replace("COMMIT", "-A KUBE-SERVICES -j KUBE-MARK-MASQ\nCOMMIT");
        assert_eq!(gone(&used), ["KUBE-LOAD-BALANCER"]);
    }

    #[test]
    fn rules_in_chains_of_others_are_theirs() {
        let text = "*nat\n:KUBE-HP-X - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-SERVICES - [0:0]\n\
            -A OUTPUT -j KUBE-SERVICES\n-A KUBE-SERVICES -j KUBE-NODE-PORT\n\
            -A KUBE-HP-X -s 10.244.0.7/32 -j KUBE-MARK-MASQ\n-A KUBE-HP-X -j CNI-Y\nCOMMIT\n";
        let (rules, held) = parse(IpFamily::V4, text);
        let hooks: Vec<&str> = rules.hooks.iter().map(|hook| hook.name.as_str()).collect();
        assert_eq!(hooks, ["OUTPUT"]);
        assert_eq!(held.untouched(), [(Table::Nat, "KUBE-MARK-MASQ")].into());
        assert!(rules.chain(Table::Nat, "KUBE-MARK-MASQ").is_none(), "only others use it");
        let used = text.replace("-j KUBE-NODE-PORT", "-j KUBE-MARK-MASQ");
        assert!(parse(IpFamily::V4, &used).0.chain(Table::Nat, "KUBE-MARK-MASQ").is_some());
    }

    proptest! {
        #[test]
        fn arbitrary_text_does_not_panic(text in "(\\*nat\n)?(:KUBE-SERVICES - \\[0:0\\]\n)?(-A KUBE-SERVICES [-a-z!\" \\\\]{0,40}\n){0,3}") {
            parse(IpFamily::V4, &text);
        }
    }
}
