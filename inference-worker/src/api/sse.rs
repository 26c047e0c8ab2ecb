//! Server-sent events in the format of OpenAI's API: `data:` lines, and `[DONE]` at the end.

use std::convert::Infallible;

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde_json::Value as Json;

/// Returns a response that streams `chunks` and ends with `[DONE]`.
pub fn respond(chunks: impl Stream<Item = Json> + Send + 'static) -> Response {
    let done = futures_util::stream::once(async { Bytes::from_static(b"data: [DONE]\n\n") });
    respond_raw(chunks.map(|chunk| Bytes::from(format!("data: {chunk}\n\n"))).chain(done))
}

/// Returns a response that streams formatted events.
pub fn respond_raw(events: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(events.map(Ok::<_, Infallible>)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells proxies not to buffer the stream.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
