//! Regions and new versions: one ingress host in eu, two workers there and two in us, which report what they are told
//! to. Where new connections go is counted on the connections themselves.

use crate::REPLICA;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};
use test_support::{
    bed::{Layout, vip_v4},
    http::{Account, Load, Running},
    process::Process,
    replica::{self, PORT},
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// A spill is to be there after a second or two. Asserted four times as long, for machines that do other things too.
const SPILLED: Duration = Duration::from_secs(2);
/// Workers' regions, in their order.
const REGIONS: [&str; 4] = ["eu", "eu", "us", "us"];

struct Bench {
    workers: Vec<Option<Process>>,
    stage: Stage,
}

impl Bench {
    /// Workers behind a service that asks for their state; `settings` has further flags of the service.
    fn start(settings: &[&str]) -> Result<Self> {
        let layout = Layout { workers: 4, ..Layout::default() };
        let arguments = &["--region", "eu", "--zone", "a"];
        let stage = Stage::start(Plan { layout, offers: vec![WEB], arguments, ..Plan::default() })?;
        let workers = replica::start_all(&stage.bed, REPLICA)?;
        replica::add_service(&stage, settings)?;
        for (index, region) in REGIONS.iter().enumerate() {
            let worker = &stage.bed.workers[index].name;
            let address = stage.backend_address(index, false).to_string();
            stage.lbctl.run(&["backend", "add", "llm", worker, &address, "--region", region])?;
        }
        let bench = Self { workers, stage };
        bench.until("all replicas are heard", |b| {
            b.stage.lbctl.json(&["replica", "list", "llm"]).is_ok_and(|list| {
                list["replicas"].as_array().is_some_and(|all| all.iter().all(|r| r["readiness"] == "ready"))
            })
        })?;
        Ok(bench)
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Result<Duration> {
        wait::until(what, PATIENCE, || holds(self)).with_context(|| {
            let explained = self.stage.lbctl.run(&["policy", "explain", "llm"]).unwrap_or_default();
            let list = self.stage.lbctl.run(&["backend", "list", "llm"]).unwrap_or_default();
            format!("{explained}\n{list}\nlbd said:\n{}", self.stage.ingress.process().output())
        })
    }

    /// Slots of each worker, as parts of all.
    fn slots(&self) -> Result<[f64; 4]> {
        let list = self.stage.lbctl.json(&["backend", "list", "llm"])?;
        let all = list.as_array().context("no list")?;
        let part = |name: &str| -> Option<f64> {
            let status = &all.iter().find(|b| b["name"] == name)?["status"];
            Some(status["slots"].as_f64()? / status["table_size"].as_f64()?)
        };
        let names = self.stage.bed.workers.iter().map(|w| part(&w.name).unwrap_or_default());
        names.collect::<Vec<_>>().try_into().ok().context("not four workers")
    }

    /// Part of the slots that leave eu.
    fn away(&self) -> f64 {
        self.slots().map_or(-1.0, |slots| slots[2] + slots[3])
    }

    fn say(&self, index: usize, words: &str) -> Result<()> {
        replica::say(&self.stage.bed.workers[index], words)
    }

    /// New connections, and some that stay, all the time.
    fn load(&self) -> Result<Running> {
        let target = (vip_v4(1), PORT).into();
        let load =
            Load { closing: 4, keeping: 0, pause: Duration::from_millis(1), ..Load::new(vec![target]) };
        let load = Running::start(&self.stage.bed.client, load)?;
        wait::until("100 requests have ended", PATIENCE, || load.count() >= 100)?;
        Ok(load)
    }

    /// Who answers so many new connections from now on.
    fn count(&self, requests: usize) -> Result<Account> {
        let load = self.load()?;
        drop(load.take());
        wait::until("enough requests have ended", PATIENCE * 3, || load.count() > requests)?;
        let account = load.finish()?;
        ensure!(account.failed() == 0, "{:?}", account.failures().next());
        Ok(account)
    }

    fn refused(&self, arguments: &[&str], what: &str) -> Result<()> {
        let output = self.stage.lbctl.output(arguments)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(4) && text.contains(what), "{arguments:?}: {text}");
        Ok(())
    }

    fn explained(&self) -> Result<Value> {
        self.stage.lbctl.json(&["policy", "explain", "llm"])
    }
}

/// Part of the answered requests that these workers answered.
fn part(account: &Account, workers: &[&str]) -> f64 {
    let by_worker = account.by_worker();
    let count: usize = workers.iter().filter_map(|name| by_worker.get(*name)).sum();
    count as f64 / account.requests.len().max(1) as f64
}

#[test]
fn what_a_region_has_no_room_for_goes_to_the_next_and_comes_back() -> Result<()> {
    let bench = Bench::start(&["--region-hold", "2s"])?;
    for index in 0..4 {
        bench.say(index, "ready-4")?;
    }
    bench.until("the own region serves alone", |b| b.away() == 0.0)?;
    ensure!(part(&bench.count(300)?, &["w1", "w2"]) == 1.0, "local first");
    bench.until("the round-trip time to us is measured", |b| {
        b.explained().is_ok_and(|e| e["regions"][1]["rtt_us"].as_u64().is_some_and(|us| us > 0))
    })?;

    // 24 requests for 16 places, and us has 8 of its 16 free.
    bench.say(0, "ready-8-4")?;
    bench.say(1, "ready-8-4")?;
    let told = Instant::now();
    bench.until("some flows spill", |b| b.away() > 0.0)?;
    let took = told.elapsed();
    println!("spilled {took:?} after the replicas' word");
    ensure!(took < SPILLED * 4, "{took:?}, {SPILLED:?} is promised");
    let explained = bench.explained()?;
    let share = explained["steer"]["shares"][1]["permille"].as_u64().context("no share")?;
    ensure!((25..=500).contains(&share) && share % 25 == 0, "{explained}");
    ensure!(
        explained["decision"]["reason"]
            .as_str()
            .is_some_and(|why| why.contains("% of its capacity") && why.contains("to us spill")),
        "{explained}"
    );
    // Once us has no more free slots, the share rests.
    bench.say(2, "ready-8")?;
    bench.say(3, "ready-7")?;
    bench.until("the share rests", |b| {
        let before = b.away();
        std::thread::sleep(Duration::from_secs(4));
        b.away() == before && before > 0.1
    })?;
    let away = bench.away();
    let account = bench.count(1_500)?;
    let got = part(&account, &["w3", "w4"]);
    println!("{:.1} % of the slots and {:.1} % of the connections went to us", away * 100.0, got * 100.0);
    ensure!((got - away).abs() < 0.06 && got > 0.1, "{got} of {away}");

    // us gets full itself: what was sent there comes back, however full eu is.
    bench.say(2, "ready-8-20")?;
    bench.say(3, "ready-8-20")?;
    bench.until("us takes nothing more", |b| b.away() == 0.0)?;
    bench.say(2, "ready-1")?;
    bench.say(3, "ready-1")?;
    bench.until("us takes some again", |b| b.away() > 0.0)?;

    // Below the second threshold it comes back, in its time.
    let held = bench.away();
    bench.say(0, "ready-6")?;
    bench.say(1, "ready-6")?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(bench.away() >= held, "between the thresholds nothing comes back");
    bench.say(0, "ready-2")?;
    bench.say(1, "ready-2")?;
    bench.until("all are home", |b| b.away() == 0.0)?;
    ensure!(part(&bench.count(300)?, &["w1", "w2"]) == 1.0, "local first");

    // A region drains, and no second one. Other services have no workers elsewhere, which takes a word more.
    bench.refused(&["region", "drain", "eu"], "leaves services web, web6 without any backend")?;
    bench.stage.lbctl.run(&["region", "drain", "eu", "--force"])?;
    bench.until("eu takes nothing new", |b| b.away() == 1.0)?;
    ensure!(part(&bench.count(300)?, &["w3", "w4"]) == 1.0, "drained");
    bench.refused(&["region", "drain", "us"], "drain of region eu")?;
    bench.refused(&["rollout", "lock"], "drain of region eu")?;
    bench.stage.lbctl.run(&["region", "undrain", "eu"])?;
    bench.until("eu serves again", |b| b.away() == 0.0).map(drop)
}

#[test]
fn residency_refuses_rather_than_leave() -> Result<()> {
    // The panic rule would keep sending flows to replicas that nobody hears of.
    let mut bench = Bench::start(&["--regions", "eu", "--panic", "0"])?;
    ensure!(bench.away() == 0.0, "us may never take anything");
    let status = bench.stage.lbctl.output(&["audit", "residency"])?;
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    ensure!(
        status.status.code() == Some(1) && text.contains("backend w3 is in us and gets no flows"),
        "{text}"
    );

    let load = bench.load()?;
    for index in 0..2 {
        bench.workers[index] = None;
    }
    bench.until("nobody is left", |b| b.slots().is_ok_and(|slots| slots == [0.0; 4]))?;
    drop(load.take());
    wait::until("some requests were refused", PATIENCE * 2, || load.count() >= 4)?;
    let account = load.finish()?;
    ensure!(account.failed() == account.requests.len(), "{:?}", account.by_worker());
    let vip = format!("{}:{PORT}", vip_v4(1));
    let output = bench.stage.lbctl.output(&["explain", "10.0.0.9:40000", &vip, "tcp"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("residency: only eu, with 2 of 4 backends: none of them takes flows"), "{text}");
    ensure!(
        text.contains("syn → nowhere") && text.contains("Residency: no allowed region of the service"),
        "{text}"
    );
    let stats = bench.stage.lbctl.json(&["stats"])?;
    let counted = stats["reasons"].as_array().into_iter().flatten().find(|r| r["reason"] == "residency");
    ensure!(counted.is_some_and(|r| r["packets"].as_u64() > Some(0)), "{stats}");
    let output = bench.stage.lbctl.output(&["audit", "residency"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(text.contains("no backend takes flows in eu: new flows are refused"), "{text}");
    bench.until("the decision says so", |b| {
        b.explained().is_ok_and(|e| {
            e["decision"]["reason"].as_str().is_some_and(|why| why.starts_with("refused by residency"))
        })
    })?;

    // Without the rule, the other region stands in.
    bench.stage.lbctl.run(&["service", "set", "llm", "--regions", "any"])?;
    bench.until("us stands in", |b| b.away() == 1.0)?;
    ensure!(part(&bench.count(300)?, &["w3", "w4"]) == 1.0, "all go to us");

    // With it again, they are refused again, those that had been established there too.
    bench.stage.lbctl.run(&["service", "set", "llm", "--regions", "eu"])?;
    bench.until("nobody takes anything", |b| b.slots().is_ok_and(|slots| slots == [0.0; 4])).map(drop)
}

#[test]
fn a_new_version_gets_its_share_and_is_aborted_when_it_fails() -> Result<()> {
    let bench = Bench::start(&[])?;
    for index in 2..4 {
        let worker = &bench.stage.bed.workers[index].name;
        bench.stage.lbctl.run(&["backend", "set", "llm", worker, "--region", "eu"])?;
    }
    for index in 0..3 {
        bench.say(index, "ready-0-0-1-100-0-1000")?;
    }
    bench.say(3, "ready-0-0-v2-10-0-100")?;
    bench.until("the version is known", |b| {
        b.stage.lbctl.json(&["replica", "list", "llm"]).is_ok_and(|list| {
            let all = list["replicas"].as_array().cloned().unwrap_or_default();
            all.iter().filter(|r| r["report"]["version"] == "v2").count() == 1
        })
    })?;
    bench.stage.lbctl.run(&["rollout", "start", "--model", "fake", "--version", "v2", "--to", "5%"])?;
    bench.refused(&["region", "drain", "eu"], "roll-out of v2 of fake on service llm")?;
    bench.until("w4 has its share of the slots", |b| b.slots().is_ok_and(|s| (s[3] - 0.05).abs() < 0.002))?;
    let account = bench.count(3_000)?;
    let got = part(&account, &["w4"]);
    println!("{:.2} % of {} connections went to the new version", got * 100.0, account.requests.len());
    ensure!((got - 0.05).abs() < 0.02, "{got}");

    // It answers as well as the old version: nothing happens. Then it fails.
    for index in 0..3 {
        bench.say(index, "ready-0-0-1-200-1-2000")?;
    }
    bench.say(3, "ready-0-0-v2-60-1-600")?;
    let rollout =
        || -> Result<Value> { Ok(bench.stage.lbctl.json(&["rollout", "status"])?["rollouts"][0].clone()) };
    bench.until("it is judged", |_| {
        rollout().is_ok_and(|r| r["new"]["finished"] == 50 && r["state"] == "running")
    })?;
    bench.say(3, "ready-0-0-v2-100-21-1000")?;
    let told = Instant::now();
    bench.until("it is aborted", |_| rollout().is_ok_and(|r| r["state"] == "aborted"))?;
    bench.until("w4 gets nothing", |b| b.slots().is_ok_and(|s| s[3] == 0.0))?;
    println!("aborted {:?} after the replica's word: {}", told.elapsed(), rollout()?["reason"]);
    ensure!(part(&bench.count(300)?, &["w4"]) == 0.0, "aborted");
    let history = bench.stage.lbctl.run(&["history"])?;
    ensure!(
        history.contains("roll-out of v2 of fake aborted: on service llm, 23.3 % of 90 requests failed"),
        "{history}"
    );

    // Another try, and everything.
    bench.refused(&["rollout", "clear"], "v2 gets 25 % in region eu (w4) instead of 0 %")?;
    bench.stage.lbctl.run(&["rollout", "clear", "--force"])?;
    bench.until("all are alike", |b| b.slots().is_ok_and(|s| s.iter().all(|s| (s - 0.25).abs() < 0.002)))?;
    bench.stage.lbctl.run(&["rollout", "start", "--model", "fake", "--version", "v2", "--to", "5%"])?;
    bench.stage.lbctl.run(&["rollout", "promote"])?;
    bench.until("w4 has everything", |b| b.slots().is_ok_and(|s| s[3] == 1.0)).map(drop)
}
