//! Reads and changes the balancer for the API and the daemon: a write is checked, stored, and applied.

use super::{
    ApiError, Engine, EventLog,
    access::Author,
    drains::Drains,
    engine::{EngineError, FlowFilter},
    host::HostState,
    store::{FleetMember, HostReport},
    types::{AppliedStatus, Change, Explanation, Flows, WriteQuery},
};
use crate::{
    blocking::blocking,
    desired::{
        model::{Desired, ForwardingMode, Service, differences},
        store::{Commit, Store, StoreError, StoreLink, Stored},
    },
    observed::{health::HealthRegistry, replica},
    serve::explain::Query,
};
use axum::extract::State;
use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{Arc, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::{RwLock, watch};

/// How long a write waits for the maps before it fails with a timeout.
const APPLY_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest and longest wait before a failed application is retried.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How a write determines table sizes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sizes {
    /// Sizes are chosen for new services, and for services that outgrew their table.
    Chosen,
    /// The sizes of an earlier state are kept; a service without one has the size of earlier versions.
    Kept,
}

/// What the handlers share.
pub(super) type SharedControl = State<Arc<Control>>;

/// Outcome of the last application: the revision, and the result.
pub(super) type LastApply = Option<(u64, Result<AppliedStatus, EngineError>)>;

/// Store, engine, health and replicas, as the API and the metrics use them.
pub struct Control {
    pub(super) store: Arc<dyn Store>,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) health: Arc<HealthRegistry>,
    pub(super) replicas: Arc<replica::ReplicaRegistry>,
    pub(super) started: Instant,
    pub(super) drains: Drains,
    /// This host's identity and store opener; set once by the daemon.
    pub(super) fleet_member: OnceLock<FleetMember>,
    /// This host's announcement and drain; set once by the daemon.
    pub(super) host_state: OnceLock<Arc<HostState>>,
    /// Decisions about regions; set once by the daemon.
    pub(super) region_decisions: OnceLock<watch::Receiver<Arc<crate::observed::regions::RegionSnapshot>>>,
    /// What this host last reported about itself.
    pub(super) report: watch::Sender<HostReport>,
    /// Differences between the hosts' clocks.
    pub(super) clocks: std::sync::Mutex<super::members::Clocks>,
    /// Held shared by each commit, exclusively by a migration or restore.
    pub(super) commit_lock: RwLock<()>,
    /// What happened.
    pub(super) events: Arc<EventLog>,
    outcome: watch::Sender<LastApply>,
    /// Services that the maps held when lbd started with an empty store; 0 after `accept` or a first change.
    orphaned: watch::Sender<usize>,
    /// Why the services of the configuration file are not in force.
    file_problem: std::sync::Mutex<Option<String>>,
    /// Why hooks do not run; set at the start.
    hook_problem: OnceLock<String>,
}

impl Control {
    /// Without replicas. Nothing is applied before [`Control::run_apply_loop`] runs.
    pub fn new(store: Arc<dyn Store>, engine: Arc<dyn Engine>, health: Arc<HealthRegistry>) -> Arc<Self> {
        Self::with_replicas(store, engine, health, Arc::default())
    }

    /// With the registry of replica reports. Nothing is applied before [`Control::run_apply_loop`] runs.
    pub fn with_replicas(
        store: Arc<dyn Store>,
        engine: Arc<dyn Engine>,
        health: Arc<HealthRegistry>,
        replicas: Arc<replica::ReplicaRegistry>,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            engine,
            health,
            replicas,
            started: Instant::now(),
            drains: Drains::default(),
            fleet_member: OnceLock::new(),
            host_state: OnceLock::new(),
            region_decisions: OnceLock::new(),
            report: watch::Sender::default(),
            clocks: std::sync::Mutex::default(),
            commit_lock: RwLock::default(),
            events: Arc::default(),
            outcome: watch::Sender::new(None),
            orphaned: watch::Sender::default(),
            file_problem: std::sync::Mutex::default(),
            hook_problem: OnceLock::new(),
        })
    }

    /// The events of this run of lbd.
    pub fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    /// Finds events and writes them to [`Control::events`], until the store is closed.
    pub async fn run_events(self: Arc<Self>) {
        super::events::derive::run(self).await;
    }

    /// Sets this host's identity and the opener of other stores. The daemon calls it once.
    pub fn set_fleet_member(&self, member: FleetMember) {
        let _ = self.fleet_member.set(member);
    }

    /// What this host last reported about itself.
    pub fn report(&self) -> HostReport {
        self.report.borrow().clone()
    }

    /// State of the connection to the store.
    pub fn link(&self) -> StoreLink {
        self.store.link().borrow().clone()
    }

    /// The reconciler and dataplane.
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// Verdicts of the health checks.
    pub fn health(&self) -> &HealthRegistry {
        &self.health
    }

    /// Reports of the replicas.
    pub fn replicas(&self) -> &Arc<replica::ReplicaRegistry> {
        &self.replicas
    }

    /// The newest desired state.
    pub fn head(&self) -> Stored {
        self.store.head()
    }

    /// Sets why the services of the configuration file are not in force; none once they are.
    pub fn set_file_problem(&self, problem: Option<String>) {
        *self.file_problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Sets why hooks do not run.
    pub fn set_hook_problem(&self, why: String) {
        let _ = self.hook_problem.set(format!("the hooks of the configuration file do not run: {why}"));
    }

    /// The problem of the hooks, for status.
    pub(super) fn hook_problem(&self) -> Option<String> {
        self.hook_problem.get().cloned()
    }

    /// The problem of the configuration file, for status.
    pub(super) fn file_problem(&self) -> Option<String> {
        let problem = self.file_problem.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some(format!(
            "the services of the configuration file are not in force, those of the store are: {problem} (fix the file, then \
             `systemctl reload lbd`)"
        ))
    }

    /// Sets how many services the maps held at start. With an empty store lbd keeps forwarding for them until
    /// [`Control::accept`] or a first change: a lost or wrong store must not remove them.
    pub fn set_adopted_services(&self, services: usize) {
        if self.store.head().revision.number > 0 || services == 0 {
            return;
        }
        self.orphaned.send_replace(services);
    }

    /// Number of services in the maps while the store is empty.
    pub fn orphaned(&self) -> usize {
        *self.orphaned.borrow()
    }

    /// Accepts the empty store; false if the store is not empty or the maps hold no services.
    ///
    /// # Errors
    /// `revision` is not 0.
    pub(super) fn accept_empty(&self, revision: u64) -> Result<bool, ApiError> {
        if self.orphaned() == 0 {
            return Ok(false);
        }
        if revision != 0 {
            return Err(StoreError::Conflict { expected: revision, found: 0 }.into());
        }
        self.orphaned.send_replace(0);
        Ok(true)
    }

    /// Waits until the first revision is in the maps.
    pub async fn wait_first_applied(&self) {
        let mut outcome = self.outcome.subscribe();
        // Cannot fail: the sender is a field of `self`.
        let _ = outcome.wait_for(|outcome| matches!(outcome, Some((_, Ok(_))))).await;
    }

    /// Applies each newest revision, from any host, until the store is closed. A failed application is retried
    /// at growing intervals.
    pub async fn run_apply_loop(self: Arc<Self>) {
        let mut watch = self.store.watch();
        let mut orphaned = self.orphaned.subscribe();
        let mut retry = RETRY.0;
        self.drains.restore(&*self.store).await;
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
            // A first change replaces what the maps hold.
            self.orphaned.send_replace(0);
            self.drains.update(&stored);
            let result = self.engine.apply(stored.desired, number).await;
            let failed = result.is_err();
            // An event tells of both.
            match &result {
                Ok(_) => retry = RETRY.0,
                Err(error) => {
                    tracing::debug!(revision = number, %error, retry_s = retry.as_secs(), "cannot apply the desired state; retrying");
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
    /// Applying it failed, or took longer than [`APPLY_TIMEOUT`].
    pub async fn wait_applied(&self, revision: u64) -> Result<AppliedStatus, ApiError> {
        let mut outcome = self.outcome.subscribe();
        let reached = |o: &LastApply| o.as_ref().is_some_and(|(number, _)| *number >= revision);
        let wait = tokio::time::timeout(APPLY_TIMEOUT, outcome.wait_for(reached)).await;
        let stored = format!("revision {revision} is stored, but");
        match wait {
            Ok(Ok(found)) => match found.as_ref().map(|(_, result)| result.clone()) {
                Some(Ok(applied)) => Ok(applied),
                Some(Err(error)) => Err(ApiError::not_applied(format!(
                    "{stored} cannot be applied: {error}"
                ))
                .fix("the dataplane keeps the previous revision and lbd retries; or use `lbctl rollback`")),
                None => Err(ApiError::not_applied(format!("{stored} was not applied"))),
            },
            Ok(Err(_)) | Err(_) => Err(ApiError::not_applied(format!(
                "{stored} was not applied within {} s",
                APPLY_TIMEOUT.as_secs()
            ))
            .fix("see `lbctl status` and lbd's log")),
        }
    }

    /// Result of the newest application.
    pub(super) fn outcome(&self) -> LastApply {
        self.outcome.borrow().clone()
    }

    /// Watches the result of the newest application.
    pub(super) fn outcomes(&self) -> watch::Receiver<LastApply> {
        self.outcome.subscribe()
    }

    /// Changes the desired state: checks it, stores it as one revision, and returns when it is applied.
    /// `change` is called again after a conflicting commit.
    ///
    /// # Errors
    /// `change` refused, a rule is broken, the state does not fit, the revision is not the expected one, or storing
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

    /// Refuses a new VIP that is an address of this host: its own connections to that address would be balanced, among
    /// them perhaps the one over which the change is made.
    fn refuse_own_addresses(&self, old: &Desired, new: &Desired) -> Result<(), ApiError> {
        let known: BTreeSet<IpAddr> = old.services.values().map(|s| s.vip).collect();
        let is_fresh = |s: &Service| !known.contains(&s.vip) && s.mode != ForwardingMode::Local;
        let fresh: Vec<_> = new.services.iter().filter(|(_, s)| is_fresh(s)).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        let own = self.engine.own_addresses();
        match fresh.into_iter().find_map(|(name, s)| Some((name, s.vip, own.get(&s.vip)?))) {
            None => Ok(()),
            Some((name, vip, interface)) => Err(ApiError::needs_force(format!(
                "service {name}: the VIP {vip} is an address of this host (on {interface}), so connections to the host \
                 itself, such as SSH, would be balanced or dropped"
            ))
            .fix("choose an address that no host has, or give --force (API: force=true)")),
        }
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
                desired.assign_defaults(&head.desired);
            }
            desired.share(&head.desired);
            let desired = Arc::new(desired);
            let differences = differences(&head.desired, &desired);
            // Compare the states: `differences` may leave something out.
            let is_changed = desired != head.desired;
            if is_changed {
                let broken = desired.check_change(&head.desired);
                if !broken.is_empty() {
                    return Err(ApiError::invalid(&broken));
                }
                self.engine.check(desired.clone()).await?;
                if sizes == Sizes::Chosen && !query.force {
                    self.refuse_own_addresses(&head.desired, &desired)?;
                }
            }
            if query.dry_run
                && is_changed
                && let Some(refusal) = self.link().refusal()
            {
                return Err(refusal.into());
            }
            if query.dry_run || !is_changed {
                let (revision, dry_run) = (found, query.dry_run);
                return Ok(Change { revision, dry_run, differences, applied: None, notes: Vec::new() });
            }
            let summary = summarize(&differences);
            let (message, summary) = match &query.message {
                Some(message) => (message.clone(), Some(summary)),
                None => (summary, None),
            };
            let commit = Commit {
                expected: found,
                desired,
                author: author.name.clone(),
                message: message.clone(),
                summary: summary.clone(),
                time: SystemTime::now(),
            };
            let committed = {
                let _guard = self.commit_lock.read().await;
                self.store.commit(commit).await
            };
            match committed {
                Err(StoreError::Conflict { .. }) if query.expected.is_none() => {}
                Err(error) => return Err(error.into()),
                Ok(stored) => {
                    let revision = stored.revision.number;
                    // `message` would be the text of the line itself.
                    let (change, reason) = match &summary {
                        Some(summary) => (summary, Some(&message)),
                        None => (&message, None),
                    };
                    tracing::info!(revision, author = author.name, change, reason, "desired state changed");
                    let applied = Some(self.wait_applied(revision).await?);
                    let notes = Vec::new();
                    return Ok(Change { revision, dry_run: false, differences, applied, notes });
                }
            }
        }
    }

    /// Makes the state of an older revision the newest.
    ///
    /// # Errors
    /// As [`Control::write`], or the store no longer keeps the revision.
    pub async fn rollback(&self, author: &Author, query: &WriteQuery, to: u64) -> Result<Change, ApiError> {
        if to == 0 {
            return Err(ApiError::bad_request("revision 0 is the empty state before the first change")
                .fix("choose a revision of `lbctl history`; to remove everything, apply an empty file"));
        }
        let old = self.store.get(to).await?;
        let message = query.message.clone().unwrap_or_else(|| format!("rollback to revision {to}"));
        let query = WriteQuery { message: Some(message), ..query.clone() };
        self.bring_back(author, &query, &old.desired).await
    }

    /// Lists tracked flows.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub async fn flows(&self, filter: FlowFilter) -> Result<Flows, ApiError> {
        let (flows, more) = self.read_engine(move |engine| engine.flows(&filter)).await?;
        Ok(Flows { flows, more })
    }

    /// Explains where a flow's packets go.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub async fn explain(&self, query: Query) -> Result<Explanation, ApiError> {
        let mut found = self.read_engine(move |engine| engine.explain(query)).await?;
        self.explain_checks(&mut found);
        Ok(found)
    }

    /// Runs a blocking read of the maps off the async threads.
    pub(super) async fn read_engine<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Engine) -> Result<T, EngineError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let engine = self.engine.clone();
        match blocking(move || read(&*engine)).await {
            Ok(result) => result.map_err(ApiError::from),
            Err(error) => Err(EngineError::Failed { what: error.to_string() }.into()),
        }
    }
}

/// Summarises a change in one line, for the history.
fn summarize(differences: &[crate::desired::model::Difference]) -> String {
    let shown: Vec<String> = differences.iter().take(3).map(ToString::to_string).collect();
    match differences.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{}, and {more} more", shown.join(", ")),
    }
}
