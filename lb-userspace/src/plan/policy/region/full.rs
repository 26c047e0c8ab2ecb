//! Full regions under the policies that send no flows elsewhere because of load: `weighted` and `active-passive`.
//!
//! Input: the inputs of a decision, and its shares. Output: which of these regions are full, and how many requests wait there.
//! Called by [`super::decide`]. Pure.

use super::{Inputs, Place, RegionDecision};

/// Whether as many requests wait as half of the slots: more than chance alone queues.
fn is_full(place: &Place) -> bool {
    !place.is_stale && place.capacity.is_some_and(|capacity| capacity > 0 && place.waiting * 2 >= capacity)
}

/// Notes the full regions among those that get flows, once they have been full for a while.
pub(super) fn note(inputs: &Inputs<'_>, before: &RegionDecision, next: &mut RegionDecision) {
    let has_share = |place: &&Place| next.shares.iter().any(|s| s.name == place.name);
    let full: Vec<&Place> = inputs.regions.iter().filter(has_share).filter(|p| is_full(p)).collect();
    let waiting: u64 = full.iter().map(|place| place.waiting).sum();
    next.spill = before.spill.clone();
    next.spill.note_unplaced(waiting as f64, inputs.now_ms);
    if next.spill.unplaced == 0 {
        return;
    }
    let used = |p: &&Place| {
        format!("{} at {} %", p.name, p.load.saturating_mul(100) / p.capacity.unwrap_or(1).max(1))
    };
    let list: Vec<String> = full.iter().map(used).collect();
    next.full = full.iter().map(|place| place.name.clone()).collect();
    next.reason = format!("{}; full: {}", next.reason, list.join(", "));
}
