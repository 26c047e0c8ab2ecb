//! A client of the reconciler: its part of the API's engine, without the kernel.
//!
//! Input: the reconciler's events and its published snapshots. Output: answers, and the [`Snapshot`] that the API shows.
//! Called by [`super::live`].

use crate::{
    apply::{
        dataplane::MapLimits,
        reconcile::{self, Event, Published, ReconcileError},
    },
    desired::model::{BackendId, Desired},
    serve::api::{
        EngineError,
        engine::{AppliedBackend, AppliedService, Removed, ServiceProblem, Snapshot},
        types::{AppliedStatus, Room},
    },
};
use futures_util::future::BoxFuture;
use lb_ebpf::FlowTable;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// Sends requests to a running reconciler, and shows what it has applied.
pub struct ReconcilerClient {
    events: mpsc::Sender<Event>,
    published: watch::Receiver<Arc<Published>>,
    limits: MapLimits,
    /// The last snapshot, and what it was made from.
    last: Mutex<Option<(Arc<Published>, Arc<Snapshot>)>>,
}

impl ReconcilerClient {
    /// Creates a client over a reconciler's channels. `limits` are those of its maps.
    pub fn new(
        events: mpsc::Sender<Event>,
        published: watch::Receiver<Arc<Published>>,
        limits: MapLimits,
    ) -> Self {
        Self { events, published, limits, last: Mutex::new(None) }
    }

    /// What the reconciler published last.
    pub fn published(&self) -> Arc<Published> {
        self.published.borrow().clone()
    }

    /// Resolves when the reconciler publishes something.
    pub fn changed(&self) -> BoxFuture<'static, ()> {
        let mut published = self.published.clone();
        published.mark_unchanged();
        Box::pin(async move {
            if published.changed().await.is_err() {
                // The reconciler has ended: nothing changes any more.
                std::future::pending().await
            }
        })
    }

    /// Sends an event to the reconciler and waits for its answer.
    async fn request<T>(
        &self,
        event: Event,
        answer: oneshot::Receiver<Result<T, ReconcileError>>,
    ) -> Result<T, EngineError> {
        let gone =
            || EngineError::Failed { what: "the reconciler has stopped: see the log of lbd".to_owned() };
        self.events.send(event).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?.map_err(|error| match error {
            ReconcileError::Compile(_) => EngineError::Refused { what: error.to_string() },
            ReconcileError::Apply(_) | ReconcileError::Together(_) => {
                EngineError::Failed { what: error.to_string() }
            }
        })
    }

    /// Checks whether a state fits. Changes nothing.
    ///
    /// # Errors
    /// [`EngineError::Refused`], or the reconciler has stopped.
    pub async fn check(&self, desired: Arc<Desired>) -> Result<(), EngineError> {
        let (fits, answer) = oneshot::channel();
        self.request(Event::Check { desired, fits }, answer).await
    }

    /// Applies a state; returns when the maps are written.
    ///
    /// # Errors
    /// The state does not fit, the maps cannot be written, or the reconciler has stopped.
    pub async fn apply(&self, desired: Arc<Desired>, revision: u64) -> Result<AppliedStatus, EngineError> {
        let (tell, answer) = oneshot::channel();
        let event = Event::Desired { desired, revision, applied: Some(tell) };
        Ok(applied(&self.request(event, answer).await?, None))
    }

    /// The applied state.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        let published = self.published();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, snapshot)) = &*last
            && Arc::ptr_eq(from, &published)
        {
            return snapshot.clone();
        }
        let snapshot = Arc::new(snapshot(&published, &self.limits));
        *last = Some((published, snapshot.clone()));
        snapshot
    }
}

fn applied(applied: &reconcile::Applied, error: Option<String>) -> AppliedStatus {
    AppliedStatus {
        revision: applied.revision,
        slots_changed: applied.written.slots.into(),
        took_us: applied.took.as_micros() as u64,
        error,
        waiting: applied.waiting.iter().map(ToString::to_string).collect(),
    }
}

fn snapshot(published: &Published, limits: &MapLimits) -> Snapshot {
    let mut snapshot =
        Snapshot { applied: applied(&published.applied, published.error.clone()), ..Snapshot::default() };
    snapshot.verdict_lags = published.verdict_lags.clone();
    let mut backends = 0;
    for (name, s) in &published.services {
        let flood = published.sweep.floods.get(&s.index).copied().unwrap_or_default();
        let state = AppliedService {
            index: s.index,
            table_size: s.table_size,
            eligible: s.eligible as usize,
            panic: s.panic,
            transition_slots: s.transition_slots,
            regions: s.regions.clone(),
            flood: flood.now,
            floods: flood.times,
        };
        snapshot.services.insert(name.clone(), state);
        for b in &s.backends {
            backends += 1;
            let tracked_flows = published.tracked_flows(b.index);
            let Some(backend) = &b.name else {
                let until = Duration::from_millis(b.removed_until_ms.unwrap_or(0).max(0) as u64);
                let (service, address) = (name.clone(), b.address);
                snapshot.removed.push(Removed { service, address, until, tracked_flows });
                continue;
            };
            let next_hop = published.observed.paths.next_hops.get(&b.address).filter(|_| b.resolved).copied();
            let problem = b.problem.clone();
            let id = BackendId { service: name.clone(), backend: backend.clone() };
            let state = AppliedBackend {
                index: b.index,
                slots: b.slots,
                tracked_flows,
                slow_start_percent: b.slow_start_percent,
                next_hop,
                resolved: b.resolved,
                unreachable: published.observed.paths.unreachable.get(&b.address).cloned(),
                problem,
                takes_flows: b.eligible,
                held: b.held,
                excluded: b.excluded.clone(),
            };
            snapshot.backends.insert(id, state);
        }
    }
    for (name, problem) in &published.problems {
        let (reason, text) = (problem.label(), problem.to_string());
        snapshot.problems.insert(name.clone(), ServiceProblem { reason, text });
    }
    let room = |what: &str, used: u64, limit: u32| Room { what: what.to_owned(), used, limit: limit.into() };
    let entries = |table: FlowTable| published.sweep.entries[table as usize];
    snapshot.room = vec![
        room("services", published.services.len() as u64, limits.services),
        room("backends", backends, limits.backends),
        room("slots", published.slots_used.into(), limits.slots),
        room("tcp flows", entries(FlowTable::Flows), limits.flows),
        room("syns", entries(FlowTable::Syns), limits.syns),
        room("udp flows", entries(FlowTable::UdpFlows), limits.flows),
        room("nat flows", published.sweep.bindings, limits.nat_flows),
        room("guard entries", published.desired.guard.len() as u64, limits.guard_entries),
    ];
    snapshot
}
