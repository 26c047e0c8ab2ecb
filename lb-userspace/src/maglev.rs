//! Maglev tables: which backend each slot of a service belongs to, and its second choice.
//!
//! Input: a seed, a table size, and the members with weight and eligibility. Output: for each slot two
//! indices into the members. Pure; called by `compile`, and by tests and benches.
//!
//! Each backend has a *seat*, a number that it keeps. The table is built as if the seats had come one after
//! another: a new seat takes its quota, from each earlier seat what that one then has too much, and no slot moves
//! between earlier seats. So one more backend moves exactly its share. Slots are dealt from one random
//! permutation, so that everybody's slots lie spread over the table. That is done as if all weights were equal;
//! then seats that weigh less leave slots, and those that weigh more take them, so that another weight moves
//! about the difference.
//!
//! The slots of a seat that takes no flows, because its backend failed or drains or because nobody sits there
//! (a *hole*, which weighs what the median member does), are then handed on: the others take them by walks
//! as in Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4), with steps timed by weight, up to their exact shares (largest remainder). So a member that
//! fails, drains or is removed moves its own slots and no other, and who comes back or fills the hole gets them.
//! With several seats out at once, what they left is dealt anew when one more changes. Where most seats
//! have become holes, giving `seat` in a configuration anew, from 0, brings a table without holes, for one
//! larger move.
//!
//! The result depends on the seed, and on each member's seat, weight and eligibility; not on order or address.

/// No member, in [`Table`].
pub const NONE: u16 = u16::MAX;
/// Most members of one table.
pub const MAX_MEMBERS: usize = NONE as usize - 1;

/// Seats of one table, holes included.
pub const MAX_SEATS: u32 = MAX_MEMBERS as u32;

/// Seats that come one at a time; see [`seated`].
const SINGLY: usize = 2_048;
/// Ranks into which fractions of slots are sorted when a seat gives.
const RANKS: usize = 256;
/// Places tried for a second choice before a fixed rule decides.
const PROBES: usize = 16;
/// Free slots times members below which the last slots are given out by computing who comes by when:
/// the last k of M slots would take about M/k steps each.
const DIRECT: u64 = 4_096;
/// Binary places of a pace.
const PLACES: u32 = 32;
/// Binary logarithm of the steps that a member walks in a round, about. Long rounds spare the processor
/// mispredicted branches (a third of the time); they cost nothing in slots moved, as a round's place in time
/// depends on no other member.
const ROUND: u32 = 5;

/// One backend, as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Its seat: no other member's.
    pub seat: u32,
    /// Share of the slots relative to the other members'; 0 takes none.
    pub weight: u32,
    /// Whether it takes new flows. A member that does not still shapes the table.
    pub eligible: bool,
}

/// A table: two members for each slot, as indices into the slice that it was built from, or [`NONE`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Owner of each slot.
    pub primary: Vec<u16>,
    /// Second choice: an eligible member other than the primary, [`NONE`] if there is none.
    pub secondary: Vec<u16>,
}

/// A bijective mixer (the finalizer of SplitMix64, Steele et al. 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A hash scaled to 0..bound without a division.
fn scale(hash: u64, bound: u32) -> u32 {
    ((u128::from(hash) * u128::from(bound)) >> 64) as u32
}

/// Builds the table of `size` slots (a prime). Members with weight 0 take no part; at most
/// [`MAX_MEMBERS`] are looked at. Cost: about size × ln(seats) moves and seats²/2 quotas.
pub fn build(seed: [u64; 2], size: u32, members: &[Member]) -> Table {
    let present = || members.iter().take(MAX_MEMBERS).enumerate().filter(|(_, m)| m.weight > 0);
    if !present().any(|(_, m)| m.eligible) || size == 0 {
        return Table { primary: vec![NONE; size as usize], secondary: vec![NONE; size as usize] };
    }
    let mut order: Vec<(u32, u16)> = present().map(|(i, m)| (m.seat, i as u16)).collect();
    order.sort_unstable();
    // Seats that no table has are taken as ranks.
    if order.windows(2).any(|pair| pair[0].0 == pair[1].0) || order[order.len() - 1].0 >= MAX_SEATS {
        order.iter_mut().zip(0..).for_each(|(o, rank)| o.0 = rank);
    }
    let mut weights: Vec<u32> = order.iter().map(|&(_, i)| members[i as usize].weight).collect();
    let middle = weights.len() / 2;
    let typical = *weights.select_nth_unstable(middle).1;
    let seats = order[order.len() - 1].0 as usize + 1;
    let mut weights = vec![typical; seats];
    let mut eligible = vec![false; seats];
    let mut member = vec![NONE; seats];
    for &(seat, i) in &order {
        weights[seat as usize] = members[i as usize].weight;
        eligible[seat as usize] = members[i as usize].eligible;
        member[seat as usize] = i;
    }

    // Equal seats first, so that one weight changes nothing about how the others came; weights then.
    let mut owner = seated(size, &vec![1; seats], seed);
    let hashes: Vec<u64> = (0..seats as u64).map(|seat| mix(seat ^ seed[0])).collect();
    if weights.iter().any(|&w| w != weights[0]) {
        let mut left = quotas(u64::from(size), weights.iter().map(|&w| u64::from(w)));
        let (mut slot, skip) = (0, offset(mix(seed[0]), size.max(2) - 1, seed[1]) + 1);
        for _ in 0..size {
            let seat = &mut owner[slot as usize];
            match left[*seat as usize] {
                0 => *seat = NONE,
                _ => left[*seat as usize] -= 1,
            }
            slot = step(slot, skip, size);
        }
        claim(&mut owner, takers(&hashes, &left, size, seed[1]), &weights);
    }
    if eligible.contains(&false) {
        let mut has = vec![0u32; seats];
        for seat in &mut owner {
            has[*seat as usize] += 1;
            if !eligible[*seat as usize] {
                *seat = NONE;
            }
        }
        let missing = missing_slots(u64::from(size), &weights, &eligible, &has);
        claim(&mut owner, takers(&hashes, &missing, size, seed[1]), &weights);
    }
    let mut secondary = second_choices(&owner, &weights, &eligible, seed[1]);

    for slot in owner.iter_mut().chain(&mut secondary) {
        if *slot != NONE {
            *slot = member[*slot as usize];
        }
    }
    Table { primary: owner, secondary }
}

/// The owner of each slot when seats of these weights have come one after another. Seats beyond
/// [`SINGLY`] come in growing groups, so that the quotas of very many seats cost little.
fn seated(size: u32, weights: &[u32], seed: [u64; 2]) -> Vec<u16> {
    // Slots of all seats, each seat's in one piece: it begins with what the seat took, and loses from its end.
    let mut slots = permutation(size, seed);
    let mut first = vec![0u32; weights.len()];
    let mut count = vec![0u32; weights.len()];
    count[0] = size;
    let mut sum = f64::from(weights[0]);
    let mut debts = Vec::with_capacity(weights.len());
    let mut came = 1;
    while came < weights.len() {
        let group = came..(came + 1 + came / SINGLY).min(weights.len());
        sum += weights[group.clone()].iter().map(|&w| f64::from(w)).sum::<f64>();
        let rate = f64::from(size) / sum;
        let mut due = 0.0;
        let mut taken = 0;
        for seat in group.clone() {
            due += f64::from(weights[seat]) * rate;
            count[seat] = (due + 0.5) as u32 - taken;
            taken += count[seat];
        }
        let begin = slots.len() as u32;
        debts_of(&mut debts, &weights[..came], &count[..came], rate, taken, came * 7);
        // Rounding of floating point numbers may leave a slot less to take than was asked for.
        let mut short = taken - debts.iter().sum::<u32>();
        for seat in group.clone().rev() {
            let cut = short.min(count[seat]);
            count[seat] -= cut;
            short -= cut;
        }
        for (seat, &debt) in debts.iter().enumerate().filter(|(_, debt)| **debt > 0) {
            count[seat] -= debt;
            let from = (first[seat] + count[seat]) as usize;
            slots.extend_from_within(from..from + debt as usize);
        }
        let mut next = begin;
        for seat in group.clone() {
            first[seat] = next;
            next += count[seat];
        }
        came = group.end;
    }
    let mut owner = vec![NONE; size as usize];
    for (seat, (&first, &count)) in first.iter().zip(&count).enumerate() {
        for &slot in &slots[first as usize..(first + count) as usize] {
            owner[slot as usize] = seat as u16;
        }
    }
    owner
}

/// What each seat gives so that all together give `total`: the whole slots above its ideal, and who has most above
/// that gives one more. Ties go by seat from `turn` on.
fn debts_of(debts: &mut Vec<u32>, weights: &[u32], count: &[u32], rate: f64, total: u32, turn: usize) {
    debts.clear();
    let mut ranks = [0u32; RANKS + 1];
    let mut whole = 0;
    // The debt of whole slots, and below it the rank of the rest.
    debts.extend(weights.iter().zip(count).map(|(&weight, &count)| {
        let over = ((f64::from(count) - f64::from(weight) * rate) * RANKS as f64).ceil().max(0.0) as u32;
        let (slots, rank) = (over / RANKS as u32, over % RANKS as u32);
        whole += slots;
        ranks[rank as usize] += 1;
        over
    }));
    let mut missing = total.saturating_sub(whole);
    let mut least = RANKS;
    while least > 1 && ranks[least - 1] <= missing {
        least -= 1;
        missing -= ranks[least];
    }
    let mut excess = whole.saturating_sub(total);
    let turn = turn % debts.len();
    let (late, early) = debts.split_at_mut(turn);
    for debt in early.iter_mut().chain(late) {
        let (mut slots, rank) = (*debt / RANKS as u32, (*debt % RANKS as u32) as usize);
        if rank >= least {
            slots += 1;
        } else if rank + 1 == least && rank > 0 && missing > 0 {
            slots += 1;
            missing -= 1;
        }
        let spared = excess.min(slots);
        excess -= spared;
        *debt = slots - spared;
    }
}

/// All slots in a random order.
fn permutation(size: u32, seed: [u64; 2]) -> Vec<u32> {
    let mut slots: Vec<u32> = Vec::with_capacity(size as usize * 9);
    slots.extend(0..size);
    let key = mix(seed[0] ^ mix(seed[1]));
    for i in (1..size).rev() {
        slots.swap(i as usize, scale(mix(key ^ u64::from(i)), i + 1) as usize);
    }
    slots
}

/// Whole numbers in proportion to `weights` that sum to `total` (largest remainder; the earlier wins a tie).
fn quotas(total: u64, weights: impl Iterator<Item = u64> + Clone) -> Vec<u32> {
    let sum: u64 = weights.clone().sum();
    if sum == 0 {
        return weights.map(|_| 0).collect();
    }
    let mut given = 0;
    let mut quota = Vec::new();
    let mut rest = Vec::new();
    for (i, weight) in weights.enumerate() {
        let product = u128::from(weight) * u128::from(total);
        let (whole, remainder) = match u64::try_from(product) {
            Ok(product) => (product / sum, product % sum),
            Err(_) => ((product / u128::from(sum)) as u64, (product % u128::from(sum)) as u64),
        };
        given += whole;
        quota.push(whole as u32);
        rest.push((std::cmp::Reverse(remainder), i as u32));
    }
    let missing = (total - given) as usize;
    if missing > 0 {
        rest.select_nth_unstable(missing - 1);
        for &(_, i) in &rest[..missing] {
            quota[i as usize] += 1;
        }
    }
    quota
}

fn step(slot: u32, skip: u32, size: u32) -> u32 {
    let next = slot + skip;
    if next >= size { next - size } else { next }
}

/// The inverse of `a` modulo the prime `m` (extended Euclid).
fn inverse(a: u32, m: u32) -> u32 {
    let (mut r0, mut r1) = (i64::from(m), i64::from(a));
    let (mut t0, mut t1) = (0i64, 1i64);
    while r1 != 0 {
        let q = r0 / r1;
        (r0, r1) = (r1, r0 - q * r1);
        (t0, t1) = (t1, t0 - q * t1);
    }
    t0.rem_euclid(i64::from(m)) as u32
}

/// A member on its way through the slots: `offset`, `offset + skip`, ... modulo the size.
struct Taker {
    /// Part of a step that is due, and steps of a round, with [`PLACES`] binary places.
    due: u64,
    pace: u64,
    next: u32,
    skip: u32,
    /// Slots that it may still take.
    left: u32,
    member: u16,
}

/// The members that may take slots, at the start of their ways.
fn takers(hashes: &[u64], left: &[u32], size: u32, seed: u64) -> Vec<Taker> {
    (0..hashes.len())
        .filter(|&i| left[i] > 0)
        .map(|i| Taker {
            due: hashes[i] >> (64 - PLACES),
            pace: 0,
            next: offset(hashes[i], size, seed),
            skip: scale(mix(hashes[i] ^ !seed), size.max(2) - 1) + 1,
            left: left[i],
            member: i as u16,
        })
        .collect()
}

fn offset(hash: u64, size: u32, seed: u64) -> u32 {
    scale(mix(hash ^ seed), size)
}

/// Gives the slots without an owner to the takers, who may take just as many.
fn claim(owner: &mut [u16], mut takers: Vec<Taker>, weights: &[u32]) {
    let size = owner.len() as u32;
    let mut free = vec![0u64; owner.len().div_ceil(64)];
    for (slot, _) in owner.iter().enumerate().filter(|(_, o)| **o == NONE) {
        free[slot / 64] |= 1 << (slot % 64);
    }
    let mut starts = vec![(0, 0); weights.len()];
    for taker in &takers {
        starts[taker.member as usize] = (taker.next, taker.due);
    }
    let mut remaining: u64 = takers.iter().map(|t| u64::from(t.left)).sum();
    set_paces(&mut takers, weights);
    while remaining * takers.len() as u64 > DIRECT {
        let mut done = false;
        for taker in &mut takers {
            remaining -= taker.walk_on(owner, &mut free, size);
            done |= taker.left == 0;
        }
        if done {
            takers.retain(|taker| taker.left > 0);
            let pace: u64 = takers.iter().map(|t| t.pace >> 8).sum();
            if pace < (takers.len() as u64) << (PLACES + ROUND - 9) {
                set_paces(&mut takers, weights);
            }
        }
    }
    let left_over: Vec<u32> =
        (0..size).filter(|slot| free[(slot / 64) as usize] >> (slot % 64) & 1 != 0).collect();
    let mut steps = Vec::with_capacity(left_over.len() * takers.len());
    for (i, taker) in takers.iter().enumerate() {
        let (start, due) = starts[taker.member as usize];
        let inverse = u64::from(inverse(taker.skip, size));
        let weight = u64::from(weights[taker.member as usize]);
        steps.extend(left_over.iter().map(|&slot| {
            let before = (u64::from(slot) + u64::from(size - start)) * inverse % u64::from(size);
            ((((before + 1) << PLACES) - due) / weight, i as u16, slot)
        }));
    }
    steps.sort_unstable();
    for (_, i, slot) in steps {
        let taker = &mut takers[i as usize];
        if taker.left > 0 && owner[slot as usize] == NONE {
            taker.left -= 1;
            owner[slot as usize] = taker.member;
        }
    }
}

/// Paces in proportion to the weights. The unit is a power of two, so that
/// a change among the others hardly ever changes a member's pace, and with it the order of steps.
fn set_paces(takers: &mut [Taker], weights: &[u32]) {
    let weight = |taker: &Taker| u64::from(weights[taker.member as usize]);
    let mean = takers.iter().map(weight).sum::<u64>() / takers.len().max(1) as u64;
    // The nearest power of two, in ratio: the mean times the square root of one half, rounded up.
    let unit = (mean * 181 / 256).next_power_of_two().trailing_zeros();
    for taker in takers {
        taker.pace = weight(taker) << (PLACES + ROUND - unit);
    }
}

impl Taker {
    /// Walks a round's steps. Returns how many slots it took.
    #[inline]
    fn walk_on(&mut self, owner: &mut [u16], free: &mut [u64], size: u32) -> u64 {
        self.due += self.pace;
        let steps = self.due >> PLACES;
        self.due &= (1 << PLACES) - 1;
        let mut taken = 0;
        for _ in 0..steps {
            let slot = self.next;
            self.next = step(slot, self.skip, size);
            let (word, bit) = ((slot / 64) as usize, 1 << (slot % 64));
            if free[word] & bit != 0 {
                free[word] &= !bit;
                owner[slot as usize] = self.member;
                taken += 1;
                self.left -= 1;
                if self.left == 0 {
                    break;
                }
            }
        }
        taken
    }
}

/// How many slots each eligible member takes over, so that all end at their shares.
fn missing_slots(size: u64, weights: &[u32], eligible: &[bool], has: &[u32]) -> Vec<u32> {
    let taking = |i: usize| if eligible[i] { u64::from(weights[i]) } else { 0 };
    let sum: u64 = (0..weights.len()).map(taking).sum();
    let free: u64 = (0..has.len()).filter(|&i| !eligible[i]).map(|i| u64::from(has[i])).sum();
    // What is missing from the exact share, in units of 1 / sum of a slot.
    let lack = |i: usize| match eligible[i] {
        true => (taking(i) * size).saturating_sub(u64::from(has[i]) * sum),
        false => 0,
    };
    quotas(free, (0..weights.len()).map(lack))
}

/// The eligible member with the greatest weight beside `except`; the earlier wins a tie.
fn heaviest(weights: &[u32], eligible: &[bool], except: u16) -> Option<u16> {
    (0..weights.len())
        .filter(|&i| eligible[i] && i != except as usize)
        .min_by_key(|&i| std::cmp::Reverse(weights[i]))
        .map(|i| i as u16)
}

/// The second choice of each slot: whoever owns the slot at the first of a few fixed distances, if that is not
/// the primary. So it changes only where one of these changes.
fn second_choices(owner: &[u16], weights: &[u32], eligible: &[bool], seed: u64) -> Vec<u16> {
    let size = owner.len();
    if eligible.iter().filter(|&&e| e).count() < 2 {
        return vec![NONE; size];
    }
    let first = heaviest(weights, eligible, NONE).unwrap_or(NONE);
    let other = heaviest(weights, eligible, first).unwrap_or(NONE);
    let probes: [usize; PROBES] =
        std::array::from_fn(|j| scale(mix(seed ^ mix(j as u64 + 1)), size.max(2) as u32 - 1) as usize + 1);
    (0..size)
        .map(|slot| {
            let primary = owner[slot];
            probes
                .iter()
                .map(|&p| owner[if slot + p >= size { slot + p - size } else { slot + p }])
                .find(|&m| m != primary)
                .unwrap_or(if primary == first { other } else { first })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rule, word for word: all steps of all members in the order of their rounds.
    fn by_sorting(size: u32, hashes: &[u64], weights: &[u32], seed: u64) -> Vec<u16> {
        let mut left = quotas(u64::from(size), weights.iter().map(|&w| u64::from(w)));
        let mut takers = takers(hashes, &left, size, seed);
        set_paces(&mut takers, weights);
        let mut steps: Vec<(u64, u16, u32, u32)> = Vec::new();
        for taker in &takers {
            let mut slot = taker.next;
            for k in 0..size {
                let round = (((u64::from(k) + 1) << PLACES) - taker.due).div_ceil(taker.pace);
                steps.push((round, taker.member, k, slot));
                slot = step(slot, taker.skip, size);
            }
        }
        steps.sort_unstable();
        let mut owner = vec![NONE; size as usize];
        for (_, member, _, slot) in steps {
            if left[member as usize] > 0 && owner[slot as usize] == NONE {
                left[member as usize] -= 1;
                owner[slot as usize] = member;
            }
        }
        owner
    }

    #[test]
    fn the_shortcut_for_the_last_slots_changes_little() {
        for (size, n) in [(4_093u32, 40u32), (16_381, 100)] {
            let mut hashes: Vec<u64> = (0..n).map(|i| mix(u64::from(i + size))).collect();
            hashes.sort_unstable();
            for weights in [vec![1; n as usize], (0..n).map(|i| 1 + i * i % 17).collect::<Vec<_>>()] {
                let shares = quotas(u64::from(size), weights.iter().map(|&w| u64::from(w)));
                let mut owner = vec![NONE; size as usize];
                claim(&mut owner, takers(&hashes, &shares, size, 9), &weights);
                let rule = by_sorting(size, &hashes, &weights, 9);
                let other = owner.iter().zip(&rule).filter(|(a, b)| a != b).count();
                println!("{size} {n}: {other} differ");
                assert!(other as u32 <= size / 25, "{size} slots, {n} members: {other} differ");
            }
        }
    }

    #[test]
    fn inverses_are_inverse() {
        for m in lb_common::limits::TABLE_SIZES {
            for a in [1, 2, 3, 200, m / 2, m - 1].into_iter().filter(|&a| a < m) {
                assert_eq!(u64::from(a) * u64::from(inverse(a, m)) % u64::from(m), 1, "{a} mod {m}");
            }
        }
    }

    #[test]
    fn nobody_eligible_means_no_owner() {
        let table = build([1, 2], 251, &[Member { seat: 1, weight: 1, eligible: false }]);
        assert!(table.primary.iter().chain(&table.secondary).all(|&m| m == NONE));
        assert_eq!(build([1, 2], 251, &[]).primary, vec![NONE; 251]);
    }

    #[test]
    fn one_member_has_no_second_choice() {
        let table = build([1, 2], 251, &[Member { seat: 1, weight: 5, eligible: true }]);
        assert!(table.primary.iter().all(|&m| m == 0) && table.secondary.iter().all(|&m| m == NONE));
    }

    #[test]
    fn a_member_too_light_for_a_slot_still_serves_when_it_is_the_last() {
        let members = [
            Member { seat: 1, weight: 65_535, eligible: false },
            Member { seat: 2, weight: 1, eligible: true },
        ];
        assert!(build([1, 2], 251, &members).primary.iter().all(|&m| m == 1));
    }
}
