use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use shunt_core::id::{NamespacedName, ServicePortName};
use shunt_core::table::{NodeFacts, SourceRanges};

use super::*;

fn desired() -> Desired {
    Desired {
        family: IpFamily::V4,
        everything: true,
        active: true,
        node: NodeFacts::unknown(),
        service_cidrs: BTreeSet::new(),
        places: BTreeMap::new(),
        node_ports: BTreeMap::new(),
        health_checks: BTreeMap::new(),
        addresses: BTreeMap::new(),
        loopbacks: BTreeMap::new(),
    }
}

fn ops(observed: &State, desired: &Desired) -> Vec<Op> {
    plan(observed, desired).transactions.into_iter().flat_map(|t| t.ops).collect()
}

#[test]
fn what_iptables_mode_translates_goes_on_until_all_is_there_for_it() {
    let address = "10.96.0.1".parse().unwrap();
    let desired = Desired {
        health_checks: BTreeMap::from([(1, true)]),
        addresses: BTreeMap::from([(address, true)]),
        ..desired()
    };
    let order = |observed: &State| -> Vec<&str> {
        let kind = |op: &Op| match op {
            Op::SetRules(_, _, rules) if rules.chain(Table::Mangle, "KUBE-PROXY-FIREWALL").is_some() => {
                "all rules"
            }
            Op::SetRules(_, _, rules) if rules.chain(Table::Filter, "KUBE-IPVS-FILTER").is_some() => {
                "closed ports"
            }
            Op::AddElement(..) => "elements",
            Op::AddAddress(_) => "VIPs",
            _ => "",
        };
        let mut kinds: Vec<&str> =
            ops(observed, &desired).iter().map(kind).filter(|k| !k.is_empty()).collect();
        kinds.dedup();
        kinds
    };
    let mut observed = State::empty(IpFamily::V4);
    let at_once = ["all rules", "elements", "VIPs"];
    assert_eq!(order(&observed), at_once, "nobody serves");
    let text = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n";
    (observed.rules, _) = crate::parse::parse(IpFamily::V4, text);
    let after_all = ["elements", "closed ports", "VIPs", "all rules"];
    assert_eq!(order(&observed), after_all, "iptables mode serves");
    observed.sets.insert(SetName::ClusterIp, BTreeMap::new());
    assert_eq!(order(&observed), at_once, "ipvs mode serves");
}

const PLACE: Place =
    Place { address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), protocol: Protocol::Tcp, port: 80 };

/// A load balancer's VIP that sources of a range may use; without destinations it discards.
fn guarded(range: &str, destinations: &[&str]) -> Desired {
    let mut sets = BTreeSet::from([SetName::LoadBalancer, SetName::LoadBalancerFw]);
    sets.extend(destinations.is_empty().then_some(SetName::NoLocal));
    let service = NamespacedName::new("ns", "svc");
    let ranges = [range.parse().unwrap()].into();
    let wanted = Wanted {
        owner: ServicePortName { service, port: "".into(), protocol: Protocol::Tcp },
        service: Service::new(PLACE.key(), scheduler::DEFAULT),
        destinations: destinations.iter().map(|d| d.parse().unwrap()).collect(),
        inside: None,
        sets,
        guard: Some(Arc::new(SourceRanges { ranges, allow_vip_source: false })),
    };
    Desired { places: BTreeMap::from([(PLACE, Some(wanted))]), ..desired() }
}

/// What is done where one VIP is there and becomes another.
fn change(from: &Desired, to: &Desired) -> Vec<Op> {
    let mut state = State::empty(IpFamily::V4);
    for transaction in &plan(&state, from).transactions {
        crate::op::advance(&mut state, transaction);
    }
    ops(&state, to)
}

#[test]
fn sources_that_were_kept_out_never_get_to_endpoints_that_go() {
    let before_drain = |destinations: &[&str]| {
        let ops = change(&guarded("10.1.0.0/16", &["10.0.0.1:80"]), &guarded("10.2.0.0/16", destinations));
        let is_source = |op: &Op| matches!(op, Op::AddElement(_, SetName::LoadBalancerSourceCidr, _));
        let source = ops.iter().position(is_source).unwrap();
        source < ops.iter().position(|op| matches!(op, Op::SetDestination(..))).unwrap()
    };
    assert!(!before_drain(&[]), "nothing serves in the end");
    assert!(before_drain(&["10.0.0.2:80"]), "another endpoint does");
}

#[test]
fn sources_that_are_kept_out_in_the_end_never_get_to_endpoints_that_come() {
    let ops = change(&guarded("10.1.0.0/16", &[]), &guarded("10.2.0.0/16", &["10.0.0.1:80"]));
    let deleted =
        |set| ops.iter().position(|op| matches!(op, Op::DeleteElement(_, of, _) if *of == set)).unwrap();
    assert!(deleted(SetName::LoadBalancerSourceCidr) < deleted(SetName::NoLocal));
}
