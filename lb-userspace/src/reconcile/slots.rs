//! Which parts of the `SLOTS` map are free: regions for tables, with a quarantine after use.

use std::time::Duration;

/// Time for which a freed region is not written: a program that still reads it has long ended.
pub const QUARANTINE: Duration = Duration::from_millis(500);

/// A region: its first slot, and how many.
type Region = (u32, u32);

/// Free regions of a map of slots.
#[derive(Clone, Debug)]
pub struct SlotSpace {
    /// Free, sorted, never touching one another.
    free: Vec<Region>,
    /// Freed, with the time from which they may be used again.
    quarantined: Vec<(Region, Duration)>,
}

/// No region of this size is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for a table of {wanted} slots: the largest free region has {largest} ({free} free in all); give the service a smaller --table-size, or start lbd with a larger --max-slots"
)]
pub struct NoRoom {
    /// Slots asked for.
    pub wanted: u32,
    /// Largest free region.
    pub largest: u32,
    /// Free slots in all, quarantined ones not counted.
    pub free: u32,
}

impl SlotSpace {
    /// A map of `len` slots of which nothing is used.
    pub fn new(len: u32) -> Self {
        Self { free: if len == 0 { vec![] } else { vec![(0, len)] }, quarantined: Vec::new() }
    }

    /// Marks a region as used, whatever it was; for tables found in the map.
    pub fn reserve(&mut self, base: u32, count: u32) {
        let (base, end) = (u64::from(base), u64::from(base) + u64::from(count));
        let cut = |(b, n): Region| {
            let (b, e) = (u64::from(b), u64::from(b) + u64::from(n));
            let before = (b, e.min(base));
            let after = (b.max(end), e);
            [before, after].into_iter().filter(|(b, e)| b < e).map(|(b, e)| (b as u32, (e - b) as u32))
        };
        self.free = self.free.iter().copied().flat_map(cut).collect();
    }

    /// Takes a region of `count` slots.
    pub fn take(&mut self, count: u32, now: Duration) -> Result<u32, NoRoom> {
        self.release_quarantined(now);
        let Some(i) = self.free.iter().position(|(_, n)| *n >= count) else {
            let largest = self.free.iter().map(|r| r.1).max().unwrap_or(0);
            return Err(NoRoom { wanted: count, largest, free: self.free.iter().map(|r| r.1).sum() });
        };
        let (base, n) = self.free[i];
        if n == count {
            self.free.remove(i);
        } else {
            self.free[i] = (base + count, n - count);
        }
        Ok(base)
    }

    /// Gives a region back; it may be taken again after the quarantine.
    pub fn give_back(&mut self, base: u32, count: u32, now: Duration) {
        if count > 0 {
            self.quarantined.push(((base, count), now + QUARANTINE));
        }
    }

    /// When the next region comes out of quarantine.
    pub fn next_release(&self) -> Option<Duration> {
        self.quarantined.iter().map(|q| q.1).min()
    }

    fn release_quarantined(&mut self, now: Duration) {
        let (due, rest) = self.quarantined.drain(..).partition::<Vec<_>, _>(|q| q.1 <= now);
        self.quarantined = rest;
        if due.is_empty() {
            return;
        }
        self.free.extend(due.into_iter().map(|q| q.0));
        self.free.sort_unstable();
        let mut merged: Vec<Region> = Vec::with_capacity(self.free.len());
        for (base, n) in self.free.drain(..) {
            match merged.last_mut() {
                Some(last) if last.0 + last.1 == base => last.1 += n,
                _ => merged.push((base, n)),
            }
        }
        self.free = merged;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LATER: Duration = Duration::from_secs(10);

    #[test]
    fn a_freed_region_waits_and_merges() {
        let mut space = SlotSpace::new(100);
        let a = space.take(60, Duration::ZERO).unwrap();
        let b = space.take(40, Duration::ZERO).unwrap();
        space.give_back(a, 60, Duration::ZERO);
        assert_eq!(space.take(60, QUARANTINE / 2), Err(NoRoom { wanted: 60, largest: 0, free: 0 }));
        space.give_back(b, 40, Duration::ZERO);
        assert_eq!(space.take(100, LATER), Ok(0));
    }

    #[test]
    fn found_tables_are_left_alone() {
        let mut space = SlotSpace::new(1_000);
        space.reserve(100, 251);
        assert_eq!(space.take(100, Duration::ZERO), Ok(0));
        assert_eq!(space.take(251, Duration::ZERO), Ok(351));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_none_is_lost(sizes in proptest::collection::vec((1u32..50, any::<bool>()), 1..80)) {
            let mut space = SlotSpace::new(1_000);
            let mut held: Vec<(u32, u32)> = Vec::new();
            let mut now = Duration::ZERO;
            for (size, give) in sizes {
                now += QUARANTINE;
                if give && !held.is_empty() {
                    let (base, n) = held.swap_remove(size as usize % held.len());
                    space.give_back(base, n, now);
                } else if let Ok(base) = space.take(size, now) {
                    prop_assert!(held.iter().all(|(b, n)| base + size <= *b || b + n <= base));
                    held.push((base, size));
                }
            }
            for (base, n) in held {
                space.give_back(base, n, now);
            }
            prop_assert_eq!(space.take(1_000, now + LATER), Ok(0));
        }
    }
}
