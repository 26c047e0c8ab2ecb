//! Deals a table's slots to seats that come, go and change their weights. Called by [`super::build`].
//!
//! After each turn every seat has its exact share, rounded up or down. Slots are dealt from one random
//! permutation, so that everybody's lie spread over the table.

use super::{NONE, Turn, mix, scale};

/// Seats that come one at a time; of more, growing groups come together, so that the quotas of very many
/// seats cost little.
const SINGLY: usize = 2_048;
/// Ranks into which fractions of slots are sorted when seats give one each.
const RANKS: usize = 256;
/// Slots whose owners are asked whether they lack one, before all seats are gone through.
const PROBES: u64 = 32;

/// The slots of each seat.
#[derive(Clone)]
pub(super) struct Dealer {
    key: u64,
    size: u32,
    weights: Vec<u32>,
    /// In the order in which they came; who gives, gives the last.
    slots: Vec<Vec<u32>>,
    owner: Vec<u16>,
    debts: Debts,
    turn: usize,
}

impl Dealer {
    pub fn new(seed: [u64; 2], size: u32, seats: usize) -> Self {
        Self {
            key: mix(seed[0] ^ mix(seed[1])),
            size,
            weights: vec![0; seats],
            slots: Vec::new(),
            owner: vec![NONE; size as usize],
            debts: Debts::default(),
            turn: 0,
        }
    }

    /// Weights as dealt, by seat.
    pub fn weights(&self) -> &[u32] {
        &self.weights
    }

    /// The owner of each slot.
    pub fn into_owners(self) -> Vec<u16> {
        self.owner
    }

    /// Deals a whole history, from the first turn on.
    pub fn replay(&mut self, history: &[Turn]) {
        // Seats that come for the first time, at the beginning: nobody has left or changed yet.
        let mut seen = vec![false; self.weights.len()];
        let is_first =
            |&&(seat, weight): &&Turn| weight > 0 && !std::mem::replace(&mut seen[seat as usize], true);
        let count = history.iter().take_while(is_first).count();
        let (first, rest) = history.split_at(count);
        self.seat(first);
        for turn in rest {
            let turn = std::slice::from_ref(turn);
            if turn[0].1 > self.weights[turn[0].0 as usize] { self.take(turn) } else { self.give(turn) }
        }
    }

    /// Deals to seats that come one after another to an empty table.
    fn seat(&mut self, turns: &[Turn]) {
        let Some(&(_, weight)) = turns.first() else {
            self.slots = vec![Vec::new(); self.weights.len()];
            // Until somebody comes they are held by a seat of weight 0, which gives them all.
            if let Some(first) = self.slots.first_mut() {
                *first = permutation(self.size, self.key);
            }
            return;
        };
        let weights: Vec<u32> = turns.iter().map(|t| t.1).collect();
        // Slots of all seats, each seat's in one piece: it begins with what the seat took, and loses from its end.
        let mut slots = permutation(self.size, self.key);
        let mut first = vec![0u32; turns.len()];
        let mut count = vec![0u32; turns.len()];
        count[0] = self.size;
        let mut sum = f64::from(weight);
        let mut came = 1;
        while came < turns.len() {
            let group = came..(came + 1 + came / SINGLY).min(turns.len());
            sum += weights[group.clone()].iter().map(|&w| f64::from(w)).sum::<f64>();
            let rate = f64::from(self.size) / sum;
            let mut due = 0.0;
            let mut taken = 0;
            for seat in group.clone() {
                due += f64::from(weights[seat]) * rate;
                count[seat] = (due + 0.5) as u32 - taken;
                taken += count[seat];
            }
            let begin = slots.len() as u32;
            self.debts.find(&weights[..came], &count[..came], rate, taken, came * 7);
            // Rounding of floating point numbers may leave a slot less to take than was asked for.
            let mut short = taken - self.debts.total();
            for seat in group.clone().rev() {
                let cut = short.min(count[seat]);
                count[seat] -= cut;
                short -= cut;
            }
            for &(seat, debt) in &self.debts.found {
                let seat = seat as usize;
                count[seat] -= debt;
                let from = (first[seat] + count[seat]) as usize;
                let piece = from..from + debt as usize;
                if debt > 8 {
                    slots.extend_from_within(piece);
                } else {
                    // Mostly one or two: a loop costs less than a call that copies.
                    piece.for_each(|at| slots.push(slots[at]));
                }
            }
            let mut next = begin;
            for seat in group.clone() {
                first[seat] = next;
                next += count[seat];
            }
            came = group.end;
        }
        self.slots = vec![Vec::new(); self.weights.len()];
        self.turn = came;
        for (&(seat, weight), (&first, &count)) in turns.iter().zip(first.iter().zip(&count)) {
            let own = &slots[first as usize..(first + count) as usize];
            own.iter().for_each(|&slot| self.owner[slot as usize] = seat as u16);
            self.weights[seat as usize] = weight;
            self.slots[seat as usize] = own.to_vec();
        }
    }

    fn sum(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    /// Deals to seats whose weights are now greater: each of the others gives what it has too much.
    pub fn take(&mut self, turns: &[Turn]) {
        turns.iter().for_each(|&(seat, weight)| self.weights[seat as usize] = weight);
        self.turn += 1;
        let rate = f64::from(self.size) / self.sum();
        let (mut due, mut wanted) = (0.0, 0);
        let mut wants: Vec<(usize, u32)> = Vec::with_capacity(turns.len());
        for &(seat, weight) in turns {
            due += f64::from(weight) * rate - self.slots[seat as usize].len() as f64;
            let wants_now = ((due + 0.5).max(0.0) as u32).saturating_sub(wanted);
            wanted += wants_now;
            wants.push((seat as usize, wants_now));
        }
        let mut counts: Vec<u32> = self.slots.iter().map(|s| s.len() as u32).collect();
        wants.iter().for_each(|&(seat, _)| counts[seat] = 0);
        self.debts.find(&self.weights, &counts, rate, wanted, self.turn * 7);
        let mut pool = Vec::with_capacity(wanted as usize);
        for &(seat, debt) in &self.debts.found {
            let slots = &mut self.slots[seat as usize];
            pool.extend(slots.drain(slots.len() - debt as usize..));
        }
        let mut pool = pool.into_iter();
        for (seat, wants) in wants {
            for slot in pool.by_ref().take(wants as usize) {
                self.owner[slot as usize] = seat as u16;
                self.slots[seat].push(slot);
            }
        }
    }

    /// Deals the slots that seats have too many, now that their weights are less, to those who lack some.
    pub fn give(&mut self, turns: &[Turn]) {
        turns.iter().for_each(|&(seat, weight)| self.weights[seat as usize] = weight);
        self.turn += 1;
        let sum = self.sum();
        if sum == 0.0 {
            // Nobody to give to; who comes next takes them.
            return;
        }
        let rate = f64::from(self.size) / sum;
        let mut pool = Vec::new();
        for &(seat, weight) in turns {
            let slots = &mut self.slots[seat as usize];
            let keeps = (f64::from(weight) * rate + 0.5) as usize;
            pool.extend(slots.drain(keeps.min(slots.len())..));
        }
        // What each may take, and what each must.
        let mut may: Vec<u32> = Vec::with_capacity(self.slots.len());
        let mut must = may.clone();
        for (slots, &weight) in self.slots.iter().zip(&self.weights) {
            let lacks = f64::from(weight) * rate - slots.len() as f64;
            may.push(lacks.ceil().max(0.0) as u32);
            must.push(lacks.floor().max(0.0) as u32);
        }
        turns.iter().for_each(|&(seat, _)| (may[seat as usize], must[seat as usize]) = (0, 0));
        let mut owed = must.iter().sum::<u32>() as usize;
        for (i, &slot) in pool.iter().enumerate() {
            let lacking = if pool.len() - i <= owed { &must } else { &may };
            let Some(seat) = self.who_lacks(slot, lacking).or_else(|| self.who_lacks(slot, &self.weights))
            else {
                continue;
            };
            may[seat] = may[seat].saturating_sub(1);
            owed -= must[seat].min(1) as usize;
            must[seat] = must[seat].saturating_sub(1);
            self.owner[slot as usize] = seat as u16;
            self.slots[seat].push(slot);
        }
    }

    /// A seat that lacks slots: by owners of other slots that depend on this one only, so that it hardly depends on
    /// what else is dealt; and so that who has more is asked more often.
    fn who_lacks(&self, slot: u32, lacking: &[u32]) -> Option<usize> {
        let probe = |i| {
            let owner = self.owner[scale(mix(self.key ^ mix(u64::from(slot) << 8 | i)), self.size) as usize];
            (owner as usize, lacking.get(owner as usize).is_some_and(|&l| l > 0))
        };
        if let Some((seat, _)) = (0..PROBES).map(probe).find(|(_, lacks)| *lacks) {
            return Some(seat);
        }
        let (head, tail) =
            lacking.split_at(scale(mix(self.key ^ u64::from(slot)), lacking.len() as u32) as usize);
        tail.iter().chain(head).position(|&l| l > 0).map(|at| (at + head.len()) % lacking.len())
    }
}

/// What each seat gives; reused from turn to turn.
#[derive(Clone, Default)]
struct Debts {
    /// Surplus of each seat in [`RANKS`]ths of a slot, rounded up; 0 if it has none.
    over: Vec<i32>,
    /// Seats that give, and how many slots.
    found: Vec<(u32, u32)>,
}

impl Debts {
    /// Finds who gives so that all together give `total`: the whole slots above its ideal, and who has most above
    /// that gives one more. Ties go by seat from `turn` on.
    fn find(&mut self, weights: &[u32], counts: &[u32], rate: f64, total: u32, turn: usize) {
        self.over.clear();
        self.over.extend(weights.iter().zip(counts).map(|(&weight, &count)| {
            // Weights have 16 bits and counts 20, so these casts lose nothing, and take one instruction.
            let surplus = (f64::from(count as i32) - f64::from(weight as i32) * rate) * RANKS as f64;
            // SAFETY: its size is below 2^31: no count exceeds 524,287 slots, and no ideal either.
            let whole = unsafe { surplus.to_int_unchecked::<i32>() };
            (whole + i32::from(f64::from(whole) < surplus)).max(0)
        }));
        // Several counts side by side: seats of equal weight have equal ranks, and one would wait for itself.
        let mut counted = [[0u16; RANKS]; 4];
        let mut whole = 0;
        for four in self.over.chunks(4) {
            for (&over, ranks) in four.iter().zip(&mut counted) {
                whole += over as u32 / RANKS as u32;
                ranks[over as usize % RANKS] += 1;
            }
        }
        let ranks = |rank: usize| counted.iter().map(|ranks| u32::from(ranks[rank])).sum::<u32>();
        let mut missing = total.saturating_sub(whole);
        let mut least = RANKS;
        while least > 1 && ranks(least - 1) <= missing {
            least -= 1;
            missing -= ranks(least);
        }
        let mut excess = whole.saturating_sub(total);
        self.found.clear();
        let least = least as i32;
        let turn = turn % self.over.len();
        let (early, late) = self.over.split_at(turn);
        for (seat, &over) in (turn..).zip(late).chain((0..).zip(early)) {
            // Most give nothing.
            if over < least - 1 {
                continue;
            }
            let (mut slots, rank) = (over as u32 / RANKS as u32, over % RANKS as i32);
            if rank >= least {
                slots += 1;
            } else if rank + 1 == least && rank > 0 && missing > 0 {
                slots += 1;
                missing -= 1;
            }
            let spared = excess.min(slots);
            excess -= spared;
            if slots > spared {
                self.found.push((seat as u32, slots - spared));
            }
        }
    }

    fn total(&self) -> u32 {
        self.found.iter().map(|found| found.1).sum()
    }
}

/// All slots in a random order.
fn permutation(size: u32, key: u64) -> Vec<u32> {
    let mut slots: Vec<u32> = Vec::with_capacity(size as usize * 9);
    slots.extend(0..size);
    for i in (1..size).rev() {
        slots.swap(i as usize, scale(mix(key ^ u64::from(i)), i + 1) as usize);
    }
    slots
}
