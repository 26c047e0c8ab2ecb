//! Error responses in the format of OpenAI's API.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::json;

use crate::{
    chat_template::ChatTemplateError, engine::SubmitError, registry::RegistryError, tokenizer::TokenizerError,
};

/// An error response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status code.
    pub status: StatusCode,
    /// Message: what is wrong, where, and what to do.
    pub message: String,
    /// OpenAI's error type.
    pub kind: &'static str,
    /// The field with the error.
    pub param: Option<String>,
    /// OpenAI's error code.
    pub code: Option<&'static str>,
    /// Seconds after which the client should retry.
    pub retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), kind, param: None, code: None, retry_after: None }
    }

    /// Returns an error with status 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Returns an error with status 400 about a field.
    pub fn param(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad_request(message) }
    }

    /// Returns an error with status 400: prompt and output exceed the context length.
    pub fn context_length(message: impl Into<String>, param: &str) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::param(param, message) }
    }

    /// Returns an error with status 404 about a model.
    pub fn unknown_model(name: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("The model `{name}` does not exist."),
            )
        }
    }

    /// Returns an error with status 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// Returns an error of the client with any status.
    pub fn status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// Returns an error with status 401.
    pub fn unauthorized() -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "invalid_request_error",
                "Missing or wrong API key: send `Authorization: Bearer KEY`.",
            )
        }
    }

    /// Returns an error with status 403.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message)
    }

    /// Returns an error with status 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Returns an error with status 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after: Some(1), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message) }
    }

    /// Returns the body of the response.
    pub fn body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Stopped => Self::unavailable(error.to_string()),
            SubmitError::QueueFull { .. } | SubmitError::TooManyPromptTokens { .. } => Self {
                code: Some("rate_limit_exceeded"),
                retry_after: Some(1),
                ..Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    format!("Overloaded: {error}; retry later on a new connection."),
                )
            },
        }
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        Self::bad_request(error.to_string())
    }
}

impl From<ChatTemplateError> for ApiError {
    fn from(error: ChatTemplateError) -> Self {
        match error {
            ChatTemplateError::Messages(_) => Self::param("messages", error.to_string()),
            ChatTemplateError::Template(_) => Self::internal(error.to_string()),
        }
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> Self {
        let status = match &error {
            RegistryError::Unknown(_) => StatusCode::NOT_FOUND,
            RegistryError::Last(_) => StatusCode::CONFLICT,
            RegistryError::Name(_) => StatusCode::BAD_REQUEST,
            RegistryError::Load(_) => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self::status(status, error.to_string())
    }
}
