//! Tables and records of the store's file, and how they are read.

use super::{
    super::{Revision, StoreError, Stored, new_id},
    FORMAT,
};
use crate::desired::model::{
    Desired, Name, Service,
    guard::{ListName, Part},
};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::Path, sync::Arc};

/// Keys `format` and `head`.
pub(super) const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Revision number → [`RevisionRecord`] as JSON.
pub(super) const REVISIONS: TableDefinition<u64, &[u8]> = TableDefinition::new("revisions");
/// Service name and the revision of its last change → service as JSON.
pub(super) const SERVICES: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("services");
/// Part of a list (as [`part_key`] formats it) and the revision of its last change → part as JSON.
pub(super) const LISTS: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("lists");
/// `id` of the data, and the address that they were migrated to (`moved`), if any.
pub(super) const NOTES: TableDefinition<&str, &str> = TableDefinition::new("notes");

/// Stored form of a revision.
#[derive(Serialize, Deserialize)]
pub(super) struct RevisionRecord {
    pub author: String,
    pub time_ms: u64,
    pub message: String,
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

impl RevisionRecord {
    pub fn revision(&self, number: u64) -> Revision {
        let (author, message) = (self.author.clone(), self.message.clone());
        Revision { number, author, time_ms: self.time_ms, message }
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
        other @ (redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. }) => {
            StoreError::Corrupt { file: name, what: other.to_string() }
        }
        other => StoreError::Failed { file: name, what: other.to_string() },
    }
}

/// Opens a file, or creates it; the second value tells whether it was created. An unfinished first start leaves an empty
/// file; any other file that is not a store is left as it is.
pub(in super::super) fn open(file: &Path) -> Result<(Database, bool), StoreError> {
    let fresh = std::fs::metadata(file).map_or(true, |m| m.len() == 0);
    let opened = if fresh { Database::create(file) } else { Database::open(file) };
    let mut database = opened.map_err(|e| failed(file, e))?;
    if !fresh && !database.check_integrity().map_err(|e| failed(file, e))? {
        tracing::warn!(file = %file.display(), "the store was not closed cleanly; it has been repaired");
    }
    Ok((database, fresh))
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

/// Reads the id of the data, generating it if there is none yet, and the address that they were migrated to.
pub(super) fn notes(database: &Database) -> Result<(String, Option<String>), redb::Error> {
    let write = database.begin_write()?;
    let found = {
        let mut notes = write.open_table(NOTES)?;
        let moved = notes.get("moved")?.map(|v| v.value().to_owned());
        let id = notes.get("id")?.map(|v| v.value().to_owned());
        let id = match id {
            Some(id) => id,
            None => {
                let id = new_id();
                notes.insert("id", &*id)?;
                id
            }
        };
        (id, moved)
    };
    write.commit()?;
    Ok(found)
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
    let revision = Revision { number: 0, author: String::new(), time_ms: 0, message: String::new() };
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
    let record: RevisionRecord =
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
