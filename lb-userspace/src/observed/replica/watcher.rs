//! One task per replica, following the desired state.

use super::{
    Entry, ReplicaRegistry, Scores,
    http::Ask,
    watch::{Plan, Shared, watch},
};
use crate::{
    desired::{
        model::{BackendId, Desired, HealthKind, Name, Ports, Readiness, Service},
        store::{Local, StoreError, Stored, restored},
    },
    observed::health::{ProbeTarget, Prober},
};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::{AbortHandle, JoinSet},
};

/// Key of what replicas last said in the local store.
const KEY: &str = "replicas";
/// How long changes are gathered before they are saved.
const SAVE_DELAY: Duration = Duration::from_millis(200);

/// Keeps the replicas watched.
pub struct Watcher {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
    running: BTreeMap<BackendId, (Plan, AbortHandle)>,
}

impl Watcher {
    /// With what was known before the restart. At most `looks` attempts are under way at once. Changes of
    /// readiness are sent to `said`, scores go to `scores` with each report.
    pub fn new(
        book: Arc<ReplicaRegistry>,
        looks: usize,
        prober: Prober,
        said: mpsc::Sender<(BackendId, Readiness)>,
        scores: Arc<Scores>,
    ) -> Self {
        let permits = Semaphore::new(looks.max(1));
        let shared = Shared { book, said, scores, prober, permits, changed: Notify::new() };
        Self { shared: Arc::new(shared), tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// Reads the book of before the restart, or an empty one.
    pub async fn restore(local: &dyn Local) -> Arc<ReplicaRegistry> {
        Arc::new(restored(local, KEY, "what replicas last said", ReplicaRegistry::restore).await)
    }

    /// Writes the book down for the next start.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn save(book: &ReplicaRegistry, local: &dyn Local) -> Result<(), StoreError> {
        local.save(KEY, book.save()).await
    }

    /// Follows the desired state until its sender is gone.
    pub async fn run(mut self, mut desired: watch::Receiver<Stored>, local: Arc<dyn Local>) {
        let saver = tokio::spawn(save(self.shared.clone(), local));
        loop {
            let state = desired.borrow_and_update().desired.clone();
            self.follow(&state).await;
            tokio::select! {
                changed = desired.changed() => if changed.is_err() { break },
                // Tasks only end by being stopped; this keeps the set from growing.
                Some(_) = self.tasks.join_next() => {}
            }
        }
        self.tasks.shutdown().await;
        saver.abort();
    }

    /// Starts, restarts and stops tasks so that they match `desired`.
    async fn follow(&mut self, desired: &Desired) {
        let mut plans = BTreeMap::new();
        for (name, service) in &desired.services {
            plan(name, service, &mut plans);
        }
        self.running.retain(|id, (plan, task)| {
            let stays = plans.get(id) == Some(plan);
            if !stays {
                task.abort();
            }
            stays
        });
        // What is no longer watched is no longer known: a draining replica's word ends with the question.
        let gone: Vec<BackendId> = self.shared.book.change(|entries| {
            let is_gone = |id: &BackendId| !plans.contains_key(id);
            let gone: Vec<_> = entries.keys().filter(|id| is_gone(id)).cloned().collect();
            entries.retain(|id, _| !is_gone(id));
            gone
        });
        for id in gone {
            let _ = self.shared.said.send((id, Readiness::Unknown)).await;
        }
        for (id, plan) in plans {
            if self.running.contains_key(&id) {
                continue;
            }
            let address = plan.ask.address.ip().to_string();
            let forgotten = self.shared.book.change(|entries| {
                let entry = entries.entry(id.clone()).or_default();
                // A report is about a worker, not about a name.
                let other = entry.address != address;
                let forgotten = other && entry.readiness != Readiness::Unknown;
                if other {
                    *entry = Entry { address, ..Entry::default() };
                }
                entry.streaming = false;
                forgotten
            });
            if forgotten {
                let _ = self.shared.said.send((id.clone(), Readiness::Unknown)).await;
            }
            let task = self.tasks.spawn(watch(self.shared.clone(), id.clone(), plan.clone()));
            self.running.insert(id, (plan, task));
        }
    }
}

/// What is to be watched of a service.
fn plan(service: &Name, s: &Service, plans: &mut BTreeMap<BackendId, Plan>) {
    let Some(source) = &s.replica else { return };
    let own = if let Ports::One(port) = s.port { port } else { 0 };
    let timeout = Duration::from_millis(source.timeout_ms.into());
    for (backend, b) in &s.backends {
        // Where the backend has a port of its own, its replica is there.
        let port = source.port.or(b.port).unwrap_or(own);
        let address = SocketAddr::new(b.address, port);
        let ask = Ask { address, vip: s.vip, path: source.path().to_owned(), timeout };
        let probe = match s.health.kind {
            HealthKind::None => {
                ProbeTarget { address, vip: s.vip, kind: HealthKind::Tcp, timeout, through: None }
            }
            _ => ProbeTarget::of(s, b),
        };
        let id = BackendId { service: service.clone(), backend: backend.clone() };
        plans.insert(id, Plan { ask, source: source.clone(), probe });
    }
}

/// Saves the book a moment after each change of readiness.
async fn save(shared: Arc<Shared>, local: Arc<dyn Local>) {
    loop {
        shared.changed.notified().await;
        tokio::time::sleep(SAVE_DELAY).await;
        if let Err(error) = Watcher::save(&shared.book, &*local).await {
            tracing::error!(%error, "what replicas said cannot be saved");
        }
    }
}
