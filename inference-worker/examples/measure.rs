//! Measures the worker: `measure step|serve native|native-f32|torch-f32|torch-bf16 MODEL [FIGURE…]`.
//!
//! `step` measures a backend: decode at several batch sizes and prefill, in tokens/s. `serve` measures the engine: one
//! and eight streams, and the time to first token of a short request, idle and during the prefill of a long prompt.
//! Prints one JSON object. Called by `cargo xtask bench inference`.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use inference_worker::{
    backend::{BLOCK_SIZE, OutputKind, SequenceChunk, StepOutput},
    engine::{
        Engine, EngineOptions, Event, GenerationParams, Request, Task,
        sampling::{SamplingParams, argmax},
    },
    metrics::Metrics,
    model::{BackendChoice, DtypeChoice, LoadOptions, Model, load_model},
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

type Figures = BTreeMap<String, f64>;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [measurement, backend, path, only @ ..] = arguments.as_slice() else {
        bail!("usage: measure step|serve native|native-f32|torch-f32|torch-bf16 MODEL [FIGURE…]")
    };
    let (backend, dtype) = match backend.as_str() {
        "native" => (BackendChoice::Native, DtypeChoice::Auto),
        "native-f32" => (BackendChoice::Native, DtypeChoice::F32),
        "torch-f32" => (BackendChoice::Torch, DtypeChoice::F32),
        "torch-bf16" => (BackendChoice::Torch, DtypeChoice::Bf16),
        other => bail!("unknown backend `{other}`, expected native, native-f32, torch-f32 or torch-bf16"),
    };
    // LB_MEASURE=cpu measures tokens per second of CPU time with one thread, for busy machines.
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
    let figures = match measurement.as_str() {
        "step" => measure_steps(&mut load_model(&path, &options)?, only)?,
        "serve" => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(measure_serving(path, options))?
        }
        other => bail!("unknown measurement `{other}`, expected step or serve"),
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

fn by_cpu_time() -> bool {
    std::env::var("LB_MEASURE").is_ok_and(|v| v == "cpu")
}

/// Returns the seconds of a monotonic clock, or of this process's CPU time.
fn now() -> f64 {
    let clock = if by_cpu_time() { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is valid for writes, and both clocks exist on Linux.
    unsafe { libc::clock_gettime(clock, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

/// Returns the best speed of three runs in tokens/s.
fn best_speed(tokens: usize, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..3 {
        let began = now();
        run()?;
        best = best.max(tokens as f64 / (now() - began));
    }
    Ok(best)
}

/// Measures a backend: all figures, or only those in `only`.
fn measure_steps(model: &mut Model, only: &[String]) -> anyhow::Result<Figures> {
    let is_selected = |name: &String| only.is_empty() || only.contains(name);
    let mut figures = Figures::new();
    let prompt: Vec<u32> = (0..512u32).map(|i| 1000 + i * 37 % 20_000).collect();
    for batch in [1usize, 4, 8, 16] {
        let name = format!("decode_{batch}");
        if is_selected(&name) {
            figures.insert(name, decode_speed(model, &prompt, batch)?);
        }
    }
    for chunk in [64, 512] {
        let name = if chunk == 512 { "prefill_512".to_owned() } else { format!("prefill_512_by_{chunk}") };
        if is_selected(&name) {
            figures.insert(name, prefill_speed(model, &prompt, chunk)?);
        }
    }
    Ok(figures)
}

/// Returns the tokens/s of decoding `batch` sequences together.
fn decode_speed(model: &mut Model, prompt: &[u32], batch: usize) -> anyhow::Result<f64> {
    const TOKENS: usize = 24;
    let (vocab, mut out) = (model.config.vocab, StepOutput::default());
    let per_sequence = (64 + TOKENS).div_ceil(BLOCK_SIZE);
    let block_tables: Vec<Vec<u32>> =
        (0..batch).map(|i| (i * per_sequence..(i + 1) * per_sequence).map(|b| b as u32).collect()).collect();
    for block_table in &block_tables {
        let chunk = SequenceChunk { tokens: &prompt[..64], start: 0, block_table, output: OutputKind::None };
        model.backend.step(&[chunk], &mut out)?;
    }
    best_speed(batch * TOKENS, || {
        let mut last = vec![[7u32]; batch];
        for t in 0..TOKENS {
            let chunk = |i: usize| SequenceChunk {
                tokens: &last[i],
                start: 64 + t,
                block_table: &block_tables[i],
                output: OutputKind::LastLogits,
            };
            model.backend.step(&(0..batch).map(chunk).collect::<Vec<_>>(), &mut out)?;
            last = (0..batch).map(|i| [argmax(&out.logits[i * vocab..][..vocab])]).collect();
        }
        Ok(())
    })
}

/// Returns the tokens/s of prefilling 512 tokens in chunks of `chunk` tokens.
fn prefill_speed(model: &mut Model, prompt: &[u32], chunk: usize) -> anyhow::Result<f64> {
    let mut out = StepOutput::default();
    let block_table: Vec<u32> = (0..(512 / BLOCK_SIZE) as u32).collect();
    best_speed(512, || {
        for (i, tokens) in prompt.chunks(chunk).enumerate() {
            let chunk = SequenceChunk {
                tokens,
                start: i * chunk,
                block_table: &block_table,
                output: OutputKind::LastLogits,
            };
            model.backend.step(&[chunk], &mut out)?;
        }
        Ok(())
    })
}

/// Submits a greedy request.
fn send(engine: &Engine, prompt: Vec<u32>, max_tokens: usize) -> anyhow::Result<UnboundedReceiver<Event>> {
    let (events, receiver) = unbounded_channel();
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let task = Task::Generate(Box::new(GenerationParams {
        max_tokens,
        sampling,
        ignore_eos: true,
        ..GenerationParams::default()
    }));
    let request = Request { prompt, task, events, arrived: Instant::now(), group: engine.new_group() };
    engine.submit(vec![request])?;
    Ok(receiver)
}

/// Waits for the first token.
async fn first_token(receiver: &mut UnboundedReceiver<Event>) -> anyhow::Result<()> {
    match receiver.recv().await.context("the engine has stopped")? {
        Event::Token { .. } => Ok(()),
        other => bail!("expected a token, got {other:?}"),
    }
}

/// Measures the engine.
async fn measure_serving(path: PathBuf, load: LoadOptions) -> anyhow::Result<Figures> {
    let metrics = Metrics::new();
    let options = EngineOptions { prefix_caching: false, ..EngineOptions::default() };
    let engine: Arc<Engine> =
        Engine::start("m".into(), "1".into(), path, load, options, metrics.model("m")).await?;
    let prompt =
        |len: u32, salt: u32| (0..len).map(|i| 1000 + (i * 37 + salt * 911) % 20_000).collect::<Vec<u32>>();
    let mut figures = Figures::new();
    // Lets the engine adapt its prompt tokens per step.
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
        anyhow::ensure!(
            long.try_recv().is_err(),
            "the long prompt was completed before the short request was sent"
        );
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
