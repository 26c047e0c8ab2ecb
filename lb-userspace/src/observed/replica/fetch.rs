//! One GET of a replica's state, with limits of time and size.

use crate::{
    desired::model::ReportError,
    observed::{
        dial::Dial,
        http::{self, GetError, GetRequest, authority},
    },
};
use bytes::Bytes;
use std::{
    io::ErrorKind,
    net::{IpAddr, SocketAddr},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};

/// Largest head of an answer, in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// Why a replica's state cannot be fetched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// No connection.
    #[error("{what}")]
    Connect {
        /// Why.
        what: String,
    },
    /// A step took too long.
    #[error("{what} took longer than {limit_ms} ms")]
    Slow {
        /// The step.
        what: &'static str,
        /// Limit of the step.
        limit_ms: u64,
    },
    /// The answer has another status than 200.
    #[error("status {status}")]
    Status {
        /// HTTP status.
        status: u16,
    },
    /// The server speaks another protocol, or the connection ended.
    #[error("the connection broke: {what}")]
    Broken {
        /// How.
        what: String,
    },
    /// The answer is not a valid report.
    #[error(transparent)]
    Report(#[from] ReportError),
}

impl FetchError {
    /// Whether the replica may be dead, so that a probe is due immediately.
    pub fn suggests_death(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Slow { .. } | Self::Broken { .. })
    }
}

impl From<GetError> for FetchError {
    fn from(error: GetError) -> Self {
        let what = match error {
            GetError::NotHttp => error.to_string(),
            GetError::Broken(source) => source.to_string(),
            GetError::Request(source) => source.to_string(),
        };
        Self::Broken { what }
    }
}

/// Where and how to fetch a replica's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchTarget {
    /// The worker's address and port.
    pub address: SocketAddr,
    /// The service's VIP, for the `Host` header.
    pub vip: IpAddr,
    /// Path and query.
    pub path: String,
    /// Time limit of connecting and of the answer's head; also of the body, unless it is a stream.
    pub timeout: Duration,
}

/// An answer whose body may still be arriving.
pub struct FetchResponse {
    response: http::Response,
    deadline: Instant,
    timeout: Duration,
}

fn slow(what: &'static str, limit: Duration) -> FetchError {
    FetchError::Slow { what, limit_ms: limit.as_millis() as u64 }
}

/// Connects, sends the request, and waits for the head of the answer.
///
/// # Errors
/// No connection, no answer in time, or another status than 200.
pub async fn fetch(
    target: &FetchTarget,
    accept: &'static str,
    dial: &Dial,
) -> Result<FetchResponse, FetchError> {
    let timeout = target.timeout;
    let deadline = Instant::now() + timeout;
    let stream = timeout_at(deadline, dial(target.address)).await.map_err(|_| slow("connecting", timeout))?;
    let stream = stream.map_err(|e: std::io::Error| FetchError::Connect {
        what: match e.kind() {
            ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            _ => format!("cannot connect: {e}"),
        },
    })?;
    let host = authority(target.vip);
    let headers = [("accept", accept)];
    let request = GetRequest { path: &target.path, host: &host, headers: &headers, max_head: Some(MAX_HEAD) };
    let head = timeout_at(deadline, http::get(stream, request)).await;
    let response = head.map_err(|_| slow("the answer", timeout))??;
    match response.status() {
        200 => Ok(FetchResponse { response, deadline, timeout }),
        status => Err(FetchError::Status { status }),
    }
}

impl FetchResponse {
    /// Whether the answer is an event stream.
    pub fn is_stream(&self) -> bool {
        self.response.content_type().is_some_and(|kind| kind.trim_start().starts_with("text/event-stream"))
    }

    /// Reads the whole body.
    ///
    /// # Errors
    /// The body has more than `limit` bytes, or does not arrive in time.
    pub async fn read_all(mut self, limit: usize) -> Result<Vec<u8>, FetchError> {
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

    /// Waits for the next piece of the body until `deadline`; None at the end of the body. `what` and `limit` describe the
    /// timeout in the error.
    ///
    /// # Errors
    /// Nothing arrived in time, or the connection broke.
    pub async fn next(
        &mut self,
        deadline: Instant,
        what: &'static str,
        limit: Duration,
    ) -> Result<Option<Bytes>, FetchError> {
        match timeout_at(deadline, self.response.next()).await {
            Err(_) => Err(slow(what, limit)),
            Ok(piece) => Ok(piece?),
        }
    }
}
