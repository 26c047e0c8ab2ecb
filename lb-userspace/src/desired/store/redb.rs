//! The store in a file of this host, with redb: each commit is one durable transaction.
//!
//! A revision refers, for each service, to the revision in which that service last changed; the services
//! themselves are stored once per change. A change of one service among thousands therefore writes only that one.

mod file;
mod history;
mod store;

use super::{
    Commit, LocalFile, Retire, Revision, StoreError, StoreLink, Stored, delta, local::Alone, new_id,
};
use crate::{
    blocking::blocking,
    clock,
    desired::model::{Desired, guard::ListName},
};
use file::{
    FileRevision, LISTS, META, NOTES, REVISIONS, SERVICES, part_key, prepare, read_head, read_notes,
    read_revision, write_id,
};
pub(super) use file::{Reopening, failed, guarded, open};
use redb::{Database, ReadableDatabase, ReadableTable};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};
use tokio::sync::watch;

/// Version of the file's contents. Increased when an older lbd could no longer read it.
pub const FORMAT: u64 = 1;

/// Desired state in one redb file, local data in another. Clones share them.
#[derive(Clone)]
pub struct RedbStore {
    inner: Arc<RedbInner>,
    alone: Arc<Alone>,
    local: LocalFile,
}

struct RedbInner {
    database: Reopening,
    file: PathBuf,
    id: Mutex<String>,
    keep: u64,
    /// Held from reading `head` to its change, because redb lets the next writer in before that.
    writing: Mutex<()>,
    head: watch::Sender<Stored>,
    link: watch::Sender<StoreLink>,
    retired: Mutex<Retire>,
}

impl RedbStore {
    /// Opens or creates `lb.redb` in a directory, which is created if missing, and reads the newest state.
    /// Keeps `keep` revisions. Blocks.
    ///
    /// # Errors
    /// The file is in use, has a newer format, is damaged, or cannot be written; it is left as it is.
    pub fn open(directory: &Path, keep: u64) -> Result<Self, StoreError> {
        Self::beside(LocalFile::open(directory)?, directory, keep)
    }

    /// Opens the store with local data that are open already; otherwise as [`RedbStore::open`].
    ///
    /// # Errors
    /// Errors of [`RedbStore::open`].
    pub fn beside(local: LocalFile, directory: &Path, keep: u64) -> Result<Self, StoreError> {
        std::fs::create_dir_all(directory).map_err(|e| failed(directory, redb::Error::Io(e)))?;
        let (disk, file) = (local.disk(), directory.join("lb.redb"));
        let (database, stored, id, moved) = guarded(&file, || {
            let database = open(&*disk, &file, prepare)?;
            let stored = read_head(&database, &file)?;
            let (id, moved) = read_notes(&database).map_err(|e| failed(&file, e))?;
            let id = match id {
                Some(id) => id,
                None => {
                    let id = new_id();
                    write_id(&database, &id).map_err(|e| failed(&file, e))?;
                    id
                }
            };
            Ok((database, stored, id, moved))
        })?;
        let now_ms = clock::unix_ms();
        let link = StoreLink {
            engine: "redb".to_owned(),
            place: file.display().to_string(),
            connected: true,
            since_ms: now_ms,
            contact_ms: now_ms,
            problem: None,
            set_back: None,
            moved: moved.clone(),
            name_taken: None,
        };
        let inner = RedbInner {
            database: Reopening::new(disk, file.clone(), database),
            file,
            id: Mutex::new(id),
            keep: keep.max(2),
            writing: Mutex::new(()),
            head: watch::Sender::new(stored),
            link: watch::Sender::new(link),
            retired: Mutex::new(moved.map_or(Retire::Back, Retire::Moved)),
        };
        let alone = Arc::new(Alone::new(local.clone()));
        Ok(Self { inner: Arc::new(inner), alone, local })
    }

    /// Returns the file with data of this host alone.
    pub fn local(&self) -> LocalFile {
        self.local.clone()
    }

    /// Returns the path of the file.
    pub fn file(&self) -> &Path {
        &self.inner.file
    }

    /// Whether the store accepts changes.
    #[cfg(test)]
    pub(crate) fn retired(&self) -> Retire {
        self.inner.retired.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs blocking work off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<RedbInner>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        match blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(e) => {
                Err(StoreError::Failed { file: self.inner.file.display().to_string(), what: e.to_string() })
            }
        }
    }
}

impl RedbInner {
    fn failed(&self, error: impl Into<redb::Error>) -> StoreError {
        failed(&self.file, error)
    }

    fn json_failed(&self, error: &serde_json::Error) -> StoreError {
        StoreError::Failed { file: self.file.display().to_string(), what: error.to_string() }
    }

    fn json<T: Serialize>(&self, thing: &T) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(thing).map_err(|e| self.json_failed(&e))
    }

    fn record(
        &self,
        table: &impl ReadableTable<u64, &'static [u8]>,
        number: u64,
    ) -> Result<Option<FileRevision>, StoreError> {
        let Some(bytes) = table.get(number).map_err(|e| self.failed(e))? else { return Ok(None) };
        self.parse(number, bytes.value()).map(Some)
    }

    fn parse(&self, number: u64, record: &[u8]) -> Result<FileRevision, StoreError> {
        serde_json::from_slice(record).map_err(|e| StoreError::Corrupt {
            file: self.file.display().to_string(),
            what: format!("revision {number}: {e}"),
        })
    }

    /// Runs a request, on a file that is opened again if an earlier one failed.
    fn with<T>(&self, request: impl FnOnce(&Database) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let reread = |database: &Database| {
            let stored = read_head(database, &self.file)?;
            let (id, moved) = read_notes(database).map_err(|e| self.failed(e))?;
            if let Some(id) = id {
                *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
            }
            let is_moving =
                matches!(&*self.retired.lock().unwrap_or_else(PoisonError::into_inner), Retire::Moving(_));
            // Only this process knows that the store is being copied.
            if moved.is_some() || !is_moving {
                self.set_retired(moved.map_or(Retire::Back, Retire::Moved));
            }
            self.head.send_if_modified(|head| {
                let is_other = *head != stored;
                *head = stored;
                is_other
            });
            Ok(())
        };
        self.database.with(reread, request)
    }

    /// Runs a write. After an I/O failure the file is opened again at once, to learn whether the write was stored.
    fn write<T>(
        self: &Arc<Self>,
        write: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.head.borrow().revision.number;
        let error = match self.with(write) {
            Ok(done) => {
                self.set_writable();
                return Ok(done);
            }
            Err(error @ StoreError::Io { .. }) => error,
            Err(other) => return Err(other),
        };
        let again = self.with(|_| Ok(()));
        self.set_failed(&error);
        match error {
            StoreError::Io { file, source }
                if again.is_err() || self.head.borrow().revision.number != before =>
            {
                Err(StoreError::Unsure { store: file, what: source.to_string() })
            }
            error => Err(error),
        }
    }

    /// Records that a write succeeded.
    fn set_writable(&self) {
        let now_ms = clock::unix_ms();
        let changed = self.link.send_if_modified(|link| {
            let was_connected = std::mem::replace(&mut link.connected, true);
            if !was_connected {
                (link.since_ms, link.contact_ms, link.problem) = (now_ms, now_ms, None);
            }
            !was_connected
        });
        if changed {
            tracing::info!(file = %self.file.display(), "the store can be written again");
        }
    }

    /// Records that a write failed, and tries from time to time whether the file can be written again.
    fn set_failed(self: &Arc<Self>, error: &StoreError) {
        let problem = error.to_string();
        let mut was_connected = false;
        self.link.send_modify(|link| {
            was_connected = std::mem::replace(&mut link.connected, false);
            if was_connected {
                link.since_ms = clock::unix_ms();
            }
            link.problem = Some(problem.clone());
        });
        if !was_connected {
            return;
        }
        tracing::error!(problem, "the store cannot be written; forwarding goes on");
        // Requests are async, so there is a runtime; without one, the next change is the next attempt.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(store::retry_writes(Arc::downgrade(self)));
        }
    }

    /// Tries to write the file; true once it can be written.
    fn try_to_write(self: &Arc<Self>) -> bool {
        let id = self.id.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let attempt = |database: &Database| write_id(database, &id).map_err(|e| self.failed(e));
        self.link.borrow().connected || self.write(attempt).is_ok()
    }

    fn commit(self: &Arc<Self>, commit: Commit) -> Result<Stored, StoreError> {
        self.write(|database| {
            let write = database.begin_write().map_err(|e| self.failed(e))?;
            let head = self.head.borrow().clone();
            let found = head.revision.number;
            if found != commit.expected {
                return Err(StoreError::Conflict { expected: commit.expected, found });
            }
            self.ensure_in_use()?;
            let number = found + 1;
            let time_ms = commit.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
            let Commit { author, message, summary, .. } = commit;
            let revision = Revision { number, author, time_ms, message, summary };
            let stored = Stored { revision, desired: commit.desired };
            self.append(&write, &head.desired, &stored)?;
            write.commit().map_err(|e| self.failed(e))?;
            self.head.send_replace(stored.clone());
            Ok(stored)
        })
    }

    /// Writes a revision that follows `before`.
    fn append(
        &self,
        write: &redb::WriteTransaction,
        before: &Desired,
        stored: &Stored,
    ) -> Result<(), StoreError> {
        let Stored { revision, desired } = stored;
        // A new field is in `rest`, unless it is removed there; then this does not compile.
        let Desired { services: wanted, regions: _, guard } = &**desired;
        let number = revision.number;
        let mut revisions = write.open_table(REVISIONS).map_err(|e| self.failed(e))?;
        let mut table = write.open_table(SERVICES).map_err(|e| self.failed(e))?;
        let (written, written_lists) =
            self.record(&revisions, number - 1)?.map(|r| (r.services, r.lists)).unwrap_or_default();
        let mut services = BTreeMap::new();
        for (name, service) in wanted {
            let since = match written.get(name) {
                Some(&since) if before.services.get(name) == Some(service) => since,
                _ => {
                    let bytes = self.json(service)?;
                    table.insert((name.as_str(), number), &*bytes).map_err(|e| self.failed(e))?;
                    number
                }
            };
            services.insert(name.clone(), since);
        }
        let mut list_table = write.open_table(LISTS).map_err(|e| self.failed(e))?;
        let mut lists = BTreeMap::new();
        for name in ListName::ALL {
            for (part, entries) in &guard.list(name).0 {
                let key = part_key(name, part);
                let is_same = before
                    .guard
                    .list(name)
                    .0
                    .get(part)
                    .is_some_and(|old| Arc::ptr_eq(old, entries) || old == entries);
                let since = match written_lists.get(&key) {
                    Some(&since) if is_same => since,
                    _ => {
                        let bytes = self.json(entries)?;
                        list_table.insert((key.as_str(), number), &*bytes).map_err(|e| self.failed(e))?;
                        number
                    }
                };
                lists.insert(key, since);
            }
        }
        let rest = delta::rest(desired).map_err(|e| self.json_failed(&e))?;
        let Revision { number: _, author, time_ms, message, summary } = revision.clone();
        let record = FileRevision { author, time_ms, message, summary, services, lists, rest };
        revisions.insert(number, &*self.json(&record)?).map_err(|e| self.failed(e))?;
        self.prune(&mut revisions, &mut table, &mut list_table, number)?;
        let mut meta = write.open_table(META).map_err(|e| self.failed(e))?;
        meta.insert("head", number).map_err(|e| self.failed(e))?;
        Ok(())
    }

    /// Refuses changes to a store that was or is being migrated.
    fn ensure_in_use(&self) -> Result<(), StoreError> {
        let store = self.file.display().to_string();
        match self.retired.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Retire::Back => Ok(()),
            Retire::Moving(to) => Err(StoreError::Moving { store, to }),
            Retire::Moved(to) => Err(StoreError::Moved { store, to }),
        }
    }

    fn import(self: &Arc<Self>, id: Option<String>, all: Vec<Stored>) -> Result<(), StoreError> {
        self.write(|database| {
            self.ensure_in_use()?;
            let count = self.head.borrow().revision.number;
            if count > 0 {
                return Err(StoreError::NotEmpty { store: self.file.display().to_string(), count });
            }
            let write = database.begin_write().map_err(|e| self.failed(e))?;
            let mut before = Arc::<Desired>::default();
            for stored in &all {
                self.append(&write, &before, stored)?;
                before = stored.desired.clone();
            }
            if let Some(id) = &id {
                let mut notes = write.open_table(NOTES).map_err(|e| self.failed(e))?;
                notes.insert("id", &**id).map_err(|e| self.failed(e))?;
            }
            write.commit().map_err(|e| self.failed(e))?;
            if let Some(id) = id {
                *self.id.lock().unwrap_or_else(PoisonError::into_inner) = id;
            }
            if let Some(last) = all.into_iter().next_back() {
                self.head.send_replace(last);
            }
            Ok(())
        })
    }

    fn retire(self: &Arc<Self>, how: Retire) -> Result<(), StoreError> {
        let note = |to: Option<&str>| {
            self.write(|database| {
                let write = || -> Result<(), redb::Error> {
                    let write = database.begin_write()?;
                    match to {
                        Some(to) => write.open_table(NOTES)?.insert("moved", to)?.map(drop),
                        None => write.open_table(NOTES)?.remove("moved")?.map(drop),
                    };
                    Ok(write.commit()?)
                };
                write().map_err(|e| self.failed(e))?;
                self.set_retired(to.map_or(Retire::Back, |to| Retire::Moved(to.to_owned())));
                Ok(())
            })
        };
        match &how {
            Retire::Moved(to) => return note(Some(to)),
            Retire::Back => match self.ensure_in_use() {
                Ok(()) => return Err(StoreError::NotMoved { store: self.file.display().to_string() }),
                Err(StoreError::Moving { .. }) => {}
                Err(_) => return note(None),
            },
            Retire::Moving(_) => {}
        }
        // Only this process writes to the file, so the state `Moving` need not outlive the process, and its end needs no
        // write, which a full disk could prevent.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(how, Retire::Moving(_)) {
            self.ensure_in_use()?;
        }
        self.set_retired(how);
        Ok(())
    }

    fn set_retired(&self, how: Retire) {
        let moved = match &how {
            Retire::Moved(to) => Some(to.clone()),
            Retire::Moving(_) | Retire::Back => None,
        };
        self.link.send_modify(|link| link.moved = moved);
        *self.retired.lock().unwrap_or_else(PoisonError::into_inner) = how;
    }

    /// Removes revisions beyond those to keep, and services that only they refer to.
    fn prune(
        &self,
        revisions: &mut redb::Table<'_, u64, &'static [u8]>,
        services: &mut redb::Table<'_, (&'static str, u64), &'static [u8]>,
        lists: &mut redb::Table<'_, (&'static str, u64), &'static [u8]>,
        newest: u64,
    ) -> Result<(), StoreError> {
        loop {
            let oldest = revisions.first().map_err(|e| self.failed(e))?.map_or(newest, |(k, _)| k.value());
            if oldest + self.keep > newest {
                return Ok(());
            }
            let of = |record: Option<FileRevision>| record.map(|r| (r.services, r.lists)).unwrap_or_default();
            let (old, old_lists) = of(self.record(revisions, oldest)?);
            let (next, next_lists) = of(self.record(revisions, oldest + 1)?);
            for (key, since) in old_lists {
                if next_lists.get(&key) != Some(&since) {
                    lists.remove((key.as_str(), since)).map_err(|e| self.failed(e))?;
                }
            }
            for (name, since) in old {
                if next.get(&name) != Some(&since) {
                    services.remove((name.as_str(), since)).map_err(|e| self.failed(e))?;
                }
            }
            revisions.remove(oldest).map_err(|e| self.failed(e))?;
        }
    }

    fn get(&self, number: u64) -> Result<Stored, StoreError> {
        self.with(|database| {
            let read = database.begin_read().map_err(|e| self.failed(e))?;
            let revisions = read.open_table(REVISIONS).map_err(|e| self.failed(e))?;
            let oldest = revisions.first().map_err(|e| self.failed(e))?.map_or(0, |(k, _)| k.value());
            // Revision 0 is empty by definition, but where later ones were removed it is no longer kept either.
            let found =
                if number == 0 && oldest > 1 { None } else { read_revision(&read, &self.file, number)? };
            let newest = self.head.borrow().revision.number;
            found.ok_or(StoreError::NoRevision { number, oldest, newest })
        })
    }
}
