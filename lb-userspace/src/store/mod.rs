//! Desired state that lasts: numbered revisions with author, time and message.
//!
//! Input: whole desired states, committed against the revision that their author saw. Output: the newest
//! state (watched), any kept revision, and the history. [`Store`] is what the rest knows;
//! [`RedbStore`] keeps it in a file on this host. [`Local`] beside it keeps what belongs to this host
//! alone (last health verdicts, the reconciler's memory), whatever store the desired state is in.
//! Called by the API and the daemon.

mod redb;

pub use self::redb::{FORMAT, RedbStore};

use crate::model::Desired;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::{
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

/// Why the store refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Someone else was faster.
    #[error("the desired state is at revision {found} by now, not {expected}: look at it again, and repeat")]
    Conflict {
        /// Revision that the author saw.
        expected: u64,
        /// Newest revision.
        found: u64,
    },
    /// Never was, or no longer kept.
    #[error("revision {number} is not kept: revisions {oldest} to {newest} are")]
    NoRevision {
        /// Asked for.
        number: u64,
        /// Oldest kept.
        oldest: u64,
        /// Newest.
        newest: u64,
    },
    /// Another process has it open.
    #[error("store {file} is in use by another process: stop that lbd, or give this one its own --state-dir")]
    InUse {
        /// File.
        file: String,
    },
    /// Written by a later version.
    #[error(
        "store {file} has format {found}, and this lbd knows formats up to {known}: start the lbd that wrote it or a later one"
    )]
    Newer {
        /// File.
        file: String,
        /// Its format.
        found: u64,
        /// Newest format known.
        known: u64,
    },
    /// Not a store, or damaged.
    #[error(
        "store {file} is damaged ({what}); it was left as it is: restore it from a copy, or move it away to start empty \
         and load a configuration with `lbctl config apply`"
    )]
    Corrupt {
        /// File.
        file: String,
        /// What was found.
        what: String,
    },
    /// The same for what belongs to this host alone.
    #[error(
        "{file} is damaged ({what}); it was left as it is: move it away, and lbd starts without the last health \
         verdicts and takes the live maps as they are"
    )]
    CorruptLocal {
        /// File.
        file: String,
        /// What was found.
        what: String,
    },
    /// Not allowed.
    #[error("store {file}: permission denied; run lbd as root (sudo), or give it a --state-dir of its own")]
    Denied {
        /// File or directory.
        file: String,
    },
    /// The file system said no.
    #[error("store {file}: {source}")]
    Io {
        /// File or directory.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Anything else, such as a transaction that failed.
    #[error("store {file}: {what}")]
    Failed {
        /// File.
        file: String,
        /// What the storage library said.
        what: String,
    },
}

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
    /// [`StoreError::Conflict`], or the write failed and nothing changed.
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

#[cfg(test)]
mod tests;
