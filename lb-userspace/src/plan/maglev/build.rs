//! Assigns a table's slots to seats as they are taken, left, or change their weights. Called by [`super::build`].
//!
//! After each change every seat has its exact share, rounded up or down. Slots are assigned from one random
//! permutation, so that each seat's slots are spread over the table.

use super::{NONE, SeatChange, candidates::Candidates, mix, scale, surplus::SurplusFinder};

/// Seats up to this number are added one at a time; further ones in growing groups, which keeps very large
/// tables cheap.
const MAX_SINGLE: usize = 2_048;
/// Slots that are copied together without a branch.
const COPY_CHUNK: usize = 4;
/// Capacity of the slot buffer per slot of the table; when it is full, given slots are removed.
const BUFFER_FACTOR: usize = 4;
/// Random slots whose owners are checked for a deficit, before all seats are searched.
const PROBES: u64 = 32;

/// Assignment of slots to seats under construction.
#[derive(Clone)]
pub(super) struct TableBuilder {
    key: u64,
    size: u32,
    weights: Vec<u32>,
    /// Slots of each seat in the order in which it got them; it gives the last ones first.
    slots: Vec<Vec<u32>>,
    owner: Vec<u16>,
    surpluses: SurplusFinder,
    step: usize,
}

impl TableBuilder {
    pub fn new(seed: [u64; 2], size: u32, seats: usize) -> Self {
        Self {
            key: mix(seed[0] ^ mix(seed[1])),
            size,
            weights: vec![0; seats],
            slots: Vec::new(),
            owner: vec![NONE; size as usize],
            surpluses: SurplusFinder::default(),
            step: 0,
        }
    }

    /// Current weights, by seat.
    pub fn weights(&self) -> &[u32] {
        &self.weights
    }

    /// The owner of each slot.
    pub fn into_owners(self) -> Vec<u16> {
        self.owner
    }

    /// Replays a whole history on an empty table.
    pub fn replay(&mut self, history: &[SeatChange]) {
        // Leading steps in which new seats are taken: no seat has left or changed yet.
        let mut seen = vec![false; self.weights.len()];
        let is_first =
            |&&(seat, weight): &&SeatChange| weight > 0 && !std::mem::replace(&mut seen[seat as usize], true);
        let count = history.iter().take_while(is_first).count();
        let (first, rest) = history.split_at(count);
        self.add_first_seats(first);
        for change in rest {
            let change = std::slice::from_ref(change);
            if change[0].1 > self.weights[change[0].0 as usize] {
                self.take_slots(change)
            } else {
                self.give_slots(change)
            }
        }
    }

    /// Adds seats one after another to an empty table.
    fn add_first_seats(&mut self, changes: &[SeatChange]) {
        let Some(&(_, weight)) = changes.first() else {
            self.slots = vec![Vec::new(); self.weights.len()];
            // Until a seat is taken, a seat of weight 0 owns all slots and gives them away.
            if let Some(first) = self.slots.first_mut() {
                *first = permutation(self.size, self.key);
            }
            return;
        };
        let weights: Vec<u32> = changes.iter().map(|t| t.1).collect();
        // Slots of all seats, each seat's contiguous: the seat's slots when it was taken, shrinking from the end.
        let mut slots = permutation(self.size, self.key);
        let mut first = vec![0u32; changes.len()];
        let mut count = vec![0u32; changes.len()];
        count[0] = self.size;
        let mut sum = f64::from(weight);
        let mut came = 1;
        let mut candidates = Candidates::new(self.size, &weights);
        while came < changes.len() {
            let group = came..(came + 1 + came / MAX_SINGLE).min(changes.len());
            sum += weights[group.clone()].iter().map(|&w| f64::from(w)).sum::<f64>();
            let rate = f64::from(self.size) / sum;
            let mut due = 0.0;
            let mut taken = 0;
            for seat in group.clone() {
                due += f64::from(weights[seat]) * rate;
                count[seat] = (due + 0.5) as u32 - taken;
                taken += count[seat];
            }
            if slots.len() + taken as usize + COPY_CHUNK > slots.capacity() {
                compact(&mut slots, &mut first[..came], &count);
            }
            let begin = slots.len() as u32;
            candidates.find(&mut self.surpluses, &weights[..came], &count[..came], sum, taken);
            let mut short = taken;
            for &(seat, surplus) in self.surpluses.found() {
                let seat = seat as usize;
                short -= surplus;
                count[seat] -= surplus;
                candidates.update(seat, weights[seat], count[seat]);
                append(&mut slots, (first[seat] + count[seat]) as usize, surplus as usize);
            }
            // Floating point rounding may yield one slot less than requested.
            for seat in group.clone().rev() {
                let cut = short.min(count[seat]);
                count[seat] -= cut;
                short -= cut;
            }
            let mut next = begin;
            for seat in group.clone() {
                first[seat] = next;
                next += count[seat];
                candidates.add(weights[seat], count[seat]);
            }
            came = group.end;
        }
        self.slots = vec![Vec::new(); self.weights.len()];
        self.step = came;
        for (&(seat, weight), (&first, &count)) in changes.iter().zip(first.iter().zip(&count)) {
            let own = &slots[first as usize..(first + count) as usize];
            own.iter().for_each(|&slot| self.owner[slot as usize] = seat as u16);
            self.weights[seat as usize] = weight;
            self.slots[seat as usize] = own.to_vec();
        }
    }

    fn sum(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w)).sum()
    }

    /// Increases weights of seats: each other seat gives the slots above its new share.
    pub fn take_slots(&mut self, changes: &[SeatChange]) {
        changes.iter().for_each(|&(seat, weight)| self.weights[seat as usize] = weight);
        self.step += 1;
        let rate = f64::from(self.size) / self.sum();
        let (mut due, mut wanted) = (0.0, 0);
        let mut wants: Vec<(usize, u32)> = Vec::with_capacity(changes.len());
        for &(seat, weight) in changes {
            due += f64::from(weight) * rate - self.slots[seat as usize].len() as f64;
            let wants_now = ((due + 0.5).max(0.0) as u32).saturating_sub(wanted);
            wanted += wants_now;
            wants.push((seat as usize, wants_now));
        }
        let mut counts: Vec<u32> = self.slots.iter().map(|s| s.len() as u32).collect();
        wants.iter().for_each(|&(seat, _)| counts[seat] = 0);
        self.surpluses.find(&self.weights, &counts, rate, wanted, self.step * 7);
        let mut pool = Vec::with_capacity(wanted as usize);
        for &(seat, surplus) in self.surpluses.found() {
            let slots = &mut self.slots[seat as usize];
            pool.extend(slots.drain(slots.len() - surplus as usize..));
        }
        let mut pool = pool.into_iter();
        for (seat, wants) in wants {
            for slot in pool.by_ref().take(wants as usize) {
                self.owner[slot as usize] = seat as u16;
                self.slots[seat].push(slot);
            }
        }
    }

    /// Decreases weights of seats: their surplus slots go to seats below their share.
    pub fn give_slots(&mut self, changes: &[SeatChange]) {
        changes.iter().for_each(|&(seat, weight)| self.weights[seat as usize] = weight);
        self.step += 1;
        let sum = self.sum();
        if sum == 0.0 {
            // No seat to give to; the next seat takes the slots.
            return;
        }
        let rate = f64::from(self.size) / sum;
        let mut pool = Vec::new();
        for &(seat, weight) in changes {
            let slots = &mut self.slots[seat as usize];
            let keeps = (f64::from(weight) * rate + 0.5) as usize;
            pool.extend(slots.drain(keeps.min(slots.len())..));
        }
        // How many slots each seat may take, and how many it must take.
        let mut may: Vec<u32> = Vec::with_capacity(self.slots.len());
        let mut must = may.clone();
        for (slots, &weight) in self.slots.iter().zip(&self.weights) {
            let lacks = f64::from(weight) * rate - slots.len() as f64;
            may.push(lacks.ceil().max(0.0) as u32);
            must.push(lacks.floor().max(0.0) as u32);
        }
        // A seat whose weight falls takes slots only if others fall further, so that its share grows.
        for seat in changes.iter().map(|change| change.0 as usize).filter(|&seat| must[seat] == 0) {
            may[seat] = 0;
        }
        let mut owed = must.iter().sum::<u32>() as usize;
        for (i, &slot) in pool.iter().enumerate() {
            let lacking = if pool.len() - i <= owed { &must } else { &may };
            let Some(seat) =
                self.seat_with_deficit(slot, lacking).or_else(|| self.seat_with_deficit(slot, &self.weights))
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

    /// A seat with a deficit for this slot. Probes the owners of other slots, which depend on this slot only, so that the
    /// result hardly depends on other changes, and larger seats are probed more often.
    fn seat_with_deficit(&self, slot: u32, lacking: &[u32]) -> Option<usize> {
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

/// Removes given slots from the buffer.
fn compact(slots: &mut Vec<u32>, first: &mut [u32], count: &[u32]) {
    let mut end = 0;
    for (first, &count) in first.iter_mut().zip(count) {
        let from = *first as usize;
        slots.copy_within(from..from + count as usize, end);
        *first = end as u32;
        end += count as usize;
    }
    slots.truncate(end);
}

/// Appends `count` slots that begin at `from`.
#[inline]
fn append(slots: &mut Vec<u32>, from: usize, count: usize) {
    // Mostly one or two, which the branch predictor cannot guess: write a fixed number and truncate.
    if count <= COPY_CHUNK
        && let Some(&few) = slots[from..].first_chunk::<COPY_CHUNK>()
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
    let mut slots: Vec<u32> = Vec::with_capacity(size as usize * BUFFER_FACTOR);
    slots.extend(0..size);
    for i in (1..size).rev() {
        slots.swap(i as usize, scale(mix(key ^ u64::from(i)), i + 1) as usize);
    }
    slots
}
