//! Seats of few different weights: many have the same weight and count of slots, so one surplus is worked out for all of
//! these, and who gives is read off bitmaps. Called by [`super::watch`].

use super::surplus::{Debts, RANKS, Ranks, least, surplus};

/// Seats per word of a bitmap.
const WORD: usize = u64::BITS as usize;

/// All seats with the same weight and count of slots.
struct Class {
    weight: u32,
    count: u32,
    /// How many; a class without any is free for another weight and count.
    len: u16,
    /// A bit for each seat.
    seats: Vec<u64>,
    /// The class that a seat of this one went to last: the next mostly goes there too.
    next: usize,
    over: i32,
}

/// The seats of a table by class.
pub(super) struct Classes {
    /// The class of each seat; empty until it is needed.
    of: Vec<u16>,
    all: Vec<Class>,
    words: usize,
}

impl Classes {
    /// For so many seats.
    pub fn new(seats: usize) -> Self {
        Self { of: Vec::with_capacity(seats), all: Vec::new(), words: seats.div_ceil(WORD) }
    }

    /// Says that a seat has another count of slots.
    pub fn changed(&mut self, seat: usize, weight: u32, count: u32) {
        let Some(&class) = self.of.get(seat) else { return };
        let class = class as usize;
        let old = &mut self.all[class];
        old.len -= 1;
        old.seats[seat / WORD] &= !(1 << (seat % WORD));
        let next = old.next;
        let next = if self.all[next].is_of(weight, count) { next } else { self.class(weight, count) };
        self.all[class].next = next;
        self.enter(seat, next);
        self.of[seat] = next as u16;
    }

    /// Says that the next seat has come.
    pub fn came(&mut self, weight: u32, count: u32) {
        if !self.of.is_empty() {
            self.push(weight, count);
        }
    }

    fn push(&mut self, weight: u32, count: u32) {
        let class = self.class(weight, count);
        self.enter(self.of.len(), class);
        self.of.push(class as u16);
    }

    fn enter(&mut self, seat: usize, class: usize) {
        let class = &mut self.all[class];
        class.len += 1;
        class.seats[seat / WORD] |= 1 << (seat % WORD);
    }

    /// The class of a weight and a count: there are never more than seats.
    fn class(&mut self, weight: u32, count: u32) -> usize {
        if let Some(class) = self.all.iter().position(|class| class.is_of(weight, count)) {
            return class;
        }
        let class = self.all.iter().position(|class| class.len == 0).unwrap_or_else(|| {
            let seats = vec![0; self.words];
            self.all.push(Class { weight, count, len: 0, seats, next: 0, over: 0 });
            self.all.len() - 1
        });
        (self.all[class].weight, self.all[class].count) = (weight, count);
        class
    }

    /// Finds who gives: see [`Debts::find`].
    pub fn find(&mut self, debts: &mut Debts, weights: &[u32], counts: &[u32], rate: f64, total: u32) {
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
        let split = least(&ranks, total, whole);
        let (least, mut missing) = split;
        // Those that give in any case, and those of whom the first few do.
        let all = || self.all.iter().filter(|class| class.len > 0 && class.over > 0);
        let giving: Vec<&Class> = all().filter(|class| class.over as usize >= least).collect();
        let below: Vec<&Class> = all().filter(|class| class.over as usize + 1 == least).collect();
        debts.reserve(counts.len(), 0);
        debts.len = 0;
        let with = |bits, classes: &[&Class], word: usize| {
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
                debts.seats[debts.len] = seat as u32;
                debts.over[debts.len] = self.all[self.of[seat] as usize].over;
                debts.len += 1;
                seats &= seats - 1;
            }
        }
        debts.share(total, whole, split);
    }
}

impl Class {
    /// Whether it is that of this weight and count, and not free.
    fn is_of(&self, weight: u32, count: u32) -> bool {
        (self.weight, self.count) == (weight, count) && self.len > 0
    }
}
