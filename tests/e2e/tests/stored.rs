//! Whatever is stored, lbd starts: the API serves, what does not fit this host is named, and the rest is in force.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use test_support::{
    bed::Layout,
    check,
    daemon::{Ingress, Lbctl},
    stage::{LINE, Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);
/// From the start of lbd until its API answers.
const API: Duration = Duration::from_secs(2);

fn status(lbctl: &Lbctl) -> Option<Value> {
    serde_json::from_slice(&lbctl.output(&["status", "-o", "json"]).ok()?.stdout).ok()
}

/// The stored state needs features that this start lacks: deny lists, and a scheduler of one service.
#[test]
fn a_state_that_does_not_fit_keeps_nobody_out_of_the_api() -> Result<()> {
    let mut stage = Stage::start(Plan {
        offers: vec![WEB, LINE],
        layout: Layout { workers: 2, ..Layout::default() },
        ..Plan::default()
    })?;
    stage.lbctl.run(&["guard", "deny", "add", "192.0.2.0/24"])?;
    stage.lbctl.run(&["service", "set", "lines", "--scheduler", "p2c"])?;
    stage.ingress.stop(Signal::SIGTERM)?;
    let began = Instant::now();
    stage.ingress = Ingress::start_on(&stage.bed, &stage.bed.ingress, "", &["--features", "icmp,fragments"])
        .context("lbd does not start")?;
    let mut first = None;
    wait::until("the API answers", PATIENCE, || {
        first = status(&stage.lbctl);
        first.is_some()
    })?;
    let took = began.elapsed();
    ensure!(took < wait::patience(API), "the API answered after {took:?}");
    let mut last = Vec::new();
    let expected = ["service lines is not up to date: ", "deny and allow lists need feature guard"];
    wait::until("status names what does not fit", PATIENCE, || {
        let found = status(&stage.lbctl).unwrap_or_default();
        let lines = found["problems"].as_array().cloned().unwrap_or_default();
        last = lines.iter().filter_map(|line| line.as_str().map(str::to_owned)).collect();
        expected.iter().all(|part| last.iter().any(|line| line.contains(part)))
    })
    .with_context(|| format!("it says {last:?}"))?;
    // The other services follow their workers.
    stage.hosts[0].http = None;
    wait::until("web is in force", PATIENCE, || {
        let list = stage.lbctl.json(&["backend", "list", "web"]).unwrap_or_default();
        list[0]["status"]["slots"] == 0
    })?;
    check::ensure_none_failed(&check::request(&stage, stage.targets(WEB.port), 50)?)?;
    // The service that does not fit keeps what it had in the maps.
    check::ensure_none_failed(&check::request(&stage, stage.targets(WEB.port), 10)?)?;
    let lines = stage.lbctl.json(&["backend", "list", "lines"])?;
    ensure!(lines.as_array().map_or(0, Vec::len) == 2, "{lines}");
    // It can be repaired through the API.
    stage.lbctl.output(&["service", "set", "lines", "--scheduler", "maglev"])?;
    stage.lbctl.output(&["guard", "deny", "rm", "192.0.2.0/24"])?;
    stage.revive(0)?;
    let healthy = || status(&stage.lbctl).is_some_and(|status| status["healthy"] == true);
    wait::until("all is in force", PATIENCE, healthy)
        .with_context(|| format!("status is {:?}", status(&stage.lbctl).map(|s| s["problems"].clone())))?;
    Ok(())
}
