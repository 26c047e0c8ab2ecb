//! A service's slots: from its shape and what its memory knows of earlier ones.
//!
//! A slot that changed its primary within the drain time is *in transition*: it is marked, its flows are
//! recorded as they come, and a flow in no table belongs to its secondary, the primary of the time when
//! the window began. Why that one and not the last: a flow that started since then started on a slot in
//! transition, so it stands in a table; only older ones do not, and they started on that primary, which
//! had been the slot's for a whole window or was its first.
//!
//! A slot is *tracked* from its first change on until a scan of the flow tables finds none of the service's
//! flows there: only then is its primary the whole truth again.
//!
//! When a scheduler that places flows anywhere is replaced, all slots are tracked until a sweep finds none of its
//! flows.

use super::{
    Epoch, ServiceMemory, Shape, ShapeMember, View, entries, room::has_pairs, service::Input, slot_layout,
};
use crate::{
    desired::model::{Scheduler, Service},
    plan::maglev,
};
use lb_common::{
    Slot,
    service::flags,
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use std::{collections::HashMap, net::IpAddr, sync::Arc};

/// Tables made lately by what they were made from, and the last history that was dealt.
#[derive(Default)]
pub(super) struct Tables {
    kept: Vec<(Arc<Shape>, Arc<maglev::Table>)>,
    dealt: Option<maglev::Dealt>,
}

/// Tables kept per service: the current one, the base, and a few that flapping comes back to.
const KEPT_TABLES: usize = 4;

/// Slots of the table. Without a backend it keeps its size while removed ones still have flows: the slots of
/// a table in transition are how those flows are found.
pub(super) fn table_size(wanted: &Service, memory: &ServiceMemory) -> u32 {
    match memory.epochs.last() {
        Some(last) if wanted.backends.is_empty() && !memory.backends.is_empty() => last.shape.size,
        _ => entries::table_size(wanted),
    }
}

impl From<&Shape> for Hashing {
    fn from(shape: &Shape) -> Self {
        Self { seed: shape.seed, size: shape.size, by_source: shape.by_source }
    }
}

/// What decides on which slot of a table a flow falls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashing {
    /// Key of the flow hash.
    pub seed: [u64; 2],
    /// Slots.
    pub size: u32,
    /// Flows are hashed by the client's address alone.
    pub by_source: bool,
}

impl Hashing {
    /// What a service asks for.
    pub(super) fn wanted(wanted: &Service, memory: &ServiceMemory) -> Self {
        Self {
            seed: entries::seed(wanted),
            size: table_size(wanted, memory),
            by_source: wanted.scheduler == Scheduler::SourceHash,
        }
    }

    /// What a view says.
    pub fn of(view: &View) -> Self {
        Self { seed: view.seed, size: view.slot_count, by_source: view.flags & flags::HASH_SOURCE != 0 }
    }
}

pub(super) fn shape(
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
    // While somebody starts slowly, weights are finer than what the seats were taken with.
    turns.iter_mut().for_each(|turn| turn.1 *= scale);
    let mut plain: Vec<_> = members.iter().map(|m| (m.seat, m.weight)).collect();
    plain.sort_unstable();
    if turns == plain {
        turns.clear();
    }
    Arc::new(Shape { seed, size, turns, by_source, members })
}

/// The table of a shape, built at most once while it is kept.
fn table(shape: &Arc<Shape>, tables: &mut Tables) -> Arc<maglev::Table> {
    let Tables { kept, dealt } = tables;
    if let Some(at) = kept.iter().position(|(s, _)| s == shape) {
        kept[..=at].rotate_right(1);
    } else {
        let members: Vec<_> = shape
            .members
            .iter()
            .map(|m| maglev::Member { seat: m.seat, weight: m.weight, eligible: m.eligible })
            .collect();
        kept.truncate(KEPT_TABLES - 1);
        let table = maglev::build_again(shape.seed, shape.size, &shape.turns, &members, dealt);
        kept.insert(0, (shape.clone(), Arc::new(table)));
    }
    kept[0].1.clone()
}

/// When each slot last changed, worked out from the epochs.
pub(super) fn replay(epochs: &[Epoch], size: u32, tables: &mut Tables) -> Vec<i64> {
    // A new seed, size or hash changes all slots; what was before is not told in this table's.
    let since = epochs.windows(2).rposition(|pair| !pair[0].shape.comparable(&pair[1].shape));
    let (first_ms, epochs) = since.map_or((i64::MIN, epochs), |i| (epochs[i + 1].from_ms, &epochs[i + 1..]));
    let mut changed = vec![first_ms; size as usize];
    for pair in epochs.windows(2) {
        note_changes(&pair[0].shape, &pair[1].shape, pair[1].from_ms, &mut changed, tables);
    }
    changed
}

/// Stamps the slots whose primary differs between two comparable shapes.
pub(super) fn note_changes(
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
    let (old, new) = (table(old, tables), table(new, tables));
    for ((&was, &is), changed) in old.primary.iter().zip(&new.primary).zip(changed) {
        let was = in_new.get(was as usize).copied().unwrap_or(maglev::NONE.into());
        if was != u32::from(is) {
            *changed = at_ms;
        }
    }
}

/// Backends' indices of a shape's members.
fn indices(memory: &ServiceMemory, members: &[ShapeMember]) -> Vec<u32> {
    members.iter().map(|m| memory.backends.get(&m.address).map_or(NO_BACKEND, |b| b.index)).collect()
}

/// A member's index.
fn of(indices: &[u32], member: u16) -> u32 {
    indices.get(member as usize).copied().unwrap_or(NO_BACKEND)
}

/// The slots with their marks, and what stands behind them; says in the view what that is. Brings the memory's
/// tracked bits up to date.
pub(super) fn region(
    input: &Input<'_>,
    memory: &mut ServiceMemory,
    shape: &Arc<Shape>,
    window_ms: i64,
    reshaped: bool,
    tables: &mut Tables,
    view: &mut View,
) -> Vec<Slot> {
    let base_shape = memory.base().map_or_else(|| shape.clone(), |e| e.shape.clone());
    let has_old = !base_shape.comparable(shape);
    let base = table(&base_shape, tables);
    let current = table(shape, tables);
    let (index, base_index) = (indices(memory, &shape.members), indices(memory, &base_shape.members));

    let size = shape.size as usize;
    let mut tracked = vec![0u64; size.div_ceil(64)];
    if reshaped || has_old {
        tracked.fill(u64::MAX);
    } else if memory.tracked.len() == tracked.len() {
        tracked.copy_from_slice(&memory.tracked);
    }
    let mut slots = vec![Slot::EMPTY; size];
    for (i, slot) in slots.iter_mut().enumerate() {
        slot.primary = of(&index, current.primary[i]);
        slot.secondary = of(&index, current.secondary[i]);
        if !has_old && memory.changed_ms[i] > window_ms {
            // A base backend that is forgotten has no flows; the primary stands in for it, so that
            // flows are still recorded.
            let previous = of(&base_index, base.primary[i]);
            slot.secondary = if previous == NO_BACKEND { slot.primary } else { previous } | TRANSITION;
            tracked[i / 64] |= 1 << (i % 64);
        }
        if tracked[i / 64] >> (i % 64) & 1 != 0 {
            slot.primary |= TRACKED;
        }
    }
    if *memory.tracked != tracked {
        memory.tracked = Arc::new(tracked);
    }

    // Always, though only slots in transition need them: so a transition begins and ends in place.
    if has_pairs(input.wanted, input.settings) {
        view.flags |= flags::SECONDS;
        slots.extend(current.secondary.iter().map(|&member| slot_layout::only(of(&index, member))));
    }
    let list = slot_layout::list(input.wanted.scheduler, &shape.members, &index);
    view.list_count = list.len() as u32;
    slots.extend(list);
    if has_old {
        view.old_seed = base_shape.seed;
        view.old_count = base_shape.size;
        view.flags |= if base_shape.by_source { flags::OLD_HASH_SOURCE } else { 0 };
        slots.extend(base.primary.iter().map(|&member| slot_layout::only(of(&base_index, member))));
    }
    slots
}

/// A hash of what the slots send new flows to. Indices differ from host to host, addresses do not.
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

/// A number for each backend of a service, and one for all that it does not have: for what is looked up slot by slot,
/// where a hash table would cost more than all else.
pub(super) struct PerBackend<T> {
    /// The least index.
    first: u32,
    values: Vec<T>,
}

impl<T: Copy + Default> PerBackend<T> {
    pub(super) fn new(memory: &ServiceMemory) -> Self {
        let indices = || memory.backends.values().map(|b| b.index);
        let first = indices().min().unwrap_or(0);
        let end = indices().max().map_or(first, |last| last + 1);
        // The last is that of all others.
        Self { first, values: vec![T::default(); (end - first) as usize + 1] }
    }

    fn at(&self, index: u32) -> usize {
        (index.wrapping_sub(self.first) as usize).min(self.values.len() - 1)
    }

    /// The number of the backend with this index.
    pub(super) fn get(&self, index: u32) -> T {
        self.values[self.at(index)]
    }

    /// The same, to change it.
    pub(super) fn get_mut(&mut self, index: u32) -> &mut T {
        let at = self.at(index);
        &mut self.values[at]
    }
}
