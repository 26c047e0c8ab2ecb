//! Durable desired state: numbered revisions with author, time and message.
//!
//! Input: whole desired states, committed against the revision that their author saw. Output: the newest
//! state (watched), any kept revision, and the history; also locks, and values that hosts publish to each other.
//! [`Store`] is the interface; [`RedbStore`] keeps the state in a file on this host, [`EtcdStore`] shares it
//! between hosts and regions. [`Local`] keeps data of this host alone (last health results, the
//! reconciler's memory, the last known state), with any store.
//! Called by the API and the daemon.

mod address;
pub mod backup;
pub mod delta;
mod disk;
mod error;
pub mod etcd;
mod local;
mod open;
mod redb;

pub use self::{
    address::Address,
    disk::{Disk, Files},
    error::StoreError,
    etcd::EtcdStore,
    local::LocalFile,
    open::Opener,
    redb::{FORMAT, RedbStore},
};

use crate::desired::model::{Desired, Name};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fmt::Display,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;

/// One change of the desired state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Number of the revision: one more than the previous one; 0 is the empty state before any change.
    pub number: u64,
    /// Author of the change.
    pub author: String,
    /// Time of the change, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Reason for the change that its author gave; without one, what changed.
    pub message: String,
    /// What changed, if the message is the author's. Earlier versions did not record it beside a message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
}

impl Revision {
    /// What changed; of a record of an earlier version, the author's reason.
    pub fn change(&self) -> &str {
        self.summary.as_deref().unwrap_or(&self.message)
    }

    /// The reason that the author gave, if what changed is recorded beside it.
    pub fn reason(&self) -> Option<&str> {
        self.summary.as_ref().map(|_| self.message.as_str())
    }

    /// Time of the change.
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.time_ms)
    }
}

/// A revision and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Number, author, time and message.
    pub revision: Revision,
    /// The complete state.
    pub desired: Arc<Desired>,
}

/// A change to commit.
#[derive(Clone, Debug)]
pub struct Commit {
    /// Number of the newest revision that the author saw; if it is no longer the newest, there is a conflict.
    pub expected: u64,
    /// The new state, complete and already checked.
    pub desired: Arc<Desired>,
    /// Author of the change.
    pub author: String,
    /// Reason for the change that its author gave; without one, what changed.
    pub message: String,
    /// What changed, if the message is the author's.
    pub summary: Option<String>,
    /// Time of the change.
    pub time: SystemTime,
}

/// Generates an id for a store's data: 16 hexadecimal digits.
fn new_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// State of the connection between this host and the store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreLink {
    /// `redb` or `etcd`.
    pub engine: String,
    /// File, or addresses and prefix.
    pub place: String,
    /// Whether the store answers, and its data are accepted.
    pub connected: bool,
    /// Time since which `connected` has its value, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// Time of the last answer, in milliseconds since 1970 UTC.
    pub contact_ms: u64,
    /// What is wrong, if not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Revision that the store was set back to, and that is ignored until an operator accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_back: Option<u64>,
    /// Address of the store that the data were migrated to; this store refuses changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved: Option<String>,
    /// This host's name, if another live host has it: then this host publishes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_taken: Option<String>,
}

impl StoreLink {
    /// The refusal of a store whose data were migrated elsewhere.
    pub fn refusal(&self) -> Option<StoreError> {
        let to = self.moved.clone()?;
        Some(StoreError::Moved { store: self.place.clone(), to })
    }
}

/// Description of a store, as `lbctl store status` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// `redb` or `etcd`.
    pub engine: String,
    /// File, or addresses and prefix.
    pub place: String,
    /// Id of the data.
    pub id: String,
    /// Members of the cluster; one for a file.
    pub members: Vec<StoreMember>,
}

/// A member of the store's cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreMember {
    /// Name.
    pub name: String,
    /// Address.
    pub address: String,
    /// Whether the member answers and has a leader.
    pub healthy: bool,
    /// Whether the member is the leader.
    pub leader: bool,
    /// Version of the member's program.
    pub version: String,
    /// Size of the member's data, in bytes.
    pub size_bytes: u64,
    /// What is wrong with the member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Name.
    pub name: String,
    /// Holder of the lock.
    pub holder: String,
    /// Reason for holding it.
    pub reason: String,
    /// Start, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// Seconds until the lock expires, unless renewed.
    pub left_s: u64,
    /// Secret with which the holder renews and releases the lock; only the holder gets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Revisions that changed a service, newest first, and the revision before which a search of older ones continues.
pub type ServiceHistory = (Vec<Revision>, Option<u64>);

/// Request for a lock.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Name.
    pub name: String,
    /// Holder of the lock.
    pub holder: String,
    /// Reason for the lock.
    pub reason: String,
    /// Time after which the lock expires without renewal.
    pub ttl: Duration,
    /// For a renewal: token from the answer to the first request.
    pub token: Option<String>,
}

/// Whether a store accepts changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retire {
    /// Not while this lbd copies the store there; if lbd dies, the store accepts changes again.
    Moving(String),
    /// Not any more: the data are there.
    Moved(String),
    /// The store accepts changes again.
    Back,
}

/// Prefix of the keys of hosts' reports, which last as long as the host.
pub const HOSTS: &str = "hosts/";
/// Prefix of the keys of member records, which stay until they are removed.
pub const MEMBERS: &str = "members/";

/// Values that hosts publish to each other: small values by key (`hosts/NAME` and so on).
pub type HostValues = Arc<BTreeMap<String, Vec<u8>>>;

/// Store of the desired state.
pub trait Store: Send + Sync {
    /// Returns the newest revision. Does not block: it is the watched value.
    fn head(&self) -> Stored {
        self.watch().borrow().clone()
    }

    /// Watches the newest revision. A slow reader sees only the last one.
    fn watch(&self) -> watch::Receiver<Stored>;

    /// Makes `commit` the newest revision durably, if its author saw the previous one.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], or the write failed and nothing changed; only after [`StoreError::Unsure`]
    /// the change may have been stored nevertheless.
    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>>;

    /// Returns a kept revision.
    ///
    /// # Errors
    /// [`StoreError::NoRevision`], or reading fails.
    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>>;

    /// Lists kept revisions below `before` (all, if none), newest first, at most `limit`.
    ///
    /// # Errors
    /// Reading fails.
    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>>;

    /// Lists the revisions that added, changed or removed a service, among the `scan` kept revisions below `before` (all,
    /// if none), newest first; also where the search ended, if older revisions are kept. Of the oldest kept revision it is
    /// unknown what it changed.
    ///
    /// # Errors
    /// Reading fails.
    fn history_of(
        &self,
        service: Name,
        before: Option<u64>,
        scan: usize,
    ) -> BoxFuture<'_, Result<ServiceHistory, StoreError>>;

    /// Watches the state of the connection to the store.
    fn link(&self) -> watch::Receiver<StoreLink>;

    /// Describes engine and members.
    fn about(&self) -> BoxFuture<'_, About>;

    /// Fills an empty store: revisions as they are, oldest first, with numbers, authors and times; and the id
    /// of the data, if they keep it. Either everything is stored, or nothing.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], or writing fails.
    fn import(&self, id: Option<String>, revisions: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Stops accepting changes, or accepts them again. When `Moving` returns, no pending commit can succeed
    /// any more, and the head is the last successful one.
    ///
    /// # Errors
    /// [`StoreError::Moved`] or [`StoreError::Moving`] if another migration was faster, [`StoreError::NotMoved`] for
    /// [`Retire::Back`], or writing fails.
    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Accepts the store's data, although they are older than what this host has seen, if the store is (still) at this
    /// revision; an empty store is filled with the data of this host.
    ///
    /// # Errors
    /// [`StoreError::NothingToAccept`].
    fn accept(&self, revision: u64) -> Result<(), StoreError>;

    /// Publishes a value to all hosts, until this lbd ends (and some seconds more); none withdraws it.
    /// It is sent as soon as the store can be reached.
    fn publish(&self, key: &str, value: Option<Vec<u8>>);

    /// Joins the fleet under a name. From now on, values are published only while no other live host has that name:
    /// one of another `instance`. Until the name is free, the link says that it is taken.
    fn join(&self, name: &str, instance: &str);

    /// Publishes this host's member record (`members/NAME`), which stays when this lbd ends.
    fn keep_member(&self, name: &str, value: Vec<u8>);

    /// Removes the record of a member that is not live.
    ///
    /// # Errors
    /// [`StoreError::NoMember`], [`StoreError::MemberLives`], or writing fails.
    fn forget_member(&self, name: String) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Watches the values that all hosts publish, including this one.
    fn published(&self) -> watch::Receiver<HostValues>;

    /// Takes a lock, or renews it.
    ///
    /// # Errors
    /// [`StoreError::Held`], or writing fails; for a renewal, [`StoreError::NotHeld`].
    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>>;

    /// Releases a lock; without a token, whoever holds it.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], or writing fails.
    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Lists the locks that are held, without their tokens.
    ///
    /// # Errors
    /// Reading fails.
    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>>;
}

/// Revisions in force since `since_ms` (in milliseconds since 1970 UTC), oldest first: the newest at that time, and
/// all that followed, at most the last `limit`; fewer if fewer are kept.
///
/// # Errors
/// Reading fails.
pub async fn since(store: &dyn Store, since_ms: u64, limit: usize) -> Result<Vec<Stored>, StoreError> {
    let mut found = vec![store.head()];
    while let Some(last) = found.last()
        && last.revision.time_ms > since_ms
        && last.revision.number > 0
        && found.len() < limit
    {
        match store.get(last.revision.number - 1).await {
            Ok(stored) => found.push(stored),
            Err(StoreError::NoRevision { .. }) => break,
            Err(error) => return Err(error),
        }
    }
    found.reverse();
    Ok(found)
}

/// Data of this host alone: small values by key.
pub trait Local: Send + Sync {
    /// Returns the value saved last.
    ///
    /// # Errors
    /// Reading fails.
    fn load(&self, key: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>>;

    /// Replaces the value, durably.
    ///
    /// # Errors
    /// The write fails, and the old value stays.
    fn save(&self, key: &'static str, value: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// Loads a value saved before a restart; if it is unreadable, logs a warning that names `what` and returns the default.
pub async fn restored<T: Default, E: Display>(
    local: &dyn Local,
    key: &'static str,
    what: &str,
    read: impl FnOnce(&[u8]) -> Result<T, E>,
) -> T {
    let found = match local.load(key).await {
        Ok(Some(bytes)) => read(&bytes).map_err(|e| e.to_string()),
        Ok(None) => return T::default(),
        Err(e) => Err(e.to_string()),
    };
    found.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read {what}; starting without it");
        T::default()
    })
}

#[cfg(test)]
mod tests;
