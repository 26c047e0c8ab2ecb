//! Allocation of slot regions to services.
//!
//! New services and those with another size, seed or hash need a region; others do not (see `tables`). Before
//! compilation, each of them gets its region or has to wait: a waiting new service is left out, the others are
//! compiled with their present size, seed and hash, so that health and drains go on. Shrinking services come first,
//! because they free slots for others. Where the free slots are not contiguous, tables are compacted.

use super::{Maps, Mirror, NoRoom};
use crate::{
    apply::dataplane::DataplaneError,
    desired::model::Name,
    plan::compile::{Hashing, RegionNeed, ServiceId, WaitingForRoom},
};
use std::collections::BTreeMap;

/// Maximum number of tables that are moved per attempt.
const MOVES: u32 = 8;

/// Regions granted, and services that wait.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// Regions, base and length.
    pub regions: BTreeMap<ServiceId, (u32, u32)>,
    /// Services that wait, for `compile`.
    pub waiting: WaitingForRoom,
    /// Why services wait, for status.
    pub shortages: BTreeMap<Name, NoRoom>,
}

impl Mirror {
    /// Hashing of a service's table, which determines the slot of a flow, and the number of slots that it owns.
    pub(super) fn table(&self, index: u32) -> Option<(Hashing, u32)> {
        self.services.get(&index).map(|live| (Hashing::of(&live.entry.view), live.entry.room))
    }

    /// Grants regions while there is room.
    pub(super) fn grant(
        &mut self,
        maps: &mut impl Maps,
        needs: Vec<RegionNeed>,
    ) -> Result<Grants, DataplaneError> {
        let grants = self.try_grant(maps, needs);
        if grants.is_err() {
            self.recover(maps);
        }
        grants
    }

    fn try_grant(
        &mut self,
        maps: &mut impl Maps,
        mut needs: Vec<RegionNeed>,
    ) -> Result<Grants, DataplaneError> {
        needs.sort_by_key(|need| i64::from(need.from_to.1) - i64::from(need.from_to.0));
        let mut grants = Grants::default();
        self.is_granting = false;
        // Moving a table leaves its size.
        let largest_live = self.largest_room();
        for need in needs {
            let largest = largest_live.max(need.slots);
            let mut region = self.take(maps, need.slots, largest);
            // A region granted in this attempt holds no table yet, and cannot be moved until the next attempt.
            if region.is_err() && grants.regions.is_empty() {
                // Where no transition ends that would free more, the last free region is better used than kept.
                let keeps = if self.is_settled() { &[largest, 0][..] } else { &[largest] };
                for &keep in keeps {
                    // Moves that are left for the next attempt come first.
                    if region.is_err() && !self.is_granting && self.compact(maps, need.slots, keep)? {
                        region = self.take(maps, need.slots, keep);
                    }
                }
            }
            match (region, need.live) {
                (Ok(base), _) => {
                    grants.regions.insert(need.id, (base, need.slots));
                }
                (Err(shortage), live) => {
                    grants.shortages.insert(need.name, shortage);
                    match live {
                        Some(live) => drop(grants.waiting.changing.insert(need.id, live)),
                        None => drop(grants.waiting.new.insert(need.id)),
                    }
                }
            }
        }
        Ok(grants)
    }

    /// Whether no service has an old table.
    fn is_settled(&self) -> bool {
        self.services.values().all(|live| live.entry.view.old_count == 0)
    }

    /// Compacts tables until `count` contiguous slots are free, and a region of `keep` slots besides; false if there are
    /// not so many free slots, or no hole is large enough to move a table through.
    ///
    /// A table is moved like any other change: written elsewhere, then switched to. The table behind the first hole moves
    /// away and back to the beginning of the hole, so that the hole joins the next one.
    fn compact(&mut self, maps: &mut impl Maps, count: u32, keep: u32) -> Result<bool, DataplaneError> {
        if self.space.free() < count.saturating_add(keep) {
            return Ok(false);
        }
        // Each round puts one table in its final place.
        for _ in 0..MOVES {
            if self.space.can_take(count, keep) {
                return Ok(true);
            }
            let Some(&(hole, _)) = self.space.holes().first() else { return Ok(false) };
            let behind = self.services.iter().filter(|(_, live)| live.entry.room > 0 && live.base > hole);
            let Some((&index, live)) = behind.min_by_key(|(_, live)| live.base) else { return Ok(false) };
            let room = live.entry.room;
            // A table that does not fit the first hole moves through the largest one.
            if self.space.holes().first().is_none_or(|&(_, n)| n < room)
                && !self.relocate(maps, index, None)?
            {
                return Ok(false);
            }
            self.wait(maps);
            if !self.relocate(maps, index, Some(hole))? {
                return Ok(false);
            }
            self.wait(maps);
        }
        // Other events may be more urgent: the rest follows in the next attempt.
        self.is_granting = true;
        Ok(false)
    }
}
