//! Chooses the second choice of each slot, and keeps one more backend that flows of the slot may still be on.
//!
//! A packet names at most three backends that may have its flow (`lb_ebpf::second_chance`), and an ingress host to which
//! routers move a flow knows nothing but the slot. So a slot's pair must change little while flows of earlier pairs are
//! alive:
//!
//! - The second choice is that of the drain window's start; if it cannot take flows or has become the primary, then the
//!   primary of that time. So primary, second choice and previous primary are all that flows from before the window can
//!   be on, and second choices change once per drain time, however often shares or health do.
//! - If neither can take flows and both may still have some, new flows go to the primary alone.
//! - A second choice belongs to the primary's group: the backends that have one share together (a region, zone or
//!   version). Otherwise load would decide on what shares are for, and no region would get the share that was decided.
//! - What leaves the pair nevertheless (a second choice that drains or whose window is over, a primary of the middle of
//!   a window) is the slot's *earlier* backend for another drain time.
//!
//! Input: the live region, the tables of now and of the window's start. Pure.

use super::{
    ServiceMemory, Shape,
    service::{Input, is_down},
    table::{PerBackend, index_of},
};
use crate::plan::maglev;
use lb_common::{Slot, slot::NO_BACKEND};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

const KNOWN: u8 = 1;
const ELIGIBLE: u8 = 2;
/// Flows on it are lost.
const DOWN: u8 = 4;

/// What is decided for one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NewSlot {
    /// Its primary.
    pub primary: u32,
    /// The previous primary, if the slot is in transition.
    pub previous: Option<u32>,
    /// The pair of the window's start; [`NO_BACKEND`] where it cannot be compared or flows are not placed by pairs.
    pub base: [u32; 2],
}

/// Groups of backends by index, see [`crate::plan::policy::region::Weighted`]; 0 for unknown backends.
pub(super) type Groups = PerBackend<u32>;

/// Numbers of the groups of backends; None if there is one group.
pub(super) fn groups<'a>(
    memory: &ServiceMemory,
    addresses: impl Iterator<Item = &'a IpAddr>,
    numbers: &[u32],
) -> Option<Groups> {
    let mut groups = PerBackend::new(memory);
    for (address, &number) in addresses.zip(numbers) {
        if let Some(known) = memory.backends.get(address) {
            *groups.get_mut(known.index) = number;
        }
    }
    (!numbers.is_empty()).then_some(groups)
}

impl Input<'_> {
    /// Backends on which flows are lost.
    pub(super) fn down_backends(&self) -> BTreeSet<IpAddr> {
        let seen = self.wanted.backends.values().zip(&self.verdicts);
        seen.filter(|(b, seen)| is_down(b, seen, false)).map(|(b, _)| b.address).collect()
    }
}

/// Second choices by a table alone.
pub(super) struct SecondChoices<'a> {
    table: &'a maglev::Table,
    index: &'a [u32],
    groups: Option<&'a Groups>,
    /// How many slots are searched for another member of a group.
    reach: BTreeMap<u32, usize>,
}

impl<'a> SecondChoices<'a> {
    /// `index`: indices of the table's members.
    pub(super) fn new(table: &'a maglev::Table, index: &'a [u32], groups: Option<&'a Groups>) -> Self {
        let mut counts = BTreeMap::new();
        if let Some(groups) = groups {
            for &member in &table.primary {
                *counts.entry(groups.get(index_of(index, member))).or_insert(0) += 1;
            }
        }
        // Nearly always enough to meet one of two equal members, at a cost that no share can raise.
        let size = table.primary.len();
        let reach =
            counts.into_iter().map(|(group, count): (u32, usize)| (group, (16 * size / count).min(size)));
        Self { table, index, groups, reach: reach.collect() }
    }

    fn primary(&self, number: usize) -> u32 {
        index_of(self.index, self.table.primary[number])
    }

    /// The second choice of a slot. If the table's is of another group, it is the primary of the next slot of the group
    /// with another primary: so members are second choices by weight, and few change when a backend comes or goes.
    pub(super) fn of(&self, number: usize) -> u32 {
        let by_table = index_of(self.index, self.table.secondary[number]);
        let Some(groups) = self.groups else { return by_table };
        let primary = self.primary(number);
        let group = groups.get(primary);
        let fits = |&index: &u32| index != primary && groups.get(index) == group;
        if group == 0 || fits(&by_table) {
            return by_table;
        }
        let reach = self.reach.get(&group).copied().unwrap_or(0);
        let mut next = (1..reach).map(|step| self.primary((number + step) % self.table.primary.len()));
        next.find(fits).unwrap_or(NO_BACKEND)
    }
}

/// Decides on the pairs of one table.
pub(super) struct Pairs<'a> {
    /// The region in effect: a table and the second choices behind it; empty if slots cannot be compared.
    before: Arc<Vec<Slot>>,
    size: usize,
    backends: PerBackend<u8>,
    groups: Option<&'a Groups>,
    /// Whether new flows are placed on second choices.
    by_pair: bool,
    /// Whether earlier backends are still kept.
    is_kept: bool,
    /// Whether a slot has an earlier backend.
    pub has_any: bool,
    /// Whether a slot has a new one.
    pub has_new: bool,
}

impl<'a> Pairs<'a> {
    /// `by_pair`: whether new flows are placed on second choices; `is_kept`: whether the earlier backends of the region
    /// in effect are kept.
    pub(super) fn new(
        memory: &ServiceMemory,
        shape: &Shape,
        groups: Option<&'a Groups>,
        down: &BTreeSet<IpAddr>,
        (by_pair, is_kept): (bool, bool),
    ) -> Self {
        let mut backends = PerBackend::new(memory);
        for (address, known) in &memory.backends {
            *backends.get_mut(known.index) = KNOWN | if down.contains(address) { DOWN } else { 0 };
        }
        for member in shape.members.iter().filter(|m| m.eligible) {
            if let Some(known) = memory.backends.get(&member.address) {
                *backends.get_mut(known.index) |= ELIGIBLE;
            }
        }
        let comparable = memory.pairs.iter().find(|(hashing, _)| *hashing == shape.into());
        let before = comparable.map(|(_, region)| region.clone()).unwrap_or_default();
        let size = shape.size as usize;
        Self { before, size, backends, groups, by_pair, is_kept, has_any: false, has_new: false }
    }

    /// Second choice and earlier backend of the slot with this number; [`NO_BACKEND`] for none. `by_table` is the second
    /// choice by the table alone.
    pub(super) fn decide(
        &mut self,
        number: usize,
        new: NewSlot,
        by_table: impl FnOnce() -> u32,
    ) -> (u32, u32) {
        let [was, behind] =
            [number, self.size + number].map(|at| self.before.get(at).copied().unwrap_or(Slot::EMPTY));
        let was_second = behind.primary_index();
        let was_earlier = if was.has_earlier() { behind.secondary_index() } else { NO_BACKEND };
        let [base_primary, base_second] = new.base;
        let is_of_group =
            |index| self.groups.is_none_or(|groups| groups.get(index) == groups.get(new.primary));
        let can_be_second = |&index: &u32| {
            index != new.primary && self.backends.get(index) & ELIGIBLE != 0 && is_of_group(index)
        };
        let second = match [base_second, base_primary].into_iter().find(can_be_second) {
            Some(index) => index,
            // Flows from before the window may be on both of that pair, and a packet names three.
            None if new.base.iter().all(|&i| i != new.primary && self.has_flows(i)) => NO_BACKEND,
            None => by_table(),
        };
        let left = [
            base_second,
            if self.by_pair { was_second } else { NO_BACKEND },
            was.primary_index(),
            if self.is_kept { was_earlier } else { NO_BACKEND },
        ];
        let is_asked = |index| index == new.primary || index == second || Some(index) == new.previous;
        let earlier = left.into_iter().find(|&i| !is_asked(i) && self.has_flows(i));
        self.has_any |= earlier.is_some();
        self.has_new |= earlier.is_some_and(|index| index != was_earlier);
        (second, earlier.unwrap_or(NO_BACKEND))
    }

    /// Whether flows on this backend may be alive.
    fn has_flows(&self, index: u32) -> bool {
        self.backends.get(index) & (KNOWN | DOWN) == KNOWN
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::compile::{BackendMemory, ShapeMember};
    use lb_common::slot::EARLIER;

    /// Backends 0 to 4, of which `eligible` take flows, and a region of one slot.
    fn pairs(eligible: &[u32], slot: [u32; 3], by_pair: bool) -> Pairs<'static> {
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
                    ejected_ms: None,
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
        Pairs::new(&memory, &shape, None, &BTreeSet::new(), (by_pair, true))
    }

    /// The decision for a slot whose pair was 0 and 1 when the window began.
    fn decide(pairs: &mut Pairs<'_>, primary: u32, by_table: u32) -> (u32, u32) {
        let previous = (primary != 0).then_some(0);
        let base = if pairs.by_pair { [0, 1] } else { [NO_BACKEND; 2] };
        pairs.decide(0, NewSlot { primary, previous, base }, || by_table)
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
        // Both drain: new flows go to the primary alone, so that a packet can name all three.
        assert_eq!(decide(&mut pairs(&[2, 3, 4], [0, 1, NO], true), 2, 3), (NO, 1));
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
        let moved = NewSlot { primary: 2, previous: None, base: [2, 3] };
        assert_eq!(pairs(ALL, [2, 1, NO], true).decide(0, moved, || 3), (3, 1));
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
        let reshaped = NewSlot { primary: 0, previous: None, base: [NO, NO] };
        assert_eq!(other.decide(0, reshaped, || 3), (3, NO));
    }

    /// Backends 0 to 2 and 3 to 4 have shares of their own.
    fn two_groups(pairs: &Pairs<'_>) -> &'static Groups {
        let mut groups = pairs.backends.map(|_| 1);
        (*groups.get_mut(3), *groups.get_mut(4)) = (2, 2);
        Box::leak(Box::new(groups))
    }

    #[test]
    fn second_choices_stay_within_the_primarys_group() {
        let mut pairs = pairs(ALL, [0, 1, NO], true);
        pairs.groups = Some(two_groups(&pairs));
        assert_eq!(decide(&mut pairs, 2, 4), (1, NO));
        // Moved to the other group: new flows go to the primary alone, so that flows of the old pair are found.
        assert_eq!(decide(&mut pairs, 3, 4), (NO, 1));
        *pairs.backends.get_mut(1) |= DOWN;
        assert_eq!(decide(&mut pairs, 3, 4), (4, NO), "nothing to be found");
        // The window's start was there already.
        let new = NewSlot { primary: 3, previous: None, base: [3, 4] };
        assert_eq!(pairs.decide(0, new, || 4), (4, 0));
    }

    #[test]
    fn a_group_of_any_share_has_second_choices_by_weight() {
        let pairs = pairs(ALL, [0, 1, NO], true);
        let groups = two_groups(&pairs);
        let index = [0, 1, 2, 3, 4];
        let members = |weights: [u32; 5]| {
            weights.map(|weight| maglev::Member { seat: 0, weight, eligible: true }).to_vec()
        };
        let mut members = members([300, 300, 300, 5, 15]);
        members.iter_mut().zip(0..).for_each(|(m, seat)| m.seat = seat);
        let table = maglev::rebuild([1, 2], 16_381, &[], &members, &mut None);
        let choices = SecondChoices::new(&table, &index, Some(groups));
        let mut seconds = [0; 5];
        for number in 0..16_381 {
            let (primary, second) = (choices.primary(number), choices.of(number));
            assert_ne!(primary, second);
            if second != NO {
                assert_eq!(groups.get(primary), groups.get(second), "slot {number}");
                seconds[second as usize] += 1;
            }
        }
        let missing = 16_381 - seconds.iter().sum::<usize>();
        assert!(missing < 10, "{missing} slots without a second choice");
        assert!(seconds[..3].iter().all(|&n| n.abs_diff(16_381 * 300 / 920) < 300), "{seconds:?}");
    }
}
