//! An HTTP/1.1 GET and what its answer must be.

use crate::desired::model::HttpCheck;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout_at},
};

/// Bytes of a response's body that are read before the connection is closed.
const BODY_LIMIT: usize = 64 * 1024;

/// Asks over a connection, and judges the answer.
///
/// # Errors
/// What is not as it should be.
pub async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    check: &HttpCheck,
    host: &str,
    deadline: Instant,
) -> Result<String, String> {
    let broken = |e: hyper::Error| {
        if e.is_parse() { "the answer is not HTTP".to_owned() } else { format!("connection broke: {e}") }
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let mut request = Request::get(&check.path)
        .header("host", host)
        .header("user-agent", concat!("lbd/", env!("CARGO_PKG_VERSION")))
        .header("connection", "close");
    for (name, value) in &check.headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::<bytes::Bytes>::new()).map_err(|e| format!("cannot ask: {e}"))?;
    // The connection only moves while it is polled: beside the request, in this task.
    let ask = async {
        let mut response = sender.send_request(request).await.map_err(broken)?;
        let code = response.status().as_u16();
        let mut body = Vec::new();
        while body.len() < BODY_LIMIT
            && let Ok(Some(Ok(frame))) = timeout_at(deadline, response.body_mut().frame()).await
        {
            if let Some(data) = frame.data_ref() {
                body.extend_from_slice(&data[..data.len().min(BODY_LIMIT - body.len())]);
            }
        }
        judge(check, code, &body)
    };
    let mut connection = std::pin::pin!(connection);
    let mut ask = std::pin::pin!(ask);
    tokio::select! {
        biased;
        result = &mut ask => result,
        _ = &mut connection => ask.await,
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
            Err(format!("status {code}, and the body does not hold {text:?}: {seen:?}"))
        }
        _ => Ok(format!("status {code}")),
    }
}
