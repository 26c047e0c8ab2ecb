//! A service's table and view in the maps: written in place where that is possible, else beside the live one.
//!
//! *In place*: while the size, seed and hash of a table stay, each slot is changed by itself, the secondary first and
//! then the primary, one aligned word each. A packet reads one slot, and finds the old pair or the new one; in between,
//! the old primary with the new secondary, which says at most that its flows may have been where they are. So health,
//! drains, weights and marks need no room at all, and no waiting. *Beside*: another size, seed or hash, or a longer list
//! than there is room for, takes a region of its own, and one store switches to it.
//!
//! Called by `mirror`, which records what was written.

use super::{Maps, Mirror, NoRoom, mirror::Written, mirror::full};
use crate::{
    apply::dataplane::DataplaneError,
    plan::compile::{Hashing, Plan, ServiceEntry, View},
};
use lb_common::{Slot, service::flags, slot::NO_BACKEND};
use std::sync::Arc;

/// A service that is live.
#[derive(Clone, Debug)]
pub(super) struct Live {
    pub entry: ServiceEntry,
    /// First slot of its region, which is as long as the entry's room says.
    pub base: u32,
    /// Which view is live.
    pub bank: u32,
    /// How many grace periods had gone by when it was last switched.
    pub switched: u64,
}

/// What stands in a region: kind, first slot, end.
type Part = (u8, u32, u32);

/// The parts of a region.
fn parts(view: &View) -> [Part; 4] {
    let seconds = if view.flags & flags::SECONDS != 0 { view.slot_count } else { 0 };
    let mut at = 0;
    [(0, view.slot_count), (1, seconds), (2, view.list_count), (3, view.old_count)].map(|(kind, count)| {
        let from = at;
        at += count;
        (kind, from, at)
    })
}

/// Whether `new` can be written where `old` is live: flows fall on the same slots, and no word gets another meaning
/// than it has for those who still go by the old view.
fn fits_in_place(old: &ServiceEntry, new: &ServiceEntry) -> bool {
    let overlap = |a: &Part, b: &Part| a.1.max(b.1) < a.2.min(b.2);
    let agree = |a: &Part, b: &Part| !overlap(a, b) || (a.0, a.1) == (b.0, b.1);
    let old_table = |view: &View| (view.old_count, view.old_seed, view.flags & flags::OLD_HASH_SOURCE);
    Hashing::of(&old.view) == Hashing::of(&new.view)
        && (new.view.old_count == 0 || old_table(&new.view) == old_table(&old.view))
        && new.table.len() <= old.room as usize
        && parts(&old.view).iter().all(|a| parts(&new.view).iter().all(|b| agree(a, b)))
}

impl Mirror {
    /// Brings a service's entry up to date, in the region `granted` to it if it has one. Says what there was no room
    /// for; its slots are up to date then all the same, if flows fall on the same ones.
    pub(super) fn write_service(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        (index, entry): (u32, &ServiceEntry),
        granted: Option<(u32, u32)>,
        written: &mut Written,
    ) -> Result<Option<NoRoom>, DataplaneError> {
        let live = self.services.get(&index);
        if let Some(live) = live
            && (live.entry.view == entry.view && same_table(&live.entry, entry)
                || fits_in_place(&live.entry, entry))
        {
            granted.into_iter().for_each(|(base, room)| self.space.give_back_unused(base, room));
            self.write_in_place(maps, index, entry, written)?;
            return Ok(None);
        }
        let is_held = live.is_some_and(|live| Hashing::of(&live.entry.view) == Hashing::of(&entry.view));
        let region = match granted {
            Some((base, room)) if room as usize >= entry.table.len() => Ok((base, room)),
            other => {
                other.into_iter().for_each(|(base, room)| self.space.give_back_unused(base, room));
                let len = entry.table.len() as u32;
                let most = self.take(maps, entry.room).map(|base| (base, entry.room));
                most.or_else(
                    |lack| if len < entry.room { Ok((self.take(maps, len)?, len)) } else { Err(lack) },
                )
            }
        };
        match region {
            Ok((base, room)) => {
                self.write_beside(maps, index, &ServiceEntry { room, ..entry.clone() }, base, written)?;
                Ok(None)
            }
            Err(lack) => {
                if is_held && let Some(live) = self.services.get(&index) {
                    let partly = partly(live, entry, wanted);
                    self.write_in_place(maps, index, &partly, written)?;
                }
                Ok(Some(lack))
            }
        }
    }

    /// Takes a region, waiting for those that were given back if need be.
    pub(super) fn take(&mut self, maps: &mut impl Maps, count: u32) -> Result<u32, NoRoom> {
        let taken = self.space.take(count);
        if taken.is_ok() || self.space.left() == 0 {
            return taken;
        }
        self.wait(maps);
        self.space.take(count)
    }

    /// Waits until no program reads anything that is live no more.
    pub(super) fn wait(&mut self, maps: &mut impl Maps) {
        maps.grace_period();
        self.graces += 1;
        self.space.release();
    }

    /// Writes what differs, where the live table is.
    fn write_in_place(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        entry: &ServiceEntry,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let grows = |live: &Live| entry.table.len() > live.entry.table.len() && live.switched == self.graces;
        if self.services.get(&index).is_some_and(grows) {
            // There may have been an old table until just now.
            self.wait(maps);
        }
        let Some(live) = self.services.get_mut(&index) else { return Ok(()) };
        let (base, old, size) = (live.base, &live.entry.table, entry.view.slot_count as usize);
        let mut is_changed = false;
        if !same_table(&live.entry, entry) {
            let differs = |i: &usize| old.get(*i) != Some(&entry.table[*i]);
            let changes = |range: std::ops::Range<usize>| -> Vec<(u32, Slot)> {
                range.filter(differs).map(|i| (base + i as u32, entry.table[i])).collect()
            };
            // What stands behind the table comes first: slots that begin a transition send readers there.
            for part in [changes(size..entry.table.len()), changes(0..size)] {
                maps.rewrite_slots(&part)?;
                written.slots += part.len() as u32;
                is_changed |= !part.is_empty();
            }
        }
        live.entry.table = Arc::clone(&entry.table);
        if live.entry.view != entry.view {
            self.switch(maps, index, entry, base, written)?;
        } else {
            written.services += u32::from(is_changed);
        }
        self.trim(index, entry.room);
        Ok(())
    }

    /// Gives back what a region has more than it may need.
    fn trim(&mut self, index: u32, room: u32) {
        if let Some(live) = self.services.get_mut(&index)
            && live.entry.room > room
        {
            self.space.give_back(live.base + room, live.entry.room - room);
            live.entry.room = room;
        }
    }

    /// Writes a table into a region of its own and switches to it.
    fn write_beside(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        entry: &ServiceEntry,
        base: u32,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        maps.write_slots(base, &entry.table)?;
        written.slots += entry.table.len() as u32;
        let old = self.services.get(&index).map(|live| (live.base, live.entry.room));
        self.switch(maps, index, entry, base, written)?;
        if let Some((base, room)) = old {
            self.space.give_back(base, room);
        }
        Ok(())
    }

    /// Moves a service's table to another region, at `to` if that is free; false if there is none.
    pub(super) fn relocate(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        to: Option<u32>,
    ) -> Result<bool, DataplaneError> {
        let Some(live) = self.services.get(&index) else { return Ok(false) };
        let entry = live.entry.clone();
        let region = match to {
            Some(base) => self.space.take_at(base, entry.room),
            None => self.space.take(entry.room),
        };
        let Ok(base) = region else { return Ok(false) };
        self.write_beside(maps, index, &entry, base, &mut Written::default())?;
        Ok(true)
    }

    /// Writes the view that is not live and switches to it.
    fn switch(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        entry: &ServiceEntry,
        base: u32,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let live = self.services.get(&index);
        let bank = live.map_or(0, |live| live.bank ^ 1);
        if live.is_some_and(|live| live.switched == self.graces) {
            // Somebody may still go by the view that is written now.
            self.wait(maps);
        }
        maps.write_view(index, bank, &full(&entry.view, base))?;
        maps.set_active(index, bank)?;
        if !self.services.contains_key(&index) {
            maps.set_used(index, true)?;
        }
        // In the same region it owns what it had.
        let here = self.services.get(&index).filter(|live| live.base == base && live.entry.room > 0);
        let room = here.map_or(entry.room, |live| live.entry.room);
        let entry = ServiceEntry { room, ..entry.clone() };
        self.services.insert(index, Live { entry, base, bank, switched: self.graces });
        written.services += 1;
        Ok(())
    }
}

/// Whether two services have the same table; an unchanged one is the same allocation.
pub(super) fn same_table(a: &ServiceEntry, b: &ServiceEntry) -> bool {
    Arc::ptr_eq(&a.table, &b.table) || a.table == b.table
}

/// The slots of `wanted` with the live layout behind them, for want of room for another: who takes no new flows is
/// taken out of the table at any rate. Names behind it that are nobody's any more go.
fn partly(live: &Live, wanted: &ServiceEntry, plan: &Plan) -> ServiceEntry {
    let size = wanted.view.slot_count as usize;
    let mut table = (*live.entry.table).clone();
    table[..size].copy_from_slice(&wanted.table[..size]);
    for slot in &mut table[size..] {
        if !plan.backends.contains_key(&slot.primary_index()) {
            *slot = Slot { primary: NO_BACKEND, secondary: NO_BACKEND };
        }
    }
    let (old, layout) = (&live.entry.view, flags::SECONDS | flags::OLD_HASH_SOURCE);
    let view = View {
        flags: wanted.view.flags & !layout | old.flags & layout,
        list_count: old.list_count,
        old_count: old.old_count,
        old_seed: old.old_seed,
        ..wanted.view
    };
    ServiceEntry { view, table: Arc::new(table), room: live.entry.room }
}
