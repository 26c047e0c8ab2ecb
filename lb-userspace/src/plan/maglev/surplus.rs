//! Who gives how many slots when others come, so that all shares stay exact. Called by [`super::deal`].
//!
//! Input: each seat's weight and count of slots. Output: those that give, in the order in which they are asked. Floating
//! point: each surplus is worked out by the same operations in the same order wherever it is needed, so that all
//! hosts agree, and a seat of 0.5 slots too many gives on all of them or on none.

/// Ranks into which fractions of slots are sorted when seats give one each.
pub(super) const RANKS: usize = 256;
/// How many seats of each rank there are.
pub(super) type Ranks = [u16; RANKS];
/// Who gives, and how many slots.
pub(super) type Debt = (u32, u32);

/// What each seat gives; reused from turn to turn.
#[derive(Clone, Default)]
pub(super) struct Debts {
    /// Seats that may give, in the order in which they are asked. Only the first `len` count.
    pub seats: Vec<u32>,
    /// Surplus of each of them: see [`surplus`].
    pub over: Vec<i32>,
    pub len: usize,
    found: Vec<Debt>,
    /// How many of the last list count.
    end: usize,
}

impl Debts {
    /// Makes room for so many seats, and some to write beyond.
    pub fn reserve(&mut self, seats: usize, spare: usize) {
        if self.seats.len() < seats + spare {
            self.seats.resize(seats + spare, 0);
            self.over.resize(seats + spare, 0);
            self.found.resize(seats + spare, (0, 0));
        }
    }

    /// Finds who gives so that all together give `total`: the whole slots above its ideal, and who has most above
    /// that gives one more. Ties go by seat from `turn` on. Rounding may leave a slot less.
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
        // Several counts side by side: seats of equal weight have equal ranks, and one would wait for itself.
        let mut counted = [[0u16; RANKS]; 4];
        let (fours, rest) = over.as_chunks::<4>();
        for four in fours {
            four.iter().zip(&mut counted).for_each(|(&over, ranks)| ranks[over as usize % RANKS] += 1);
        }
        rest.iter().for_each(|&over| counted[0][over as usize % RANKS] += 1);
        let ranks: Ranks = std::array::from_fn(|rank| counted.iter().map(|ranks| ranks[rank]).sum());
        let whole = over.iter().map(|&over| over as u32 / RANKS as u32).sum();
        self.share(total, whole, least(&ranks, total, whole));
    }

    /// The same among `seats` only. False if it depends on seats whose rank is below `bound`: these are not all among
    /// them.
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
        let least = least(&ranks, total, whole);
        if least.0 > bound {
            self.share(total, whole, least);
        }
        least.0 > bound
    }

    /// What each of `seats` gives if those from a rank on give one more than their whole slots, and the first few
    /// of the rank below.
    pub fn share(&mut self, total: u32, whole: u32, (least, missing): (usize, u32)) {
        // A surplus of no rank gives nothing.
        let mut missing = if least > 1 { missing } else { 0 };
        // From the least rank on one more, by carry.
        let up = (RANKS - least) as u32;
        let mut end = 0;
        // Who gives nothing is written over: which these are nobody foresees, so there is no branch.
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
            self.spare(excess);
        }
    }

    /// Spares the first what rounding would make all together give too much.
    fn spare(&mut self, mut excess: u32) {
        let mut kept = 0;
        for at in 0..self.end {
            let (seat, slots) = self.found[at];
            let spared = excess.min(slots);
            excess -= spared;
            self.found[kept] = (seat, slots - spared);
            kept += usize::from(slots > spared);
        }
        self.end = kept;
    }

    /// Who gives.
    pub fn found(&self) -> &[Debt] {
        &self.found[..self.end]
    }
}

/// The least rank from which on all give one more, when all together give so many and so many are whole slots; and how
/// many of the rank below give one.
pub(super) fn least(ranks: &Ranks, total: u32, whole: u32) -> (usize, u32) {
    const STEP: usize = 8;
    let mut missing = total.saturating_sub(whole);
    let mut least = RANKS;
    // Mostly nobody has the upper ones.
    while least > STEP && ranks[least - STEP..least].iter().all(|&seats| seats == 0) {
        least -= STEP;
    }
    while least > 1 && u32::from(ranks[least - 1]) <= missing {
        least -= 1;
        missing -= u32::from(ranks[least]);
    }
    (least, missing)
}

/// What a seat has above its ideal in [`RANKS`]ths of a slot, rounded up; 0 if it has nothing.
#[inline]
pub(super) fn surplus(weight: u32, count: u32, rate: f64) -> i32 {
    // Weights have 16 bits and counts 20, so these casts lose nothing, and take one instruction.
    let surplus = (f64::from(count as i32) - f64::from(weight as i32) * rate) * RANKS as f64;
    // SAFETY: its size is below 2^31: no count exceeds 524,287 slots, and no ideal either.
    let whole = unsafe { surplus.to_int_unchecked::<i32>() };
    (whole + i32::from(f64::from(whole) < surplus)).max(0)
}
