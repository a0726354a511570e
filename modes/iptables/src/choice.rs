//! Evenly one of many endpoints, without asking one after the other: more than [`LIST_MAX`] of them are
//! told apart by bits of a hash first, so that one endpoint more or less changes a few short chains.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::names::Name;
use crate::rule::{Match, Rule, Rules, Target, one_in};

/// Endpoints that one chain lists.
pub const LIST_MAX: usize = 16;
/// Chains below one chain.
const FAN_OUT: u32 = 8;
/// Levels below the first chain: its name leaves room for so many digits.
const DEPTH_MAX: u32 = 3;

/// The rules that choose among endpoints, to be appended to the chain `name`; further chains go to `chains`.
/// `rule` makes the rule that sends a packet to an endpoint.
pub fn rules(
    name: &str,
    endpoints: &[SocketAddr],
    rule: &mut dyn FnMut(SocketAddr, Vec<Match>) -> Rule,
    chains: &mut BTreeMap<Name, Rules>,
) -> Vec<Rule> {
    level(name, endpoints, 0, rule, chains)
}

fn level(
    name: &str,
    endpoints: &[SocketAddr],
    depth: u32,
    rule: &mut dyn FnMut(SocketAddr, Vec<Match>) -> Rule,
    chains: &mut BTreeMap<Name, Rules>,
) -> Vec<Rule> {
    let mut left = endpoints.len();
    // The last one needs no luck.
    let mut chance = |share: usize| {
        let chance = (share < left).then(|| Match::Chance(one_in(share, left)));
        left -= share;
        chance.into_iter().collect::<Vec<_>>()
    };
    if endpoints.len() <= LIST_MAX || depth == DEPTH_MAX {
        return endpoints.iter().map(|to| rule(*to, chance(1))).collect();
    }
    let mut rules = Vec::new();
    for digit in 0..FAN_OUT {
        let here = |to: &&SocketAddr| hash(**to) >> (3 * depth) & (FAN_OUT - 1) == digit;
        let group: Vec<SocketAddr> = endpoints.iter().filter(here).copied().collect();
        match &*group {
            [] => {}
            [only] => rules.push(rule(*only, chance(1))),
            group => {
                let below: Name = format!("{name}{digit}").into();
                rules.push(Rule::new(chance(group.len()), Target::Goto(below.clone())));
                let of_below = level(&below, group, depth + 1, rule, chains);
                chains.insert(below, of_below.into());
            }
        }
    }
    rules
}

/// FNV-1a, with its bits mixed once more: the low ones decide.
fn hash(endpoint: SocketAddr) -> u32 {
    let text = endpoint.to_string();
    let hash =
        text.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u32) -> SocketAddr {
        SocketAddr::new(std::net::Ipv4Addr::from_bits(0x0a00_0000 + n).into(), 8080)
    }

    fn chosen(
        rules: &[Rule],
        chains: &BTreeMap<Name, Rules>,
        probability: f64,
        into: &mut BTreeMap<SocketAddr, f64>,
    ) -> usize {
        let mut left = probability;
        let mut longest = 0;
        for (i, rule) in rules.iter().enumerate() {
            let here = match rule.matches[..] {
                [Match::Chance(chance)] => left * f64::from(chance) / f64::from(1_u32 << 31),
                [] => left,
                _ => panic!("{rule}"),
            };
            left -= here;
            let mut length = i + 1;
            match &rule.target {
                Target::Dnat(address, port) => {
                    *into.entry(SocketAddr::new(*address, *port)).or_default() += here;
                }
                Target::Goto(chain) => length += chosen(&chains[chain], chains, here, into),
                other => panic!("{other}"),
            }
            longest = longest.max(length);
        }
        assert!(left.abs() < 1e-12, "{left} goes nowhere");
        longest
    }

    fn choice(endpoints: &[SocketAddr]) -> (Vec<Rule>, BTreeMap<Name, Rules>) {
        let mut chains = BTreeMap::new();
        let rules = rules(
            "KUBE-SVC-XPGD46QRK7WJZT7O",
            endpoints,
            &mut |to, m| Rule::new(m, Target::Dnat(to.ip(), to.port())),
            &mut chains,
        );
        (rules, chains)
    }

    #[test]
    fn every_endpoint_is_chosen_as_often_as_any_other() {
        for count in (1..70).chain([100, 333, 1000, 5000]) {
            let endpoints: Vec<SocketAddr> = (0..count).map(endpoint).collect();
            let (rules, chains) = choice(&endpoints);
            let mut shares = BTreeMap::new();
            let longest = chosen(&rules, &chains, 1.0, &mut shares);
            assert_eq!(shares.len(), endpoints.len());
            let even = 1.0 / f64::from(count);
            for (to, share) in shares {
                assert!((share - even).abs() < 1e-9, "{count}: {to} gets {share} instead of {even}");
            }
            assert!(longest <= 48, "{count}: {longest} rules");
            assert!(chains.keys().all(|name| name.len() <= 28));
        }
    }

    #[test]
    fn one_endpoint_more_changes_one_way() {
        let before = choice(&(0..1000).map(endpoint).collect::<Vec<_>>());
        let after = choice(&(0..1001).map(endpoint).collect::<Vec<_>>());
        let changed = after.1.iter().filter(|(name, rules)| before.1.get(*name) != Some(rules)).count();
        assert!(changed <= 3, "{changed}");
    }
}
