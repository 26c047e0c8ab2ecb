//! HTTP check: a GET, and what its answer must be.

use crate::{
    desired::model::HttpCheck,
    observed::{
        health::ProbeError,
        http::{GetError, GetRequest, get},
    },
};
use std::time::Duration;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};

/// Bytes of a response's body that are read before the connection is closed.
const BODY_LIMIT: usize = 64 * 1024;

/// Sends the check's request over a connection, and judges the answer. The body is read until `deadline`, or for `timeout`
/// if the answer began later.
///
/// # Errors
/// Why the check failed.
pub async fn check(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    check: &HttpCheck,
    host: &str,
    (deadline, timeout): (Instant, Duration),
) -> Result<String, ProbeError> {
    let headers: Vec<(&str, &str)> =
        check.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let request = GetRequest { path: &check.path, host, headers: &headers, max_head: None };
    let mut response = get(stream, request).await.map_err(|e| request_error(&e))?;
    let now = Instant::now();
    let deadline = if now < deadline { deadline } else { now + timeout };
    let mut body = Vec::new();
    while body.len() < BODY_LIMIT
        && let Ok(Ok(Some(bytes))) = timeout_at(deadline, response.next()).await
    {
        body.extend_from_slice(&bytes[..bytes.len().min(BODY_LIMIT - body.len())]);
    }
    judge(check, response.status(), &body).map_err(ProbeError::Failed)
}

fn request_error(error: &GetError) -> ProbeError {
    match error {
        GetError::Request(_) => ProbeError::settings(error.to_string()),
        GetError::NotHttp | GetError::Broken(_) => ProbeError::sort(error),
    }
}

fn judge(check: &HttpCheck, code: u16, body: &[u8]) -> Result<String, String> {
    let (first, last) = check.status;
    if !(first..=last).contains(&code) {
        return Err(if first == last {
            format!("status {code}, expected {first}")
        } else {
            format!("status {code}, expected {first} to {last}")
        });
    }
    match &check.body {
        Some(text) if !body.windows(text.len().max(1)).any(|part| part == text.as_bytes()) => {
            let seen: String =
                String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).take(60).collect();
            Err(format!("status {code}, but the body does not contain {text:?}: {seen:?}"))
        }
        _ => Ok(format!("status {code}")),
    }
}
