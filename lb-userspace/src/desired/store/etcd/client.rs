//! Calls to etcd's gRPC API: which member is asked, how long, and who we are.
//!
//! Input: members, TLS files, a user. Output: answers, or a [`CallError`] that says whether the request may
//! have reached etcd all the same. A member that does not answer within [`ATTEMPT`] or has no leader is left
//! for the next one. Called by the store beside it.

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

/// How long one member may take before the next is asked.
pub const ATTEMPT: Duration = Duration::from_millis(1_500);
/// How long making a connection may take.
const CONNECT: Duration = Duration::from_secs(1);
/// etcd ends connections that ping more often than every 5 s.
const PING: Duration = Duration::from_secs(10);
/// After all members were asked in vain, time to the next round.
const ROUND: Duration = Duration::from_millis(100);
/// Largest answer: a page of revisions, or the parts of a large one.
const MESSAGE_LIMIT: usize = 64 * 1024 * 1024;

/// Where etcd is, and who we are to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// `HOST:PORT` of each member.
    pub members: Vec<String>,
    /// Whether to speak TLS.
    pub tls: bool,
    /// File of the certificates that members' ones are checked against; the system's if none.
    pub ca: Option<PathBuf>,
    /// Files of our own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name, and file of the password.
    pub user: Option<(String, PathBuf)>,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// A file cannot be read.
    #[error("cannot read {file}: {source}")]
    File {
        /// File.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A member's address, or a certificate.
    #[error("cannot set up the connection to etcd at {member}: {what}")]
    Member {
        /// Address.
        member: String,
        /// What is wrong.
        what: String,
    },
}

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// No member answered in time.
    #[error("{what}")]
    Silent {
        /// What the last one said.
        what: String,
        /// Whether a member may have taken the request in.
        sent: bool,
    },
    /// A member answered, and said no.
    #[error("{what}")]
    Refused {
        /// gRPC's word for it.
        code: Code,
        /// What it said.
        what: String,
    },
}

/// Members of one etcd cluster.
pub struct Client {
    members: Vec<(String, Channel)>,
    /// The member that answered last.
    preferred: AtomicUsize,
    user: Option<(String, String)>,
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

fn read(file: &PathBuf) -> Result<Vec<u8>, AccessError> {
    std::fs::read(file).map_err(|source| AccessError::File { file: file.display().to_string(), source })
}

impl Client {
    /// Makes connections when they are first needed. Blocks for the files.
    ///
    /// # Errors
    /// A file cannot be read or is not what it should be, or an address is none.
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
        // So that the hosts spread over the members.
        members.shuffle(&mut rand::rng());
        Ok(Self { members, preferred: AtomicUsize::new(0), user, token: Mutex::new(None) })
    }

    /// The members' addresses, as one text.
    pub fn addresses(&self) -> String {
        let mut all: Vec<&str> = self.members.iter().map(|(address, _)| address.as_str()).collect();
        all.sort_unstable();
        all.join(", ")
    }

    /// The member that is asked first.
    pub fn member(&self) -> &str {
        &self.members[self.preferred.load(Ordering::Relaxed) % self.members.len()].0
    }

    /// Asks another member first from now on, if it is still this one that is.
    pub fn turn_away(&self, from: &str) {
        if self.member() == from {
            self.preferred.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Asks members in turn until one answers.
    ///
    /// # Errors
    /// None did before `within` was over, or one refused.
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
            match self.ask(index, path, request.clone(), left.min(ATTEMPT)).await {
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

    /// Asks one member, once (twice if it does not know us any more).
    pub async fn ask<Q, A>(
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
                    *self.token.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    let token = self.token(index).await?;
                    self.unary(index, path, request, token).await.map_err(|s| told(&s))
                }
                other => other.map_err(|s| told(&s)),
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
            grpc.ready().await.map_err(|e| told(&Status::from_error(e.into())))?;
            let request = with_metadata(Request::new(iter([request]).chain(pending())), token);
            let codec = ProstCodec::<Q, A>::default();
            let answer = grpc.streaming(request, PathAndQuery::from_static(path), codec).await;
            Ok(answer.map_err(|s| told(&s))?.into_inner())
        };
        match tokio::time::timeout(ATTEMPT, work).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Silent { what: "no answer in time".to_owned(), sent: false }),
        }
    }

    fn grpc(&self, index: usize) -> Grpc<Channel> {
        Grpc::new(self.members[index].1.clone()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// What shows who we are, if we are somebody.
    async fn token(&self, index: usize) -> Result<Option<MetadataValue<Ascii>>, CallError> {
        let Some((name, password)) = &self.user else { return Ok(None) };
        if let Some(token) = self.token.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(Some(token));
        }
        let request = AuthenticateRequest { name: name.clone(), password: password.clone() };
        let answer: AuthenticateResponse = self
            .unary(index, "/etcdserverpb.Auth/Authenticate", request, None)
            .await
            .map_err(|s| told(&s))?;
        let odd = |_| CallError::Refused { code: Code::Internal, what: "the token is no text".to_owned() };
        let token: MetadataValue<Ascii> = answer.token.parse().map_err(odd)?;
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.clone());
        Ok(Some(token))
    }

    /// Asks each member about itself: address, and its answer.
    pub async fn statuses(&self) -> Vec<(String, Result<proto::StatusResponse, CallError>)> {
        let asked = (0..self.members.len()).map(|index| async move {
            let path = "/etcdserverpb.Maintenance/Status";
            let answer = self.ask(index, path, proto::Empty {}, ATTEMPT).await;
            (self.members[index].0.clone(), answer)
        });
        futures_util::future::join_all(asked).await
    }
}

fn with_metadata<T>(mut request: Request<T>, token: Option<MetadataValue<Ascii>>) -> Request<T> {
    // A member without a leader says so at once, instead of waiting for one.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    request
}

fn auth_expired(status: &Status) -> bool {
    status.code() == Code::Unauthenticated || status.message().contains("invalid auth token")
}

/// A status as one of our errors.
fn told(status: &Status) -> CallError {
    let what = match std::error::Error::source(status) {
        Some(source) => innermost(source),
        None => status.message().to_owned(),
    };
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            // etcd's own words for what it certainly has not done.
            let undone = ["etcdserver: no leader", "etcdserver: server stopped"].contains(&status.message());
            CallError::Silent { what, sent: !undone && !is_unconnected(status) }
        }
        code => CallError::Refused { code, what },
    }
}

/// Whether there was no connection that a request could have gone over.
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
