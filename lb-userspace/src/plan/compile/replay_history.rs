//! What tables were made from lately, from the store's history: a host that has just started knows the
//! transitions that are going on as well as one that saw them begin.
//!
//! Input: the states in force since the drain window began, with their times. Output: a [`Memory`] with their
//! epochs, and with indices for the backends that had been there. Verdicts and replicas' reports are in no history:
//! all are taken to have been healthy, at full weight, so a transition that a verdict alone began is not known. Pure; called by `reconcile`.
//!
//! With regions, a new host relives the past of its own region: local first, as without measurements. What a spill
//! had moved elsewhere is in no history; with `gue` the second chance finds such flows.

use super::{
    BackendMemory, Memory, ServiceId, ServiceMemory, Settings,
    spread::{excluded, steer, steered},
    table::{Hashing, shape},
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

/// A desired state, and when it came into force.
#[derive(Clone, Debug)]
pub struct Past {
    /// In ms since boot; before it, below 0.
    pub from_ms: i64,
    /// The state.
    pub desired: Arc<Desired>,
}

/// Index of a backend that has none yet.
const NO_INDEX: u32 = u32::MAX;

impl Memory {
    /// Whether it lacks what history could tell about these services.
    pub fn is_ignorant_of(&self, desired: &Desired) -> bool {
        let knows = |s: &Service| self.services.get(&ServiceId::of(s)).is_some_and(|m| !m.epochs.is_empty());
        desired.services.values().any(|s| !knows(s))
    }

    /// Learns about services of which it knows no epoch. `past` is oldest first; the last is in force now.
    pub fn recall(&mut self, past: &[Past], settings: &Settings, now_ms: i64) {
        let Some(newest) = past.last() else { return };
        let by_id: Vec<(i64, &Desired, BTreeMap<ServiceId, &Service>)> = in_order(past, now_ms)
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
                let Some(index) = free.service() else { return };
                memory.index = index;
            }
            let drain_ms = i64::from(wanted.drain_s) * 1_000;
            for (from_ms, desired, services) in &by_id {
                match services.get(&id) {
                    Some(then) => relive(&mut memory, then, (desired, &settings.here), *from_ms, drain_ms),
                    None => memory.epochs.clear(),
                }
            }
            // Those that are long gone have no flows, unless the maps say so.
            memory
                .backends
                .retain(|_, b| b.index != NO_INDEX || b.removed_ms.is_none_or(|t| t + drain_ms > now_ms));
            for backend in memory.backends.values_mut().filter(|b| b.index == NO_INDEX) {
                match free.backend() {
                    Some(index) => backend.index = index,
                    None => return,
                }
            }
            self.services.insert(id, Arc::new(memory));
        }
    }
}

/// States with times that never go back, nor beyond now: several hosts' clocks made them.
fn in_order(past: &[Past], now_ms: i64) -> impl Iterator<Item = (i64, &Desired)> {
    past.iter().scan(i64::MIN, move |last, Past { from_ms, desired }| {
        *last = (*from_ms).min(now_ms).max(*last);
        Some((*last, &**desired))
    })
}

/// One state of a service.
fn relive(
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
        });
    }
    let excluded = excluded(then, here, &desired.regions);
    let candidate = |(i, b): (usize, &Backend)| Candidate {
        weight: b.weight,
        state: b.state,
        health: Health::Healthy,
        declines: excluded.get(i).is_some_and(Option::is_some),
    };
    let candidates: Vec<_> = then.backends.values().enumerate().map(candidate).collect();
    let weights: Vec<u32> = then.backends.values().map(|b| b.weight).collect();
    let rule = policy::eligible(&candidates, true, then.panic_percent);
    let hashing = Hashing::wanted(then, memory);
    // How it was spread then is in no history either: as it goes where nothing is measured.
    let steer = steer(then, here, None);
    let steered = steered(then, here, steer.as_deref(), (&weights, 1), &rule.eligible);
    let shape = shape(then, (&steered.weights, steered.scale), &steered.takes, hashing);
    memory.enter(&shape, from_ms, drain_ms);
}
