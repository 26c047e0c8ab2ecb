//! Writes of this host: commits, imports, and the snapshots after which old revisions can be removed.
//!
//! A commit that is sent twice counts once: if a member dies with the request, the next member is asked; the head has
//! changed then, and the nonce in the record shows whose commit that was. Only when no member answers is the outcome
//! unknown. The nonce in the head also tells histories of the same length apart, and a head that is older than, or
//! another than, what a host has seen is not followed.

use super::{
    Arc, CallError, Commit, EtcdInner, KnownRevision, Revision, StoreError, Stored, TXN, end_of,
    keys::{Head, RevisionRecord, StoredSnapshot, ValueParts, delete, get, is_absent, is_value, put},
    locked,
    proto::{Compare, OpResponse, RequestOp, SortOrder, TxnRequest, TxnResponse},
};
use crate::desired::store::{delta, new_id};
use std::time::{Duration, UNIX_EPOCH};

/// Timeout of a commit, including retries on other members.
const WRITE: Duration = Duration::from_secs(6);
/// Largest value in one request; etcd's own limit is 1.5 MiB.
const PIECE: usize = 512 * 1024;
/// Requests in one transaction; etcd's own limit is 128.
const OPS: usize = 100;
/// Smallest size of the changes since the last snapshot for which a new one is worth its cost.
const SNAPSHOT_AFTER: usize = 64 * 1024;

/// Makes a commit the newest revision.
pub(super) async fn commit(inner: &Arc<EtcdInner>, commit: Commit) -> Result<Stored, StoreError> {
    inner.ensure_connected()?;
    let _turn = inner.writing.lock().await;
    let before = inner.known();
    let found = before.stored.revision.number;
    if found != commit.expected {
        return Err(StoreError::Conflict { expected: commit.expected, found });
    }
    let number = found + 1;
    let time_ms = commit.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let Commit { author, message, summary, desired, .. } = commit;
    let revision = Revision { number, author, time_ms, message, summary };
    let known = KnownRevision { stored: Stored { revision, desired }, nonce: new_id() };
    let (value, large) = inner.encode(&before, &known)?;
    if let Some((parts, bytes)) = &large {
        // No host reads the parts before the commit refers to them.
        inner.write_parts(parts, bytes, &[]).await.map_err(|e| inner.call_failed(e))?;
    }
    let size = value.len() + large.as_ref().map_or(0, |(_, bytes)| bytes.len());
    match inner.swap(&before, &known, value).await {
        Ok(()) => {
            inner.advance(vec![known.clone()], false);
            locked(&inner.weights).1 += size;
            tokio::spawn(tidy(inner.clone()));
            Ok(known.stored)
        }
        Err(error) => {
            if let (Some((parts, _)), false) = (&large, matches!(error, StoreError::Unsure { .. })) {
                let begin = inner.keys.key(&format!("parts/{}/", parts.nonce));
                let request =
                    TxnRequest { success: vec![delete(begin.clone(), end_of(&begin))], ..Default::default() };
                let _: Result<TxnResponse, _> = inner.client.call(TXN, &request, super::READ).await;
            }
            Err(error)
        }
    }
}

/// Fills an empty store.
pub(super) async fn import(
    inner: &Arc<EtcdInner>,
    id: Option<String>,
    all: Vec<Stored>,
) -> Result<(), StoreError> {
    inner.ensure_connected()?;
    let _turn = inner.writing.lock().await;
    let count = inner.known().stored.revision.number;
    if count > 0 {
        return Err(StoreError::NotEmpty { store: inner.place.clone(), count });
    }
    let last = inner
        .fill(id, all.into_iter().map(|stored| KnownRevision { stored, nonce: new_id() }).collect())
        .await?;
    inner.advance(vec![last], false);
    Ok(())
}

impl EtcdInner {
    /// Fills a store that has no head, and returns the newest revision.
    pub(super) async fn fill(
        &self,
        id: Option<String>,
        all: Vec<KnownRevision>,
    ) -> Result<KnownRevision, StoreError> {
        let inner = self;
        // No host reads the rest until the head is written; remains of an interrupted import are removed first.
        let empty = [is_absent(inner.keys.key("head"))];
        let remains = ["revisions/", "snapshots/", "parts/"].map(|name| {
            let begin = inner.keys.key(name);
            delete(begin.clone(), end_of(&begin))
        });
        inner.guarded(&empty, remains.into()).await?;
        let mut before = KnownRevision::zero();
        let (mut ops, mut size) = (Vec::new(), 0);
        for known in all {
            let number = known.stored.revision.number;
            let (value, large) = inner.encode(&before, &known)?;
            if let Some((parts, bytes)) = &large {
                inner.write_parts(parts, bytes, &empty).await.map_err(|e| inner.call_failed(e))?;
            }
            if number != before.stored.revision.number + 1 {
                // The previous revision is unknown, so the history begins with this state.
                ops.push(inner.snapshot(&known, &empty).await?);
            }
            size += value.len();
            ops.push(put(inner.keys.revision(number), value, 0));
            if ops.len() + 2 >= OPS || size > PIECE {
                inner.guarded(&empty, std::mem::take(&mut ops)).await?;
                size = 0;
            }
            before = known;
        }
        if let Some(id) = id {
            let identity = super::StoreIdentity { format: super::keys::FORMAT, id: id.clone() };
            let value = serde_json::to_vec(&identity).map_err(|e| inner.failed(e))?;
            ops.push(put(inner.keys.key("store"), value, 0));
            *locked(&inner.id) = Some(id);
        }
        if before.stored.revision.number > 0 {
            ops.push(put(inner.keys.key("head"), before.head().to_string().into_bytes(), 0));
        }
        inner.guarded(&empty, ops).await?;
        Ok(before)
    }
}

/// After a commit: takes a snapshot if it is due, and removes old revisions.
async fn tidy(inner: Arc<EtcdInner>) {
    // Another task is doing it already.
    let Ok(_turn) = inner.tidying.try_lock() else { return };
    let known = inner.known();
    let (snapshot, since) = *locked(&inner.weights);
    if since >= snapshot.max(SNAPSHOT_AFTER) {
        let size = since;
        match inner.snapshot(&known, &[]).await {
            Ok(op) => {
                if let Err(error) = inner.guarded(&[], vec![op]).await {
                    return tracing::warn!(%error, "cannot write a snapshot of the store's state");
                }
                tracing::debug!(
                    revision = known.stored.revision.number,
                    changes_bytes = size,
                    "snapshot taken"
                );
            }
            Err(error) => return tracing::warn!(%error, "cannot write a snapshot of the store's state"),
        }
    }
    if let Err(error) = inner.prune(known.stored.revision.number).await {
        tracing::warn!(%error, "cannot remove old revisions from the store");
    }
}

impl EtcdInner {
    /// Encodes a revision's record, with a large difference apart from it.
    fn encode(
        &self,
        before: &KnownRevision,
        known: &KnownRevision,
    ) -> Result<(Vec<u8>, Option<(ValueParts, Vec<u8>)>), StoreError> {
        let (revision, old, new) = (&known.stored.revision, &before.stored.desired, &known.stored.desired);
        let delta = delta::diff(old, new).map_err(|e| self.failed(e))?;
        let mut record = RevisionRecord {
            author: revision.author.clone(),
            time_ms: revision.time_ms,
            message: revision.message.clone(),
            summary: revision.summary.clone(),
            nonce: known.nonce.clone(),
            after: before.nonce.clone(),
            delta: None,
            parts: None,
        };
        let bytes = serde_json::to_vec(&delta).map_err(|e| self.failed(e))?;
        let mut large = None;
        if bytes.len() > PIECE {
            let count = bytes.len().div_ceil(PIECE) as u32;
            let parts = ValueParts { nonce: new_id(), count };
            record.parts = Some(parts.clone());
            large = Some((parts, bytes));
        } else {
            record.delta = Some(delta);
        }
        Ok((serde_json::to_vec(&record).map_err(|e| self.failed(e))?, large))
    }

    /// Compare-and-set of the head. Finds out whether etcd executed a request without answering.
    async fn swap(
        &self,
        before: &KnownRevision,
        known: &KnownRevision,
        value: Vec<u8>,
    ) -> Result<(), StoreError> {
        let number = known.stored.revision.number;
        let (head, revision, moved) =
            (self.keys.key("head"), self.keys.revision(number), self.keys.key("moved"));
        let identity = self.keys.key("store");
        let old = match before.stored.revision.number {
            0 => is_absent(head.clone()),
            _ => is_value(head.clone(), before.head().to_string().into_bytes()),
        };
        let id = locked(&self.id).clone().unwrap_or_default();
        let ours = super::StoreIdentity { format: super::keys::FORMAT, id: id.clone() };
        let ours = serde_json::to_vec(&ours).map_err(|e| self.failed(e))?;
        let request = TxnRequest {
            compare: vec![old, is_absent(moved.clone()), is_value(identity.clone(), ours)],
            success: vec![
                put(revision.clone(), value, 0),
                put(head.clone(), known.head().to_string().into_bytes(), 0),
            ],
            failure: vec![get(head), get(revision), get(moved), get(identity)],
        };
        // A request that is sent twice is executed once: the second finds the head changed, and the record with our nonce.
        let answer: TxnResponse = match self.client.call(TXN, &request, WRITE).await {
            Ok(answer) => answer,
            Err(CallError::Silent { what, sent: true }) => {
                return Err(StoreError::Unsure { store: self.place.clone(), what });
            }
            Err(error) => return Err(self.call_failed(error)),
        };
        if answer.succeeded {
            return Ok(());
        }
        let read = |i: usize| match answer.responses.get(i).and_then(|r| r.op.as_ref()) {
            Some(OpResponse::Range(range)) => range.kvs.first(),
            _ => None,
        };
        if let Some(kv) = read(1)
            && self.record(kv).is_ok_and(|(_, record)| record.nonce == known.nonce)
        {
            return Ok(());
        }
        if let Some(moved) = read(2) {
            return Err(super::retire::refusal(self, &moved.value));
        }
        let found = read(0).and_then(|kv| String::from_utf8_lossy(&kv.value).parse::<Head>().ok());
        let found = found.unwrap_or_default();
        if found == before.head() {
            let found =
                read(3).map_or("none".to_owned(), |kv| String::from_utf8_lossy(&kv.value).into_owned());
            return Err(StoreError::Stranger { store: self.place.clone(), found, expected: id });
        }
        // Read the present state, so that a retry is based on it.
        self.catch_up().await?;
        Err(StoreError::Conflict { expected: before.stored.revision.number, found: found.number })
    }

    /// Writes a value in parts, while the conditions hold.
    async fn write_parts(&self, parts: &ValueParts, bytes: &[u8], when: &[Compare]) -> Result<(), CallError> {
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let key = self.keys.key(&format!("parts/{}/{i:06}", parts.nonce));
            let (compare, success) = (when.to_vec(), vec![put(key, piece.to_vec(), 0)]);
            let request = TxnRequest { compare, success, failure: Vec::new() };
            let _: TxnResponse = self.client.call(TXN, &request, WRITE).await?;
        }
        Ok(())
    }

    /// Writes the parts of a snapshot; the returned operation publishes it.
    async fn snapshot(&self, known: &KnownRevision, when: &[Compare]) -> Result<RequestOp, StoreError> {
        let KnownRevision { stored: Stored { revision, desired }, nonce } = known.clone();
        let number = revision.number;
        let bytes =
            serde_json::to_vec(&StoredSnapshot { revision, nonce, desired }).map_err(|e| self.failed(e))?;
        let count = bytes.len().div_ceil(PIECE) as u32;
        let parts = ValueParts { nonce: format!("s{number:020}-{}", new_id()), count };
        self.write_parts(&parts, &bytes, when).await.map_err(|e| self.call_failed(e))?;
        *locked(&self.weights) = (bytes.len(), 0);
        Ok(put(self.keys.snapshot(number), serde_json::to_vec(&parts).map_err(|e| self.failed(e))?, 0))
    }

    /// Runs a transaction whose conditions must hold.
    pub(super) async fn guarded(&self, when: &[Compare], ops: Vec<RequestOp>) -> Result<(), StoreError> {
        let request = TxnRequest { compare: when.to_vec(), success: ops, failure: Vec::new() };
        let answer: TxnResponse =
            self.client.call(TXN, &request, WRITE).await.map_err(|e| self.call_failed(e))?;
        if !answer.succeeded {
            let count = self.catch_up().await.map(|_| self.known().stored.revision.number)?;
            return Err(StoreError::NotEmpty { store: self.place.clone(), count });
        }
        Ok(())
    }

    /// Removes revisions beyond those to keep, up to the last snapshot that precedes the kept ones.
    async fn prune(&self, newest: u64) -> Result<(), StoreError> {
        let oldest = self.oldest(newest);
        if oldest < 2 {
            return Ok(());
        }
        let (begin, end) = (self.keys.snapshot(0), self.keys.snapshot(oldest + 1));
        let found = self.range(begin.clone(), end, SortOrder::Descend, 1).await;
        let found = found.map_err(|e| self.call_failed(e))?;
        let Some(base) = found.kvs.first() else { return Ok(()) };
        let number: u64 =
            self.keys.after("snapshots/", &base.key).and_then(|n| n.parse().ok()).unwrap_or_default();
        let first = self.oldest_there().await?;
        if first == 0 || first >= number {
            return Ok(());
        }
        // Differences in separate parts are removed with their revisions.
        let records =
            self.range(self.keys.revision(0), self.keys.revision(number), SortOrder::Ascend, OPS).await;
        let records = records.map_err(|e| self.call_failed(e))?;
        let mut ops = Vec::new();
        for kv in &records.kvs {
            let (_, record) = self.record(kv)?;
            if let Some(parts) = record.parts {
                let begin = self.keys.key(&format!("parts/{}/", parts.nonce));
                ops.push(delete(begin.clone(), end_of(&begin)));
            }
        }
        let last = records.kvs.last().map_or_else(|| self.keys.revision(number), |kv| end_of(&kv.key));
        ops.push(delete(self.keys.revision(0), last.min(self.keys.revision(number))));
        ops.push(delete(begin, self.keys.snapshot(number)));
        ops.push(delete(self.keys.key("parts/s"), self.keys.key(&format!("parts/s{number:020}"))));
        self.guarded(&[], ops).await
    }
}
