//! Takes the store out of use: while it is copied elsewhere, and for good.
//!
//! The key `moved` blocks the commits of all hosts. While the data are copied it is attached to a lease that this
//! lbd keeps alive, so that an lbd that dies meanwhile leaves a store that accepts changes again.

use super::{
    EtcdInner, Retire, StoreError, TXN,
    keys::{delete, get, is_absent, is_leased, put},
    locked,
    proto::{Compare, KeyValue, OpResponse, RequestOp, TxnRequest, TxnResponse},
};
use std::{sync::Arc, time::Duration};

/// Prefix of the value of `moved` while the data are copied. An address contains no blank.
const MOVING: &str = "moving to ";
/// Time for which the mark outlives the lbd that copies.
const MOVING_TTL: Duration = Duration::from_secs(15);
/// Timeout of a request, including retries on other members.
const CALL: Duration = Duration::from_secs(6);

/// Error for commits while `moved` has this value.
pub(super) fn refusal(inner: &EtcdInner, value: &[u8]) -> StoreError {
    let (store, text) = (inner.place.clone(), String::from_utf8_lossy(value));
    match text.strip_prefix(MOVING) {
        Some(to) => StoreError::Moving { store, to: to.to_owned() },
        None => StoreError::Moved { store, to: text.into_owned() },
    }
}

/// Implements [`super::Store::retire`].
pub(super) async fn retire(inner: &Arc<EtcdInner>, how: Retire) -> Result<(), StoreError> {
    inner.ensure_connected()?;
    match how {
        Retire::Moving(to) => begin(inner, &to).await,
        Retire::Moved(to) => {
            finish(inner, to.clone()).await?;
            inner.set_moved(Some(to.as_bytes()));
            Ok(())
        }
        Retire::Back => {
            undo(inner).await?;
            inner.set_moved(None);
            Ok(())
        }
    }
}

/// Runs a transaction on the key `moved`; returns the present value if the condition did not hold.
async fn try_change(
    inner: &EtcdInner,
    when: Compare,
    change: RequestOp,
) -> Result<Result<(), KeyValue>, StoreError> {
    let key = inner.keys.key("moved");
    let request = TxnRequest { compare: vec![when], success: vec![change], failure: vec![get(key)] };
    let answer: TxnResponse =
        inner.client.call(TXN, &request, CALL).await.map_err(|e| inner.call_failed(e))?;
    if answer.succeeded {
        return Ok(Ok(()));
    }
    let found = match answer.responses.first().and_then(|r| r.op.as_ref()) {
        Some(OpResponse::Range(range)) => range.kvs.first().cloned(),
        _ => None,
    };
    Ok(Err(found.unwrap_or_default()))
}

async fn begin(inner: &Arc<EtcdInner>, to: &str) -> Result<(), StoreError> {
    let lease = inner.grant(MOVING_TTL).await.map_err(|e| inner.call_failed(e))?;
    let key = inner.keys.key("moved");
    let mark = put(key.clone(), format!("{MOVING}{to}").into_bytes(), lease);
    let begun = async {
        match try_change(inner, is_absent(key), mark).await? {
            // A request that was executed without an answer, and sent again, finds the mark under its own lease.
            Err(found) if found.lease != lease => return Err(refusal(inner, &found.value)),
            Ok(()) | Err(_) => {}
        }
        // No commit can follow the mark; read those that precede it.
        inner.catch_up().await.map(drop)
    };
    let begun = begun.await;
    if begun.is_err() {
        // Revoking the lease removes the mark.
        let _ = inner.revoke(lease).await;
        return begun;
    }
    *locked(&inner.moving) = Some(lease);
    tokio::spawn(keep_alive(Arc::downgrade(inner), lease));
    Ok(())
}

/// Renews the lease of the mark while this lbd copies.
async fn keep_alive(inner: std::sync::Weak<EtcdInner>, lease: i64) {
    loop {
        tokio::time::sleep(MOVING_TTL / 5).await;
        let Some(inner) = inner.upgrade().filter(|inner| *locked(&inner.moving) == Some(lease)) else {
            return;
        };
        // If it cannot be renewed, the lease expires, and the copy is refused in the end.
        if let Err(error) = inner.renew(lease).await {
            tracing::warn!(%error, "cannot renew the lease of the migration");
        }
    }
}

async fn finish(inner: &EtcdInner, to: String) -> Result<(), StoreError> {
    let key = inner.keys.key("moved");
    let lease = locked(&inner.moving).take();
    // Only if it is still under the lease of the copy; otherwise there may have been commits meanwhile.
    let when = lease.map_or_else(|| is_absent(key.clone()), |lease| is_leased(key.clone(), lease));
    let done = try_change(inner, when, put(key, to.clone().into_bytes(), 0)).await?;
    if let Some(lease) = lease {
        let _ = inner.revoke(lease).await;
    }
    match done {
        Ok(()) => Ok(()),
        // Executed without an answer, and sent again.
        Err(found) if found.value == to.as_bytes() => Ok(()),
        Err(found) if found.value.is_empty() => Err(inner.failed(
            "etcd did not answer for so long during the copy that other hosts may have made changes meanwhile: \
             the copy is incomplete, and this store stays in use",
        )),
        Err(found) => Err(refusal(inner, &found.value)),
    }
}

async fn undo(inner: &EtcdInner) -> Result<(), StoreError> {
    let key = inner.keys.key("moved");
    let lease = locked(&inner.moving).take();
    let request = TxnRequest { success: vec![delete(key, Vec::new())], ..TxnRequest::default() };
    let answer: TxnResponse =
        inner.client.call(TXN, &request, CALL).await.map_err(|e| inner.call_failed(e))?;
    if let Some(lease) = lease {
        let _ = inner.revoke(lease).await;
    }
    match answer.responses.first().and_then(|r| r.op.as_ref()) {
        Some(OpResponse::Delete(delete)) if delete.deleted > 0 => Ok(()),
        _ => Err(StoreError::NotMoved { store: inner.place.clone() }),
    }
}
