//! Writer of `LOADS`, memory-mapped: the loads by which ingress programs place flows.
//!
//! Input: scores of replicas, from the replica watch, and live flows, from the reconciler. Each backend has
//! one source; values from the other are ignored. A report is one store, and resets the cost that the dataplane has
//! added since the previous report.

use super::{DataplaneError, mapped::MappedArray};
use crate::{
    observed::replica::LoadSink,
    plan::policy::load::{USUAL_CAPACITY, request_cost},
};
use lb_common::{
    Load,
    load::{next, report, source},
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

    /// Sets the cost of a flow on a backend, and the source of its score.
    pub fn set_cost(&self, index: u32, cost: u32, source: u32) -> Result<(), DataplaneError> {
        // The cost that reports give is unknown before the first report.
        let cost = if source == source::CAPACITY { request_cost(USUAL_CAPACITY) } else { cost };
        // A score of the old source would never be corrected by the new one.
        let is_changed = self.get(index).is_some_and(|load| load.source != source);
        // The source first: a report of the old kind that arrives meanwhile is the last of its kind.
        let done = self.entries.store_u32(index, offset_of!(Load, source), source)
            && self.entries.store_u32(index, offset_of!(Load, cost), cost);
        super::stored(done, names::LOADS, index)?;
        if is_changed { self.clear(index) } else { Ok(()) }
    }

    /// Clears a backend's load: no report so far. Costs that running programs still add count from the previous report, so
    /// they are ignored.
    pub fn clear(&self, index: u32) -> Result<(), DataplaneError> {
        super::stored(self.entries.store_u64(index, offset_of!(Load, report), 0), names::LOADS, index)
    }

    /// Reports the live flows of a backend whose load is their number.
    pub fn set_flows(&self, index: u32, flows: u64) {
        if let Some(load) = self.get(index).filter(|l| l.source == source::FLOWS) {
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
        if cost == 0 {
            // The reports have ended. A report that was under way when the source changed is cleared too.
            if self.get(backend_index).is_some_and(|l| l.source != source::FLOWS) {
                let _ = self.clear(backend_index);
            }
            return;
        }
        let is_reported = self.get(backend_index).is_some_and(|l| l.source == source::CAPACITY);
        if is_reported && self.entries.store_u32(backend_index, offset_of!(Load, cost), cost) {
            self.store(backend_index, score);
        }
    }
}
