//! `inference-worker`: serves Llama-family models over HTTP. See `docs/inference.md`.

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
    registry::{ModelRegistry, ModelSpec},
    torchscript::TorchScriptModules,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// Serves Llama-family models with an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Model to serve: a GGUF file or a Hugging Face directory; may be repeated. NAME defaults to the file name
    /// without its extension; requests that name no model get the first one
    #[arg(long = "model", value_name = "[NAME=]PATH", required_unless_present = "torchscript")]
    models: Vec<String>,
    /// TorchScript module to serve with the Open Inference Protocol; may be repeated
    #[arg(long, value_name = "NAME=FILE")]
    torchscript: Vec<String>,
    /// Name of this worker, for the `x-worker` header of responses and for /replica [default: none]
    #[arg(long, env = "LB_WORKER_NAME", value_parser = parse_name)]
    name: Option<HeaderValue>,
    /// Address and port to listen on
    #[arg(long, default_value = "127.0.0.1:8000", env = "LB_WORKER_LISTEN", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Device that computes the models: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: tch::Device,
    /// Type of the weights
    #[arg(long, value_enum, default_value_t = DtypeChoice::Auto)]
    dtype: DtypeChoice,
    /// Backend that computes the models
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    backend: BackendChoice,
    /// Number of compute threads on the CPU [default: the number of cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Size of the KV cache [default: 1024 on the CPU, 85 % of the free memory on CUDA]
    #[arg(long, value_name = "MIB")]
    kv_cache_mib: Option<usize>,
    /// Maximum number of tokens of prompt and output together [default: the model's context length]
    #[arg(long, value_name = "TOKENS")]
    max_context: Option<usize>,
    /// Maximum number of requests that are computed together
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_running: u32,
    /// Maximum number of waiting requests; further requests are rejected with status 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_queue: u32,
    /// Maximum number of prompt tokens per step [default: adaptive on the CPU, for steps of about 40 ms; 2048 on CUDA]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65536))]
    prompt_tokens_per_step: Option<u32>,
    /// Disable prefix caching: requests do not share the KV cache of common prefixes
    #[arg(long)]
    no_prefix_sharing: bool,
    /// File with API keys, one per line, of which clients must send one as bearer token [default: no key is needed]
    #[arg(long, value_name = "FILE")]
    api_keys_file: Option<PathBuf>,
    /// File with the key for /admin, sent as bearer token [default: /admin is available only from this host]
    #[arg(long, value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Certificate chain (PEM file); enables TLS, together with --tls-key
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM file) of --tls-cert
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Maximum size of a request body
    #[arg(long, value_name = "MIB", default_value_t = 8)]
    max_body_mib: usize,
    /// Minimum time between SIGTERM and exit, in which the load balancer notices the drain
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    drain_grace: u64,
    /// Maximum time between SIGTERM and exit; requests still in flight are aborted then
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain_deadline: u64,
}

fn parse_name(text: &str) -> Result<HeaderValue, String> {
    let value = HeaderValue::from_str(text).ok().filter(|_| !text.trim().is_empty() && text.is_ascii());
    value.ok_or_else(|| "expected printable ASCII characters".into())
}

fn parse_device(text: &str) -> Result<tch::Device, String> {
    match text.split_once(':') {
        None if text == "cpu" => Ok(tch::Device::Cpu),
        None if text == "cuda" => Ok(tch::Device::Cuda(0)),
        Some(("cuda", n)) => {
            n.parse().map(tch::Device::Cuda).map_err(|_| format!("`{n}` is not a valid device number"))
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
        .context("cannot start the I/O threads")?;
    let result = runtime.block_on(serve(args));
    // Engine threads may be in the middle of a step; the process does not wait for them.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// Splits `NAME=PATH`. The default of the name is derived from the path.
fn split_name(text: &str) -> (String, PathBuf) {
    match text.split_once('=') {
        Some((name, path)) if !name.contains('/') => (name.into(), path.into()),
        _ => (default_name(text.as_ref()), text.into()),
    }
}

/// Reads keys from a file, one per line. Empty lines and lines with `#` are skipped.
fn read_keys(path: &PathBuf) -> anyhow::Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read keys from {}", path.display()))?;
    let keys: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        bail!("{} contains no key: write one per line", path.display());
    }
    Ok(keys)
}

/// Creates the state of the API, without models.
fn build_app(args: &Args) -> anyhow::Result<Arc<App>> {
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
        prompt_tokens_per_step: args.prompt_tokens_per_step.map(|p| p as usize).or(on_gpu.then_some(2048)),
        prefix_caching: !args.no_prefix_sharing,
        ..EngineOptions::default()
    };
    let settings = Settings {
        api_keys: args.api_keys_file.as_ref().map(read_keys).transpose()?.unwrap_or_default(),
        admin_key: args.admin_key_file.as_ref().map(read_keys).transpose()?.map(|mut k| k.swap_remove(0)),
        max_body_bytes: args.max_body_mib << 20,
        name: args.name.clone(),
    };
    let files: Vec<(String, PathBuf)> = args.torchscript.iter().map(|t| split_name(t)).collect();
    let torchscript = TorchScriptModules::load(&files, args.device)?;
    let metrics = Metrics::new();
    Ok(App::new(ModelRegistry::new(load, engine, metrics.clone()), torchscript, metrics, settings))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let app = build_app(&args)?;
    let tls =
        args.tls_cert.as_ref().zip(args.tls_key.as_ref()).map(|(c, k)| api::serve::tls(c, k)).transpose()?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    tracing::info!(%address, tls = tls.is_some(), "listening");
    let loading = tokio::spawn(load_all(app.clone(), args.models.clone()));
    let drained =
        drain(app.clone(), Duration::from_secs(args.drain_grace), Duration::from_secs(args.drain_deadline));
    let server = tokio::spawn(api::serve::run(app.clone(), api::router(app.clone()), listener, tls, drained));
    // A model that cannot be loaded ends the process, because it would never become ready.
    if let Err(error) = loading.await.context("the task that loads the models panicked")? {
        server.abort();
        return Err(error);
    }
    server.await.context("the server task panicked")
}

/// Loads the models of the command line.
async fn load_all(app: Arc<App>, models: Vec<String>) -> anyhow::Result<()> {
    for text in models {
        let (name, path) = split_name(&text);
        let began = Instant::now();
        let spec = ModelSpec { name, version: None, path: path.clone(), keep_old: false };
        let engine =
            app.registry.load(spec).await.with_context(|| format!("cannot load {}", path.display()))?;
        tracing::info!(
            model = engine.name,
            backend = engine.info.backend,
            weights_mib = engine.info.weight_bytes >> 20,
            kv_tokens = engine.kv_tokens(),
            context = engine.info.max_context,
            seconds = format!("{:.1}", began.elapsed().as_secs_f64()),
            "model in service"
        );
    }
    app.phase.send_if_modified(|p| {
        std::mem::replace(p, if *p == Phase::Loading { Phase::Ready } else { *p }) != *p
    });
    Ok(())
}

/// Resolves when the process may exit: after a signal or a drain request, when the grace period is over and no
/// request is active, or at the deadline.
async fn drain(app: Arc<App>, grace: Duration, deadline: Duration) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("cannot listen for SIGTERM and SIGINT: stopping");
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
            tracing::warn!(active, "drain deadline reached: aborting the remaining requests");
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
            _ = terminate.recv() => { tracing::warn!(active, "second signal: aborting the remaining requests"); return; }
            _ = interrupt.recv() => { tracing::warn!(active, "second signal: aborting the remaining requests"); return; }
        }
    }
}
