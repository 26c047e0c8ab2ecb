//! Allocator of regions in the slot maps. A region that was given back is not used again before
//! all programs that may still read it have ended.

/// A region: its first slot, and its number of slots.
type SlotRegion = (u32, u32);

/// Free regions of a map of slots.
#[derive(Clone, Debug)]
pub struct SlotSpace {
    /// Free regions, sorted, merged where they touch.
    free: Vec<SlotRegion>,
    /// Regions given back that programs may still read.
    left: Vec<SlotRegion>,
}

/// No region of this size is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no room for a table of {wanted} slots: the largest free region has {largest} ({free} free in total, of which a region of {kept} stays free to move tables); waits until tables in transition give up slots; otherwise give a service a smaller --table-size, or start lbd with a larger --max-slots"
)]
pub struct NoRoom {
    /// Slots asked for.
    pub wanted: u32,
    /// Largest free region.
    pub largest: u32,
    /// Free slots in total.
    pub free: u32,
    /// Slots of the free region through which tables are moved.
    pub kept: u32,
}

impl SlotSpace {
    /// Creates the allocator of a map of `len` slots, all free.
    pub fn new(len: u32) -> Self {
        Self { free: if len == 0 { vec![] } else { vec![(0, len)] }, left: Vec::new() }
    }

    /// Marks a region as used, whether or not it was free; for tables found in the map.
    pub fn reserve(&mut self, base: u32, count: u32) {
        let (base, end) = (u64::from(base), u64::from(base) + u64::from(count));
        let cut = |(b, n): SlotRegion| {
            let (b, e) = (u64::from(b), u64::from(b) + u64::from(n));
            let before = (b, e.min(base));
            let after = (b.max(end), e);
            [before, after].into_iter().filter(|(b, e)| b < e).map(|(b, e)| (b as u32, (e - b) as u32))
        };
        self.free = self.free.iter().copied().flat_map(cut).collect();
    }

    /// Place of the first of the smallest regions of at least `count` slots, so that large ones stay whole.
    fn best_fit(&self, count: u32) -> Option<usize> {
        let fits = self.free.iter().enumerate().filter(|(_, (_, n))| *n >= count);
        fits.min_by_key(|(i, (_, n))| (*n, *i)).map(|(i, _)| i)
    }

    /// Whether `count` contiguous slots can be taken such that a region of `keep` slots stays free.
    pub fn can_take(&self, count: u32, keep: u32) -> bool {
        let rest = |taken: usize| {
            let left = |(i, (_, n)): (usize, &SlotRegion)| if i == taken { n - count } else { *n };
            self.free.iter().enumerate().map(left).max().unwrap_or(0)
        };
        // Any larger region would leave less.
        self.best_fit(count).is_some_and(|i| keep == 0 || rest(i) >= keep)
    }

    /// Allocates `count` slots such that a region of `keep` slots stays free.
    pub fn take_keeping(&mut self, count: u32, keep: u32) -> Result<u32, NoRoom> {
        if self.can_take(count, keep) {
            self.take(count)
        } else {
            Err(NoRoom { kept: keep, ..self.shortage(count) })
        }
    }

    fn shortage(&self, wanted: u32) -> NoRoom {
        let largest = self.free.iter().map(|r| r.1).max().unwrap_or(0);
        NoRoom { wanted, largest, free: self.free(), kept: 0 }
    }

    /// Allocates `count` slots.
    pub fn take(&mut self, count: u32) -> Result<u32, NoRoom> {
        let Some(i) = self.best_fit(count) else { return Err(self.shortage(count)) };
        let (base, n) = self.free[i];
        if n == count {
            self.free.remove(i);
        } else {
            self.free[i] = (base + count, n - count);
        }
        Ok(base)
    }

    /// Allocates `count` slots at `base`, which must be the beginning of a free region.
    pub fn take_at(&mut self, base: u32, count: u32) -> Result<u32, NoRoom> {
        match self.free.iter().position(|&(b, n)| b == base && n >= count) {
            Some(i) if self.free[i].1 == count => drop(self.free.remove(i)),
            Some(i) => self.free[i] = (base + count, self.free[i].1 - count),
            None => return Err(self.shortage(count)),
        }
        Ok(base)
    }

    /// Gives a region back; it can be allocated again after [`SlotSpace::release`].
    pub fn give_back(&mut self, base: u32, count: u32) {
        if count > 0 {
            self.left.push((base, count));
        }
    }

    /// Gives back a region that no program has ever seen.
    pub fn give_back_unused(&mut self, base: u32, count: u32) {
        if count > 0 {
            self.free.push((base, count));
            self.merge();
        }
    }

    /// Number of free slots.
    pub fn free(&self) -> u32 {
        self.free.iter().map(|r| r.1).sum()
    }

    /// Number of slots given back that programs may still read.
    pub fn left(&self) -> u32 {
        self.left.iter().map(|r| r.1).sum()
    }

    /// Free regions, in order.
    pub fn holes(&self) -> &[SlotRegion] {
        &self.free
    }

    /// Frees the regions given back: all programs that ran when the last one was given back have ended.
    pub fn release(&mut self) {
        if !self.left.is_empty() {
            self.free.append(&mut self.left);
            self.merge();
        }
    }

    fn merge(&mut self) {
        self.free.sort_unstable();
        let mut merged: Vec<SlotRegion> = Vec::with_capacity(self.free.len());
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

    #[test]
    fn a_freed_region_waits_and_merges() {
        let mut space = SlotSpace::new(100);
        let a = space.take(60).unwrap();
        let b = space.take(40).unwrap();
        space.give_back(a, 60);
        assert_eq!(space.take(60), Err(NoRoom { wanted: 60, largest: 0, free: 0, kept: 0 }));
        space.give_back(b, 40);
        space.release();
        assert_eq!(space.take(100), Ok(0));
    }

    #[test]
    fn found_tables_are_left_alone() {
        let mut space = SlotSpace::new(1_000);
        space.reserve(100, 251);
        assert_eq!(space.take(100), Ok(0));
        assert_eq!(space.take(251), Ok(351));
    }

    #[test]
    fn the_smallest_hole_is_taken_first() {
        let mut space = SlotSpace::new(1_000);
        space.reserve(600, 100);
        assert_eq!((space.take(300), space.take(500)), (Ok(700), Ok(0)));
    }

    proptest! {
        #[test]
        fn regions_never_overlap_and_none_is_lost(sizes in proptest::collection::vec((1u32..50, any::<bool>()), 1..80)) {
            let mut space = SlotSpace::new(1_000);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (size, give) in sizes {
                if give && !held.is_empty() {
                    let (base, n) = held.swap_remove(size as usize % held.len());
                    space.give_back(base, n);
                    if size % 2 == 0 {
                        space.release();
                    }
                } else if let Ok(base) = space.take(size) {
                    prop_assert!(held.iter().all(|(b, n)| base + size <= *b || b + n <= base));
                    held.push((base, size));
                }
                let used: u32 = held.iter().map(|(_, n)| n).sum();
                prop_assert_eq!(used + space.free() + space.left(), 1_000);
            }
            for (base, n) in held {
                space.give_back(base, n);
            }
            space.release();
            prop_assert_eq!(space.take(1_000), Ok(0));
        }
    }
}
