//! Follows commits of other hosts: reads missing revisions, watches for new ones, and notices when etcd is unreachable.
//!
//! After a watch that broke, or whose position etcd has compacted away, the head is read again; only missing revisions
//! are read, and if none is missing, nothing changes. A broken watch therefore causes no flapping.
//!
//! The watch only speeds things up: the head is also read each second (linearizable), which proves that etcd answers
//! and finds a watch that hangs on a member which is cut off. Members without a leader say so at once (`hasleader`).

use super::{
    Arc, EtcdInner, KnownRevision, READ, RECENT, StoreError, StoreIdentity, Stored, end_of,
    keys::{FORMAT, Head, RevisionRecord, StoredSnapshot, ValueParts, is_absent, put},
    locked,
    proto::{KeyValue, SortOrder, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse},
    watched::Seen,
};
use crate::{
    clock,
    desired::store::{MEMBERS, delta, new_id},
};
use rand::Rng;
use serde_json::Value;
use std::{borrow::Cow, collections::BTreeMap, convert::Infallible, time::Duration, time::Instant};

/// Interval at which the head is read in addition to the watch, as a sign of life.
const BEAT: Duration = Duration::from_secs(1);
/// Shortest and longest pause after a failed round. A jitter is added.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Revisions per read.
const PAGE: usize = 500;

/// Why a round ended.
pub(super) enum End {
    /// The watch must be opened again; etcd as a whole is not known to have failed.
    Again(String),
    /// etcd does not answer, or its answer is refused.
    Failed(StoreError),
}

impl From<StoreError> for End {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

/// Follows the store until it is dropped.
pub(super) async fn run(inner: Arc<EtcdInner>) {
    let mut pause = PAUSE.0;
    let mut tries = 0;
    loop {
        let began = Instant::now();
        match inner.round().await {
            Ok(never) => match never {},
            Err(End::Again(why)) => tracing::debug!(why, "opening the watch of the store again"),
            Err(End::Failed(error)) => inner.set_disconnected(&error),
        }
        if began.elapsed() > PAUSE.1 * 2 {
            (pause, tries) = (PAUSE.0, 0);
        }
        // No pause before the first try after a break.
        if tries > 0 {
            let jitter = pause.mul_f64(rand::rng().random_range(0.0..0.5));
            tokio::select! {
                () = tokio::time::sleep(pause + jitter) => {}
                () = inner.wake.notified() => {}
            }
            pause = (pause * 2).min(PAUSE.1);
        }
        tries += 1;
    }
}

impl EtcdInner {
    /// First read of a start: retries for a while, and falls back to the last known state.
    pub(super) async fn read_at_start(&self, has_state: bool) -> Result<(), StoreError> {
        let until = Instant::now() + if has_state { READ } else { super::FIRST };
        loop {
            let error = match self.read_all().await {
                Ok(_) => {
                    self.set_connected();
                    return Ok(());
                }
                Err(error) => error,
            };
            match error {
                StoreError::CutOff { what, store, .. } if Instant::now() >= until => {
                    if !has_state {
                        return Err(StoreError::Unreachable { store, what });
                    }
                    let error = self.cut_off(what);
                    tracing::error!(%error, "starting with the last known state");
                    self.set_disconnected(&error);
                    return Ok(());
                }
                StoreError::CutOff { .. } => tokio::time::sleep(PAUSE.0).await,
                StoreError::SetBack { .. } if has_state => {
                    tracing::error!(%error, "starting with the last known state");
                    self.set_disconnected(&error);
                    return Ok(());
                }
                error => return Err(error),
            }
        }
    }

    /// Reads everything that is new, and watches until an error.
    async fn round(&self) -> Result<Infallible, End> {
        let at = self.read_all().await?;
        let member = self.client.member().to_owned();
        let all = self.keys.key("");
        let (key, range_end) = (all.clone(), end_of(&all));
        let create = WatchCreateRequest { key, range_end, start_revision: at + 1 };
        let request = WatchRequest { create: Some(create) };
        let broken = |why: String| {
            self.client.prefer_another(&member);
            End::Again(why)
        };
        let stream = self.client.stream("/etcdserverpb.Watch/Watch", request).await;
        let mut stream = stream.map_err(|e| broken(e.to_string()))?;
        self.set_connected();
        let watch = async {
            let mut seen = Seen { at, records: BTreeMap::new() };
            loop {
                let message: Option<WatchResponse> =
                    stream.message().await.map_err(|s| broken(s.to_string()))?;
                let message = message.ok_or_else(|| broken("the watch ended".to_owned()))?;
                if message.canceled && message.compact_revision == 0 {
                    return Err(broken(message.cancel_reason));
                }
                self.apply_watch(message, &mut seen).await?;
            }
        };
        let beat = async {
            let mut behind = false;
            loop {
                tokio::time::sleep(BEAT).await;
                let before = self.known().stored.revision.number;
                let (_, head) = self.read_head().await?;
                self.link.send_modify(|link| link.contact_ms = clock::unix_ms());
                if self.client.member() != member {
                    return Err(End::Again(format!("{member} does not answer")));
                }
                let is_behind = !self.is_in_step(before, &head);
                if is_behind && behind {
                    return Err(End::Again("the watch lags".to_owned()));
                }
                behind = is_behind;
            }
        };
        tokio::select! {
            end = watch => end,
            end = beat => end,
        }
    }

    /// Reads the identity of the store and everything that is new. Returns etcd's revision of this reading.
    async fn read_all(&self) -> Result<i64, StoreError> {
        self.identify().await?;
        let at = self.catch_up().await?;
        let moved = self.range(self.keys.key("moved"), Vec::new(), SortOrder::None, 1).await;
        let moved = moved.map_err(|e| self.call_failed(e))?;
        self.set_moved(moved.kvs.first().map(|kv| &*kv.value));
        let begin = self.keys.key("leased/");
        let leased = self.range(begin.clone(), end_of(&begin), SortOrder::None, 0).await;
        let leased = leased.map_err(|e| self.call_failed(e))?;
        let mut values: BTreeMap<String, Vec<u8>> = leased
            .kvs
            .into_iter()
            .filter_map(|kv| Some((self.keys.after("leased/", &kv.key)?.to_owned(), kv.value)))
            .collect();
        let begin = self.keys.key(MEMBERS);
        let members = self.range(begin.clone(), end_of(&begin), SortOrder::None, 0).await;
        let members = members.map_err(|e| self.call_failed(e))?;
        values.extend(members.kvs.into_iter().filter_map(|kv| Some((self.keys.plain(&kv.key)?, kv.value))));
        if **self.host_values.borrow() != values {
            self.host_values.send_replace(Arc::new(values));
        }
        Ok(at)
    }

    /// Reads and checks the identity of the store; an empty prefix gets ours.
    async fn identify(&self) -> Result<(), StoreError> {
        let key = self.keys.key("store");
        let expected = locked(&self.id).clone();
        loop {
            let found = self.range(key.clone(), Vec::new(), SortOrder::None, 1).await;
            let found = found.map_err(|e| self.call_failed(e))?;
            if let Some(kv) = found.kvs.first() {
                let identity: StoreIdentity =
                    serde_json::from_slice(&kv.value).map_err(|e| self.corrupt(format!("store: {e}")))?;
                if identity.format > FORMAT {
                    let (file, found) = (self.place.clone(), identity.format);
                    return Err(StoreError::Newer { file, found, known: FORMAT });
                }
                if let Some(expected) = expected.filter(|id| *id != identity.id) {
                    let store = self.place.clone();
                    return Err(StoreError::Stranger { store, found: identity.id, expected });
                }
                *locked(&self.id) = Some(identity.id);
                return Ok(());
            }
            let seen = self.head.borrow().revision.number;
            if seen > 0 {
                if !self.is_accepted(&Head::default()) {
                    return Err(self.set_back(Head::default(), seen));
                }
                let known: Vec<KnownRevision> =
                    locked(&self.recent).range(1..).map(|(_, k)| k.clone()).collect();
                self.fill(expected.clone(), known).await?;
                tracing::warn!(
                    store = self.place,
                    revision = seen,
                    "filled an empty store with the data of this host"
                );
                continue;
            }
            let identity = StoreIdentity { format: FORMAT, id: expected.clone().unwrap_or_else(new_id) };
            let value = serde_json::to_vec(&identity).map_err(|e| self.failed(e))?;
            let compare = vec![is_absent(key.clone())];
            let success = vec![put(key.clone(), value, 0)];
            let request = TxnRequest { compare, success, failure: Vec::new() };
            let made: Result<TxnResponse, _> = self.client.call(super::TXN, &request, READ).await;
            made.map_err(|e| self.call_failed(e))?;
        }
    }

    /// Reads the newest revision's number and nonce, and etcd's own revision at that time.
    pub(super) async fn read_head(&self) -> Result<(i64, Head), StoreError> {
        let found = self.range(self.keys.key("head"), Vec::new(), SortOrder::None, 1).await;
        let found = found.map_err(|e| self.call_failed(e))?;
        let at = found.header.as_ref().map_or(0, |h| h.revision);
        let head = match found.kvs.first() {
            None => Head::default(),
            Some(kv) => self.parse_head(kv)?,
        };
        Ok((at, head))
    }

    pub(super) fn parse_head(&self, kv: &KeyValue) -> Result<Head, StoreError> {
        String::from_utf8_lossy(&kv.value).parse().map_err(|e: String| self.corrupt(e))
    }

    /// Applies all new revisions.
    pub(super) async fn catch_up(&self) -> Result<i64, StoreError> {
        let before = self.known().stored.revision.number;
        let (at, head) = self.read_head().await?;
        let known = self.known();
        let seen = known.stored.revision.number;
        // Meanwhile, another task may have learned of a newer revision: the answer must contain only what was known before
        // the request.
        if before <= head.number && head.number < seen {
            return Ok(at);
        }
        if head == known.head() {
            *locked(&self.accepted) = None;
            return Ok(at);
        }
        if seen > 0 && head.number >= seen && !self.is_same(&known, &head).await? {
            // A store that was migrated has the same revisions under other nonces.
            if let Some(there) = self.rebuild(seen).await?.filter(|there| there.stored == known.stored) {
                let mut recent = locked(&self.recent);
                recent.clear();
                recent.insert(seen, there);
            }
        }
        let known = self.known();
        let accept = self.is_accepted(&head);
        let set_back = || self.set_back(head.clone(), seen);
        let mut new = None;
        if head == known.head() {
            new = Some(Followed::New(Vec::new()));
        } else if head.number > seen {
            new = self.fold_all(&known, head.number).await?;
        } else if !accept {
            return Err(set_back());
        }
        let new = match new {
            Some(Followed::New(new)) => new,
            Some(Followed::OtherHistory) if !accept => return Err(set_back()),
            // So many revisions are missing that their records are gone.
            Some(Followed::OtherHistory) | None if head.number == 0 => vec![KnownRevision::zero()],
            Some(Followed::OtherHistory) | None => {
                let gone = || self.corrupt(format!("revision {} cannot be rebuilt", head.number));
                vec![self.rebuild(head.number).await?.ok_or_else(gone)?]
            }
        };
        // The number alone does not make it the revision that the head means, and that somebody may have accepted.
        if let Some(last) = new.last().filter(|last| last.head() != head) {
            let Head { number, nonce } = last.head();
            return Err(self.corrupt(format!("the head is {head}, and revision {number} is {nonce}")));
        }
        self.advance(new, accept);
        *locked(&self.accepted) = None;
        Ok(at)
    }

    /// Whether the store has a known revision under its number; assumed if its record is gone.
    async fn is_same(&self, known: &KnownRevision, head: &Head) -> Result<bool, StoreError> {
        let number = known.stored.revision.number;
        if number == head.number {
            return Ok(known.nonce == head.nonce);
        }
        let found = self.range(self.keys.revision(number), Vec::new(), SortOrder::None, 1).await;
        let found = found.map_err(|e| self.call_failed(e))?;
        match found.kvs.first() {
            None => Ok(true),
            Some(kv) => Ok(self.record(kv)?.1.nonce == known.nonce),
        }
    }

    /// Reads all revisions after a known one up to `to`; none if some of them are gone.
    async fn fold_all(&self, from: &KnownRevision, to: u64) -> Result<Option<Followed>, StoreError> {
        let mut last = from.clone();
        let mut all = Vec::new();
        while last.stored.revision.number < to {
            let next = last.stored.revision.number + 1;
            let (key, end) = (self.keys.revision(next), self.keys.revision(to + 1));
            let page = self.range(key, end, SortOrder::Ascend, PAGE).await;
            let page = page.map_err(|e| self.call_failed(e))?;
            if page.kvs.is_empty() {
                return Ok(None);
            }
            for kv in &page.kvs {
                let (number, record) = self.record(kv)?;
                if number != last.stored.revision.number + 1 {
                    return Ok(None);
                }
                if record.after != last.nonce && last.stored.revision.number > 0 {
                    return Ok(Some(Followed::OtherHistory));
                }
                last = self.fold(&last, number, &record, kv.value.len()).await?;
                all.push(last.clone());
            }
        }
        Ok(Some(Followed::New(all)))
    }

    /// Rebuilds the state of revision `number` from the preceding snapshot; none if records are gone.
    pub(super) async fn rebuild(&self, number: u64) -> Result<Option<KnownRevision>, StoreError> {
        let (begin, end) = (self.keys.snapshot(0), self.keys.snapshot(number + 1));
        let found = self.range(begin, end, SortOrder::Descend, 1).await.map_err(|e| self.call_failed(e))?;
        let base = match found.kvs.first() {
            None => KnownRevision::zero(),
            Some(kv) => {
                let parts: ValueParts =
                    serde_json::from_slice(&kv.value).map_err(|e| self.corrupt(format!("snapshot: {e}")))?;
                let bytes = self.parts(&parts).await?;
                let snapshot: StoredSnapshot =
                    serde_json::from_slice(&bytes).map_err(|e| self.corrupt(format!("snapshot: {e}")))?;
                *locked(&self.weights) = (bytes.len(), 0);
                let StoredSnapshot { revision, nonce, desired } = snapshot;
                KnownRevision { stored: Stored { revision, desired }, nonce }
            }
        };
        if base.stored.revision.number == number {
            return Ok(Some(base));
        }
        match self.fold_all(&base, number).await? {
            Some(Followed::New(mut all)) => Ok(all.pop()),
            Some(Followed::OtherHistory) => Err(self.corrupt("the revisions are not consecutive")),
            None => Ok(None),
        }
    }

    /// Parses the number and record of a revision.
    pub(super) fn record(&self, kv: &KeyValue) -> Result<(u64, RevisionRecord), StoreError> {
        let name = self.keys.after("revisions/", &kv.key).unwrap_or_default();
        let number = name.parse().map_err(|_| self.corrupt(format!("revision {name:?} is not a number")))?;
        let record =
            serde_json::from_slice(&kv.value).map_err(|e| self.corrupt(format!("revision {number}: {e}")))?;
        Ok((number, record))
    }

    /// Applies a revision to the previous state.
    pub(super) async fn fold(
        &self,
        before: &KnownRevision,
        number: u64,
        record: &RevisionRecord,
        bytes: usize,
    ) -> Result<KnownRevision, StoreError> {
        let corrupt = |e: serde_json::Error| self.corrupt(format!("revision {number}: {e}"));
        let (delta, large) = self.delta(number, record).await?;
        locked(&self.weights).1 += bytes + large;
        let desired = Arc::new(delta::apply(&before.stored.desired, &delta).map_err(corrupt)?);
        let stored = Stored { revision: record.revision(number), desired };
        Ok(KnownRevision { stored, nonce: record.nonce.clone() })
    }

    /// Returns a record's difference to the previous state, and the size of its parts in bytes.
    pub(super) async fn delta<'a>(
        &self,
        number: u64,
        record: &'a RevisionRecord,
    ) -> Result<(Cow<'a, Value>, usize), StoreError> {
        match (&record.delta, &record.parts) {
            (Some(delta), _) => Ok((Cow::Borrowed(delta), 0)),
            (None, Some(parts)) => {
                let bytes = self.parts(parts).await?;
                let delta = serde_json::from_slice(&bytes);
                let delta = delta.map_err(|e| self.corrupt(format!("revision {number}: {e}")))?;
                Ok((Cow::Owned(delta), bytes.len()))
            }
            (None, None) => Err(self.corrupt(format!("revision {number} has no contents"))),
        }
    }

    /// Reads a value that is stored in parts.
    async fn parts(&self, parts: &ValueParts) -> Result<Vec<u8>, StoreError> {
        let mut bytes = Vec::new();
        for i in 0..parts.count {
            let key = self.keys.key(&format!("parts/{}/{i:06}", parts.nonce));
            let found = self.range(key, Vec::new(), SortOrder::None, 1).await;
            let found = found.map_err(|e| self.call_failed(e))?;
            let part = found
                .kvs
                .first()
                .ok_or_else(|| self.corrupt(format!("part {i} of {} is missing", parts.nonce)));
            bytes.extend_from_slice(&part?.value);
        }
        Ok(bytes)
    }

    /// Adds newer revisions to the known ones; `replace` removes the known ones first.
    pub(super) fn advance(&self, new: Vec<KnownRevision>, replace: bool) {
        let mut recent = locked(&self.recent);
        if replace {
            recent.clear();
        }
        let before = recent.keys().next_back().copied();
        for known in new {
            recent.entry(known.stored.revision.number).or_insert(known);
        }
        while recent.len() > RECENT {
            recent.pop_first();
        }
        if let Some((number, known)) = recent.last_key_value()
            && Some(*number) != before
        {
            self.head.send_replace(known.stored.clone());
        }
    }
}

/// Revisions after a known one.
enum Followed {
    /// The revisions, in order.
    New(Vec<KnownRevision>),
    /// Other revisions than those that this host has seen.
    OtherHistory,
}
