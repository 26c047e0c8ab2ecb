//! Reading and changing the balancer, whoever asks: a write is checked, stored, and waited for.

use super::{
    ApiError, Engine,
    access::Author,
    drains::Drains,
    engine::{EngineError, FlowFilter},
    host::HostState,
    store::{FleetMember, HostReport},
    types::{Applied, Change, Explanation, Flows, WriteQuery},
};
use crate::{
    desired::{
        model::{Desired, differences},
        store::{Commit, Link, Store, StoreError, Stored},
    },
    observed::{health::HealthRegistry, regions::CommitDesired, replica},
    serve::explain::Query,
};
use futures_util::future::BoxFuture;
use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{RwLock, watch};

/// How long a write waits for the maps before it says that it is still waiting.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest and longest wait before a failed application is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Where the sizes of tables come from when a state is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sizes {
    /// Chosen for what is new, and for what has become too large for its own.
    Chosen,
    /// Those of the state, which was a whole one before: what names no size in it has the one of earlier versions.
    Kept,
}

/// Outcome of the last application: the revision that was tried, and how it went.
type Outcome = Option<(u64, Result<Applied, EngineError>)>;

/// Store, engine and health under one roof.
pub struct Control {
    pub(super) store: Arc<dyn Store>,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) book: Arc<HealthRegistry>,
    pub(super) replicas: Arc<replica::ReplicaRegistry>,
    pub(super) started: Instant,
    pub(super) drains: Drains,
    /// This host among the others, once the daemon has said.
    pub(super) sharing: OnceLock<FleetMember>,
    /// What this host announces, once the daemon has said.
    pub(super) hosting: OnceLock<Arc<HostState>>,
    /// What is decided about regions, once the daemon has said where that is to be seen.
    pub(super) steered: OnceLock<watch::Receiver<Arc<crate::observed::regions::RegionSnapshot>>>,
    /// What this host last told about itself.
    pub(super) report: watch::Sender<HostReport>,
    /// Held by whoever changes something; by one alone while the data move.
    pub(super) changing: RwLock<()>,
    outcome: watch::Sender<Outcome>,
    /// Services that the maps held when lbd started with an empty store; 0 once somebody has said what is to be.
    orphaned: watch::Sender<usize>,
}

impl Control {
    /// Nothing is applied before [`Control::follow`] runs.
    pub fn new(store: Arc<dyn Store>, engine: Arc<dyn Engine>, book: Arc<HealthRegistry>) -> Arc<Self> {
        Self::with_replicas(store, engine, book, Arc::default())
    }

    /// The same, with what replicas say.
    pub fn with_replicas(
        store: Arc<dyn Store>,
        engine: Arc<dyn Engine>,
        book: Arc<HealthRegistry>,
        replicas: Arc<replica::ReplicaRegistry>,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            engine,
            book,
            replicas,
            started: Instant::now(),
            drains: Drains::default(),
            sharing: OnceLock::new(),
            hosting: OnceLock::new(),
            steered: OnceLock::new(),
            report: watch::Sender::default(),
            changing: RwLock::default(),
            outcome: watch::Sender::new(None),
            orphaned: watch::Sender::default(),
        })
    }

    /// Says which host this is, and how to get at other stores.
    pub fn share(&self, sharing: FleetMember) {
        // Said once, by the daemon.
        let _ = self.sharing.set(sharing);
    }

    /// What this host last told about itself.
    pub fn report(&self) -> HostReport {
        self.report.borrow().clone()
    }

    /// How the store and this host get on.
    pub fn link(&self) -> Link {
        self.store.link().borrow().clone()
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Verdicts.
    pub fn book(&self) -> &HealthRegistry {
        &self.book
    }

    /// What replicas say.
    pub fn replicas(&self) -> &Arc<replica::ReplicaRegistry> {
        &self.replicas
    }

    /// Newest desired state.
    pub fn head(&self) -> Stored {
        self.store.head()
    }

    /// Says how many services the maps hold before anything was applied. With an empty store they are forwarded as
    /// before, until [`Control::accept`] or a first change: a store that is lost, or not the right one, must not take
    /// them away.
    pub fn adopted(&self, services: usize) {
        if self.store.head().revision.number > 0 || services == 0 {
            return;
        }
        self.orphaned.send_replace(services);
        let place = self.link().place;
        tracing::error!(services, place, "{}", super::view::orphaned(services));
    }

    /// Services in the maps of which the store, which is empty, says nothing.
    pub fn orphaned(&self) -> usize {
        *self.orphaned.borrow()
    }

    /// Accepts the empty store, if it is there to be accepted; false if there is none.
    ///
    /// # Errors
    /// Another revision was accepted than 0.
    pub(super) fn adopt_empty(&self, revision: u64) -> Result<bool, ApiError> {
        if self.orphaned() == 0 {
            return Ok(false);
        }
        if revision != 0 {
            return Err(StoreError::Conflict { expected: revision, found: 0 }.into());
        }
        self.orphaned.send_replace(0);
        Ok(true)
    }

    /// Waits until a revision is in the maps.
    pub async fn first_applied(&self) {
        let mut outcome = self.outcome.subscribe();
        // The sender is in this very object.
        let _ = outcome.wait_for(|outcome| matches!(outcome, Some((_, Ok(_))))).await;
    }

    /// Applies each newest revision, whoever committed it, until the store is gone. A failed one is tried
    /// again, at growing intervals.
    pub async fn follow(self: Arc<Self>) {
        let mut watch = self.store.watch();
        let mut orphaned = self.orphaned.subscribe();
        let mut retry = RETRY.0;
        self.drains.look_back(&*self.store).await;
        loop {
            let stored = watch.borrow_and_update().clone();
            let number = stored.revision.number;
            if number == 0 && *orphaned.borrow_and_update() > 0 {
                tokio::select! {
                    changed = watch.changed() => if changed.is_err() { return },
                    _ = orphaned.changed() => {}
                }
                continue;
            }
            // A first change is a whole new state.
            self.orphaned.send_replace(0);
            self.drains.follow(&stored);
            let result = self.engine.apply(stored.desired, number).await;
            let failed = result.is_err();
            match &result {
                Ok(applied) => {
                    retry = RETRY.0;
                    let Applied { slots_changed, took_us, .. } = applied;
                    tracing::info!(revision = number, slots_changed, took_us, "applied");
                }
                Err(error) => {
                    tracing::error!(revision = number, %error, retry_s = retry.as_secs(), "not applied");
                }
            }
            self.outcome.send_replace(Some((number, result)));
            tokio::select! {
                changed = watch.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(retry), if failed => retry = (retry * 2).min(RETRY.1),
            }
        }
    }

    /// Waits until this revision, or a later one, is applied or has failed.
    ///
    /// # Errors
    /// It failed, or took longer than a reader should wait.
    pub async fn applied(&self, revision: u64) -> Result<Applied, ApiError> {
        let mut outcome = self.outcome.subscribe();
        let reached = |o: &Outcome| o.as_ref().is_some_and(|(number, _)| *number >= revision);
        let wait = tokio::time::timeout(APPLY_TIMEOUT, outcome.wait_for(reached)).await;
        let stored = format!("revision {revision} is stored, but");
        match wait {
            Ok(Ok(found)) => match found.as_ref().map(|(_, result)| result.clone()) {
                Some(Ok(applied)) => Ok(applied),
                Some(Err(error)) => Err(ApiError::not_applied(format!("{stored} cannot be applied: {error}"))
                    .fix("the dataplane still works by the revision before; lbd tries again, or use `lbctl rollback`")),
                None => Err(ApiError::not_applied(format!("{stored} not applied"))),
            },
            Ok(Err(_)) | Err(_) => Err(ApiError::not_applied(format!(
                "{stored} not yet applied after {} s",
                APPLY_TIMEOUT.as_secs()
            ))
            .fix("see `lbctl status` and the log of lbd")),
        }
    }

    /// What became of the newest application.
    pub(super) fn outcome(&self) -> Outcome {
        self.outcome.borrow().clone()
    }

    /// Changes the desired state: checks it, stores it as one revision, and returns when it is applied.
    /// `change` may be called again if someone else was faster.
    ///
    /// # Errors
    /// `change` refused, a rule is broken, it does not fit, someone changed what was expected, or storing
    /// or applying failed. Except in the last case nothing has changed.
    pub async fn write(
        &self,
        author: &Author,
        query: &WriteQuery,
        change: impl FnMut(&mut Desired) -> Result<(), ApiError>,
    ) -> Result<Change, ApiError> {
        self.write_sized(author, query, Sizes::Chosen, change).await
    }

    /// Makes a state that was stored before the desired one, as it was.
    ///
    /// # Errors
    /// As [`Control::write`].
    pub(super) async fn bring_back(
        &self,
        author: &Author,
        query: &WriteQuery,
        state: &Desired,
    ) -> Result<Change, ApiError> {
        let change = |desired: &mut Desired| {
            *desired = state.clone();
            Ok(())
        };
        self.write_sized(author, query, Sizes::Kept, change).await
    }

    async fn write_sized(
        &self,
        author: &Author,
        query: &WriteQuery,
        sizes: Sizes,
        mut change: impl FnMut(&mut Desired) -> Result<(), ApiError>,
    ) -> Result<Change, ApiError> {
        if !query.dry_run {
            author.check()?;
        }
        loop {
            let head = self.store.head();
            let found = head.revision.number;
            if let Some(expected) = query.expected
                && expected != found
            {
                return Err(StoreError::Conflict { expected, found }.into());
            }
            let mut desired = (*head.desired).clone();
            change(&mut desired)?;
            desired.assign_seats(&head.desired);
            if sizes == Sizes::Chosen {
                desired.assign_sizes(&head.desired);
            }
            desired.share(&head.desired);
            let desired = Arc::new(desired);
            let differences = differences(&head.desired, &desired);
            // Not what is shown of it decides.
            let is_changed = desired != head.desired;
            if is_changed {
                let broken = desired.check_change(&head.desired);
                if !broken.is_empty() {
                    return Err(ApiError::invalid(&broken));
                }
                self.engine.check(desired.clone()).await?;
            }
            if query.dry_run || !is_changed {
                return Ok(Change { revision: found, dry_run: query.dry_run, differences, applied: None });
            }
            let message = query.message.clone().unwrap_or_else(|| summary(&differences));
            let commit = Commit {
                expected: found,
                desired,
                author: author.name.clone(),
                message: message.clone(),
                time: SystemTime::now(),
            };
            let committed = {
                let _turn = self.changing.read().await;
                self.store.commit(commit).await
            };
            match committed {
                Err(StoreError::Conflict { .. }) if query.expected.is_none() => {}
                Err(error) => return Err(error.into()),
                Ok(stored) => {
                    let revision = stored.revision.number;
                    tracing::info!(revision, author = author.name, message, "desired state changed");
                    let applied = Some(self.applied(revision).await?);
                    return Ok(Change { revision, dry_run: false, differences, applied });
                }
            }
        }
    }

    /// Makes the state of an older revision the newest.
    ///
    /// # Errors
    /// As [`Control::write`], or the revision is not kept.
    pub async fn rollback(&self, author: &Author, query: &WriteQuery, to: u64) -> Result<Change, ApiError> {
        let old = self.store.get(to).await?;
        let message = query.message.clone().unwrap_or_else(|| format!("rollback to revision {to}"));
        let query = WriteQuery { message: Some(message), ..query.clone() };
        self.bring_back(author, &query, &old.desired).await
    }

    /// Tracked flows.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub async fn flows(&self, filter: FlowFilter) -> Result<Flows, ApiError> {
        let (flows, more) = self.reading(move |engine| engine.flows(&filter)).await?;
        Ok(Flows { flows, more })
    }

    /// What becomes of a flow's packets.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub async fn explain(&self, query: Query) -> Result<Explanation, ApiError> {
        self.reading(move |engine| engine.explain(query)).await
    }

    /// Runs what reads maps off the async threads.
    pub(super) async fn reading<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Engine) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let engine = self.engine.clone();
        match tokio::task::spawn_blocking(move || read(&*engine)).await {
            Ok(result) => result.map_err(ApiError::from),
            Err(error) => Err(EngineError::Failed { what: error.to_string() }.into()),
        }
    }
}

/// One line for the history.
fn summary(differences: &[crate::desired::model::Difference]) -> String {
    let shown: Vec<String> = differences.iter().take(3).map(ToString::to_string).collect();
    match differences.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}

impl CommitDesired for Control {
    fn commit_as_daemon(
        self: Arc<Self>,
        message: String,
        mut change: Box<dyn FnMut(&mut Desired) + Send>,
    ) -> BoxFuture<'static, Result<(), String>> {
        Box::pin(async move {
            let query = WriteQuery { message: Some(message), ..WriteQuery::default() };
            let write = |desired: &mut Desired| {
                change(desired);
                Ok(())
            };
            self.write(&Author::daemon(), &query, write).await.map(drop).map_err(|e| e.to_string())
        })
    }
}
