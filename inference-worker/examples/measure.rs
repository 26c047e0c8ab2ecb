//! Measures the worker: `measure step|serve native|native-f32|torch-f32|torch-bf16 MODEL [FIGURE…]`.
//!
//! `step` drives a backend directly: decode at several batch sizes and prefill, in tokens/s. `serve` drives
//! the engine: one and eight streams, and the first token of a short request while a long prompt is computed.
//! Prints one JSON object. Called by `cargo xtask bench inference`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use inference_worker::{
    backend::{BLOCK, SeqPart, StepOutput, Want},
    engine::{
        Engine, EngineOptions, Event, Generate, Request, Work,
        sampling::{Sampling, argmax},
    },
    metrics::Metrics,
    model::{BackendChoice, DtypeChoice, LoadOptions, Model, load_model},
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

type Figures = BTreeMap<String, f64>;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, how, path, only @ ..] = arguments.as_slice() else {
        bail!("usage: measure step|serve native|… MODEL [FIGURE…]")
    };
    let (backend, dtype) = match how.as_str() {
        "native" => (BackendChoice::Native, DtypeChoice::Auto),
        "native-f32" => (BackendChoice::Native, DtypeChoice::F32),
        "torch-f32" => (BackendChoice::Torch, DtypeChoice::F32),
        "torch-bf16" => (BackendChoice::Torch, DtypeChoice::Bf16),
        other => bail!("no backend `{other}`"),
    };
    // LB_MEASURE=cpu: one thread, and tokens per second of processor time, for machines that are busy.
    let threads = if by_cpu_time() { 1 } else { std::thread::available_parallelism().map_or(2, usize::from) };
    tch::set_num_threads(threads as i32);
    let options = LoadOptions {
        device: tch::Device::Cpu,
        dtype,
        backend,
        threads,
        kv_bytes: Some(512 << 20),
        max_context: None,
    };
    let path = PathBuf::from(path);
    let figures = match what.as_str() {
        "step" => steps(&mut load_model(&path, &options)?, only)?,
        "serve" => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(serve(path, options))?
        }
        other => bail!("no measurement `{other}`"),
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

fn by_cpu_time() -> bool {
    std::env::var("LB_MEASURE").is_ok_and(|v| v == "cpu")
}

/// Seconds since some moment: on the wall, or of this process's processor time.
fn now() -> f64 {
    let clock = if by_cpu_time() { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for writes, and both clocks exist on Linux.
    unsafe { libc::clock_gettime(clock, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

/// The best of three in tokens/s.
fn best(tokens: usize, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..3 {
        let began = now();
        run()?;
        best = best.max(tokens as f64 / (now() - began));
    }
    Ok(best)
}

/// All figures, or only those named.
fn steps(model: &mut Model, only: &[String]) -> anyhow::Result<Figures> {
    const TOKENS: usize = 24;
    let wanted = |name: &String| only.is_empty() || only.contains(name);
    let mut figures = Figures::new();
    let (vocab, mut out) = (model.config.vocab, StepOutput::default());
    let prompt: Vec<u32> = (0..512u32).map(|i| 1000 + i * 37 % 20_000).collect();
    for batch in [1usize, 4, 8, 16] {
        let name = format!("decode_{batch}");
        if !wanted(&name) {
            continue;
        }
        let per = (64 + TOKENS).div_ceil(BLOCK);
        let blocks: Vec<Vec<u32>> =
            (0..batch).map(|i| (i * per..(i + 1) * per).map(|b| b as u32).collect()).collect();
        for blocks in &blocks {
            model.backend.step(
                &[SeqPart { tokens: &prompt[..64], start: 0, blocks, want: Want::Nothing }],
                &mut out,
            )?;
        }
        let speed = best(batch * TOKENS, || {
            let mut last = vec![[7u32]; batch];
            for t in 0..TOKENS {
                let part = |i: usize| SeqPart {
                    tokens: &last[i],
                    start: 64 + t,
                    blocks: &blocks[i],
                    want: Want::Last,
                };
                model.backend.step(&(0..batch).map(part).collect::<Vec<_>>(), &mut out)?;
                last = (0..batch).map(|i| [argmax(&out.logits[i * vocab..][..vocab])]).collect();
            }
            Ok(())
        })?;
        figures.insert(name, speed);
    }
    let blocks: Vec<u32> = (0..(512 / BLOCK) as u32).collect();
    for chunk in [64, 512] {
        let name = if chunk == 512 { "prefill_512".to_owned() } else { format!("prefill_512_by_{chunk}") };
        if !wanted(&name) {
            continue;
        }
        let speed = best(512, || {
            for (i, tokens) in prompt.chunks(chunk).enumerate() {
                let part = SeqPart { tokens, start: i * chunk, blocks: &blocks, want: Want::Last };
                model.backend.step(&[part], &mut out)?;
            }
            Ok(())
        })?;
        figures.insert(name, speed);
    }
    Ok(figures)
}

fn send(engine: &Engine, prompt: Vec<u32>, max_tokens: usize) -> anyhow::Result<UnboundedReceiver<Event>> {
    let (events, receiver) = unbounded_channel();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let work =
        Work::Generate(Box::new(Generate { max_tokens, sampling, ignore_eos: true, ..Generate::default() }));
    let request = Request { prompt, work, events, arrived: Instant::now(), group: engine.new_group() };
    engine.submit(vec![request])?;
    Ok(receiver)
}

async fn first_token(receiver: &mut UnboundedReceiver<Event>) -> anyhow::Result<()> {
    match receiver.recv().await.context("the engine stopped")? {
        Event::Token { .. } => Ok(()),
        other => bail!("expected a token, got {other:?}"),
    }
}

async fn serve(path: PathBuf, load: LoadOptions) -> anyhow::Result<Figures> {
    let metrics = Metrics::new();
    let options = EngineOptions { prefix_sharing: false, ..EngineOptions::default() };
    let engine: Arc<Engine> =
        Engine::start("m".into(), "1".into(), path, load, options, metrics.model("m")).await?;
    let prompt =
        |len: u32, salt: u32| (0..len).map(|i| 1000 + (i * 37 + salt * 911) % 20_000).collect::<Vec<u32>>();
    let mut figures = Figures::new();
    // The engine learns its prompt speed.
    let mut warm = send(&engine, prompt(300, 9), 2)?;
    while warm.recv().await.is_some() {}
    for streams in [1u32, 8] {
        let mut speed = 0.0f64;
        for _ in 0..2 {
            let tokens = 48;
            let mut receivers =
                (0..streams).map(|i| send(&engine, prompt(16, i), tokens)).collect::<Result<Vec<_>, _>>()?;
            let began = Instant::now();
            for receiver in &mut receivers {
                while receiver.recv().await.is_some() {}
            }
            speed = speed.max(f64::from(streams) * tokens as f64 / began.elapsed().as_secs_f64());
        }
        figures.insert(format!("serve_{streams}"), speed);
    }
    let (mut idle, mut busy) = (f64::MAX, f64::MAX);
    for round in 0..5 {
        let began = Instant::now();
        first_token(&mut send(&engine, prompt(24, round), 1)?).await?;
        idle = idle.min(began.elapsed().as_secs_f64());
        let mut long = send(&engine, prompt(1000, round + 20), 1)?;
        tokio::time::sleep(Duration::from_millis(100 + 17 * u64::from(round))).await;
        anyhow::ensure!(long.try_recv().is_err(), "the long prompt was done before the short one came");
        let began = Instant::now();
        first_token(&mut send(&engine, prompt(24, round + 40), 1)?).await?;
        busy = busy.min(began.elapsed().as_secs_f64());
        while long.recv().await.is_some() {}
    }
    figures.insert("ttft_idle_ms".into(), idle * 1e3);
    figures.insert("ttft_busy_ms".into(), busy * 1e3);
    figures.insert("ttft_busy_over_idle_ratio".into(), busy / idle);
    Ok(figures)
}
