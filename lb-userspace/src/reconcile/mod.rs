//! The one loop that changes the maps: events → snapshot → compile → apply → publish.
//!
//! Input: [`Event`]s from the API, health checks, neighbour watch and the sweeper. Output: the maps, and
//! a [`Published`] snapshot per change. What must outlive the daemon goes through [`Keep`]. A change that
//! does not fit is refused whole; the maps keep what they have.

#[cfg(test)]
mod fake;
mod maps;
mod mirror;
mod pace;
mod published;
mod slots;
mod sweep;
mod sweep_nat;
mod tally;
#[cfg(test)]
mod tests;

pub use maps::Maps;
pub use mirror::{ApplyError, Mirror, Written};
pub use published::{Applied, Published};
pub use slots::{NoRoom, QUARANTINE, SlotSpace};
pub use sweep::{Sweep, Sweeper, start as start_sweeper};

use crate::{
    clock,
    compile::{Cache, CompileError, Compiled, Memory, Past, Settings, compile},
    dataplane::DataplaneError,
    model::{BackendId, Desired, Health, Name, Observed, Paths, Readiness, Steer},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// Something that may change the maps.
#[derive(Debug)]
pub enum Event {
    /// A new desired state.
    Desired {
        /// The state.
        desired: Arc<Desired>,
        /// Its revision.
        revision: u64,
        /// Told when it is in the maps, or why not.
        applied: Option<oneshot::Sender<Result<Applied, ReconcileError>>>,
    },
    /// Would this state fit? Changes nothing.
    Check {
        /// The state.
        desired: Arc<Desired>,
        /// Told.
        fits: oneshot::Sender<Result<(), ReconcileError>>,
    },
    /// A backend's verdict.
    Health(BackendId, Health),
    /// What a backend's replica says.
    Replica(BackendId, Readiness),
    /// How services are spread over regions and versions, all of them.
    Steers(BTreeMap<Name, Arc<Steer>>),
    /// All next hops.
    Paths(Paths),
    /// Interfaces that the program is attached to, all of them: index and name.
    Attached(BTreeMap<u32, String>),
    /// A sweep of the flow tables.
    Swept(Arc<Sweep>),
}

/// Why a state is not in the maps.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// It cannot be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// It cannot be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A state that came at the same moment failed, and this one with it.
    #[error("{0}")]
    Together(String),
}

/// What must outlive the daemon, beside the desired state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    /// The boot that the clock of `memory` belongs to.
    pub boot_id: String,
    /// Who has which index, and what the tables were made from lately.
    pub memory: Memory,
    /// See [`Published::retired_stats`].
    pub retired_stats: BTreeMap<Name, [u64; 3]>,
}

/// Where [`Kept`] goes; called with its JSON after each change of it.
pub type Keep = Box<dyn Fn(Vec<u8>) + Send>;

/// The reconciler.
pub struct Reconciler<M: Maps> {
    maps: M,
    settings: Settings,
    desired: Arc<Desired>,
    /// Whether `desired` is somebody's word and not just empty: until then nothing is written, or an
    /// event that comes first after a restart (a sweep, a next hop) would remove every service.
    told: bool,
    revision: u64,
    observed: Observed,
    memory: Memory,
    cache: Cache,
    mirror: Mirror,
    retired_stats: BTreeMap<Name, [u64; 3]>,
    /// Counters to add to a service's sums when the index is used again: index → service.
    owners: BTreeMap<u32, Name>,
    sweep: Arc<Sweep>,
    /// When each service (by index) was last seen in transition.
    unstable: BTreeMap<u32, Duration>,
    next_change: Option<Duration>,
    keep: Keep,
    kept: Vec<u8>,
    publish: watch::Sender<Arc<Published>>,
}

/// After a service became stable, a sweep must begin this much later to speak for it: entries
/// may be written until the switch is seen by all processors.
const SETTLE: Duration = Duration::from_secs(1);
/// After a failure, time to the next attempt.
const RETRY: Duration = Duration::from_secs(1);
/// Events taken together at most, so that a flood of them delays no answer.
const BURST: usize = 1_024;

/// The boot that the clock counts from.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

impl<M: Maps> Reconciler<M> {
    /// Takes over what the maps hold. `kept` is what the last daemon left, if anything.
    pub fn new(
        maps: M,
        settings: Settings,
        kept: Option<&[u8]>,
        keep: Keep,
    ) -> Result<(Self, watch::Receiver<Arc<Published>>), DataplaneError> {
        let mirror = Mirror::read(&maps)?;
        let kept = kept.and_then(|bytes| match serde_json::from_slice::<Kept>(bytes) {
            Ok(kept) if kept.boot_id == boot_id() => Some(kept),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(%error, "what the last lbd left cannot be read; the live maps are taken instead");
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
            told: false,
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
            keep,
            kept: Vec::new(),
            publish,
        };
        Ok((reconciler, published))
    }

    /// Gives verdicts, replicas' words, next hops and decisions that are known from before, without writing anything
    /// yet.
    pub fn prime(
        &mut self,
        health: BTreeMap<BackendId, Health>,
        replicas: BTreeMap<BackendId, Readiness>,
        paths: Paths,
        steers: BTreeMap<Name, Arc<Steer>>,
    ) {
        self.observed.steers = steers;
        self.observed.health = health;
        self.observed.replicas = replicas;
        self.observed.paths = paths;
    }

    /// Whether history could tell something about this state's services that memory does not.
    pub fn wants_history(&self, desired: &Desired) -> bool {
        self.memory.is_ignorant_of(desired)
    }

    /// Learns from the store's history what tables were made from lately, oldest first.
    pub fn recall(&mut self, past: &[Past]) {
        self.memory.recall(past, &self.settings, clock::boot().as_millis() as i64);
    }

    /// Runs until nobody can send events any more. The maps stay as they are.
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

    /// Takes events in, and brings the maps up to date once.
    pub fn step(&mut self, events: Vec<Event>, began: Duration) {
        let mut asked = Vec::new();
        let mut changed = events.is_empty();
        for event in events {
            match event {
                Event::Desired { desired, revision, applied } => {
                    changed = true;
                    self.told = true;
                    self.desired = desired;
                    self.revision = revision;
                    asked.extend(applied);
                }
                Event::Check { desired, fits } => {
                    // Nobody may be waiting any more, which is fine.
                    let _ = fits.send(self.check(&desired));
                }
                Event::Health(id, health) => {
                    changed |= self.observed.health.insert(id, health) != Some(health);
                }
                Event::Replica(id, readiness) => {
                    let replicas = &mut self.observed.replicas;
                    let before = match readiness {
                        Readiness::Unknown => replicas.remove(&id),
                        _ => replicas.insert(id, readiness),
                    };
                    changed |= before.unwrap_or_default() != readiness;
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
                    changed |= self.settings.attached != attached;
                    self.settings.attached = attached;
                }
                Event::Swept(sweep) => changed |= self.swept(sweep),
            }
        }
        if changed && self.told {
            self.bring_up_to_date(asked, began);
        }
    }

    /// Whether a state would fit.
    fn check(&mut self, desired: &Desired) -> Result<(), ReconcileError> {
        self.observed.now = clock::boot();
        // With the live cache: what is tried is as a rule what comes next.
        compile(desired, &self.observed, &self.memory, &self.settings, &mut self.cache)?;
        Ok(())
    }

    fn bring_up_to_date(
        &mut self,
        asked: Vec<oneshot::Sender<Result<Applied, ReconcileError>>>,
        began: Duration,
    ) {
        let result = self.attempt(began);
        let (applied, error) = match result {
            Ok(applied) => (Some(applied), None),
            Err(error) => {
                tracing::error!(%error, revision = self.revision, "the tables stay as they are");
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
                // More than one asked in this burst: only one can have the error itself.
                (None, None) => Err(ReconcileError::Together(text.clone().unwrap_or_default())),
            };
            // Nobody may be waiting any more, which is fine.
            let _ = sender.send(answer);
        }
        // After the answers: indices and marks can be read back from the maps if this is cut short.
        self.keep();
        if let Some(text) = text {
            self.publish.send_modify(|published| Arc::make_mut(published).error = Some(text));
        }
    }

    /// Compile, apply, keep, publish.
    fn attempt(&mut self, began: Duration) -> Result<Applied, ReconcileError> {
        self.observed.now = clock::boot();
        let compiled = compile(&self.desired, &self.observed, &self.memory, &self.settings, &mut self.cache)?;
        self.add_up_reused(&compiled);
        let next_end = self.guard()?;
        let written = self.mirror.apply(&mut self.maps, &compiled.plan, clock::boot)?;
        self.maps.use_features(self.desired.features()).map_err(ApplyError::from)?;
        let applied = Applied { revision: self.revision, written, took: clock::boot().saturating_sub(began) };
        let Compiled { plan: _, memory, status, next_change_ms } = compiled;
        self.memory = memory;
        let next_change = next_change_ms.map(|ms| Duration::from_millis(ms.max(0) as u64));
        self.next_change = [next_change, next_end].into_iter().flatten().min();
        let now = clock::boot();
        for service in &status {
            if service.transition_slots > 0 || service.exceptions {
                self.unstable.insert(service.index, now);
            }
            for backend in &service.backends {
                self.owners.insert(backend.index, service.name.clone());
            }
        }
        if !written.is_nothing() {
            tracing::debug!(revision = self.revision, ?written, took = ?applied.took, "tables changed");
        }
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
                error: None,
            });
        });
        Ok(applied)
    }

    /// Deny and allow lists; when on the boot's clock the next entry ends.
    fn guard(&mut self) -> Result<Option<Duration>, ApplyError> {
        let now = clock::unix();
        let end_s = self.maps.apply_guard(&self.desired.guard, now.as_secs())?;
        // Seconds are whole, so it is over just after.
        Ok(end_s.map(|end_s| {
            clock::boot() + Duration::from_secs(end_s).saturating_sub(now) + Duration::from_millis(10)
        }))
    }

    /// Before an index goes to another backend, its counters go to its old service's sums.
    fn add_up_reused(&mut self, compiled: &Compiled) {
        let live = self.mirror.backends();
        let fresh: Vec<u32> = compiled.plan.backends.keys().filter(|i| !live.contains(i)).copied().collect();
        for index in fresh {
            if let Some(service) = self.owners.remove(&index) {
                published::add(
                    self.retired_stats.entry(service).or_default(),
                    self.maps.backend_stats(index),
                );
            }
        }
    }

    /// Takes a sweep in; true if indices or marks became free by it.
    fn swept(&mut self, sweep: Arc<Sweep>) -> bool {
        let before = self.memory.clone();
        let settled = |index: &u32| self.unstable.get(index).is_none_or(|t| *t + SETTLE < sweep.began);
        let quiet: Vec<u32> = self
            .memory
            .services
            .values()
            .map(|s| s.index)
            .filter(|i| !sweep.services_tcp.contains(i) && settled(i))
            .collect();
        for index in quiet {
            self.memory.untrack(index);
        }
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

    /// Writes down what must outlive the daemon, if it has changed.
    fn keep(&mut self) {
        let kept = Kept {
            boot_id: boot_id(),
            memory: self.memory.clone(),
            retired_stats: self.retired_stats.clone(),
        };
        let bytes = serde_json::to_vec(&kept).expect("its maps have keys that JSON can have");
        if bytes != self.kept {
            (self.keep)(bytes.clone());
            self.kept = bytes;
        }
    }
}
