//! Leases: the values that this host publishes last as long as its lease, a lock as long as its own lease.

use super::{
    Arc, CallError, Claim, EtcdInner, Lock, LockValue, SortOrder, StoreError, TXN,
    client::ATTEMPT,
    end_of,
    keys::{delete, get, is_absent, is_leased, put},
    locked,
    proto::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseId, LeaseRevokeResponse, LeaseTtlResponse, OpResponse,
        TxnRequest, TxnResponse,
    },
};
use crate::clock;
use std::{collections::BTreeMap, time::Duration};

const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
const TIME_TO_LIVE: &str = "/etcdserverpb.Lease/LeaseTimeToLive";

/// Time of this host's lease: others see the values of a host that has died for this long.
const TTL: Duration = Duration::from_secs(10);
/// Shortest time of a lock's lease: it must outlast an election of etcd.
const LOCK_TTL: Duration = Duration::from_secs(5);
/// Timeout of a call.
pub(super) const CALL: Duration = Duration::from_secs(4);

/// Keeps the lease and publishes values, until the store is dropped; the lease ends then, or soon after.
pub(super) async fn run(inner: Arc<EtcdInner>) {
    let mut link = inner.link.subscribe();
    loop {
        if link.wait_for(|link| link.connected).await.is_err() {
            return;
        }
        let error = match inner.session().await {
            Ok(()) => continue,
            Err(error) => error,
        };
        tracing::debug!(%error, "renewing the lease of this host's values failed; requesting a new one");
        tokio::time::sleep(TTL / 10).await;
    }
}

impl EtcdInner {
    pub(super) async fn grant(&self, ttl: Duration) -> Result<i64, CallError> {
        let request = LeaseGrantRequest { ttl: ttl.as_secs().max(1) as i64, id: 0 };
        let answer: LeaseGrantResponse = self.client.call(GRANT, &request, CALL).await?;
        Ok(answer.id)
    }

    /// Renews a lease; false if it no longer exists.
    pub(super) async fn renew(&self, id: i64) -> Result<bool, CallError> {
        let mut stream = self.client.stream::<_, LeaseTtlResponse>(KEEP_ALIVE, LeaseId { id }).await?;
        let silent = |what: String| CallError::Silent { what, sent: true };
        match tokio::time::timeout(ATTEMPT, stream.message()).await {
            Ok(Ok(Some(answer))) => Ok(answer.ttl > 0),
            Ok(Ok(None)) => Err(silent("the stream ended".to_owned())),
            Ok(Err(status)) => Err(silent(status.message().to_owned())),
            Err(_) => Err(silent("no answer in time".to_owned())),
        }
    }

    /// Runs one lease: claims the name, publishes changed values and renews it.
    async fn session(&self) -> Result<(), CallError> {
        let lease = self.grant(TTL).await?;
        let mut sent: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut due = tokio::time::Instant::now() + TTL / 3;
        let (mut failures, mut is_claimed, mut member) = (0, false, None);
        loop {
            let has_joined = locked(&self.joined).is_some();
            let may_publish = is_claimed || self.claim_name(lease).await?;
            is_claimed = may_publish && has_joined;
            let wanted = if may_publish {
                self.send_member(&mut member).await?;
                locked(&self.published).clone()
            } else {
                due = due.min(tokio::time::Instant::now() + TTL / 10);
                BTreeMap::new()
            };
            let mut ops = Vec::new();
            for (key, value) in wanted.iter().filter(|(key, value)| sent.get(*key) != Some(value)) {
                ops.push(put(self.keys.key(&format!("leased/{key}")), value.clone(), lease));
            }
            for key in sent.keys().filter(|key| !wanted.contains_key(*key)) {
                ops.push(delete(self.keys.key(&format!("leased/{key}")), Vec::new()));
            }
            for ops in ops.chunks(100) {
                let request = TxnRequest { success: ops.to_vec(), ..TxnRequest::default() };
                let _: TxnResponse = self.client.call(TXN, &request, CALL).await?;
            }
            sent = wanted;
            tokio::select! {
                () = self.published_changed.notified() => {}
                () = tokio::time::sleep_until(due) => {
                    due = tokio::time::Instant::now() + TTL / 3;
                    let member = self.client.member().to_owned();
                    match self.renew(lease).await {
                        Ok(true) => failures = 0,
                        Ok(false) => return Ok(()),
                        Err(error) => {
                            failures += 1;
                            self.client.prefer_another(&member);
                            if failures > 2 {
                                return Err(error);
                            }
                            due = tokio::time::Instant::now() + TTL / 10;
                        }
                    }
                }
            }
        }
    }

    /// Returns the time left of a lease; none if it is gone.
    async fn time_left(&self, id: i64) -> Result<Option<u64>, StoreError> {
        let answer: LeaseTtlResponse =
            self.client.call(TIME_TO_LIVE, &LeaseId { id }, CALL).await.map_err(|e| self.call_failed(e))?;
        Ok((answer.ttl > 0).then_some(answer.ttl as u64))
    }

    pub(super) async fn revoke(&self, id: i64) -> Result<(), CallError> {
        let _: LeaseRevokeResponse = self.client.call(REVOKE, &LeaseId { id }, CALL).await?;
        Ok(())
    }
}

/// Takes a lock, or renews it.
pub(super) async fn lock(inner: &EtcdInner, claim: Claim) -> Result<Lock, StoreError> {
    inner.ensure_connected()?;
    let key = inner.keys.key(&format!("locks/{}", claim.name));
    if let Some(token) = &claim.token {
        let gone = || StoreError::NotHeld { name: claim.name.clone() };
        let lease = i64::from_str_radix(token, 16).map_err(|_| gone())?;
        let found = inner.range(key, Vec::new(), SortOrder::None, 1).await;
        let found = found.map_err(|e| inner.call_failed(e))?;
        let kv = found.kvs.first().filter(|kv| kv.lease == lease).ok_or_else(gone)?;
        let held: LockValue = serde_json::from_slice(&kv.value).map_err(|e| inner.corrupt(e))?;
        if !inner.renew(lease).await.map_err(|e| inner.call_failed(e))? {
            return Err(gone());
        }
        let left_s = inner.time_left(lease).await?.ok_or_else(gone)?;
        return Ok(lock_from(&claim.name, held, left_s, Some(token.clone())));
    }
    let lease = inner.grant(claim.ttl.max(LOCK_TTL)).await.map_err(|e| inner.call_failed(e))?;
    let held = LockValue { holder: claim.holder, reason: claim.reason, since_ms: clock::unix_ms() };
    let value = serde_json::to_vec(&held).map_err(|e| inner.failed(e))?;
    let request = TxnRequest {
        compare: vec![is_absent(key.clone())],
        success: vec![put(key.clone(), value, lease)],
        failure: vec![get(key)],
    };
    let answer: Result<TxnResponse, CallError> = inner.client.call(TXN, &request, CALL).await;
    let there = match &answer {
        Ok(answer) if answer.succeeded => None,
        Ok(answer) => Some(match answer.responses.first().and_then(|r| r.op.as_ref()) {
            Some(OpResponse::Range(range)) => range.kvs.first().cloned(),
            _ => None,
        }),
        Err(_) => Some(None),
    };
    // A request that was executed without an answer, and sent again, finds the lock held by its own lease.
    let is_ours = there.as_ref().is_none_or(|kv| kv.as_ref().is_some_and(|kv| kv.lease == lease));
    if is_ours {
        let left_s = claim.ttl.max(LOCK_TTL).as_secs();
        return Ok(lock_from(&claim.name, held, left_s, Some(format!("{lease:x}"))));
    }
    // Revoking the lease frees the lock, even if the request was executed.
    let _ = inner.revoke(lease).await;
    if let Err(error) = answer {
        return Err(inner.call_failed(error));
    }
    let other = there.flatten();
    let left_s = match &other {
        Some(kv) => inner.time_left(kv.lease).await?.unwrap_or(0),
        None => 0,
    };
    let other: Option<LockValue> = other.and_then(|kv| serde_json::from_slice(&kv.value).ok());
    let (holder, reason) =
        other.map_or_else(|| ("an unknown holder".into(), String::new()), |h| (h.holder, h.reason));
    Err(StoreError::Held { name: claim.name, holder, reason, left_s })
}

/// Releases a lock.
pub(super) async fn unlock(inner: &EtcdInner, name: String, token: Option<String>) -> Result<(), StoreError> {
    inner.ensure_connected()?;
    let key = inner.keys.key(&format!("locks/{name}"));
    let compare = match &token {
        None => Vec::new(),
        Some(token) => match i64::from_str_radix(token, 16) {
            Ok(lease) => vec![is_leased(key.clone(), lease)],
            Err(_) => return Err(StoreError::NotHeld { name }),
        },
    };
    let request = TxnRequest { compare, success: vec![delete(key, Vec::new())], failure: Vec::new() };
    let answer: TxnResponse =
        inner.client.call(TXN, &request, CALL).await.map_err(|e| inner.call_failed(e))?;
    let deleted = match answer.responses.first().and_then(|r| r.op.as_ref()) {
        Some(OpResponse::Delete(delete)) => delete.deleted,
        _ => 0,
    };
    if !answer.succeeded || deleted == 0 {
        return Err(StoreError::NotHeld { name });
    }
    if let Some(lease) = token.and_then(|token| i64::from_str_radix(&token, 16).ok()) {
        let _ = inner.revoke(lease).await;
    }
    Ok(())
}

/// Lists the locks that are held.
pub(super) async fn locks(inner: &EtcdInner) -> Result<Vec<Lock>, StoreError> {
    inner.ensure_connected()?;
    let begin = inner.keys.key("locks/");
    let found = inner.range(begin.clone(), end_of(&begin), SortOrder::Ascend, 0).await;
    let found = found.map_err(|e| inner.call_failed(e))?;
    let mut locks = Vec::new();
    for kv in found.kvs {
        let name = inner.keys.after("locks/", &kv.key).unwrap_or_default().to_owned();
        let held: LockValue = serde_json::from_slice(&kv.value).map_err(|e| inner.corrupt(e))?;
        if let Some(left_s) = inner.time_left(kv.lease).await? {
            locks.push(lock_from(&name, held, left_s, None));
        }
    }
    Ok(locks)
}

fn lock_from(name: &str, held: LockValue, left_s: u64, token: Option<String>) -> Lock {
    let LockValue { holder, reason, since_ms } = held;
    Lock { name: name.to_owned(), holder, reason, since_ms, left_s, token }
}
