//! What happens around every request: its id, keys, counting, load headers, and closing connections.

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

/// The client's address, put into each request by `serve`.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// Counts a request until its response's last byte, or until it is dropped.
struct Active(Arc<App>);

impl Active {
    fn new(app: &Arc<App>) -> Self {
        app.active.fetch_add(1, Relaxed);
        Self(app.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Relaxed);
    }
}

/// A body that keeps its request counted.
struct Counted {
    inner: Body,
    _active: Active,
}

impl HttpBody for Counted {
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

/// Wraps every request.
pub async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let load_format = request.headers().get("endpoint-load-metrics-format").cloned();
    // State is asked for all the time and by many: it is not traffic, and must not hold up a drain.
    let state = matches!(
        request.uri().path(),
        "/health" | "/ping" | "/ready" | "/metrics" | "/replica" | "/get_load"
    ) || request.uri().path().starts_with("/v2/health");
    let active = (!state).then(|| Active::new(&app));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    let status = response.status();
    app.metrics.http.get_or_create(&StatusLabel { code: status.as_u16() }).inc();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", value);
    }
    // Behind a layer-4 balancer nothing else tells a client who answered.
    if let Some(name) = &app.settings.name {
        response.headers_mut().insert("x-worker", name.clone());
    }
    if let Some(value) = load_format.and_then(|f| status::load_header(&app, f.to_str().unwrap_or_default())) {
        response.headers_mut().insert("endpoint-load-metrics", value);
    }
    // A layer-4 balancer places connections, so a client can only be moved by ending its connection. That is
    // done after the response, never instead of it.
    if status == StatusCode::TOO_MANY_REQUESTS || (!state && app.sheds()) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    match active {
        Some(active) => response.map(|inner| Body::new(Counted { inner, _active: active }.boxed_unsync())),
        None => response,
    }
}

fn request_id(request: &Request) -> String {
    let given = request.headers().get("x-request-id").and_then(|v| v.to_str().ok());
    let usable = |id: &&str| {
        (1..=128).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    given.filter(usable).map_or_else(|| format!("{:032x}", rand::random::<u128>()), str::to_owned)
}

fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// Compares without telling by its duration how much was right.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Lets a request pass that has one of the API keys, or any where there are none.
pub async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.settings.api_keys;
    let known = |key: &str| keys.iter().fold(false, |found, k| found | same(k, key));
    if keys.is_empty() || bearer(&request).is_some_and(known) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

/// Lets a request pass that has the admin key; without such a key, only from this machine.
pub async fn check_admin(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let allowed = match &app.settings.admin_key {
        Some(admin) => bearer(&request).is_some_and(|key| same(admin, key)),
        None => request.extensions().get::<Peer>().is_some_and(|p| p.0.ip().to_canonical().is_loopback()),
    };
    if allowed {
        return next.run(request).await;
    }
    let hint = if app.settings.admin_key.is_some() {
        "The admin API needs the admin key: send `Authorization: Bearer KEY`."
    } else {
        "The admin API answers only this machine; start the worker with --admin-key-file to use it from elsewhere."
    };
    ApiError::forbidden(hint).into_response()
}
