//! Chooses the second choice of each slot, and keeps one more backend that flows of the slot may still be on.
//!
//! A packet names at most three backends that may have its flow (`lb_ebpf::second_chance`), and an ingress host to which
//! routers move a flow knows nothing but the slot. So a slot's pair must change little while flows of earlier pairs are
//! alive:
//!
//! - The second choice is that of the drain window's start; if it cannot take flows or has become the primary, then the
//!   primary of that time. So primary, second choice and previous primary are all that flows from before the window can
//!   be on, and second choices change once per drain time, however often shares or health do.
//! - What leaves the pair nevertheless (a second choice that drains or whose window is over, a primary of the middle of
//!   a window) is the slot's *earlier* backend for another drain time.
//!
//! Input: the live region, the tables of now and of the window's start. Pure.

use super::{ServiceMemory, Shape, table::PerBackend};
use lb_common::{Slot, slot::NO_BACKEND};
use std::sync::Arc;

const KNOWN: u8 = 1;
const ELIGIBLE: u8 = 2;

/// What is decided for one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NewSlot {
    /// Its primary.
    pub primary: u32,
    /// The second choice by the table alone.
    pub by_table: u32,
    /// The previous primary, if the slot is in transition.
    pub previous: Option<u32>,
    /// Primary and second choice by the table of the window's start; [`NO_BACKEND`] if that table has other slots.
    pub base: [u32; 2],
}

/// Decides on the pairs of one table.
pub(super) struct Pairs {
    /// The region in effect: a table and the second choices behind it; empty if slots cannot be compared.
    before: Arc<Vec<Slot>>,
    size: usize,
    backends: PerBackend<u8>,
    /// Whether new flows are placed on second choices.
    by_pair: bool,
    /// Whether earlier backends are still kept.
    is_kept: bool,
    /// Whether a slot has an earlier backend.
    pub has_any: bool,
    /// Whether a slot has a new one.
    pub has_new: bool,
}

impl Pairs {
    /// `is_kept`: whether the earlier backends of the region in effect are kept.
    pub(super) fn new(memory: &ServiceMemory, shape: &Shape, by_pair: bool, is_kept: bool) -> Self {
        let mut backends = PerBackend::new(memory);
        for known in memory.backends.values() {
            *backends.get_mut(known.index) = KNOWN;
        }
        for member in shape.members.iter().filter(|m| m.eligible) {
            if let Some(known) = memory.backends.get(&member.address) {
                *backends.get_mut(known.index) = KNOWN | ELIGIBLE;
            }
        }
        let comparable = memory.pairs.iter().find(|(hashing, _)| *hashing == shape.into());
        let before = comparable.map(|(_, region)| region.clone()).unwrap_or_default();
        Self { before, size: shape.size as usize, backends, by_pair, is_kept, has_any: false, has_new: false }
    }

    /// Second choice and earlier backend of the slot with this number; [`NO_BACKEND`] for none.
    pub(super) fn decide(&mut self, number: usize, new: NewSlot) -> (u32, u32) {
        let [was, behind] =
            [number, self.size + number].map(|at| self.before.get(at).copied().unwrap_or(Slot::EMPTY));
        let was_second = behind.primary_index();
        let was_earlier = if was.has_earlier() { behind.secondary_index() } else { NO_BACKEND };
        let [base_primary, base_second] = if self.by_pair { new.base } else { [NO_BACKEND; 2] };
        let can_be_second = |&index: &u32| index != new.primary && self.backends.get(index) & ELIGIBLE != 0;
        let second = [base_second, base_primary].into_iter().find(can_be_second).unwrap_or(new.by_table);
        let left = [
            base_second,
            if self.by_pair { was_second } else { NO_BACKEND },
            was.primary_index(),
            if self.is_kept { was_earlier } else { NO_BACKEND },
        ];
        let is_asked = |index| index == new.primary || index == second || Some(index) == new.previous;
        let earlier = left.into_iter().find(|&i| !is_asked(i) && self.backends.get(i) & KNOWN != 0);
        self.has_any |= earlier.is_some();
        self.has_new |= earlier.is_some_and(|index| index != was_earlier);
        (second, earlier.unwrap_or(NO_BACKEND))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::compile::{BackendMemory, ShapeMember};
    use lb_common::slot::EARLIER;

    /// Backends 0 to 4, of which `eligible` take flows, and a region of one slot.
    fn pairs(eligible: &[u32], slot: [u32; 3], by_pair: bool) -> Pairs {
        let address = |i: u32| std::net::Ipv4Addr::from(i).into();
        let mut memory = ServiceMemory::default();
        for index in 0..5 {
            memory.backends.insert(
                address(index),
                BackendMemory {
                    index,
                    started_ms: None,
                    stands_by: false,
                    forbidden: false,
                    removed_ms: None,
                },
            );
        }
        let members = (0..5).map(|seat| ShapeMember {
            address: address(seat),
            weight: 1,
            eligible: eligible.contains(&seat),
            seat,
        });
        let shape = Shape { size: 1, members: members.collect(), ..Shape::default() };
        let [primary, second, earlier] = slot;
        let mark = if earlier == NO_BACKEND { 0 } else { EARLIER };
        let region =
            vec![Slot { primary, secondary: second | mark }, Slot { primary: second, secondary: earlier }];
        memory.pairs = Some(((&shape).into(), Arc::new(region)));
        Pairs::new(&memory, &shape, by_pair, true)
    }

    /// The decision for a slot whose pair was 0 and 1 when the window began.
    fn decide(pairs: &mut Pairs, primary: u32, by_table: u32) -> (u32, u32) {
        let previous = (primary != 0).then_some(0);
        pairs.decide(0, NewSlot { primary, by_table, previous, base: [0, 1] })
    }

    const NO: u32 = NO_BACKEND;
    const ALL: &[u32] = &[0, 1, 2, 3, 4];

    #[test]
    fn the_second_choice_is_that_of_the_windows_start() {
        assert_eq!(decide(&mut pairs(ALL, [0, 1, NO], true), 0, 3), (1, NO));
        assert_eq!(decide(&mut pairs(ALL, [0, 1, NO], true), 2, 3), (1, NO));
        // It is the new primary: the previous primary takes its place, and gives it back.
        assert_eq!(decide(&mut pairs(ALL, [0, 1, NO], true), 1, 3), (0, NO));
        assert_eq!(decide(&mut pairs(ALL, [1, 0, NO], true), 2, 3), (1, NO));
        // It drains: the previous primary, and its flows are found too.
        assert_eq!(decide(&mut pairs(&[0, 2, 3, 4], [0, 1, NO], true), 2, 3), (0, 1));
        assert_eq!(decide(&mut pairs(&[0, 2, 3, 4], [0, 1, NO], true), 0, 2), (2, 1));
        // Both drain: there is no room in a packet for all, but it is remembered.
        assert_eq!(decide(&mut pairs(&[2, 3, 4], [0, 1, NO], true), 2, 3), (3, 1));
    }

    #[test]
    fn what_leaves_the_pair_is_asked_too() {
        // A primary came and went within the window.
        assert_eq!(decide(&mut pairs(ALL, [2, 1, NO], true), 0, 3), (1, 2));
        // A compilation without a change changes nothing.
        let mut same = pairs(ALL, [0, 1, 2], true);
        assert_eq!(decide(&mut same, 0, 3), (1, 2));
        assert_eq!((same.has_any, same.has_new), (true, false));
        // The window moves on: the second choice is that of another table.
        let moved = NewSlot { primary: 2, by_table: 3, previous: None, base: [2, 3] };
        assert_eq!(pairs(ALL, [2, 1, NO], true).decide(0, moved), (3, 1));
    }

    #[test]
    fn an_earlier_backend_ends_with_the_drain_time_or_when_it_is_forgotten() {
        let mut old = pairs(ALL, [0, 1, 2], true);
        old.is_kept = false;
        assert_eq!((decide(&mut old, 0, 1), old.has_any), ((1, NO), false));
        assert_eq!(decide(&mut pairs(ALL, [0, 1, 9], true), 0, 1), (1, NO));
    }

    #[test]
    fn where_second_choices_get_no_flows_former_primaries_are_kept() {
        assert_eq!(decide(&mut pairs(ALL, [0, 1, NO], false), 2, 3), (3, NO));
        assert_eq!(decide(&mut pairs(ALL, [2, 3, NO], false), 4, 1), (1, 2));
    }

    #[test]
    fn a_host_without_a_live_table_makes_the_same_pairs() {
        let mut other = pairs(ALL, [0, 1, 2], true);
        other.before = Arc::default();
        assert_eq!(decide(&mut other, 0, 3), (1, NO));
        let reshaped = NewSlot { primary: 0, by_table: 3, previous: None, base: [NO, NO] };
        assert_eq!(other.decide(0, reshaped), (3, NO));
    }
}
