//! Each packet of each case is asked of the table and of what every mode made of it.

// Tests all through: clippy.toml makes the exception for functions marked as such only.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use shunt_core::id::IpFamily;
use shunt_core::walk::walk;
use shunt_harness::cases;
use shunt_mode::rendered;
use shunt_suites::driver::CaseRun;
use shunt_suites::every_mode;
use shunt_suites::mode::ModeUnderTest;

fn packets_go_where_the_cases_say<M: ModeUnderTest>() {
    let (mut asked, mut skipped, mut wrong) = (0, 0, Vec::new());
    for case in cases::all().unwrap() {
        let mut run = CaseRun::new(&case, M::MODE);
        while let Some(step) = run.next_step() {
            for packet in step.packets.iter().filter(|p| p.modes.contains(&M::MODE)) {
                if let Some(missing) = M::lacks(&case.name, Some(&packet.name)) {
                    println!("skipped: {} mode, {}, {}: {missing}", M::MODE, case.name, packet.name);
                    skipped += 1;
                    continue;
                }
                let table = run.cluster.table(IpFamily::of(packet.packet.destination));
                let state = rendered::<M::Fake>(table);
                let of_table = walk(table, &packet.packet);
                let of_mode = M::trace(&state, &table.node().local_addresses, &packet.packet).unwrap();
                asked += 1;
                for (who, got) in [("table", &of_table.outcome), (M::MODE.name(), &of_mode)] {
                    if *got != packet.expect {
                        wrong.push(format!(
                            "{} {}: {}\n  expected {}\n  but {who} says {got} ({:?})",
                            step.folder.display(),
                            packet.name,
                            packet.packet,
                            packet.expect,
                            of_table.reason
                        ));
                    }
                }
            }
        }
    }
    println!("{asked} packets, {skipped} skipped");
    assert!(wrong.is_empty(), "{} wrong answers:\n{}", wrong.len(), wrong.join("\n"));
    assert!(asked > 250, "only {asked} packets were asked");
}

every_mode!(packets_go_where_the_cases_say);
