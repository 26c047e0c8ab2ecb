//! The HTTP API: OpenAI's, vLLM's additions, the Open Inference Protocol, administration and state.
//!
//! Input: HTTP requests on connections that [`serve`] accepts. Output: JSON and event streams. Called by
//! `main` and by the tests.

mod admin;
mod chat;
mod completions;
mod drive;
mod error;
mod extract;
mod guard;
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
    middleware,
    routing::{delete, get, post},
};
use tokio::sync::watch;

pub use error::ApiError;

use crate::{engine::Engine, metrics::Metrics, registry::Registry, torchscript::Scripts};

/// Where the process stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The first model is not there yet.
    Loading,
    /// Serving.
    Ready,
    /// Told to stop: finishing what it has, asking for no more.
    Draining,
}

impl Phase {
    /// Its name in the API.
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
    /// Keys that clients may use; empty lets everybody in.
    pub api_keys: Vec<String>,
    /// Key for `/admin`; without one, only this machine may.
    pub admin_key: Option<String>,
    /// Largest request body.
    pub max_body_bytes: usize,
    /// What this worker is called, for the `x-worker` header.
    pub name: Option<HeaderValue>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { api_keys: Vec::new(), admin_key: None, max_body_bytes: 8 << 20, name: None }
    }
}

/// What all requests share.
#[derive(Debug)]
pub struct App {
    /// Models in service.
    pub registry: Registry,
    /// TorchScript modules.
    pub scripts: Scripts,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Settings.
    pub settings: Settings,
    /// Phase, to be watched.
    pub phase: watch::Sender<Phase>,
    /// Requests being answered, streams included.
    pub active: AtomicUsize,
    /// Until when (milliseconds since `started`) connections are closed after each response.
    shed_until: AtomicU64,
    started: Instant,
    tokens_per_second: status::Speed,
}

/// A request's id: the client's `x-request-id`, or one of ours.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// A prompt of more bytes per token of context than this cannot fit: tokens are shorter.
const MAX_TOKEN_BYTES: usize = 128;

impl App {
    /// With no model yet.
    pub fn new(registry: Registry, scripts: Scripts, metrics: Arc<Metrics>, settings: Settings) -> Arc<Self> {
        Arc::new(Self {
            registry,
            scripts,
            metrics,
            settings,
            phase: watch::channel(Phase::Loading).0,
            active: AtomicUsize::new(0),
            shed_until: AtomicU64::new(0),
            started: Instant::now(),
            tokens_per_second: status::Speed::default(),
        })
    }

    /// The engine for a model's name.
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

    /// Ids of a text; long ones are tokenized off the I/O threads.
    async fn tokenize(
        &self,
        engine: &Arc<Engine>,
        text: String,
        special: bool,
    ) -> Result<Vec<u32>, ApiError> {
        if text.len() > engine.max_context.saturating_mul(MAX_TOKEN_BYTES) {
            return Err(ApiError::context(
                format!(
                    "This model's maximum context length is {} tokens, but the prompt has {} bytes of text; shorten it.",
                    engine.max_context,
                    text.len()
                ),
                "prompt",
            ));
        }
        if text.len() < 8 << 10 {
            return Ok(engine.tokenizer.encode(&text, special)?);
        }
        let tokenizer = engine.tokenizer.clone();
        let ids = tokio::task::spawn_blocking(move || tokenizer.encode(&text, special)).await;
        Ok(ids.map_err(|_| ApiError::internal("tokenizing failed"))??)
    }

    /// Whether clients should come back through the balancer on a new connection.
    fn sheds(&self) -> bool {
        let now = self.started.elapsed().as_millis() as u64;
        *self.phase.borrow() == Phase::Draining
            || now < self.shed_until.load(Relaxed)
            || self.registry.models().engines().any(|e| e.stats.waiting.load(Relaxed) > 0)
    }
}

/// All routes.
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
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check_key));
    let admin = Router::new()
        .route("/admin/models", get(admin::list).post(admin::load))
        .route("/admin/models/{*name}", delete(admin::remove))
        .route("/admin/shed", post(admin::shed))
        .route("/admin/drain", post(admin::drain))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check_admin));
    open.merge(keyed)
        .merge(admin)
        .fallback(|request: Request| async move {
            ApiError::not_found(format!("There is no {} {} here.", request.method(), request.uri().path()))
        })
        .method_not_allowed_fallback(|request: Request| async move {
            ApiError::status(
                axum::http::StatusCode::METHOD_NOT_ALLOWED,
                format!("{} is not allowed on {}.", request.method(), request.uri().path()),
            )
        })
        .layer(middleware::from_fn_with_state(app.clone(), guard::around))
        .with_state(app)
}
