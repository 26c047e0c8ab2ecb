//! The HTTP API: OpenAI's API with vLLM's extensions, the Open Inference Protocol, administration and status.
//!
//! Input: HTTP requests on connections that [`serve`] accepts. Output: JSON and event streams. Called by `main` and by
//! tests.

mod admin;
mod chat;
mod chunks;
mod completions;
mod error;
mod extract;
mod generation;
mod middleware;
mod oip;
mod params;
pub mod serve;
mod sse;
mod status;
mod text;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use axum::{
    Router,
    extract::Request,
    http::HeaderValue,
    middleware::from_fn_with_state,
    routing::{delete, get, post},
};
use tokio::sync::watch;

pub use error::ApiError;

use crate::{engine::Engine, metrics::Metrics, registry::ModelRegistry, torchscript::TorchScriptModules};

/// Phase of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Loading the models of the command line.
    Loading,
    /// Serving requests.
    Ready,
    /// Shutting down: completes its requests.
    Draining,
}

impl Phase {
    /// Returns the name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

/// Settings of the API.
#[derive(Debug, Clone)]
pub struct Settings {
    /// API keys; if empty, requests need no key.
    pub api_keys: Vec<String>,
    /// Key for `/admin`; without it, `/admin` is available only from this host.
    pub admin_key: Option<String>,
    /// Maximum size of a request body.
    pub max_body_bytes: usize,
    /// Name of this worker, for the `x-worker` header.
    pub name: Option<HeaderValue>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { api_keys: Vec::new(), admin_key: None, max_body_bytes: 8 << 20, name: None }
    }
}

/// State shared by all requests.
#[derive(Debug)]
pub struct App {
    /// Models in service.
    pub registry: ModelRegistry,
    /// TorchScript modules.
    pub torchscript: TorchScriptModules,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Settings.
    pub settings: Settings,
    /// Current phase.
    pub phase: watch::Sender<Phase>,
    /// Active requests, including streams.
    pub active: AtomicUsize,
    /// Time until which connections are closed after each response, in milliseconds since `started`.
    shed_until: AtomicU64,
    started: Instant,
    tokens_per_second: status::Throughput,
}

/// Id of a request: the client's `x-request-id`, or a random one.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// Upper bound of the bytes of a token: a longer prompt than this per token of context cannot fit.
const MAX_TOKEN_BYTES: usize = 128;

impl App {
    /// Creates the state, without models.
    pub fn new(
        registry: ModelRegistry,
        torchscript: TorchScriptModules,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Arc<Self> {
        Arc::new(Self {
            registry,
            torchscript,
            metrics,
            settings,
            phase: watch::channel(Phase::Loading).0,
            active: AtomicUsize::new(0),
            shed_until: AtomicU64::new(0),
            started: Instant::now(),
            tokens_per_second: status::Throughput::default(),
        })
    }

    /// Returns the engine of a model; None is the default model.
    pub fn engine(&self, name: Option<&str>) -> Result<Arc<Engine>, ApiError> {
        let models = self.registry.models();
        if let Some(engine) = models.get(name) {
            return Ok(engine.clone());
        }
        match name {
            Some(name) if *self.phase.borrow() != Phase::Loading => Err(ApiError::unknown_model(name)),
            _ => Err(ApiError::unavailable("The model is still loading.")),
        }
    }

    /// Tokenizes a text. Long texts are tokenized on a blocking thread, so that they do not delay I/O.
    async fn tokenize(
        &self,
        engine: &Arc<Engine>,
        text: String,
        special: bool,
    ) -> Result<Vec<u32>, ApiError> {
        if text.len() > engine.info.max_context.saturating_mul(MAX_TOKEN_BYTES) {
            return Err(ApiError::context_length(
                format!(
                    "This model's maximum context length is {} tokens, but the prompt has {} bytes of text; shorten it.",
                    engine.info.max_context,
                    text.len()
                ),
                "prompt",
            ));
        }
        if text.len() < 8 << 10 {
            return Ok(engine.info.tokenizer.encode(&text, special)?);
        }
        let tokenizer = engine.info.tokenizer.clone();
        let ids = tokio::task::spawn_blocking(move || tokenizer.encode(&text, special)).await;
        Ok(ids.map_err(|_| ApiError::internal("the tokenizer panicked; see the log of the worker"))??)
    }

    /// Returns whether connections are closed after each response, so that clients reconnect through the load
    /// balancer.
    fn closes_connections(&self) -> bool {
        let now = self.started.elapsed().as_millis() as u64;
        *self.phase.borrow() == Phase::Draining
            || now < self.shed_until.load(Relaxed)
            || self.registry.models().engines().any(|e| e.stats.waiting.load(Relaxed) > 0)
    }
}

/// Returns the routes.
pub fn router(app: Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(status::health))
        .route("/ping", get(status::health))
        .route("/ready", get(status::ready))
        .route("/metrics", get(status::metrics))
        .route("/replica", get(status::replica))
        .route("/version", get(status::version))
        .route("/get_load", get(status::get_load))
        .route("/get_model_info", get(status::model_info))
        .route("/get_server_info", get(status::model_info))
        .route("/v2", get(oip::server))
        .route("/v2/health/live", get(status::health))
        .route("/v2/health/ready", get(status::ready));
    let keyed = Router::new()
        .route("/v1/models", get(text::models))
        .route("/v1/models/{*name}", get(text::model))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/embeddings", post(text::embeddings))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/v2/models/{name}", get(oip::metadata))
        .route("/v2/models/{name}/ready", get(oip::ready))
        .route("/v2/models/{name}/infer", post(oip::infer))
        .route("/v2/models/{name}/versions/{version}", get(oip::metadata))
        .route("/v2/models/{name}/versions/{version}/ready", get(oip::ready))
        .route("/v2/models/{name}/versions/{version}/infer", post(oip::infer))
        .route_layer(from_fn_with_state(app.clone(), middleware::require_api_key));
    let admin = Router::new()
        .route("/admin/models", get(admin::list).post(admin::load))
        .route("/admin/models/{*name}", delete(admin::remove))
        .route("/admin/shed", post(admin::shed))
        .route("/admin/drain", post(admin::drain))
        .route_layer(from_fn_with_state(app.clone(), middleware::require_admin));
    open.merge(keyed)
        .merge(admin)
        .fallback(|request: Request| async move {
            ApiError::not_found(format!("Unknown path: {} {}.", request.method(), request.uri().path()))
        })
        .method_not_allowed_fallback(|request: Request| async move {
            ApiError::status(
                axum::http::StatusCode::METHOD_NOT_ALLOWED,
                format!("{} is not allowed on {}.", request.method(), request.uri().path()),
            )
        })
        .layer(from_fn_with_state(app.clone(), middleware::track_request))
        .with_state(app)
}
