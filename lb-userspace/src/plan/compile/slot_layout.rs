//! Layout of a service's slot region behind its table: second choices of slots in transition, the list of
//! round-robin schedulers, and the old table after a change of seed, size or hash.
//!
//! Called by `service`. Layout: [`lb_common::ServiceView`] says where each part begins.

use super::memory::ShapeMember;
use crate::desired::model::{Scheduler, Service};
use lb_common::{Slot, load::FLOW, slot::NO_BACKEND};

/// Most turns of one round of `wrr`. Weights that need more are rounded; each backend gets at least one turn.
const MAX_TURNS: u64 = 4_096;

/// A slot with a primary and no secondary.
pub fn primary_only(primary: u32) -> Slot {
    Slot { primary, secondary: NO_BACKEND }
}

/// List of a scheduler: backends in the order of their turns; empty for schedulers without a list.
pub fn scheduler_list(scheduler: Scheduler, members: &[ShapeMember], index: &[u32]) -> Vec<Slot> {
    let mut eligible: Vec<(&ShapeMember, u32)> =
        members.iter().zip(index.iter().copied()).filter(|(m, _)| m.eligible).collect();
    eligible.sort_unstable_by_key(|(m, _)| (m.seat, m.address));
    match scheduler {
        Scheduler::Rr | Scheduler::Lc => eligible.into_iter().map(|(_, index)| primary_only(index)).collect(),
        Scheduler::Wrr => {
            let weights: Vec<u64> = eligible.iter().map(|(m, _)| u64::from(m.weight)).collect();
            round_robin_turns(&weights).into_iter().map(|i| primary_only(eligible[i].1)).collect()
        }
        Scheduler::Maglev | Scheduler::P2c | Scheduler::Random | Scheduler::SourceHash => Vec::new(),
    }
}

/// Largest length of a service's list: with all backends eligible, and weights as fine as slow start makes them.
pub fn max_list_len(wanted: &Service) -> u32 {
    let weights = || wanted.backends.values().map(|b| u64::from(b.weight)).filter(|&w| w > 0);
    match wanted.scheduler {
        Scheduler::Rr | Scheduler::Lc => weights().count() as u32,
        Scheduler::Wrr => {
            let divisor = weights().fold(0, gcd).max(1);
            // Weights of regions and roll-outs are finer still.
            let is_steered = wanted.is_regional() || wanted.rollout.is_some();
            let parts = if is_steered { MAX_TURNS } else { u64::from(super::slow::PARTS) };
            let sum = weights().map(|w| w / divisor).sum::<u64>() * parts;
            sum.min(MAX_TURNS) as u32 + weights().count() as u32
        }
        Scheduler::Maglev | Scheduler::P2c | Scheduler::Random | Scheduler::SourceHash => 0,
    }
}

/// One round in which each backend has turns in proportion to its weight, spread evenly: the backend furthest behind
/// its share is next.
fn round_robin_turns(weights: &[u64]) -> Vec<usize> {
    let divisor = weights.iter().fold(0, |a, &b| gcd(a, b)).max(1);
    let sum: u64 = weights.iter().map(|w| w / divisor).sum();
    let scaled: Vec<u64> = weights
        .iter()
        .map(|w| if sum <= MAX_TURNS { w / divisor } else { (w / divisor * MAX_TURNS).div_ceil(sum) })
        .collect();
    let total: u64 = scaled.iter().sum();
    let mut credit = vec![0i64; scaled.len()];
    (0..total)
        .map(|_| {
            for (credit, &weight) in credit.iter_mut().zip(&scaled) {
                *credit += weight as i64;
            }
            // The first of equal credits.
            let next =
                (0..credit.len()).rev().max_by_key(|&i| credit[i]).expect("a total above 0 has a share");
            credit[next] -= total as i64;
            next
        })
        .collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Cost of a flow on a backend: one unit at the mean weight, less at higher weights.
pub fn flow_cost(weight: u32, weights: impl Iterator<Item = u32>) -> u32 {
    let (sum, count) = weights.filter(|&w| w > 0).fold((0u64, 0u64), |(s, n), w| (s + u64::from(w), n + 1));
    if weight == 0 || sum == 0 {
        return FLOW;
    }
    let cost = u64::from(FLOW) * sum / (count * u64::from(weight));
    u32::try_from(cost).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(seat: u32, weight: u32, eligible: bool) -> ShapeMember {
        ShapeMember { address: std::net::Ipv4Addr::from(seat).into(), weight, eligible, seat }
    }

    fn names(slots: &[Slot]) -> Vec<u32> {
        slots.iter().map(|s| s.primary).collect()
    }

    #[test]
    fn lists_contain_eligible_members_in_the_order_of_seats() {
        let members = [member(3, 1, true), member(1, 2, true), member(2, 1, false), member(0, 1, true)];
        let index = [30, 10, 20, 5];
        assert_eq!(names(&scheduler_list(Scheduler::Rr, &members, &index)), [5, 10, 30]);
        assert_eq!(names(&scheduler_list(Scheduler::Lc, &members, &index)), [5, 10, 30]);
        assert_eq!(names(&scheduler_list(Scheduler::Wrr, &members, &index)), [10, 5, 30, 10]);
        assert!(scheduler_list(Scheduler::P2c, &members, &index).is_empty());
        assert!(scheduler_list(Scheduler::Wrr, &members[2..3], &index).is_empty(), "no member is eligible");
    }

    #[test]
    fn turns_are_spread_and_add_up() {
        assert_eq!(round_robin_turns(&[5, 1, 1]), [0, 0, 1, 0, 2, 0, 0]);
        assert_eq!(round_robin_turns(&[10, 10]), [0, 1]);
        let round = round_robin_turns(&[65_535, 1, 30_000]);
        let count = |i| round.iter().filter(|x| **x == i).count();
        assert!(round.len() <= MAX_TURNS as usize + 3 && count(1) == 1, "{}", round.len());
        assert!((2.17..2.20).contains(&(count(0) as f64 / count(2) as f64)));
    }

    #[test]
    fn a_flow_costs_less_where_there_is_more_room() {
        let weights = [1, 3, 0];
        assert_eq!([1, 3, 0].map(|w| flow_cost(w, weights.into_iter())), [2 * FLOW, 2 * FLOW / 3, FLOW]);
        assert_eq!(flow_cost(1, [1].into_iter()), FLOW);
        assert_eq!(flow_cost(65_535, [1, 65_535].into_iter()), FLOW / 2);
    }
}
