//! Applies a service's ejection limit: which backends are held in although they fail their checks.

use super::{ServiceMemory, service::Input, slow};
use crate::{
    desired::model::{BackendState, Health},
    plan::policy::eject::{Ejectable, EjectionLimit, limit_ejections},
};
use std::collections::HashSet;

/// Backends that the ejection limit holds in.
#[derive(Default)]
pub(super) struct HeldIn {
    /// By backend, in the order of the service's backends; empty without a limit.
    pub flags: Vec<bool>,
    /// When the next one may be taken out.
    pub next_ms: Option<i64>,
}

/// Decides which backends are held in although they fail their checks, and notes when others were taken out.
pub(super) fn hold_in(input: &Input<'_>, memory: &mut ServiceMemory) -> HeldIn {
    let Some(limit) = EjectionLimit::of(input.wanted) else {
        memory.backends.values_mut().for_each(|known| known.ejected_ms = None);
        return HeldIn::default();
    };
    let were_in = memory.epochs.last().map_or_else(HashSet::new, |e| slow::serving_addresses(&e.shape));
    let backends = input.wanted.backends.values().zip(&input.verdicts).enumerate();
    let all: Vec<Ejectable> = backends
        .map(|(i, (b, seen))| {
            let wanted = b.state == BackendState::Up && !seen.readiness.declines() && !input.is_excluded(i);
            Ejectable {
                weight: if wanted { b.weight } else { 0 },
                fails: wanted && seen.health == Health::Unhealthy,
                was_in: were_in.contains(&b.address),
                ejected_ms: memory.backends.get(&b.address).and_then(|known| known.ejected_ms),
            }
        })
        .collect();
    let found = limit_ejections(&all, limit, input.now_ms);
    for (b, ejected_ms) in input.wanted.backends.values().zip(found.ejected_ms) {
        if let Some(known) = memory.backends.get_mut(&b.address) {
            known.ejected_ms = ejected_ms;
        }
    }
    HeldIn { flags: found.held, next_ms: found.next_ms }
}
