//! Finds which seats give how many slots when others are added, so that all shares stay exact. Called by
//! [`super::build`].
//!
//! Input: each seat's weight and count of slots. Output: the giving seats, in search order. Floating
//! point: each surplus is computed by the same operations in the same order everywhere, so that all
//! hosts agree, and a seat with 0.5 surplus slots gives on all of them or on none.

/// Number of ranks: fractions of slots, by which seats that give one slot each are sorted.
pub(super) const RANKS: usize = 256;
/// Number of seats by rank.
pub(super) type Ranks = [u16; RANKS];
/// A giving seat, and the number of slots.
pub(super) type Gift = (u32, u32);

/// Computes what each seat gives; buffers are reused from step to step.
#[derive(Clone, Default)]
pub(super) struct SurplusFinder {
    /// Seats that may give, in search order. Only the first `len` count.
    pub seats: Vec<u32>,
    /// Surplus of each of these seats: see [`surplus`].
    pub over: Vec<i32>,
    pub len: usize,
    found: Vec<Gift>,
    /// Length of the last result.
    end: usize,
}

impl SurplusFinder {
    /// Makes room for `seats`, and `spare` entries that may be written beyond.
    pub fn reserve(&mut self, seats: usize, spare: usize) {
        if self.seats.len() < seats + spare {
            self.seats.resize(seats + spare, 0);
            self.over.resize(seats + spare, 0);
            self.found.resize(seats + spare, (0, 0));
        }
    }

    /// Finds which seats give `total` slots together: each gives its whole surplus slots, and those with the largest
    /// remainders give one more. Ties are broken by seat from `turn` on. Rounding may yield one slot less.
    pub fn find(&mut self, weights: &[u32], counts: &[u32], rate: f64, total: u32, turn: usize) {
        let seats = counts.len();
        let turn = turn % seats;
        self.reserve(seats, 0);
        self.len = seats;
        let order = (turn as u32..seats as u32).chain(0..turn as u32);
        self.seats.iter_mut().zip(order).for_each(|(place, seat)| *place = seat);
        let (late, early) = self.over[..seats].split_at_mut(seats - turn);
        for (over, part) in [(late, turn..seats), (early, 0..turn)] {
            let pairs = weights[part.clone()].iter().zip(&counts[part]);
            over.iter_mut().zip(pairs).for_each(|(over, (&w, &count))| *over = surplus(w, count, rate));
        }
        let over = &self.over[..seats];
        // Several counters in parallel: seats of equal weight have equal ranks, and a single counter would stall.
        let mut counted = [[0u16; RANKS]; 4];
        let (fours, rest) = over.as_chunks::<4>();
        for four in fours {
            four.iter().zip(&mut counted).for_each(|(&over, ranks)| ranks[over as usize % RANKS] += 1);
        }
        rest.iter().for_each(|&over| counted[0][over as usize % RANKS] += 1);
        let ranks: Ranks = std::array::from_fn(|rank| counted.iter().map(|ranks| ranks[rank]).sum());
        let whole = over.iter().map(|&over| over as u32 / RANKS as u32).sum();
        self.distribute(total, whole, least_rank(&ranks, total, whole));
    }

    /// Finds giving seats among `seats` only. False if the result depends on seats with a rank below `bound`, which
    /// `seats` does not contain completely.
    pub fn find_among(
        &mut self,
        weights: &[u32],
        counts: &[u32],
        rate: f64,
        total: u32,
        bound: usize,
    ) -> bool {
        let mut ranks: Ranks = [0; RANKS];
        let mut whole = 0;
        for (over, &seat) in self.over.iter_mut().zip(&self.seats[..self.len]) {
            *over = surplus(weights[seat as usize], counts[seat as usize], rate);
            whole += *over as u32 / RANKS as u32;
            ranks[*over as usize % RANKS] += 1;
        }
        let least = least_rank(&ranks, total, whole);
        if least.0 > bound {
            self.distribute(total, whole, least);
        }
        least.0 > bound
    }

    /// Computes what each of `seats` gives: seats from rank `least` on give one more than their whole slots, and so do
    /// the first `missing` seats of the rank below.
    pub fn distribute(&mut self, total: u32, whole: u32, (least, missing): (usize, u32)) {
        // Rank 0 gives nothing.
        let mut missing = if least > 1 { missing } else { 0 };
        // Adding `up` carries into one more slot from the least rank on.
        let up = (RANKS - least) as u32;
        let mut end = 0;
        // Entries without slots are overwritten: a branch would be unpredictable.
        let mut put = |seat, slots| {
            self.found[end] = (seat, slots);
            end += usize::from(slots > 0);
        };
        let mut all = self.seats[..self.len].iter().zip(&self.over);
        while missing > 0
            && let Some((&seat, &over)) = all.next()
        {
            let up = over as u32 + up;
            let is_just_below = up as usize % RANKS == RANKS - 1;
            missing -= u32::from(is_just_below);
            put(seat, up / RANKS as u32 + u32::from(is_just_below));
        }
        all.for_each(|(&seat, &over)| put(seat, (over as u32 + up) / RANKS as u32));
        self.end = end;
        let excess = whole.saturating_sub(total);
        if excess > 0 {
            self.reduce(excess);
        }
    }

    /// Reduces the first gifts by the excess that rounding causes.
    fn reduce(&mut self, mut excess: u32) {
        let mut kept = 0;
        for at in 0..self.end {
            let (seat, slots) = self.found[at];
            let cut = excess.min(slots);
            excess -= cut;
            self.found[kept] = (seat, slots - cut);
            kept += usize::from(slots > cut);
        }
        self.end = kept;
    }

    /// Giving seats of the last search.
    pub fn found(&self) -> &[Gift] {
        &self.found[..self.end]
    }
}

/// The least rank from which on all seats give one more, if `total` slots are needed and `whole` are whole slots; and
/// how many seats of the rank below give one more.
pub(super) fn least_rank(ranks: &Ranks, total: u32, whole: u32) -> (usize, u32) {
    const STEP: usize = 8;
    let mut missing = total.saturating_sub(whole);
    let mut least = RANKS;
    // The upper ranks are mostly empty.
    while least > STEP && ranks[least - STEP..least].iter().all(|&seats| seats == 0) {
        least -= STEP;
    }
    while least > 1 && u32::from(ranks[least - 1]) <= missing {
        least -= 1;
        missing -= u32::from(ranks[least]);
    }
    (least, missing)
}

/// A seat's slots above its share in [`RANKS`]ths of a slot, rounded up; 0 if there are none.
#[inline]
pub(super) fn surplus(weight: u32, count: u32, rate: f64) -> i32 {
    // Weights have 16 bits and counts 20, so these casts are lossless, and take one instruction.
    let surplus = (f64::from(count as i32) - f64::from(weight as i32) * rate) * RANKS as f64;
    // SAFETY: its size is below 2^31: no count exceeds 524,287 slots, and no ideal either.
    let whole = unsafe { surplus.to_int_unchecked::<i32>() };
    (whole + i32::from(f64::from(whole) < surplus)).max(0)
}
