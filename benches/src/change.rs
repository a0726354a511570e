//! The pure part of a change, from the event to the plan, in memory.
//!
//! ```text
//!   Event ─> Store ─> Dirty ─> Compiler ─> Change ─> render ─> plan ─> advance
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use shunt_core::compile::{Compiler, Context};
use shunt_core::endpoint::{Conditions, Endpoint, EndpointPort, EndpointSlice};
use shunt_core::id::{IpFamily, NamespacedName, Protocol};
use shunt_core::node::Config;
use shunt_core::service::{Service, ServicePort, TrafficPolicy};
use shunt_core::store::{Event, Store};
use shunt_core::table::{Change, ForwardingTable};
use shunt_mode::{Backend, Plan, rendered};

/// A cluster that a mode has programmed, in memory.
#[derive(Debug)]
pub struct Programmed<B: Backend> {
    store: Store,
    compiler: Compiler,
    state: B::State,
    services: usize,
    endpoints: usize,
}

impl<B: Backend> Programmed<B> {
    /// So many Services with so many endpoints each.
    pub fn new(services: usize, endpoints: usize) -> Self {
        let mut store = Store::default();
        for number in 0..services {
            store.apply(Event::Service(service(number)));
            store.apply(Event::Slice(slice(number, endpoints, 0)));
        }
        let compiler = compile(&store);
        let state = rendered::<B>(compiler.table(IpFamily::V4));
        Self { store, compiler, state, services, endpoints }
    }

    /// The objects.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// The IPv4 table.
    pub fn table(&self) -> &ForwardingTable {
        self.compiler.table(IpFamily::V4)
    }

    /// Replaces one endpoint of one Service; the number of operations.
    #[inline(never)]
    pub fn one_change(&mut self, number: usize) -> usize {
        // Spread over the Services.
        let service = number.wrapping_mul(7_919) % self.services.max(1);
        let dirty = self.store.apply(Event::Slice(slice(service, self.endpoints, number + 1)));
        let changes = self.compiler.update(&self.store, &dirty);
        let desired = B::render(self.compiler.table(IpFamily::V4), &changes[IpFamily::V4 as usize]);
        let plan = B::plan(&self.state, &desired);
        for transaction in &plan.transactions {
            B::advance(&mut self.state, transaction);
        }
        plan.len()
    }
}

/// Compiles everything.
pub fn compile(store: &Store) -> Compiler {
    let mut context = Context::new("node-1", Config::default());
    context.node_addresses = vec![IpAddr::from([192, 0, 2, 11])];
    Compiler::full(context, store)
}

/// Renders and plans everything, from an empty kernel.
pub fn plan_everything<B: Backend>(table: &ForwardingTable) -> Plan<B::Op> {
    B::plan(&B::empty(table.family()), &B::render(table, &Change::everything()))
}

fn name(number: usize) -> NamespacedName {
    NamespacedName { namespace: format!("ns-{}", number % 100).into(), name: format!("svc-{number}").into() }
}

fn service(number: usize) -> Service {
    Service {
        scheduler: None,
        algorithm: None,
        name: name(number),
        created: 1,
        cluster_ips: vec![address(Ipv4Addr::new(10, 96, 0, 1), number)],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        health_check_node_port: None,
    }
}

/// A Service's slice; its first endpoint is another one in each `edition`.
fn slice(number: usize, endpoints: usize, edition: usize) -> EndpointSlice {
    let service = name(number);
    let node: Arc<str> = "node-2".into();
    let endpoint = |i: usize| Endpoint {
        pod: None,
        address: if i == 0 {
            address(Ipv4Addr::new(10, 128, 0, 1), number + edition * 40_000)
        } else {
            address(Ipv4Addr::new(10, 64, 0, 1), number * endpoints + i)
        },
        conditions: Conditions::default(),
        node: Some(node.clone()),
        zone: None,
        hints: None,
    };
    EndpointSlice {
        name: NamespacedName {
            namespace: service.namespace.clone(),
            name: format!("{}-abcde", service.name).into(),
        },
        service,
        family: IpFamily::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..endpoints).map(endpoint).collect(),
        last_change_trigger: None,
    }
}

/// The address so far after the first one.
fn address(first: Ipv4Addr, number: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from_bits(first.to_bits().wrapping_add(number as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shunt_mode_nftables::Nftables;
    use shunt_mode_nftables::kernel::Netlink;

    #[test]
    fn a_change_is_a_few_operations_whatever_the_number_of_services() {
        for services in [1, 10, 1_000] {
            let mut programmed = Programmed::<Nftables<Netlink>>::new(services, 3);
            for number in 0..20 {
                let operations = programmed.one_change(number);
                assert!((1..=4).contains(&operations), "{operations} operations among {services} Services");
            }
        }
    }
}
