//! The loads that ingress programs place by: `LOADS`, memory-mapped.
//!
//! Input: scores of replicas, from whoever reads their reports, and live flows, from the reconciler. Each backend has
//! one source; what the other says is left out. A report is one store, and ends what the dataplane has added since
//! the last one.

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

/// The map's writer.
pub struct Loads {
    entries: MappedArray<Load>,
}

impl Loads {
    pub(super) fn new(entries: MappedArray<Load>) -> Self {
        Self { entries }
    }

    /// A backend's entry; None past the end.
    pub fn get(&self, index: u32) -> Option<Load> {
        self.entries.load(index)
    }

    /// Sets what a flow costs on a backend, and where its score comes from.
    pub fn set_cost(&self, index: u32, cost: u32, source: u32) -> Result<(), DataplaneError> {
        // What reports say of the cost is not known before the first one.
        let cost = if source == source::CAPACITY { request_cost(USUAL_CAPACITY) } else { cost };
        // What one source said is nothing that the other would ever correct.
        let is_other = self.get(index).is_some_and(|load| load.source != source);
        // Source first: a report of the other kind that comes meanwhile is the last of its kind.
        let done = self.entries.store_u32(index, offset_of!(Load, source), source)
            && self.entries.store_u32(index, offset_of!(Load, cost), cost);
        super::stored(done, names::LOADS, index)?;
        if is_other { self.clear(index) } else { Ok(()) }
    }

    /// Forgets a backend's load: no report so far. What programs that still run add is for the one before, so it does
    /// not count.
    pub fn clear(&self, index: u32) -> Result<(), DataplaneError> {
        super::stored(self.entries.store_u64(index, offset_of!(Load, report), 0), names::LOADS, index)
    }

    /// Reports live flows, for a backend whose load is their number.
    pub fn set_flows(&self, index: u32, flows: u64) {
        if let Some(load) = self.get(index).filter(|l| l.source == source::FLOWS) {
            let score = flows.saturating_mul(u64::from(load.cost)).min(u64::from(u32::MAX));
            self.store(index, score as u32);
        }
    }

    /// One store: score and the next number.
    fn store(&self, index: u32, score: u32) -> Option<()> {
        let number = (self.get(index)?.report >> 32) as u32;
        let word = report(score, next(number));
        self.entries.store_u64(index, offset_of!(Load, report), word).then_some(())
    }
}

impl LoadSink for Loads {
    fn set(&self, backend_index: u32, score: u32, cost: u32) {
        if cost == 0 {
            // Nobody reports any more. A report that was under way when the source changed goes with it.
            if self.get(backend_index).is_some_and(|l| l.source != source::FLOWS) {
                let _ = self.clear(backend_index);
            }
            return;
        }
        let is_asked = self.get(backend_index).is_some_and(|l| l.source == source::CAPACITY);
        if is_asked && self.entries.store_u32(backend_index, offset_of!(Load, cost), cost) {
            self.store(backend_index, score);
        }
    }
}
