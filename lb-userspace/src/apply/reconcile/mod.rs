//! The loop that changes the maps: events → snapshot → compile → apply → publish.
//!
//! Input: [`Event`]s from the API, health checks, neighbour watch and the sweeper. Output: the maps, and
//! a [`Published`] snapshot per change. State that must outlive the daemon goes through [`Keep`]. A service that cannot
//! be changed as wanted keeps its table, is named in the snapshot, and is retried; other services do not wait for it.

mod event;
#[cfg(any(test, feature = "test-support"))]
pub mod fake;
mod grants;
mod kept;
mod lag;
mod maps;
mod mirror;
mod problem;
mod published;
mod slots;
mod sweep;
mod sweep_counts;
mod sweep_nat;
mod sweep_schedule;
mod sweep_slots;
mod tables;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_room;

pub use event::{Event, ReconcileError};
pub use kept::{Keep, Kept};
pub use maps::Maps;
pub use mirror::{Mirror, Written};
pub use problem::Problem;
pub use published::{Applied, Published};
pub use slots::{NoRoom, SlotSpace};
pub use sweep::{Sweep, Sweeper, start as start_sweeper};

#[cfg(test)]
use crate::plan::compile;
use crate::{
    apply::dataplane::DataplaneError,
    clock,
    desired::model::{BackendId, Desired, Health, Name, Observed, Paths, Readiness, RegionShares},
    plan::compile::{
        Cache, Compiled, DeploymentSettings, Memory, Past, Quiet, ServiceMemory, admit, check_guard,
        compile_each, region_needs,
    },
};
use kept::{Keeper, boot_id};
use lb_common::flow::SYN_TIMEOUT_S;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tables::TableRoom;
use tokio::sync::{mpsc, oneshot, watch};

/// Owner of the maps: applies events to them.
pub struct Reconciler<M: Maps> {
    maps: M,
    settings: DeploymentSettings,
    desired: Arc<Desired>,
    /// Whether `desired` has been received and is not just empty: until then nothing is written, because the first
    /// event after a restart (a sweep, a next hop) would remove every service.
    has_desired: bool,
    revision: u64,
    observed: Observed,
    memory: Memory,
    cache: Cache,
    mirror: Mirror,
    retired_stats: BTreeMap<Name, [u64; 3]>,
    /// Service of each backend index; its counters are added to the service's sums when the index is reused.
    owners: BTreeMap<u32, Name>,
    sweep: Arc<Sweep>,
    /// When each service (by index) was last seen in transition.
    unstable: BTreeMap<u32, Duration>,
    next_change: Option<Duration>,
    /// Services that differ from the desired state, and why.
    problems: BTreeMap<Name, Problem>,
    keeper: Keeper,
    verdicts: lag::PendingVerdicts,
    publish: watch::Sender<Arc<Published>>,
}

/// Time between a service becoming stable and the start of the first sweep that counts for it: entries
/// may be written until all CPUs see the switch.
const SETTLE: Duration = Duration::from_secs(1);
/// Time between a failure and the next attempt.
const RETRY: Duration = Duration::from_secs(1);
/// Time for which one step keeps granting regions to waiting services before it handles new events.
const GRANT_TIME: Duration = Duration::from_millis(250);
/// Maximum number of events handled together, so that a flood of events delays no answer.
const BURST: usize = 1_024;

impl<M: Maps> Reconciler<M> {
    /// Takes over the contents of the maps. `kept` is the state that the last daemon saved, if any.
    pub fn new(
        mut maps: M,
        settings: DeploymentSettings,
        kept: Option<&[u8]>,
        keep: Keep,
    ) -> Result<(Self, watch::Receiver<Arc<Published>>), DataplaneError> {
        // The last daemon may have switched a view just before.
        maps.grace_period();
        let mirror = Mirror::read(&maps)?;
        let kept = kept.and_then(|bytes| match serde_json::from_slice::<Kept>(bytes) {
            Ok(kept) if kept.boot_id == boot_id() => Some(kept),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, "cannot read the state saved by the last lbd; using the live maps instead");
                None
            }
        });
        let Kept { mut memory, retired_stats, .. } = kept.unwrap_or_default();
        let now_ms = clock::boot().as_millis() as i64;
        match maps.predecessor() {
            Some(predecessor) => memory.adopt_indices(&predecessor, now_ms),
            None => memory.adopt(&mirror.plan(), now_ms),
        }
        let (publish, published) = watch::channel(Arc::default());
        let reconciler = Self {
            maps,
            settings,
            desired: Arc::default(),
            has_desired: false,
            revision: 0,
            observed: Observed::default(),
            memory,
            cache: Cache::default(),
            mirror,
            retired_stats,
            owners: BTreeMap::new(),
            sweep: Arc::default(),
            unstable: BTreeMap::new(),
            next_change: None,
            problems: BTreeMap::new(),
            keeper: Keeper::new(keep),
            verdicts: lag::PendingVerdicts::default(),
            publish,
        };
        Ok((reconciler, published))
    }

    /// Number of services in the maps at the start, ours or those of another ABI version that forwards.
    pub fn adopted(&self) -> usize {
        self.memory.services.len()
    }

    /// Sets health, readiness, next hops and region shares that are known from before, without writing the maps.
    pub fn prime(
        &mut self,
        health: BTreeMap<BackendId, Health>,
        replicas: BTreeMap<BackendId, Readiness>,
        paths: Paths,
        steers: BTreeMap<Name, Arc<RegionShares>>,
    ) {
        self.observed.steers = steers;
        self.observed.health = health;
        self.observed.replicas = replicas;
        self.observed.paths = paths;
    }

    /// Whether the store's history may hold information about this state's services that memory shortages.
    pub fn wants_history(&self, desired: &Desired) -> bool {
        self.memory.lacks_history(desired)
    }

    /// Reconstructs recent tables from the store's history, oldest state first.
    pub fn recall(&mut self, past: &[Past]) {
        self.memory.replay_history(past, &self.settings, clock::boot().as_millis() as i64);
    }

    /// Runs until all event senders are gone. The maps stay as they are.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        loop {
            let first = match self.next_change {
                None => events.recv().await,
                Some(at) => {
                    let wait = at.saturating_sub(clock::boot());
                    match tokio::time::timeout(wait, events.recv()).await {
                        Ok(event) => event,
                        Err(_) => {
                            self.step(Vec::new(), clock::boot());
                            continue;
                        }
                    }
                }
            };
            let Some(first) = first else { return };
            let began = clock::boot();
            let mut burst = vec![first];
            while burst.len() < BURST
                && let Ok(event) = events.try_recv()
            {
                burst.push(event);
            }
            self.step(burst, began);
        }
    }

    /// Applies events, and updates the maps once.
    pub fn step(&mut self, events: Vec<Event>, began: Duration) {
        let mut asked = Vec::new();
        let mut changed = events.is_empty();
        for event in events {
            match event {
                Event::Desired { desired, revision, applied } => {
                    changed = true;
                    self.has_desired = true;
                    self.desired = desired;
                    self.revision = revision;
                    asked.extend(applied);
                }
                Event::Check { desired, fits } => {
                    // The requester may have gone; that is fine.
                    let _ = fits.send(self.check(&desired));
                }
                Event::Health { id, health, at } => {
                    if event::set_or_remove(&mut self.observed.health, id, health) {
                        changed = true;
                        self.verdicts.add(at);
                    }
                }
                Event::Replica(id, readiness) => {
                    changed |= event::set_or_remove(&mut self.observed.replicas, id, readiness);
                }
                Event::Steers(steers) => {
                    changed |= self.observed.steers != steers;
                    self.observed.steers = steers;
                }
                Event::Paths(paths) => {
                    changed |= self.observed.paths != paths;
                    self.observed.paths = paths;
                }
                Event::Attached(attached) => {
                    changed = true;
                    self.mirror.doubt_egress();
                    self.settings.attached = attached;
                }
                // Before the desired state is known, the maps' contents are not judged.
                Event::Swept(sweep) => changed |= self.has_desired && self.apply_sweep(sweep),
            }
        }
        if changed && self.has_desired {
            self.update(asked, began);
        }
    }

    /// Checks whether a state would fit, for all services together.
    fn check(&mut self, desired: &Desired) -> Result<(), ReconcileError> {
        Ok(admit(desired, &self.desired, &self.memory, &self.settings)?)
    }

    fn update(&mut self, asked: Vec<oneshot::Sender<Result<Applied, ReconcileError>>>, began: Duration) {
        let mut result = self.attempt(began);
        // Repeated, because regions that were given back are now free for waiting services.
        while result.is_ok() && self.can_grant_more() && clock::boot().saturating_sub(began) < GRANT_TIME {
            let written = result.as_ref().map(|applied| applied.written).unwrap_or_default();
            result =
                self.attempt(began).map(|applied| Applied { written: applied.written + written, ..applied });
        }
        let (applied, error) = match result {
            Ok(applied) => (Some(applied), None),
            Err(error) => {
                tracing::error!(%error, revision = self.revision, "cannot apply the desired state; the tables stay as they are");
                self.next_change = Some(clock::boot() + RETRY);
                (None, Some(error))
            }
        };
        let text = error.as_ref().map(ToString::to_string);
        let mut error = error;
        for sender in asked {
            let answer = match (&applied, error.take()) {
                (Some(applied), _) => Ok(applied.clone()),
                (None, Some(error)) => Err(error),
                // Several requests came in this batch: only one can have the error itself.
                (None, None) => Err(ReconcileError::Together(text.clone().unwrap_or_default())),
            };
            // The requester may have gone; that is fine.
            let _ = sender.send(answer);
        }
        // After the answers: if this is interrupted, indices and marks can be read back from the maps.
        self.keeper.keep(&self.memory, &self.retired_stats);
        if let Some(text) = text {
            self.publish.send_modify(|published| Arc::make_mut(published).error = Some(text));
        }
    }

    /// Whether a service waits for a region, and one may be free now.
    fn can_grant_more(&self) -> bool {
        self.mirror.has_more() && self.problems.values().any(|p| matches!(p, Problem::NoRoom(_)))
    }

    /// Grants regions, compiles, applies and publishes.
    fn attempt(&mut self, began: Duration) -> Result<Applied, ReconcileError> {
        self.observed.now = clock::boot();
        if self.can_grant_more() {
            self.mirror.wait(&mut self.maps);
        }
        let needs =
            region_needs(&self.desired, &self.memory, &self.settings, |index| self.mirror.table(index));
        let grants = self.mirror.grant(&mut self.maps, needs)?;
        let mut compiled = compile_each(
            &self.desired,
            &self.observed,
            &self.memory,
            &self.settings,
            &mut self.cache,
            &grants.waiting,
        );
        self.retain_left(&mut compiled);
        self.retire_stats(&compiled);
        let guard = self.apply_guard();
        let mut rooms = BTreeMap::new();
        for id in grants.waiting.changing.keys() {
            rooms.extend(compiled.memory.services.get(id).map(|memory| (memory.index, TableRoom::Held)));
        }
        for (id, (base, room)) in grants.regions {
            match compiled.memory.services.get(&id).filter(|_| !compiled.unchanged.contains(&id)) {
                Some(memory) => drop(rooms.insert(memory.index, TableRoom::Granted(base, room))),
                None => self.mirror.take_back((base, room)),
            }
        }
        let (written, shortages) = self.mirror.apply(&mut self.maps, &compiled.plan, &rooms)?;
        let features = self.maps.use_features(self.desired.features());
        self.problems = problem::collect(&compiled, grants.shortages, &shortages);
        let applied = Applied {
            revision: self.revision,
            written,
            took: clock::boot().saturating_sub(began),
            waiting: self.problems.keys().cloned().collect(),
        };
        self.finish(compiled, &shortages, &applied, *guard.as_ref().unwrap_or(&None));
        // These errors concern all services alike, and must not keep any service from its table.
        guard?;
        features?;
        Ok(applied)
    }

    /// Keeps services as they are that could not be compiled, or wait without a table of their own.
    fn retain_left(&self, compiled: &mut Compiled) {
        if compiled.unchanged.is_empty() {
            return;
        }
        let live = self.mirror.plan();
        for id in &compiled.unchanged {
            if let Some(memory) = compiled.memory.services.get(id) {
                compiled.plan.copy_service(id, memory.index, &live);
            }
        }
    }

    /// Adopts the result of a compilation that was written, and publishes it.
    fn finish(
        &mut self,
        compiled: Compiled,
        shortages: &BTreeMap<u32, NoRoom>,
        applied: &Applied,
        guard_end: Option<Duration>,
    ) {
        let Compiled { mut memory, status, next_change_ms, .. } = compiled;
        for (id, service) in &mut memory.services {
            // A change that the slots do not show has not happened, but its assignment of indices has.
            if shortages.contains_key(&service.index)
                && !self.mirror.matches_memory(service.index, service)
                && let Some(before) = self.memory.services.get(id)
            {
                let backends = service.backends.clone();
                *service = Arc::new(ServiceMemory { backends, ..(**before).clone() });
            }
        }
        self.memory = memory;
        let next_change = next_change_ms.map(|ms| Duration::from_millis(ms.max(0) as u64));
        self.next_change = [next_change, guard_end].into_iter().flatten().min();
        if self.can_grant_more() {
            self.next_change = Some(clock::boot());
        }
        let now = clock::boot();
        for service in &status {
            if service.transition_slots > 0 || service.exceptions {
                self.unstable.insert(service.index, now);
            }
            for backend in &service.backends {
                self.owners.insert(backend.index, service.name.clone());
            }
        }
        let written = applied.written;
        if !written.is_nothing() {
            tracing::debug!(revision = self.revision, ?written, took = ?applied.took, "tables changed");
        }
        let verdict_lags = self.verdicts.written(now);
        self.publish.send_modify(|published| {
            let last = if written.is_nothing() && published.applied.revision == applied.revision {
                published.applied.clone()
            } else {
                applied.clone()
            };
            *published = Arc::new(Published {
                revision: self.revision,
                desired: Arc::clone(&self.desired),
                observed: Arc::new(self.observed.clone()),
                services: status.into_iter().map(|s| (s.name.clone(), s)).collect(),
                sweep: Arc::clone(&self.sweep),
                retired_stats: self.retired_stats.clone(),
                applied: last,
                problems: self.problems.clone(),
                slots_used: self.mirror.used(),
                verdict_lags,
                error: None,
            });
        });
    }

    /// Applies the deny and allow lists; returns when the next entry expires, by the boot clock.
    fn apply_guard(&mut self) -> Result<Option<Duration>, ReconcileError> {
        check_guard(&self.desired, &self.settings)?;
        let now = clock::unix();
        let end_s = self.maps.apply_guard(&self.desired.guard, now.as_secs())?;
        // Entries expire at whole seconds, so update just after.
        Ok(end_s.map(|end_s| {
            clock::boot() + Duration::from_secs(end_s).saturating_sub(now) + Duration::from_millis(10)
        }))
    }

    /// Adds the counters of reassigned backend indices to the sums of their former services.
    fn retire_stats(&mut self, compiled: &Compiled) {
        let reassigned = self.mirror.reassigned_backends(&compiled.plan);
        for index in reassigned {
            if let Some(service) = self.owners.remove(&index) {
                published::add(
                    self.retired_stats.entry(service).or_default(),
                    self.maps.backend_stats(index),
                );
            }
        }
    }

    /// Shifts the memory as if time had passed.
    #[cfg(test)]
    pub fn age(&mut self, by: Duration) {
        self.memory.shift_times(-(by.as_millis() as i64));
        for service in self.memory.services.values_mut() {
            Arc::make_mut(service).changed_ms = Arc::default();
        }
    }

    /// Applies the result of a sweep; true if it freed indices or marks.
    fn apply_sweep(&mut self, sweep: Arc<Sweep>) -> bool {
        let before = self.memory.clone();
        let unstable = &self.unstable;
        self.memory.untrack_all(|index| {
            // A SYN that was cached before the service became stable may still write an entry.
            let has_syns = sweep.services_syns.contains(&index);
            let settle = if has_syns { Duration::from_secs(SYN_TIMEOUT_S.into()) } else { SETTLE };
            let is_settled = unstable.get(&index).is_none_or(|t| *t + settle < sweep.began);
            match (is_settled, sweep.services_tcp.contains(&index)) {
                (false, _) => Quiet::No,
                (true, false) => Quiet::All,
                (true, true) => {
                    sweep.slots.get(&index).map_or(Quiet::No, |set| Quiet::But(set.hashing, &set.bits))
                }
            }
        });
        let began_ms = sweep.began.as_millis() as i64;
        let services: BTreeSet<u32> = self
            .memory
            .retired
            .iter()
            .filter(|r| r.since_ms < began_ms && !sweep.services.contains(&r.service))
            .map(|r| r.service)
            .collect();
        let backends: BTreeSet<u32> = self
            .memory
            .drained(&self.desired, began_ms)
            .into_iter()
            .filter(|i| !sweep.backends.contains(i))
            .collect();
        self.memory.release(&services, &backends);
        for (&index, _) in self.mirror.counted() {
            self.maps.report_flows(index, sweep.flows.get(&index).copied().unwrap_or(0));
        }
        let flows_changed = self.sweep.flows != sweep.flows || self.sweep.floods != sweep.floods;
        self.sweep = sweep;
        let changed = self.memory != before;
        if flows_changed && !changed {
            let sweep = Arc::clone(&self.sweep);
            self.publish.send_modify(|published| Arc::make_mut(published).sweep = sweep);
        }
        changed
    }
}
