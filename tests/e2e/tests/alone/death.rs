//! Workers die: a process that is killed (its host answers with a reset) and a
//! host that falls silent. Both are found, and new flows go elsewhere.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use test_support::{
    check::{ensure_none_failed, ensure_shared, request},
    http::{Load, Request, Running},
    nginx,
    stage::{Plan, Stage},
    wait,
};

#[test]
fn a_killed_worker_is_found_and_only_its_connections_break() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    // As any client does, a refused connection is tried again.
    let load = Load { attempts: 50, keeping: 60, ..Load::new(stage.targets(nginx::PORT)) };
    let load = Running::start(&stage.bed.client, load)?;
    wait::until("300 requests have ended", Duration::from_secs(20), || load.count() >= 300)?;
    let killing = Instant::now();
    stage.hosts[1].http = None;
    let killed = Instant::now();
    let detected = stage.wait_health(1, false)?;
    ensure!(detected < Duration::from_secs(3), "found dead only after {detected:?}");
    let account = load.finish()?;
    // A new connection that the worker had accepted, and did not answer before it was killed, names nobody.
    let in_flight =
        |request: &Request| request.started <= killed && request.started + request.took >= killing;
    let of_victim = |request: &&Request| match request.worker.as_deref() {
        Some(worker) => worker == "w2",
        None => in_flight(request),
    };
    let strangers: Vec<_> = account.failures().filter(|request| !of_victim(request)).collect();
    ensure!(strangers.is_empty(), "failed on other workers: {strangers:?}");

    let account = request(&stage, stage.targets(nginx::PORT), 400)?;
    ensure_none_failed(&account)?;
    ensure_shared(&account, &["w1", "w3"], 0.2)?;

    stage.revive(1)?;
    stage.wait_health(1, true)?;
    let account = request(&stage, stage.targets(nginx::PORT), 400)?;
    ensure_none_failed(&account)?;
    ensure_shared(&account, &["w1", "w2", "w3"], 0.05)
}

#[test]
fn a_silent_host_is_found() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    stage.bed.workers[2].namespace.ip(&["link", "set", "eth0", "down"])?;
    let detected = stage.wait_health(2, false)?;
    ensure!(detected < Duration::from_secs(6), "found dead only after {detected:?}");
    let account = request(&stage, stage.targets(nginx::PORT), 400)?;
    ensure_none_failed(&account)?;
    ensure_shared(&account, &["w1", "w2"], 0.2)
}
