//! lbd goes away and comes back, politely and by kill -9, in the middle of bulk
//! and request load: no connection fails and the packet path has no gap.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::vip_v4,
    check::{ensure_none_failed, ensure_shared, request},
    http::{Load, Running},
    iperf, nginx,
    stage::{Plan, Stage},
};

const BULK: u16 = 5201;
const LOAD: Duration = Duration::from_secs(12);

/// iperf3 opens two connections, which must meet the same worker.
fn bulk_service(stage: &Stage) -> String {
    let (vip, worker) = (vip_v4(1), &stage.bed.workers[0]);
    format!(
        "[[service]]\nname = \"bulk\"\nvip = \"{vip}\"\nport = {BULK}\nprotocol = \"tcp\"\n\
         [service.health]\nkind = \"tcp\"\nport = {}\n\
         [[service.backend]]\nname = \"{}\"\naddress = \"{}\"\n",
        nginx::PORT,
        worker.name,
        worker.v4
    )
}

fn survives(signal: Signal) -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    let worker = &stage.bed.workers[0];
    let _iperf = iperf::start_worker(&worker.namespace, &worker.name, BULK, stage.bed.directory())?;
    stage.apply(&(stage.configuration(&[0, 1, 2]) + &bulk_service(&stage)))?;

    let bulk = iperf::start(&stage.bed.client, vip_v4(1).into(), BULK, LOAD.as_secs() as u32, 200)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    let started = Instant::now();
    let mut restarts = 0;
    while started.elapsed() < LOAD - Duration::from_secs(4) {
        stage.ingress.stop(signal)?;
        // The packet path is alone meanwhile.
        thread::sleep(Duration::from_secs(1));
        stage.ingress.start_again(&stage.bed)?;
        restarts += 1;
        thread::sleep(Duration::from_millis(500));
    }
    let bulk = bulk.finish()?;
    let account = load.finish()?;
    ensure!(restarts >= 2, "only {restarts} restarts within the load");
    ensure_none_failed(&account)?;
    ensure!(account.requests.len() > 1000, "too little load to mean anything: {}", account.requests.len());
    let gap = bulk.longest_gap();
    ensure!(gap <= Duration::from_millis(200), "bulk traffic stood still for {gap:?}: {:?}", bulk.steps);
    Ok(())
}

#[test]
fn kill_9_under_load_loses_nothing() -> Result<()> {
    survives(Signal::SIGKILL)
}

#[test]
fn a_polite_restart_under_load_loses_nothing() -> Result<()> {
    survives(Signal::SIGTERM)
}

/// A drain of a region is part of the desired state like any other.
#[test]
fn a_region_that_drains_still_drains_after_a_restart() -> Result<()> {
    let plan = Plan { arguments: &["--region", "eu"], ..Plan::default() };
    let mut stage = Stage::start(plan)?;
    for region in ["eu", "us"] {
        stage.lbctl.run(&["region", "add", region])?;
    }
    for (worker, region) in [("w1", "eu"), ("w2", "us"), ("w3", "us")] {
        stage.lbctl.run(&["backend", "set", "web", worker, "--region", region])?;
    }
    stage.lbctl.run(&["region", "drain", "us"])?;
    let before = stage.lbctl.run(&["config", "export"])?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        stage.ingress.stop(signal)?;
        stage.ingress.start_again(&stage.bed)?;
        let after = stage.lbctl.run(&["config", "export"])?;
        ensure!(after == before, "the desired state changed over {signal}:\n{before}\n{after}");
        // The IPv6 service's workers are in no region.
        let targets = stage.targets(nginx::PORT).into_iter().filter(SocketAddr::is_ipv4).collect();
        let account = request(&stage, targets, 200)?;
        ensure_shared(&account, &["w1"], 1.0)?;
    }
    // Also under its number: a rollback to the newest revision changes nothing.
    let newest = stage.lbctl.json(&["status"])?["revision"]["number"].to_string();
    let change = stage.lbctl.json(&["rollback", &newest, "--dry-run"])?;
    ensure!(change["differences"].as_array().is_some_and(Vec::is_empty), "{change}");
    Ok(())
}

#[test]
fn what_was_configured_is_there_after_a_restart() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    stage.change_backend("drain", 2)?;
    let before = stage.lbctl.run(&["config", "export"])?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        stage.ingress.stop(signal)?;
        stage.ingress.start_again(&stage.bed)?;
        ensure!(stage.lbctl.run(&["config", "export"])? == before, "the desired state changed over {signal}");
    }
    Ok(())
}
