//! Backends come, drain and go while 1,000 connections are open: none whose
//! backend stays is moved, and a drained backend's connections live on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use test_support::{
    bed::Layout,
    check,
    hold::{Held, Holder},
    http::{Load, Running},
    nginx,
    stage::{ECHO, LINES, Plan, Stage},
    udp::Flows,
    wait,
};

const CONNECTIONS: usize = 1000;

fn ensure_all_stay(step: &str, lines: &[Held]) -> Result<()> {
    let gone: Vec<&Held> = lines.iter().filter(|held| !held.stays()).collect();
    ensure!(
        gone.is_empty(),
        "{step}: {} of {} connections moved or broke: {:?}",
        gone.len(),
        lines.len(),
        gone[0]
    );
    Ok(())
}

fn stay_through_changes(mode: &'static str) -> Result<()> {
    let layout = Layout { workers: 5, ..Layout::default() };
    let stage = Stage::start(Plan { layout, mode, backends: Some(3), ..Plan::default() })?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), CONNECTIONS)?;
    ensure_all_stay("at first", &holder.exchange()?)?;

    for index in [3, 4] {
        stage.change_backend("add", index)?;
        stage.wait_health(index, true)?;
        ensure_all_stay("a backend was added", &holder.exchange()?)?;
    }
    // A second generation, placed with five backends.
    let second = Holder::open(&stage.bed.client, &stage.targets(LINES), CONNECTIONS / 2)?;
    let newcomers =
        second.exchange()?.iter().filter(|held| ["w4", "w5"].contains(&held.worker.as_str())).count();
    ensure!(newcomers > CONNECTIONS / 2 / 5, "the added backends took only {newcomers} new connections");

    stage.change_backend("drain", 0)?;
    for holder in [&holder, &second] {
        ensure_all_stay("a backend drains", &holder.exchange()?)?;
    }
    // Taking part again must not disturb anyone either.
    stage.change_backend("undrain", 0)?;
    stage.change_backend("drain", 3)?;
    for holder in [&holder, &second] {
        ensure_all_stay("one drain ended and another began", &holder.exchange()?)?;
    }

    // w2 goes at once: its connections may break, no others.
    stage.change_backend("rm", 1)?;
    for holder in [&holder, &second] {
        let lines: Vec<Held> = holder.exchange()?.into_iter().filter(|held| held.worker != "w2").collect();
        ensure_all_stay("another backend was removed", &lines)?;
    }
    Ok(())
}

#[test]
fn a_thousand_connections_stay_with_ipip() -> Result<()> {
    stay_through_changes("ipip")
}

#[test]
fn a_thousand_connections_stay_with_gue() -> Result<()> {
    stay_through_changes("gue")
}

#[test]
fn a_draining_backend_gets_nothing_new() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    stage.change_backend("drain", 0)?;
    let load = Load { keeping: 0, ..Load::new(stage.targets(nginx::PORT)) };
    let load = Running::start(&stage.bed.client, load)?;
    wait::until("500 requests have ended", Duration::from_secs(20), || load.count() >= 500)?;
    let account = load.finish()?;
    check::ensure_none_failed(&account)?;
    check::ensure_shared(&account, &["w2", "w3"], 0.2)
}

#[test]
fn udp_flows_stay_through_changes_and_restarts() -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let mut stage = Stage::start(Plan { layout, backends: Some(3), ..Plan::default() })?;
    for target in stage.targets(ECHO) {
        let mut flows = Flows::open(&stage.bed.client, target, 300)?;
        let first = flows.exchange()?;
        ensure!(first.iter().all(Option::is_some), "{target}: datagrams were lost");
        let mut ensure_same = |step: &str| -> Result<()> {
            let now = flows.exchange()?;
            let moved = now.iter().zip(&first).filter(|(now, first)| now != first).count();
            ensure!(moved == 0, "{target}: {moved} of 300 flows moved when {step}");
            Ok(())
        };
        stage.change_backend("add", 3)?;
        stage.wait_health(3, true)?;
        ensure_same("a backend was added")?;
        stage.change_backend("drain", 0)?;
        ensure_same("a backend began to drain")?;
        stage.ingress.stop(Signal::SIGKILL)?;
        stage.ingress.start_again(&stage.bed)?;
        ensure_same("lbd was killed and started again")?;
        stage.change_backend("undrain", 0)?;
        stage.change_backend("rm", 3)?;
        ensure_same("the change was undone")?;
    }
    Ok(())
}

#[test]
fn weights_move_new_flows_and_no_others() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 300)?;
    for (service, _) in stage.services() {
        stage.lbctl.run(&["backend", "set", &service, "w1", "--weight", "4"])?;
        stage.lbctl.run(&["backend", "set", &service, "w3", "--weight", "0"])?;
    }
    ensure_all_stay("weights changed", &holder.exchange()?)?;
    let fresh = Holder::open(&stage.bed.client, &stage.targets(LINES), 500)?.exchange()?;
    let count = |worker: &str| fresh.iter().filter(|held| held.worker == worker).count();
    // 4 to 1 of 500: 400 and 100, with room for chance (five standard deviations).
    ensure!((355..=445).contains(&count("w1")), "w1 took {} of 500 with weight 4 of 5", count("w1"));
    ensure!(count("w3") == 0, "w3 took {} with weight 0", count("w3"));
    Ok(())
}

#[test]
fn a_rollback_brings_back_what_was() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let before = stage.lbctl.run(&["config", "export"])?;
    let newest = stage.lbctl.json(&["history"])?["revisions"][0]["number"].as_u64();
    let revision = newest.context("the history names no revision")?;
    stage.lbctl.run(&["service", "rm", "web"])?;
    stage.change_backend_of("web6", "drain", 0)?;
    let target = stage.targets(nginx::PORT)[0];
    let load = Load { closing: 2, keeping: 0, ..Load::new(vec![target]) };
    let load = Running::start(&stage.bed.client, load)?;
    wait::until("a request has ended", Duration::from_secs(20), || load.count() > 0)?;
    let account = load.finish()?;
    ensure!(account.failed() == account.requests.len(), "a removed service still answers");

    stage.lbctl.run(&["rollback", &revision.to_string()])?;
    ensure!(stage.lbctl.run(&["config", "export"])? == before, "the rollback is not what was");
    stage.wait_healthy(&[0, 1, 2])?;
    check::ensure_none_failed(&check::request(&stage, stage.targets(nginx::PORT), 200)?)
}
