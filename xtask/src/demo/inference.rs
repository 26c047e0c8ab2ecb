//! The demo's second part: LLM workers with a real model behind the same
//! balancer. A chat streams through the VIP, completions load it, a worker is
//! killed under that load, and one is drained under a running stream.
//!
//! In: a stage whose nginx part is over, and what the set-up fetched and built.
//! Out: phases in the account.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use test_support::{
    check::block_on,
    llm::{self, Account, Ask, Completion, Load, Program, Running},
    process::Process,
    stage::Stage,
    wait,
};

use super::report::{Phase, Report};
use crate::inference::{self, model, python};

/// A busy machine is slow; nothing here waits for longer.
const PATIENCE: Duration = Duration::from_secs(180);
/// How long a loaded phase lasts at least.
const WATCH: Duration = Duration::from_secs(5);
/// Below this, two workers instead of three.
const ROOMY_KIB: u64 = 3 << 20;
const LOAD: Load = Load { clients: 6, tokens: 24, attempts: 500 };
const QUESTION: &str = "What is gravity? Answer in two sentences.";

/// What the set-up found or built. A run through sudo is given it: root's cache
/// is another one.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The worker and the model.
    pub program: Program,
    /// A Python with OpenAI's client, where the set-up has made one.
    pub python: Option<PathBuf>,
}

/// Builds the worker, and fetches libtorch and the model the first time.
pub fn prepare() -> Result<Tools> {
    let worker = inference::build_worker()?;
    Ok(Tools {
        program: Program { worker, model: model::ensure()? },
        python: python::existing(python::TEST)?,
    })
}

/// The workers that run, by index.
type Workers = BTreeMap<usize, Process>;

/// Plays the LLM phases. The workers that it returns end when dropped.
pub fn run_all(stage: &Stage, tools: &Tools, report: &mut Report) -> Result<Workers> {
    let count = if memory_available()? < ROOMY_KIB { 2 } else { 3 };
    println!(
        "\n{count} LLM workers (SmolLM2-135M-Instruct, one thread each) join, behind port {}:",
        llm::PORT
    );
    let backends: Vec<usize> = (0..count).collect();
    let mut workers = start(stage, tools, &backends, report)?;
    chat(stage, tools, report)?;
    let load = Running::start(&stage.bed.client, LOAD)?;
    concurrent(&load, count, report)?;
    kill(stage, tools, &load, &mut workers, report)?;
    drain(stage, &load, &mut workers, report)?;
    load.finish()?;
    Ok(workers)
}

fn memory_available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("/proc/meminfo does not say what memory is available")
}

fn start(stage: &Stage, tools: &Tools, backends: &[usize], report: &mut Report) -> Result<Workers> {
    let began = Instant::now();
    llm::add_services(stage, backends)?;
    let (workers, unready) = llm::start_workers(stage, &tools.program, backends)?;
    let took = began.elapsed();
    let mut account = Account::default();
    for target in llm::targets() {
        account.completions.push(ask(stage, Ask::new(target, "Hello!", 1))?);
    }
    let mut phase = phase_of_single("llm: workers start", began.elapsed(), &account);
    phase.notes.push(format!(
        "all in use after {:.1} s; while weights loaded, /ready said 503 to {unready} looks, and lbd used none before 200",
        took.as_secs_f32()
    ));
    report.add(phase);
    Ok(workers)
}

fn ask(stage: &Stage, ask: Ask) -> Result<Completion> {
    block_on(&stage.bed.client, move || async move { Ok(llm::complete(&ask, |_| ()).await) })
}

/// One answer by each client that people use, its text shown as it comes.
fn chat(stage: &Stage, tools: &Tools, report: &mut Report) -> Result<()> {
    let [v4, v6] = llm::targets()[..] else { bail!("a VIP of each family was expected") };
    let url = format!("http://{v4}/v1/chat/completions");
    let body = json!({
        "model": llm::MODEL, "stream": true, "max_tokens": 64, "temperature": 0,
        "messages": [{"role": "user", "content": QUESTION}],
    });
    let mut curl = stage.bed.client.command("curl");
    curl.args(["-sSN", "--max-time", "120", "-D", "-", &url, "-H", "Content-Type: application/json", "-d"]);
    curl.arg(body.to_string());
    println!("\n$ curl -N {url} -d '{{\"stream\": true, …}}'    \"{QUESTION}\"");
    let mut account = Account { completions: vec![follow(&mut curl)?] };
    let began = account.completions[0].started;
    if let Some(python) = &tools.python {
        let mut client = stage.bed.client.command(python);
        client.args(["-c", OPENAI, &format!("http://{v6}/v1"), llm::MODEL, QUESTION]);
        println!("\n>>> openai.OpenAI(base_url=\"http://{v6}/v1\").chat.completions.create(stream=True, …)");
        account.completions.push(follow(&mut client)?);
    }
    let mut phase = phase_of_single("llm: chat, streaming", began.elapsed(), &account);
    for (client, completion) in ["curl -N", "openai"].iter().zip(&account.completions) {
        let first = completion.first_token.unwrap_or_default();
        let rate = completion.tokens.saturating_sub(1) as f64 / (completion.took - first).as_secs_f64();
        phase.notes.push(format!(
            "{client}: {} tokens, the first after {} ms, then {rate:.1} tokens/s",
            completion.tokens,
            first.as_millis()
        ));
    }
    report.add(phase);
    Ok(())
}

/// Speaks curl's language: the worker's header, then the events; before them,
/// when the request begins, as Python itself takes long to.
const OPENAI: &str = r#"
import sys, openai
url, model, question = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
client.chat.completions  # loaded late, and no part of the answer's time
print("begin: now", flush=True)
stream = client.chat.completions.create(model=model, stream=True, max_tokens=64, temperature=0,
    messages=[{"role": "user", "content": question}])
print("x-worker:", stream.response.headers["x-worker"], flush=True)
for chunk in stream:
    print("data:", chunk.model_dump_json(), flush=True)
print("data: [DONE]", flush=True)
"#;

/// Runs a client that prints headers and events, and shows the text as it comes.
fn follow(command: &mut Command) -> Result<Completion> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {name}"))?;
    let mut completion = Completion::begin();
    let mut is_done = false;
    for line in BufReader::new(child.stdout.take().expect("it was piped")).lines() {
        let line = line.context("cannot read what the client printed")?;
        let Some((key, value)) = line.split_once(": ") else { continue };
        if key.eq_ignore_ascii_case("x-worker") {
            print!("  {} » ", value.trim());
            completion.worker = Some(value.trim().to_owned());
        }
        if key == "begin" {
            completion.started = Instant::now();
        }
        if value == "[DONE]" {
            is_done = true;
            completion.took = completion.started.elapsed();
        }
        let Ok(event) = serde_json::from_str::<Value>(value) else { continue };
        if let Some(text) = event["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            completion.first_token.get_or_insert_with(|| completion.started.elapsed());
            completion.tokens += 1;
            completion.text.push_str(text);
            print!("{}", text.replace('\n', "\n       "));
            // To a closed pipe the rest of the demo can go on.
            let _ = std::io::stdout().flush();
        }
    }
    println!();
    let status = child.wait().context("cannot wait")?;
    if !status.success() || !is_done || completion.tokens == 0 {
        completion.failure =
            Some(format!("{name}: {status}, {} tokens, whole: {is_done}", completion.tokens));
    }
    Ok(completion)
}

/// What the load did while `during` ran.
struct Seen {
    account: Account,
    tokens: usize,
    took: Duration,
}

fn watch<T>(load: &Running, during: impl FnOnce() -> Result<T>) -> Result<(T, Seen)> {
    load.take();
    load.take_tokens();
    let began = Instant::now();
    let result = during()?;
    let took = began.elapsed();
    Ok((result, Seen { tokens: load.take_tokens(), account: load.take(), took }))
}

impl Seen {
    fn phase(&self, name: &str) -> Phase {
        let mut phase = phase(name, self.took, &self.account, self.tokens);
        tell(&mut phase, self.account.failures());
        phase
    }
}

fn phase(name: &str, took: Duration, account: &Account, tokens: usize) -> Phase {
    let millis = |time: Duration| (time.as_secs_f64() * 10_000.0).round() / 10.0;
    let first = |share| millis(account.quantile(share, |completion| completion.first_token));
    let whole = |share| account.quantile(share, |completion| Some(completion.took)).as_micros();
    let (per_s, p50, p99) = (tokens as f64 / took.as_secs_f64(), first(0.5), first(0.99));
    let mut phase = Phase {
        name: name.to_owned(),
        seconds: took.as_secs_f64(),
        requests: account.completions.len(),
        failed: account.failures().count(),
        // A stream that broke after it began has left its worker.
        moved: account.failures().filter(|failed| failed.tokens > 0).count(),
        retried: account.answered().filter(|completion| completion.refused > 0).count(),
        by_worker: account.by_worker(),
        p50_us: u64::try_from(whole(0.5)).unwrap_or(u64::MAX),
        p99_us: u64::try_from(whole(0.99)).unwrap_or(u64::MAX),
        tokens: Some(tokens),
        tokens_per_s: Some((per_s * 10.0).round() / 10.0),
        ttft_p50_ms: Some(p50),
        ttft_p99_ms: Some(p99),
        ..Phase::default()
    };
    phase.notes.push(format!(
        "{tokens} tokens, {per_s:.1} tokens/s; time to first token {p50:.0} ms (p50), {p99:.0} ms (p99)"
    ));
    phase
}

/// What went wrong first, in words.
fn tell<'a>(phase: &mut Phase, failures: impl IntoIterator<Item = &'a Completion>) {
    let shown = failures.into_iter().take(3);
    phase.notes.extend(shown.map(|one| {
        format!(
            "failed: {} {}",
            one.worker.as_deref().unwrap_or("?"),
            one.failure.as_deref().unwrap_or_default()
        )
    }));
}

/// A phase of requests one after the other: speed is that of a request.
fn phase_of_single(name: &str, took: Duration, account: &Account) -> Phase {
    let completions = &account.completions;
    let busy = completions.iter().map(|completion| completion.took).sum();
    let tokens = completions.iter().map(|completion| completion.tokens).sum();
    let mut phase = phase(name, busy, account, tokens);
    phase.seconds = took.as_secs_f64();
    tell(&mut phase, account.failures());
    phase
}

fn ended(load: &Running) -> usize {
    load.look(|account| account.completions.len())
}

/// Waits until the load has gone on for a while, and `more` completions have ended.
fn go_on(load: &Running, more: usize) -> Result<()> {
    let (before, began) = (ended(load), Instant::now());
    let what = format!("{more} more completions have ended");
    wait::until(&what, PATIENCE, || ended(load) >= before + more && began.elapsed() >= WATCH).map(drop)
}

fn concurrent(load: &Running, count: usize, report: &mut Report) -> Result<()> {
    let ((), seen) = watch(load, || {
        go_on(load, 3 * LOAD.clients)?;
        let all = || load.look(|account| account.by_worker().len() == count);
        wait::until("every LLM worker has served", PATIENCE, all).map(drop)
    })?;
    report.add(seen.phase(&format!("llm: {} at once", LOAD.clients)));
    Ok(())
}

fn kill(
    stage: &Stage,
    tools: &Tools,
    load: &Running,
    workers: &mut Workers,
    report: &mut Report,
) -> Result<()> {
    let index = 1;
    let worker = &stage.bed.workers[index];
    let name = worker.name.as_str();
    let ((open, detected), seen) = watch(load, || {
        let streams = || load.streaming().contains_key(name);
        wait::until(&format!("a completion streams from {name}"), PATIENCE, streams)?;
        let process = workers.remove(&index).with_context(|| format!("no LLM worker on {name}"))?;
        let open = load.hold(|| llm::kill(worker, process))?;
        let detected = llm::wait_in_use(stage, index, false)?;
        go_on(load, 2 * LOAD.clients)?;
        Ok((open, detected))
    })?;
    let mut phase = phase(&format!("llm: kill {name}"), seen.took, &seen.account, seen.tokens);
    let is_open = |failed: &&Completion| failed.local.is_some_and(|end: SocketAddr| open.contains(&end));
    let (lost, strangers): (Vec<_>, Vec<_>) = seen.account.failures().partition(is_open);
    tell(&mut phase, strangers.iter().copied());
    phase.failed = strangers.len();
    phase.moved = strangers.iter().filter(|stranger| stranger.tokens > 0).count();
    phase.failed_open_to_killed = lost.len();
    phase.detect_ms = Some(u64::try_from(detected.as_millis()).unwrap_or(u64::MAX));
    phase.notes.push(format!(
        "found dead after {} ms; {} requests were open to it and broke, the others went on",
        detected.as_millis(),
        lost.len()
    ));
    report.add(phase);

    let (took, seen) = watch(load, || {
        let began = Instant::now();
        workers.extend(llm::start_workers(stage, &tools.program, &[index])?.0);
        let took = began.elapsed();
        go_on(load, LOAD.clients)?;
        Ok(took)
    })?;
    let mut phase = seen.phase(&format!("llm: {name} returns"));
    phase.notes.push(format!("started and in use after {:.1} s", took.as_secs_f32()));
    report.add(phase);
    Ok(())
}

fn drain(stage: &Stage, load: &Running, workers: &mut Workers, report: &mut Report) -> Result<()> {
    let (sender, receiver) = mpsc::channel();
    // Long enough to outlive the drain on any machine.
    let long = Ask::new(llm::targets()[0], "Tell me a long story about the sea.", 240);
    let ((stream, index, drained, served), seen) = watch(load, || {
        let stream = stage.bed.client.spawn_async(move || async move {
            llm::complete(&long, |now| drop((now.tokens == 5).then(|| sender.send(now.worker.clone())))).await
        })?;
        let name = receiver.recv_timeout(PATIENCE).context("the stream did not begin")?;
        let name = name.context("the stream names no worker")?;
        let index = super::phases::position(stage, &name)?;
        llm::change_backend(stage, "drain", index)?;
        let drained = Instant::now();
        ensure!(!stream.is_finished(), "the stream ended before the drain began");
        wait::until("the drained worker's stream ends", PATIENCE, || stream.is_finished())?;
        let stream = stream.join().map_err(|_| anyhow!("the stream's client panicked"))?;
        go_on(load, LOAD.clients)?;
        let served: HashSet<_> = load.look(|account| account.by_worker().into_keys().collect());
        Ok((stream, index, drained, served))
    })?;
    let name = stage.bed.workers[index].name.clone();
    let mut account = seen.account.clone();
    let late = account.completions.iter().filter(|completion| {
        completion.started > drained && completion.worker.as_ref().is_some_and(|worker| *worker == name)
    });
    let late = late.count();
    account.completions.push(stream.clone());
    let mut phase = phase(&format!("llm: drain {name}"), seen.took, &account, seen.tokens + stream.tokens);
    tell(&mut phase, account.failures());
    phase.failed += late;
    phase.notes.push(format!(
        "its running stream ended {} ({} tokens in {:.1} s); {late} new connections reached it, {} served on",
        if stream.failure.is_none() { "whole" } else { "BROKEN" },
        stream.tokens,
        stream.took.as_secs_f32(),
        served.iter().filter(|served| **served != name).count()
    ));
    let process = workers.get_mut(&index).with_context(|| format!("no LLM worker on {name}"))?;
    let status = process.stop(Signal::SIGTERM, PATIENCE)?;
    ensure!(status.success(), "{name} ended with {status} after SIGTERM:\n{}", process.output());
    phase.notes.push("SIGTERM then ended it with status 0".to_owned());
    workers.remove(&index);
    report.add(phase);
    Ok(())
}
