//! Data of this host alone, in a file of its own, so that saving it delays no commit. For a store in a
//! file, also the locks and the published values of "all hosts", because this host is the only one.

use super::{
    Claim, HostValues, Local, Lock, StoreError,
    disk::{Disk, Files},
    redb::{Reopening, failed, guarded, open},
};
use crate::{blocking::blocking, clock};
use futures_util::future::BoxFuture;
use redb::{Database, ReadableDatabase, TableDefinition};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use tokio::sync::{Mutex, watch};

/// Table of the values of [`Local`].
const LOCAL: TableDefinition<&str, &[u8]> = TableDefinition::new("local");
/// Key of the locks.
const LOCKS: &str = "locks";

/// `local.redb` in a directory. Clones share it.
#[derive(Clone)]
pub struct LocalFile {
    inner: Arc<Reopening>,
}

impl LocalFile {
    /// Opens or creates the file. Blocks.
    ///
    /// # Errors
    /// The file is in use, damaged, or cannot be written; it is left as it is.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_on(Arc::new(Files), directory)
    }

    /// Opens or creates the file on a disk of the caller's. Blocks.
    ///
    /// # Errors
    /// Errors of [`LocalFile::open`].
    pub fn open_on(disk: Arc<dyn Disk>, directory: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(directory).map_err(|e| failed(directory, redb::Error::Io(e)))?;
        let file = directory.join("local.redb");
        let database = guarded(&file, || {
            let table = |database: &Database| -> Result<(), redb::Error> {
                let write = database.begin_write()?;
                write.open_table(LOCAL)?;
                Ok(write.commit()?)
            };
            let database = open(&*disk, &file, table)?;
            // A start on a full disk must not fail for a write that changes nothing.
            let is_there = || -> Result<bool, redb::Error> {
                match database.begin_read()?.open_table(LOCAL) {
                    Ok(_) => Ok(true),
                    Err(redb::TableError::TableDoesNotExist(_)) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            };
            if !is_there().map_err(|e| failed(&file, e))? {
                table(&database).map_err(|e| failed(&file, e))?;
            }
            Ok(database)
        })
        .map_err(|error| match error {
            StoreError::Corrupt { file, what } => StoreError::CorruptLocal { file, what },
            other => other,
        })?;
        Ok(Self { inner: Arc::new(Reopening::new(disk, file, database)) })
    }

    /// The disk that the file is on.
    pub(super) fn disk(&self) -> Arc<dyn Disk> {
        self.inner.disk()
    }

    /// Runs blocking work off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        let run =
            move || inner.with(|_| Ok(()), |database| work(database).map_err(|e| failed(inner.file(), e)));
        match blocking(run).await {
            Ok(result) => result,
            Err(e) => {
                Err(StoreError::Failed { file: self.inner.file().display().to_string(), what: e.to_string() })
            }
        }
    }
}

impl Local for LocalFile {
    fn load(&self, key: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>> {
        Box::pin(self.blocking(move |database| {
            let table = database.begin_read()?.open_table(LOCAL)?;
            Ok(table.get(key)?.map(|v| v.value().to_vec()))
        }))
    }

    fn save(&self, key: &'static str, value: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.blocking(move |database| {
            let write = database.begin_write()?;
            write.open_table(LOCAL)?.insert(key, &*value)?;
            Ok(write.commit()?)
        }))
    }
}

/// Stored form of a lock.
#[derive(Clone, Serialize, Deserialize)]
struct StoredLock {
    holder: String,
    reason: String,
    since_ms: u64,
    until_ms: u64,
    token: String,
}

impl StoredLock {
    fn lock(&self, name: &str, now_ms: u64, token: bool) -> Lock {
        Lock {
            name: name.to_owned(),
            holder: self.holder.clone(),
            reason: self.reason.clone(),
            since_ms: self.since_ms,
            left_s: self.until_ms.saturating_sub(now_ms).div_ceil(1_000),
            token: token.then(|| self.token.clone()),
        }
    }
}

/// Locks and published values of a store that only one host uses.
pub(super) struct Alone {
    local: LocalFile,
    values: watch::Sender<HostValues>,
    /// Held while the locks are read and written.
    locks: Mutex<()>,
}

impl Alone {
    pub fn new(local: LocalFile) -> Self {
        Self { local, values: watch::Sender::default(), locks: Mutex::default() }
    }

    pub fn publish(&self, key: &str, value: Option<Vec<u8>>) {
        self.values.send_modify(|values| {
            let values = Arc::make_mut(values);
            match value {
                Some(value) => values.insert(key.to_owned(), value),
                None => values.remove(key),
            };
        });
    }

    pub fn published(&self) -> watch::Receiver<HostValues> {
        self.values.subscribe()
    }

    /// Locks that have not expired. If the clock was set, a lock never lasts longer than its full time from its
    /// beginning.
    async fn held(&self, now_ms: u64) -> Result<BTreeMap<String, StoredLock>, StoreError> {
        let bytes = self.local.load(LOCKS).await?.unwrap_or_default();
        let mut held: BTreeMap<String, StoredLock> = serde_json::from_slice(&bytes).unwrap_or_default();
        held.retain(|_, h| (h.since_ms..h.until_ms).contains(&now_ms));
        Ok(held)
    }

    async fn keep(&self, held: &BTreeMap<String, StoredLock>) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(held).expect("texts and numbers have a JSON form");
        self.local.save(LOCKS, bytes).await
    }

    pub async fn lock(&self, claim: Claim) -> Result<Lock, StoreError> {
        let _turn = self.locks.lock().await;
        let now = clock::unix_ms();
        let mut held = self.held(now).await?;
        let until_ms = now + claim.ttl.as_millis() as u64;
        let new = match (held.get(&claim.name), &claim.token) {
            // A renewal never shortens the lock.
            (Some(old), Some(token)) if old.token == *token => {
                StoredLock { until_ms: until_ms.max(old.until_ms), ..old.clone() }
            }
            (_, Some(_)) => return Err(StoreError::NotHeld { name: claim.name }),
            (Some(old), None) => {
                let (holder, reason) = (old.holder.clone(), old.reason.clone());
                let left_s = old.lock(&claim.name, now, false).left_s;
                return Err(StoreError::Held { name: claim.name, holder, reason, left_s });
            }
            (None, None) => {
                let token = format!("{:016x}", rand::random::<u64>());
                StoredLock { holder: claim.holder, reason: claim.reason, since_ms: now, until_ms, token }
            }
        };
        let lock = new.lock(&claim.name, now, true);
        held.insert(claim.name, new);
        self.keep(&held).await?;
        Ok(lock)
    }

    pub async fn unlock(&self, name: String, token: Option<String>) -> Result<(), StoreError> {
        let _turn = self.locks.lock().await;
        let mut held = self.held(clock::unix_ms()).await?;
        let is_right = held.get(&name).is_some_and(|h| token.is_none_or(|token| token == h.token));
        if !is_right {
            return Err(StoreError::NotHeld { name });
        }
        held.remove(&name);
        self.keep(&held).await
    }

    pub async fn locks(&self) -> Result<Vec<Lock>, StoreError> {
        let now = clock::unix_ms();
        Ok(self.held(now).await?.iter().map(|(name, h)| h.lock(name, now, false)).collect())
    }
}
