//! Handlers of the routes of services, backends, flows, configuration and history.

use super::{
    ApiError, Control,
    access::Caller,
    control::SharedControl,
    engine::FlowFilter,
    find::{find_service, no_backend, no_service},
    types::*,
};
use crate::{
    desired::{
        model::{
            Backend, BackendState, Desired, Difference, Name, Protocol, RegionPolicy, Service, differences,
        },
        store::{StoreError, Stored, delta},
    },
    serve::explain,
};
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State},
    http::{StatusCode, request::Parts},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc, time::Duration};

/// Largest body: the whole state of about 100,000 backends.
const BODY_LIMIT: usize = 16 * 1024 * 1024;
/// Flows listed by default, and at most.
const FLOWS: (usize, usize) = (100, 100_000);
/// Revisions listed by default, and at most.
const REVISIONS: (usize, usize) = (20, 10_000);
/// Revisions that one request searches for those of a service.
const SEARCHED: usize = 1_000;
/// Longest wait for a change of the replicas.
const REPLICAS_WAIT: Duration = Duration::from_secs(20);

pub(super) type Reply<T> = Result<Json<T>, ApiError>;

/// Builds the router of all routes.
pub fn router(control: Arc<Control>) -> Router {
    super::access::router(super::table::table())
        .fallback(|uri: axum::http::Uri| async move {
            ApiError::not_found(format!("no route {}", uri.path()))
                .fix("see docs/reference/api.md; for example /v1/status")
        })
        .method_not_allowed_fallback(|method: axum::http::Method, uri: axum::http::Uri| async move {
            let message = format!("method {method} is not allowed on {}", uri.path());
            ApiError { status: StatusCode::METHOD_NOT_ALLOWED, ..ApiError::bad_request(message) }
        })
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(control)
}

/// Query parameters; errors are answered as [`ApiError`].
pub(super) struct Params<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(query)) => Ok(Self(query)),
            Err(error) => {
                let source =
                    std::error::Error::source(&error).map_or_else(|| error.to_string(), |s| s.to_string());
                Err(ApiError::bad_request(format!("query of {}: {source}", parts.uri.path())))
            }
        }
    }
}

/// Parses a JSON body.
pub(super) fn body<T: DeserializeOwned>(bytes: &Bytes) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|e| serde_error("body", &e))
}

/// Converts an error of serde; for an unknown key or variant, suggests the nearest known one.
fn serde_error(place: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    let refused = ApiError::bad_request(format!("{place}: {message}"));
    let words: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match words.split_first() {
        Some((word, known)) if message.starts_with("unknown") => {
            match crate::desired::config::nearest(word, known.iter().copied()) {
                Some(near) => refused.fix(format!("did you mean {near}?")),
                None => refused,
            }
        }
        _ => refused,
    }
}

pub(super) fn name(text: &str) -> Result<Name, ApiError> {
    text.parse().map_err(|e: crate::desired::model::NameError| ApiError::bad_request(e.to_string()))
}

fn names(path: &(String, String)) -> Result<(Name, Name), ApiError> {
    Ok((name(&path.0)?, name(&path.1)?))
}

/// Patches a value through its JSON form, so that unknown keys and wrong types are refused.
fn apply_patch<T: serde::Serialize + DeserializeOwned>(
    current: &T,
    patch: &Value,
    place: &str,
) -> Result<T, ApiError> {
    if !patch.is_object() {
        return Err(ApiError::bad_request("body: expected a JSON object with the settings to change"));
    }
    let mut value = serde_json::to_value(current).map_err(|e| serde_error(place, &e))?;
    delta::merge(&mut value, patch.clone());
    serde_json::from_value(value).map_err(|e| serde_error(place, &e))
}

fn service_mut<'a>(desired: &'a mut Desired, name: &Name) -> Result<&'a mut Service, ApiError> {
    if !desired.services.contains_key(name) {
        return Err(no_service(name, desired.services.keys()));
    }
    desired.service_mut(name).ok_or_else(|| ApiError::not_found(format!("there is no service {name}")))
}

fn backend_mut<'a>(
    desired: &'a mut Desired,
    service: &Name,
    backend: &Name,
) -> Result<&'a mut Backend, ApiError> {
    let s = service_mut(desired, service)?;
    if !s.backends.contains_key(backend) {
        return Err(no_backend(service, backend, s));
    }
    s.backends.get_mut(backend).ok_or_else(|| ApiError::not_found(format!("there is no backend {backend}")))
}

pub(super) async fn status(State(control): SharedControl) -> Reply<Status> {
    let view = control.view().await?;
    Ok(Json(control.status(&view)))
}

pub(super) async fn service_list(State(control): SharedControl) -> Reply<Vec<ServiceInfo>> {
    let view = control.view().await?;
    Ok(Json(control.services(&view)))
}

pub(super) async fn service_show(
    State(control): SharedControl,
    Path(service): Path<String>,
) -> Reply<ServiceInfo> {
    let view = control.view().await?;
    Ok(Json(control.service(&view, &name(&service)?)?))
}

pub(super) async fn service_add(
    State(control): SharedControl,
    Path(service): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let (service, new) = (name(&service)?, body::<Service>(&bytes)?);
    let change = |desired: &mut Desired| {
        if desired.services.contains_key(&service) {
            return Err(ApiError::exists(format!("service {service} already exists"))
                .fix(format!("change it with `lbctl service set {service}`, or choose another name")));
        }
        desired.services.insert(service.clone(), new.clone().into());
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

/// Weights of regions go with the policy that they are for: a patch to another policy that does not name them clears
/// them.
fn clear_weights(patch: &mut Value) {
    let Some(Value::Object(regions)) = patch.get_mut("regions") else { return };
    let weighted = json!(RegionPolicy::Weighted);
    if regions.get("policy").is_some_and(|policy| *policy != weighted) {
        regions.entry("weights").or_insert(Value::Null);
    }
}

pub(super) async fn service_set(
    State(control): SharedControl,
    Path(service): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let (service, mut patch) = (name(&service)?, body::<Value>(&bytes)?);
    clear_weights(&mut patch);
    let change = |desired: &mut Desired| {
        let s = service_mut(desired, &service)?;
        *s = apply_patch(s, &patch, &format!("service {service}"))?;
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn service_remove(
    State(control): SharedControl,
    Path(service): Path<String>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    let service = name(&service)?;
    let change = |desired: &mut Desired| {
        service_mut(desired, &service)?;
        desired.services.remove(&service);
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn backend_list_all(State(control): SharedControl) -> Reply<Vec<BackendInfo>> {
    let view = control.view().await?;
    Ok(Json(control.backends(&view, None)?))
}

pub(super) async fn backend_list(
    State(control): SharedControl,
    Path(service): Path<String>,
) -> Reply<Vec<BackendInfo>> {
    let view = control.view().await?;
    Ok(Json(control.backends(&view, Some(&name(&service)?))?))
}

pub(super) async fn backend_show(
    State(control): SharedControl,
    Path(path): Path<(String, String)>,
) -> Reply<BackendInfo> {
    let (service, backend) = names(&path)?;
    let view = control.view().await?;
    Ok(Json(control.backend(&view, &service, &backend)?))
}

pub(super) async fn backend_add(
    State(control): SharedControl,
    Path(path): Path<(String, String)>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let ((service, backend), new) = (names(&path)?, body::<Backend>(&bytes)?);
    let change = |desired: &mut Desired| {
        let s = service_mut(desired, &service)?;
        if s.backends.contains_key(&backend) {
            return Err(ApiError::exists(format!("service {service} already has a backend {backend}")).fix(
                format!("change it with `lbctl backend set {service} {backend}`, or choose another name"),
            ));
        }
        s.backends.insert(backend.clone(), new.clone());
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn backend_set(
    State(control): SharedControl,
    Path(path): Path<(String, String)>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let ((service, backend), patch) = (names(&path)?, body::<Value>(&bytes)?);
    let change = |desired: &mut Desired| {
        let b = backend_mut(desired, &service, &backend)?;
        *b = apply_patch(b, &patch, &format!("backend {service}/{backend}"))?;
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn backend_remove(
    State(control): SharedControl,
    Path(path): Path<(String, String)>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
) -> Reply<Change> {
    let (service, backend) = names(&path)?;
    let change = |desired: &mut Desired| {
        backend_mut(desired, &service, &backend)?;
        service_mut(desired, &service)?.backends.remove(&backend);
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

pub(super) async fn backend_drain(
    control: SharedControl,
    path: Path<(String, String)>,
    query: Params<WriteQuery>,
    caller: Caller,
) -> Reply<Change> {
    set_backend_state(control, path, query, caller, BackendState::Draining).await
}

pub(super) async fn backend_undrain(
    control: SharedControl,
    path: Path<(String, String)>,
    query: Params<WriteQuery>,
    caller: Caller,
) -> Reply<Change> {
    set_backend_state(control, path, query, caller, BackendState::Up).await
}

async fn set_backend_state(
    State(control): SharedControl,
    Path(path): Path<(String, String)>,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    state: BackendState,
) -> Reply<Change> {
    let (service, backend) = names(&path)?;
    let change = |desired: &mut Desired| {
        backend_mut(desired, &service, &backend)?.state = state;
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplicasQuery {
    service: Option<Name>,
    after: Option<u64>,
    wait_ms: Option<u64>,
}

pub(super) async fn replicas(
    State(control): SharedControl,
    Params(query): Params<ReplicasQuery>,
) -> Reply<Replicas> {
    let wait = query.wait_ms.map_or(REPLICAS_WAIT, Duration::from_millis).min(REPLICAS_WAIT);
    Ok(Json(control.replicas_after(query.service.as_ref(), query.after, wait).await?))
}

pub(super) async fn stats(State(control): SharedControl) -> Reply<Stats> {
    Ok(Json(control.view().await?.stats_info()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FlowsQuery {
    service: Option<Name>,
    backend: Option<Name>,
    limit: Option<usize>,
}

pub(super) async fn flows(State(control): SharedControl, Params(query): Params<FlowsQuery>) -> Reply<Flows> {
    let stored = control.head();
    if let Some(service) = &query.service {
        let s = find_service(&stored, service)?;
        if let Some(backend) = &query.backend
            && !s.backends.contains_key(backend)
        {
            return Err(no_backend(service, backend, s));
        }
    }
    let limit = query.limit.unwrap_or(FLOWS.0).min(FLOWS.1);
    Ok(Json(control.flows(FlowFilter { service: query.service, backend: query.backend, limit }).await?))
}

pub(super) async fn explain_flow(
    State(control): SharedControl,
    Params(query): Params<ExplainQuery>,
) -> Reply<Explanation> {
    let ExplainQuery { source, destination, protocol, connection_id } = query;
    if source.is_ipv4() != destination.is_ipv4() {
        return Err(ApiError::bad_request(format!(
            "source {source} and destination {destination} have different address families"
        )));
    }
    Ok(Json(control.explain(explain::Query { source, destination, protocol, connection_id }).await?))
}

/// Query of `GET /v1/explain`: the flow to explain.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ExplainQuery {
    source: SocketAddr,
    destination: SocketAddr,
    protocol: Protocol,
    connection_id: Option<explain::ConnectionId>,
}

pub(super) async fn config_export(State(control): SharedControl) -> Reply<Config> {
    let head = control.head();
    let Desired { services, regions, guard: _ } = (*head.desired).clone();
    let mut desired = Desired { services, regions, guard: crate::desired::model::Guard::default() };
    // Where the export is applied, a service without a size would get a new one.
    desired.name_sizes();
    desired.name_defaults();
    Ok(Json(Config { revision: Some(head.revision.number), desired }))
}

pub(super) async fn config_apply(
    State(control): SharedControl,
    Params(mut query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let config: Config = body(&bytes)?;
    query.expected = query.expected.or(config.revision);
    let change = |desired: &mut Desired| {
        let mut wanted = config.desired.clone();
        wanted.keep_operations(desired);
        *desired = wanted;
        Ok(())
    };
    Ok(Json(control.write(&author, &query, change).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HistoryQuery {
    before: Option<u64>,
    limit: Option<usize>,
    service: Option<Name>,
}

pub(super) async fn history(
    State(control): SharedControl,
    Params(query): Params<HistoryQuery>,
) -> Reply<History> {
    let limit = query.limit.unwrap_or(REVISIONS.0).min(REVISIONS.1);
    let Some(service) = query.service else {
        return Ok(Json(History {
            revisions: control.store.history(query.before, limit).await?,
            next: None,
        }));
    };
    let (mut revisions, mut next) = control.store.history_of(service, query.before, SEARCHED).await?;
    if revisions.len() > limit {
        revisions.truncate(limit);
        next = revisions.last().map(|r| r.number);
    }
    Ok(Json(History { revisions, next }))
}

/// Differences between two states, computed off the async threads: states may be large.
async fn compare(from: Arc<Desired>, to: Arc<Desired>) -> Result<Vec<Difference>, ApiError> {
    let compared = tokio::task::spawn_blocking(move || differences(&from, &to)).await;
    compared.map_err(|error| ApiError::internal(format!("comparing the revisions failed: {error}")))
}

pub(super) async fn history_show(
    State(control): SharedControl,
    Path(number): Path<String>,
) -> Reply<RevisionChange> {
    let Stored { revision, desired } = control.store.get(revision(&number)?).await?;
    let before = match revision.number {
        0 => return Ok(Json(RevisionChange { revision, differences: Some(Vec::new()) })),
        number => control.store.get(number - 1).await,
    };
    let differences = match before {
        Ok(before) => Some(compare(before.desired, desired).await?),
        Err(StoreError::NoRevision { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Json(RevisionChange { revision, differences }))
}

pub(super) async fn history_diff(
    State(control): SharedControl,
    Path((from, to)): Path<(String, String)>,
) -> Reply<RevisionDiff> {
    let (from, to) = (revision(&from)?, revision(&to)?);
    let (from, to) = (control.store.get(from).await?, control.store.get(to).await?);
    let differences = compare(from.desired, to.desired).await?;
    Ok(Json(RevisionDiff { from: from.revision, to: to.revision, differences }))
}

fn revision(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| ApiError::bad_request(format!("revision {text:?} is not a number")))
}

pub(super) async fn rollback(
    State(control): SharedControl,
    Params(query): Params<WriteQuery>,
    Caller(author): Caller,
    bytes: Bytes,
) -> Reply<Change> {
    let Rollback { revision } = body(&bytes)?;
    Ok(Json(control.rollback(&author, &query, revision).await?))
}
