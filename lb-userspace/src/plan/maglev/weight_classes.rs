//! Seats of few different weights: many have the same weight and count of slots, so one surplus is computed for all of
//! them, and the giving seats are read from bitmaps. Called by [`super::candidates`].

use super::surplus::{RANKS, Ranks, SurplusFinder, least_rank, surplus};

/// Seats per word of a bitmap.
const WORD: usize = u64::BITS as usize;

/// All seats with the same weight and count of slots.
struct WeightClass {
    weight: u32,
    count: u32,
    /// Number of seats; an empty class is reused for another weight and count.
    len: u16,
    /// Bitmap of the seats.
    seats: Vec<u64>,
    /// Class to which a seat of this class moved last: the next seat mostly moves there too.
    next: usize,
    over: i32,
}

/// The seats of a table by class.
pub(super) struct WeightClasses {
    /// Class of each seat; empty until needed.
    of: Vec<u16>,
    all: Vec<WeightClass>,
    words: usize,
}

impl WeightClasses {
    /// Creates empty classes for a number of seats.
    pub fn new(seats: usize) -> Self {
        Self { of: Vec::with_capacity(seats), all: Vec::new(), words: seats.div_ceil(WORD) }
    }

    /// Updates the count of slots of a seat.
    pub fn update(&mut self, seat: usize, weight: u32, count: u32) {
        let Some(&class) = self.of.get(seat) else { return };
        let class = class as usize;
        let old = &mut self.all[class];
        old.len -= 1;
        old.seats[seat / WORD] &= !(1 << (seat % WORD));
        let next = old.next;
        let next = if self.all[next].is_of(weight, count) { next } else { self.class_of(weight, count) };
        self.all[class].next = next;
        self.insert(seat, next);
        self.of[seat] = next as u16;
    }

    /// Adds the next seat.
    pub fn add(&mut self, weight: u32, count: u32) {
        if !self.of.is_empty() {
            self.push(weight, count);
        }
    }

    fn push(&mut self, weight: u32, count: u32) {
        let class = self.class_of(weight, count);
        self.insert(self.of.len(), class);
        self.of.push(class as u16);
    }

    fn insert(&mut self, seat: usize, class: usize) {
        let class = &mut self.all[class];
        class.len += 1;
        class.seats[seat / WORD] |= 1 << (seat % WORD);
    }

    /// Finds or creates the class of a weight and a count. There are never more classes than seats.
    fn class_of(&mut self, weight: u32, count: u32) -> usize {
        if let Some(class) = self.all.iter().position(|class| class.is_of(weight, count)) {
            return class;
        }
        let class = self.all.iter().position(|class| class.len == 0).unwrap_or_else(|| {
            let seats = vec![0; self.words];
            self.all.push(WeightClass { weight, count, len: 0, seats, next: 0, over: 0 });
            self.all.len() - 1
        });
        (self.all[class].weight, self.all[class].count) = (weight, count);
        class
    }

    /// Finds giving seats: see [`SurplusFinder::find`].
    pub fn find(
        &mut self,
        finder: &mut SurplusFinder,
        weights: &[u32],
        counts: &[u32],
        rate: f64,
        total: u32,
    ) {
        if self.of.is_empty() {
            weights.iter().zip(counts).for_each(|(&weight, &count)| self.push(weight, count));
        }
        let mut ranks: Ranks = [0; RANKS];
        let mut whole = 0;
        for class in self.all.iter_mut().filter(|class| class.len > 0) {
            class.over = surplus(class.weight, class.count, rate);
            whole += class.over as u32 / RANKS as u32 * u32::from(class.len);
            ranks[class.over as usize % RANKS] += class.len;
        }
        let split = least_rank(&ranks, total, whole);
        let (least, mut missing) = split;
        // Classes of which all seats give, and classes of which only the first few give.
        let all = || self.all.iter().filter(|class| class.len > 0 && class.over > 0);
        let giving: Vec<&WeightClass> = all().filter(|class| class.over as usize >= least).collect();
        let below: Vec<&WeightClass> = all().filter(|class| class.over as usize + 1 == least).collect();
        finder.reserve(counts.len(), 0);
        finder.len = 0;
        let with = |bits, classes: &[&WeightClass], word: usize| {
            classes.iter().fold(bits, |bits, class| bits | class.seats[word])
        };
        for word in 0..counts.len().div_ceil(WORD) {
            let mut seats = with(0, &giving, word);
            if missing > 0 {
                let more = with(0, &below, word);
                missing = missing.saturating_sub(more.count_ones());
                seats |= more;
            } else if giving.is_empty() {
                break;
            }
            while seats != 0 {
                let seat = word * WORD + seats.trailing_zeros() as usize;
                finder.seats[finder.len] = seat as u32;
                finder.over[finder.len] = self.all[self.of[seat] as usize].over;
                finder.len += 1;
                seats &= seats - 1;
            }
        }
        finder.distribute(total, whole, split);
    }
}

impl WeightClass {
    /// Whether this is the non-empty class of a weight and count.
    fn is_of(&self, weight: u32, count: u32) -> bool {
        (self.weight, self.count) == (weight, count) && self.len > 0
    }
}
