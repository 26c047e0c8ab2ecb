//! Slow start: a backend that is new, or eligible again, gets its share in four steps, so that a cold cache or a model
//! that still compiles does not get its full load immediately.
//!
//! A change of weight moves slots, and each moved slot must be tracked; so the share does not grow every second
//! but doubles: an eighth, a quarter and a half for a third of the time each, then all of it. These
//! four changes of the table together move about as many slots as one change would. After slow start the table is the
//! same as without it.
//!
//! Input: the service, eligible backends now and before. Output: weights, and when they change next. Pure.
//!
//! A backend that could take flows and gets none because other regions or versions come first is not new when its
//! turn comes.

use super::{ServiceMemory, Shape};
use crate::desired::model::Service;
use std::{collections::HashSet, net::IpAddr};

/// Parts of a full weight.
pub(super) const PARTS: u32 = 8;
/// Parts of its weight that a backend has in each third of slow start.
const STEPS: [u32; 3] = [1, 2, 4];

/// Weights during slow start, in the order of the service's backends.
pub(super) struct SlowStart {
    /// Weights for the table.
    pub weights: Vec<u32>,
    /// Factor of the table's weights over the configured ones.
    pub scale: u32,
    /// Percent of its weight that a backend has during slow start; None otherwise.
    pub percent: Vec<Option<u8>>,
    /// When the next step is due.
    pub next_ms: Option<i64>,
}

/// Starts slow start of new backends, and computes the weights. Slow start is skipped while the service itself is new
/// (until `settled`: all backends have had a verdict), and under panic, when every backend is needed.
pub(super) fn apply_slow_start(
    wanted: &Service,
    memory: &mut ServiceMemory,
    eligible: &[bool],
    (settled, panic): (bool, bool),
    now_ms: i64,
) -> SlowStart {
    let whole_ms = i64::from(wanted.slow_start_s) * 1_000;
    let served = memory.epochs.last().map_or_else(HashSet::new, |e| serving_addresses(&e.shape));
    let (mut parts, mut next_ms) = (Vec::with_capacity(eligible.len()), None::<i64>);
    for (backend, &eligible) in wanted.backends.values().zip(eligible) {
        let step = memory.backends.get_mut(&backend.address).and_then(|known| {
            if whole_ms == 0 || panic || !eligible || backend.weight == 0 {
                known.started_ms = None;
            } else if settled && !known.stands_by && !served.contains(&backend.address) {
                known.started_ms = Some(now_ms);
            }
            let step = current_step(known.started_ms?, whole_ms, now_ms);
            if step.is_none() {
                known.started_ms = None;
            }
            step
        });
        parts.push(step.map_or(PARTS, |(parts, _)| parts));
        next_ms = [next_ms, step.map(|(_, at)| at)].into_iter().flatten().min();
    }
    // Without slow start keep the configured weights, so that the table does not change.
    let is_starting = next_ms.is_some();
    let weight = |(weight, parts): (u32, &u32)| if is_starting { weight * parts } else { weight };
    SlowStart {
        scale: if is_starting { PARTS } else { 1 },
        weights: wanted.backends.values().map(|b| b.weight).zip(&parts).map(weight).collect(),
        percent: parts.iter().map(|&p| (p < PARTS).then_some((p * 100 / PARTS) as u8)).collect(),
        next_ms,
    }
}

/// Addresses of the backends that took new flows in a table.
pub(super) fn serving_addresses(shape: &Shape) -> HashSet<IpAddr> {
    shape.members.iter().filter(|m| m.eligible).map(|m| m.address).collect()
}

/// Parts that a backend has now, and when it gets more; None after slow start.
fn current_step(started_ms: i64, whole_ms: i64, now_ms: i64) -> Option<(u32, i64)> {
    let third = (whole_ms / STEPS.len() as i64).max(1);
    let done = ((now_ms - started_ms) / third).max(0);
    let parts = STEPS.get(usize::try_from(done).ok()?)?;
    Some((*parts, started_ms + third * (done + 1)))
}
