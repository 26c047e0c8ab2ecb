//! Reads JSON bodies, with a limit of size and time.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::{App, error::ApiError};

/// How long a client may take to send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// A parsed JSON body.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = app.settings.max_body_bytes;
        let body = axum::body::to_bytes(request.into_body(), limit);
        let bytes = tokio::time::timeout(BODY_TIMEOUT, body)
            .await
            .map_err(|_| {
                ApiError::status(
                    StatusCode::REQUEST_TIMEOUT,
                    format!("The body did not arrive within {} seconds.", BODY_TIMEOUT.as_secs()),
                )
            })?
            .map_err(|e| match e.into_inner().downcast::<http_body_util::LengthLimitError>() {
                Ok(_) => ApiError::status(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("The body is larger than the limit of {limit} bytes."),
                ),
                Err(e) => ApiError::bad_request(format!("The body could not be read: {e}.")),
            })?;
        if std::str::from_utf8(&bytes).is_err() {
            return Err(ApiError::bad_request("The body is not UTF-8; send JSON in UTF-8."));
        }
        serde_json::from_slice(&bytes).map(Self).map_err(|e| {
            invalid_field::<T>(&bytes).unwrap_or_else(|| {
                ApiError::bad_request(format!("The body is not valid JSON for this request: {e}."))
            })
        })
    }
}

/// Maximum number of fields of a body that is searched for its invalid field, so that rejecting stays cheap.
const MAX_SEARCHED_FIELDS: usize = 64;
/// Maximum number of bytes of a body that is searched for its invalid field.
const MAX_SEARCHED_BYTES: usize = 64 << 10;

/// Returns an error about the field that makes a body invalid: without it, the body is valid or misses only this
/// field.
fn invalid_field<T: DeserializeOwned>(bytes: &[u8]) -> Option<ApiError> {
    if bytes.len() > MAX_SEARCHED_BYTES {
        return None;
    }
    let object: serde_json::Map<String, Json> = serde_json::from_slice(bytes).ok()?;
    if object.len() > MAX_SEARCHED_FIELDS {
        return None;
    }
    let read = |object: serde_json::Map<String, Json>| serde_json::from_value::<T>(Json::Object(object));
    let without = |field: &String| {
        let mut rest = object.clone();
        rest.remove(field);
        read(rest).err().map(|e| e.to_string())
    };
    // Without any required field, valid or not, the body misses this field. Therefore optional fields come first.
    let optional = object.keys().find(|field| without(field).is_none());
    let required = || {
        object.keys().find(|field| without(field).is_some_and(|e| e == format!("missing field `{field}`")))
    };
    let field = optional.or_else(required)?;
    let error = read(object.clone()).err()?;
    Some(ApiError::param(field, format!("`{field}` is not valid: {error}.")))
}
