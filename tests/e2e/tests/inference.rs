//! Real LLM workers behind the VIP: a chat streams, a worker dies mid-load, one
//! drains under a stream. Needs the built worker and its model, so
//! `cargo xtask test inference` runs it, and the e2e suite does not.

use std::{
    sync::mpsc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use test_support::{
    check::block_on,
    llm::{self, Ask, Load, Program, Running},
    stage::{Plan, Stage, WEB},
    wait,
};

/// For what takes seconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn stage(mode: &'static str) -> Result<Stage> {
    let stage = Stage::start(Plan { mode, offers: vec![WEB], ..Plan::default() })?;
    llm::add_services(&stage, &[0, 1, 2])?;
    Ok(stage)
}

#[test]
#[ignore = "needs the inference worker: `cargo xtask test inference`"]
fn a_chat_streams_and_a_dead_worker_takes_only_its_own() -> Result<()> {
    let stage = stage("ipip")?;
    let program = Program::from_env()?;
    let (mut workers, unready) = llm::start_workers(&stage, &program, &[0, 1, 2])?;
    ensure!(unready > 0, "no worker was ever seen loading: the order of ready and healthy is not shown");

    for target in llm::targets() {
        let mut pieces = Vec::new();
        let chat = block_on(&stage.bed.client, move || async move {
            let chat =
                llm::complete(&Ask::new(target, "What is gravity?", 24), |now| pieces.push(now.tokens)).await;
            Ok((chat, pieces))
        })?;
        let (chat, pieces) = chat;
        ensure!(chat.failure.is_none(), "{target}: {:?}", chat.failure);
        ensure!(chat.text.contains("ravity"), "{target}: {:?}", chat.text);
        ensure!(pieces.iter().any(|&tokens| (2..20).contains(&tokens)), "it came all at once: {pieces:?}");
        ensure!(chat.first_token.is_some_and(|first| first < chat.took), "no first token before the end");
    }

    let load = Running::start(&stage.bed.client, Load { clients: 6, tokens: 48, attempts: 500 })?;
    wait::until("every worker has answered", PATIENCE, || {
        load.look(|account| account.by_worker().len() == 3)
    })?;
    ensure!(load.look(|account| account.failures().next().is_none()), "failed before anything happened");
    wait::until("w2 streams", PATIENCE, || load.streaming().contains_key("w2"))?;
    let victim = &stage.bed.workers[1];
    let process = workers.remove(&1).context("w2 runs")?;
    let open = load.hold(|| llm::kill(victim, process))?;
    let detected = llm::wait_in_use(&stage, 1, false)?;
    ensure!(detected < Duration::from_secs(10), "found dead only after {detected:?}");
    let after = load.look(|account| account.completions.len());
    wait::until("the others go on", PATIENCE, || load.look(|account| account.completions.len() > after + 6))?;
    let account = load.finish()?;
    let of_victim = |completion: &&llm::Completion| completion.local.is_some_and(|end| open.contains(&end));
    let strangers: Vec<_> = account.failures().filter(|failed| !of_victim(failed)).collect();
    ensure!(strangers.is_empty(), "failed elsewhere: {strangers:?}");
    ensure!(account.failures().count() > 0, "w2 was streaming as it died, and nothing broke: {open:?}");
    Ok(())
}

#[test]
#[ignore = "needs the inference worker: `cargo xtask test inference`"]
fn a_drained_workers_stream_ends_whole() -> Result<()> {
    let stage = stage("gue")?;
    let (mut workers, _) = llm::start_workers(&stage, &Program::from_env()?, &[0, 1, 2])?;
    let (sender, receiver) = mpsc::channel();
    let ask = Ask::new(llm::targets()[0], "Tell me a long story about the sea.", 300);
    let stream = stage.bed.client.spawn_async(move || async move {
        llm::complete(&ask, |now| drop((now.tokens == 5).then(|| sender.send(now.worker.clone())))).await
    })?;
    let name = receiver.recv_timeout(PATIENCE).context("the stream did not begin")?.context("no worker")?;
    let index = stage.bed.workers.iter().position(|worker| worker.name == name).context("which worker?")?;
    llm::change_backend(&stage, "drain", index)?;
    let drained = Instant::now();
    ensure!(!stream.is_finished(), "the stream ended before the drain began");
    let load = Running::start(&stage.bed.client, Load { clients: 3, tokens: 4, attempts: 1 })?;
    wait::until("12 completions have ended", PATIENCE, || {
        load.look(|account| account.completions.len() >= 12)
    })?;
    let account = load.finish()?;
    ensure!(account.failures().next().is_none(), "{:?}", account.failures().next());
    ensure!(!account.by_worker().contains_key(&name), "new flows after the drain: {:?}", account.by_worker());
    let stream = stream.join().map_err(|_| anyhow!("the stream panicked"))?;
    ensure!(stream.failure.is_none(), "{:?}", stream.failure);
    ensure!(stream.started + stream.took > drained, "the stream did not outlive the drain");
    // Told to end, the drained worker does so by itself.
    let process = workers.get_mut(&index).context("it runs")?;
    ensure!(process.stop(Signal::SIGTERM, PATIENCE)?.success(), "{}", process.output());
    Ok(())
}

/// When lbd took the last slot of worker `index` away, after `began`.
fn out_of_slots(stage: &Stage, index: usize, began: Instant) -> Result<Duration> {
    let name = &stage.bed.workers[index].name;
    wait::until(&format!("{name} has no slots"), PATIENCE, || {
        let ours = |service: &str| llm::SERVICES.contains(&service);
        stage
            .lbctl
            .backends(name)
            .is_ok_and(|all| all.iter().all(|backend| !ours(&backend.service) || backend.slots == 0))
    })
    .with_context(|| format!("lbd said:\n{}", stage.ingress.process().output()))?;
    Ok(began.elapsed())
}

/// When lbd last changed its mind about a replica, after `signalled`, in milliseconds: its own note, without the
/// time that asking for it takes.
fn noted(stage: &Stage, index: usize, signalled: SystemTime) -> Result<i64> {
    let list = stage.lbctl.json(&["replica", "list", llm::SERVICES[0]])?;
    let name = &stage.bed.workers[index].name;
    let mut all = list["replicas"].as_array().context("no list")?.iter();
    let ours = all.find(|replica| replica["backend"] == name.as_str()).context("not listed")?;
    let last = ours["since_ms"].as_i64().context("no time")?;
    Ok(last - i64::try_from(signalled.duration_since(UNIX_EPOCH)?.as_millis())?)
}

fn readiness(stage: &Stage, index: usize) -> Result<Vec<String>> {
    let list = stage.lbctl.json(&["replica", "list"])?;
    let name = &stage.bed.workers[index].name;
    let all = list["replicas"].as_array().context("no list")?.iter();
    let ours = all.filter(|replica| replica["backend"] == name.as_str());
    Ok(ours.map(|replica| replica["readiness"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
#[ignore = "needs the inference worker: `cargo xtask test inference`"]
fn a_workers_own_stream_tells_its_load_its_drain_and_its_death() -> Result<()> {
    let stage = stage("ipip")?;
    for service in llm::SERVICES {
        // Probes alone would take their time.
        let probes = ["--health", "http:/ready", "--health-interval", "5s", "--health-timeout", "4s"];
        stage.lbctl.run(&[&["service", "set", service, "--replica", "stream"], &probes[..]].concat())?;
    }
    let (mut workers, _) = llm::start_workers(&stage, &Program::from_env()?, &[0, 1, 2])?;
    for index in 0..3 {
        wait::until("its replica is ready", PATIENCE, || {
            readiness(&stage, index).is_ok_and(|all| all == ["ready", "ready"])
        })?;
    }

    let load = Running::start(&stage.bed.client, Load { clients: 6, tokens: 48, attempts: 500 })?;
    let mut seen = false;
    wait::until("a report of running requests", PATIENCE, || {
        let list = stage.lbctl.json(&["replica", "list", llm::SERVICES[0]]).unwrap_or_default();
        let all = list["replicas"].as_array().cloned().unwrap_or_default();
        seen = all.iter().any(|replica| {
            let report = &replica["report"];
            report["running"].as_u64() > Some(0)
                && replica["score"].as_u64() > Some(0)
                && report["capacity"].as_u64() > Some(0)
                && report["model"] == llm::MODEL
        });
        seen
    })?;

    let process = workers.remove(&1).context("w2 runs")?;
    let signalled = SystemTime::now();
    process.signal(Signal::SIGKILL)?;
    let detected = out_of_slots(&stage, 1, Instant::now())?;
    let lost_ms = noted(&stage, 1, signalled)?;
    ensure!(readiness(&stage, 1)?.iter().all(|state| state == "lost"), "{:?}", readiness(&stage, 1)?);
    drop(process);

    let process = workers.get_mut(&2).context("w3 runs")?;
    let signalled = SystemTime::now();
    process.signal(Signal::SIGTERM)?;
    let drained = out_of_slots(&stage, 2, Instant::now())?;
    let states = readiness(&stage, 2)?;
    let draining_ms = noted(&stage, 2, signalled)?;
    println!("real worker killed: lost {lost_ms} ms later, seen without slots {detected:?} later");
    println!("told to drain: {draining_ms} ms, seen without slots {drained:?} later, {states:?}");
    // 300 and 100 ms are promised; three times as long for a machine whose two cores compute tokens meanwhile,
    // and the time of asking.
    ensure!(detected < Duration::from_millis(900), "found dead only after {detected:?}");
    ensure!(drained < Duration::from_millis(500), "drained only after {drained:?}");
    drop(load.finish()?);
    Ok(())
}
