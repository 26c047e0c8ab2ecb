//! The demo's second part: LLM workers with a real model behind the same load
//! balancer. A chat streams through the VIP, completions load it, a worker is
//! killed under load, and one is drained during a stream.
//!
//! Input: a stage whose nginx part has ended, and what the set-up fetched and built.
//! Output: phases of the report.

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

/// Timeout of every wait, long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);
/// Minimum duration of a phase under load.
const WATCH: Duration = Duration::from_secs(5);
/// Available memory below which two workers run instead of three.
const THREE_WORKERS_KIB: u64 = 3 << 20;
const LOAD: Load = Load { clients: 6, tokens: 24, attempts: 500 };
const QUESTION: &str = "What is gravity? Answer in two sentences.";

/// What the set-up found or built; passed to a run through sudo, because root
/// has another cache.
#[derive(Clone, Debug)]
pub struct LlmTools {
    /// The worker and the model.
    pub program: Program,
    /// A Python with OpenAI's client, if the set-up has created one.
    pub python: Option<PathBuf>,
}

/// Builds the worker; fetches libtorch and the model if they are missing.
pub fn prepare() -> Result<LlmTools> {
    let worker = inference::build_worker()?;
    Ok(LlmTools {
        program: Program { worker, model: model::ensure()? },
        python: python::existing(python::TEST)?,
    })
}

/// Running workers, by index.
type Workers = BTreeMap<usize, Process>;

/// Runs the LLM phases. The returned workers end when dropped.
pub fn run_all(stage: &Stage, tools: &LlmTools, report: &mut Report) -> Result<Workers> {
    let count = if memory_available()? < THREE_WORKERS_KIB { 2 } else { 3 };
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
    number.context("/proc/meminfo has no valid MemAvailable")
}

fn start(stage: &Stage, tools: &LlmTools, backends: &[usize], report: &mut Report) -> Result<Workers> {
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
        "all in use after {:.1} s; /ready answered {unready} polls with 503 during loading, and lbd used no worker before 200",
        took.as_secs_f32()
    ));
    report.add(phase);
    Ok(workers)
}

fn ask(stage: &Stage, ask: Ask) -> Result<Completion> {
    block_on(&stage.bed.client, move || async move { Ok(llm::complete(&ask, |_| ()).await) })
}

/// Streams one answer with each common client and prints its text as it arrives.
fn chat(stage: &Stage, tools: &LlmTools, report: &mut Report) -> Result<()> {
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

/// Python client that prints what curl does: the worker's header, then the events;
/// before them the begin of the request, because Python starts slowly.
const OPENAI: &str = r#"
import sys, openai
url, model, question = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
client.chat.completions  # loaded lazily; not part of the measured time
print("begin: now", flush=True)
stream = client.chat.completions.create(model=model, stream=True, max_tokens=64, temperature=0,
    messages=[{"role": "user", "content": question}])
print("x-worker:", stream.response.headers["x-worker"], flush=True)
for chunk in stream:
    print("data:", chunk.model_dump_json(), flush=True)
print("data: [DONE]", flush=True)
"#;

/// Runs a client that prints headers and events, and prints the text as it arrives.
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
            // The demo continues even if its output is closed.
            let _ = std::io::stdout().flush();
        }
    }
    println!();
    let status = child.wait().context("cannot wait")?;
    if !status.success() || !is_done || completion.tokens == 0 {
        completion.failure =
            Some(format!("{name}: {status}, {} tokens, complete: {is_done}", completion.tokens));
    }
    Ok(completion)
}

/// What the load observed while `during` ran.
struct TokenCounts {
    account: Account,
    tokens: usize,
    took: Duration,
}

fn watch<T>(load: &Running, during: impl FnOnce() -> Result<T>) -> Result<(T, TokenCounts)> {
    load.take();
    load.take_tokens();
    let began = Instant::now();
    let result = during()?;
    let took = began.elapsed();
    Ok((result, TokenCounts { tokens: load.take_tokens(), account: load.take(), took }))
}

impl TokenCounts {
    fn phase(&self, name: &str) -> Phase {
        let mut phase = phase(name, self.took, &self.account, self.tokens);
        note_failures(&mut phase, self.account.failures());
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
        // A stream that broke after its begin lost its worker.
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

/// Notes the first failures.
fn note_failures<'a>(phase: &mut Phase, failures: impl IntoIterator<Item = &'a Completion>) {
    let shown = failures.into_iter().take(3);
    phase.notes.extend(shown.map(|one| {
        format!(
            "failed: {} {}",
            one.worker.as_deref().unwrap_or("?"),
            one.failure.as_deref().unwrap_or_default()
        )
    }));
}

/// Creates a phase of sequential requests, with the speed of a single request.
fn phase_of_single(name: &str, took: Duration, account: &Account) -> Phase {
    let completions = &account.completions;
    let busy = completions.iter().map(|completion| completion.took).sum();
    let tokens = completions.iter().map(|completion| completion.tokens).sum();
    let mut phase = phase(name, busy, account, tokens);
    phase.seconds = took.as_secs_f64();
    note_failures(&mut phase, account.failures());
    phase
}

fn ended(load: &Running) -> usize {
    load.look(|account| account.completions.len())
}

/// Waits until the load has run for a while and `more` completions have ended.
fn wait_for_completions(load: &Running, more: usize) -> Result<()> {
    let (before, began) = (ended(load), Instant::now());
    let what = format!("{more} more completions have ended");
    wait::until(&what, PATIENCE, || ended(load) >= before + more && began.elapsed() >= WATCH).map(drop)
}

fn concurrent(load: &Running, count: usize, report: &mut Report) -> Result<()> {
    let ((), seen) = watch(load, || {
        wait_for_completions(load, 3 * LOAD.clients)?;
        let all = || load.look(|account| account.by_worker().len() == count);
        wait::until("every LLM worker has served", PATIENCE, all).map(drop)
    })?;
    report.add(seen.phase(&format!("llm: {} at once", LOAD.clients)));
    Ok(())
}

fn kill(
    stage: &Stage,
    tools: &LlmTools,
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
        wait_for_completions(load, 2 * LOAD.clients)?;
        Ok((open, detected))
    })?;
    let mut phase = phase(&format!("llm: kill {name}"), seen.took, &seen.account, seen.tokens);
    let is_open = |failed: &&Completion| failed.local.is_some_and(|end: SocketAddr| open.contains(&end));
    let (lost, others): (Vec<_>, Vec<_>) = seen.account.failures().partition(is_open);
    note_failures(&mut phase, others.iter().copied());
    phase.failed = others.len();
    phase.moved = others.iter().filter(|other| other.tokens > 0).count();
    phase.failed_open_to_killed = lost.len();
    phase.detect_ms = Some(u64::try_from(detected.as_millis()).unwrap_or(u64::MAX));
    phase.notes.push(format!(
        "failure detected after {} ms; {} requests open to it broke, all others continued",
        detected.as_millis(),
        lost.len()
    ));
    report.add(phase);

    let (took, seen) = watch(load, || {
        let began = Instant::now();
        workers.extend(llm::start_workers(stage, &tools.program, &[index])?.0);
        let took = began.elapsed();
        wait_for_completions(load, LOAD.clients)?;
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
        wait_for_completions(load, LOAD.clients)?;
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
    note_failures(&mut phase, account.failures());
    phase.failed += late;
    phase.notes.push(format!(
        "its running stream ended {} ({} tokens in {:.1} s); {late} new connections reached it, {} others kept serving",
        if stream.failure.is_none() { "complete" } else { "BROKEN" },
        stream.tokens,
        stream.took.as_secs_f32(),
        served.iter().filter(|served| **served != name).count()
    ));
    let process = workers.get_mut(&index).with_context(|| format!("no LLM worker on {name}"))?;
    let status = process.stop(Signal::SIGTERM, PATIENCE)?;
    ensure!(status.success(), "{name} ended with {status} after SIGTERM:\n{}", process.output());
    phase.notes.push("it then ended with status 0 on SIGTERM".to_owned());
    workers.remove(&index);
    report.add(phase);
    Ok(())
}
