//! Runs one task per checked backend, as the desired state says.
//!
//! All probes share one thread, and begin on a grid of a hundredth of the interval (20 ms at most): on the shared
//! runtime each timer woke a processor, and a second one that looked for work.

use super::{
    EarlyProbe, HealthEntry, HealthRegistry, Obstacle, ObstacleKind, Probe, ProbeStep, ProbeTarget,
    backend_watch::watch_backend,
    passive::{Hint, POLL_INTERVAL, PassiveSource, Suspicion},
    permits::{Lane, Permit, Permits},
    tunnel::to_address,
};
use crate::{
    clock,
    desired::{
        model::{BackendId, Desired, Health, HealthCheck, Name, Service},
        store::{Local, Stored, restored},
    },
};
use futures_util::future::BoxFuture;
use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior},
};

/// Key of the verdicts in the local store.
const KEY: &str = "health";
/// How long changes are collected before they are saved.
const SAVE_DELAY: Duration = Duration::from_millis(200);

/// Coarsest grid on which probes begin, in milliseconds.
const MAX_GRID_MS: u32 = 20;

/// Shortest wait for a permit after which a probe counts as not made.
const MIN_OVERDUE: Duration = Duration::from_secs(1);

/// Late probes that may wait for their answer, per probe that may be in flight.
const LATE_PER_PROBE: usize = 8;

/// Does one probe. [`super::probe`] outside tests.
pub type Prober = Arc<dyn Fn(ProbeTarget) -> BoxFuture<'static, ProbeStep> + Send + Sync>;

/// How one backend is checked; a change restarts the task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CheckPlan {
    pub(super) target: ProbeTarget,
    pub(super) check: HealthCheck,
}

/// Checks all backends of the desired state.
pub struct Checker {
    shared: Arc<CheckerShared>,
    tasks: JoinSet<()>,
    running: BTreeMap<BackendId, Running>,
    /// Desired state that `running` implements.
    current: Arc<Desired>,
    passive: Option<Arc<dyn PassiveSource>>,
    /// Whether any service uses passive checks.
    polls_passive: bool,
}

/// A checked backend.
struct Running {
    plan: CheckPlan,
    /// None if the backend is not probed.
    task: Option<AbortHandle>,
    /// Address in the form of the packet programs.
    address: lb_common::Address,
    suspicion: Arc<Suspicion>,
}

/// What the tasks of all backends share.
pub(super) struct CheckerShared {
    pub(super) registry: Arc<HealthRegistry>,
    verdicts: mpsc::Sender<(BackendId, Health)>,
    permits: Permits,
    /// Permits of late probes, which hold a connection each.
    pub(super) late_permits: Arc<Semaphore>,
    pub(super) prober: Prober,
    changed: Notify,
    /// Origin of the grid of probes, see [`CheckerShared::probe_time`].
    began: Instant,
}

impl Checker {
    /// Creates a checker with the verdicts from before the restart. At most `probes` are in flight at once.
    /// Sends to `verdicts` each change, the known verdict when a backend appears, and none ([`Health::Unknown`]) when it is
    /// removed.
    pub fn new(
        registry: Arc<HealthRegistry>,
        probes: usize,
        prober: Prober,
        verdicts: mpsc::Sender<(BackendId, Health)>,
    ) -> Self {
        let permits = Permits::new(probes);
        let late_permits = Arc::new(Semaphore::new(LATE_PER_PROBE * permits.total()));
        let shared = Arc::new(CheckerShared {
            registry,
            verdicts,
            permits,
            late_permits,
            prober,
            changed: Notify::new(),
            began: Instant::now(),
        });
        Self {
            shared,
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
            current: Arc::default(),
            passive: None,
            polls_passive: false,
        }
    }

    /// Adds passive checks: failures that `source` counts trigger early probes.
    pub fn with_passive(self, source: Arc<dyn PassiveSource>) -> Self {
        Self { passive: Some(source), ..self }
    }

    /// Reads the registry from before the restart; an empty one if there is none.
    pub async fn restore(local: &dyn Local) -> Arc<HealthRegistry> {
        Arc::new(restored(local, KEY, "the last health verdicts", HealthRegistry::from_bytes).await)
    }

    /// Saves the registry for the next start.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn save(
        registry: &HealthRegistry,
        local: &dyn Local,
    ) -> Result<(), crate::desired::store::StoreError> {
        local.save(KEY, registry.to_bytes()).await
    }

    /// Follows the desired state until its sender is gone.
    pub async fn run(mut self, mut desired: watch::Receiver<Stored>, local: Arc<dyn Local>) {
        let saver = tokio::spawn(save_changes(self.shared.clone(), local));
        let mut polls = tokio::time::interval(POLL_INTERVAL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_changed = true;
        loop {
            if is_changed {
                let state = desired.borrow_and_update().desired.clone();
                self.update_tasks(&state).await;
                let is_passive = |r: &Running| r.task.is_some() && r.plan.check.signs;
                self.polls_passive = self.passive.is_some() && self.running.values().any(is_passive);
            }
            is_changed = tokio::select! {
                changed = desired.changed() => match changed {
                    Ok(()) => true,
                    Err(_) => break,
                },
                // Reaps aborted tasks, so that the set does not grow.
                Some(_) = self.tasks.join_next() => false,
                _ = polls.tick(), if self.polls_passive => {
                    self.poll_passive();
                    false
                }
            };
        }
        self.tasks.shutdown().await;
        saver.abort();
    }

    /// Polls the counters of passive failures.
    fn poll_passive(&self) {
        let Some(source) = &self.passive else { return };
        let now = Instant::now();
        for (id, running) in &self.running {
            if running.task.is_none() || !running.plan.check.signs {
                continue;
            }
            let signs = source.signs(&running.address);
            let (unreachable, refused) = running.suspicion.update(signs, now);
            if (unreachable, refused) != (0, 0) {
                self.shared.registry.change(|entries| {
                    if let Some(entry) = entries.get_mut(id) {
                        entry.passive.unreachable += u64::from(unreachable);
                        entry.passive.refused += u64::from(refused);
                    }
                });
            }
        }
    }

    /// Starts, restarts and stops tasks so that they match `desired`. Skips services that have not changed.
    async fn update_tasks(&mut self, desired: &Arc<Desired>) {
        let old = std::mem::replace(&mut self.current, desired.clone());
        let first = self.running.is_empty();
        let changed: BTreeMap<&Name, Option<&Service>> = {
            let gone = old.services.keys().filter(|name| !desired.services.contains_key(*name));
            let new = desired.services.iter().filter(|(name, s)| first || old.services.get(*name) != Some(s));
            gone.map(|name| (name, None)).chain(new.map(|(name, s)| (name, Some(&**s)))).collect()
        };
        let mut plans = BTreeMap::new();
        for (name, service) in &changed {
            if let Some(service) = service {
                plan_checks(name, service, &mut plans);
            }
        }
        for name in changed.keys() {
            for id in ids_of(&self.running, name) {
                if let Some(running) = self.running.get(&id)
                    && plans.get(&id) != Some(&running.plan)
                {
                    running.task.iter().for_each(AbortHandle::abort);
                    self.running.remove(&id);
                }
            }
        }
        let removed: Vec<BackendId> = self.shared.registry.change(|entries| {
            let mut removed = Vec::new();
            if first {
                // Entries of services that were removed while lbd was not running.
                let is_gone = |id: &BackendId| !desired.services.contains_key(&id.service);
                removed.extend(entries.keys().filter(|id| is_gone(id)).cloned());
            }
            for name in changed.keys() {
                removed.extend(ids_of(entries, name).into_iter().filter(|id| !plans.contains_key(id)));
            }
            for id in &removed {
                entries.remove(id);
            }
            removed
        });
        // The receiver forgets the verdict: a backend that gets the name later is another worker.
        for id in removed {
            let _ = self.shared.verdicts.send((id, Health::Unknown)).await;
        }
        let registry = self.shared.registry.clone();
        for (id, plan) in plans {
            if self.running.contains_key(&id) {
                continue;
            }
            let address = plan.target.address.ip().to_string();
            let known = registry.change(|entries| {
                let entry = entries.entry(id.clone()).or_default();
                // A verdict belongs to a worker's address, not to a backend's name.
                if entry.address != address {
                    *entry = HealthEntry { address, ..HealthEntry::default() };
                }
                entry.health
            });
            let suspicion = Arc::new(Suspicion::default());
            let task = if plan.check.kind.is_none() {
                self.shared.set_verdict(&id, Health::Healthy, "not checked").await;
                None
            } else {
                let _ = self.shared.verdicts.send((id.clone(), known)).await;
                let job =
                    watch_backend(self.shared.clone(), id.clone(), plan.clone(), known, suspicion.clone());
                Some(self.tasks.spawn(job))
            };
            self.running
                .insert(id, Running { address: to_address(plan.target.address.ip()), plan, task, suspicion });
        }
    }
}

/// Ids of a service's backends in a map of all backends.
fn ids_of<T>(all: &BTreeMap<BackendId, T>, service: &Name) -> Vec<BackendId> {
    // Names begin with a letter or digit, so "0" is the smallest name.
    let least: Name = "0".parse().expect("a digit is a valid name");
    let from = all.range(BackendId { service: service.clone(), backend: least }..);
    from.map(|(id, _)| id).take_while(|id| id.service == *service).cloned().collect()
}

/// Adds the checks of a service's backends.
fn plan_checks(service: &Name, s: &Service, plans: &mut BTreeMap<BackendId, CheckPlan>) {
    for (backend, b) in &s.backends {
        let target = ProbeTarget::of(s, b);
        let id = BackendId { service: service.clone(), backend: backend.clone() };
        plans.insert(id, CheckPlan { target, check: s.health.clone() });
    }
}

impl CheckerShared {
    /// Start of a probe that is due after `wait`, rounded up to a grid of a hundredth of the interval. Probes on the
    /// same grid line share one wake-up of the CPU; the jitter is ten times as wide.
    pub(super) fn probe_time(&self, wait: Duration, check: &HealthCheck) -> Instant {
        let step_ms = u128::from((check.interval_ms / 100).clamp(1, MAX_GRID_MS));
        let due_ms = (Instant::now() + wait).duration_since(self.began).as_micros().div_ceil(1_000);
        self.began + Duration::from_millis((due_ms.div_ceil(step_ms) * step_ms) as u64)
    }

    /// Records a verdict, if it has changed, and sends it.
    pub(super) async fn set_verdict(&self, id: &BackendId, health: Health, reason: &str) {
        let changed = self.registry.change(|entries| {
            let entry = entries.get_mut(id)?;
            let changed = entry.health != health;
            if changed {
                entry.record_transition(health, clock::unix_ms(), reason.to_owned());
            }
            Some(changed)
        });
        // Without an entry, the backend was removed meanwhile, and this task is being stopped.
        let Some(changed) = changed else { return };
        if changed {
            self.changed.notify_one();
        }
        // Sent even if unchanged: the receiver may not know the verdict yet.
        let _ = self.verdicts.send((id.clone(), health)).await;
    }

    /// Waits for a permit of the probe that was due at `due`. A probe that waits for long counts as not made, once.
    pub(super) async fn permit(
        &self,
        id: &BackendId,
        lane: Lane,
        due: Instant,
        check: &HealthCheck,
    ) -> Option<Permit<'_>> {
        let mut acquire = pin!(self.permits.acquire(lane));
        let overdue = due + Duration::from_millis(check.interval_ms.into()).max(MIN_OVERDUE);
        let permit = match tokio::time::timeout_at(overdue, &mut acquire).await {
            Ok(permit) => permit?,
            Err(_) => {
                let probes = self.permits.total();
                let what = format!(
                    "the check waits for one of {probes} probes, most of which wait for backends that do not answer"
                );
                let obstacle = Obstacle { kind: ObstacleKind::ProbeLimit, what };
                self.registry.record_not_probed(id, &obstacle, clock::unix_ms());
                acquire.await?
            }
        };
        self.registry.record_lateness(due.elapsed());
        Some(permit)
    }

    /// Records an early probe.
    pub(super) fn record_early_probe(&self, id: &BackendId, hint: Hint) {
        self.registry.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.passive.early += 1;
                entry.passive.last = Some(EarlyProbe { time_ms: clock::unix_ms(), what: hint.to_string() });
            }
        });
    }

    /// Records that an early probe succeeded.
    pub(super) fn record_refuted(&self, id: &BackendId) {
        self.registry.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.passive.refuted += 1;
            }
        });
    }

    /// Records the result of a probe, and whether the backend is no longer busy.
    pub(super) fn record_probe(&self, id: &BackendId, probe: Probe, damped: Option<u32>, ends_busy: bool) {
        self.registry.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                let count = if probe.ok { &mut entry.successes } else { &mut entry.failures };
                *count += 1;
                if ends_busy {
                    entry.busy_since_ms = None;
                }
                entry.last = Some(probe);
                entry.damped = damped;
                entry.not_probed = None;
            }
        });
    }

    /// Records that an answer is late.
    pub(super) fn record_late(&self, id: &BackendId, reason: String, took: Duration) {
        let (time_ms, took_us) = (clock::unix_ms(), took.as_micros() as u64);
        self.registry.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.late += 1;
                entry.busy_since_ms.get_or_insert(time_ms.saturating_sub(took.as_millis() as u64));
                entry.last = Some(Probe { time_ms, ok: false, reason, took_us, late: true });
                entry.not_probed = None;
            }
        });
    }
}

/// Saves the registry after each change, delayed by [`SAVE_DELAY`].
async fn save_changes(shared: Arc<CheckerShared>, local: Arc<dyn Local>) {
    loop {
        shared.changed.notified().await;
        tokio::time::sleep(SAVE_DELAY).await;
        if let Err(error) = Checker::save(&shared.registry, &*local).await {
            tracing::error!(%error, "cannot save the health verdicts");
        }
    }
}

#[cfg(test)]
mod late_tests;
#[cfg(test)]
mod tests;
