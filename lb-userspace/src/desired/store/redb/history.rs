//! The list of revisions, of all changes or of those that concern one service.

use super::{
    RedbInner,
    file::{FileRevision, REVISIONS},
};
use crate::desired::{
    model::Name,
    store::{Revision, ServiceHistory, StoreError},
};
use redb::{Database, ReadableDatabase};

impl RedbInner {
    pub(super) fn history(&self, before: Option<u64>, limit: usize) -> Result<Vec<Revision>, StoreError> {
        self.with(|database| self.read_history(database, before, limit))
    }

    pub(super) fn history_of(
        &self,
        service: &Name,
        before: Option<u64>,
        scan: usize,
    ) -> Result<ServiceHistory, StoreError> {
        self.with(|database| {
            let read = database.begin_read().map_err(|e| self.failed(e))?;
            let table = read.open_table(REVISIONS).map_err(|e| self.failed(e))?;
            let range = table.range(0..before.unwrap_or(u64::MAX)).map_err(|e| self.failed(e))?;
            let mut found = Vec::new();
            // A removal shows only in the difference to the revision before.
            let mut later: Option<(u64, FileRevision)> = None;
            // One more than asked for, to compare the oldest with.
            for (i, entry) in range.rev().take(scan + 1).enumerate() {
                let (number, bytes) = entry.map_err(|e| self.failed(e))?;
                let record = self.parse(number.value(), bytes.value())?;
                if let Some((number, later)) = &later
                    && later.services.get(service) != record.services.get(service)
                {
                    found.push(later.revision(*number));
                }
                if i == scan {
                    return Ok((found, Some(number.value() + 1)));
                }
                later = Some((number.value(), record));
            }
            // Before revision 1 the state was empty.
            if let Some((1, first)) = &later
                && first.services.contains_key(service)
            {
                found.push(first.revision(1));
            }
            Ok((found, None))
        })
    }

    fn read_history(
        &self,
        database: &Database,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Revision>, StoreError> {
        let read = database.begin_read().map_err(|e| self.failed(e))?;
        let table = read.open_table(REVISIONS).map_err(|e| self.failed(e))?;
        let range = table.range(0..before.unwrap_or(u64::MAX)).map_err(|e| self.failed(e))?;
        let mut found = Vec::new();
        for entry in range.rev().take(limit) {
            let (number, bytes) = entry.map_err(|e| self.failed(e))?;
            let number = number.value();
            found.push(self.parse(number, bytes.value())?.revision(number));
        }
        Ok(found)
    }
}
