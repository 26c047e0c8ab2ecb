//! The API's other end: what `lbctl` asks `lbd`.
//!
//! Input: the socket's path. Output: the types of `api::types`, or why not. Called by `cli`.

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

/// A write may wait for the maps; this is longer than lbd itself waits.
const TIMEOUT: Duration = Duration::from_secs(45);

/// Why there is no answer, or not the one that was hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody there.
    #[error("cannot reach lbd on {socket}: {why}")]
    Unreachable {
        /// Socket.
        socket: String,
        /// Why.
        why: String,
        /// What to do.
        fix: &'static str,
    },
    /// lbd said no.
    #[error("{}", info.message)]
    Refused {
        /// What it said.
        info: ErrorInfo,
    },
    /// It did not say what it should.
    #[error("lbd on {socket} answered {what}: is it of another version than this lbctl?")]
    Odd {
        /// Socket.
        socket: String,
        /// What came.
        what: String,
    },
}

/// For what takes as long as it takes: a backup, a migration. Whoever waits can leave.
const PATIENCE: Duration = Duration::from_secs(86_400);

/// Variable with the token of a lock that the caller holds; `lbctl rollout lock -- COMMAND` sets it for the command.
pub const LOCK_TOKEN_VARIABLE: &str = "LBCTL_LOCK_TOKEN";

/// A connection to lbd, made when it is first needed.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// For the lbd on this socket.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn new(socket: &Path) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder().unix_socket(socket).no_proxy();
        let token = std::env::var(LOCK_TOKEN_VARIABLE).ok();
        // A token that no header can carry is none that lbd gave out.
        let token = token.and_then(|token| HeaderValue::from_str(&token).ok());
        let headers = token.map(|token| (HeaderName::from_static(LOCK_TOKEN), token));
        let http = http.default_headers(headers.into_iter().collect()).build()?;
        Ok(Self { http, socket: socket.to_owned(), timeout: TIMEOUT })
    }

    /// The same lbd, waited for as long as it takes.
    #[must_use]
    pub fn patient(&self) -> Self {
        Self { timeout: PATIENCE, ..self.clone() }
    }

    /// Reads.
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

    /// Asks, with a body if there is one.
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
        let odd = |what: String| ClientError::Odd { socket: self.socket.display().to_string(), what };
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|e| odd(format!("something unexpected ({e})")));
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(ClientError::Refused { info: body.error }),
            Err(_) => {
                let text: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
                Err(odd(format!("{status} {text}")))
            }
        }
    }

    fn unreachable(&self, error: &reqwest::Error) -> ClientError {
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        let mut kind = None;
        let mut why = error.to_string();
        while let Some(e) = cause {
            why = e.to_string();
            if let Some(io) = e.downcast_ref::<std::io::Error>() {
                kind = Some(io.kind());
            }
            cause = e.source();
        }
        let fix = match kind {
            Some(ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                "is it running (`systemctl status lbd`)? give its socket with --socket or LBD_SOCKET"
            }
            Some(ErrorKind::PermissionDenied) => "use sudo, or join the socket's group",
            _ if error.is_timeout() => "lbd does not answer in time; see its log",
            _ => "see the log of lbd",
        };
        ClientError::Unreachable { socket: self.socket.display().to_string(), why, fix }
    }
}
