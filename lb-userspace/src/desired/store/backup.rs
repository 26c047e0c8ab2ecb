//! Backup of a store's revisions in one file, with a version and a checksum.
//!
//! The first line is a JSON object that describes the rest ([`Header`]); the rest is the [`Backup`] as
//! JSON, each revision as the difference to the previous one. Input: a store, or a file's bytes. Output: the
//! bytes, or the revisions, or an error. Called by the API and by `lbctl store`.

use super::{Revision, Store, StoreError, Stored, delta};
use crate::desired::model::Desired;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// Version of the file's contents. Increased when an older lbd could no longer read it.
pub const FORMAT: u64 = 1;

/// First line of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT`] of the writer.
    pub lb_backup: u64,
    /// Number of bytes after this line.
    pub bytes: u64,
    /// SHA-256 of these bytes, hexadecimal.
    pub sha256: String,
    /// Newest revision.
    pub revision: u64,
}

/// All kept revisions of a store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// Id of the store.
    pub store: String,
    /// Time of the backup, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Revisions, oldest first.
    pub revisions: Vec<BackupEntry>,
}

/// A revision of a backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupEntry {
    /// Number, author, time and message.
    pub revision: Revision,
    /// Difference to the previous state (for the first revision, to the empty state), see [`delta`].
    pub delta: Value,
}

fn invalid(file: &str, what: impl ToString) -> StoreError {
    StoreError::Backup { file: file.to_owned(), what: what.to_string() }
}

impl Backup {
    /// Reads all kept revisions, oldest first.
    ///
    /// # Errors
    /// Reading fails.
    pub async fn of(store: &dyn Store, time_ms: u64) -> Result<Self, StoreError> {
        let mut before = Arc::<Desired>::default();
        let mut entries = Vec::new();
        let entry = |stored: Stored| -> Result<(), StoreError> {
            let delta = delta::diff(&before, &stored.desired).map_err(|e| invalid("the backup", e))?;
            entries.push(BackupEntry { revision: stored.revision, delta });
            before = stored.desired;
            Ok(())
        };
        each_revision(store, entry).await?;
        Ok(Self { store: store.about().await.id, time_ms, revisions: entries })
    }

    /// Serializes the file.
    ///
    /// # Errors
    /// The state has no JSON form, which does not happen.
    pub fn to_bytes(&self) -> serde_json::Result<Vec<u8>> {
        let body = serde_json::to_vec(self)?;
        let header = Header {
            lb_backup: FORMAT,
            bytes: body.len() as u64,
            sha256: sha256(&body),
            revision: self.revisions.last().map_or(0, |e| e.revision.number),
        };
        let mut bytes = serde_json::to_vec(&header)?;
        bytes.push(b'\n');
        bytes.extend(body);
        Ok(bytes)
    }

    /// Parses a file's bytes; `file` is its name, for errors.
    ///
    /// # Errors
    /// The file is not a backup, has a later format, is truncated, or was changed.
    pub fn parse(file: &str, bytes: &[u8]) -> Result<Self, StoreError> {
        let line = bytes.iter().position(|b| *b == b'\n').unwrap_or(bytes.len());
        let header: Value = serde_json::from_slice(&bytes[..line])
            .map_err(|_| invalid(file, "its first line is not that of a backup"))?;
        match header.get("lb_backup").and_then(Value::as_u64) {
            None => return Err(invalid(file, "its first line is not that of a backup")),
            Some(found) if found > FORMAT => {
                return Err(StoreError::Newer { file: file.to_owned(), found, known: FORMAT });
            }
            Some(_) => {}
        }
        let header: Header =
            serde_json::from_value(header).map_err(|e| invalid(file, format!("first line: {e}")))?;
        let body = bytes.get(line + 1..).unwrap_or_default();
        if body.len() as u64 != header.bytes {
            let what = format!("{} bytes should follow the first line, but {} do", header.bytes, body.len());
            return Err(invalid(file, what));
        }
        if sha256(body) != header.sha256 {
            return Err(invalid(file, "its checksum is wrong: the file was changed"));
        }
        let backup: Self = serde_json::from_slice(body).map_err(|e| invalid(file, e))?;
        backup.stored(file)?;
        Ok(backup)
    }

    /// Returns the revisions with their states, oldest first.
    ///
    /// # Errors
    /// The revisions are not consecutive, or a state is invalid.
    pub fn stored(&self, file: &str) -> Result<Vec<Stored>, StoreError> {
        let mut before = Arc::<Desired>::default();
        let mut all: Vec<Stored> = Vec::with_capacity(self.revisions.len());
        for BackupEntry { revision, delta } in &self.revisions {
            let number = revision.number;
            if number == 0 || all.last().is_some_and(|last| last.revision.number + 1 != number) {
                return Err(invalid(file, format!("revision {number} does not follow the previous one")));
            }
            let desired =
                delta::apply(&before, delta).map_err(|e| invalid(file, format!("revision {number}: {e}")))?;
            before = Arc::new(desired);
            all.push(Stored { revision: revision.clone(), desired: before.clone() });
        }
        if let Some(last) = all.last() {
            let broken = last.desired.check();
            if let Some(rule) = broken.first() {
                return Err(invalid(file, format!("revision {}: {rule}", last.revision.number)));
            }
        }
        Ok(all)
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// Reads all kept revisions with their states, oldest first. Revisions share what they have in common.
///
/// # Errors
/// Reading fails.
pub async fn revisions(store: &dyn Store) -> Result<Vec<Stored>, StoreError> {
    let mut all = Vec::new();
    each_revision(store, |stored| {
        all.push(stored);
        Ok(())
    })
    .await?;
    Ok(all)
}

/// Reads all kept revisions one by one, oldest first.
async fn each_revision(
    store: &dyn Store,
    mut take: impl FnMut(Stored) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let newest = store.head().revision.number;
    let mut numbers: Vec<u64> = Vec::new();
    loop {
        let page = store.history(numbers.last().copied().or(Some(newest + 1)), 500).await?;
        if page.is_empty() {
            break;
        }
        numbers.extend(page.iter().map(|r| r.number).filter(|n| *n > 0));
        if page.len() < 500 {
            break;
        }
    }
    let mut before: Option<Arc<Desired>> = None;
    for number in numbers.into_iter().rev() {
        let Stored { revision, mut desired } = match store.get(number).await {
            Ok(stored) => stored,
            // Removed since the list was read.
            Err(StoreError::NoRevision { .. }) if before.is_none() => continue,
            Err(error) => return Err(error),
        };
        if let Some(before) = &before {
            Arc::make_mut(&mut desired).share(before);
        }
        before = Some(desired.clone());
        take(Stored { revision, desired })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn backup() -> Backup {
        let revision = |number| Revision {
            number,
            author: "ann".into(),
            time_ms: number,
            message: "m".into(),
            summary: None,
        };
        let web = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp"});
        let entries = vec![
            BackupEntry { revision: revision(3), delta: json!({"services": {"web": web}}) },
            BackupEntry { revision: revision(4), delta: json!({"services": {"web": {"port": 81}}}) },
        ];
        Backup { store: "0123".into(), time_ms: 7, revisions: entries }
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = backup().to_bytes().unwrap();
        let read = Backup::parse("f", &bytes).unwrap();
        assert_eq!(read, backup());
        let stored = read.stored("f").unwrap();
        assert_eq!(stored.iter().map(|s| s.revision.number).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(stored[1].desired.services.len(), 1);
    }

    #[test]
    fn broken_and_newer_files_are_refused_by_name() {
        let sound = backup().to_bytes().unwrap();
        let refused = |bytes: &[u8], why: &str| {
            let error = Backup::parse("lb.backup", bytes).unwrap_err().to_string();
            assert!(error.contains("lb.backup") && error.contains(why), "{error}");
        };
        refused(b"", "first line");
        refused(b"{\"services\": []}\n{}", "first line");
        refused(&sound[..sound.len() - 10], "bytes should follow");
        let mut changed = sound.clone();
        let at = sound.len() - 20;
        changed[at] ^= 1;
        refused(&changed, "checksum");
        let newer = String::from_utf8(sound).unwrap().replace("\"lb_backup\":1", "\"lb_backup\":9");
        refused(newer.as_bytes(), "format 9, but this lbd supports formats up to 1");
        let mut gap = backup();
        gap.revisions[1].revision.number = 9;
        refused(&gap.to_bytes().unwrap(), "revision 9 does not follow");
    }
}
