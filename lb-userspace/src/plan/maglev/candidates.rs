//! Which seats may give slots, so that not all of them have to be asked at each turn. Called by [`super::deal`] while
//! seats come one after another.
//!
//! It saves work and decides nothing: whatever it does, those give that [`Debts::find`] names.

use super::{
    surplus::{Debts, RANKS},
    weight_classes::Classes,
};

/// Different weights up to which seats are put into classes: as many as this, or as many as one per so many seats.
const FEW: usize = 8;
const SEATS_PER_WEIGHT: usize = 512;
/// The least rank that is watched for. With many different weights surpluses spread evenly over a slot around none, so
/// those of half a slot give; this leaves some room below.
const WATCHED: usize = 120;
/// Keys looked at together, and how many of those due are written at a time.
const BLOCK: usize = 64;
const STEP: usize = 8;

/// The seats of a table to which seats come.
pub(super) struct Watch {
    size: u32,
    kind: Kind,
}

enum Kind {
    /// Few different weights: many seats have the same surplus, and which of them give is a matter of order.
    Classes(Classes),
    /// Many: the seats that give have the greatest surpluses.
    Keys(Keys),
}

impl Watch {
    /// For seats that come with these weights.
    pub fn new(size: u32, weights: &[u32]) -> Self {
        let few = FEW.max(weights.len() / SEATS_PER_WEIGHT);
        let mut different = Vec::with_capacity(few);
        for weight in weights {
            if !different.contains(weight) {
                if different.len() == few {
                    return Self { size, kind: Kind::Keys(Keys::new(size, weights.len())) };
                }
                different.push(*weight);
            }
        }
        Self { size, kind: Kind::Classes(Classes::new(weights.len())) }
    }

    /// Says that a seat has another count of slots.
    #[inline]
    pub fn changed(&mut self, seat: usize, weight: u32, count: u32) {
        match &mut self.kind {
            Kind::Classes(classes) => classes.changed(seat, weight, count),
            Kind::Keys(keys) => keys.changed(seat, weight, count),
        }
    }

    /// Says that the next seat has come.
    pub fn came(&mut self, weight: u32, count: u32) {
        match &mut self.kind {
            Kind::Classes(classes) => classes.came(weight, count),
            Kind::Keys(keys) => keys.came(weight, count),
        }
    }

    /// Finds who gives so that all together give `total`, now that all weights are `sum`: see [`Debts::find`].
    pub fn find(&mut self, debts: &mut Debts, weights: &[u32], counts: &[u32], sum: f64, total: u32) {
        let rate = f64::from(self.size) / sum;
        // When half of them give, all are asked.
        let is_found = total as usize * 2 <= counts.len()
            && match &mut self.kind {
                Kind::Classes(classes) => {
                    classes.find(debts, weights, counts, rate, total);
                    true
                }
                Kind::Keys(keys) => {
                    keys.choose(debts, weights, counts, sum);
                    debts.find_among(weights, counts, rate, total, WATCHED)
                }
            };
        if !is_found {
            debts.find(weights, counts, rate, total, 0);
        }
    }
}

/// Seats by when they may give next.
struct Keys {
    size: f32,
    /// Bits of the sum of all weights from which on each seat has a rank that is watched for, rounded down to one in
    /// 2^15 and counted from `base`. Empty until they are needed.
    keys: Vec<i16>,
    base: i32,
}

impl Keys {
    /// A key that is never due, and the last one that may be.
    const NEVER: i16 = i16::MAX;
    const LAST: i32 = Self::NEVER as i32 - 2;

    fn new(size: u32, seats: usize) -> Self {
        Self { size: size as f32, keys: Vec::with_capacity(seats), base: 0 }
    }

    /// Floating point numbers above 0 are in the order of their bits. One step less than what comes out makes up for
    /// its rounding, so that no seat is late.
    #[inline]
    fn key(&self, weight: u32, count: u32) -> i16 {
        const LEAST: f32 = (WATCHED - 1) as f32 / RANKS as f32;
        let sum = weight as i32 as f32 * self.size / (count as i32 as f32 - LEAST);
        let steps = (sum.to_bits() as i32).saturating_sub(self.base) >> 8;
        if count > 0 { (steps - 1).clamp(0, Self::LAST + 1) as i16 } else { Self::NEVER }
    }

    #[inline]
    fn changed(&mut self, seat: usize, weight: u32, count: u32) {
        if !self.keys.is_empty() {
            self.keys[seat] = self.key(weight, count);
        }
    }

    fn came(&mut self, weight: u32, count: u32) {
        if !self.keys.is_empty() {
            self.keys.push(self.key(weight, count));
        }
    }

    /// Chooses the seats that have a rank that is watched for, and some that will soon.
    fn choose(&mut self, debts: &mut Debts, weights: &[u32], counts: &[u32], sum: f64) {
        let sum = (sum as f32).to_bits() as i32;
        if self.keys.is_empty() || (sum - self.base) >> 8 > Self::LAST {
            self.base = sum;
            let mut keys = std::mem::take(&mut self.keys);
            keys.clear();
            keys.extend(weights.iter().zip(counts).map(|(&weight, &count)| self.key(weight, count)));
            self.keys = keys;
        }
        let now = ((sum - self.base) >> 8) as i16;
        debts.reserve(counts.len(), STEP);
        debts.len = 0;
        for (block, first) in self.keys.chunks(BLOCK).zip((0..).step_by(BLOCK)) {
            let mut due = due(block, now);
            let end = debts.len + due.count_ones() as usize;
            // Where a list of so few ends nobody foresees: what is written beyond it is written over.
            while due != 0 {
                for seat in &mut debts.seats[debts.len..debts.len + STEP] {
                    *seat = first + due.trailing_zeros();
                    due &= due.wrapping_sub(1);
                }
                debts.len += STEP;
            }
            debts.len = end;
        }
    }
}

/// Which keys of a block are due, a bit each.
fn due(block: &[i16], now: i16) -> u64 {
    let mut is_due = [0u8; BLOCK];
    match <&[i16; BLOCK]>::try_from(block) {
        Ok(block) => is_due = block.map(|key| u8::from(key <= now)),
        Err(_) => is_due.iter_mut().zip(block).for_each(|(is, key)| *is = u8::from(*key <= now)),
    }
    // The product brings the lowest bits of eight bytes together in the uppermost one.
    let (eights, _) = is_due.as_chunks::<8>();
    eights.iter().rev().fold(0, |bits, eight| {
        bits << 8 | u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deals shares, without the slots, to seats that come; at each turn those must give whom all would name.
    fn check(size: u32, weights: &[u32]) {
        let mut watch = Watch::new(size, weights);
        let (mut watched, mut asked) = (Debts::default(), Debts::default());
        let mut counts = vec![0; weights.len()];
        counts[0] = size;
        let mut sum = f64::from(weights[0]);
        for came in 1..weights.len() {
            sum += f64::from(weights[came]);
            let rate = f64::from(size) / sum;
            let taken = (f64::from(weights[came]) * rate + 0.5) as u32;
            watch.find(&mut watched, &weights[..came], &counts[..came], sum, taken);
            asked.find(&weights[..came], &counts[..came], rate, taken, 0);
            assert_eq!(watched.found(), asked.found(), "{size} slots, {came} seats, {:?}", &weights[..came]);
            for &(seat, debt) in asked.found() {
                counts[seat as usize] -= debt;
                counts[came] += debt;
                watch.changed(seat as usize, weights[seat as usize], counts[seat as usize]);
            }
            watch.came(weights[came], counts[came]);
        }
    }

    #[test]
    fn those_give_whom_all_would_name() {
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
