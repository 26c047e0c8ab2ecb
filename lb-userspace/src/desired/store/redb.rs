//! The store in a file of this host, with redb: each commit is one durable transaction.
//!
//! A revision names, for each service, the revision in which that service last changed; the services
//! themselves are kept once per change. So a change of one service among thousands writes that one.

use super::{
    About, Claim, Commit, HostValues, Link, Local, LocalFile, Lock, Member, Retire, Revision, Store,
    StoreError, Stored, delta, local::Alone,
};
use crate::desired::model::{
    Desired, Name, Service,
    guard::{ListName, Part},
};
use futures_util::future::BoxFuture;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::UNIX_EPOCH,
};
use tokio::sync::watch;

/// Version of the file's contents. Raised when an older lbd could no longer read it.
pub const FORMAT: u64 = 1;

/// `format` and `head`.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Revision number → [`Record`] as JSON.
const REVISIONS: TableDefinition<u64, &[u8]> = TableDefinition::new("revisions");
/// Service name and the revision in which it became this → service as JSON.
const SERVICES: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("services");
/// Part of a list (as [`part_key`] writes it) and the revision in which it became this → part as JSON.
const LISTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("lists");
/// `id` of the data, and where it has gone (`moved`), if it has.
const NOTES: TableDefinition<&str, &str> = TableDefinition::new("notes");

/// A revision as it is written.
#[derive(Serialize, Deserialize)]
struct Record {
    author: String,
    time_ms: u64,
    message: String,
    /// Revision in which each service last changed.
    services: BTreeMap<Name, u64>,
    /// The same of each part of the deny and allow lists.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    lists: BTreeMap<String, u64>,
    /// All else of the state, see [`delta::rest`]; records of an lbd that stored nothing else have none.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    rest: Map<String, Value>,
}

/// Name of a list's part: `deny/4-0a0`.
fn part_key(list: ListName, part: &str) -> String {
    format!("{}/{part}", list.label())
}

impl Record {
    fn revision(&self, number: u64) -> Revision {
        let (author, message) = (self.author.clone(), self.message.clone());
        Revision { number, author, time_ms: self.time_ms, message }
    }
}

/// Desired state in one redb file, local state in another. Clones share them.
#[derive(Clone)]
pub struct RedbStore {
    inner: Arc<Inner>,
    alone: Arc<Alone>,
    local: LocalFile,
}

struct Inner {
    database: Database,
    file: PathBuf,
    id: Mutex<String>,
    keep: u64,
    /// Held from the look at `head` to its change: redb lets the next writer in before that.
    writing: Mutex<()>,
    head: watch::Sender<Stored>,
    link: watch::Sender<Link>,
    retired: Mutex<Retire>,
}

/// Everything that redb can say, with the file's name.
pub(super) fn failed(file: &Path, error: impl Into<redb::Error>) -> StoreError {
    let name = file.display().to_string();
    match error.into() {
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse { file: name },
        redb::Error::UpgradeRequired(version) => {
            StoreError::Corrupt { file: name, what: format!("redb file format {version} is not supported") }
        }
        redb::Error::Corrupted(what) => StoreError::Corrupt { file: name, what },
        redb::Error::Io(source) if source.kind() == std::io::ErrorKind::InvalidData => {
            StoreError::Corrupt { file: name, what: source.to_string() }
        }
        redb::Error::Io(source) if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            StoreError::Corrupt { file: name, what: "cut short".to_owned() }
        }
        redb::Error::Io(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            StoreError::Denied { file: name }
        }
        redb::Error::Io(source) => StoreError::Io { file: name, source },
        other @ (redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. }) => {
            StoreError::Corrupt { file: name, what: other.to_string() }
        }
        other => StoreError::Failed { file: name, what: other.to_string() },
    }
}

impl RedbStore {
    /// Opens or makes `lb.redb` in a directory, which is made if it is missing, and reads the newest state.
    /// Keeps `keep` revisions. Blocks.
    ///
    /// # Errors
    /// The file is in use, newer, damaged, or cannot be written; it is left as it is.
    pub fn open(directory: &Path, keep: u64) -> Result<Self, StoreError> {
        Self::beside(LocalFile::open(directory)?, directory, keep)
    }

    /// The same, where what belongs to this host is open already.
    ///
    /// # Errors
    /// As [`RedbStore::open`].
    pub fn beside(local: LocalFile, directory: &Path, keep: u64) -> Result<Self, StoreError> {
        std::fs::create_dir_all(directory).map_err(|e| failed(directory, redb::Error::Io(e)))?;
        let file = directory.join("lb.redb");
        let (database, stored, id, moved) = guarded(&file, || {
            let (database, fresh) = open(&file)?;
            if fresh {
                prepare(&database).map_err(|e| failed(&file, e))?;
            }
            let stored = read_head(&database, &file)?;
            let (id, moved) = notes(&database).map_err(|e| failed(&file, e))?;
            Ok((database, stored, id, moved))
        })?;
        let now_ms = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let link = Link {
            engine: "redb".to_owned(),
            place: file.display().to_string(),
            connected: true,
            since_ms: now_ms as u64,
            contact_ms: now_ms as u64,
            problem: None,
            set_back: None,
        };
        let inner = Inner {
            database,
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

    /// What belongs to this host alone.
    pub fn local(&self) -> LocalFile {
        self.local.clone()
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.inner.file
    }

    /// Whether it takes changes.
    #[cfg(test)]
    pub(crate) fn retired(&self) -> Retire {
        self.inner.retired.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs blocking work off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(result) => result,
            Err(e) => {
                Err(StoreError::Failed { file: self.inner.file.display().to_string(), what: e.to_string() })
            }
        }
    }
}

/// Opens a file, or makes it; says whether it was made. An unfinished first start leaves an empty file;
/// anything else that is no store is left as it is.
pub(super) fn open(file: &Path) -> Result<(Database, bool), StoreError> {
    let fresh = std::fs::metadata(file).map_or(true, |m| m.len() == 0);
    let opened = if fresh { Database::create(file) } else { Database::open(file) };
    let mut database = opened.map_err(|e| failed(file, e))?;
    if !fresh && !database.check_integrity().map_err(|e| failed(file, e))? {
        tracing::warn!(file = %file.display(), "store was not closed cleanly, and has been repaired");
    }
    Ok((database, fresh))
}

/// redb asserts in places where a damaged file contradicts itself: that is damage too, and must not take
/// the process down without a word.
pub(super) fn guarded<T>(file: &Path, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(StoreError::Corrupt { file: file.display().to_string(), what: "contradicts itself".to_owned() })
    })
}

fn prepare(database: &Database) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut meta = write.open_table(META)?;
        meta.insert("format", FORMAT)?;
        meta.insert("head", 0)?;
        write.open_table(REVISIONS)?;
        write.open_table(SERVICES)?;
    }
    write.commit()?;
    Ok(())
}

/// Id of the data, made if there is none yet, and where they have gone.
fn notes(database: &Database) -> Result<(String, Option<String>), redb::Error> {
    let write = database.begin_write()?;
    let found = {
        let mut notes = write.open_table(NOTES)?;
        let moved = notes.get("moved")?.map(|v| v.value().to_owned());
        let id = notes.get("id")?.map(|v| v.value().to_owned());
        let id = match id {
            Some(id) => id,
            None => {
                let id = super::new_id();
                notes.insert("id", &*id)?;
                id
            }
        };
        (id, moved)
    };
    write.commit()?;
    Ok(found)
}

fn read_head(database: &Database, file: &Path) -> Result<Stored, StoreError> {
    let corrupt = |what: String| StoreError::Corrupt { file: file.display().to_string(), what };
    let read = database.begin_read().map_err(|e| failed(file, e))?;
    let meta = match read.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Err(corrupt("no lbd store".to_owned())),
        other => other.map_err(|e| failed(file, e))?,
    };
    let number = |key: &str| {
        let value = meta.get(key).map_err(|e| failed(file, e))?;
        value.map(|v| v.value()).ok_or_else(|| corrupt(format!("{key} is missing")))
    };
    let format = number("format")?;
    if format > FORMAT {
        return Err(StoreError::Newer { file: file.display().to_string(), found: format, known: FORMAT });
    }
    read_revision(&read, file, number("head")?)?
        .ok_or_else(|| corrupt("newest revision is missing".to_owned()))
}

fn zero() -> Stored {
    let revision = Revision { number: 0, author: String::new(), time_ms: 0, message: String::new() };
    Stored { revision, desired: Arc::default() }
}

fn read_revision(
    read: &redb::ReadTransaction,
    file: &Path,
    number: u64,
) -> Result<Option<Stored>, StoreError> {
    if number == 0 {
        return Ok(Some(zero()));
    }
    let corrupt = |what: String| StoreError::Corrupt { file: file.display().to_string(), what };
    let revisions = read.open_table(REVISIONS).map_err(|e| failed(file, e))?;
    let Some(bytes) = revisions.get(number).map_err(|e| failed(file, e))? else { return Ok(None) };
    let record: Record =
        serde_json::from_slice(bytes.value()).map_err(|e| corrupt(format!("revision {number}: {e}")))?;
    let table = read.open_table(SERVICES).map_err(|e| failed(file, e))?;
    let mut desired: Desired = serde_json::from_value(Value::Object(record.rest.clone()))
        .map_err(|e| corrupt(format!("revision {number}: {e}")))?;
    for (name, since) in &record.services {
        let bytes = table.get((name.as_str(), *since)).map_err(|e| failed(file, e))?;
        let bytes = bytes.ok_or_else(|| corrupt(format!("revision {number}: service {name} is missing")))?;
        let service: Service = serde_json::from_slice(bytes.value())
            .map_err(|e| corrupt(format!("revision {number}: service {name}: {e}")))?;
        desired.services.insert(name.clone(), service.into());
    }
    read_lists(read, file, number, &record.lists, &mut desired)?;
    Ok(Some(Stored { revision: record.revision(number), desired: Arc::new(desired) }))
}

/// Reads the parts of a revision's lists.
fn read_lists(
    read: &redb::ReadTransaction,
    file: &Path,
    number: u64,
    lists: &BTreeMap<String, u64>,
    desired: &mut Desired,
) -> Result<(), StoreError> {
    if lists.is_empty() {
        return Ok(());
    }
    let corrupt = |what: String| StoreError::Corrupt { file: file.display().to_string(), what };
    let table = read.open_table(LISTS).map_err(|e| failed(file, e))?;
    for (key, since) in lists {
        let bytes = table.get((key.as_str(), *since)).map_err(|e| failed(file, e))?;
        let bytes = bytes.ok_or_else(|| corrupt(format!("revision {number}: list part {key} is missing")))?;
        let part: Part = serde_json::from_slice(bytes.value())
            .map_err(|e| corrupt(format!("revision {number}: list part {key}: {e}")))?;
        let found = ListName::ALL.into_iter().find_map(|list| {
            let name = key.strip_prefix(list.label())?.strip_prefix('/')?;
            Some((list, name))
        });
        let (list, name) = found.ok_or_else(|| corrupt(format!("revision {number}: list part {key}")))?;
        desired.guard.list_mut(list).0.insert(name.to_owned(), part.into());
    }
    Ok(())
}

impl Inner {
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
    ) -> Result<Option<Record>, StoreError> {
        let Some(bytes) = table.get(number).map_err(|e| self.failed(e))? else { return Ok(None) };
        serde_json::from_slice(bytes.value()).map(Some).map_err(|e| StoreError::Corrupt {
            file: self.file.display().to_string(),
            what: format!("revision {number}: {e}"),
        })
    }

    fn commit(&self, commit: Commit) -> Result<Stored, StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let write = self.database.begin_write().map_err(|e| self.failed(e))?;
        let head = self.head.borrow().clone();
        let found = head.revision.number;
        if found != commit.expected {
            return Err(StoreError::Conflict { expected: commit.expected, found });
        }
        self.must_be_in_use()?;
        let number = found + 1;
        let time_ms = commit.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let revision = Revision { number, author: commit.author, time_ms, message: commit.message };
        let stored = Stored { revision, desired: commit.desired };
        self.append(&write, &head.desired, &stored)?;
        write.commit().map_err(|e| self.failed(e))?;
        self.head.send_replace(stored.clone());
        Ok(stored)
    }

    /// Writes a revision after another, whose state is `before`.
    fn append(
        &self,
        write: &redb::WriteTransaction,
        before: &Desired,
        stored: &Stored,
    ) -> Result<(), StoreError> {
        let Stored { revision, desired } = stored;
        // A new field is in `rest`, unless it is taken out there; then this does not compile.
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
        let (author, message) = (revision.author.clone(), revision.message.clone());
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
        let record = Record { author, time_ms: revision.time_ms, message, services, lists, rest };
        revisions.insert(number, &*self.json(&record)?).map_err(|e| self.failed(e))?;
        self.prune(&mut revisions, &mut table, &mut list_table, number)?;
        let mut meta = write.open_table(META).map_err(|e| self.failed(e))?;
        meta.insert("head", number).map_err(|e| self.failed(e))?;
        Ok(())
    }

    /// Refuses what a store that is, or is being, migrated does not take.
    fn must_be_in_use(&self) -> Result<(), StoreError> {
        let store = self.file.display().to_string();
        match self.retired.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Retire::Back => Ok(()),
            Retire::Moving(to) => Err(StoreError::Moving { store, to }),
            Retire::Moved(to) => Err(StoreError::Moved { store, to }),
        }
    }

    fn import(&self, id: Option<String>, all: Vec<Stored>) -> Result<(), StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.must_be_in_use()?;
        let count = self.head.borrow().revision.number;
        if count > 0 {
            return Err(StoreError::NotEmpty { store: self.file.display().to_string(), count });
        }
        let write = self.database.begin_write().map_err(|e| self.failed(e))?;
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
    }

    fn retire(&self, how: Retire) -> Result<(), StoreError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let note = |to: Option<&str>| -> Result<(), redb::Error> {
            let write = self.database.begin_write()?;
            match to {
                Some(to) => write.open_table(NOTES)?.insert("moved", to)?.map(drop),
                None => write.open_table(NOTES)?.remove("moved")?.map(drop),
            };
            Ok(write.commit()?)
        };
        match &how {
            // Only this process writes to the file, so it need not outlive it.
            Retire::Moving(_) => self.must_be_in_use()?,
            Retire::Moved(to) => note(Some(to)).map_err(|e| self.failed(e))?,
            Retire::Back if self.must_be_in_use().is_ok() => {
                return Err(StoreError::NotMoved { store: self.file.display().to_string() });
            }
            Retire::Back => note(None).map_err(|e| self.failed(e))?,
        }
        *self.retired.lock().unwrap_or_else(PoisonError::into_inner) = how;
        Ok(())
    }

    /// Forgets revisions beyond those to keep, and services that only they named.
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
            let of = |record: Option<Record>| record.map(|r| (r.services, r.lists)).unwrap_or_default();
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
        let read = self.database.begin_read().map_err(|e| self.failed(e))?;
        let revisions = read.open_table(REVISIONS).map_err(|e| self.failed(e))?;
        let oldest = revisions.first().map_err(|e| self.failed(e))?.map_or(0, |(k, _)| k.value());
        // Revision 0 is empty by definition, but where later ones were forgotten it is history too.
        let found = if number == 0 && oldest > 1 { None } else { read_revision(&read, &self.file, number)? };
        let newest = self.head.borrow().revision.number;
        found.ok_or(StoreError::NoRevision { number, oldest, newest })
    }

    fn history(&self, before: Option<u64>, limit: usize) -> Result<Vec<Revision>, StoreError> {
        let read = self.database.begin_read().map_err(|e| self.failed(e))?;
        let table = read.open_table(REVISIONS).map_err(|e| self.failed(e))?;
        let range = table.range(0..before.unwrap_or(u64::MAX)).map_err(|e| self.failed(e))?;
        let mut found = Vec::new();
        for entry in range.rev().take(limit) {
            let (number, bytes) = entry.map_err(|e| self.failed(e))?;
            let number = number.value();
            let record: Record = serde_json::from_slice(bytes.value()).map_err(|e| StoreError::Corrupt {
                file: self.file.display().to_string(),
                what: format!("revision {number}: {e}"),
            })?;
            found.push(record.revision(number));
        }
        Ok(found)
    }
}

impl Store for RedbStore {
    fn watch(&self) -> watch::Receiver<Stored> {
        self.inner.head.subscribe()
    }

    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(self.blocking(move |inner| inner.commit(commit)))
    }

    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(self.blocking(move |inner| inner.get(number)))
    }

    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        Box::pin(self.blocking(move |inner| inner.history(before, limit)))
    }

    fn link(&self) -> watch::Receiver<Link> {
        self.inner.link.subscribe()
    }

    fn about(&self) -> BoxFuture<'_, About> {
        let place = self.inner.file.display().to_string();
        let size_bytes = std::fs::metadata(&self.inner.file).map_or(0, |m| m.len());
        let member = Member {
            name: "this host".to_owned(),
            address: place.clone(),
            healthy: true,
            leader: true,
            version: format!("format {FORMAT}"),
            size_bytes,
            problem: None,
        };
        let id = self.inner.id.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let about = About { engine: "redb".to_owned(), place, id, members: vec![member] };
        Box::pin(async { about })
    }

    fn import(&self, id: Option<String>, revisions: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.blocking(move |inner| inner.import(id, revisions)))
    }

    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.blocking(move |inner| inner.retire(how)))
    }

    /// A file is never set back behind the daemon that has it open.
    fn accept(&self, _: u64) -> Result<(), StoreError> {
        let number = self.inner.head.borrow().revision.number;
        Err(StoreError::NothingToAccept { why: format!("this host works by the store's revision {number}") })
    }

    fn tell(&self, key: &str, value: Option<Vec<u8>>) {
        self.alone.tell(key, value);
    }

    fn told(&self) -> watch::Receiver<HostValues> {
        self.alone.told()
    }

    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>> {
        Box::pin(self.alone.lock(claim))
    }

    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.alone.unlock(name, token))
    }

    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>> {
        Box::pin(self.alone.locks())
    }
}

impl Local for RedbStore {
    fn load(&self, key: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>> {
        self.local.load(key)
    }

    fn save(&self, key: &'static str, value: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>> {
        self.local.save(key, value)
    }
}
