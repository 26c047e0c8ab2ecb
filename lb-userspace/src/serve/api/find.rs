//! Finds what a request names, or says what it may have meant.

use super::ApiError;
use crate::desired::{
    config::nearest,
    model::{Name, Service},
    store::Stored,
};

/// Finds a desired service by name.
///
/// # Errors
/// 404, with the nearest known name.
pub(super) fn find_service<'a>(stored: &'a Stored, name: &Name) -> Result<&'a Service, ApiError> {
    stored
        .desired
        .services
        .get(name)
        .map(|s| &**s)
        .ok_or_else(|| no_service(name, stored.desired.services.keys()))
}

/// 404 for an unknown service, with the nearest known name.
pub(super) fn no_service<'a>(name: &Name, known: impl Iterator<Item = &'a Name>) -> ApiError {
    let error = ApiError::not_found(format!("there is no service {name}"));
    match nearest(name.as_str(), known.map(Name::as_str)) {
        Some(near) => error.fix(format!("did you mean {near}?")),
        None => error.fix("`lbctl service list` shows all"),
    }
}

/// 404 for an unknown backend, with the nearest known name.
pub(super) fn no_backend(service: &Name, backend: &Name, s: &Service) -> ApiError {
    let error = ApiError::not_found(format!("service {service} has no backend {backend}"));
    match nearest(backend.as_str(), s.backends.keys().map(Name::as_str)) {
        Some(near) => error.fix(format!("did you mean {near}?")),
        None => error.fix(format!("`lbctl backend list {service}` shows all")),
    }
}
