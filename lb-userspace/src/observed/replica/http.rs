//! One GET with limits on everything: time, bytes, and what comes back.

use crate::desired::model::ReportError;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, Response, body::Incoming, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::{
    net::TcpSocket,
    task::AbortHandle,
    time::{Instant, timeout_at},
};

/// Why a replica's state could not be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// No connection.
    #[error("{what}")]
    Connect {
        /// Why.
        what: String,
    },
    /// Too slow, as a whole or in the middle of something.
    #[error("{what} took longer than {limit_ms} ms")]
    Slow {
        /// What did.
        what: &'static str,
        /// Limit.
        limit_ms: u64,
    },
    /// An answer, and not what was asked for.
    #[error("status {status}")]
    Status {
        /// HTTP status.
        status: u16,
    },
    /// The other end speaks something else, or went away.
    #[error("the connection broke: {what}")]
    Broken {
        /// How.
        what: String,
    },
    /// What came cannot be a report.
    #[error(transparent)]
    Report(#[from] ReportError),
}

impl FetchError {
    /// Whether the replica may be gone: then a probe is due at once.
    pub fn is_hint(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Slow { .. } | Self::Broken { .. })
    }
}

/// What to ask whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Worker's address and port.
    pub address: SocketAddr,
    /// The service's VIP, as `Host`.
    pub vip: IpAddr,
    /// Path and query.
    pub path: String,
    /// Limit of connecting and of the answer's head; of a body that is no stream, too.
    pub timeout: Duration,
}

/// An answer with its body still to come.
pub struct Answer {
    response: Response<Incoming>,
    connection: AbortHandle,
    deadline: Instant,
    timeout: Duration,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn slow(what: &'static str, limit: Duration) -> FetchError {
    FetchError::Slow { what, limit_ms: limit.as_millis() as u64 }
}

fn broken(error: &hyper::Error) -> FetchError {
    let what = if error.is_parse() { "the answer is not HTTP".to_owned() } else { error.to_string() };
    FetchError::Broken { what }
}

/// Sends the request and waits for the head of the answer.
///
/// # Errors
/// No connection, no answer in time, or another status than 200.
pub async fn get(ask: &Ask, accept: &'static str) -> Result<Answer, FetchError> {
    let deadline = Instant::now() + ask.timeout;
    let connect = async {
        let socket = if ask.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        let stream = socket.connect(ask.address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let stream = timeout_at(deadline, connect).await.map_err(|_| slow("connecting", ask.timeout))?;
    let stream = stream.map_err(|e: std::io::Error| FetchError::Connect {
        what: match e.kind() {
            ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            _ => format!("cannot connect: {e}"),
        },
    })?;
    let head = async {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(64 * 1024).max_headers(100);
        let (mut sender, connection) =
            builder.handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
        let connection = tokio::spawn(async move { drop(connection.await) }).abort_handle();
        let guard = Guard(connection);
        let host = match ask.vip {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => format!("[{v6}]"),
        };
        let request = Request::get(&ask.path)
            .header(header::HOST, host)
            .header(header::USER_AGENT, concat!("lbd/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, accept)
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .map_err(|e| FetchError::Broken { what: e.to_string() })?;
        let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
        Ok::<_, FetchError>((response, guard.keep()))
    };
    let (response, connection) =
        timeout_at(deadline, head).await.map_err(|_| slow("the answer", ask.timeout))??;
    let answer = Answer { response, connection, deadline, timeout: ask.timeout };
    match answer.response.status().as_u16() {
        200 => Ok(answer),
        status => Err(FetchError::Status { status }),
    }
}

/// Ends a connection's task unless somebody keeps it.
struct Guard(AbortHandle);

impl Guard {
    fn keep(self) -> AbortHandle {
        let handle = self.0.clone();
        std::mem::forget(self);
        handle
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Answer {
    /// Whether it is an event stream.
    pub fn is_stream(&self) -> bool {
        let kind = self.response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        kind.is_some_and(|k| k.trim_start().starts_with("text/event-stream"))
    }

    /// The whole body.
    ///
    /// # Errors
    /// More than `limit` bytes, or not there in time.
    pub async fn whole(mut self, limit: usize) -> Result<Vec<u8>, FetchError> {
        let mut body = Vec::new();
        loop {
            match self.next(self.deadline, "the answer's body", self.timeout).await? {
                None => return Ok(body),
                Some(bytes) if body.len() + bytes.len() > limit => {
                    return Err(ReportError::TooLarge { limit }.into());
                }
                Some(bytes) => body.extend_from_slice(&bytes),
            }
        }
    }

    /// The next piece of the body, until `deadline`, which is `limit` after what is waited for began; none at its end.
    ///
    /// # Errors
    /// It did not come, or the connection broke.
    pub async fn next(
        &mut self,
        deadline: Instant,
        what: &'static str,
        limit: Duration,
    ) -> Result<Option<Bytes>, FetchError> {
        loop {
            match timeout_at(deadline, self.response.body_mut().frame()).await {
                Err(_) => return Err(slow(what, limit)),
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(broken(&error)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }
}
