use std::collections::BTreeMap;
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

#[test]
fn sources_that_were_kept_out_never_get_to_endpoints_that_go() {
    let place = Place { address: [192, 0, 2, 1].into(), protocol: Protocol::Tcp, port: 80 };
    let wanted = |range: &str, destinations: &[&str]| Wanted {
        owner: ServicePortName {
            service: NamespacedName::new("ns", "svc"),
            port: "".into(),
            protocol: Protocol::Tcp,
        },
        service: Service::new(place.key(), scheduler::DEFAULT),
        destinations: destinations.iter().map(|d| d.parse().unwrap()).collect(),
        inside: None,
        sets: [SetName::LoadBalancer, SetName::LoadBalancerFw].into(),
        guard: Some(Arc::new(SourceRanges {
            ranges: [range.parse().unwrap()].into(),
            allow_vip_source: false,
        })),
    };
    let with = |wanted| Desired { places: BTreeMap::from([(place, Some(wanted))]), ..desired() };
    let mut state = State::empty(IpFamily::V4);
    for transaction in &plan(&state, &with(wanted("10.1.0.0/16", &["10.0.0.1:80"]))).transactions {
        crate::op::advance(&mut state, transaction);
    }
    let order = |destinations: &[&str]| {
        let ops = ops(&state, &with(wanted("10.2.0.0/16", destinations)));
        let source = ops.iter().position(|op| matches!(op, Op::AddElement(..))).unwrap();
        source < ops.iter().position(|op| matches!(op, Op::SetDestination(..))).unwrap()
    };
    assert!(!order(&[]), "nothing serves in the end");
    assert!(order(&["10.0.0.2:80"]), "another endpoint does");
}
