//! Maglev tables: which backend each slot of a service belongs to, and its second choice.
//!
//! Input: a seed, a table size, and the members with weight and eligibility. Output: for each slot two
//! indices into the members. Pure; called by `compile`, and by tests and benches.
//!
//! Two stages. First a weighted Maglev table over *all* members (Eisenbud et al., "Maglev: A Fast and
//! Reliable Software Network Load Balancer", NSDI 2016, section 3.4): each member has a permutation of
//! the slots and takes its next free one at each of its turns. Here a member's k-th turn comes at the
//! virtual time (k + φ) / weight, with φ from its identity, so that the order of turns among the others
//! does not depend on who else is there; and it takes exactly its share, rounded by largest remainder.
//! Second, only the slots of members that are not eligible are handed on, again by exact shares. So a
//! member that becomes ineligible (health, drain) and eligible again moves its own slots and no other.
//!
//! The result depends on the seed, and on each member's identity, weight and eligibility; not on order.

use std::net::IpAddr;

/// No member, in [`Table`].
pub const NONE: u16 = u16::MAX;
/// Most members of one table.
pub const MAX_MEMBERS: usize = NONE as usize - 1;

/// Places tried for a second choice or a new owner before a fixed rule decides.
const PROBES: usize = 16;
/// Free slots below which a turn's slot is computed instead of searched for: the last k slots
/// would take about M/k steps each.
const TAIL: usize = 96;

/// One backend, as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// See [`identity`].
    pub id: u64,
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

/// Identity of a backend in tables: a hash of its address, so that a new name moves nothing.
pub fn identity(address: IpAddr) -> u64 {
    let bits = match address {
        IpAddr::V4(v4) => u128::from(v4.to_ipv6_mapped()),
        IpAddr::V6(v6) => u128::from(v6),
    };
    mix(mix((bits >> 64) as u64 ^ 0x6c62_2d69_6465_6e74) ^ bits as u64)
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
/// [`MAX_MEMBERS`] are looked at.
pub fn build(seed: [u64; 2], size: u32, members: &[Member]) -> Table {
    let mut order: Vec<(u64, u16)> = members
        .iter()
        .take(MAX_MEMBERS)
        .enumerate()
        .filter(|(_, m)| m.weight > 0)
        .map(|(i, m)| (mix(m.id ^ seed[0]), i as u16))
        .collect();
    order.sort_unstable();
    let eligible: Vec<bool> = order.iter().map(|&(_, i)| members[i as usize].eligible).collect();
    if !eligible.contains(&true) || size == 0 {
        return Table { primary: vec![NONE; size as usize], secondary: vec![NONE; size as usize] };
    }
    let weights: Vec<u32> = order.iter().map(|&(_, i)| members[i as usize].weight).collect();
    let hashes: Vec<u64> = order.iter().map(|&(h, _)| h).collect();

    let mut owner = share_out(size, &hashes, &weights, seed[1]);
    let probes: [u32; PROBES] =
        std::array::from_fn(|j| scale(mix(seed[1] ^ mix(j as u64 + 1)), size.max(2) - 1) + 1);
    let reachable = hand_on(&mut owner, &weights, &eligible, &probes);
    let mut secondary = second_choices(&owner, reachable.as_deref(), &weights, &eligible, &probes);

    for slot in owner.iter_mut().chain(&mut secondary) {
        if *slot != NONE {
            *slot = order[*slot as usize].1;
        }
    }
    Table { primary: owner, secondary }
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

/// A member's walk through the slots: `offset`, `offset + skip`, ... modulo the size.
#[derive(Clone, Copy)]
struct Walk {
    next: u32,
    skip: u32,
}

/// Maglev proper: the owner of each slot. Members come in the order of their hashes.
fn share_out(size: u32, hashes: &[u64], weights: &[u32], seed: u64) -> Vec<u16> {
    let quota = quotas(u64::from(size), weights.iter().map(|&w| u64::from(w)));
    let mut walks: Vec<Walk> = hashes
        .iter()
        .map(|&h| Walk { next: scale(mix(h ^ seed), size), skip: scale(mix(h ^ !seed), size.max(2) - 1) + 1 })
        .collect();
    let turns = turns(hashes, weights, &quota);
    let mut owner = vec![NONE; size as usize];
    let mut taken = vec![0u64; (size as usize).div_ceil(64)];
    let searched = turns.len().saturating_sub(TAIL);
    for &member in &turns[..searched] {
        let walk = &mut walks[member as usize];
        let mut slot = walk.next;
        while taken[(slot / 64) as usize] >> (slot % 64) & 1 != 0 {
            slot = step(slot, walk.skip, size);
        }
        taken[(slot / 64) as usize] |= 1 << (slot % 64);
        owner[slot as usize] = member;
        walk.next = step(slot, walk.skip, size);
    }
    let mut free: Vec<u32> =
        (0..size).filter(|slot| taken[(slot / 64) as usize] >> (slot % 64) & 1 == 0).collect();
    for &member in &turns[searched..] {
        let Walk { next, skip } = walks[member as usize];
        let inverse = u64::from(inverse(skip, size));
        let steps = |slot: u32| (u64::from(slot) + u64::from(size - next)) * inverse % u64::from(size);
        let nearest = (0..free.len())
            .min_by_key(|&i| steps(free[i]))
            .expect("there are as many free slots as turns left");
        let slot = free.swap_remove(nearest);
        owner[slot as usize] = member;
        walks[member as usize].next = step(slot, skip, size);
    }
    owner
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

/// Who takes a slot when: each member as often as its quota says, its k-th turn at (k + φ) / weight.
fn turns(hashes: &[u64], weights: &[u32], quota: &[u32]) -> Vec<u16> {
    let total: usize = quota.iter().map(|&q| q as usize).sum();
    let mut turns = Vec::with_capacity(total);
    if weights.iter().all(|&w| w == weights[0]) {
        // Members are ordered by hash, hence by φ: plain rounds.
        for round in 0..quota.iter().copied().max().unwrap_or(0) {
            turns.extend((0..quota.len()).filter(|&i| quota[i] > round).map(|i| i as u16));
        }
        return turns;
    }
    // Virtual times with 40 binary places, then a counting sort into about two buckets per turn.
    let clock: Vec<(u64, u64)> = hashes
        .iter()
        .zip(weights)
        .map(|(&hash, &weight)| {
            let period = (1u64 << 40) / u64::from(weight);
            (((u128::from(hash) * u128::from(period)) >> 64) as u64, period)
        })
        .collect();
    let last = clock
        .iter()
        .zip(quota)
        .filter(|&(_, &q)| q > 0)
        .map(|(&(start, period), &q)| start + period * u64::from(q - 1))
        .max()
        .unwrap_or(0);
    let buckets = (2 * total).next_power_of_two();
    let shift = (64 - last.leading_zeros()).saturating_sub(buckets.trailing_zeros());
    let mut ends = vec![0u32; buckets + 1];
    for (&(start, period), &q) in clock.iter().zip(quota) {
        let mut time = start;
        for _ in 0..q {
            ends[(time >> shift) as usize + 1] += 1;
            time += period;
        }
    }
    for i in 1..ends.len() {
        ends[i] += ends[i - 1];
    }
    turns.resize(total, 0);
    for (member, (&(start, period), &q)) in clock.iter().zip(quota).enumerate() {
        let mut time = start;
        for _ in 0..q {
            let place = &mut ends[(time >> shift) as usize];
            turns[*place as usize] = member as u16;
            *place += 1;
            time += period;
        }
    }
    turns
}

/// Gives the slots of ineligible members to eligible ones. Returns, for each slot, the owner of the first
/// slot from there on that an eligible member had before; nothing if all members are eligible.
fn hand_on(
    owner: &mut [u16],
    weights: &[u32],
    eligible: &[bool],
    probes: &[u32; PROBES],
) -> Option<Vec<u16>> {
    let size = owner.len();
    let mut has = vec![0u32; weights.len()];
    for &member in owner.iter() {
        has[member as usize] += 1;
    }
    let free = (0..has.len()).filter(|&i| !eligible[i]).map(|i| u64::from(has[i])).sum::<u64>();
    if eligible.iter().all(|&e| e) {
        return None;
    }
    // Before this, some eligible member owns a slot unless all of them are too light for one.
    let mut reachable = vec![NONE; size];
    let mut next = NONE;
    for slot in (0..size).chain(0..size).rev() {
        if eligible[owner[slot] as usize] {
            next = owner[slot];
        }
        reachable[slot] = next;
    }
    if next == NONE {
        next = heaviest(weights, eligible, NONE).unwrap_or(NONE);
        reachable.fill(next);
    }

    let mut left = missing_slots(free, size as u64, weights, eligible, &has);
    let mut postponed = Vec::new();
    for slot in 0..size {
        if eligible[owner[slot] as usize] {
            continue;
        }
        let found = probes.iter().map(|&p| reachable[ahead(slot, p, size)]).find(|&m| left[m as usize] > 0);
        match found {
            Some(member) => {
                left[member as usize] -= 1;
                owner[slot] = member;
            }
            None => postponed.push(slot),
        }
    }
    let mut open = (0..left.len()).filter(|&i| left[i] > 0).collect::<Vec<_>>();
    let mut at = 0;
    for slot in postponed {
        at %= open.len();
        let member = open[at];
        owner[slot] = member as u16;
        left[member] -= 1;
        if left[member] == 0 {
            open.swap_remove(at);
        } else {
            at += 1;
        }
    }
    Some(reachable)
}

/// How many of the `free` slots each eligible member takes, so that all end at their shares.
fn missing_slots(free: u64, size: u64, weights: &[u32], eligible: &[bool], has: &[u32]) -> Vec<u32> {
    let taking = |i: usize| if eligible[i] { u64::from(weights[i]) } else { 0 };
    let sum: u64 = (0..weights.len()).map(taking).sum();
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

fn ahead(slot: usize, distance: u32, size: usize) -> usize {
    let there = slot + distance as usize;
    if there >= size { there - size } else { there }
}

/// The second choice of each slot: whoever owns the slot at the first of a few fixed distances, if eligible
/// and not the primary. So it changes only where one of these changes.
fn second_choices(
    owner: &[u16],
    reachable: Option<&[u16]>,
    weights: &[u32],
    eligible: &[bool],
    probes: &[u32; PROBES],
) -> Vec<u16> {
    let size = owner.len();
    if eligible.iter().filter(|&&e| e).count() < 2 {
        return vec![NONE; size];
    }
    let reachable = reachable.unwrap_or(owner);
    let first = heaviest(weights, eligible, NONE).unwrap_or(NONE);
    let other = heaviest(weights, eligible, first).unwrap_or(NONE);
    (0..size)
        .map(|slot| {
            let primary = owner[slot];
            probes
                .iter()
                .map(|&p| reachable[ahead(slot, p, size)])
                .find(|&m| m != primary)
                .unwrap_or(if primary == first { other } else { first })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The paper's loop, word for word: turns in order, each searching its permutation.
    fn by_search(size: u32, hashes: &[u64], weights: &[u32], seed: u64) -> Vec<u16> {
        let quota = quotas(u64::from(size), weights.iter().map(|&w| u64::from(w)));
        let mut count = vec![0u64; hashes.len()];
        let mut owner = vec![NONE; size as usize];
        for member in turns(hashes, weights, &quota) {
            let hash = hashes[member as usize];
            let (offset, skip) = (scale(mix(hash ^ seed), size), scale(mix(hash ^ !seed), size - 1) + 1);
            loop {
                let slot = (u64::from(offset) + count[member as usize] * u64::from(skip)) % u64::from(size);
                count[member as usize] += 1;
                if owner[slot as usize] == NONE {
                    owner[slot as usize] = member;
                    break;
                }
            }
        }
        owner
    }

    #[test]
    fn the_shortcut_for_the_last_slots_changes_nothing() {
        for (size, n) in [(251u32, 7u64), (1_021, 50), (4_093, 300), (251, 251)] {
            let mut hashes: Vec<u64> = (0..n).map(|i| mix(i + u64::from(size))).collect();
            hashes.sort_unstable();
            for weights in [vec![1; n as usize], (0..n as u32).map(|i| 1 + i * i % 17).collect::<Vec<_>>()] {
                assert_eq!(share_out(size, &hashes, &weights, 9), by_search(size, &hashes, &weights, 9));
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
        let table = build([1, 2], 251, &[Member { id: 1, weight: 1, eligible: false }]);
        assert!(table.primary.iter().chain(&table.secondary).all(|&m| m == NONE));
        assert_eq!(build([1, 2], 251, &[]).primary, vec![NONE; 251]);
    }

    #[test]
    fn one_member_has_no_second_choice() {
        let table = build([1, 2], 251, &[Member { id: 1, weight: 5, eligible: true }]);
        assert!(table.primary.iter().all(|&m| m == 0) && table.secondary.iter().all(|&m| m == NONE));
    }

    #[test]
    fn a_member_too_light_for_a_slot_still_serves_when_it_is_the_last() {
        let members =
            [Member { id: 1, weight: 65_535, eligible: false }, Member { id: 2, weight: 1, eligible: true }];
        assert!(build([1, 2], 251, &members).primary.iter().all(|&m| m == 1));
    }
}
