//! Maglev tables: which backend each slot of a service belongs to, and its second choice.
//!
//! Input: a seed, a table size, the *history* of seats, and the members with weight and eligibility. Output: for
//! each slot two indices into the members. Pure; called by `compile`, and by tests and benches.
//!
//! As in Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016), a
//! hash finds a slot and the slot names a backend, and any host can compute the table. How the slots are dealt
//! is different: Maglev deals all of them anew, so that one change moves some slots between backends that have
//! nothing to do with it. Here each backend has a *seat*, a number that it keeps, and the desired state says in
//! which order seats were taken and left, and with what weight. The table is dealt in that order ([`Dealer`]):
//! who comes takes its share, from each of the others what that one then has too much; who leaves gives its
//! slots to those who then have too few. No slot moves between two others, and all shares are exact at each step.
//! So any one backend that is added or removed moves its own share of the slots.
//!
//! What does not last comes after the history: members whose weight has changed since they took their seats, and
//! members that failed or drain. So one of them alone moves its own slots and no other; with several at once, one
//! more also moves some of what the others left.
//!
//! The result depends on the seed, the history, and each member's seat, weight and eligibility; not on
//! order or address.
//!
//! The result of the history is kept, so after health, drains or weights change only the later moves are dealt again
//! (an eighth of the time at 1,000 backends). Seats of few different weights are kept in classes, others by the sum
//! of weights from which on each has enough (`watch`); both only save work. Pinned tables in the tests keep the
//! result, because hosts of different versions must deal alike.

mod build;
mod candidates;
mod surplus;
mod weight_classes;

use crate::desired::model::MAX_SEATS;
use build::Dealer;

/// No member, in [`Table`].
pub const NONE: u16 = u16::MAX;
/// Most members of one table.
pub const MAX_MEMBERS: usize = MAX_SEATS as usize;
const _: () = assert!(MAX_MEMBERS < NONE as usize);

/// Places tried for a second choice before a fixed rule decides.
const PROBES: usize = 16;
/// Members whose weight has grown that are dealt to one by one; more of them come in so many groups.
const GROUPS: usize = 256;

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

/// A step of a table's history: a seat that is taken with a weight, or left (weight 0).
pub type SeatChange = (u32, u32);

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

/// A history that has been dealt: most of the work of a table, and the same until a seat is taken or left.
pub struct Dealt {
    seed: [u64; 2],
    size: u32,
    seats: usize,
    history: Vec<SeatChange>,
    dealer: Dealer,
}

impl Dealt {
    /// The table after this history: taken from `known` if it is of the same, else dealt, and then known.
    fn dealer(
        known: &mut Option<Self>,
        seed: [u64; 2],
        size: u32,
        seats: usize,
        history: Vec<SeatChange>,
    ) -> Dealer {
        if let Some(dealt) = known
            && (dealt.seed, dealt.size, dealt.seats) == (seed, size, seats)
            && dealt.history == history
        {
            return dealt.dealer.clone();
        }
        let mut dealer = Dealer::new(seed, size, seats);
        dealer.replay(&history);
        *known = Some(Self { seed, size, seats, history, dealer: dealer.clone() });
        dealer
    }
}

/// Builds the table of `size` slots (a prime). An empty history stands for the members in the order of their
/// seats; a member whose seat it does not name comes after it. Members with weight 0 take no part; at most
/// [`MAX_MEMBERS`] are looked at. Cost: about size × ln(seats) moves of the history, and a look at who might give at each.
pub fn build(seed: [u64; 2], size: u32, history: &[SeatChange], members: &[Member]) -> Table {
    build_with(seed, size, history, members, |seats, history| {
        let mut dealer = Dealer::new(seed, size, seats);
        dealer.replay(&history);
        dealer
    })
}

/// The same after a change: of weights or of who takes flows it costs what these move, as long as `known` is what came of
/// the table before.
pub fn build_again(
    seed: [u64; 2],
    size: u32,
    history: &[SeatChange],
    members: &[Member],
    known: &mut Option<Dealt>,
) -> Table {
    build_with(seed, size, history, members, |seats, history| {
        Dealt::dealer(known, seed, size, seats, history)
    })
}

/// The same by a given way to deal a history to so many seats.
fn build_with(
    seed: [u64; 2],
    size: u32,
    history: &[SeatChange],
    members: &[Member],
    deal: impl FnOnce(usize, Vec<SeatChange>) -> Dealer,
) -> Table {
    let present = || members.iter().take(MAX_MEMBERS).enumerate().filter(|(_, m)| m.weight > 0);
    if !present().any(|(_, m)| m.eligible) || size == 0 {
        return Table { primary: vec![NONE; size as usize], secondary: vec![NONE; size as usize] };
    }
    let mut order: Vec<(u32, u16)> = present().map(|(i, m)| (m.seat, i as u16)).collect();
    order.sort_unstable();
    let mut history = history.iter().filter(|(seat, _)| *seat < MAX_SEATS).copied().collect::<Vec<_>>();
    // Seats that no table has are taken as ranks, without a history.
    if order.windows(2).any(|pair| pair[0].0 == pair[1].0) || order[order.len() - 1].0 >= MAX_SEATS {
        order.iter_mut().zip(0..).for_each(|(o, rank)| o.0 = rank);
        history.clear();
    }
    let highest = order.iter().map(|o| o.0).chain(history.iter().map(|h| h.0)).max();
    let seats = highest.map_or(0, |seat| seat as usize + 1);
    let mut weights = vec![0; seats];
    let mut member = vec![NONE; seats];
    let mut known = vec![false; seats];
    for &(seat, i) in &order {
        let Member { weight, eligible, .. } = members[i as usize];
        weights[seat as usize] = if eligible { weight } else { 0 };
        member[seat as usize] = i;
    }
    history.iter().for_each(|&(seat, _)| known[seat as usize] = true);
    let missing = order.iter().filter(|(seat, _)| !known[*seat as usize]);
    history.extend(missing.map(|&(seat, i)| (seat, members[i as usize].weight)));

    let mut dealer = deal(seats, history);
    // Who takes comes before who gives, so that there is always somebody to give to. What is given goes into one
    // pool: one after another would move five times as much when one more of many fails.
    let differing = |dealer: &Dealer, differs: fn(u32, u32) -> bool| -> Vec<SeatChange> {
        let turns = dealer.weights().iter().zip(&weights).zip(0..);
        turns.filter(|((old, new), _)| differs(**old, **new)).map(|((_, &new), seat)| (seat, new)).collect()
    };
    let takes = differing(&dealer, |old, new| new > old);
    takes.chunks(takes.len().div_ceil(GROUPS).max(1)).for_each(|group| dealer.take(group));
    let gives = differing(&dealer, |old, new| new < old);
    dealer.give(&gives);

    let of = |seat: u16| member.get(seat as usize).copied().unwrap_or(NONE);
    let mut primary = dealer.into_owners();
    primary.iter_mut().for_each(|slot| *slot = of(*slot));
    let first = heaviest(&weights, NONE).unwrap_or(NONE);
    let secondary = match heaviest(&weights, first) {
        Some(other) => second_choices(&primary, [first, other].map(of), seed[1]),
        None => vec![NONE; primary.len()],
    };
    Table { primary, secondary }
}

/// The seat with the greatest weight beside `except`; the earlier wins a tie.
fn heaviest(weights: &[u32], except: u16) -> Option<u16> {
    (0..weights.len())
        .filter(|&i| weights[i] > 0 && i != except as usize)
        .min_by_key(|&i| std::cmp::Reverse(weights[i]))
        .map(|i| i as u16)
}

/// The second choice of each slot: whoever owns the slot at the first of a few fixed distances, if that is not
/// the primary, else one of two others. So it changes only where one of these changes.
fn second_choices(owner: &[u16], others: [u16; 2], seed: u64) -> Vec<u16> {
    let size = owner.len();
    let probes: [usize; PROBES] =
        std::array::from_fn(|j| scale(mix(seed ^ mix(j as u64 + 1)), size.max(2) as u32 - 1) as usize + 1);
    // The first two distances for all slots at once, by moving the whole table; the others for the few that then still
    // have their primary.
    let [mut second, next] = [probes[0], probes[1]].map(|distance| {
        let (head, tail) = owner.split_at(distance.min(size));
        [tail, head].concat()
    });
    for ((second, next), primary) in second.iter_mut().zip(next).zip(owner) {
        *second = if second == primary { next } else { *second };
    }
    let probe = |slot: usize| {
        let mut places =
            probes[2..].iter().map(|&p| if slot + p >= size { slot + p - size } else { slot + p });
        places.find(|&place| owner[place] != owner[slot]).map(|place| owner[place])
    };
    const BLOCK: usize = 64;
    for (first, (second, owner)) in
        (0..).step_by(BLOCK).zip(second.chunks_mut(BLOCK).zip(owner.chunks(BLOCK)))
    {
        // Compared in one go.
        if second.iter().zip(owner).fold(false, |any, (second, primary)| any | (second == primary)) {
            for (slot, (second, primary)) in (first..).zip(second.iter_mut().zip(owner)) {
                if second == primary {
                    *second = probe(slot).unwrap_or(others[usize::from(*primary == others[0])]);
                }
            }
        }
    }
    second
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_eligible_means_no_owner() {
        let table = build([1, 2], 251, &[], &[Member { seat: 1, weight: 1, eligible: false }]);
        assert!(table.primary.iter().chain(&table.secondary).all(|&m| m == NONE));
        assert_eq!(build([1, 2], 251, &[], &[]).primary, vec![NONE; 251]);
    }

    #[test]
    fn one_member_has_no_second_choice() {
        let table = build([1, 2], 251, &[], &[Member { seat: 1, weight: 5, eligible: true }]);
        assert!(table.primary.iter().all(|&m| m == 0) && table.secondary.iter().all(|&m| m == NONE));
    }

    #[test]
    fn a_member_too_light_for_a_slot_still_serves_when_it_is_the_last() {
        let members = [
            Member { seat: 1, weight: 65_535, eligible: false },
            Member { seat: 2, weight: 1, eligible: true },
        ];
        assert!(build([1, 2], 251, &[], &members).primary.iter().all(|&m| m == 1));
    }

    #[test]
    fn a_history_in_which_all_left_begins_again() {
        let members =
            [Member { seat: 3, weight: 2, eligible: true }, Member { seat: 0, weight: 1, eligible: true }];
        let table = build([1, 2], 251, &[(0, 1), (1, 4), (1, 0), (0, 0), (3, 2), (0, 1)], &members);
        let first = table.primary.iter().filter(|&&m| m == 0).count();
        assert!((166..=168).contains(&first) && !table.primary.contains(&NONE), "{first}");
    }
}
