//! Rebuilds the epochs of tables from the store's history, so that a host that has just started knows the
//! transitions in progress as well as one that saw them begin.
//!
//! Input: the states in effect since the drain window began, with their times. Output: a [`Memory`] with their
//! epochs, and with indices for the backends of that time. The history has no verdicts or replica reports:
//! all backends count as healthy, at full weight, so a transition that only a verdict caused is not known. Pure;
//! called by `reconcile`.
//!
//! With regions, a new host relives the past of its own region: local first, as without measurements. What a spill
//! had moved elsewhere is in no history; with `gue` the second chance finds such flows.

use super::{
    BackendMemory, DeploymentSettings, Memory, ServiceId, ServiceMemory,
    residency::excluded_backends,
    spread::{region_shares, region_weights},
    table::{Hashing, build_shape},
};
use crate::{
    desired::model::{Backend, Desired, Health, Locality, Service},
    plan::policy::{self, Candidate},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

/// A desired state, and when it took effect.
#[derive(Clone, Debug)]
pub struct Past {
    /// Start in ms since boot; negative before boot.
    pub from_ms: i64,
    /// The desired state.
    pub desired: Arc<Desired>,
}

/// Placeholder index of a backend that has none yet.
const NO_INDEX: u32 = u32::MAX;

impl Memory {
    /// Whether any of these services has no epochs, which the history could provide.
    pub fn lacks_history(&self, desired: &Desired) -> bool {
        let has_epochs =
            |s: &Service| self.services.get(&ServiceId::of(s)).is_some_and(|m| !m.epochs.is_empty());
        desired.services.values().any(|s| !has_epochs(s))
    }

    /// Replays the history of services without epochs. `past` is oldest first; the last state is in effect now.
    pub fn replay_history(&mut self, past: &[Past], settings: &DeploymentSettings, now_ms: i64) {
        let Some(newest) = past.last() else { return };
        let by_id: Vec<(i64, &Desired, BTreeMap<ServiceId, &Service>)> = monotonic_times(past, now_ms)
            .map(|(from_ms, desired)| {
                (from_ms, desired, desired.services.values().map(|s| (ServiceId::of(s), &**s)).collect())
            })
            .collect();
        let mut free = self.free_indices(&settings.limits);
        for wanted in newest.desired.services.values() {
            let id = ServiceId::of(wanted);
            let known = self.services.get(&id);
            if known.is_some_and(|memory| !memory.epochs.is_empty()) {
                continue;
            }
            let mut memory = known.map(|memory| (**memory).clone()).unwrap_or_default();
            if known.is_none() {
                let Some(index) = free.take_service() else { return };
                memory.index = index;
            }
            let drain_ms = i64::from(wanted.drain_s) * 1_000;
            for (from_ms, desired, services) in &by_id {
                match services.get(&id) {
                    Some(then) => {
                        replay_state(&mut memory, then, (desired, &settings.here), *from_ms, drain_ms)
                    }
                    None => memory.epochs.clear(),
                }
            }
            // Backends removed before the drain window have no flows, unless the maps have an entry.
            memory
                .backends
                .retain(|_, b| b.index != NO_INDEX || b.removed_ms.is_none_or(|t| t + drain_ms > now_ms));
            for backend in memory.backends.values_mut().filter(|b| b.index == NO_INDEX) {
                match free.take_backend() {
                    Some(index) => backend.index = index,
                    None => return,
                }
            }
            self.services.insert(id, Arc::new(memory));
        }
    }
}

/// States with monotonic times up to now: their times come from the clocks of several hosts.
fn monotonic_times(past: &[Past], now_ms: i64) -> impl Iterator<Item = (i64, &Desired)> {
    past.iter().scan(i64::MIN, move |last, Past { from_ms, desired }| {
        *last = (*from_ms).min(now_ms).max(*last);
        Some((*last, &**desired))
    })
}

/// Replays one past state of a service.
fn replay_state(
    memory: &mut ServiceMemory,
    then: &Service,
    (desired, here): (&Desired, &Locality),
    from_ms: i64,
    drain_ms: i64,
) {
    let there: BTreeSet<IpAddr> = then.backends.values().map(|b| b.address).collect();
    for (address, backend) in &mut memory.backends {
        backend.removed_ms =
            if there.contains(address) { None } else { backend.removed_ms.or(Some(from_ms)) };
    }
    for address in there {
        memory.backends.entry(address).or_insert(BackendMemory {
            index: NO_INDEX,
            removed_ms: None,
            started_ms: None,
            stands_by: false,
            forbidden: false,
            ejected_ms: None,
        });
    }
    let excluded = excluded_backends(then, here, &desired.regions);
    let candidate = |(i, b): (usize, &Backend)| Candidate {
        weight: b.weight,
        state: b.state,
        health: Health::Healthy,
        declines: excluded.get(i).is_some_and(Option::is_some),
        is_unreachable: false,
        is_held: false,
    };
    let candidates: Vec<_> = then.backends.values().enumerate().map(candidate).collect();
    let weights: Vec<u32> = then.backends.values().map(|b| b.weight).collect();
    let rule = policy::eligible(&candidates, true, then.panic_threshold());
    let hashing = Hashing::wanted(then, memory);
    // The history has no region shares either: use those without measurements.
    let shares = region_shares(then, here, None);
    let weighted = region_weights(then, here, shares.as_deref(), (&weights, 1), &rule.eligible);
    let shape = build_shape(then, (&weighted.weights, weighted.scale), &weighted.takes, hashing);
    memory.start_epoch(&shape, from_ms, drain_ms);
}
