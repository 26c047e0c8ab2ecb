//! The interface of a store, and of the local data, over the file.

use super::{FORMAT, RedbInner, RedbStore};
use crate::{
    blocking::blocking,
    desired::{
        model::Name,
        store::{
            About, Claim, Commit, HOSTS, HostValues, Local, Lock, MEMBERS, Retire, Revision, ServiceHistory,
            Store, StoreError, StoreLink, StoreMember, Stored,
        },
    },
};
use futures_util::future::BoxFuture;
use std::{
    sync::{PoisonError, Weak},
    time::Duration,
};
use tokio::sync::watch;

/// Interval at which a store that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Tries to write a file that could not be written, until it can be, or the store is closed.
pub(super) async fn retry_writes(store: Weak<RedbInner>) {
    loop {
        tokio::time::sleep(RETRY).await;
        let Some(inner) = store.upgrade() else { return };
        if matches!(blocking(move || inner.try_to_write()).await, Ok(true) | Err(_)) {
            return;
        }
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

    fn history_of(
        &self,
        service: Name,
        before: Option<u64>,
        scan: usize,
    ) -> BoxFuture<'_, Result<ServiceHistory, StoreError>> {
        Box::pin(self.blocking(move |inner| inner.history_of(&service, before, scan)))
    }

    fn link(&self) -> watch::Receiver<StoreLink> {
        self.inner.link.subscribe()
    }

    fn about(&self) -> BoxFuture<'_, About> {
        let place = self.inner.file.display().to_string();
        let size_bytes = std::fs::metadata(&self.inner.file).map_or(0, |m| m.len());
        let link = self.inner.link.borrow().clone();
        let member = StoreMember {
            name: "this host".to_owned(),
            address: place.clone(),
            healthy: link.connected,
            leader: true,
            version: format!("format {FORMAT}"),
            size_bytes,
            problem: link.problem,
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

    /// A file cannot be set back while the daemon has it open.
    fn accept(&self, _: u64) -> Result<(), StoreError> {
        let number = self.inner.head.borrow().revision.number;
        Err(StoreError::NothingToAccept { why: format!("this host works by the store's revision {number}") })
    }

    fn publish(&self, key: &str, value: Option<Vec<u8>>) {
        self.alone.publish(key, value);
    }

    /// Only this host uses the file, so its name cannot be taken.
    fn join(&self, _: &str, _: &str) {}

    fn keep_member(&self, name: &str, value: Vec<u8>) {
        self.alone.publish(&format!("{MEMBERS}{name}"), Some(value));
    }

    fn forget_member(&self, name: String) -> BoxFuture<'_, Result<(), StoreError>> {
        let key = format!("{MEMBERS}{name}");
        let has = |key: &str| self.alone.published().borrow().contains_key(key);
        let result = match (has(&format!("{HOSTS}{name}")), has(&key)) {
            (true, _) => Err(StoreError::MemberLives { name }),
            (false, false) => Err(StoreError::NoMember { name }),
            (false, true) => {
                self.alone.publish(&key, None);
                Ok(())
            }
        };
        Box::pin(async { result })
    }

    fn published(&self) -> watch::Receiver<HostValues> {
        self.alone.published()
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
