//! Desired state that lasts: numbered revisions with author, time and message.
//!
//! Input: whole desired states, committed against the revision that their author saw. Output: the newest
//! state (watched), any kept revision, and the history; beside it locks, and what hosts tell each other.
//! [`Store`] is what the rest knows; [`RedbStore`] keeps it in a file on this host, [`EtcdStore`] shares it
//! between hosts and regions. [`Local`] keeps what belongs to this host alone (last health verdicts, the
//! reconciler's memory, the last known state), whatever store the desired state is in.
//! Called by the API and the daemon.

mod address;
pub mod backup;
pub mod delta;
mod error;
pub mod etcd;
mod local;
mod open;
mod redb;

pub use self::{
    address::Address,
    error::StoreError,
    etcd::EtcdStore,
    local::LocalFile,
    open::Opener,
    redb::{FORMAT, RedbStore},
};

use crate::desired::model::Desired;
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
    /// Its number: one more than the one before; 0 is the empty state before any change.
    pub number: u64,
    /// Who made it.
    pub author: String,
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// What for.
    pub message: String,
}

impl Revision {
    /// When.
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.time_ms)
    }
}

/// A revision and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Which.
    pub revision: Revision,
    /// The whole state.
    pub desired: Arc<Desired>,
}

/// A change to commit.
#[derive(Clone, Debug)]
pub struct Commit {
    /// Number of the newest revision that the author saw; another by now is a conflict.
    pub expected: u64,
    /// The new state, whole and already checked.
    pub desired: Arc<Desired>,
    /// Who.
    pub author: String,
    /// What for.
    pub message: String,
    /// When.
    pub time: SystemTime,
}

/// A new name for a store's data: 16 hexadecimal digits.
fn new_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

/// How a store and this host get on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// `redb` or `etcd`.
    pub engine: String,
    /// File, or addresses and prefix.
    pub place: String,
    /// Whether the store answers, and its answers are taken.
    pub connected: bool,
    /// Since when, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// When it last answered, in milliseconds since 1970 UTC.
    pub contact_ms: u64,
    /// What is wrong, if it is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Revision that the store was set back to, and that is not taken unless somebody accepts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_back: Option<u64>,
}

/// A store, as `lbctl store status` shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// `redb` or `etcd`.
    pub engine: String,
    /// File, or addresses and prefix.
    pub place: String,
    /// Id of its data.
    pub id: String,
    /// Members of its cluster; one, if it is a file.
    pub members: Vec<Member>,
}

/// A member of the store's cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Name.
    pub name: String,
    /// Address.
    pub address: String,
    /// Whether it answers and has a leader.
    pub healthy: bool,
    /// Whether it leads.
    pub leader: bool,
    /// Version of its program.
    pub version: String,
    /// Size of its data, in bytes.
    pub size_bytes: u64,
    /// What is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Name.
    pub name: String,
    /// Who holds it.
    pub holder: String,
    /// What for.
    pub reason: String,
    /// Since when, in milliseconds since 1970 UTC.
    pub since_ms: u64,
    /// Seconds until it runs out, unless it is renewed.
    pub left_s: u64,
    /// What its holder renews and releases it with; shown to nobody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// Wish for a lock.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Name.
    pub name: String,
    /// Who.
    pub holder: String,
    /// What for.
    pub reason: String,
    /// After this time without renewal it is free again.
    pub ttl: Duration,
    /// Of a renewal: what the first claim was answered with.
    pub token: Option<String>,
}

/// Whether a store takes changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retire {
    /// Not while it is copied there, by this lbd: if that dies, it does again by itself.
    Moving(String),
    /// Not any more: the data are there.
    Moved(String),
    /// It does again.
    Back,
}

/// What hosts tell each other: small values by key (`hosts/NAME` and so on).
pub type HostValues = Arc<BTreeMap<String, Vec<u8>>>;

/// Where the desired state lives.
pub trait Store: Send + Sync {
    /// The newest revision. Does not block: it is the watched value.
    fn head(&self) -> Stored {
        self.watch().borrow().clone()
    }

    /// The newest revision, and each that follows. A slow reader sees only the last.
    fn watch(&self) -> watch::Receiver<Stored>;

    /// Makes `commit` the newest revision if its author saw the one before, durably.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], or the write failed and nothing changed; only after [`StoreError::Unsure`]
    /// it may have been stored all the same.
    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>>;

    /// A kept revision.
    ///
    /// # Errors
    /// [`StoreError::NoRevision`], or reading failed.
    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>>;

    /// Kept revisions below `before` (all, if none), newest first, at most `limit`.
    ///
    /// # Errors
    /// Reading failed.
    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>>;

    /// How the store and this host get on, and each change of it.
    fn link(&self) -> watch::Receiver<Link>;

    /// Engine and members.
    fn about(&self) -> BoxFuture<'_, About>;

    /// Fills an empty store: revisions as they are, oldest first, with numbers, authors and times; and the id
    /// of the data, if they keep that. It is all there in the end, or nothing is.
    ///
    /// # Errors
    /// [`StoreError::NotEmpty`], or writing failed.
    fn import(&self, id: Option<String>, revisions: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Takes no more changes, or does so again. When `Moving` returns, no commit that is under way can succeed any
    /// more, and the head is the last one that has.
    ///
    /// # Errors
    /// [`StoreError::Moved`] or [`StoreError::Moving`] where somebody else is faster, [`StoreError::NotMoved`] of
    /// [`Retire::Back`], or writing failed.
    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Takes what the store holds, although it is older than what this host has seen, if it is (still) at this
    /// revision; one that is empty is filled with what this host knows.
    ///
    /// # Errors
    /// [`StoreError::NothingToAccept`].
    fn accept(&self, revision: u64) -> Result<(), StoreError>;

    /// Tells all hosts a value, for as long as this lbd lives (and some seconds more); none takes it back.
    /// Goes out as soon as the store can be reached.
    fn tell(&self, key: &str, value: Option<Vec<u8>>);

    /// What all hosts tell, this one included, and each change of it.
    fn told(&self) -> watch::Receiver<HostValues>;

    /// Takes a lock, or renews it.
    ///
    /// # Errors
    /// [`StoreError::Held`], or writing failed; of a renewal, [`StoreError::NotHeld`].
    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>>;

    /// Releases a lock; without its token, whoever holds it.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], or writing failed.
    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Locks that are held, without their tokens.
    ///
    /// # Errors
    /// Reading failed.
    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>>;
}

/// Revisions in force since `since_ms` (in milliseconds since 1970 UTC), oldest first: the one that was the
/// newest then, and all that followed, the last `limit` of them at most. Where fewer are kept, those.
///
/// # Errors
/// Reading failed.
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

/// What belongs to this host alone: small values by key.
pub trait Local: Send + Sync {
    /// The value last put.
    ///
    /// # Errors
    /// Reading failed.
    fn load(&self, key: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>>;

    /// Replaces the value, durably.
    ///
    /// # Errors
    /// The write failed, and the old value stands.
    fn save(&self, key: &'static str, value: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>>;
}

/// What was put before the restart; a default, and a warning that `what` cannot be read, if it is of no use.
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
        tracing::warn!(%error, "{what} cannot be read; starting without");
        T::default()
    })
}

#[cfg(test)]
mod tests;
