//! The SYN cache and the flow filter: what programs do with a line of [`lb_common::note`].
//!
//! Generic over the line, so that native tests run the code that the kernel runs.

use lb_common::note::{WAYS, age_s, backend, head, is_of, may_have, recent_bit, yields};

/// A line of the SYN cache, whose words are read and written in one piece each.
pub trait SynLine {
    /// Head of an entry, `way` below [`WAYS`].
    fn head(&self, way: usize) -> u64;
    /// Sequence number of an entry.
    fn sequence(&self, way: usize) -> u32;
    /// Writes the head of an entry.
    fn set_head(&self, way: usize, head: u64);
    /// Writes the sequence number of an entry.
    fn set_sequence(&self, way: usize, sequence: u32);
}

/// A line of the flow filter, whose words are read and written in one piece each.
pub trait FilterLine {
    /// Flows that lbd has found in the table, by two independent hashes.
    fn settled(&self) -> (u64, u32);
    /// Flows written since, of both epochs.
    fn recent(&self) -> [u16; 2];
    /// Writes the word of one epoch.
    fn set_recent(&self, is_first: bool, bits: u16);
}

/// The answer of [`find`] for a flow without an entry.
pub const NOT_FOUND: u64 = u64::MAX;

/// Where a recent SYN was placed: sequence number (high half), age in seconds (bits 24–31), backend;
/// [`NOT_FOUND`] if the line has no entry of the flow.
#[inline(always)]
pub fn find<L: SynLine>(line: &L, mark: u64, now_s: u32) -> u64 {
    let mut way = 0;
    while way < WAYS {
        let head = line.head(way);
        if is_of(head, mark) {
            return (line.sequence(way) as u64) << 32 | (age_s(head, now_s) << 24 | backend(head)) as u64;
        }
        way += 1;
    }
    NOT_FOUND
}

/// Writes where a SYN is placed, over the flow's own entry or the one that yields most.
#[inline(always)]
pub fn insert<L: SynLine>(line: &L, mark: u64, backend: u32, sequence: u32, now_s: u32) {
    let (mut victim, mut most, mut way) = (0, 0, 0);
    while way < WAYS {
        let weight = yields(line.head(way), mark, now_s);
        if weight >= most {
            (victim, most) = (way, weight);
        }
        way += 1;
    }
    // Tells the verifier the bound.
    let victim = victim % WAYS;
    line.set_sequence(victim, sequence);
    line.set_head(victim, head(mark, backend, now_s));
}

/// Removes a flow's entry.
#[inline(always)]
pub fn forget<L: SynLine>(line: &L, mark: u64) {
    let mut way = 0;
    while way < WAYS {
        if is_of(line.head(way), mark) {
            line.set_head(way, 0);
        }
        way += 1;
    }
}

/// Sets a flow's bit in the current epoch of the filter.
#[inline(always)]
pub fn expect<L: FilterLine>(line: &L, epoch: u32, mark: u64) {
    let is_first = epoch & 1 == 0;
    let recent = line.recent();
    let bits = if is_first { recent[0] } else { recent[1] };
    let bit = recent_bit(mark);
    if bits & bit == 0 {
        line.set_recent(is_first, bits | bit);
    }
}

/// Whether the table of flows may hold a flow. Never false for one that it holds.
#[inline(always)]
pub fn may_hold<L: FilterLine>(line: &L, mark: u64) -> bool {
    let (first, second) = line.settled();
    may_have(first, second, line.recent(), mark)
}
