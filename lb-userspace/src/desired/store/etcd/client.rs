//! Calls to etcd's gRPC API: choice of the member, timeouts and authentication.
//!
//! Input: members, TLS files, a user. Output: answers, or a [`CallError`] that says whether the request may
//! have reached etcd nevertheless. A member that does not answer within [`ATTEMPT`] or has no leader is replaced
//! by the next one. Called by the store in this module.

use super::proto::{self, AuthenticateRequest, AuthenticateResponse};
use hyper::http::uri::PathAndQuery;
use rand::seq::SliceRandom;
use std::{
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

/// Time that one member may take before the next is tried.
pub const ATTEMPT: Duration = Duration::from_millis(1_500);
/// Timeout of a connection attempt.
const CONNECT: Duration = Duration::from_secs(1);
/// Interval of pings: etcd closes connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);
/// Pause after a round in which no member answered.
const ROUND: Duration = Duration::from_millis(100);
/// Largest answer: a page of revisions, or the parts of a large one.
const MESSAGE_LIMIT: usize = 64 * 1024 * 1024;

/// Addresses of etcd, and credentials.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// `HOST:PORT` of each member.
    pub members: Vec<String>,
    /// Whether TLS is used.
    pub tls: bool,
    /// File of CA certificates that verify the members; the system's if none.
    pub ca: Option<PathBuf>,
    /// Files of our client certificate and its private key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User name, and file of the password.
    pub user: Option<(String, PathBuf)>,
}

/// Why a client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A file cannot be read.
    #[error("cannot read {file}: {source}")]
    File {
        /// File.
        file: String,
        /// Error of the read.
        #[source]
        source: std::io::Error,
    },
    /// The address of a member or a certificate is invalid.
    #[error("cannot set up the connection to etcd at {member}: {what}")]
    Member {
        /// Address of the member.
        member: String,
        /// What is wrong.
        what: String,
    },
}

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// No member answered in time.
    #[error("{what}")]
    Silent {
        /// Message of the last member.
        what: String,
        /// Whether a member may have executed the request.
        sent: bool,
    },
    /// A member refused the request.
    #[error("{what}")]
    Refused {
        /// Status code of gRPC.
        code: Code,
        /// Message of the member.
        what: String,
    },
}

/// Members of one etcd cluster.
pub struct EtcdClient {
    members: Vec<(String, Channel)>,
    /// The member that answered last.
    preferred: AtomicUsize,
    user: Option<(String, String)>,
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

fn read(file: &PathBuf) -> Result<Vec<u8>, AccessError> {
    std::fs::read(file).map_err(|source| AccessError::File { file: file.display().to_string(), source })
}

impl EtcdClient {
    /// Creates a client; connections are made when first needed. Blocks for the files.
    ///
    /// # Errors
    /// A file cannot be read or is invalid, or an address is invalid.
    pub fn new(access: &Access) -> Result<Self, AccessError> {
        let mut tls = None;
        if access.tls {
            let mut config = ClientTlsConfig::new();
            config = match &access.ca {
                Some(file) => config.ca_certificate(Certificate::from_pem(read(file)?)),
                None => config.with_native_roots(),
            };
            if let Some((certificate, key)) = &access.identity {
                config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            tls = Some(config);
        }
        let user = match &access.user {
            Some((name, file)) => {
                let password =
                    String::from_utf8_lossy(&read(file)?).trim_end_matches(['\n', '\r']).to_owned();
                Some((name.clone(), password))
            }
            None => None,
        };
        let mut members = Vec::new();
        for member in &access.members {
            let failed = |e: &dyn std::error::Error| AccessError::Member {
                member: member.clone(),
                what: innermost(e),
            };
            let scheme = if access.tls { "https" } else { "http" };
            let mut endpoint = Endpoint::from_shared(format!("{scheme}://{member}"))
                .map_err(|e| failed(&e))?
                .connect_timeout(CONNECT)
                .http2_keep_alive_interval(PING)
                .keep_alive_timeout(ATTEMPT)
                .keep_alive_while_idle(true)
                .tcp_nodelay(true);
            if let Some(tls) = &tls {
                endpoint = endpoint.tls_config(tls.clone()).map_err(|e| failed(&e))?;
            }
            members.push((member.clone(), endpoint.connect_lazy()));
        }
        // Shuffled, so that the hosts spread over the members.
        members.shuffle(&mut rand::rng());
        Ok(Self { members, preferred: AtomicUsize::new(0), user, token: Mutex::new(None) })
    }

    /// Returns the members' addresses, joined.
    pub fn addresses(&self) -> String {
        let mut all: Vec<&str> = self.members.iter().map(|(address, _)| address.as_str()).collect();
        all.sort_unstable();
        all.join(", ")
    }

    /// Returns the address of the preferred member, which is tried first.
    pub fn member(&self) -> &str {
        &self.members[self.preferred.load(Ordering::Relaxed) % self.members.len()].0
    }

    /// Prefers another member from now on, if `from` is still the preferred one.
    pub fn prefer_another(&self, from: &str) {
        if self.member() == from {
            self.preferred.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends a request to the members in turn until one answers.
    ///
    /// # Errors
    /// No member answered within `within`, or one refused.
    pub async fn call<Q, A>(&self, path: &'static str, request: &Q, within: Duration) -> Result<A, CallError>
    where
        Q: prost::Message + Clone + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let until = Instant::now() + within;
        let first = self.preferred.load(Ordering::Relaxed);
        let mut sent = false;
        let mut what = "no time left".to_owned();
        for attempt in 0.. {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let index = (first + attempt) % self.members.len();
            match self.call_member(index, path, request.clone(), left.min(ATTEMPT)).await {
                Ok(answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(CallError::Silent { what: w, sent: s }) => {
                    what = format!("{}: {w}", self.members[index].0);
                    sent |= s;
                }
                Err(refused) => return Err(refused),
            }
            if (attempt + 1) % self.members.len() == 0 {
                tokio::time::sleep(ROUND).await;
            }
        }
        Err(CallError::Silent { what, sent })
    }

    /// Sends a request to one member; twice if our token has expired.
    pub async fn call_member<Q, A>(
        &self,
        index: usize,
        path: &'static str,
        request: Q,
        within: Duration,
    ) -> Result<A, CallError>
    where
        Q: prost::Message + Clone + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let work = async {
            let token = self.token(index).await?;
            match self.unary(index, path, request.clone(), token).await {
                Err(status) if auth_expired(&status) && self.user.is_some() => {
                    self.drop_token();
                    let token = self.token(index).await?;
                    self.unary(index, path, request, token).await.map_err(|s| call_error(&s))
                }
                other => other.map_err(|s| call_error(&s)),
            }
        };
        match tokio::time::timeout(within, work).await {
            Ok(result) => result,
            Err(_) => {
                let what = format!("no answer within {:.1} s", within.as_secs_f32());
                Err(CallError::Silent { what, sent: true })
            }
        }
    }

    async fn unary<Q, A>(
        &self,
        index: usize,
        path: &'static str,
        request: Q,
        token: Option<MetadataValue<Ascii>>,
    ) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut grpc = self.grpc(index);
        grpc.ready().await.map_err(|e| Status::from_error(e.into()))?;
        let request = with_metadata(Request::new(request), token);
        let codec = ProstCodec::<Q, A>::default();
        Ok(grpc.unary(request, PathAndQuery::from_static(path), codec).await?.into_inner())
    }

    /// Opens a stream of answers to one request, which stays open until it is dropped.
    ///
    /// # Errors
    /// The preferred member did not answer in time, or refused.
    pub async fn stream<Q, A>(&self, path: &'static str, request: Q) -> Result<Streaming<A>, CallError>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        use futures_util::stream::{StreamExt, iter, pending};
        let index = self.preferred.load(Ordering::Relaxed) % self.members.len();
        let work = async {
            let token = self.token(index).await?;
            let mut grpc = self.grpc(index);
            grpc.ready().await.map_err(|e| call_error(&Status::from_error(e.into())))?;
            let request = with_metadata(Request::new(iter([request]).chain(pending())), token);
            let codec = ProstCodec::<Q, A>::default();
            let answer = grpc.streaming(request, PathAndQuery::from_static(path), codec).await;
            Ok(answer.map_err(|status| self.refused(&status))?.into_inner())
        };
        match tokio::time::timeout(ATTEMPT, work).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Silent { what: "no answer in time".to_owned(), sent: false }),
        }
    }

    fn grpc(&self, index: usize) -> Grpc<Channel> {
        Grpc::new(self.members[index].1.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// Converts the status that ended a stream. If a new token may help, the next call gets one.
    fn refused(&self, status: &Status) -> CallError {
        if auth_expired(status) {
            self.drop_token();
        }
        call_error(status)
    }

    fn drop_token(&self) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns the authentication token, if there is a user.
    async fn token(&self, index: usize) -> Result<Option<MetadataValue<Ascii>>, CallError> {
        let Some((name, password)) = &self.user else { return Ok(None) };
        if let Some(token) = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(Some(token));
        }
        let request = AuthenticateRequest { name: name.clone(), password: password.clone() };
        let answer: AuthenticateResponse = self
            .unary(index, "/etcdserverpb.Auth/Authenticate", request, None)
            .await
            .map_err(|s| call_error(&s))?;
        let odd =
            |_| CallError::Refused { code: Code::Internal, what: "the token is not valid text".to_owned() };
        let token: MetadataValue<Ascii> = answer.token.parse().map_err(odd)?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        Ok(Some(token))
    }

    /// Reads the status of each member: address, and its answer.
    pub async fn statuses(&self) -> Vec<(String, Result<proto::StatusResponse, CallError>)> {
        let asked = (0..self.members.len()).map(|index| async move {
            let path = "/etcdserverpb.Maintenance/Status";
            let answer = self.call_member(index, path, proto::Empty {}, ATTEMPT).await;
            (self.members[index].0.clone(), answer)
        });
        futures_util::future::join_all(asked).await
    }
}

fn with_metadata<T>(mut request: Request<T>, token: Option<MetadataValue<Ascii>>) -> Request<T> {
    // A member without a leader then answers at once, instead of waiting for one.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    request
}

/// Whether a new token may help, as in etcd's own client: it has expired, its member does not know it, or users or roles
/// have changed since it was issued (JWT tokens name the revision of these).
fn auth_expired(status: &Status) -> bool {
    const MESSAGES: [&str; 3] = ["invalid auth token", "revision of auth store is old", "user name is empty"];
    status.code() == Code::Unauthenticated || MESSAGES.iter().any(|text| status.message().contains(text))
}

/// Converts a gRPC status.
fn call_error(status: &Status) -> CallError {
    let what = match std::error::Error::source(status) {
        Some(source) => innermost(source),
        None => status.message().to_owned(),
    };
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            // Messages of etcd for requests that were certainly not executed.
            let undone = ["etcdserver: no leader", "etcdserver: server stopped"].contains(&status.message());
            CallError::Silent { what, sent: !undone && !is_unconnected(status) }
        }
        code => CallError::Refused { code, what },
    }
}

/// Whether there was no connection over which the request could have been sent.
fn is_unconnected(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
