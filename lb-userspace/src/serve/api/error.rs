//! Errors of the API: a status, a code for programs, a message and a fix for people.

use super::{
    EngineError,
    types::{ErrorBody, ErrorInfo},
};
use crate::desired::{model::Invalid, store::StoreError};
use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};

/// A refused or failed request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Machine-readable code.
    pub code: &'static str,
    /// What is wrong, and where.
    pub message: String,
    /// What to do.
    pub fix: Option<String>,
    /// Individual findings, if there are several.
    pub details: Vec<String>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), fix: None, details: Vec::new() }
    }

    /// 400: the request is malformed.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// 404: no such object.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 409: an object of this name exists.
    pub fn exists(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "exists", message)
    }

    /// 409: refused without `force`.
    pub fn needs_force(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "needs_force", message)
    }

    /// 409: another operation is in progress.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "busy", message)
    }

    /// 403: the user may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// 500: stored, but not written to the maps.
    pub fn not_applied(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "not_applied", message)
    }

    /// 500: an internal error of lbd.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// 422: the desired state would break these rules.
    pub fn invalid(rules: &[Invalid]) -> Self {
        let mut details: Vec<String> = rules.iter().map(ToString::to_string).collect();
        let message = if details.len() == 1 {
            details.remove(0)
        } else {
            format!("{} rules are violated", rules.len())
        };
        Self { details, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message) }
    }

    /// JSON of the error, for an answer that no handler makes.
    pub fn into_json(self) -> String {
        serde_json::to_string(&self.into_body()).expect("strings are valid JSON")
    }

    fn into_body(self) -> ErrorBody {
        let Self { code, message, fix, details, .. } = self;
        ErrorBody { error: ErrorInfo { code: code.to_owned(), message, fix, details } }
    }

    /// Adds what to do about the error.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let (status, code) = match error {
            StoreError::Conflict { .. } => (StatusCode::CONFLICT, "conflict"),
            StoreError::NoRevision { .. } | StoreError::NoMember { .. } => {
                (StatusCode::NOT_FOUND, "not_found")
            }
            StoreError::MemberLives { .. } => (StatusCode::CONFLICT, "live"),
            StoreError::CutOff { .. } | StoreError::Unreachable { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "cut_off")
            }
            StoreError::Unsure { .. } => (StatusCode::SERVICE_UNAVAILABLE, "unsure"),
            StoreError::Stranger { .. } | StoreError::SetBack { .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, "other_data")
            }
            StoreError::Moved { .. } | StoreError::Moving { .. } => (StatusCode::CONFLICT, "moved"),
            StoreError::NotMoved { .. } => (StatusCode::CONFLICT, "not_moved"),
            StoreError::NothingToAccept { .. } => (StatusCode::CONFLICT, "nothing_to_accept"),
            StoreError::NotEmpty { .. } => (StatusCode::CONFLICT, "not_empty"),
            StoreError::Held { .. } => (StatusCode::CONFLICT, "held"),
            StoreError::NotHeld { .. } => (StatusCode::CONFLICT, "not_held"),
            StoreError::Backup { .. } | StoreError::Newer { .. } | StoreError::Address { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid")
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "store"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Refused { what } => Self::new(StatusCode::UNPROCESSABLE_ENTITY, "no_room", what),
            EngineError::Failed { what } => Self::new(StatusCode::INTERNAL_SERVER_ERROR, "dataplane", what),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.into_body())).into_response()
    }
}
