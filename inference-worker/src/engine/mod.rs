//! The engine: one thread that owns a model and serves many sequences at once.
//!
//! Input: [`Request`]s through [`Engine::submit`]. Output: [`Event`]s through each request's channel, and
//! [`Stats`]. Requests join and leave at every step (continuous batching); long prompts are computed in
//! chunks between other requests' tokens. Called by the API; dropping the last handle ends the thread once
//! its sequences are done.

pub mod kv_cache;
pub mod output;
pub mod request;
mod run;
pub mod sampling;
pub mod scheduler;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use tokio::sync::oneshot;

pub use request::{Event, Generate, Request, Work};

use self::{kv_cache::KvCache, run::Runner, scheduler::Scheduler};
use crate::{
    backend::BLOCK,
    chat::ChatTemplate,
    metrics::ModelMetrics,
    model::{LoadError, LoadOptions, Model, load_model},
    tokenizer::TextTokenizer,
};

/// Limits and habits of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Sequences that run at once.
    pub max_running: usize,
    /// Sequences that may wait beyond those.
    pub max_queue: usize,
    /// Prompt tokens per step; None adapts them to `step_goal`.
    pub prompt_tokens: Option<usize>,
    /// How long a step with prompt tokens should take: what a token of another request waits at most.
    pub step_goal: Duration,
    /// Share the blocks of common prefixes.
    pub prefix_sharing: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_running: 64,
            max_queue: 256,
            prompt_tokens: None,
            step_goal: Duration::from_millis(40),
            prefix_sharing: true,
        }
    }
}

/// Numbers about an engine, kept up to date by its thread.
#[derive(Debug, Default)]
pub struct Stats {
    /// Sequences with blocks.
    pub running: AtomicUsize,
    /// Sequences without.
    pub waiting: AtomicUsize,
    /// Blocks held by sequences.
    pub kv_held: AtomicUsize,
    /// All blocks.
    pub kv_total: AtomicUsize,
    /// Sequences accepted and not finished.
    pub in_flight: AtomicUsize,
    /// Their prompts' tokens.
    pub in_flight_tokens: AtomicUsize,
    /// Tokens generated so far.
    pub generated: AtomicU64,
    /// Prompt tokens computed so far.
    pub prompt: AtomicU64,
    /// Failed steps so far.
    pub failures: AtomicU64,
    /// Requests that have ended so far, however.
    pub finished: AtomicU64,
    /// Those of them that a failed step ended.
    pub failed: AtomicU64,
    /// Times from arrival to first token so far, summed, in microseconds.
    pub first_token_us: AtomicU64,
    /// How many of those there were.
    pub first_tokens: AtomicU64,
    /// The engine's thread has ended.
    pub stopped: AtomicBool,
}

/// Why a request was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Rejected {
    /// The queue is full: try later, or elsewhere.
    #[error("the queue is full ({in_flight} requests in flight, at most {limit})")]
    Full {
        /// Sequences in flight.
        in_flight: usize,
        /// Their limit.
        limit: usize,
    },
    /// Waiting prompts already fill the cache several times over.
    #[error("prompts of {tokens} tokens are in flight, at most {limit}")]
    Budget {
        /// Prompt tokens in flight.
        tokens: usize,
        /// Their limit.
        limit: usize,
    },
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// Prompts in flight may fill the cache so many times.
const QUEUE_CACHES: usize = 4;

/// A handle on a running engine.
#[derive(Debug)]
pub struct Engine {
    /// Name under which clients know the model.
    pub name: String,
    /// Version, as the admin API numbers them.
    pub version: String,
    /// File or folder it came from.
    pub path: PathBuf,
    /// Tokenizer.
    pub tokenizer: Arc<TextTokenizer>,
    /// Chat template.
    pub template: ChatTemplate,
    /// Longest prompt plus output.
    pub max_context: usize,
    /// Vocabulary size.
    pub vocab: usize,
    /// Width of an embedding.
    pub hidden: usize,
    /// Device, kernels and weight type.
    pub backend: String,
    /// Bytes of weights.
    pub weight_bytes: usize,
    /// When it was loaded, seconds since 1970.
    pub created: u64,
    /// Limits.
    pub options: EngineOptions,
    /// Current numbers.
    pub stats: Arc<Stats>,
    requests: Mutex<Sender<Request>>,
    next_group: AtomicU64,
}

/// What the thread reports once the model is loaded and warm.
struct Loaded {
    tokenizer: Arc<TextTokenizer>,
    template: ChatTemplate,
    max_context: usize,
    vocab: usize,
    hidden: usize,
    backend: String,
    weight_bytes: usize,
}

impl Engine {
    /// Loads a model on a thread of its own and warms it up.
    pub async fn start(
        name: String,
        version: String,
        path: PathBuf,
        load: LoadOptions,
        options: EngineOptions,
        metrics: ModelMetrics,
    ) -> Result<Arc<Self>, LoadError> {
        let (loaded_tx, loaded_rx) = oneshot::channel();
        let (requests, inbox) = channel();
        let stats = Arc::new(Stats::default());
        let (thread_stats, thread_path, thread_options) = (stats.clone(), path.clone(), options.clone());
        std::thread::Builder::new()
            .name(format!("engine-{name}"))
            .spawn(move || {
                let prepared = load_model(&thread_path, &load).and_then(|mut model| {
                    run::warm_up(&mut model)?;
                    Ok(model)
                });
                let model = match prepared {
                    Ok(model) => model,
                    Err(error) => {
                        let _ = loaded_tx.send(Err(error));
                        return;
                    }
                };
                thread_stats.kv_total.store(model.backend.kv_blocks(), Relaxed);
                let scheduler =
                    Scheduler::new(KvCache::new(model.backend.kv_blocks(), thread_options.prefix_sharing));
                let loaded = Loaded::of(&model);
                if loaded_tx.send(Ok(loaded)).is_ok() {
                    Runner::new(model, scheduler, inbox, thread_options, thread_stats, metrics).run();
                }
            })
            .map_err(|e| LoadError::Options(format!("cannot start the engine's thread: {e}")))?;
        let stopped = || LoadError::Options("the engine's thread ended while loading".into());
        let loaded = loaded_rx.await.map_err(|_| stopped())??;
        Ok(Arc::new(Self {
            name,
            version,
            path,
            tokenizer: loaded.tokenizer,
            template: loaded.template,
            max_context: loaded.max_context,
            vocab: loaded.vocab,
            hidden: loaded.hidden,
            backend: loaded.backend,
            weight_bytes: loaded.weight_bytes,
            created: crate::unix_now(),
            options,
            stats,
            requests: Mutex::new(requests),
            next_group: AtomicU64::new(1),
        }))
    }

    /// A number for the choices of one request.
    pub fn new_group(&self) -> u64 {
        self.next_group.fetch_add(1, Relaxed)
    }

    /// Most sequences in flight.
    pub fn capacity(&self) -> usize {
        self.options.max_running + self.options.max_queue
    }

    /// Tokens that the KV cache holds.
    pub fn kv_tokens(&self) -> usize {
        self.stats.kv_total.load(Relaxed) * BLOCK
    }

    /// Hands sequences to the engine: all of them or none.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), Rejected> {
        let (count, tokens) = (requests.len(), requests.iter().map(|r| r.prompt.len()).sum::<usize>());
        let limit = self.capacity();
        let admitted = self
            .stats
            .in_flight
            .fetch_update(Relaxed, Relaxed, |n| (n + count <= limit).then_some(n + count));
        if let Err(in_flight) = admitted {
            return Err(Rejected::Full { in_flight, limit });
        }
        let limit = self.kv_tokens() * QUEUE_CACHES;
        let before = self.stats.in_flight_tokens.fetch_add(tokens, Relaxed);
        if before > 0 && before + tokens > limit {
            self.stats.in_flight.fetch_sub(count, Relaxed);
            self.stats.in_flight_tokens.fetch_sub(tokens, Relaxed);
            return Err(Rejected::Budget { tokens: before, limit });
        }
        let sender = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for request in requests {
            if sender.send(request).is_err() {
                return Err(Rejected::Stopped);
            }
        }
        Ok(())
    }
}

impl Loaded {
    fn of(model: &Model) -> Self {
        Self {
            tokenizer: model.tokenizer.clone(),
            template: model.template.clone(),
            max_context: model.max_context,
            vocab: model.config.vocab,
            hidden: model.config.hidden,
            backend: model.backend.describe(),
            weight_bytes: model.backend.weight_bytes(),
        }
    }
}
