//! Backends come, drain and go while 1,000 connections are open: none whose
//! backend stays is moved, and a drained backend's connections live on.

use std::time::Duration;

use anyhow::{Result, ensure};
use test_support::{
    bed::Layout,
    check,
    hold::{Held, Holder},
    http::{Load, Running},
    nginx,
    stage::{LINES, Plan, Stage},
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
