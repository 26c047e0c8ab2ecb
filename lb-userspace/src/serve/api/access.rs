//! Access control: one row per route, and the check that every request passes.
//!
//! Input: the rows of [`super::table`], and the peer of the socket. Output: a router. Only its row says which right a
//! request needs; no handler and no query decides about it. Called by `serve`.
//!
//! Only `Control::write` handles dry runs, and checks the author's right once more. Every request that is not a read
//! runs in a task of its own: the server drops a handler whose caller leaves, and no change may stop between two
//! awaits for that.

use super::{ApiError, Control, Peer};
use axum::{
    Extension, RequestExt, Router,
    extract::{ConnectInfo, DefaultBodyLimit, FromRequestParts, Query, Request, State},
    handler::Handler,
    http::{HeaderMap, Method, Uri, request::Parts},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodFilter, MethodRouter},
};
use std::sync::Arc;

/// Request header with the token of a lock that the caller holds.
pub const LOCK_TOKEN: &str = "lb-lock-token";

/// Right that a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// None: the socket's file mode controls who may read.
    Read,
    /// Write access, or `dry_run`, which every reader may use: the handler's only change is [`Control::write`], which
    /// checks both again.
    DryRun,
    /// Write access, even for a dry run.
    Write,
}

/// A row of the route table: method, path, required right, and handler.
pub(super) struct Endpoint {
    #[cfg_attr(not(test), expect(dead_code, reason = "the handler has it too; only the tests read it"))]
    pub method: Method,
    pub path: &'static str,
    pub right: Right,
    handler: MethodRouter<Arc<Control>>,
}

impl Endpoint {
    /// Creates a row.
    pub fn new<H, T>(method: Method, path: &'static str, right: Right, handler: H) -> Self
    where
        H: Handler<T, Arc<Control>>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).expect("axum knows the methods of HTTP");
        Self { method, path, right, handler: MethodRouter::new().on(filter, handler) }
    }

    /// Sets the largest request body, in bytes.
    pub fn limit(mut self, bytes: usize) -> Self {
        self.handler = self.handler.layer(DefaultBodyLimit::max(bytes));
        self
    }
}

/// Builds the router of all rows.
pub(super) fn router(rows: Vec<Endpoint>) -> Router<Arc<Control>> {
    rows.into_iter().fold(Router::new(), |router, Endpoint { path, right, handler, .. }| {
        router.route(path, handler.route_layer(from_fn_with_state(right, authorize)))
    })
}

/// The user who asks for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    /// User name, for the history.
    pub name: String,
    may_write: bool,
    /// Token of the lock that the caller claims to hold.
    pub lock_token: Option<String>,
}

impl Author {
    /// The daemon itself.
    pub fn daemon() -> Self {
        Self { name: "lbd".to_owned(), may_write: true, lock_token: None }
    }

    /// Whether the author may make changes, not only dry runs.
    pub fn may_write(&self) -> bool {
        self.may_write
    }

    /// Returns an error unless the author may make changes.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.may_write {
            return Ok(());
        }
        Err(ApiError::forbidden(format!("user {} may read, but not make changes", self.name))
            .fix("use sudo, or join the group of the setting socket_group"))
    }
}

/// Passes a request on if its sender has the right that the route needs.
async fn authorize(State(right): State<Right>, mut request: Request, next: Next) -> Response {
    let peer = request.extract_parts::<ConnectInfo<Peer>>().await;
    let author = match peer {
        Ok(ConnectInfo(peer)) => {
            Author { name: peer.user, may_write: peer.may_write, lock_token: lock_token(request.headers()) }
        }
        Err(_) => return ApiError::forbidden("the peer of the connection is unknown").into_response(),
    };
    let is_allowed = match right {
        Right::Read => return next.run(request).await,
        Right::DryRun => author.may_write() || is_dry_run(request.uri()),
        Right::Write => author.may_write(),
    };
    if !is_allowed && let Err(refused) = author.check() {
        return refused.into_response();
    }
    request.extensions_mut().insert(author);
    // axum drops the handler when the client disconnects; a spawned task completes the change.
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "a request handler failed");
            ApiError::internal(format!("the request handler failed ({error}): see lbd's log")).into_response()
        }
    }
}

fn is_dry_run(uri: &Uri) -> bool {
    Query::<super::types::WriteQuery>::try_from_uri(uri).is_ok_and(|Query(query)| query.dry_run)
}

fn lock_token(headers: &HeaderMap) -> Option<String> {
    headers.get(LOCK_TOKEN)?.to_str().ok().map(str::to_owned)
}

/// Author of a request that may be a dry run; to be passed to [`Control::write`].
pub(super) struct Caller(pub Author);

/// Author of a request that has write access.
pub(super) struct Writer(pub Author);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let author = Extension::<Author>::from_request_parts(parts, state).await;
        let Extension(author) = author
            .map_err(|_| ApiError::forbidden("this route is read-only, but its handler makes changes"))?;
        Ok(Self(author))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Writer {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Caller(author) = Caller::from_request_parts(parts, state).await?;
        author.check()?;
        Ok(Self(author))
    }
}
