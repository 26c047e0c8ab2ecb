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
        let response = self.accepted(response).await?;
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        serde_json::from_slice(&bytes).map_err(|e| self.unexpected(e.to_string()))
    }

    /// Opens a stream of server-sent events.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn event_stream(&self, path: &str, query: &impl Serialize) -> Result<EventStream, ClientError> {
        let request = self.http.get(format!("http://lbd{path}")).query(query);
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let response = self.accepted(response).await?;
        Ok(EventStream { client: self.clone(), response, text: Vec::new() })
    }

    /// The response, if it is a success.
    async fn accepted(&self, response: reqwest::Response) -> Result<reqwest::Response, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Err(ClientError::Refused { info: body.error }),
            Err(_) => {
                let text: String = String::from_utf8_lossy(&bytes).chars().take(200).collect();
                Err(self.unexpected(format!("{status} {text}")))
            }
        }
    }

    fn unexpected(&self, what: String) -> ClientError {
        ClientError::UnexpectedResponse { socket: self.socket.display().to_string(), what }
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

/// Longest server-sent event, in bytes.
const MAX_MESSAGE: usize = 256 * 1024;
/// Time without a byte after which lbd is gone: it sends a comment more often.
const SILENCE: Duration = Duration::from_secs(60);

/// A server-sent event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventMessage {
    /// Position after the event.
    pub id: String,
    /// Type; empty for an ordinary event.
    pub event: String,
    /// Text.
    pub data: String,
}

impl EventMessage {
    /// Parses the lines of an event; none if they are a comment only.
    fn parse(lines: &str) -> Option<Self> {
        let mut message = Self::default();
        for line in lines.lines() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => message.id = value.to_owned(),
                "event" => message.event = value.to_owned(),
                "data" => message.data.push_str(value),
                _ => {}
            }
        }
        (!message.data.is_empty()).then_some(message)
    }
}

/// A stream of server-sent events.
pub struct EventStream {
    client: ApiClient,
    response: reqwest::Response,
    /// What was received after the last complete event.
    text: Vec<u8>,
}

impl EventStream {
    /// Waits for the next event; none at the end of the stream.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<EventMessage>, ClientError> {
        loop {
            if let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
                let lines: Vec<u8> = self.text.drain(..end + 2).collect();
                if let Some(message) = EventMessage::parse(&String::from_utf8_lossy(&lines)) {
                    return Ok(Some(message));
                }
                continue;
            }
            if self.text.len() > MAX_MESSAGE {
                return Err(self.client.unexpected(format!("an event of more than {MAX_MESSAGE} bytes")));
            }
            match tokio::time::timeout(SILENCE, self.response.chunk()).await {
                Ok(Ok(Some(bytes))) => self.text.extend_from_slice(&bytes),
                Ok(Ok(None)) | Err(_) => return Ok(None),
                Ok(Err(error)) => return Err(self.client.unreachable(&error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_sent_events_are_read() {
        let read = |text| EventMessage::parse(text);
        let message = read("id: ab-1\ndata: {\"a\":1}\n\n").unwrap();
        assert_eq!((&*message.id, &*message.event, &*message.data), ("ab-1", "", "{\"a\":1}"));
        assert_eq!(read("event: gap\ndata:x\n\n").unwrap().event, "gap");
        assert_eq!(read(":\n\n"), None);
    }
}
