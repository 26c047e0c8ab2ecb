//! Builds a service's slots from its shape and its memory of earlier shapes.
//!
//! A slot that changed its primary within the drain time is *in transition*: it is marked, its flows are
//! recorded as they arrive, and a flow without an entry belongs to its secondary, the primary at the time when
//! the window began. Why that one and not the last: a flow that started since then started on a slot in
//! transition, so it has an entry; only older flows have none, and they started on that primary, which
//! had been the slot's for a whole window or was its first.
//!
//! A slot is *tracked* from its first change until a sweep of the flow table finds none of its flows: only then does its
//! primary alone determine the backend again.
//!
//! When a scheduler that places flows anywhere is replaced, all slots are tracked until a sweep finds none of its
//! flows.

use super::{
    Epoch, ServiceMemory, Shape, ShapeMember, View, map_values,
    pairs::{self, NewSlot, Pairs, SecondChoices},
    room::has_second_choices,
    service::Input,
    slot_layout,
};
use crate::{
    desired::model::{Scheduler, Service},
    plan::maglev,
};
use lb_common::{
    Slot,
    service::{flags, scheduler},
    slot::{EARLIER, NO_BACKEND, TRACKED, TRANSITION},
};
use std::{collections::HashMap, net::IpAddr, sync::Arc};

/// Recently built tables by shape, and the last history that was replayed.
#[derive(Default)]
pub(super) struct Tables {
    kept: Vec<(Arc<Shape>, Arc<maglev::Table>)>,
    replayed: Option<maglev::ReplayedHistory>,
}

/// Tables kept per service: the current one, the base, and a few that flapping repeats.
const KEPT_TABLES: usize = 4;

/// Slots of the table. A service without backends keeps its size while removed backends still have flows, which are
/// found by the slots of the table in transition.
pub(super) fn table_size(wanted: &Service, memory: &ServiceMemory) -> u32 {
    match memory.epochs.last() {
        Some(last) if wanted.backends.is_empty() && !memory.backends.is_empty() => last.shape.size,
        _ => map_values::table_size(wanted),
    }
}

impl From<&Shape> for Hashing {
    fn from(shape: &Shape) -> Self {
        Self { seed: shape.seed, size: shape.size, by_source: shape.by_source }
    }
}

/// Parameters that decide which slot of a table a flow hashes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashing {
    /// Key of the flow hash.
    pub seed: [u64; 2],
    /// Number of slots.
    pub size: u32,
    /// Whether flows are hashed by the client's address alone.
    pub by_source: bool,
}

impl Hashing {
    /// Hashing of a desired service.
    pub(super) fn wanted(wanted: &Service, memory: &ServiceMemory) -> Self {
        Self {
            seed: map_values::seed(wanted),
            size: table_size(wanted, memory),
            by_source: wanted.scheduler == Scheduler::SourceHash,
        }
    }

    /// Hashing of a view.
    pub fn of(view: &View) -> Self {
        Self { seed: view.seed, size: view.slot_count, by_source: view.flags & flags::HASH_SOURCE != 0 }
    }
}

/// Builds the shape of a service's table.
pub(super) fn build_shape(
    wanted: &Service,
    (weights, scale): (&[u32], u32),
    eligible: &[bool],
    Hashing { seed, size, by_source }: Hashing,
) -> Arc<Shape> {
    let mut members: Vec<_> = wanted
        .backends
        .values()
        .zip(weights.iter().zip(eligible))
        .zip(wanted.seats())
        .filter(|((b, _), _)| b.weight > 0)
        .map(|((b, (&weight, &eligible)), seat)| ShapeMember { address: b.address, weight, eligible, seat })
        .collect();
    members.sort_unstable();
    let mut turns = wanted.seating();
    // During slow start, weights are finer than those with which the seats were taken.
    turns.iter_mut().for_each(|change| change.1 *= scale);
    let mut plain: Vec<_> = members.iter().map(|m| (m.seat, m.weight)).collect();
    plain.sort_unstable();
    if turns == plain {
        turns.clear();
    }
    Arc::new(Shape { seed, size, turns, by_source, members })
}

/// The table of a shape, from the cache or newly built.
fn cached_table(shape: &Arc<Shape>, tables: &mut Tables) -> Arc<maglev::Table> {
    let Tables { kept, replayed } = tables;
    if let Some(at) = kept.iter().position(|(s, _)| s == shape) {
        kept[..=at].rotate_right(1);
    } else {
        let members: Vec<_> = shape
            .members
            .iter()
            .map(|m| maglev::Member { seat: m.seat, weight: m.weight, eligible: m.eligible })
            .collect();
        kept.truncate(KEPT_TABLES - 1);
        let table = maglev::rebuild(shape.seed, shape.size, &shape.turns, &members, replayed);
        kept.insert(0, (shape.clone(), Arc::new(table)));
    }
    kept[0].1.clone()
}

/// Computes from the epochs when each slot last changed.
pub(super) fn replay_changes(epochs: &[Epoch], size: u32, tables: &mut Tables) -> Vec<i64> {
    // A new seed, size or hash changes all slots, so earlier epochs do not apply to this table's slots.
    let since = epochs.windows(2).rposition(|pair| !pair[0].shape.is_comparable(&pair[1].shape));
    let (first_ms, epochs) = since.map_or((i64::MIN, epochs), |i| (epochs[i + 1].from_ms, &epochs[i + 1..]));
    let mut changed = vec![first_ms; size as usize];
    for pair in epochs.windows(2) {
        mark_changes(&pair[0].shape, &pair[1].shape, pair[1].from_ms, &mut changed, tables);
    }
    changed
}

/// Stamps the slots whose primary differs between two comparable shapes.
pub(super) fn mark_changes(
    old: &Arc<Shape>,
    new: &Arc<Shape>,
    at_ms: i64,
    changed: &mut [i64],
    tables: &mut Tables,
) {
    let position: HashMap<IpAddr, u16> =
        new.members.iter().enumerate().map(|(i, m)| (m.address, i as u16)).collect();
    let in_new: Vec<u32> =
        old.members.iter().map(|m| position.get(&m.address).map_or(u32::MAX, |&i| i.into())).collect();
    let (old, new) = (cached_table(old, tables), cached_table(new, tables));
    for ((&was, &is), changed) in old.primary.iter().zip(&new.primary).zip(changed) {
        let was = in_new.get(was as usize).copied().unwrap_or(maglev::NONE.into());
        if was != u32::from(is) {
            *changed = at_ms;
        }
    }
}

/// Backend indices of a shape's members.
fn member_indices(memory: &ServiceMemory, members: &[ShapeMember]) -> Vec<u32> {
    members.iter().map(|m| memory.backends.get(&m.address).map_or(NO_BACKEND, |b| b.index)).collect()
}

/// Backend index of a member.
pub(super) fn index_of(indices: &[u32], member: u16) -> u32 {
    indices.get(member as usize).copied().unwrap_or(NO_BACKEND)
}

/// Builds the slots with their marks, followed by second choices, list and old table; sets their sizes in the view.
/// Updates the memory's tracked bits.
pub(super) fn build_region(
    input: &Input<'_>,
    memory: &mut ServiceMemory,
    (shape, groups): (&Arc<Shape>, &[u32]),
    (window_ms, reshaped): (i64, bool),
    tables: &mut Tables,
    view: &mut View,
) -> Vec<Slot> {
    let base_shape = memory.base().map_or_else(|| shape.clone(), |e| e.shape.clone());
    let has_old = !base_shape.is_comparable(shape);
    let base = cached_table(&base_shape, tables);
    let current = cached_table(shape, tables);
    let (index, base_index) =
        (member_indices(memory, &shape.members), member_indices(memory, &base_shape.members));

    let size = shape.size as usize;
    let mut tracked = vec![0u64; size.div_ceil(64)];
    if reshaped || has_old {
        tracked.fill(u64::MAX);
    } else if memory.tracked.len() == tracked.len() {
        tracked.copy_from_slice(&memory.tracked);
    }
    let has_seconds = has_second_choices(input.wanted, input.settings);
    let by_pair = scheduler::is_by_pair(view.scheduler);
    let is_kept = memory.earlier_ms.is_some_and(|since| since > window_ms);
    let addresses = input.wanted.backends.values().map(|b| &b.address);
    let groups = pairs::groups(memory, addresses, groups);
    let [choices, base_choices] = [(&current, &index), (&base, &base_index)]
        .map(|(table, index)| SecondChoices::new(table, index, groups.as_ref()));
    let mut pairs = Pairs::new(memory, shape, groups.as_ref(), &input.down_backends(), (by_pair, is_kept));
    let mut slots = vec![Slot::EMPTY; size];
    let mut seconds = Vec::with_capacity(if has_seconds { size } else { 0 });
    for (i, slot) in slots.iter_mut().enumerate() {
        let primary = index_of(&index, current.primary[i]);
        // A forgotten base backend has no flows; the primary replaces it, so that flows are still recorded.
        let previous = (!has_old && memory.changed_ms[i] > window_ms)
            .then(|| index_of(&base_index, base.primary[i]))
            .map(|previous| if previous == NO_BACKEND { primary } else { previous });
        let base = match by_pair && !has_old {
            true => [index_of(&base_index, base.primary[i]), base_choices.of(i)],
            false => [NO_BACKEND; 2],
        };
        let (second, earlier) = match has_seconds {
            true => pairs.decide(i, NewSlot { primary, previous, base }, || choices.of(i)),
            false => (choices.of(i), NO_BACKEND),
        };
        *slot = Slot { primary, secondary: second };
        if let Some(previous) = previous {
            slot.secondary = previous | TRANSITION;
            tracked[i / 64] |= 1 << (i % 64);
        }
        if earlier != NO_BACKEND {
            slot.secondary |= EARLIER;
        }
        if tracked[i / 64] >> (i % 64) & 1 != 0 {
            slot.primary |= TRACKED;
        }
        if has_seconds {
            seconds.push(Slot { primary: second, secondary: earlier });
        }
    }
    memory.earlier_ms = match (pairs.has_new, pairs.has_any) {
        (true, _) => Some(input.now_ms),
        (false, true) => memory.earlier_ms,
        (false, false) => None,
    };
    if *memory.tracked != tracked {
        memory.tracked = Arc::new(tracked);
    }

    // Only slots in transition need second choices, but storing all lets a transition begin and end in place.
    if has_seconds {
        view.flags |= flags::SECONDS;
        slots.extend(seconds);
    }
    let list = slot_layout::scheduler_list(input.wanted.scheduler, &shape.members, &index);
    view.list_count = list.len() as u32;
    slots.extend(list);
    if has_old {
        view.old_seed = base_shape.seed;
        view.old_count = base_shape.size;
        view.flags |= if base_shape.by_source { flags::OLD_HASH_SOURCE } else { 0 };
        slots.extend(
            base.primary.iter().map(|&member| slot_layout::primary_only(index_of(&base_index, member))),
        );
    }
    slots
}

/// Hash of the backends' addresses by slot: unlike indices, addresses are equal on all hosts.
pub(super) fn table_hash(memory: &ServiceMemory, shape: &Shape, slots: &[Slot]) -> u64 {
    let mix = |hash: u64, value: u64| {
        let x = (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^ (x >> 29)
    };
    let of_address = |address: &IpAddr| {
        let bits = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        mix(mix(0, (bits >> 64) as u64), bits as u64)
    };
    let mut addresses = PerBackend::new(memory);
    for (address, b) in &memory.backends {
        *addresses.get_mut(b.index) = of_address(address);
    }
    let start = mix(mix(shape.seed[0], shape.seed[1]), slots.len() as u64);
    slots.iter().fold(start, |hash, slot| mix(hash, addresses.get(slot.primary_index())))
}

/// A value for each backend of a service, and one for all other indices: for lookups slot by slot, where a hash table
/// would dominate the cost.
pub(super) struct PerBackend<T> {
    /// Lowest index.
    first: u32,
    values: Vec<T>,
}

impl<T: Copy + Default> PerBackend<T> {
    pub(super) fn new(memory: &ServiceMemory) -> Self {
        let indices = || memory.backends.values().map(|b| b.index);
        let first = indices().min().unwrap_or(0);
        let end = indices().max().map_or(first, |last| last + 1);
        // The last value is for all other indices.
        Self { first, values: vec![T::default(); (end - first) as usize + 1] }
    }

    fn at(&self, index: u32) -> usize {
        (index.wrapping_sub(self.first) as usize).min(self.values.len() - 1)
    }

    /// The values changed one by one.
    #[cfg(test)]
    pub(super) fn map<U: Copy + Default>(&self, change: impl Fn(T) -> U) -> PerBackend<U> {
        PerBackend { first: self.first, values: self.values.iter().map(|&value| change(value)).collect() }
    }

    /// Value of the backend with this index.
    pub(super) fn get(&self, index: u32) -> T {
        self.values[self.at(index)]
    }

    /// Mutable value of the backend with this index.
    pub(super) fn get_mut(&mut self, index: u32) -> &mut T {
        let at = self.at(index);
        &mut self.values[at]
    }
}
