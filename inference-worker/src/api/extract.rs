//! Reading a request's JSON body within a size and a time.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequest, Request},
    http::StatusCode,
};
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use super::{App, error::ApiError};

/// How long a client may take to send its body.
const BODY_TIME: Duration = Duration::from_secs(30);

/// A parsed JSON body.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limit = app.settings.max_body_bytes;
        let read = axum::body::to_bytes(request.into_body(), limit);
        let bytes = tokio::time::timeout(BODY_TIME, read)
            .await
            .map_err(|_| {
                ApiError::status(
                    StatusCode::REQUEST_TIMEOUT,
                    format!("The body did not arrive within {} seconds.", BODY_TIME.as_secs()),
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
            wrong_field::<T>(&bytes).unwrap_or_else(|| {
                ApiError::bad_request(format!("The body is not the JSON that was expected: {e}."))
            })
        })
    }
}

/// Fields and bytes of a body that is searched for its wrong field: refusing must stay cheap.
const SEARCHED: (usize, usize) = (64, 64 << 10);

/// Names the field that keeps a body from being a `T`: the one without which it is one, or lacks just that.
fn wrong_field<T: DeserializeOwned>(bytes: &[u8]) -> Option<ApiError> {
    if bytes.len() > SEARCHED.1 {
        return None;
    }
    let object: serde_json::Map<String, Json> = serde_json::from_slice(bytes).ok()?;
    if object.len() > SEARCHED.0 {
        return None;
    }
    let read = |object: serde_json::Map<String, Json>| serde_json::from_value::<T>(Json::Object(object));
    let without = |field: &String| {
        let mut rest = object.clone();
        rest.remove(field);
        read(rest).err().map(|e| e.to_string())
    };
    // A field that is required, and wrong, is missing without it; so would be one that is required and right.
    let optional = object.keys().find(|field| without(field).is_none());
    let required = || {
        object.keys().find(|field| without(field).is_some_and(|e| e == format!("missing field `{field}`")))
    };
    let field = optional.or_else(required)?;
    let why = read(object.clone()).err()?;
    Some(ApiError::param(field, format!("`{field}` is not as expected: {why}.")))
}
