//! API of locks, those that operations hold included.
//!
//! Input: requests, the store's locks, and the desired state. Output: JSON. Called by `routes`.

use super::{
    ApiError, Control,
    access::Writer,
    regions::{LOCK, operation_in_progress},
    routes::{Params, Reply, body, name},
};
use crate::{
    desired::{
        model::Name,
        store::{Claim, Lock},
    },
    printable,
};
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};

/// Shortest and longest TTL of a lock, in seconds.
const LOCK_TTL_S: (u64, u64) = (5, 86_400);

/// Body of `POST /v1/locks/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockRequest {
    /// Why the lock is taken.
    #[serde(deserialize_with = "printable::reason")]
    pub reason: String,
    /// Seconds after which the lock expires unless it is renewed.
    pub ttl_s: u64,
    /// Token of the lock, to renew it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// A lock, in `GET /v1/locks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldLock {
    /// The lock.
    #[serde(flatten)]
    pub lock: Lock,
    /// Whether a roll-out or a drain holds it. It does not expire: `left_s` is 0.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_operation: bool,
}

/// Query of `DELETE /v1/locks/NAME`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unlock {
    /// Token of the holder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Release the lock without its token.
    #[serde(default)]
    pub force: bool,
}

impl Control {
    /// All locks, those that operations hold included.
    async fn held_locks(&self) -> Result<Vec<HeldLock>, ApiError> {
        let operation = operation_in_progress(&*self.newest_desired().await?);
        let taken = self.store.locks().await?.into_iter().map(|lock| HeldLock { lock, is_operation: false });
        Ok(taken.chain(operation.map(|operation| operation.as_lock())).collect())
    }
}

pub(super) async fn locks(State(control): State<Arc<Control>>) -> Reply<Vec<HeldLock>> {
    Ok(Json(control.held_locks().await?))
}

pub(super) async fn lock(
    State(control): State<Arc<Control>>,
    Path(path): Path<String>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<Lock> {
    let (name, request): (Name, LockRequest) = (name(&path)?, body(&bytes)?);
    if !(LOCK_TTL_S.0..=LOCK_TTL_S.1).contains(&request.ttl_s) {
        let (least, most) = LOCK_TTL_S;
        return Err(ApiError::bad_request(format!(
            "ttl_s is {}, must be {least} to {most} seconds",
            request.ttl_s
        )));
    }
    let holder = control.lock_holder(&author);
    let ttl = Duration::from_secs(request.ttl_s);
    let is_new = request.token.is_none();
    let claim = Claim { name: name.to_string(), holder, reason: request.reason, ttl, token: request.token };
    let lock = control.store.lock(claim).await?;
    // Checked while holding the lock: a drain or roll-out commits its state under the same lock.
    if is_new
        && name.as_str() == LOCK
        && let Err(refused) = control.refuse_during_operation().await
    {
        control.store.unlock(name.to_string(), lock.token).await?;
        return Err(refused);
    }
    Ok(Json(lock))
}

pub(super) async fn unlock(
    State(control): State<Arc<Control>>,
    Path(path): Path<String>,
    Params(query): Params<Unlock>,
    Writer(author): Writer,
) -> Reply<Vec<HeldLock>> {
    let name: Name = name(&path)?;
    if query.token.is_none() && !query.force {
        return Err(ApiError::bad_request("give the token of the lock, or force"));
    }
    if query.force {
        tracing::warn!(author = author.name, %name, "a lock was released by force");
    }
    let held = control.held_locks().await?;
    let of_name: Vec<bool> =
        held.iter().filter(|l| l.lock.name == name.as_str()).map(|l| l.is_operation).collect();
    // A token of a lock that has expired, or force, does not end an operation.
    if !of_name.is_empty() && of_name.iter().all(|is_operation| *is_operation) {
        control.refuse_during_operation().await?;
    }
    control.store.unlock(name.to_string(), query.token.filter(|_| !query.force)).await?;
    Ok(Json(control.held_locks().await?))
}
