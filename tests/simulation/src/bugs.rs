//! Faults of the control plane that existed once or could exist, put back by wrappers around its parts: a test shows that
//! the simulation finds each of them.

use super::host::SimulatedEngine;
use futures_util::future::BoxFuture;
use lb_userspace::desired::{
    model::{BackendState, Desired, Name, differences},
    store::{
        About, Claim, Commit, HostValues, Lock, Retire, Revision, ServiceHistory, Store, StoreError,
        StoreLink, Stored,
    },
};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

macro_rules! bugs {
    ($($name:ident $text:literal,)*) => {
        /// A fault that is put back.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug { $(#[doc = $text] $name,)* }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Name on the command line.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What goes wrong.
            pub fn about(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

bugs! {
    RegionsForgotten "the store forgets regions",
    AcknowledgedBeforeStored "a change is acknowledged before it is stored",
    ChangeDropped "a change of weights only is dropped as unchanged",
    DryRunUnauthorised "a query with dry_run=true passes as one of root",
    EmptyStoreWipes "an empty store removes all services from the maps",
    StaleReportsApplied "reports of an earlier time are applied",
    DrainedKeepsSlots "a draining backend keeps its slots",
    DeadKeepsSlots "verdicts of failed checks do not reach the maps",
    ResidencyIgnored "residency is not in the tables",
    OneBlocksAll "a service without usable backends delays every change",
    AppliedSilentlyLate "a change is reported as applied without being applied",
    NeverPruned "verdicts of removed backends stay",
    ExportForgets "the export omits drain times",
    DryRunLies "a dry run shows no changes",
}

/// Changes what is applied, as the bug has it.
pub fn distort(bug: Option<Bug>, desired: Arc<Desired>) -> Arc<Desired> {
    if !matches!(bug, Some(Bug::DrainedKeepsSlots | Bug::ResidencyIgnored)) {
        return desired;
    }
    let mut changed = (*desired).clone();
    for service in changed.services.values_mut().map(Arc::make_mut) {
        if bug == Some(Bug::ResidencyIgnored) {
            if let Some(rules) = &mut service.regions {
                rules.allowed = None;
            }
            continue;
        }
        for backend in service.backends.values_mut().filter(|b| b.state == BackendState::Draining) {
            backend.state = BackendState::Up;
        }
    }
    Arc::new(changed)
}

/// Waits, or claims success, where the bug has it; true to skip the application.
pub async fn meddle(bug: Option<Bug>, engine: &SimulatedEngine, revision: u64) -> bool {
    match bug {
        Some(Bug::OneBlocksAll) if engine.has_idle_service() => {
            tokio::time::sleep(Duration::from_secs(5)).await;
            false
        }
        Some(Bug::AppliedSilentlyLate) => revision % 3 == 2,
        _ => false,
    }
}

/// A store with a bug.
pub struct BugStore {
    inner: Arc<dyn Store>,
    bug: Bug,
    head: watch::Sender<Stored>,
}

impl BugStore {
    /// Wraps a store, if the bug is one of stores.
    pub fn wrap(inner: Arc<dyn Store>, bug: Option<Bug>) -> Arc<dyn Store> {
        match bug {
            Some(bug @ (Bug::RegionsForgotten | Bug::AcknowledgedBeforeStored | Bug::ChangeDropped)) => {
                let head = watch::Sender::new(inner.head());
                let (mut watched, to) = (inner.watch(), head.clone());
                tokio::spawn(async move {
                    while watched.changed().await.is_ok() {
                        let found = watched.borrow_and_update().clone();
                        to.send_if_modified(|head| {
                            let is_newer = found.revision.number > head.revision.number;
                            if is_newer {
                                *head = found;
                            }
                            is_newer
                        });
                    }
                });
                Arc::new(Self { inner, bug, head })
            }
            _ => inner,
        }
    }

    async fn commit_wrongly(&self, commit: Commit) -> Result<Stored, StoreError> {
        let head = self.head.borrow().clone();
        if self.bug == Bug::ChangeDropped {
            let weights_only = |text: String| text.contains("weight");
            let all = differences(&head.desired, &commit.desired);
            if !all.is_empty() && all.iter().all(|d| weights_only(d.to_string())) {
                return Ok(head);
            }
            return self.inner.commit(commit).await;
        }
        if head.revision.number != commit.expected {
            let (expected, found) = (commit.expected, head.revision.number);
            return Err(StoreError::Conflict { expected, found });
        }
        let desired = commit.desired.clone();
        let stored = match self.bug {
            Bug::RegionsForgotten => {
                let mut without = (*desired).clone();
                without.regions.clear();
                let commit = Commit { desired: Arc::new(without), ..commit };
                Stored { desired, ..self.inner.commit(commit).await? }
            }
            _ => {
                let revision = Revision {
                    number: commit.expected + 1,
                    author: commit.author.clone(),
                    time_ms: lb_userspace::clock::unix_ms(),
                    message: commit.message.clone(),
                    summary: commit.summary.clone(),
                };
                let inner = self.inner.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    let _ = inner.commit(commit).await;
                });
                Stored { revision, desired }
            }
        };
        self.head.send_replace(stored.clone());
        Ok(stored)
    }
}

impl Store for BugStore {
    fn watch(&self) -> watch::Receiver<Stored> {
        self.head.subscribe()
    }
    fn commit(&self, commit: Commit) -> BoxFuture<'_, Result<Stored, StoreError>> {
        Box::pin(self.commit_wrongly(commit))
    }
    fn get(&self, number: u64) -> BoxFuture<'_, Result<Stored, StoreError>> {
        self.inner.get(number)
    }
    fn history(&self, before: Option<u64>, limit: usize) -> BoxFuture<'_, Result<Vec<Revision>, StoreError>> {
        self.inner.history(before, limit)
    }
    fn history_of(
        &self,
        service: Name,
        before: Option<u64>,
        scan: usize,
    ) -> BoxFuture<'_, Result<ServiceHistory, StoreError>> {
        self.inner.history_of(service, before, scan)
    }
    fn link(&self) -> watch::Receiver<StoreLink> {
        self.inner.link()
    }
    fn about(&self) -> BoxFuture<'_, About> {
        self.inner.about()
    }
    fn import(&self, id: Option<String>, revisions: Vec<Stored>) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.import(id, revisions)
    }
    fn retire(&self, how: Retire) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.retire(how)
    }
    fn accept(&self, revision: u64) -> Result<(), StoreError> {
        self.inner.accept(revision)
    }
    fn publish(&self, key: &str, value: Option<Vec<u8>>) {
        self.inner.publish(key, value);
    }
    fn join(&self, name: &str, instance: &str) {
        self.inner.join(name, instance);
    }
    fn keep_member(&self, name: &str, value: Vec<u8>) {
        self.inner.keep_member(name, value);
    }
    fn forget_member(&self, name: String) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.forget_member(name)
    }
    fn published(&self) -> watch::Receiver<HostValues> {
        self.inner.published()
    }
    fn lock(&self, claim: Claim) -> BoxFuture<'_, Result<Lock, StoreError>> {
        self.inner.lock(claim)
    }
    fn unlock(&self, name: String, token: Option<String>) -> BoxFuture<'_, Result<(), StoreError>> {
        self.inner.unlock(name, token)
    }
    fn locks(&self) -> BoxFuture<'_, Result<Vec<Lock>, StoreError>> {
        self.inner.locks()
    }
}
