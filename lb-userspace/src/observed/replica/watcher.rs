//! Runs one task per watched replica, as the desired state says.

use super::{
    ReplicaEntry, ReplicaRegistry, Scores,
    fetch::FetchTarget,
    watch::{WatchPlan, WatchShared, watch},
};
use crate::{
    desired::{
        model::{BackendId, Desired, HealthKind, Name, Ports, Readiness, Service},
        store::{Local, StoreError, Stored, restored},
    },
    observed::{
        dial::{self, Dial},
        health::{ProbeTarget, Prober},
    },
};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::{AbortHandle, JoinSet},
};

/// Key of the last reports in the local store.
const KEY: &str = "replicas";
/// How long changes are collected before they are saved.
const SAVE_DELAY: Duration = Duration::from_millis(200);

/// Watches all replicas of the desired state.
pub struct Watcher {
    shared: Arc<WatchShared>,
    tasks: JoinSet<()>,
    running: BTreeMap<BackendId, (WatchPlan, AbortHandle)>,
}

impl Watcher {
    /// Creates a watcher with the reports from before the restart. At most `attempts` are in flight at once. Sends changes
    /// of readiness to `readiness`, and the score of each report to `scores`.
    pub fn new(
        registry: Arc<ReplicaRegistry>,
        attempts: usize,
        prober: Prober,
        readiness: mpsc::Sender<(BackendId, Readiness)>,
        scores: Arc<Scores>,
    ) -> Self {
        let permits = Semaphore::new(attempts.max(1));
        let (dial, changed) = (dial::tcp(), Notify::new());
        let shared = WatchShared { registry, readiness, scores, prober, dial, permits, changed };
        Self { shared: Arc::new(shared), tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// Fetches reports over the connections that `dial` opens.
    pub fn with_dial(mut self, dial: Dial) -> Self {
        Arc::get_mut(&mut self.shared).expect("no task has begun yet").dial = dial;
        self
    }

    /// Reads the registry from before the restart; an empty one if there is none.
    pub async fn restore(local: &dyn Local) -> Arc<ReplicaRegistry> {
        Arc::new(restored(local, KEY, "the last replica reports", ReplicaRegistry::from_bytes).await)
    }

    /// Saves the registry for the next start.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn save(registry: &ReplicaRegistry, local: &dyn Local) -> Result<(), StoreError> {
        local.save(KEY, registry.to_bytes()).await
    }

    /// Follows the desired state until its sender is gone.
    pub async fn run(mut self, mut desired: watch::Receiver<Stored>, local: Arc<dyn Local>) {
        let saver = tokio::spawn(save_changes(self.shared.clone(), local));
        loop {
            let state = desired.borrow_and_update().desired.clone();
            self.update_tasks(&state).await;
            tokio::select! {
                changed = desired.changed() => if changed.is_err() { break },
                // Reaps aborted tasks, so that the set does not grow.
                Some(_) = self.tasks.join_next() => {}
            }
        }
        self.tasks.shutdown().await;
        saver.abort();
    }

    /// Starts, restarts and stops tasks so that they match `desired`.
    async fn update_tasks(&mut self, desired: &Desired) {
        let mut plans = BTreeMap::new();
        for (name, service) in &desired.services {
            plan_watches(name, service, &mut plans);
        }
        self.running.retain(|id, (plan, task)| {
            let stays = plans.get(id) == Some(plan);
            if !stays {
                task.abort();
            }
            stays
        });
        // State of replicas that are no longer watched is dropped, so that it no longer affects the policy.
        let gone: Vec<BackendId> = self.shared.registry.change(|entries| {
            let is_gone = |id: &BackendId| !plans.contains_key(id);
            let gone: Vec<_> = entries.keys().filter(|id| is_gone(id)).cloned().collect();
            entries.retain(|id, _| !is_gone(id));
            gone
        });
        for id in gone {
            let _ = self.shared.readiness.send((id, Readiness::Unknown)).await;
        }
        for (id, plan) in plans {
            if self.running.contains_key(&id) {
                continue;
            }
            let address = plan.target.address.ip().to_string();
            let forgotten = self.shared.registry.change(|entries| {
                let entry = entries.entry(id.clone()).or_default();
                // A report belongs to a worker's address, not to a backend's name.
                let other = entry.address != address;
                let forgotten = other && entry.readiness != Readiness::Unknown;
                if other {
                    *entry = ReplicaEntry { address, ..ReplicaEntry::default() };
                }
                entry.streaming = false;
                forgotten
            });
            if forgotten {
                let _ = self.shared.readiness.send((id.clone(), Readiness::Unknown)).await;
            }
            let task = self.tasks.spawn(watch(self.shared.clone(), id.clone(), plan.clone()));
            self.running.insert(id, (plan, task));
        }
    }
}

/// Adds the watches of a service's replicas.
fn plan_watches(service: &Name, s: &Service, plans: &mut BTreeMap<BackendId, WatchPlan>) {
    let Some(source) = &s.replica else { return };
    let own = if let Ports::One(port) = s.port { port } else { 0 };
    let timeout = Duration::from_millis(source.timeout_ms.into());
    for (backend, b) in &s.backends {
        // The replica listens on the backend's own port, if it has one.
        let port = source.port.or(b.port).unwrap_or(own);
        let address = SocketAddr::new(b.address, port);
        let target = FetchTarget { address, vip: s.vip, path: source.path().to_owned(), timeout };
        let probe = match s.health.kind {
            HealthKind::Unset | HealthKind::None => {
                ProbeTarget { address, vip: s.vip, kind: HealthKind::Tcp, timeout, through: None }
            }
            _ => ProbeTarget::of(s, b),
        };
        let id = BackendId { service: service.clone(), backend: backend.clone() };
        plans.insert(id, WatchPlan { target, source: source.clone(), probe });
    }
}

/// Saves the registry after each change of readiness, delayed by [`SAVE_DELAY`].
async fn save_changes(shared: Arc<WatchShared>, local: Arc<dyn Local>) {
    loop {
        shared.changed.notified().await;
        tokio::time::sleep(SAVE_DELAY).await;
        if let Err(error) = Watcher::save(&shared.registry, &*local).await {
            tracing::error!(%error, "cannot save the replica reports");
        }
    }
}
