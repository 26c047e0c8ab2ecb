//! The store in an etcd cluster (3.4 and later), shared by the ingress hosts of all regions.
//!
//! etcd is the engine: it orders the commits (a compare-and-set on one key), stores them, and notifies every host.
//! This module defines the layout ([`keys`]), follows others' changes ([`follow`]), writes our own
//! ([`write`]), and keeps leases, names and locks ([`session`], [`member`]). The last known state is also saved on this host:
//! when etcd is unreachable, even at the start, the host uses that state, serves reads, refuses writes,
//! and reports it. Called by the daemon.

mod about;
pub mod client;
mod follow;
mod history;
mod keys;
mod link;
mod member;
pub mod proto;
mod retire;
mod session;
mod watched;
mod write;

pub use client::Access;

use self::{
    client::{CallError, EtcdClient},
    keys::{Head, Keys, KnownRevision, LockValue, StoreIdentity, end_of, range},
    proto::{RangeResponse, SortOrder},
};
use super::{
    About, Claim, Commit, HostValues, Local, Lock, Retire, Revision, ServiceHistory, Store, StoreError,
    StoreLink, StoreMember, Stored,
};
use crate::{clock, desired::model::Name};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";

/// Timeout of a read, including retries on other members.
const READ: Duration = Duration::from_secs(4);
/// Time for which a start without a last known state waits for etcd.
const FIRST: Duration = Duration::from_secs(15);
/// Revisions kept in memory: usually only the last ones are requested.
const RECENT: usize = 256;
/// Key of the last known state in the local store.
const SAVED_STATE: &str = "last-known-state";
/// Time for which changes are gathered before the last known state is saved.
const GATHER: Duration = Duration::from_millis(50);

/// Saved form of the last known state.
#[derive(Serialize, Deserialize)]
struct SavedState {
    id: String,
    nonce: String,
    revision: Revision,
    desired: Arc<crate::desired::model::Desired>,
    /// Prefix of the keys in etcd; earlier versions did not save it.
    #[serde(default)]
    prefix: Option<String>,
}

impl SavedState {
    /// Whether this is the state of the store that is opened now: not of another prefix, and not of data that an operator
    /// leaves behind by giving another id.
    fn is_of(&self, prefix: &str, id: Option<&str>) -> bool {
        self.prefix.as_ref().is_none_or(|saved| saved == prefix) && id.is_none_or(|id| id == self.id)
    }
}

/// Forgets the last known state: from now on this host follows another store, so it is not what the host serves.
pub async fn forget_saved_state(local: &dyn Local) -> Result<(), StoreError> {
    match local.load(SAVED_STATE).await? {
        Some(bytes) if !bytes.is_empty() => local.save(SAVED_STATE, Vec::new()).await,
        _ => Ok(()),
    }
}

/// Options for opening a store.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Addresses and credentials of etcd.
    pub access: Access,
    /// Prefix of all keys.
    pub prefix: String,
    /// Number of revisions that are kept.
    pub keep: u64,
    /// Id that the data must have; if none, the id seen last, or any.
    pub id: Option<String>,
}

/// Desired state in etcd.
pub struct EtcdStore {
    inner: Arc<EtcdInner>,
    /// Background tasks, which end when the store is dropped.
    _tasks: JoinSet<()>,
}

struct EtcdInner {
    client: EtcdClient,
    keys: Keys,
    /// Prefix of the keys.
    prefix: String,
    /// Addresses and prefix, for messages.
    place: String,
    keep: u64,
    /// Id that the data must have, once known.
    id: Mutex<Option<String>>,
    /// The latest revisions, the head last.
    recent: Mutex<BTreeMap<u64, KnownRevision>>,
    head: watch::Sender<Stored>,
    link: watch::Sender<StoreLink>,
    host_values: watch::Sender<HostValues>,
    /// Values that this host publishes.
    published: Mutex<BTreeMap<String, Vec<u8>>>,
    published_changed: Notify,
    /// This host's name and instance, once it has joined.
    joined: Mutex<Option<(String, String)>>,
    /// This host's name and member record.
    member: Mutex<Option<(String, Vec<u8>)>>,
    /// Head that the store was set back to, and that is ignored until an operator accepts it.
    set_back: Mutex<Option<Head>>,
    /// Head that an operator accepted; no other is accepted.
    accepted: Mutex<Option<Head>>,
    /// Lease of the mark that this lbd is copying the data elsewhere.
    moving: Mutex<Option<i64>>,
    /// Interrupts a pause of the follower.
    wake: Notify,
    /// Serialises the commits of this host.
    writing: tokio::sync::Mutex<()>,
    /// Size of the last snapshot that this host knows of, and of the changes since then.
    weights: Mutex<(usize, usize)>,
    tidying: tokio::sync::Mutex<()>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EtcdStore {
    /// Reads the newest state, or uses the last known one if etcd does not answer, and follows it from then on.
    ///
    /// # Errors
    /// The access is invalid, the data have another id or a later format, or etcd does not answer and
    /// there is no last known state.
    pub async fn open(options: EtcdOptions, local: Arc<dyn Local>) -> Result<Self, StoreError> {
        let EtcdOptions { access, prefix, keep, id } = options;
        let place = format!("{} (prefix {prefix})", access.members.join(", "));
        let failed = |what: String| StoreError::Failed { file: place.clone(), what };
        let client = tokio::task::spawn_blocking(move || EtcdClient::new(&access)).await;
        let client = client.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        let cache: Option<SavedState> = match local.load(SAVED_STATE).await? {
            None => None,
            Some(bytes) if bytes.is_empty() => None,
            Some(bytes) => match serde_json::from_slice(&bytes) {
                Ok(cache) => Some(cache),
                Err(error) => {
                    tracing::warn!(%error, "cannot read the last known state; starting without it");
                    None
                }
            },
        };
        let cache = cache.filter(|saved| saved.is_of(&prefix, id.as_deref()));
        let (known_id, known) = match cache {
            Some(SavedState { id, nonce, revision, desired, .. }) => {
                (Some(id), KnownRevision { stored: Stored { revision, desired }, nonce })
            }
            None => (id, KnownRevision::zero()),
        };
        let has_state = known.stored.revision.number > 0;
        let link = StoreLink {
            engine: "etcd".to_owned(),
            place: place.clone(),
            connected: false,
            since_ms: clock::unix_ms(),
            contact_ms: 0,
            problem: None,
            set_back: None,
            moved: None,
            name_taken: None,
        };
        let inner = Arc::new(EtcdInner {
            client,
            keys: Keys::new(&prefix),
            prefix,
            place,
            keep: keep.max(2),
            id: Mutex::new(known_id),
            head: watch::Sender::new(known.stored.clone()),
            recent: Mutex::new(BTreeMap::from([(known.stored.revision.number, known)])),
            link: watch::Sender::new(link),
            host_values: watch::Sender::default(),
            published: Mutex::default(),
            published_changed: Notify::new(),
            joined: Mutex::default(),
            member: Mutex::default(),
            set_back: Mutex::default(),
            accepted: Mutex::default(),
            moving: Mutex::default(),
            wake: Notify::new(),
            writing: tokio::sync::Mutex::default(),
            weights: Mutex::default(),
            tidying: tokio::sync::Mutex::default(),
        });
        inner.read_at_start(has_state).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(follow::run(inner.clone()));
        tasks.spawn(session::run(inner.clone()));
        tasks.spawn(save(inner.clone(), local));
        Ok(Self { inner, _tasks: tasks })
    }

    /// Returns addresses and prefix, for messages.
    pub fn place(&self) -> &str {
        &self.inner.place
    }
}

/// Saves the last known state on this host after each change.
async fn save(inner: Arc<EtcdInner>, local: Arc<dyn Local>) {
    let mut head = inner.head.subscribe();
    loop {
        head.borrow_and_update();
        let known = inner.known();
        let id = locked(&inner.id).clone();
        if let Some(id) = id {
            let KnownRevision { stored: Stored { revision, desired }, nonce } = known;
            let prefix = Some(inner.prefix.clone());
            let cache = SavedState { id, nonce, revision, desired, prefix };
            let bytes = serde_json::to_vec(&cache).expect("a state has a JSON form");
            if let Err(error) = local.save(SAVED_STATE, bytes).await {
                tracing::error!(%error, "cannot save the last known state");
            }
        }
        if head.changed().await.is_err() {
            return;
        }
        tokio::time::sleep(GATHER).await;
    }
}

impl EtcdInner {
    /// Returns the newest revision that this host knows.
    fn known(&self) -> KnownRevision {
        let recent = locked(&self.recent);
        recent.values().next_back().cloned().unwrap_or_else(KnownRevision::zero)
    }

    fn failed(&self, what: impl ToString) -> StoreError {
        StoreError::Failed { file: self.place.clone(), what: what.to_string() }
    }

    fn corrupt(&self, what: impl ToString) -> StoreError {
        StoreError::Corrupt { file: self.place.clone(), what: what.to_string() }
    }

    /// Converts the error of a failed call that wrote nothing.
    fn call_failed(&self, error: CallError) -> StoreError {
        match error {
            CallError::Silent { what, .. } => self.cut_off(what),
            CallError::Refused { what, .. } => self.failed(what),
        }
    }

    fn cut_off(&self, what: String) -> StoreError {
        let link = self.link.borrow().clone();
        let for_s = if link.connected { 0 } else { clock::unix_ms().saturating_sub(link.since_ms) / 1_000 };
        let revision = self.head.borrow().revision.number;
        StoreError::CutOff { store: self.place.clone(), for_s, what, revision }
    }

    /// Refuses at once requests that would have to wait for a store that does not answer.
    fn ensure_connected(&self) -> Result<(), StoreError> {
        let link = self.link.borrow().clone();
        if link.connected {
            return Ok(());
        }
        Err(self.cut_off(link.problem.unwrap_or_else(|| "not connected yet".to_owned())))
    }

    /// Reads the keys from `key` up to `end`, at most `limit`.
    async fn range(
        &self,
        key: Vec<u8>,
        end: Vec<u8>,
        order: SortOrder,
        limit: usize,
    ) -> Result<RangeResponse, CallError> {
        let request = range(key, end, order, limit as i64);
        self.client.call(RANGE, &request, READ).await
    }

    /// Returns the oldest revision to keep, when `newest` is the newest.
    fn oldest(&self, newest: u64) -> u64 {
        newest.saturating_sub(self.keep - 1)
    }

    async fn get(&self, number: u64) -> Result<Stored, StoreError> {
        let newest = self.head.borrow().revision.number;
        let oldest = self.oldest(newest);
        // Revision 0 is empty by definition, but where later ones were removed it is no longer kept either.
        if number > newest || (number < oldest && oldest > 1) {
            return Err(StoreError::NoRevision { number, oldest: oldest.max(1).min(newest), newest });
        }
        if number == 0 {
            return Ok(KnownRevision::zero().stored);
        }
        if let Some(known) = locked(&self.recent).get(&number) {
            return Ok(known.stored.clone());
        }
        self.ensure_connected()?;
        match self.rebuild(number).await? {
            Some(known) => Ok(known.stored),
            None => Err(StoreError::NoRevision { number, oldest: self.oldest_there().await?, newest }),
        }
    }

    /// Returns the oldest revision whose record exists.
    async fn oldest_there(&self) -> Result<u64, StoreError> {
        let begin = self.keys.key("revisions/");
        let found = self.range(begin.clone(), end_of(&begin), SortOrder::Ascend, 1).await;
        let found = found.map_err(|e| self.call_failed(e))?;
        let first = found.kvs.first().and_then(|kv| self.keys.after("revisions/", &kv.key)?.parse().ok());
        Ok(first.unwrap_or(0))
    }
}

impl Store for EtcdStore {
    fn watch(&self) -> watch::Receiver<Stored> {
        self.inner.head.subscribe()
    }

    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(write::commit(&self.inner, commit))
    }

    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(self.inner.get(number))
    }

    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        Box::pin(self.inner.history(before, limit))
    }

    fn history_of(
        &self,
        service: Name,
        before: Option<u64>,
        scan: usize,
    ) -> BoxFuture<'_, Result<ServiceHistory, StoreError>> {
        Box::pin(async move { self.inner.history_of(&service, before, scan).await })
    }

    fn link(&self) -> watch::Receiver<StoreLink> {
        self.inner.link.subscribe()
    }

    fn about(&self) -> BoxFuture<'_, About> {
        Box::pin(self.inner.about())
    }

    fn import(&self, id: Option<String>, revisions: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(write::import(&self.inner, id, revisions))
    }

    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(retire::retire(&self.inner, how))
    }

    fn accept(&self, revision: u64) -> Result<(), StoreError> {
        let set_back = locked(&self.inner.set_back).clone();
        match set_back {
            Some(head) if head.number == revision => {
                *locked(&self.inner.accepted) = Some(head);
                self.inner.wake.notify_one();
                Ok(())
            }
            Some(head) => {
                let why = format!("the store was set back to revision {}, not {revision}", head.number);
                Err(StoreError::NothingToAccept { why })
            }
            None => {
                let number = self.inner.head.borrow().revision.number;
                let why = match self.inner.ensure_connected() {
                    Ok(()) => format!("this host works by the store's revision {number}"),
                    Err(error) => error.to_string(),
                };
                Err(StoreError::NothingToAccept { why })
            }
        }
    }

    fn publish(&self, key: &str, value: Option<Vec<u8>>) {
        let mut published = locked(&self.inner.published);
        match value {
            Some(value) => published.insert(key.to_owned(), value),
            None => published.remove(key),
        };
        self.inner.published_changed.notify_one();
    }

    fn join(&self, name: &str, instance: &str) {
        *locked(&self.inner.joined) = Some((name.to_owned(), instance.to_owned()));
        self.inner.published_changed.notify_one();
    }

    fn keep_member(&self, name: &str, value: Vec<u8>) {
        *locked(&self.inner.member) = Some((name.to_owned(), value));
        self.inner.published_changed.notify_one();
    }

    fn forget_member(&self, name: String) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(member::forget(&self.inner, name))
    }

    fn published(&self) -> watch::Receiver<HostValues> {
        self.inner.host_values.subscribe()
    }

    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>> {
        Box::pin(session::lock(&self.inner, claim))
    }

    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(session::unlock(&self.inner, name, token))
    }

    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>> {
        Box::pin(session::locks(&self.inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_state_belongs_to_one_store() {
        let saved = |prefix: Option<&str>| SavedState {
            id: "a".to_owned(),
            nonce: String::new(),
            revision: KnownRevision::zero().stored.revision,
            desired: Arc::default(),
            prefix: prefix.map(str::to_owned),
        };
        assert!(saved(Some("lb")).is_of("lb", None) && saved(Some("lb")).is_of("lb", Some("a")));
        assert!(!saved(Some("lb")).is_of("other", None) && !saved(Some("lb")).is_of("lb", Some("b")));
        // Of an earlier version.
        assert!(saved(None).is_of("lb", None));
    }
}
