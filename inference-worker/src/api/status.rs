//! Health, readiness, metrics, and the replica state that the load balancer uses to distribute flows.

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json as JsonBody,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde_json::{Value as Json, json};

use super::{App, Phase, sse};
use crate::{engine::Engine, metrics::ModelLabel};

/// Version of the format of the replica state.
const PROTOCOL: u32 = 1;
/// How often the event stream checks for changes. Changes of the phase are sent immediately.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum time between two events of the event stream.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

/// Measures generated tokens per second, over at least half a second.
#[derive(Debug, Default)]
pub struct Throughput(Mutex<Option<ThroughputState>>);

#[derive(Debug, Clone, Copy)]
struct ThroughputState {
    at: Instant,
    tokens: u64,
    tokens_per_second: f64,
}

impl Throughput {
    /// Returns the current throughput, given all tokens generated so far.
    fn update(&self, tokens: u64) -> f64 {
        let now = Instant::now();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let previous = state.unwrap_or(ThroughputState { at: now, tokens, tokens_per_second: 0.0 });
        let elapsed = (now - previous.at).as_secs_f64();
        if elapsed < 0.5 {
            *state = Some(previous);
            return previous.tokens_per_second;
        }
        let tokens_per_second = tokens.saturating_sub(previous.tokens) as f64 / elapsed;
        *state = Some(ThroughputState { at: now, tokens, tokens_per_second });
        tokens_per_second
    }
}

/// Handles `GET /health`: the process is running.
pub async fn health() -> StatusCode {
    StatusCode::OK
}

/// Handles `GET /ready`: models are loaded and warm, and the worker is not draining.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let phase = *app.phase.borrow();
    let broken = app.registry.models().engines().any(|e| e.stats.stopped.load(Relaxed));
    let ready = phase == Phase::Ready && !broken;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let phase = if broken { "broken" } else { phase.name() };
    (status, JsonBody(json!({"ready": ready, "phase": phase}))).into_response()
}

/// Returns the used fraction of the KV cache.
fn kv_usage(engine: &Engine) -> f64 {
    let total = engine.stats.kv_total.load(Relaxed).max(1);
    engine.stats.kv_used.load(Relaxed) as f64 / total as f64
}

/// Handles `GET /metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let m = &app.metrics;
    for (_, engine) in app.registry.models().iter().filter(|(name, _)| !name.contains('@')) {
        let label = ModelLabel { model_name: engine.name.clone() };
        let usage = kv_usage(engine);
        m.running.get_or_create(&label).set(engine.stats.running.load(Relaxed) as i64);
        m.waiting.get_or_create(&label).set(engine.stats.waiting.load(Relaxed) as i64);
        m.kv_usage.get_or_create(&label).set(usage);
        m.kv_usage_old.get_or_create(&label).set(usage);
    }
    let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content)], m.render()).into_response()
}

/// Returns the request counts of an engine since its start, by which the load balancer evaluates a new version.
fn request_counts(engine: &Engine) -> Json {
    let s = &engine.stats;
    // Reads `failed` first, so that it never exceeds `finished`.
    let failed = s.failed.load(Relaxed);
    let first_tokens = s.first_tokens.load(Relaxed);
    json!({
        "finished": s.finished.load(Relaxed),
        "failed": failed,
        "first_token_ms": s.first_token_us.load(Relaxed) as f64 / 1e3,
        "first_tokens": first_tokens,
    })
}

/// Returns the replica state for the load balancer.
pub fn replica_state(app: &App) -> Json {
    let models = app.registry.models();
    let (mut running, mut waiting, mut in_flight, mut generated, mut capacity, mut queue) =
        (0, 0, 0, 0, 0, 0);
    let (mut used, mut total) = (0, 0);
    for e in models.engines() {
        running += e.stats.running.load(Relaxed);
        waiting += e.stats.waiting.load(Relaxed);
        in_flight += e.stats.in_flight.load(Relaxed);
        generated += e.stats.generated_tokens.load(Relaxed);
        capacity += e.options.max_running;
        queue += e.options.max_queue;
        used += e.stats.kv_used.load(Relaxed);
        total += e.stats.kv_total.load(Relaxed);
    }
    let default = models.get(None);
    // A model whose engine has stopped cannot serve requests.
    let failed = models.engines().any(|e| e.stats.stopped.load(Relaxed));
    json!({
        "protocol": PROTOCOL,
        "phase": if failed { "failed" } else { app.phase.borrow().name() },
        "name": app.settings.name.as_ref().and_then(|name| name.to_str().ok()),
        "model": default.map(|e| e.name.clone()),
        "version": default.map(|e| e.version.clone()),
        "running": running,
        // Includes requests that the engine has not received yet.
        "waiting": waiting.max(in_flight.saturating_sub(running)),
        "kv_cache_usage": used as f64 / total.max(1) as f64,
        "kv_blocks_used": used,
        "kv_blocks_total": total,
        "capacity": {"running": capacity, "waiting": queue},
        "tokens_per_second": (app.tokens_per_second.update(generated) * 10.0).round() / 10.0,
        "active_requests": app.active.load(Relaxed),
        "answers": default.map(|engine| request_counts(engine)),
        "models": models.engines().map(|e| json!({
            "name": e.name, "version": e.version, "running": e.stats.running.load(Relaxed),
            "waiting": e.stats.waiting.load(Relaxed), "kv_cache_usage": kv_usage(e), "backend": e.info.backend,
            "failed_steps": e.stats.failed_steps.load(Relaxed),
        })).collect::<Vec<_>>(),
    })
}

/// Adds the current time. The time is not part of the state, because then every state would count as a change.
fn with_time(mut state: Json) -> Json {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    state["time_ms"] = json!(now.as_millis() as u64);
    state
}

/// Handles `GET /replica`: JSON, or with `Accept: text/event-stream` an event for each change and at least one per
/// second.
pub async fn replica(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if !accept.contains("text/event-stream") {
        return JsonBody(with_time(replica_state(&app))).into_response();
    }
    let phase = app.phase.subscribe();
    let start = (app, phase, None::<(Json, Instant)>);
    sse::respond_raw(futures_util::stream::unfold(start, |(app, mut phase, last)| async move {
        loop {
            if last.is_some() {
                // Changes within an interval are combined, except changes of the phase.
                tokio::select! {
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                    _ = phase.changed() => {}
                }
            }
            let now = replica_state(&app);
            let is_due =
                last.as_ref().is_none_or(|(then, at)| *then != now || at.elapsed() >= HEARTBEAT_INTERVAL);
            if is_due {
                let event = Bytes::from(format!("event: replica\ndata: {}\n\n", with_time(now.clone())));
                return Some((event, (app, phase, Some((now, Instant::now())))));
            }
        }
    }))
}

/// Handles `GET /version`.
pub async fn version() -> JsonBody<Json> {
    JsonBody(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Handles `GET /get_load`, for sglang-router.
pub async fn get_load(State(app): State<Arc<App>>) -> JsonBody<Json> {
    let load = |(rank, e): (usize, &Arc<Engine>)| {
        let (running, waiting) = (e.stats.running.load(Relaxed), e.stats.waiting.load(Relaxed));
        json!({"dp_rank": rank, "num_reqs": running + waiting, "num_waiting_reqs": waiting,
               "num_tokens": e.stats.kv_used.load(Relaxed) * crate::backend::BLOCK_SIZE})
    };
    JsonBody(app.registry.models().engines().enumerate().map(load).collect())
}

/// Handles `GET /get_model_info` and `GET /get_server_info`, for routers.
pub async fn model_info(State(app): State<Arc<App>>) -> JsonBody<Json> {
    let models = app.registry.models();
    let engine = models.get(None);
    JsonBody(json!({
        "served_model_name": engine.map(|e| e.name.clone()),
        "model_path": engine.map(|e| e.path.display().to_string()),
        "tokenizer_path": engine.map(|e| e.path.display().to_string()),
        "is_generation": true,
        "max_total_num_tokens": engine.map(|e| e.kv_tokens()),
        "context_length": engine.map(|e| e.info.max_context),
        "version": env!("CARGO_PKG_VERSION"),
    }))
}

/// Returns the value of the `endpoint-load-metrics` header (ORCA) in a format: `text` or `json`.
pub fn load_header(app: &App, format: &str) -> Option<HeaderValue> {
    let (mut running, mut waiting, mut usage) = (0, 0, 0.0f64);
    for e in app.registry.models().engines() {
        running += e.stats.running.load(Relaxed);
        waiting += e.stats.waiting.load(Relaxed);
        usage = usage.max(kv_usage(e));
    }
    let text = match format.to_ascii_lowercase().as_str() {
        "text" => format!(
            "TEXT named_metrics.kv_cache_usage_perc={usage:.4}, named_metrics.num_requests_running={running}, \
             named_metrics.num_requests_waiting={waiting}"
        ),
        "json" => format!(
            "JSON {}",
            json!({"named_metrics": {"kv_cache_usage_perc": usage, "num_requests_running": running,
                                     "num_requests_waiting": waiting}})
        ),
        _ => return None,
    };
    HeaderValue::from_str(&text).ok()
}
