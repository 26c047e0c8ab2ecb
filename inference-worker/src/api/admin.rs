//! Administration: loads, replaces and removes models, closes connections, and drains the worker.

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
use crate::{engine::Engine, model::default_name, registry::ModelSpec};

/// Returns the description of a model.
fn describe(name: &str, engine: &Engine) -> Json {
    json!({"name": name, "version": engine.version, "path": engine.path, "backend": engine.info.backend,
           "max_context": engine.info.max_context, "weight_bytes": engine.info.weight_bytes, "kv_tokens": engine.kv_tokens(),
           "running": engine.stats.running.load(Relaxed), "waiting": engine.stats.waiting.load(Relaxed),
           "created": engine.created})
}

/// Handles `GET /admin/models`.
pub async fn list(State(app): State<Arc<App>>) -> JsonBody<Json> {
    let models = app.registry.models();
    let list: Vec<Json> = models.iter().map(|(name, engine)| describe(name, engine)).collect();
    JsonBody(json!({"models": list}))
}

/// A model to load, which replaces the model of the same name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadRequest {
    path: PathBuf,
    name: Option<String>,
    version: Option<String>,
    #[serde(default)]
    keep_old: bool,
}

/// Handles `POST /admin/models`. Responds when the model is in service, or with the reason for a failure. Until then,
/// and if the load fails, the earlier model stays in service.
pub async fn load(
    State(app): State<Arc<App>>,
    Body(r): Body<LoadRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    if *app.phase.borrow() == Phase::Draining {
        return Err(ApiError::unavailable("The worker is draining and loads no models."));
    }
    let name = r.name.unwrap_or_else(|| default_name(&r.path));
    let spec = ModelSpec { name, version: r.version, path: r.path, keep_old: r.keep_old };
    // On a separate task, so that the load continues if this client disconnects.
    let task_app = app.clone();
    let loaded = tokio::spawn(async move { task_app.registry.load(spec).await }).await;
    let engine = loaded.map_err(|_| {
        ApiError::internal("internal error while loading the model; see the log of the worker")
    })??;
    tracing::info!(model = engine.name, version = engine.version, "model in service");
    Ok(JsonBody(describe(&engine.name, &engine)))
}

/// Handles `DELETE /admin/models/{name}`.
pub async fn remove(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<JsonBody<Json>, ApiError> {
    app.registry.remove(&name).await?;
    Ok(JsonBody(json!({"removed": name})))
}

/// How long to close connections after each response.
#[derive(Debug, Deserialize)]
pub struct ShedRequest {
    seconds: f64,
}

/// Handles `POST /admin/shed`, which the load balancer sends to a worker with more than its share of the load.
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

/// Handles `POST /admin/drain`, which has the effect of SIGTERM.
pub async fn drain(State(app): State<Arc<App>>) -> JsonBody<Json> {
    app.phase.send_replace(Phase::Draining);
    JsonBody(json!({"phase": "draining"}))
}
