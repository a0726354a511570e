//! 10,000 Services with 10 endpoints each: how long until all is known, and in how much memory.
//!
//! The source runs in a process of its own, so that its memory is not that of the fake server.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use common::Source;
use shunt_harness::apiserver::{ApiServer, many_services};
use shunt_watch::{KubeOptions, Update};

const URL: &str = "SHUNT_LOAD_URL";
const PAGES: &str = "SHUNT_LOAD_PAGES";
const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 10;

fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The process that is measured; does nothing when run with the other tests.
#[tokio::test]
async fn measured() {
    let Ok(url) = std::env::var(URL) else { return };
    let before = status("VmHWM:");
    let start = Instant::now();
    let mut source = Source::kube(KubeOptions {
        master: Some(url),
        streaming_lists: std::env::var(PAGES).is_err(),
        ..KubeOptions::new("node-1")
    });
    let patience = Duration::from_mins(1);
    loop {
        match source.receive(patience).await {
            Some(Update::Synced) => break,
            Some(_) => source.log.clear(),
            None => panic!("no Synced"),
        }
    }
    let took = start.elapsed();
    assert_eq!(source.store.services().count(), SERVICES);
    let endpoints: usize = source.store.all_slices().map(|s| s.endpoints.len()).sum();
    assert_eq!(endpoints, SERVICES * ENDPOINTS);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "LOADED in {} ms; peak RSS {} kB, {before} kB of it before the start; now {} kB",
        took.as_millis(),
        status("VmHWM:"),
        status("VmRSS:")
    )
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_cluster_loads_quickly_in_little_memory() {
    let server = ApiServer::start().await.unwrap();
    server.put_all(many_services(SERVICES, ENDPOINTS));
    for pages in [false, true] {
        let url = server.url();
        let output = tokio::task::spawn_blocking(move || {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "measured", "--nocapture", "--test-threads=1"]).env(URL, url);
            if pages {
                command.env(PAGES, "1");
            }
            command.output().unwrap()
        });
        let output = output.await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let line = text.lines().find_map(|l| l.split_once("LOADED ")).map(|(_, l)| l).unwrap();
        println!("{} objects, {}: {line}", 2 * SERVICES, if pages { "pages" } else { "stream" });
        let numbers: Vec<u64> =
            line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        let (took, peak) = (numbers[0], numbers[1]);
        // Generous: a debug build on a busy machine.
        assert!(took < 60_000, "{took} ms");
        assert!(peak < 96 << 10, "{peak} kB");
    }
}
