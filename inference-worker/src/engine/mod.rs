//! The engine: one thread that owns a model and computes many sequences together.
//!
//! Input: [`Request`]s through [`Engine::submit`]. Output: [`Event`]s through the channel of each request, and
//! [`EngineStats`]. Requests can start and finish in every step (continuous batching); long prompts are computed in
//! chunks, so that other requests get their tokens in between. Called by the API. After the last handle is dropped,
//! the thread ends as soon as its sequences have finished.

mod engine_core;
pub mod kv_cache;
pub mod output;
pub mod request;
pub mod sampling;
pub mod scheduler;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    time::Duration,
};

use tokio::sync::oneshot;

pub use request::{Event, GenerationParams, Request, Task};

use self::{engine_core::EngineCore, kv_cache::KvCacheManager, scheduler::Scheduler};
use crate::{
    backend::BLOCK_SIZE,
    chat_template::ChatTemplate,
    metrics::ModelMetrics,
    model::{LoadError, LoadOptions, Model, load_model},
    tokenizer::TextTokenizer,
};

/// Options of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Maximum number of running sequences.
    pub max_running: usize,
    /// Maximum number of waiting sequences.
    pub max_queue: usize,
    /// Maximum number of prompt tokens per step; None adapts it to `target_step_time`.
    pub prompt_tokens_per_step: Option<usize>,
    /// Target duration of a step with prompt tokens, which is the longest time that decoding sequences wait for their
    /// next token.
    pub target_step_time: Duration,
    /// Whether sequences share the KV blocks of common prefixes.
    pub prefix_caching: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_running: 64,
            max_queue: 256,
            prompt_tokens_per_step: None,
            target_step_time: Duration::from_millis(40),
            prefix_caching: true,
        }
    }
}

/// Figures about an engine, updated by its thread.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Running sequences.
    pub running: AtomicUsize,
    /// Waiting sequences.
    pub waiting: AtomicUsize,
    /// KV blocks that sequences use.
    pub kv_used: AtomicUsize,
    /// All KV blocks.
    pub kv_total: AtomicUsize,
    /// Sequences accepted and not finished.
    pub in_flight: AtomicUsize,
    /// Prompt tokens of the sequences in flight.
    pub in_flight_tokens: AtomicUsize,
    /// Tokens generated so far.
    pub generated_tokens: AtomicU64,
    /// Prompt tokens computed so far.
    pub prompt_tokens: AtomicU64,
    /// Failed steps so far.
    pub failed_steps: AtomicU64,
    /// Requests finished so far, for any reason.
    pub finished: AtomicU64,
    /// Requests ended by a failed step so far; included in `finished`.
    pub failed: AtomicU64,
    /// Sum of the times to first token so far, in microseconds.
    pub first_token_us: AtomicU64,
    /// Number of the times in `first_token_us`.
    pub first_tokens: AtomicU64,
    /// Whether the engine's thread has ended.
    pub stopped: AtomicBool,
}

/// Why a request was not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubmitError {
    /// The queue is full.
    #[error("the queue is full ({in_flight} requests in flight, at most {limit})")]
    QueueFull {
        /// Sequences in flight.
        in_flight: usize,
        /// Maximum number of sequences in flight.
        limit: usize,
    },
    /// The prompts in flight would fill the KV cache several times.
    #[error("prompts of {tokens} tokens are in flight, at most {limit}")]
    TooManyPromptTokens {
        /// Prompt tokens in flight.
        tokens: usize,
        /// Maximum number of prompt tokens in flight.
        limit: usize,
    },
    /// The engine's thread has ended.
    #[error("the engine has stopped; see the log of the worker, and restart it")]
    Stopped,
}

/// Maximum size of the prompts in flight, in multiples of the KV cache.
const MAX_CACHES_IN_FLIGHT: usize = 4;

/// Facts about a loaded model.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// Tokenizer.
    pub tokenizer: Arc<TextTokenizer>,
    /// Chat template.
    pub template: ChatTemplate,
    /// Maximum number of tokens of prompt and output together.
    pub max_context: usize,
    /// Vocabulary size.
    pub vocab: usize,
    /// Number of dimensions of an embedding.
    pub hidden: usize,
    /// Device, kernels and weight type.
    pub backend: String,
    /// Bytes of weights.
    pub weight_bytes: usize,
}

impl ModelInfo {
    fn new(model: &Model) -> Self {
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

/// A handle of a running engine.
#[derive(Debug)]
pub struct Engine {
    /// Name of the model for clients.
    pub name: String,
    /// Version of the model.
    pub version: String,
    /// File or directory of the model.
    pub path: PathBuf,
    /// Facts about the model.
    pub info: ModelInfo,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// Options.
    pub options: EngineOptions,
    /// Current figures.
    pub stats: Arc<EngineStats>,
    requests: Mutex<Sender<Request>>,
    next_group: AtomicU64,
}

impl Engine {
    /// Loads a model on a new thread and warms it up.
    pub async fn start(
        name: String,
        version: String,
        path: PathBuf,
        load: LoadOptions,
        options: EngineOptions,
        metrics: ModelMetrics,
    ) -> Result<Arc<Self>, LoadError> {
        let (info_tx, info_rx) = oneshot::channel();
        let (requests, requests_rx) = channel();
        let stats = Arc::new(EngineStats::default());
        let (thread_stats, thread_path, thread_options) = (stats.clone(), path.clone(), options.clone());
        std::thread::Builder::new()
            .name(format!("engine-{name}"))
            .spawn(move || {
                let model = match load_and_warm_up(&thread_path, &load) {
                    Ok(model) => model,
                    Err(error) => {
                        let _ = info_tx.send(Err(error));
                        return;
                    }
                };
                let blocks = model.backend.kv_blocks();
                thread_stats.kv_total.store(blocks, Relaxed);
                let scheduler = Scheduler::new(KvCacheManager::new(blocks, thread_options.prefix_caching));
                if info_tx.send(Ok(ModelInfo::new(&model))).is_ok() {
                    EngineCore::new(model, scheduler, requests_rx, thread_options, thread_stats, metrics)
                        .run();
                }
            })
            .map_err(|e| LoadError::Options(format!("cannot start the engine's thread: {e}")))?;
        let stopped = || LoadError::Options("the engine's thread ended while it loaded the model".into());
        let info = info_rx.await.map_err(|_| stopped())??;
        Ok(Arc::new(Self {
            name,
            version,
            path,
            info,
            created: crate::unix_now(),
            options,
            stats,
            requests: Mutex::new(requests),
            next_group: AtomicU64::new(1),
        }))
    }

    /// Returns a new number for the choices of one API request.
    pub fn new_group(&self) -> u64 {
        self.next_group.fetch_add(1, Relaxed)
    }

    /// Returns the maximum number of sequences in flight.
    pub fn capacity(&self) -> usize {
        self.options.max_running + self.options.max_queue
    }

    /// Returns the number of tokens that fit into the KV cache.
    pub fn kv_tokens(&self) -> usize {
        self.stats.kv_total.load(Relaxed) * BLOCK_SIZE
    }

    /// Submits requests: all of them, or none if they exceed a limit.
    pub fn submit(&self, requests: Vec<Request>) -> Result<(), SubmitError> {
        let (count, tokens) = (requests.len(), requests.iter().map(|r| r.prompt.len()).sum::<usize>());
        let limit = self.capacity();
        let admitted = self
            .stats
            .in_flight
            .fetch_update(Relaxed, Relaxed, |n| (n + count <= limit).then_some(n + count));
        if let Err(in_flight) = admitted {
            return Err(SubmitError::QueueFull { in_flight, limit });
        }
        let limit = self.kv_tokens() * MAX_CACHES_IN_FLIGHT;
        let before = self.stats.in_flight_tokens.fetch_add(tokens, Relaxed);
        if before > 0 && before + tokens > limit {
            self.stats.in_flight.fetch_sub(count, Relaxed);
            self.stats.in_flight_tokens.fetch_sub(tokens, Relaxed);
            return Err(SubmitError::TooManyPromptTokens { tokens: before, limit });
        }
        let sender = self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for request in requests {
            if sender.send(request).is_err() {
                return Err(SubmitError::Stopped);
            }
        }
        Ok(())
    }
}

fn load_and_warm_up(path: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
    let mut model = load_model(path, options)?;
    engine_core::warm_up(&mut model)?;
    Ok(model)
}
