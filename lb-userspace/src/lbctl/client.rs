//! The HTTP client of `lbctl`, which talks to lbd's API over its Unix socket.
//!
//! Input: the path of the socket. Output: the types of `api::types`, or a [`ClientError`]. Called by `commands`.

use crate::serve::api::{
    LOCK_TOKEN,
    types::{ErrorBody, ErrorInfo},
};
use reqwest::{
    Method,
    header::{HeaderName, HeaderValue},
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    error::Error,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

/// Timeout of a request. A write may wait for the maps; this is longer than lbd itself waits.
const TIMEOUT: Duration = Duration::from_secs(45);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("cannot reach lbd on {socket}: {cause}")]
    Unreachable {
        /// Path of the socket.
        socket: String,
        /// Innermost cause.
        cause: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// lbd refused the request.
    #[error("{}", info.message)]
    Refused {
        /// Error as lbd reported it.
        info: ErrorInfo,
    },
    /// The response cannot be understood.
    #[error(
        "unexpected response from lbd on {socket}: {what}; does lbd have another version than this lbctl?"
    )]
    UnexpectedResponse {
        /// Path of the socket.
        socket: String,
        /// The response, shortened.
        what: String,
    },
}

/// Timeout of requests without a useful bound, such as a backup or a migration; the user can interrupt them.
const LONG_TIMEOUT: Duration = Duration::from_secs(86_400);

/// Environment variable with the token of a lock that the caller holds; `lbctl rollout lock -- COMMAND` sets it.
pub const LOCK_TOKEN_VARIABLE: &str = "LBCTL_LOCK_TOKEN";

/// A client of lbd, which connects at the first request.
#[derive(Clone, Debug)]
pub struct ApiClient {
    http: reqwest::Client,
    socket: PathBuf,
    timeout: Duration,
}

impl ApiClient {
    /// Creates a client of the lbd on this socket.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn new(socket: &Path) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder().unix_socket(socket).no_proxy();
        let token = std::env::var(LOCK_TOKEN_VARIABLE).ok();
        // lbd gives out only tokens that fit into a header.
        let token = token.and_then(|token| HeaderValue::from_str(&token).ok());
        let headers = token.map(|token| (HeaderName::from_static(LOCK_TOKEN), token));
        let http = http.default_headers(headers.into_iter().collect()).build()?;
        Ok(Self { http, socket: socket.to_owned(), timeout: TIMEOUT })
    }

    /// Returns a client of the same lbd whose requests may take a day.
    #[must_use]
    pub fn with_long_timeout(&self) -> Self {
        Self { timeout: LONG_TIMEOUT, ..self.clone() }
    }

    /// Returns a client of the same lbd whose requests may take at most this long.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout: timeout.min(self.timeout), ..self.clone() }
    }

    /// Sends a GET request.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(Method::GET, path, query, None::<&()>).await
    }

    /// Sends a request, with a JSON body if one is given.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &impl Serialize,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let mut request = self.http.request(method, format!("http://lbd{path}")).query(query);
        request = request.timeout(self.timeout);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let status = response.status();
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let unexpected = |what: String| ClientError::UnexpectedResponse {
            socket: self.socket.display().to_string(),
            what,
        };
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|e| unexpected(e.to_string()));
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(ClientError::Refused { info: body.error }),
            Err(_) => {
                let text: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
                Err(unexpected(format!("{status} {text}")))
            }
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> ClientError {
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        let mut kind = None;
        let mut message = error.to_string();
        while let Some(e) = cause {
            message = e.to_string();
            if let Some(io) = e.downcast_ref::<std::io::Error>() {
                kind = Some(io.kind());
            }
            cause = e.source();
        }
        let fix = match kind {
            Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                "check that lbd runs (`systemctl status lbd`), or give its socket with --socket or LBD_SOCKET"
            }
            Some(ErrorKind::PermissionDenied) => "run lbctl with sudo, or as a member of the socket's group",
            _ if error.is_timeout() => "lbd did not answer in time: see its log",
            _ => "see the log of lbd (`journalctl -u lbd`)",
        };
        ClientError::Unreachable { socket: self.socket.display().to_string(), cause: message, fix }
    }
}
