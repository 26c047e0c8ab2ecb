//! What a watch of the store tells, key by key, and what follows from it for what this host believes.

use super::{
    Arc, Inner, Known, StoreError,
    follow::End,
    keys::{Head, Record},
    locked,
    proto::{KeyValue, WatchResponse},
};
use std::collections::BTreeMap;

/// What the watch has told so far.
pub(super) struct Seen {
    /// etcd's revision at which the head was last looked at.
    pub(super) at: i64,
    /// Records that no head has named yet, with their sizes in bytes: those of a commit become part of the history with
    /// its head, and an import that is cut short leaves some that never do.
    pub(super) records: BTreeMap<u64, (Record, usize)>,
}

impl Inner {
    /// Takes in what the watch says. Every key of the layout in [`super::keys`] has its place here: what is believed of
    /// it must not outlive it.
    pub(super) async fn watched(&self, message: WatchResponse, seen: &mut Seen) -> Result<(), End> {
        if message.canceled {
            let why = format!("what follows {} was compacted away", message.compact_revision);
            return Err(End::Again(why));
        }
        let mut told = None;
        for event in message.events {
            let Some(kv) = event.kv else { continue };
            let is_put = event.kind == 0;
            if let Some(key) = self.keys.after("leased/", &kv.key) {
                let told = told.get_or_insert_with(|| (**self.told.borrow()).clone());
                match is_put {
                    true => told.insert(key.to_owned(), kv.value),
                    false => told.remove(key),
                };
            } else if self.keys.after("revisions/", &kv.key).is_some() && is_put {
                let (number, record) = self.record(&kv)?;
                self.forget_other(number, &record);
                seen.records.insert(number, (record, kv.value.len()));
            } else if self.keys.after("head", &kv.key) == Some("") {
                self.head_changed(&kv, is_put, seen).await?;
            } else if self.keys.after("store", &kv.key) == Some("") {
                return Err(End::Again("the store's identity was written".to_owned()));
            }
            // Nothing is remembered of the rest (`snapshots/`, `parts/`, `moved`, `locks/`): it is read when it is needed.
        }
        if let Some(told) = told {
            self.told.send_replace(Arc::new(told));
        }
        Ok(())
    }

    /// Follows the head to where it is now. A commit writes the head with its record, which the watch has told before;
    /// any other change is looked at in the store, because what it means depends on more than this event.
    async fn head_changed(&self, kv: &KeyValue, is_put: bool, seen: &mut Seen) -> Result<(), End> {
        let head = if is_put { self.parse_head(kv)? } else { Head::default() };
        if kv.mod_revision > seen.at && head != self.known().head() {
            match self.fold_seen(&head, seen).await? {
                Some(new) => self.advance(new, false),
                // As a rule a commit of this host, with another after it.
                None => seen.at = self.catch_up().await?,
            }
        }
        seen.records.retain(|number, _| *number > head.number);
        Ok(())
    }

    /// The revisions from the known one to this head, from records that the watch has told; none if it has not told all of
    /// them, or they are of another history.
    async fn fold_seen(&self, head: &Head, seen: &Seen) -> Result<Option<Vec<Known>>, StoreError> {
        let mut last = self.known();
        let mut all = Vec::new();
        while last.stored.revision.number < head.number {
            let number = last.stored.revision.number + 1;
            let Some((record, bytes)) = seen.records.get(&number) else { return Ok(None) };
            if record.after != last.nonce {
                return Ok(None);
            }
            last = self.fold(&last, number, record, *bytes).await?;
            all.push(last.clone());
        }
        Ok((last.head() == *head).then_some(all))
    }

    /// Forgets a remembered revision before the head in whose place another record was written; the head's own is taken
    /// care of with the head.
    fn forget_other(&self, number: u64, record: &Record) {
        let mut recent = locked(&self.recent);
        let is_last = recent.keys().next_back() == Some(&number);
        if !is_last && recent.get(&number).is_some_and(|known| known.nonce != record.nonce) {
            recent.remove(&number);
        }
    }

    /// Whether the head that was just read is the known one, or one that was passed since `before` was the newest known.
    pub(super) fn is_in_step(&self, before: u64, head: &Head) -> bool {
        if *head == self.known().head() {
            return true;
        }
        let recent = locked(&self.recent);
        head.number >= before && recent.get(&head.number).is_some_and(|known| known.nonce == head.nonce)
    }
}
