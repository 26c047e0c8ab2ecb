//! Replica state to placement: a worker that is killed, drains, fails or lies, and where new flows go from then
//! on, measured by connections that come all the time.

use crate::REPLICA;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};
use test_support::{
    bed::{Layout, vip_v4},
    check::ensure_shared,
    http::{Load, Running},
    process::Process,
    replica::{self, PORT},
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);
/// What is promised for a killed worker and for one that drains. Asserted of the median: a machine that does other
/// things too may keep any one of them waiting.
const KILLED: Duration = Duration::from_millis(300);
const DRAINED: Duration = Duration::from_millis(100);
/// Longest wait that is put down to the machine. Probes would need 10 seconds and more.
const BUSY: Duration = Duration::from_secs(5);
/// How often each is measured.
const ROUNDS: usize = 5;

struct Bench {
    workers: Vec<Option<Process>>,
    stage: Stage,
}

impl Bench {
    /// Workers behind a service that asks for their state; `check` has further flags of the service.
    fn start(check: &[&str]) -> Result<Self> {
        let layout = Layout { workers: 3, ..Layout::default() };
        let stage = Stage::start(Plan { layout, offers: vec![WEB], ..Plan::default() })?;
        let workers = replica::start_all(&stage.bed, REPLICA)?;
        replica::add_service(&stage, check)?;
        for index in 0..3 {
            stage.change_backend_of("llm", "add", index)?;
        }
        let bench = Self { workers, stage };
        for index in 0..3 {
            bench.wait_state(index, "ready")?;
        }
        Ok(bench)
    }

    fn replica(&self, index: usize) -> Result<Value> {
        let list = self.stage.lbctl.json(&["replica", "list", "llm"])?;
        let name = self.stage.bed.workers[index].name.as_str();
        let all = list["replicas"].as_array().context("no list")?;
        all.iter().find(|r| r["backend"] == name).cloned().context("the replica is not listed")
    }

    /// Waits until lbd says this of a replica, and its slots are as that demands.
    fn wait_state(&self, index: usize, state: &str) -> Result<()> {
        let name = &self.stage.bed.workers[index].name;
        wait::until(&format!("{name} is {state}"), PATIENCE, || {
            let slots = self.stage.lbctl.backends(name);
            let slots = slots.is_ok_and(|all| {
                all.iter().any(|b| b.service == "llm" && (b.slots > 0) == (state == "ready"))
            });
            slots && self.replica(index).is_ok_and(|r| r["readiness"] == state)
        })
        .with_context(|| {
            format!("{:?}; lbd said:\n{}", self.replica(index), self.stage.ingress.process().output())
        })
        .map(drop)
    }

    /// New connections all the time.
    fn load(&self) -> Result<Running> {
        let target = (vip_v4(1), PORT).into();
        let load =
            Load { closing: 4, keeping: 0, pause: Duration::from_millis(1), ..Load::new(vec![target]) };
        let load = Running::start(&self.stage.bed.client, load)?;
        wait::until("100 requests have ended", PATIENCE, || load.count() >= 100)?;
        Ok(load)
    }

    fn say(&self, index: usize, words: &str) -> Result<()> {
        replica::say(&self.stage.bed.workers[index], words)
    }

    /// Share of new connections that a worker gets from now on.
    fn share(&self, index: usize) -> Result<f64> {
        let load = self.load()?;
        // What came before the scores were set does not count.
        drop(load.take());
        wait::until("400 requests have ended", PATIENCE, || load.count() > 400)?;
        let account = load.finish()?;
        ensure!(account.failed() == 0, "{:?}", account.failures().next());
        let name = &self.stage.bed.workers[index].name;
        Ok(account.by_worker().get(name).copied().unwrap_or(0) as f64 / account.requests.len() as f64)
    }

    /// Waits until a replica's report has this score.
    fn is_loaded(&self, index: usize, score: u64) -> Result<()> {
        wait::until("the score is taken", PATIENCE, || self.replica(index).is_ok_and(|r| r["score"] == score))
            .map(drop)
    }

    fn restart(&mut self, index: usize) -> Result<()> {
        self.workers[index] = Some(replica::start(&self.stage.bed, &self.stage.bed.workers[index], REPLICA)?);
        self.wait_state(index, "ready")
    }
}

fn summary(what: &str, mut times: Vec<Duration>, promised: Duration) -> Result<()> {
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{what}: last new flow {median:?} after it in the median, {worst:?} at worst, of {times:?}");
    ensure!(median < promised && worst < BUSY, "{what}: {times:?}, {promised:?} is promised");
    Ok(())
}

/// Kills w2 again and again under load; when did the last connection go there that was not answered?
fn killed(check: &[&str], what: &str) -> Result<()> {
    let mut bench = Bench::start(check)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let load = bench.load()?;
        let died = Instant::now();
        bench.workers[1] = None;
        bench.wait_state(1, "lost")?;
        // Late ones must have the time to come.
        let seen = load.count();
        wait::until("400 more requests have ended", PATIENCE, || load.count() > seen + 400)?;
        let account = load.finish()?;
        let after = account.failures().filter(|r| r.started > died);
        times.push(after.map(|r| r.started - died).max().unwrap_or_default());
        bench.restart(1)?;
    }
    summary(what, times, KILLED)
}

#[test]
fn a_killed_worker_gets_no_new_flow_by_its_broken_stream() -> Result<()> {
    killed(&[], "worker killed, stream alone")
}

#[test]
fn nor_where_probes_alone_would_take_seconds() -> Result<()> {
    let slow = ["--health", "http:/", "--health-interval", "5s", "--rise", "1", "--fall", "3"];
    killed(&slow, "worker killed, probes each 5 s")
}

#[test]
fn a_worker_that_says_so_gets_no_new_flow() -> Result<()> {
    let bench = Bench::start(&[])?;
    for word in ["draining", "failed", "loading"] {
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let load = bench.load()?;
            bench.say(2, word)?;
            let told = Instant::now();
            bench.wait_state(2, word)?;
            let seen = load.count();
            wait::until("400 more requests have ended", PATIENCE, || load.count() > seen + 400)?;
            let account = load.finish()?;
            ensure!(account.failed() == 0, "{:?}", account.failures().next());
            let after =
                account.requests.iter().filter(|r| r.worker.as_deref() == Some("w3") && r.started > told);
            times.push(after.map(|r| r.started - told).max().unwrap_or_default());
            bench.say(2, "ready")?;
            bench.wait_state(2, "ready")?;
        }
        summary(&format!("worker says {word}"), times, DRAINED)?;
    }

    // Shown as what it is: the worker's own word, not the operator's.
    bench.say(2, "draining-3")?;
    bench.wait_state(2, "draining")?;
    let status: Value = serde_json::from_slice(&bench.stage.lbctl.output(&["status", "-o", "json"])?.stdout)?;
    let listed = status["replicas"].as_array().context("status has no replicas")?;
    ensure!(
        listed.len() == 1 && listed[0]["backend"] == "w3" && listed[0]["readiness"] == "draining",
        "{listed:?}"
    );
    ensure!(
        status["draining"].as_array().is_some_and(Vec::is_empty),
        "the operator asked for no drain: {status}"
    );
    let shown = bench.stage.lbctl.run(&["backend", "show", "llm", "w3"])?;
    for line in ["state:", " up", "replica:", "draining: reported by the replica, model fake", "37.5%"] {
        ensure!(shown.contains(line), "{line} is not in\n{shown}");
    }
    let list = bench.stage.lbctl.run(&["backend", "list", "llm"])?;
    ensure!(list.contains("replica reports draining"), "{list}");

    // All at once: nobody takes flows, and nobody is made to.
    for index in 0..2 {
        bench.say(index, "draining")?;
        bench.wait_state(index, "draining")?;
    }
    let output = bench.stage.lbctl.output(&["status"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("no backend takes new flows in: llm"), "{text}");
    bench.say(0, "ready")?;
    bench.wait_state(0, "ready")
}

#[test]
fn a_lying_replica_changes_nothing_but_its_own_note() -> Result<()> {
    let bench = Bench::start(&[])?;
    bench.say(1, "ready-4")?;
    let holds = |what: &str, holds: &dyn Fn(&Value) -> bool| {
        wait::until(what, PATIENCE, || bench.replica(1).is_ok_and(|r| holds(&r)))
            .with_context(|| format!("{:?}", bench.replica(1)))
    };
    holds("its load is known", &|r| r["score"] == 500_000)?;
    let load = bench.load()?;
    for (lie, expected) in [
        ("negative", "running is -5, must be 0 to 1000000"),
        ("huge", "running is 1000000000000000000, must be"),
        ("nan", "not JSON"),
        ("stale", "stale: its clock has stood still"),
        ("megabytes", "more than 65536 bytes"),
        ("trickle", "a report took longer than 1000 ms"),
        ("silent", "the time without a report took longer than 1900 ms"),
    ] {
        bench.say(1, lie)?;
        holds(expected, &|r| r["trouble"]["what"].as_str().is_some_and(|what| what.contains(expected)))?;
        let replica = bench.replica(1)?;
        ensure!(replica["readiness"] == "ready", "{lie}: {replica}");
        // What is stale was fresh once; the rest was never taken.
        ensure!(lie == "stale" || replica["report"]["running"] == 4, "{lie}: {replica}");
        bench.say(1, "ready-4")?;
        holds("it is believed again", &|r| r["trouble"].is_null() && r["score"] == 500_000)?;
    }
    let account = load.finish()?;
    ensure!(account.failed() == 0, "{:?}", account.failures().next());
    ensure_shared(&account, &["w1", "w2", "w3"], 0.1)
}

#[test]
fn reported_load_steers_new_flows_between_two() -> Result<()> {
    steered("p2c", 0.05).map(drop)
}

#[test]
fn reported_load_steers_new_flows_between_all() -> Result<()> {
    // Of three, two are idle: the loaded one is nobody's choice.
    let bench = steered("lc", 0.01)?;

    // Reports count for each backend's weight.
    bench.stage.lbctl.run(&[
        "service",
        "set",
        "llm",
        "--replica",
        "stream",
        "--replica-interval",
        "300ms",
    ])?;
    (0..3).try_for_each(|index| bench.say(index, "ready-4"))?;
    bench.stage.lbctl.run(&["backend", "set", "llm", "w1", "--weight", "4"])?;
    (0..3).try_for_each(|index| bench.is_loaded(index, 500_000))?;
    let got = bench.share(0)?;
    ensure!(got > 0.6, "w1, of four times the weight and equally full, got {got} of the new flows");
    Ok(())
}

/// Lets replicas report load, to a service with this scheduler; a loaded one may get `most` of the new flows.
fn steered(scheduler: &str, most: f64) -> Result<Bench> {
    let bench = Bench::start(&["--scheduler", scheduler])?;
    let share = |index| bench.share(index);
    let is_loaded = |index, score| bench.is_loaded(index, score);
    for (loaded, idle) in [(0, [1, 2]), (2, [0, 1])] {
        bench.say(loaded, "ready-8-1000")?;
        idle.iter().try_for_each(|&index| bench.say(index, "ready-0"))?;
        is_loaded(loaded, 1_000_000 + 4 * 1_000 * 1_000_000 / 8)?;
        idle.iter().try_for_each(|&index| is_loaded(index, 0).map(drop))?;
        let got = share(loaded)?;
        println!("w{} with 1,000 waiting: {:.1} % of new flows", loaded + 1, got * 100.0);
        ensure!(got < most, "w{} got {got} of the new flows", loaded + 1);
    }
    // Each idle again: each its part.
    bench.say(2, "ready-0")?;
    is_loaded(2, 0)?;
    let got = share(2)?;
    ensure!(got > 0.15, "w3 got {got} of the new flows");

    // Nobody is asked any more, so nobody is loaded.
    bench.say(2, "ready-8-1000")?;
    is_loaded(2, 1_000_000 + 4 * 1_000 * 1_000_000 / 8)?;
    bench.stage.lbctl.run(&["service", "set", "llm", "--replica", "none"])?;
    let got = share(2)?;
    ensure!(got > 0.15, "w3 got {got} of the new flows by a score that nobody reports");
    Ok(bench)
}
