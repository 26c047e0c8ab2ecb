//! The API's other end: what `lbctl` asks `lbd`.
//!
//! Input: the socket's path. Output: the types of `api::types`, or why not. Called by `cli`.

use crate::api::types::{ErrorBody, ErrorInfo};
use reqwest::Method;
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

/// A connection to lbd, made when it is first needed.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

impl Client {
    /// For the lbd on this socket.
    ///
    /// # Errors
    /// The HTTP library cannot be set up.
    pub fn new(socket: &Path) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder().unix_socket(socket).timeout(TIMEOUT).no_proxy().build()?;
        Ok(Self { http, socket: socket.to_owned() })
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
