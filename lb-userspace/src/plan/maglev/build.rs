//! Deals a table's slots to seats that come, go and change their weights. Called by [`super::build`].
//!
//! After each turn every seat has its exact share, rounded up or down. Slots are dealt from one random
//! permutation, so that everybody's lie spread over the table.

use super::{NONE, SeatChange, candidates::Watch, mix, scale, surplus::Debts};

/// Seats that come one at a time; of more, growing groups come together, so that the quotas of very many
/// seats cost little.
const SINGLY: usize = 2_048;
/// Slots that are copied together.
const FEW: usize = 4;
/// Slots written per slot of the table before those that have been given are swept out.
const ROOM: usize = 4;
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
    pub fn replay(&mut self, history: &[SeatChange]) {
        // Seats that come for the first time, at the beginning: nobody has left or changed yet.
        let mut seen = vec![false; self.weights.len()];
        let is_first =
            |&&(seat, weight): &&SeatChange| weight > 0 && !std::mem::replace(&mut seen[seat as usize], true);
        let count = history.iter().take_while(is_first).count();
        let (first, rest) = history.split_at(count);
        self.seat(first);
        for turn in rest {
            let turn = std::slice::from_ref(turn);
            if turn[0].1 > self.weights[turn[0].0 as usize] { self.take(turn) } else { self.give(turn) }
        }
    }

    /// Deals to seats that come one after another to an empty table.
    fn seat(&mut self, turns: &[SeatChange]) {
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
        let mut watch = Watch::new(self.size, &weights);
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
            if slots.len() + taken as usize + FEW > slots.capacity() {
                sweep(&mut slots, &mut first[..came], &count);
            }
            let begin = slots.len() as u32;
            watch.find(&mut self.debts, &weights[..came], &count[..came], sum, taken);
            let mut short = taken;
            for &(seat, debt) in self.debts.found() {
                let seat = seat as usize;
                short -= debt;
                count[seat] -= debt;
                watch.changed(seat, weights[seat], count[seat]);
                append(&mut slots, (first[seat] + count[seat]) as usize, debt as usize);
            }
            // Rounding of floating point numbers may leave a slot less to take than was asked for.
            for seat in group.clone().rev() {
                let cut = short.min(count[seat]);
                count[seat] -= cut;
                short -= cut;
            }
            let mut next = begin;
            for seat in group.clone() {
                first[seat] = next;
                next += count[seat];
                watch.came(weights[seat], count[seat]);
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
    pub fn take(&mut self, turns: &[SeatChange]) {
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
        for &(seat, debt) in self.debts.found() {
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
    pub fn give(&mut self, turns: &[SeatChange]) {
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

/// Brings what each seat has to the beginning.
fn sweep(slots: &mut Vec<u32>, first: &mut [u32], count: &[u32]) {
    let mut end = 0;
    for (first, &count) in first.iter_mut().zip(count) {
        let from = *first as usize;
        slots.copy_within(from..from + count as usize, end);
        *first = end as u32;
        end += count as usize;
    }
    slots.truncate(end);
}

/// Appends so many slots from a place on.
#[inline]
fn append(slots: &mut Vec<u32>, from: usize, count: usize) {
    // Mostly one or two, which nobody foresees: so a few are written, and what is too much is taken back.
    if count <= FEW
        && let Some(&few) = slots[from..].first_chunk::<FEW>()
    {
        let end = slots.len() + count;
        slots.extend(few);
        slots.truncate(end);
    } else {
        slots.extend_from_within(from..from + count);
    }
}

/// All slots in a random order.
fn permutation(size: u32, key: u64) -> Vec<u32> {
    let mut slots: Vec<u32> = Vec::with_capacity(size as usize * ROOM);
    slots.extend(0..size);
    for i in (1..size).rev() {
        slots.swap(i as usize, scale(mix(key ^ u64::from(i)), i + 1) as usize);
    }
    slots
}
