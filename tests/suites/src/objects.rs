//! Arbitrary objects through everything that is pure: what the fuzz target and its regression test do.

use serde_json::Value;
use shunt_core::compile::Context;
use shunt_core::id::IpFamily;
use shunt_core::node::Config;
use shunt_core::table::Change;
use shunt_core::walk::Packet;
use shunt_watch::{Converter, Kind};

use crate::driver::{Cluster, Synced};
use crate::mode::ModeUnderTest;
use crate::random::Step;

/// Takes in objects, one JSON text a line, and syncs after each; nothing may panic, no plan may be
/// refused, and table and rules must agree on packets to every frontend.
///
/// Lines that are no JSON object are passed over: this tests what comes after the parser.
///
/// # Panics
/// When something of the above does not hold.
pub fn take_in<M: ModeUnderTest>(lines: &[u8]) {
    let mut converter = Converter::new("test-node");
    let mut cluster = Cluster::new(Context::new("test-node", Config::default()));
    let mut kernels = IpFamily::ALL.map(|family| Synced::adopt(M::fake(family)).unwrap());
    for line in lines.split(|byte| *byte == b'\n') {
        let Ok(object @ Value::Object(_)) = serde_json::from_slice(line) else { continue };
        let kind = match object["kind"].as_str() {
            Some("EndpointSlice") => Kind::EndpointSlice,
            Some("Node") => Kind::Node,
            Some("ServiceCIDR") => Kind::ServiceCidr,
            _ => Kind::Service,
        };
        let Some(event) = converter.value(kind, object).event else { continue };
        cluster.step(&Step::Event(event));
        for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
            let change = cluster.take_change(family);
            kernel.sync(cluster.table(family), &change).unwrap();
        }
    }
    for (family, kernel) in IpFamily::ALL.into_iter().zip(&mut kernels) {
        let table = cluster.table(family);
        let plan = kernel.plan(table, &Change::everything());
        assert!(plan.is_empty(), "something was left out:\n{plan}\n{table}");
        for (_, entry) in table.frontends().take(20) {
            let Some(destination) = entry.frontend.address else { continue };
            let packet = Packet {
                source: destination,
                interface: None,
                destination,
                port: entry.frontend.port,
                protocol: entry.frontend.protocol,
            };
            let wanted = M::expected(table, &packet);
            let traced = M::trace(&kernel.mirror, &table.node().local_addresses, &packet).unwrap();
            assert_eq!(traced, wanted, "{packet}\n{table}");
        }
    }
}
