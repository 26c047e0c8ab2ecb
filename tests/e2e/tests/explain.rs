//! `lbctl explain` names the worker that a flow really meets: for 1,000 random
//! flows, old and new, before and after a change of backends.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use test_support::{
    bed::Layout,
    hold::{Held, Holder},
    stage::{ECHO, LINE, LINES, Plan, Stage},
    udp::Flows,
    wait,
};

/// The backend that `explain` names for a packet of a flow that has begun.
fn explained(stage: &Stage, source: SocketAddr, target: SocketAddr, protocol: &str) -> Result<String> {
    let said = stage.lbctl.json(&["explain", &source.to_string(), &target.to_string(), protocol])?;
    let answers = said["answers"].as_array().context("explain gives no answers")?;
    let begun = answers.iter().find(|answer| answer["packet"] != "syn");
    let backend = begun.and_then(|answer| answer["backend"]["name"].as_str());
    Ok(backend.with_context(|| format!("explain names no backend: {said}"))?.to_owned())
}

fn ensure_explained(stage: &Stage, step: &str, lines: &[Held]) -> Result<()> {
    for held in lines {
        let said = explained(stage, held.local, held.target, "tcp")?;
        ensure!(
            said == held.worker,
            "{step}: explain says {said}, the packets went to {}: {held:?}",
            held.worker
        );
    }
    Ok(())
}

#[test]
fn explain_agrees_with_the_packets() -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let stage = Stage::start(Plan { layout, backends: Some(3), ..Plan::default() })?;
    let targets = stage.targets(LINES);
    let first = Holder::open(&stage.bed.client, &targets, 400)?;
    ensure_explained(&stage, "at rest", &first.exchange()?)?;

    stage.change_backend("add", 3)?;
    stage.wait_health(3, true)?;
    // Established flows by what was written down, new ones by the new table.
    ensure_explained(&stage, "flows older than the change", &first.exchange()?)?;
    let second = Holder::open(&stage.bed.client, &targets, 400)?;
    ensure_explained(&stage, "flows younger than the change", &second.exchange()?)?;

    for target in stage.targets(ECHO) {
        let mut flows = Flows::open(&stage.bed.client, target, 100)?;
        for (source, answer) in flows.sources()?.into_iter().zip(flows.exchange()?) {
            let answer = answer.with_context(|| format!("{source}: a datagram was lost"))?;
            let said = explained(&stage, source, target, "udp")?;
            ensure!(said == answer, "explain says {said}, {source} went to {answer}");
        }
    }
    Ok(())
}

/// Packets of a flow whose backend residency forbids are dropped there, and `explain` must not say that they arrive.
#[test]
fn explain_knows_residency_of_established_flows() -> Result<()> {
    let layout = Layout { workers: 2, ..Layout::default() };
    let stage = Stage::start(Plan { layout, ..Plan::default() })?;
    for (worker, region) in stage.bed.workers.iter().zip(["eu", "us"]) {
        stage.lbctl.run(&["backend", "set", LINE.name, &worker.name, "--region", region])?;
    }
    let weights = ["--region-policy", "weighted", "--region-weight", "eu=1", "--region-weight", "us=1"];
    let set: Vec<&str> = ["service", "set", LINE.name].into_iter().chain(weights).collect();
    stage.lbctl.run(&set)?;
    let targets: Vec<SocketAddr> = stage.targets(LINES).into_iter().filter(SocketAddr::is_ipv4).collect();
    let outside = &stage.bed.workers[1].name;
    // Weights take effect with the next decision.
    let (_held, flow) = wait::until_some("a flow goes to us", Duration::from_secs(10), || {
        let held = Holder::open(&stage.bed.client, &targets, 40).ok()?;
        let flow = held.exchange().ok()?.into_iter().find(|h| h.worker == *outside)?;
        Some((held, flow))
    })?;
    ensure!(explained(&stage, flow.local, flow.target, "tcp")? == *outside, "allowed");

    stage.lbctl.run(&["service", "set", LINE.name, "--region-policy", "active-active", "--regions", "eu"])?;
    let (source, target) = (flow.local.to_string(), flow.target.to_string());
    let said = stage.lbctl.json(&["explain", &source, &target, "tcp"])?;
    let answers = said["answers"].as_array().context("explain gives no answers")?;
    let begun = answers.iter().find(|a| a["packet"] == "established").context("no answer")?;
    ensure!(begun["backend"].is_null() && begun["forwarding"].is_null(), "{said}");
    let why = begun["why"].as_str().unwrap_or_default();
    ensure!(why.starts_with("Residency: ") && why.contains(outside.as_str()), "{why}");
    Ok(())
}
