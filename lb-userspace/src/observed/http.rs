//! HTTP/1.1 GET over an established connection: the client of health checks and of replica state.
//!
//! Input: a connected stream and a [`GetRequest`]. Output: a [`Response`] whose body is read piece by piece. Limits of time
//! and size are the caller's, except for the head. Called by `health::http` and `replica::fetch`.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use std::{
    net::IpAddr,
    pin::{Pin, pin},
};
use tokio::io::{AsyncRead, AsyncWrite};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    /// The server speaks another protocol.
    #[error("the answer is not HTTP")]
    NotHttp,
    /// The connection ended too early.
    #[error("connection broke: {0}")]
    Broken(#[source] hyper::Error),
    /// Path, host or a header is not valid.
    #[error("cannot build the request: {0}")]
    Request(#[from] hyper::http::Error),
}

impl From<hyper::Error> for GetError {
    fn from(error: hyper::Error) -> Self {
        if error.is_parse() { Self::NotHttp } else { Self::Broken(error) }
    }
}

/// A GET request.
#[derive(Clone, Copy, Debug)]
pub struct GetRequest<'a> {
    /// Path and query.
    pub path: &'a str,
    /// Value of the `Host` header.
    pub host: &'a str,
    /// Additional headers.
    pub headers: &'a [(&'a str, &'a str)],
    /// Largest head of the answer, in bytes; None for hyper's default.
    pub max_head: Option<usize>,
}

/// The connection's own future; None once it has ended. It only makes progress while it is polled.
type ConnectionTask = Option<Pin<Box<dyn Future<Output = ()> + Send>>>;

/// An answer whose body may still be arriving. Dropping it closes the connection.
pub struct Response {
    response: hyper::Response<Incoming>,
    connection: ConnectionTask,
}

/// Awaits `work` while polling the connection.
async fn drive<T>(connection: &mut ConnectionTask, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    if let Some(running) = connection {
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = running => *connection = None,
        }
    }
    work.await
}

/// Sends a request, and waits for the head of the answer.
///
/// # Errors
/// See [`GetError`].
pub async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: GetRequest<'_>,
) -> Result<Response, GetError> {
    let mut builder = http1::Builder::new();
    if let Some(bytes) = request.max_head {
        builder.max_buf_size(bytes);
    }
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
    let mut connection: ConnectionTask = Some(Box::pin(async { drop(connection.await) }));
    let mut parts = Request::get(request.path)
        .header(header::HOST, request.host)
        .header(header::USER_AGENT, concat!("lbd/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close");
    for (name, value) in request.headers {
        parts = parts.header(*name, *value);
    }
    let request = parts.body(Empty::<Bytes>::new())?;
    let response = drive(&mut connection, sender.send_request(request)).await?;
    Ok(Response { response, connection })
}

impl Response {
    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// Value of the `Content-Type` header.
    pub fn content_type(&self) -> Option<&str> {
        self.response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok())
    }

    /// The next piece of the body; None at its end. Cancelling loses nothing.
    ///
    /// # Errors
    /// The connection ended, or the body is not valid.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GetError> {
        let body = self.response.body_mut();
        let next = async {
            while let Some(frame) = body.frame().await {
                if let Ok(bytes) = frame?.into_data() {
                    return Ok(Some(bytes));
                }
            }
            Ok(None)
        };
        drive(&mut self.connection, next).await
    }
}

/// Formats an address as the authority of a URL, for the `Host` header.
pub fn authority(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    }
}
