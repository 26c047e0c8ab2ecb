//! Writer of `LOADS`, memory-mapped: the loads by which ingress programs place flows.
//!
//! Input: scores of replicas, from the replica watch, and live flows, from the reconciler. Each backend has
//! one source; values from the other are ignored. A report is one store, and resets the cost that the dataplane has
//! added since the previous report.

use super::{DataplaneError, mapped::MappedArray};
use crate::{
    observed::replica::LoadSink,
    plan::{
        compile::Cost,
        policy::load::{USUAL_CAPACITY, request_cost},
    },
};
use lb_common::{
    Load,
    load::{FLOW, next, report, source},
    names,
};
use std::mem::offset_of;

/// Writer of the map.
pub struct Loads {
    entries: MappedArray<Load>,
}

impl Loads {
    pub(super) fn new(entries: MappedArray<Load>) -> Self {
        Self { entries }
    }

    /// Reads a backend's entry; none past the end.
    pub fn get(&self, index: u32) -> Option<Load> {
        self.entries.load(index)
    }

    /// Cost of a flow on a backend relative to the service's other backends, and the source of its score.
    pub fn cost(&self, index: u32) -> Cost {
        let load = self.get(index).unwrap_or_default();
        Cost { flow: if is_by_capacity(load.source) { load.factor } else { load.cost }, source: load.source }
    }

    /// Sets what [`Loads::cost`] returns.
    pub fn set_cost(&self, index: u32, cost: Cost) -> Result<(), DataplaneError> {
        let Some(before) = self.get(index) else { return super::stored(false, names::LOADS, index) };
        // Reports give the cost in units of the replica's capacity, which is unknown before the first one.
        let factor = if is_by_capacity(cost.source) { cost.flow } else { 0 };
        let flow = match (is_by_capacity(cost.source), before.source == cost.source) {
            (false, _) => cost.flow,
            (true, false) => Load { factor, ..before }.scaled(request_cost(USUAL_CAPACITY)),
            (true, true) => rescaled(before.cost, before.factor, factor),
        };
        // The source first: a report of the old kind that arrives meanwhile is the last of its kind.
        let done = self.entries.store_u32(index, offset_of!(Load, source), cost.source)
            && self.entries.store_u32(index, offset_of!(Load, factor), factor)
            && self.entries.store_u32(index, offset_of!(Load, cost), flow);
        super::stored(done, names::LOADS, index)?;
        // A score of the old source would never be corrected by the new one.
        if before.source == cost.source { Ok(()) } else { self.clear(index) }
    }

    /// Clears a backend's load: no report so far. Costs that running programs still add count from the previous report, so
    /// they are ignored.
    pub fn clear(&self, index: u32) -> Result<(), DataplaneError> {
        let done = self.entries.store_u32(index, offset_of!(Load, is_reported), 0)
            && self.entries.store_u64(index, offset_of!(Load, report), 0);
        super::stored(done, names::LOADS, index)
    }

    /// Reports the live flows of a backend whose load is their number.
    pub fn set_flows(&self, index: u32, flows: u64) {
        let is_counted = |load: &Load| match load.source {
            source::FLOWS => true,
            source::CAPACITY_OR_FLOWS => load.is_reported == 0,
            _ => false,
        };
        if let Some(load) = self.get(index).filter(is_counted) {
            let score = flows.saturating_mul(u64::from(load.cost)).min(u64::from(u32::MAX));
            self.store(index, score as u32);
        }
    }

    /// Writes score and next number in one store.
    fn store(&self, index: u32, score: u32) -> Option<()> {
        let number = (self.get(index)?.report >> 32) as u32;
        let word = report(score, next(number));
        self.entries.store_u64(index, offset_of!(Load, report), word).then_some(())
    }
}

impl LoadSink for Loads {
    fn set(&self, backend_index: u32, score: u32, cost: u32) {
        let Some(load) = self.get(backend_index).filter(|load| is_by_capacity(load.source)) else { return };
        if cost == 0 {
            // The reports have ended.
            let _ = self.clear(backend_index);
            return;
        }
        let done = self.entries.store_u32(backend_index, offset_of!(Load, cost), load.scaled(cost))
            && self.entries.store_u32(backend_index, offset_of!(Load, is_reported), 1);
        if done {
            self.store(backend_index, load.scaled(score));
        }
    }
}

/// Whether a replica's reports give the score, in shares of its capacity.
fn is_by_capacity(source: u32) -> bool {
    matches!(source, source::CAPACITY | source::CAPACITY_OR_FLOWS)
}

/// A scaled cost when the factor changes.
fn rescaled(cost: u32, before: u32, factor: u32) -> u32 {
    let before = if before == 0 { FLOW } else { before };
    let cost = u64::from(cost) * u64::from(factor) / u64::from(before);
    u32::try_from(cost).unwrap_or(u32::MAX).max(1)
}
