//! Applies the messages of a watch of the store, key by key.

use super::{
    Arc, EtcdInner, KnownRevision, StoreError,
    follow::End,
    keys::{Head, RevisionRecord},
    locked,
    proto::{KeyValue, WatchResponse},
};
use crate::desired::store::MEMBERS;
use std::collections::BTreeMap;

/// Messages of the watch so far.
pub(super) struct Seen {
    /// etcd's revision at which the head was last read.
    pub(super) at: i64,
    /// Records that no head has named yet, with their sizes in bytes: a commit's become part of the history with its head;
    /// an import that is cut short leaves some that never do.
    pub(super) records: BTreeMap<u64, (RevisionRecord, usize)>,
}

impl EtcdInner {
    /// Applies a message of the watch. Every key of the layout in [`super::keys`] is handled here, so that no belief of
    /// this host outlives a change of its key.
    pub(super) async fn apply_watch(&self, message: WatchResponse, seen: &mut Seen) -> Result<(), End> {
        if message.canceled {
            let why = format!("the revisions after {} were compacted away", message.compact_revision);
            return Err(End::Again(why));
        }
        let mut values = None;
        for event in message.events {
            let Some(kv) = event.kv else { continue };
            let is_put = event.kind == 0;
            let member = self.keys.plain(&kv.key).filter(|key| key.starts_with(MEMBERS));
            if let Some(key) = member.as_deref().or_else(|| self.keys.after("leased/", &kv.key)) {
                let values = values.get_or_insert_with(|| (**self.host_values.borrow()).clone());
                match is_put {
                    true => values.insert(key.to_owned(), kv.value),
                    false => values.remove(key),
                };
            } else if self.keys.after("revisions/", &kv.key).is_some() && is_put {
                let (number, record) = self.record(&kv)?;
                self.forget_other(number, &record);
                seen.records.insert(number, (record, kv.value.len()));
            } else if self.keys.after("head", &kv.key) == Some("") {
                self.head_changed(&kv, is_put, seen).await?;
            } else if self.keys.after("store", &kv.key) == Some("") {
                return Err(End::Again("the store's identity was written".to_owned()));
            } else if self.keys.after("moved", &kv.key) == Some("") {
                self.set_moved(is_put.then_some(&*kv.value));
            }
            // The other keys (`snapshots/`, `parts/`, `locks/`) are read when they are needed.
        }
        if let Some(values) = values {
            self.host_values.send_replace(Arc::new(values));
        }
        Ok(())
    }

    /// Follows a change of the head. A commit writes the head with its record, which the watch has delivered before; any
    /// other change is read from the store, because its meaning depends on more than this event.
    async fn head_changed(&self, kv: &KeyValue, is_put: bool, seen: &mut Seen) -> Result<(), End> {
        let head = if is_put { self.parse_head(kv)? } else { Head::default() };
        if kv.mod_revision > seen.at && head != self.known().head() {
            match self.fold_seen(&head, seen).await? {
                Some(new) => self.advance(new, false),
                // Usually a commit of this host, with another after it.
                None => seen.at = self.catch_up().await?,
            }
        }
        seen.records.retain(|number, _| *number > head.number);
        Ok(())
    }

    /// The revisions from the known one to this head, from records that the watch has delivered; none if a record is
    /// missing or belongs to another history.
    async fn fold_seen(&self, head: &Head, seen: &Seen) -> Result<Option<Vec<KnownRevision>>, StoreError> {
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

    /// Forgets a cached revision before the head whose record was replaced. The head's own revision is handled with the head.
    fn forget_other(&self, number: u64, record: &RevisionRecord) {
        let mut recent = locked(&self.recent);
        let is_last = recent.keys().next_back() == Some(&number);
        if !is_last && recent.get(&number).is_some_and(|known| known.nonce != record.nonce) {
            recent.remove(&number);
        }
    }

    /// Whether a head that was just read is the known one, or one passed since `before` was the newest known revision.
    pub(super) fn is_in_step(&self, before: u64, head: &Head) -> bool {
        if *head == self.known().head() {
            return true;
        }
        let recent = locked(&self.recent);
        head.number >= before && recent.get(&head.number).is_some_and(|known| known.nonce == head.nonce)
    }
}
