//! Middleware: request ids, counting, load headers, API keys, and closing connections.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

use super::{App, RequestId, error::ApiError, status};
use crate::metrics::StatusLabel;

/// Address of the client; `serve` adds it to each request.
#[derive(Debug, Clone, Copy)]
pub struct PeerAddress(pub SocketAddr);

/// Counts a request as active until it is dropped.
struct ActiveRequest(Arc<App>);

impl ActiveRequest {
    fn new(app: &Arc<App>) -> Self {
        app.active.fetch_add(1, Relaxed);
        Self(app.clone())
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// A response body that keeps its request active until its last byte.
struct TrackedBody {
    inner: Body,
    _active: ActiveRequest,
}

impl HttpBody for TrackedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Counts each request, and adds the headers that all responses have.
pub async fn track_request(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let load_format = request.headers().get("endpoint-load-metrics-format").cloned();
    // Probes and scrapes are frequent. They do not count as active requests, so that they cannot delay a drain.
    let is_probe = matches!(
        request.uri().path(),
        "/health" | "/ping" | "/ready" | "/metrics" | "/replica" | "/get_load"
    ) || request.uri().path().starts_with("/v2/health");
    let active = (!is_probe).then(|| ActiveRequest::new(&app));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    let status = response.status();
    app.metrics.http.get_or_create(&StatusLabel { code: status.as_u16() }).inc();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    // Behind a layer-4 load balancer, a client cannot see otherwise which worker answered.
    if let Some(name) = &app.settings.name {
        response.headers_mut().insert("x-worker", name.clone());
    }
    if let Some(value) = load_format.and_then(|f| status::load_header(&app, f.to_str().unwrap_or_default())) {
        response.headers_mut().insert("endpoint-load-metrics", value);
    }
    // A layer-4 load balancer distributes connections. To move a client to another worker, its connection must be
    // closed, after the response.
    if status == StatusCode::TOO_MANY_REQUESTS || (!is_probe && app.closes_connections()) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    match active {
        Some(active) => {
            response.map(|inner| Body::new(TrackedBody { inner, _active: active }.boxed_unsync()))
        }
        None => response,
    }
}

/// Returns the client's `x-request-id` if it is valid, else a random id.
fn request_id(request: &Request) -> String {
    let header = request.headers().get("x-request-id").and_then(|v| v.to_str().ok());
    let is_valid = |id: &&str| {
        (1..=128).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    header.filter(is_valid).map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned)
}

/// Returns the bearer token of a request.
fn bearer_token(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Compares keys in constant time.
fn keys_equal(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Rejects requests without a valid API key, if there are API keys.
pub async fn require_api_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.settings.api_keys;
    let is_valid = |key: &str| keys.iter().fold(false, |found, k| found | keys_equal(k, key));
    if keys.is_empty() || bearer_token(&request).is_some_and(is_valid) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

/// Rejects requests without the admin key. If there is no admin key, rejects requests from other hosts.
pub async fn require_admin(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let allowed = match &app.settings.admin_key {
        Some(admin) => bearer_token(&request).is_some_and(|key| keys_equal(admin, key)),
        None => {
            request.extensions().get::<PeerAddress>().is_some_and(|p| p.0.ip().to_canonical().is_loopback())
        }
    };
    if allowed {
        return next.run(request).await;
    }
    let hint = if app.settings.admin_key.is_some() {
        "Missing or wrong admin key: send `Authorization: Bearer KEY`."
    } else {
        "The admin API is available only from this host; start the worker with --admin-key-file to use it from other hosts."
    };
    ApiError::forbidden(hint).into_response()
}
