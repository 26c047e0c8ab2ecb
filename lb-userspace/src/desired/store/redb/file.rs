//! Tables and records of the store's file, and how they are read.

use super::{
    super::{Revision, StoreError, Stored, disk::Disk},
    FORMAT,
};
use crate::desired::model::{
    Desired, Name, Service,
    guard::{ListName, Part},
};
use redb::{Database, ReadableDatabase, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

/// Keys `format` and `head`.
pub(super) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Revision number → [`FileRevision`] as JSON.
pub(super) const REVISIONS: TableDefinition<u64, &[u8]> = TableDefinition::new("revisions");
/// Service name and the revision of its last change → service as JSON.
pub(super) const SERVICES: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("services");
/// Part of a list (as [`part_key`] formats it) and the revision of its last change → part as JSON.
pub(super) const LISTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("lists");
/// `id` of the data, and the address that they were migrated to (`moved`), if any.
pub(super) const NOTES: TableDefinition<&str, &str> = TableDefinition::new("notes");

/// Stored form of a revision.
#[derive(Serialize, Deserialize)]
pub(super) struct FileRevision {
    pub author: String,
    pub time_ms: u64,
    pub message: String,
    /// Absent in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Revision in which each service last changed.
    pub services: BTreeMap<Name, u64>,
    /// Revision in which each part of the deny and allow lists last changed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lists: BTreeMap<String, u64>,
    /// The rest of the state, see [`crate::desired::store::delta::rest`]; absent in records of an lbd that had no other fields.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub rest: Map<String, Value>,
}

/// Key of a list's part: `deny/4-0a0`.
pub(super) fn part_key(list: ListName, part: &str) -> String {
    format!("{}/{part}", list.label())
}

impl FileRevision {
    pub fn revision(&self, number: u64) -> Revision {
        let (author, message, summary) = (self.author.clone(), self.message.clone(), self.summary.clone());
        Revision { number, author, time_ms: self.time_ms, message, summary }
    }
}

/// Converts an error of redb, adding the name of the file.
pub(in super::super) fn failed(file: &Path, error: impl Into<redb::Error>) -> StoreError {
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
            StoreError::Corrupt { file: name, what: "truncated".to_owned() }
        }
        redb::Error::Io(source) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            StoreError::Denied { file: name }
        }
        redb::Error::Io(source) => StoreError::Io { file: name, source },
        redb::Error::PreviousIo => {
            StoreError::Io { file: name, source: io::Error::other("an earlier read or write failed") }
        }
        other @ (redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. }) => {
            StoreError::Corrupt { file: name, what: other.to_string() }
        }
        other => StoreError::Failed { file: name, what: other.to_string() },
    }
}

/// Opens a file, or creates it with the contents that `prepare` writes. A new file gets its name when it is complete, so
/// that a start or a migration on a full disk leaves none that is incomplete; any other file that is not a store is left
/// as it is.
pub(in super::super) fn open(
    disk: &dyn Disk,
    file: &Path,
    prepare: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<Database, StoreError> {
    let io_failed = |e: io::Error| failed(file, redb::Error::Io(e));
    let directory = file.parent().unwrap_or(Path::new("."));
    // Two processes that start at once must not replace each other's file. A file system without locks on directories
    // (NFS) goes without this protection.
    let turn = std::fs::File::open(directory).map_err(io_failed)?;
    let _ = turn.lock();
    let new = file.with_extension("redb.new");
    // Left by a process that ended while it created the file.
    remove_if_there(&new).map_err(io_failed)?;
    // Earlier versions could leave an empty file.
    let is_missing = std::fs::metadata(file).map_or(true, |m| m.len() == 0);
    if !is_missing {
        let mut database = disk.open(file).map_err(|e| failed(file, e))?;
        if !database.check_integrity().map_err(|e| failed(file, e))? {
            tracing::warn!(file = %file.display(), "the store was not closed cleanly; it has been repaired");
        }
        return Ok(database);
    }
    let create = || -> Result<Database, redb::Error> {
        let database = disk.create(&new)?;
        prepare(&database)?;
        std::fs::rename(&new, file)?;
        turn.sync_all()?;
        Ok(database)
    };
    create().map_err(|error| {
        // The space may be needed for the next attempt.
        let _ = remove_if_there(&new);
        failed(file, error)
    })
}

fn remove_if_there(file: &Path) -> io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A database that is opened again after an I/O failure, because redb refuses all transactions after one.
pub(in super::super) struct Reopening {
    disk: Arc<dyn Disk>,
    file: PathBuf,
    /// None after a failure, until the next request.
    database: RwLock<Option<Database>>,
}

impl Reopening {
    pub fn new(disk: Arc<dyn Disk>, file: PathBuf, database: Database) -> Self {
        Self { disk, file, database: RwLock::new(Some(database)) }
    }

    pub fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Runs a request. `reread` is called before the first request after the file was opened again: a write that
    /// reported a failure may have been stored.
    pub fn with<T>(
        &self,
        reread: impl Fn(&Database) -> Result<(), StoreError>,
        request: impl FnOnce(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let result = loop {
            if let Some(database) = &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
                break request(database);
            }
            let mut slot = self.database.write().unwrap_or_else(PoisonError::into_inner);
            if slot.is_none() {
                *slot = Some(guarded(&self.file, || {
                    let database = self.disk.open(&self.file).map_err(|e| failed(&self.file, e))?;
                    reread(&database)?;
                    Ok(database)
                })?);
            }
        };
        if matches!(result, Err(StoreError::Io { .. })) {
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        result
    }
}

/// Turns panics of redb into errors: it asserts where a damaged file is inconsistent, and that must not
/// end the process without a message.
pub(in super::super) fn guarded<T>(
    file: &Path,
    work: impl FnOnce() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(StoreError::Corrupt { file: file.display().to_string(), what: "it is inconsistent".to_owned() })
    })
}

pub(super) fn prepare(database: &Database) -> Result<(), redb::Error> {
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

/// Reads the id of the data, if there is one yet, and the address that they were migrated to.
pub(super) fn read_notes(database: &Database) -> Result<(Option<String>, Option<String>), redb::Error> {
    let notes = match database.begin_read()?.open_table(NOTES) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok((None, None)),
        other => other?,
    };
    let text = |key: &str| -> Result<Option<String>, redb::Error> {
        Ok(notes.get(key)?.map(|v| v.value().to_owned()))
    };
    Ok((text("id")?, text("moved")?))
}

/// Writes the id of the data.
pub(super) fn write_id(database: &Database, id: &str) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    write.open_table(NOTES)?.insert("id", id)?;
    Ok(write.commit()?)
}

pub(super) fn read_head(database: &Database, file: &Path) -> Result<Stored, StoreError> {
    let corrupt = |what: String| StoreError::Corrupt { file: file.display().to_string(), what };
    let read = database.begin_read().map_err(|e| failed(file, e))?;
    let meta = match read.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => {
            return Err(corrupt("it is not a store of lbd".to_owned()));
        }
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
    let revision =
        Revision { number: 0, author: String::new(), time_ms: 0, message: String::new(), summary: None };
    Stored { revision, desired: Arc::default() }
}

pub(super) fn read_revision(
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
    let record: FileRevision =
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
