//! Who may do what: one row per route, and the gate that every request passes.
//!
//! Input: the rows of [`super::table`], and who is at the other end of the socket. Output: a router. What a request
//! needs stands in its row alone; no handler and no query decides about it. Called by `serve`.
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

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// To be known: the socket's mode lets in whoever may look.
    Read,
    /// To be a writer; or `dry_run`, which anybody may ask for: the handler's only change is [`Control::write`], which
    /// looks at both once more.
    Try,
    /// To be a writer, whatever the query says.
    Write,
}

/// A row: a method of a path, what it needs, and what answers it.
pub(super) struct Route {
    #[cfg_attr(not(test), expect(dead_code, reason = "the handler has it too; the tests go by it"))]
    pub method: Method,
    pub path: &'static str,
    pub right: Right,
    handler: MethodRouter<Arc<Control>>,
}

impl Route {
    /// A row.
    pub fn new<H, T>(method: Method, path: &'static str, right: Right, handler: H) -> Self
    where
        H: Handler<T, Arc<Control>>,
        T: 'static,
    {
        let filter = MethodFilter::try_from(method.clone()).expect("axum knows the methods of HTTP");
        Self { method, path, right, handler: MethodRouter::new().on(filter, handler) }
    }

    /// With bodies of up to so many bytes.
    pub fn limit(mut self, bytes: usize) -> Self {
        self.handler = self.handler.layer(DefaultBodyLimit::max(bytes));
        self
    }
}

/// A router of all rows.
pub(super) fn router(rows: Vec<Route>) -> Router<Arc<Control>> {
    rows.into_iter().fold(Router::new(), |router, Route { path, right, handler, .. }| {
        router.route(path, handler.route_layer(from_fn_with_state(right, gate)))
    })
}

/// Who asks for a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Author {
    /// For the history.
    pub name: String,
    may_write: bool,
    /// Token of a lock that the caller says to hold.
    pub lock_token: Option<String>,
}

impl Author {
    /// lbd itself.
    pub fn daemon() -> Self {
        Self { name: "lbd".to_owned(), may_write: true, lock_token: None }
    }

    /// Whether it may make changes, not only ask what they would be.
    pub fn may_write(&self) -> bool {
        self.may_write
    }

    /// An error unless it may make changes.
    pub fn check(&self) -> Result<(), ApiError> {
        if self.may_write {
            return Ok(());
        }
        Err(ApiError::forbidden(format!("user {} may look, but not change anything", self.name))
            .fix("use sudo, or join the group that socket_group names"))
    }
}

/// Lets a request through if its sender has the right that the route needs.
async fn gate(State(right): State<Right>, mut request: Request, next: Next) -> Response {
    let peer = request.extract_parts::<ConnectInfo<Peer>>().await;
    let author = match peer {
        Ok(ConnectInfo(peer)) => {
            Author { name: peer.user, may_write: peer.may_write, lock_token: lock_token(request.headers()) }
        }
        Err(_) => return ApiError::forbidden("the other end is not known").into_response(),
    };
    let is_let_in = match right {
        Right::Read => return next.run(request).await,
        Right::Try => author.may_write() || is_dry_run(request.uri()),
        Right::Write => author.may_write(),
    };
    if !is_let_in && let Err(refused) = author.check() {
        return refused.into_response();
    }
    request.extensions_mut().insert(author);
    // The server drops the work of callers that leave. What changes something goes on to its end.
    match tokio::spawn(next.run(request)).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "a request ended in the middle");
            ApiError::internal(format!("the request ended in the middle ({error}): see the log of lbd"))
                .into_response()
        }
    }
}

fn is_dry_run(uri: &Uri) -> bool {
    Query::<super::types::WriteQuery>::try_from_uri(uri).is_ok_and(|Query(query)| query.dry_run)
}

fn lock_token(headers: &HeaderMap) -> Option<String> {
    headers.get(LOCK_TOKEN)?.to_str().ok().map(str::to_owned)
}

/// Who asks, on a route that lets in whoever only tries: goes to [`Control::write`].
pub(super) struct Trier(pub Author);

/// Who asks for what is done at once. Nobody but a writer gets as far.
pub(super) struct Writer(pub Author);

impl<S: Send + Sync> FromRequestParts<S> for Trier {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let author = Extension::<Author>::from_request_parts(parts, state).await;
        let Extension(author) =
            author.map_err(|_| ApiError::forbidden("this route is for reading, and asks for a change"))?;
        Ok(Self(author))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Writer {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Trier(author) = Trier::from_request_parts(parts, state).await?;
        author.check()?;
        Ok(Self(author))
    }
}
