//! Maglev tables: assign each slot of a service a backend and a second choice.
//!
//! Input: a seed, a table size, the *history* of seats, and the members with weight and eligibility. Output: for
//! each slot two indices into the members. Pure; called by `compile`, and by tests and benches.
//!
//! As in Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016), a
//! hash selects a slot and the slot names a backend, and any host can compute the table. The assignment of slots
//! is different: Maglev assigns all of them again, so that one change moves some slots between unrelated
//! backends. Here each backend has a *seat*, a number that it keeps, and the desired state records in
//! which order seats were taken and left, and with what weight. The table is built in that order ([`TableBuilder`]):
//! a new seat takes its share, from each other seat what exceeds its own share; a seat that leaves gives its
//! slots to seats below their share. No slot moves between two other seats, and all shares are exact at each step.
//! So adding or removing one backend moves only its own share of the slots.
//!
//! Temporary changes are applied after the history: members whose weight has changed since they took their seats, and
//! members that failed or drain. So one of them alone moves only its own slots; with several at once, one
//! more also moves some of the slots that the others left.
//!
//! The result depends on the seed, the history, and each member's seat, weight and eligibility, but not on
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
use build::TableBuilder;

/// No member, in [`Table`].
pub const NONE: u16 = u16::MAX;
/// Largest number of members of one table.
pub const MAX_MEMBERS: usize = MAX_SEATS as usize;
const _: () = assert!(MAX_MEMBERS < NONE as usize);

/// Slots tried for a second choice before a fixed rule decides.
const PROBES: usize = 16;
/// Members with increased weight are processed one by one up to this number; more of them form this many groups.
const GROUPS: usize = 256;

/// A backend as a member of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Member {
    /// Seat of the member, unique in the table.
    pub seat: u32,
    /// Weight: share of the slots relative to the other members; 0 gets no slots.
    pub weight: u32,
    /// Whether the member takes new flows. An ineligible member still affects the table.
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

/// A replayed history, for reuse: most of the work of a table, and unchanged until a seat is taken or left.
pub struct ReplayedHistory {
    seed: [u64; 2],
    size: u32,
    seats: usize,
    history: Vec<SeatChange>,
    builder: TableBuilder,
}

impl ReplayedHistory {
    /// The builder after this history: from `known` if that has the same history, else replayed and stored in `known`.
    fn builder(
        known: &mut Option<Self>,
        seed: [u64; 2],
        size: u32,
        seats: usize,
        history: Vec<SeatChange>,
    ) -> TableBuilder {
        if let Some(replayed) = known
            && (replayed.seed, replayed.size, replayed.seats) == (seed, size, seats)
            && replayed.history == history
        {
            return replayed.builder.clone();
        }
        let mut builder = TableBuilder::new(seed, size, seats);
        builder.replay(&history);
        *known = Some(Self { seed, size, seats, history, builder: builder.clone() });
        builder
    }
}

/// Builds the table of `size` slots (a prime). An empty history stands for the members in the order of their
/// seats; members whose seats it does not contain come after it. Members with weight 0 are ignored; at most
/// [`MAX_MEMBERS`] are used. Cost: about size × ln(seats) moves of the history, and a search for giving seats at each.
pub fn build(seed: [u64; 2], size: u32, history: &[SeatChange], members: &[Member]) -> Table {
    build_with(seed, size, history, members, |seats, history| {
        let mut builder = TableBuilder::new(seed, size, seats);
        builder.replay(&history);
        builder
    })
}

/// Builds a table like [`build`], reusing the replayed history of the previous table in `known`: a change of weights or
/// eligibility then costs only the slots that it moves.
pub fn rebuild(
    seed: [u64; 2],
    size: u32,
    history: &[SeatChange],
    members: &[Member],
    known: &mut Option<ReplayedHistory>,
) -> Table {
    build_with(seed, size, history, members, |seats, history| {
        ReplayedHistory::builder(known, seed, size, seats, history)
    })
}

/// Builds a table; `replay` returns the builder after a history with the given number of seats.
fn build_with(
    seed: [u64; 2],
    size: u32,
    history: &[SeatChange],
    members: &[Member],
    replay: impl FnOnce(usize, Vec<SeatChange>) -> TableBuilder,
) -> Table {
    let present = || members.iter().take(MAX_MEMBERS).enumerate().filter(|(_, m)| m.weight > 0);
    if !present().any(|(_, m)| m.eligible) || size == 0 {
        return Table { primary: vec![NONE; size as usize], secondary: vec![NONE; size as usize] };
    }
    let mut order: Vec<(u32, u16)> = present().map(|(i, m)| (m.seat, i as u16)).collect();
    order.sort_unstable();
    let mut history = history.iter().filter(|(seat, _)| *seat < MAX_SEATS).copied().collect::<Vec<_>>();
    // With duplicate or too large seats, use ranks as seats and ignore the history.
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

    let mut builder = replay(seats, history);
    // Increases before decreases, so that there is always a seat to give to. Given slots form one pool: giving
    // one seat after another would move five times as many slots when one more of many seats fails.
    let differing = |builder: &TableBuilder, differs: fn(u32, u32) -> bool| -> Vec<SeatChange> {
        let changes = builder.weights().iter().zip(&weights).zip(0..);
        changes.filter(|((old, new), _)| differs(**old, **new)).map(|((_, &new), seat)| (seat, new)).collect()
    };
    let takes = differing(&builder, |old, new| new > old);
    takes.chunks(takes.len().div_ceil(GROUPS).max(1)).for_each(|group| builder.take_slots(group));
    let gives = differing(&builder, |old, new| new < old);
    builder.give_slots(&gives);

    let of = |seat: u16| member.get(seat as usize).copied().unwrap_or(NONE);
    let mut primary = builder.into_owners();
    primary.iter_mut().for_each(|slot| *slot = of(*slot));
    let first = heaviest(&weights, NONE).unwrap_or(NONE);
    let secondary = match heaviest(&weights, first) {
        Some(other) => second_choices(&primary, [first, other].map(of), seed[1]),
        None => vec![NONE; primary.len()],
    };
    Table { primary, secondary }
}

/// The seat with the greatest weight other than `except`; the first one wins a tie.
fn heaviest(weights: &[u32], except: u16) -> Option<u16> {
    (0..weights.len())
        .filter(|&i| weights[i] > 0 && i != except as usize)
        .min_by_key(|&i| std::cmp::Reverse(weights[i]))
        .map(|i| i as u16)
}

/// The second choice of each slot: the owner of the slot at the first of a few fixed distances whose owner is not
/// the primary, else one of `others`. So it changes only where one of these changes.
fn second_choices(owner: &[u16], others: [u16; 2], seed: u64) -> Vec<u16> {
    let size = owner.len();
    let probes: [usize; PROBES] =
        std::array::from_fn(|j| scale(mix(seed ^ mix(j as u64 + 1)), size.max(2) as u32 - 1) as usize + 1);
    // The first two distances for all slots at once, by rotating the whole table; the others only for the few slots
    // whose second choice still equals the primary.
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
        // Vectorised check whether any slot of the block needs a probe.
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
    fn without_eligible_members_no_slot_has_an_owner() {
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
