//! Who gets a region, and who waits for one.
//!
//! New services and those with another size, seed or hash need a region; nobody else does (see `tables`). Before
//! anything is compiled, each of them is granted its region or has to wait: a new service is left out, the others are
//! compiled with the size, seed and hash that they have, so that health and drains go on. Those that shrink come first,
//! as they make room for the others. Where there is room, but not in one piece, tables are moved together.

use super::{Maps, Mirror, NoRoom};
use crate::{
    apply::dataplane::DataplaneError,
    desired::model::Name,
    plan::compile::{Hashing, RegionNeed, ServiceId, Waiting},
};
use std::collections::BTreeMap;

/// Tables that are moved in one go.
const MOVES: u32 = 8;

/// What was granted, and who waits.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// Regions, base and length.
    pub regions: BTreeMap<ServiceId, (u32, u32)>,
    /// For `compile`.
    pub waiting: Waiting,
    /// Why, for people.
    pub lacks: BTreeMap<Name, NoRoom>,
}

impl Mirror {
    /// A service's table: what decides on which slot a flow falls, and how many slots it owns.
    pub(super) fn table(&self, index: u32) -> Option<(Hashing, u32)> {
        self.services.get(&index).map(|live| (Hashing::of(&live.entry.view), live.entry.room))
    }

    /// Grants regions, for as many as there is room.
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
        for need in needs {
            let mut region = self.take(maps, need.slots);
            // What was granted just now is no table yet, and cannot be moved: the next time.
            if region.is_err() && grants.regions.is_empty() && self.move_together(maps, need.slots)? {
                region = self.take(maps, need.slots);
            }
            match (region, need.live) {
                (Ok(base), _) => {
                    grants.regions.insert(need.id, (base, need.slots));
                }
                (Err(lack), live) => {
                    grants.lacks.insert(need.name, lack);
                    match live {
                        Some(live) => drop(grants.waiting.changing.insert(need.id, live)),
                        None => drop(grants.waiting.new.insert(need.id)),
                    }
                }
            }
        }
        Ok(grants)
    }

    /// Makes a hole of `count` slots by moving tables together; false if there are not so many free slots, or no hole
    /// is large enough to move anything through.
    ///
    /// A table is moved like any other change: written anew elsewhere, then switched to. One that stands right behind a
    /// hole goes away and comes back to the hole's beginning, so that the hole joins the next.
    fn move_together(&mut self, maps: &mut impl Maps, count: u32) -> Result<bool, DataplaneError> {
        if self.space.free() < count {
            return Ok(false);
        }
        // Each round puts one table in its place.
        for _ in 0..MOVES {
            if self.space.holes().iter().any(|&(_, n)| n >= count) {
                return Ok(true);
            }
            let Some(&(hole, _)) = self.space.holes().first() else { return Ok(false) };
            let behind = self.services.iter().filter(|(_, live)| live.entry.room > 0 && live.base > hole);
            let Some((&index, live)) = behind.min_by_key(|(_, live)| live.base) else { return Ok(false) };
            let room = live.entry.room;
            // Through the largest hole, if it does not fit right away.
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
        // Others may have something more urgent: the rest next time.
        self.is_granting = true;
        Ok(false)
    }
}
