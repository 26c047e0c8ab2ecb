//! `cargo xtask demo --regions`: runs `test_support::story`, in which two regions go through several failures, and
//! prints what happens.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use test_support::story::{Step, Story};

#[derive(Serialize)]
struct RegionsReport {
    ok: bool,
    steps: Vec<Step>,
}

/// Runs the story; returns it so that the fleet can be kept running.
pub fn play(report: Option<&Path>) -> Result<Story> {
    println!(
        "
Two regions, each with a router, two ingress hosts (lbd, BIRD) and two workers; a core router before the client:
             client                   m2
                └──────── core ───────┘          core: ECMP over what the regions announce (BGP, BFD 5 x 100 ms; within a region 3 x 50 ms)
                  east │       │ west
         e1 e2 ── router       router ── w1 w2   ingress hosts: VIPs on lo while they are served
         ea eb ──┘  └─ m0   m1 ─┘   └── wa wb    workers: four requests of 20 ms at once, state by event stream
  chat   10.99.0.1:8000, all workers, the own region first
  bound  10.99.0.2:8000, restricted to the east
  lines  10.99.0.1:9000, 200 connections that stay open
The workers simulate an LLM server's queue and reports: four real ones would need more than two processors."
    );
    // The story starts this program as its workers, before it parses arguments.
    let mut story = Story::start("replica")?;
    println!("\n$ lbctl backend list chat                       (on e1)");
    println!("{}", story.world().regions[0].hosts[0].lbctl.run(&["backend", "list", "chat"])?);
    println!("$ lbctl host show                               (on e1)");
    println!("{}", story.world().regions[0].hosts[0].lbctl.run(&["host", "show"])?);
    println!(
        "  {:<30} {:>8} {:>8} {:>6} {:>9} {:>8} {:>6}  requests by worker",
        "step", "detected", "requests", "failed", "in flight", "longest", "broken"
    );
    let steps = story.run(print_step)?;
    let ok = steps.iter().all(Step::is_clean);
    let sum = |count: fn(&Step) -> usize| steps.iter().map(count).sum::<usize>();
    println!(
        "\n{} requests, {} failed, {} in flight to what failed; {} connections broke although their worker was reachable",
        sum(|s| s.requests),
        sum(|s| s.failed),
        sum(|s| s.failed_under_way),
        sum(|s| s.broken)
    );
    if let Some(path) = report {
        let text = serde_json::to_string_pretty(&RegionsReport { ok, steps }).context("cannot write JSON")?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
        println!("results written to {}", path.display());
    }
    if !ok {
        bail!("requests or connections were lost that should have survived: see the steps marked ✗");
    }
    Ok(story)
}

fn print_step(step: &Step) {
    let detect = step.detect_ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
    let longest = if step.longest_ms == 0 { "-".to_owned() } else { format!("{} ms", step.longest_ms) };
    println!(
        "{} {:<30} {:>8} {:>8} {:>6} {:>9} {:>8} {:>6}  {}",
        if step.is_clean() { "✓" } else { "✗" },
        step.name,
        detect,
        step.requests,
        step.failed,
        step.failed_under_way,
        longest,
        step.broken,
        shares(&step.by_worker)
    );
    let served = if step.bound.is_empty() { "no worker".to_owned() } else { shares(&step.bound) };
    println!("      bound to the east: served by {served}; {} not served", step.bound_failed);
    if step.on_dead > 0 {
        println!(
            "      {} long-lived connections were on workers that failed or were unreachable",
            step.on_dead
        );
    }
    if step.moved > 0 {
        println!(
            "      {} long-lived connections were moved to the other region's hosts and broke",
            step.moved
        );
    }
    for note in &step.notes {
        println!("      {note}");
    }
}

fn shares(by_worker: &BTreeMap<String, usize>) -> String {
    by_worker.iter().map(|(worker, count)| format!("{worker} {count}")).collect::<Vec<_>>().join(", ")
}
