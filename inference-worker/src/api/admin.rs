//! Administration: loading and swapping models, shedding connections, draining.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use axum::{
    Json as JsonBody,
    extract::{Path, State},
};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::{App, Phase, error::ApiError, extract::Body};
use crate::{engine::Engine, model::default_name, registry::Spec};

fn describe(name: &str, engine: &Engine) -> Json {
    json!({"name": name, "version": engine.version, "path": engine.path, "backend": engine.backend,
           "max_context": engine.max_context, "weight_bytes": engine.weight_bytes, "kv_tokens": engine.kv_tokens(),
           "running": engine.stats.running.load(Relaxed), "waiting": engine.stats.waiting.load(Relaxed),
           "created": engine.created})
}

/// `GET /admin/models`.
pub async fn list(State(app): State<Arc<App>>) -> JsonBody<Json> {
    let models = app.registry.models();
    let list: Vec<Json> = models.iter().map(|(name, engine)| describe(name, engine)).collect();
    JsonBody(json!({"models": list}))
}

/// A model to load, or to put in another's place.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    path: PathBuf,
    name: Option<String>,
    version: Option<String>,
    #[serde(default)]
    keep_old: bool,
}

/// `POST /admin/models`: answers when the model is in service, or says why it is not; until then, and if
/// anything fails, the one before it serves.
pub async fn load(
    State(app): State<Arc<App>>,
    Body(r): Body<LoadRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    if *app.phase.borrow() == Phase::Draining {
        return Err(ApiError::unavailable("The worker is draining."));
    }
    let name = r.name.unwrap_or_else(|| default_name(&r.path));
    let spec = Spec { name, version: r.version, path: r.path, keep_old: r.keep_old };
    // On a task of its own: a client that leaves must not stop half-way what others may rely on.
    let task_app = app.clone();
    let loaded = tokio::spawn(async move { task_app.registry.load(spec).await }).await;
    let engine = loaded.map_err(|_| ApiError::internal("loading stopped with a bug; see the log"))??;
    tracing::info!(model = engine.name, version = engine.version, "in service");
    Ok(JsonBody(describe(&engine.name, &engine)))
}

/// `DELETE /admin/models/{name}`.
pub async fn remove(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<JsonBody<Json>, ApiError> {
    app.registry.remove(&name).await?;
    Ok(JsonBody(json!({"removed": name})))
}

/// For how long to close connections after their response.
#[derive(Debug, Deserialize)]
pub struct ShedRequest {
    seconds: f64,
}

/// `POST /admin/shed`: the balancer says that this worker is above its share.
pub async fn shed(
    State(app): State<Arc<App>>,
    Body(r): Body<ShedRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    if !(0.0..=3600.0).contains(&r.seconds) {
        return Err(ApiError::param("seconds", format!("`seconds` is {}, expected 0 to 3600.", r.seconds)));
    }
    let until = app.started.elapsed().as_millis() as u64 + (r.seconds * 1000.0) as u64;
    app.shed_until.store(until, Relaxed);
    Ok(JsonBody(json!({"shedding_seconds": r.seconds})))
}

/// `POST /admin/drain`: as SIGTERM does.
pub async fn drain(State(app): State<Arc<App>>) -> JsonBody<Json> {
    app.phase.send_replace(Phase::Draining);
    JsonBody(json!({"phase": "draining"}))
}
