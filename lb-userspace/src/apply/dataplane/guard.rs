//! Writes the deny and allow lists into the maps.
//!
//! Writes are ordered so that a packet never meets fewer entries than both the old and the new lists have: first added
//! entries, then lengths and bitmaps, then removed entries. A daemon that starts adopts the contents of the maps,
//! and writes the differences.

use super::{DataplaneError, batch, grace_period, mapped::MappedArray};
use crate::{
    desired::model::guard::{Guard, ListName, stands},
    plan::compile::guard::{
        ALL_BLOCKS, Blocks, GuardTable, add_length, blocks_of, filter_bit, join_ranges, key_of, net_of,
    },
};
use aya::maps::MapData;
use ipnet::IpNet;
use lb_common::{
    guard::{GuardKey, GuardState, Lengths, block, verdict},
    names,
    slot::{LINE, Line},
};
use std::collections::BTreeSet;

/// Maximum number of block ranges that are written one by one; beyond it, all blocks are written at once.
const RANGES: usize = 4_096;

/// The maps of the lists, and their contents.
pub struct GuardWriter {
    blocks: MappedArray<Line>,
    filter: MappedArray<Line>,
    state: MappedArray<GuardState>,
    entries: MapData,
    table: GuardTable,
    /// Lists that the maps were last made from; none if unknown, or after a failed write.
    applied: Option<Guard>,
    /// Times at which entries expire.
    ends: BTreeSet<(u64, IpNet)>,
}

impl GuardWriter {
    /// Adopts the maps.
    pub fn new(
        blocks: MappedArray<Line>,
        filter: MappedArray<Line>,
        state: MappedArray<GuardState>,
        entries: MapData,
    ) -> Self {
        let (table, ends) = (GuardTable::default(), BTreeSet::new());
        Self { blocks, filter, state, entries, table, applied: None, ends }
    }

    /// Maximum number of prefixes.
    pub fn capacity(&self) -> Result<u32, DataplaneError> {
        let info = self.entries.info().map_err(|source| DataplaneError::Map { map: NAME, source })?;
        Ok(info.max_entries())
    }

    /// Updates the maps; returns when the next entry expires.
    pub fn apply(&mut self, guard: &Guard, now_s: u64) -> Result<Option<u64>, DataplaneError> {
        let result = self.write(guard, now_s);
        match &result {
            Ok(_) => self.applied = Some(guard.clone()),
            Err(_) => self.applied = None,
        }
        result
    }

    fn write(&mut self, guard: &Guard, now_s: u64) -> Result<Option<u64>, DataplaneError> {
        let is_first = self.applied.is_none();
        if is_first {
            self.read()?;
        }
        let changed = self.changed(guard, now_s);
        let (mut puts, mut removals, mut ranges, mut bits) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for net in changed {
            let wanted =
                guard.verdict(net, now_s).map(|denies| if denies { verdict::DENY } else { verdict::ALLOW });
            if wanted == self.table.get(net) {
                continue;
            }
            match wanted {
                Some(verdict) => puts.push((key_of(net), verdict)),
                None => removals.push(key_of(net)),
            }
            ranges.extend(blocks_of(net));
            bits.extend(filter_bit(net));
            self.table.set(net, wanted);
        }
        let has_more = is_first && !self.table.is_empty();
        if puts.is_empty() && removals.is_empty() && !has_more {
            return Ok(self.next_end(now_s));
        }
        batch::update(&self.entries, NAME, &puts)?;
        // Added lengths are written before a bitmap leads to them, removed ones after none does.
        self.store_state(true)?;
        if has_more || ranges.len() > RANGES {
            self.paint(ALL_BLOCKS)?;
        } else {
            join_ranges(ranges).into_iter().try_for_each(|range| self.paint(range))?;
        }
        if has_more || bits.len() > RANGES {
            for (word, value) in (0..).zip(self.table.filter_words()) {
                store_word(&self.filter, names::GUARD_FILTER, word, value)?;
            }
        } else {
            for word in bits.iter().map(|bit| bit / 32).collect::<BTreeSet<_>>() {
                store_word(&self.filter, names::GUARD_FILTER, word, self.table.filter_word(word))?;
            }
        }
        self.store_state(false)?;
        if !removals.is_empty() {
            grace_period();
        }
        for key in &removals {
            batch::delete(&self.entries, key)
                .map_err(|source| DataplaneError::Write { map: NAME, source })?;
        }
        Ok(self.next_end(now_s))
    }

    /// Prefixes whose verdict may differ from the table's.
    fn changed(&mut self, guard: &Guard, now_s: u64) -> BTreeSet<IpNet> {
        let mut changed = BTreeSet::new();
        match &self.applied {
            None => {
                self.ends.clear();
                changed.extend(self.table.nets());
                for name in ListName::ALL {
                    for (net, until) in guard.list(name).iter() {
                        changed.insert(net);
                        if until != 0 {
                            self.ends.insert((until, net));
                        }
                    }
                }
            }
            Some(old) => {
                for name in ListName::ALL {
                    for (net, _, until) in guard.list(name).changes(old.list(name)) {
                        changed.insert(net);
                        self.ends.extend(until.filter(|until| *until != 0).map(|until| (until, net)));
                    }
                }
            }
        }
        while let Some((until, net)) = self.ends.first().copied()
            && !stands(until, now_s)
        {
            changed.insert(net);
            self.ends.pop_first();
        }
        changed
    }

    fn next_end(&self, now_s: u64) -> Option<u64> {
        self.ends.first().map(|(until, _)| (*until).max(now_s))
    }

    /// Reads the table from the entries.
    fn read(&mut self) -> Result<(), DataplaneError> {
        let mut table = GuardTable::default();
        batch::for_each(&self.entries, NAME, |key: GuardKey, verdict: u32| {
            if let Some(net) = net_of(&key) {
                table.set(net, Some(verdict));
            }
        })?;
        self.table = table;
        Ok(())
    }

    fn paint(&self, range: Blocks) -> Result<(), DataplaneError> {
        // Whole words, so that nothing has to be read first.
        let first = range.start() / block::IN_WORD * block::IN_WORD;
        let last = range.end() / block::IN_WORD * block::IN_WORD + block::IN_WORD - 1;
        let states = self.table.blocks(first..=last);
        for (word, states) in (first / block::IN_WORD..).zip(states.chunks_exact(block::IN_WORD as usize)) {
            let value = states.iter().rev().fold(0u32, |word, state| word << 2 | u32::from(*state));
            store_word(&self.blocks, names::GUARD_BLOCKS, word, value)?;
        }
        Ok(())
    }

    /// Writes the lengths in use; with `with_old`, together with those that were in use before.
    fn store_state(&self, with_old: bool) -> Result<(), DataplaneError> {
        let missing = || super::missing(names::GUARD_STATE, 0);
        let live = self.state.load(0).ok_or_else(missing)?;
        let active = live.active & 1;
        let (mut v4, mut v6) = (self.table.v4_mask(), self.table.v6_lengths());
        if with_old {
            v4 |= live.v4;
            v6 = union(&v6, &live.v6[active as usize]);
        }
        if v4 != live.v4 {
            let offset = std::mem::offset_of!(GuardState, v4);
            super::stored(self.state.store_u32(0, offset, v4), names::GUARD_STATE, 0)?;
        }
        if v6 == live.v6[active as usize] {
            return Ok(());
        }
        // No program reads the idle list: a grace period has passed since it was live.
        let mut next = self.state.load(0).ok_or_else(missing)?;
        next.v6[(active ^ 1) as usize] = v6;
        super::stored(self.state.store(0, &next), names::GUARD_STATE, 0)?;
        let offset = std::mem::offset_of!(GuardState, active);
        super::stored(self.state.store_u32(0, offset, active ^ 1), names::GUARD_STATE, 0)?;
        grace_period();
        Ok(())
    }
}

const NAME: &str = names::GUARD_ENTRIES;

/// Union of both lists of lengths, longest first.
fn union(a: &Lengths, b: &Lengths) -> Lengths {
    let of = |l: &Lengths| l.bits.iter().take(l.count as usize).copied().collect::<Vec<_>>();
    let all: BTreeSet<[u8; 2]> = of(a).into_iter().chain(of(b)).collect();
    let mut lengths = Lengths::NONE;
    all.into_iter().rev().for_each(|[bits, _]| add_length(&mut lengths, bits));
    lengths
}

fn store_word(
    lines: &MappedArray<Line>,
    map: &'static str,
    word: u32,
    value: u32,
) -> Result<(), DataplaneError> {
    let (line, offset) = (word / LINE, (word % LINE) as usize * 4);
    if lines.load_u32(line, offset) == Some(value) {
        return Ok(());
    }
    super::stored(lines.store_u32(line, offset, value), map, line)
}
