//! A service's table and view in the maps: written in place where that is possible, otherwise into another region.
//!
//! *In place*: while the size, seed and hash of a table stay, each slot is changed by itself, the secondary first and
//! then the primary, one aligned word each. A packet reads one slot, and sees the old pair or the new one; in between,
//! the old primary with the new secondary, which means at most one needless lookup of a flow's previous place. Health,
//! drains, weights and marks therefore need neither room nor waiting. *Into another region*: another size, seed or hash,
//! or a list longer than the region, takes a region of its own, and one store switches to it.
//!
//! Called by `mirror`, which records what was written.

use super::{Maps, Mirror, NoRoom, mirror::Written, mirror::service_view};
use crate::{
    apply::dataplane::DataplaneError,
    plan::compile::{Hashing, Plan, ServiceEntry, View},
};
use lb_common::{Slot, service::flags, slot::NO_BACKEND};
use std::sync::Arc;

/// A live service.
#[derive(Clone, Debug)]
pub(super) struct LiveService {
    pub entry: ServiceEntry,
    /// First slot of its region; the entry's room is the length of the region.
    pub base: u32,
    /// Index of the live view.
    pub bank: u32,
    /// Number of grace periods at its last switch.
    pub switched: u64,
}

/// Where a service's table may go if it cannot be written in place.
#[derive(Clone, Copy, Debug)]
pub enum TableRoom {
    /// Into any free region.
    Free,
    /// Into this region, base and length, granted before compilation.
    Granted(u32, u32),
    /// Nowhere: the service waits for a region for another size, seed or hash. Meanwhile it must not take the room that
    /// it waits for.
    Held,
}

/// Part of a region: kind, first slot, end.
type RegionPart = (u8, u32, u32);

/// Parts of the region of a view.
fn parts(view: &View) -> [RegionPart; 4] {
    let seconds = if view.flags & flags::SECONDS != 0 { view.slot_count } else { 0 };
    let mut at = 0;
    [(0, view.slot_count), (1, seconds), (2, view.list_count), (3, view.old_count)].map(|(kind, count)| {
        let from = at;
        at += count;
        (kind, from, at)
    })
}

/// Whether `new` can be written over the live `old`: flows map to the same slots, and no word changes its meaning for
/// programs that still use the old view.
fn fits_in_place(old: &ServiceEntry, new: &ServiceEntry) -> bool {
    let overlap = |a: &RegionPart, b: &RegionPart| a.1.max(b.1) < a.2.min(b.2);
    let agree = |a: &RegionPart, b: &RegionPart| !overlap(a, b) || (a.0, a.1) == (b.0, b.1);
    let old_table = |view: &View| (view.old_count, view.old_seed, view.flags & flags::OLD_HASH_SOURCE);
    Hashing::of(&old.view) == Hashing::of(&new.view)
        && (new.view.old_count == 0 || old_table(&new.view) == old_table(&old.view))
        && new.table.len() <= old.room as usize
        && parts(&old.view).iter().all(|a| parts(&new.view).iter().all(|b| agree(a, b)))
}

impl Mirror {
    /// Updates a service's entry, in `room` if it does not fit in place. Returns what there was no room for; the slots
    /// are then up to date nevertheless, if flows map to the same slots.
    pub(super) fn write_service(
        &mut self,
        maps: &mut impl Maps,
        wanted: &Plan,
        (index, entry): (u32, &ServiceEntry),
        room: TableRoom,
        written: &mut Written,
    ) -> Result<Option<NoRoom>, DataplaneError> {
        let live = self.services.get(&index);
        if let Some(live) = live
            && (live.entry.view == entry.view && same_table(&live.entry, entry)
                || fits_in_place(&live.entry, entry))
        {
            if let TableRoom::Granted(base, room) = room {
                self.space.give_back_unused(base, room);
            }
            self.write_in_place(maps, index, entry, written)?;
            return Ok(None);
        }
        let has_same_hashing =
            live.is_some_and(|live| Hashing::of(&live.entry.view) == Hashing::of(&entry.view));
        let shortage = match self.region_for(maps, entry, room) {
            Ok(Some((base, room))) => {
                self.write_elsewhere(maps, index, &ServiceEntry { room, ..entry.clone() }, base, written)?;
                return Ok(None);
            }
            Ok(None) => None,
            Err(shortage) => Some(shortage),
        };
        if has_same_hashing && let Some(live) = self.services.get(&index) {
            let reduced = in_live_layout(live, entry, wanted, matches!(room, TableRoom::Held));
            // Without its old table, the service may fit in place, or leave room for others.
            self.is_granting |= reduced.table.len() < live.entry.table.len();
            self.write_in_place(maps, index, &reduced, written)?;
        }
        Ok(shortage)
    }

    /// Finds a region for a table that does not fit in place; none if it must stay where it is.
    fn region_for(
        &mut self,
        maps: &mut impl Maps,
        entry: &ServiceEntry,
        room: TableRoom,
    ) -> Result<Option<(u32, u32)>, NoRoom> {
        let len = entry.table.len() as u32;
        match room {
            TableRoom::Held => return Ok(None),
            TableRoom::Granted(base, room) if room >= len => return Ok(Some((base, room))),
            TableRoom::Granted(base, room) => self.space.give_back_unused(base, room),
            TableRoom::Free => {}
        }
        match self.take(maps, entry.room, self.largest_room()) {
            Ok(base) => Ok(Some((base, entry.room))),
            Err(_) if len < entry.room => Ok(Some((self.take(maps, len, self.largest_room())?, len))),
            Err(shortage) => Err(shortage),
        }
    }

    /// Allocates a region such that one of `keep` slots stays free, after a grace period for those that were given back
    /// if necessary.
    pub(super) fn take(&mut self, maps: &mut impl Maps, count: u32, keep: u32) -> Result<u32, NoRoom> {
        let taken = self.space.take_keeping(count, keep);
        if taken.is_ok() || self.space.left() == 0 {
            return taken;
        }
        self.wait(maps);
        self.space.take_keeping(count, keep)
    }

    /// Slots of the largest region. A free one of that size lets every table move, and so all free slots be joined.
    pub(super) fn largest_room(&self) -> u32 {
        self.services.values().map(|live| live.entry.room).max().unwrap_or(0)
    }

    /// Waits until no program reads entries that are no longer live.
    pub(super) fn wait(&mut self, maps: &mut impl Maps) {
        maps.grace_period();
        self.graces += 1;
        self.freed.clear();
        self.space.release();
    }

    /// Writes the differences over the live table.
    fn write_in_place(
        &mut self,
        maps: &mut impl Maps,
        index: u32,
        entry: &ServiceEntry,
        written: &mut Written,
    ) -> Result<(), DataplaneError> {
        let grows =
            |live: &LiveService| entry.table.len() > live.entry.table.len() && live.switched == self.graces;
        if self.services.get(&index).is_some_and(grows) {
            // The place behind the table may have held an old table until just before.
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
            // The part behind the table first: slots that begin a transition refer to it.
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

    /// Gives back the part of a region that the service no longer needs.
    fn trim(&mut self, index: u32, room: u32) {
        if let Some(live) = self.services.get_mut(&index)
            && live.entry.room > room
        {
            self.space.give_back(live.base + room, live.entry.room - room);
            live.entry.room = room;
        }
    }

    /// Writes a table into another region and switches to it.
    fn write_elsewhere(
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

    /// Moves a service's table to another region, at `to` if given; false if no such region is free.
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
        self.write_elsewhere(maps, index, &entry, base, &mut Written::default())?;
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
        let in_use_at = live.map(|live| live.switched).or(self.freed.get(&index).copied());
        if in_use_at == Some(self.graces) {
            // Programs may still use the view that is written now.
            self.wait(maps);
        }
        maps.write_view(index, bank, &service_view(&entry.view, base))?;
        maps.set_active(index, bank)?;
        if !self.services.contains_key(&index) {
            maps.set_used(index, true)?;
        }
        // Within its region the service keeps the room that it has.
        let here = self.services.get(&index).filter(|live| live.base == base && live.entry.room > 0);
        let room = here.map_or(entry.room, |live| live.entry.room);
        let entry = ServiceEntry { room, ..entry.clone() };
        self.services.insert(index, LiveService { entry, base, bank, switched: self.graces });
        written.services += 1;
        Ok(())
    }
}

/// Whether two services have equal tables; an unchanged table is the same allocation.
pub(super) fn same_table(a: &ServiceEntry, b: &ServiceEntry) -> bool {
    Arc::ptr_eq(&a.table, &b.table) || a.table == b.table
}

/// The slots of `wanted` in the live layout, because there is no room for another: backends that take no new flows
/// leave the table nevertheless. Backends behind the table that no longer exist are removed, and the old table once
/// its transition is over; a service that is `held` then gives up its slots.
fn in_live_layout(live: &LiveService, wanted: &ServiceEntry, plan: &Plan, held: bool) -> ServiceEntry {
    let size = wanted.view.slot_count as usize;
    let mut table = (*live.entry.table).clone();
    table[..size].copy_from_slice(&wanted.table[..size]);
    for slot in &mut table[size..] {
        if !plan.backends.contains_key(&slot.primary_index()) {
            *slot = Slot { primary: NO_BACKEND, secondary: NO_BACKEND };
        }
    }
    let mut old = live.entry.view;
    let mut room = live.entry.room;
    if wanted.view.old_count == 0 {
        // The old table is the last part.
        table.truncate(table.len() - old.old_count as usize);
        room -= if held { old.old_count } else { 0 };
        (old.old_count, old.old_seed) = (0, [0; 2]);
        old.flags &= !flags::OLD_HASH_SOURCE;
    }
    let layout = flags::SECONDS | flags::OLD_HASH_SOURCE;
    let view = View {
        flags: wanted.view.flags & !layout | old.flags & layout,
        list_count: old.list_count,
        old_count: old.old_count,
        old_seed: old.old_seed,
        ..wanted.view
    };
    ServiceEntry { view, table: Arc::new(table), room }
}
