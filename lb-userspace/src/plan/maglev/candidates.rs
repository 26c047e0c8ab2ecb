//! Preselects seats that may give slots, so that not all seats are searched at each step. Called by [`super::build`]
//! while seats are added one after another.
//!
//! Only an optimisation: the result always equals that of [`SurplusFinder::find`].

use super::{
    surplus::{RANKS, SurplusFinder},
    weight_classes::WeightClasses,
};

/// Largest number of different weights for which seats are grouped into classes: this number, or one per
/// [`SEATS_PER_WEIGHT`] seats.
const MAX_WEIGHTS: usize = 8;
const SEATS_PER_WEIGHT: usize = 512;
/// Lowest rank of a candidate. With many different weights surpluses are spread evenly around 0 by up to half a slot
/// each way, so seats from half a slot on give; this leaves some margin below.
const MIN_RANK: usize = 120;
/// Keys that are compared together, and due seats that are written at a time.
const BLOCK: usize = 64;
const STEP: usize = 8;

/// Preselection over the seats of a table that is being built.
pub(super) struct Candidates {
    size: u32,
    kind: Kind,
}

enum Kind {
    /// Few different weights: many seats have the same surplus, and their order decides which of them give.
    Classes(WeightClasses),
    /// Many different weights: the seats with the greatest surpluses give.
    Keys(SeatQueue),
}

impl Candidates {
    /// Creates the preselection for seats with these weights.
    pub fn new(size: u32, weights: &[u32]) -> Self {
        let limit = MAX_WEIGHTS.max(weights.len() / SEATS_PER_WEIGHT);
        let mut different = Vec::with_capacity(limit);
        for weight in weights {
            if !different.contains(weight) {
                if different.len() == limit {
                    return Self { size, kind: Kind::Keys(SeatQueue::new(size, weights.len())) };
                }
                different.push(*weight);
            }
        }
        Self { size, kind: Kind::Classes(WeightClasses::new(weights.len())) }
    }

    /// Updates the count of slots of a seat.
    #[inline]
    pub fn update(&mut self, seat: usize, weight: u32, count: u32) {
        match &mut self.kind {
            Kind::Classes(classes) => classes.update(seat, weight, count),
            Kind::Keys(keys) => keys.update(seat, weight, count),
        }
    }

    /// Adds the next seat.
    pub fn add(&mut self, weight: u32, count: u32) {
        match &mut self.kind {
            Kind::Classes(classes) => classes.add(weight, count),
            Kind::Keys(keys) => keys.add(weight, count),
        }
    }

    /// Finds which seats give `total` slots together, at a total weight of `sum`: see [`SurplusFinder::find`].
    pub fn find(
        &mut self,
        finder: &mut SurplusFinder,
        weights: &[u32],
        counts: &[u32],
        sum: f64,
        total: u32,
    ) {
        let rate = f64::from(self.size) / sum;
        // If half of the seats give, search all of them.
        let is_found = total as usize * 2 <= counts.len()
            && match &mut self.kind {
                Kind::Classes(classes) => {
                    classes.find(finder, weights, counts, rate, total);
                    true
                }
                Kind::Keys(keys) => {
                    keys.preselect(finder, weights, counts, sum);
                    finder.find_among(weights, counts, rate, total, MIN_RANK)
                }
            };
        if !is_found {
            finder.find(weights, counts, rate, total, 0);
        }
    }
}

/// Seats, keyed by the total weight at which they may give next.
struct SeatQueue {
    size: f32,
    /// For each seat, the bits of the total weight from which on its rank is at least [`MIN_RANK`], rounded down to one in
    /// 2^15 and relative to `base`. Empty until needed.
    keys: Vec<i16>,
    base: i32,
}

impl SeatQueue {
    /// Key that is never due, and the largest key that may be due.
    const NEVER: i16 = i16::MAX;
    const LAST: i32 = Self::NEVER as i32 - 2;

    fn new(size: u32, seats: usize) -> Self {
        Self { size: size as f32, keys: Vec::with_capacity(seats), base: 0 }
    }

    /// Positive floating point numbers have the order of their bits. Subtracting one step compensates for rounding, so
    /// that no seat is late.
    #[inline]
    fn key(&self, weight: u32, count: u32) -> i16 {
        const LEAST: f32 = (MIN_RANK - 1) as f32 / RANKS as f32;
        let sum = weight as i32 as f32 * self.size / (count as i32 as f32 - LEAST);
        let steps = (sum.to_bits() as i32).saturating_sub(self.base) >> 8;
        if count > 0 { (steps - 1).clamp(0, Self::LAST + 1) as i16 } else { Self::NEVER }
    }

    #[inline]
    fn update(&mut self, seat: usize, weight: u32, count: u32) {
        if !self.keys.is_empty() {
            self.keys[seat] = self.key(weight, count);
        }
    }

    fn add(&mut self, weight: u32, count: u32) {
        if !self.keys.is_empty() {
            self.keys.push(self.key(weight, count));
        }
    }

    /// Preselects the seats whose rank is at least [`MIN_RANK`], or soon will be.
    fn preselect(&mut self, finder: &mut SurplusFinder, weights: &[u32], counts: &[u32], sum: f64) {
        let sum = (sum as f32).to_bits() as i32;
        if self.keys.is_empty() || (sum - self.base) >> 8 > Self::LAST {
            self.base = sum;
            let mut keys = std::mem::take(&mut self.keys);
            keys.clear();
            keys.extend(weights.iter().zip(counts).map(|(&weight, &count)| self.key(weight, count)));
            self.keys = keys;
        }
        let now = ((sum - self.base) >> 8) as i16;
        finder.reserve(counts.len(), STEP);
        finder.len = 0;
        for (block, first) in self.keys.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            let mut due = due_bits(block, now);
            let end = finder.len + due.count_ones() as usize;
            // The length of such a short list is unpredictable: write full steps, and overwrite the excess.
            while due != 0 {
                for seat in &mut finder.seats[finder.len..finder.len + STEP] {
                    *seat = first + due.trailing_zeros();
                    due &= due.wrapping_sub(1);
                }
                finder.len += STEP;
            }
            finder.len = end;
        }
    }
}

/// Bitmap of the due keys of a block.
fn due_bits(block: &[i16], now: i16) -> u64 {
    let mut is_due = [0u8; BLOCK];
    match <&[i16; BLOCK]>::try_from(block) {
        Ok(block) => is_due = block.map(|key| u8::from(key <= now)),
        Err(_) => is_due.iter_mut().zip(block).for_each(|(is, key)| *is = u8::from(*key <= now)),
    }
    // The multiplication gathers the lowest bits of eight bytes in the highest byte.
    let (eights, _) = is_due.as_chunks::<8>();
    eights.iter().rev().fold(0, |bits, eight| {
        bits << 8 | u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds seats, counting slots only; at each step the preselection must find the same seats as a full search.
    fn check(size: u32, weights: &[u32]) {
        let mut candidates = Candidates::new(size, weights);
        let (mut preselected, mut full) = (SurplusFinder::default(), SurplusFinder::default());
        let mut counts = vec![0; weights.len()];
        counts[0] = size;
        let mut sum = f64::from(weights[0]);
        for came in 1..weights.len() {
            sum += f64::from(weights[came]);
            let rate = f64::from(size) / sum;
            let taken = (f64::from(weights[came]) * rate + 0.5) as u32;
            candidates.find(&mut preselected, &weights[..came], &counts[..came], sum, taken);
            full.find(&weights[..came], &counts[..came], rate, taken, 0);
            assert_eq!(
                preselected.found(),
                full.found(),
                "{size} slots, {came} seats, {:?}",
                &weights[..came]
            );
            for &(seat, surplus) in full.found() {
                counts[seat as usize] -= surplus;
                counts[came] += surplus;
                candidates.update(seat as usize, weights[seat as usize], counts[seat as usize]);
            }
            candidates.add(weights[came], counts[came]);
        }
    }

    #[test]
    fn the_preselection_finds_the_same_seats_as_a_full_search() {
        let weights: [fn(u32) -> u32; 8] = [
            |_| 1,
            |i| 1 + i % 3,
            |i| 1 + i * 7 % 100,
            |i| 1 + i * i % 65_535,
            |i| 1 + i,
            |i| 65_535 - i,
            |i| if i % 50 == 7 { 65_535 } else { 1 + i % 40 },
            |i| 1 << (i * 5 % 16),
        ];
        for size in [251, 4_093, 65_537] {
            for weight in weights {
                check(size, &(0..1_200).map(weight).collect::<Vec<_>>());
            }
        }
    }
}
