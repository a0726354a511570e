//! `make bench`: the running agent at scale.
//!
//! ```text
//!   this process, in the node's namespace            shunt, in the node's namespace
//!   fake API server ── list, watch ────────────────> run ── netlink ──> kernel
//!        │ put(EndpointSlice) at t0                                        │
//!        └──────────── generation of nf_tables, polled: t1 <──────────────┘
//! ```
//!
//! Prints what it measures; judges nothing.

// Counts and ticks are far below 2^52.
#![allow(clippy::cast_precision_loss, clippy::cast_sign_loss)]

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use nft_netlink::Socket;
use serde_json::{Value, json};
use shunt_harness::apiserver::{ApiServer, Resource, many_services};
use shunt_harness::lab::{ChildGuard, Lab, Namespace};

/// Measures start, restart, changes and memory of `shunt run`.
#[derive(Parser)]
struct Args {
    /// The release build of shunt.
    shunt: PathBuf,
    /// Number of Services.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Number of changed EndpointSlices.
    #[arg(long, default_value_t = 1_000)]
    changes: usize,
    /// Also write the results to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let lab = Lab::builder().node([IpAddr::from([192, 0, 2, 11])]).build()?;
    let shunt = args.shunt.clone();
    let (services, endpoints, changes) = (args.services, args.endpoints, args.changes);
    let node = lab.node().clone();
    let results = lab.node().run(move || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(measure(&node, &shunt, services, endpoints, changes))
    })?;
    println!("{results:#}");
    if let Some(file) = args.json {
        std::fs::write(&file, format!("{results:#}\n")).with_context(|| file.display().to_string())?;
    }
    Ok(())
}

async fn measure(
    node: &Namespace,
    shunt: &Path,
    services: usize,
    endpoints: usize,
    changes: usize,
) -> Result<Value> {
    let server = ApiServer::start().await?;
    server.put(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node-1" },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.11" }] },
    }));
    server.put_all(many_services(services, endpoints));
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig())?;

    eprintln!("cold start with {services} Services x {endpoints} endpoints ...");
    let mut agent = start(node, shunt, &kubeconfig, folder.path())?;
    let cold = first_sync(&mut agent).await?;

    eprintln!("{changes} changed EndpointSlices, one at a time ...");
    settle().await;
    let before = cpu(agent.id())?;
    let replaced = change(&server, services, endpoints, changes, Kind::Replace).await?;
    let scaled = change(&server, services, endpoints, changes, Kind::Scale).await?;
    let used = cpu(agent.id())?.saturating_sub(before);
    let peak = status_kib(agent.id(), "VmHWM")?;
    let steady = status_kib(agent.id(), "VmRSS")?;

    eprintln!("restart over what is there ...");
    agent.stop()?;
    let mut agent = start(node, shunt, &kubeconfig, folder.path())?;
    let restart = first_sync(&mut agent).await?;
    agent.stop()?;

    Ok(json!({
        "services": services,
        "endpoints": endpoints,
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "cold_start": cold,
        "restart": restart,
        "endpoint_replaced_event_to_kernel_ms": replaced,
        "endpoint_added_or_removed_event_to_kernel_ms": scaled,
        "cpu_ms_per_change": round(used.as_secs_f64() * 1e3 / (2.0 * changes as f64)),
        "peak_rss_mib": round(peak / 1024.0),
        "steady_rss_mib": round(steady / 1024.0),
    }))
}

fn start(node: &Namespace, shunt: &Path, kubeconfig: &Path, folder: &Path) -> Result<Started> {
    let mut command = Command::new(shunt);
    command
        .args(["run", "--mode", "nftables", "--hostname-override", "node-1"])
        .args(["--cluster-cidr", "10.0.0.0/8", "--logging-format", "json"])
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .arg("--admin-socket")
        .arg(folder.join("shunt.sock"));
    let at = Instant::now();
    Ok(Started { child: node.spawn(&command)?, at })
}

/// An agent and when it was started.
struct Started {
    child: ChildGuard,
    at: Instant,
}

impl Started {
    fn id(&self) -> u32 {
        self.child.id()
    }

    fn stop(&mut self) -> Result<()> {
        let status = self.child.stop()?;
        ensure!(status.success(), "shunt ended with {status}: {}", self.child);
        Ok(())
    }
}

/// Waits until both families are in sync; what the agent says of the first one, and how long it took
/// from the start of the process.
async fn first_sync(agent: &mut Started) -> Result<Value> {
    let deadline = agent.at + Duration::from_mins(2);
    loop {
        let log = agent.child.stderr();
        let synced: Vec<Value> = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .map(|line| line["fields"].clone())
            .filter(|fields| fields["message"] == "in sync with the kernel")
            .collect();
        if let [v4, _, ..] = synced.as_slice() {
            return Ok(json!({
                "whole_process_ms": round(agent.at.elapsed().as_secs_f64() * 1e3),
                "kernel_read_ms": v4["observing"],
                "plan_ms": v4["planning"],
                "kernel_write_ms": v4["applying"],
                "operations": v4["operations"],
                "transactions": v4["transactions"],
            }));
        }
        ensure!(Instant::now() < deadline, "never in sync: {}", agent.child);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn settle() {
    tokio::time::sleep(Duration::from_secs(1)).await;
}

#[derive(Clone, Copy)]
enum Kind {
    /// One endpoint's address becomes another one.
    Replace,
    /// One endpoint less, then the same one more.
    Scale,
}

/// Changes one EndpointSlice after the other; milliseconds from the event at the API server to the
/// kernel's commit.
async fn change(
    server: &ApiServer,
    services: usize,
    endpoints: usize,
    changes: usize,
    kind: Kind,
) -> Result<Value> {
    let slices: Vec<Value> =
        many_services(services, endpoints).filter(|o| o["kind"] == "EndpointSlice").collect();
    server.wait_for_watchers(Resource::EndpointSlices, 1).await;
    let mut socket = Socket::new()?;
    let mut times = Vec::with_capacity(changes);
    for i in 0..changes {
        // Spread over the Services, so that nothing is warm by chance; pairs of changes of Scale
        // touch the same Service.
        let round = if matches!(kind, Kind::Scale) { i / 2 } else { i };
        let mut slice = slices[round * 7919 % slices.len()].clone();
        match kind {
            Kind::Replace => {
                let new = format!("10.250.{}.{}", i / 250, i % 250 + 1);
                slice["endpoints"][0]["addresses"][0] = new.into();
            }
            Kind::Scale if i % 2 == 0 => {
                slice["endpoints"].as_array_mut().context("no endpoints")?.pop();
            }
            Kind::Scale => {}
        }
        let generation = socket.generation()?;
        let started = Instant::now();
        server.put(slice);
        loop {
            // The server runs on this thread too.
            tokio::task::yield_now().await;
            if socket.generation()? != generation {
                break;
            }
            ensure!(started.elapsed() < Duration::from_secs(10), "change {i} never reached the kernel");
            std::hint::spin_loop();
        }
        times.push(started.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| round(times[((times.len() - 1) as f64 * share) as usize]);
    Ok(json!({ "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0) }))
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// User and system time that a process has used.
fn cpu(id: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat")?;
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("CLK_TCK")?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

fn status_kib(id: u32, field: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find(|l| l.starts_with(field)).with_context(|| field.to_owned())?;
    line.split_whitespace().nth(1).context("no number")?.parse().context("no number")
}
