//! `inference-worker`: serves one or more Llama-family models over HTTP. See `docs/inference.md`.

use std::{
    io::IsTerminal,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use axum::http::HeaderValue;
use clap::Parser;
use inference_worker::{
    api::{self, App, Phase, Settings},
    cuda,
    engine::EngineOptions,
    metrics::Metrics,
    model::{BackendChoice, DtypeChoice, LoadOptions, default_name},
    registry::{Registry, Spec},
    torchscript::Scripts,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// Serve Llama-family models with an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Model to serve: a GGUF file or a Hugging Face folder; repeat for several, NAME=PATH names one
    #[arg(long = "model", value_name = "[NAME=]PATH", required_unless_present = "torchscript")]
    models: Vec<String>,
    /// TorchScript module for the Open Inference Protocol; repeat for several
    #[arg(long, value_name = "NAME=FILE")]
    torchscript: Vec<String>,
    /// Name of this worker, sent as `x-worker` with every response and shown in /replica
    #[arg(long, env = "LB_WORKER_NAME", value_parser = parse_name)]
    name: Option<HeaderValue>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:8000", env = "LB_WORKER_LISTEN")]
    listen: SocketAddr,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: tch::Device,
    /// Type of the weights
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    dtype: DtypeChoice,
    /// Who computes
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    backend: BackendChoice,
    /// Compute threads; the default is the number of cores
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// KV cache in MiB; the default is 1024 on the CPU and 85 % of the free memory on CUDA
    #[arg(long)]
    kv_cache_mib: Option<usize>,
    /// Longest prompt plus output in tokens; the default is the model's
    #[arg(long)]
    max_context: Option<usize>,
    /// Requests computed at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_running: u32,
    /// Requests that may wait; beyond them the answer is 429
    #[arg(long, default_value_t = 256)]
    max_queue: u32,
    /// Prompt tokens per step; the default adapts so that a step takes about 40 ms
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65536))]
    prompt_tokens_per_step: Option<u32>,
    /// Do not share the KV cache of common prefixes
    #[arg(long)]
    no_prefix_sharing: bool,
    /// File with API keys, one a line; clients send one as a bearer token
    #[arg(long, value_name = "FILE")]
    api_keys_file: Option<PathBuf>,
    /// File with the key for /admin; without it only this machine may use /admin
    #[arg(long, value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Certificate chain (PEM); with --tls-key turns TLS on
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM)
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Largest request body in MiB
    #[arg(long, default_value_t = 8)]
    max_body_mib: usize,
    /// After SIGTERM, at least so long for the balancer to notice, in seconds
    #[arg(long, default_value_t = 2)]
    drain_grace: u64,
    /// After SIGTERM, at most so long for requests in flight, in seconds
    #[arg(long, default_value_t = 60)]
    drain_deadline: u64,
}

fn parse_name(text: &str) -> Result<HeaderValue, String> {
    let value = HeaderValue::from_str(text).ok().filter(|_| !text.trim().is_empty() && text.is_ascii());
    value.ok_or_else(|| "a name is made of printable ASCII characters".into())
}

fn parse_device(text: &str) -> Result<tch::Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(tch::Device::Cpu),
        None if text == "cuda" => Ok(tch::Device::Cuda(0)),
        Some(("cuda", n)) => {
            n.parse().map(tch::Device::Cuda).map_err(|_| format!("`{n}` is no device number"))
        }
        _ => Err("expected cpu, cuda or cuda:N".into()),
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "inference_worker=info,warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    cuda::open_libtorch_cuda();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the I/O threads")?;
    let result = runtime.block_on(serve(args));
    // Engines may be in the middle of a step; the process ends without them.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// `NAME=PATH`, or a path that names itself.
fn named(text: &str) -> (String, PathBuf) {
    match text.split_once('=') {
        Some((name, path)) if !name.contains('/') => (name.into(), path.into()),
        _ => (default_name(text.as_ref()), text.into()),
    }
}

/// Secrets in a file, one a line.
fn secrets(path: &PathBuf) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading keys from {}", path.display()))?;
    let keys: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        bail!("{} holds no key", path.display());
    }
    Ok(keys)
}

fn build(args: &Args) -> anyhow::Result<Arc<App>> {
    let threads =
        args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    tch::set_num_threads(threads as i32);
    let load = LoadOptions {
        device: args.device,
        dtype: args.dtype,
        backend: args.backend,
        threads,
        kv_bytes: args.kv_cache_mib.map(|m| m << 20),
        max_context: args.max_context,
    };
    let on_gpu = args.device.is_cuda();
    let engine = EngineOptions {
        max_running: args.max_running as usize,
        max_queue: args.max_queue as usize,
        prompt_tokens: args.prompt_tokens_per_step.map(|p| p as usize).or(on_gpu.then_some(2048)),
        prefix_sharing: !args.no_prefix_sharing,
        ..EngineOptions::default()
    };
    let settings = Settings {
        api_keys: args.api_keys_file.as_ref().map(secrets).transpose()?.unwrap_or_default(),
        admin_key: args.admin_key_file.as_ref().map(secrets).transpose()?.map(|mut k| k.swap_remove(0)),
        max_body_bytes: args.max_body_mib << 20,
        name: args.name.clone(),
    };
    let files: Vec<(String, PathBuf)> = args.torchscript.iter().map(|t| named(t)).collect();
    let scripts = Scripts::load(&files, args.device)?;
    let metrics = Metrics::new();
    Ok(App::new(Registry::new(load, engine, metrics.clone()), scripts, metrics, settings))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let app = build(&args)?;
    let tls =
        args.tls_cert.as_ref().zip(args.tls_key.as_ref()).map(|(c, k)| api::serve::tls(c, k)).transpose()?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("listening on {}", args.listen))?;
    let address = listener.local_addr()?;
    tracing::info!(%address, tls = tls.is_some(), "listening");
    let loading = tokio::spawn(load_all(app.clone(), args.models.clone()));
    let drained =
        drain(app.clone(), Duration::from_secs(args.drain_grace), Duration::from_secs(args.drain_deadline));
    let server = tokio::spawn(api::serve::run(app.clone(), api::router(app.clone()), listener, tls, drained));
    // A first model that does not load ends the process; nothing else would ever make it ready.
    if let Err(error) = loading.await.context("loading stopped")? {
        server.abort();
        return Err(error);
    }
    server.await.context("serving stopped")
}

async fn load_all(app: Arc<App>, models: Vec<String>) -> anyhow::Result<()> {
    for text in models {
        let (name, path) = named(&text);
        let began = Instant::now();
        let spec = Spec { name, version: None, path: path.clone(), keep_old: false };
        let engine = app.registry.load(spec).await.with_context(|| format!("loading {}", path.display()))?;
        tracing::info!(
            model = engine.name,
            backend = engine.backend,
            weights_mib = engine.weight_bytes >> 20,
            kv_tokens = engine.kv_tokens(),
            context = engine.max_context,
            seconds = format!("{:.1}", began.elapsed().as_secs_f64()),
            "model loaded and warm"
        );
    }
    app.phase.send_if_modified(|p| {
        std::mem::replace(p, if *p == Phase::Loading { Phase::Ready } else { *p }) != *p
    });
    Ok(())
}

/// Resolves when the worker may go: told to stop, the grace over, and nothing in flight (or too late).
async fn drain(app: Arc<App>, grace: Duration, deadline: Duration) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for signals");
        return;
    };
    let mut phase = app.phase.subscribe();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = phase.wait_for(|p| *p == Phase::Draining) => {}
    }
    app.phase.send_replace(Phase::Draining);
    let began = Instant::now();
    tracing::info!(active = app.active.load(Relaxed), "draining");
    loop {
        let active = app.active.load(Relaxed);
        if active == 0 && began.elapsed() >= grace {
            tracing::info!("drained");
            return;
        }
        if began.elapsed() >= deadline {
            tracing::warn!(active, "the drain deadline is over: ending what is left");
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
            _ = terminate.recv() => { tracing::warn!(active, "told twice: ending now"); return; }
            _ = interrupt.recv() => { tracing::warn!(active, "told twice: ending now"); return; }
        }
    }
}
