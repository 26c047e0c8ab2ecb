//! One service: who is eligible, its slots, its backends' entries.
//!
//! A slot that changed its primary within the drain time is *in transition*: it is marked, its flows are
//! recorded as they come, and a flow in no table belongs to its secondary, the primary of the time when
//! the window began. Why that one and not the last: a flow that started since then started on a slot in
//! transition, so it stands in a table; only older ones do not, and they started on that primary, which
//! had been the slot's for a whole window or was its first.
//!
//! A slot is *tracked* from its first change on until a scan of the flow tables finds none of the service's
//! flows there: only then is its primary the whole truth again.

use super::{
    BackendMemory, BackendStatus, CompileError, Epoch, ServiceEntry, ServiceId, ServiceMemory, ServiceStatus,
    Settings, Shape, ShapeMember, View, entries, memory::FreeIndices,
};
use crate::{
    maglev,
    model::{
        BackendId, BackendState, Health, HealthKind, Name, NextHop, OnDown, Protocol, Scheduler, Service,
    },
    policy::{self, Candidate},
};
use lb_common::{
    Backend, Slot,
    backend::flags::{DOWN, DRAINING},
    service::{flags, scheduler},
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    iter::Peekable,
    net::IpAddr,
    sync::Arc,
};

/// What a service is compiled from.
pub(super) struct Input<'a> {
    pub name: &'a Name,
    pub id: ServiceId,
    pub wanted: &'a Arc<Service>,
    /// In the order of `wanted.backends`.
    pub verdicts: Vec<Health>,
    pub next_hops: &'a BTreeMap<IpAddr, NextHop>,
    pub now_ms: i64,
    pub settings: &'a Settings,
}

/// What comes of it.
pub(super) struct Output {
    pub index: u32,
    pub entry: ServiceEntry,
    pub backends: Vec<(u32, Backend)>,
    pub egress: BTreeSet<u32>,
    pub memory: Arc<ServiceMemory>,
    pub status: Arc<ServiceStatus>,
    pub next_change_ms: Option<i64>,
}

/// The last output and its input; and the tables made lately, by what they were made from.
#[derive(Default)]
pub(super) struct Cached {
    last: Option<Last>,
    tables: Vec<(Arc<Shape>, Arc<maglev::Table>)>,
}

struct Last {
    name: Name,
    wanted: Arc<Service>,
    verdicts: Vec<Health>,
    next_hops: Vec<Option<NextHop>>,
    output: Arc<Output>,
}

/// Tables kept per service: the current one, the base, and a few that flapping comes back to.
const KEPT_TABLES: usize = 4;

/// A service's verdicts, from the sorted verdicts of all. One pass over both, as both are in name order.
pub(super) fn verdicts<'a>(
    name: &Name,
    wanted: &Service,
    all: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a Health)>>,
) -> Vec<Health> {
    while all.next_if(|(id, _)| id.service < *name).is_some() {}
    wanted
        .backends
        .keys()
        .map(|backend| {
            while all.next_if(|(id, _)| id.service == *name && id.backend < *backend).is_some() {}
            let found = all.next_if(|(id, _)| id.service == *name && id.backend == *backend);
            match wanted.health.kind {
                HealthKind::None => Health::Healthy,
                _ => found.map_or(Health::Unknown, |(_, &health)| health),
            }
        })
        .collect()
}

/// Compiles a service, or returns what was compiled before if nothing has changed.
pub(super) fn compile(
    input: &Input<'_>,
    memory: Option<&Arc<ServiceMemory>>,
    free: &mut FreeIndices,
    cached: &mut Cached,
) -> Result<Arc<Output>, CompileError> {
    // All backends have an entry in the memory that came of them.
    let next_hops = |memory: &ServiceMemory| -> Vec<Option<NextHop>> {
        memory.backends.keys().map(|address| input.next_hops.get(address).copied()).collect()
    };
    if let Some(last) = &cached.last
        && memory.is_some_and(|m| Arc::ptr_eq(m, &last.output.memory))
        && last.output.next_change_ms.is_none_or(|at| input.now_ms < at)
        && last.verdicts == input.verdicts
        && last.next_hops == next_hops(&last.output.memory)
        && last.name == *input.name
        && last.wanted == *input.wanted
    {
        return Ok(last.output.clone());
    }
    let output = Arc::new(compile_anew(input, memory, free, &mut cached.tables)?);
    cached.last = Some(Last {
        name: input.name.clone(),
        wanted: input.wanted.clone(),
        verdicts: input.verdicts.clone(),
        next_hops: next_hops(&output.memory),
        output: output.clone(),
    });
    Ok(output)
}

fn compile_anew(
    input: &Input<'_>,
    before: Option<&Arc<ServiceMemory>>,
    free: &mut FreeIndices,
    tables: &mut Vec<(Arc<Shape>, Arc<maglev::Table>)>,
) -> Result<Output, CompileError> {
    let wanted = input.wanted;
    let drain_ms = i64::from(wanted.drain_s) * 1_000;
    let mut memory = before.map(|m| (**m).clone()).unwrap_or_default();
    if before.is_none() {
        memory.index = free.service().ok_or_else(|| too_many("services", input, "--max-services"))?;
    }
    allocate(input, &mut memory, free)?;

    let candidates: Vec<_> = wanted
        .backends
        .values()
        .zip(&input.verdicts)
        .map(|(b, &health)| Candidate { weight: b.weight, state: b.state, health })
        .collect();
    let rule = policy::eligible(&candidates, memory.settled, wanted.panic_percent);
    memory.settled = rule.settled;

    let shape = shape(wanted, &rule.eligible, table_size(wanted, &memory));
    let previous = memory.epochs.last().map(|e| e.shape.clone());
    let is_new = memory.enter(&shape, input.now_ms, drain_ms);
    if shape.size as usize != memory.changed_ms.len() {
        memory.changed_ms = Arc::new(replay(&memory.epochs, shape.size, tables));
    } else if is_new && let Some(previous) = previous.filter(|p| p.comparable(&shape)) {
        let mut changed = (*memory.changed_ms).clone();
        note_changes(&previous, &shape, input.now_ms, &mut changed, tables);
        memory.changed_ms = Arc::new(changed);
    } else if is_new {
        memory.changed_ms = Arc::new(vec![i64::MIN; shape.size as usize]);
    }
    // A table of another kind says nothing about where flows recorded under it fall now.
    let reshaped = before.is_some_and(|m| m.epochs.last().is_some_and(|e| !e.shape.comparable(&shape)));
    let slots = slots(&mut memory, &shape, input.now_ms - drain_ms, reshaped, tables);

    let (backends, egress) = backend_entries(input, &memory, rule.panic);
    let status = status(input, &memory, &shape, &rule, &slots, &backends, drain_ms);
    let next_change_ms =
        memory.epochs.iter().skip(1).map(|e| e.from_ms + drain_ms).find(|&t| t > input.now_ms);
    Ok(Output {
        index: memory.index,
        entry: ServiceEntry { view: view(wanted, shape.seed), table: Arc::new(slots) },
        backends,
        egress,
        memory: Arc::new(memory),
        status: Arc::new(status),
        next_change_ms,
    })
}

fn too_many(what: &'static str, input: &Input<'_>, option: &'static str) -> CompileError {
    let limits = &input.settings.limits;
    let limit = u64::from(if what == "services" { limits.services } else { limits.backends });
    CompileError::TooMany { what, needed: limit + 1, limit, first: input.name.to_string(), option }
}

/// Gives each backend an index, and notes which are gone and which are back.
fn allocate(
    input: &Input<'_>,
    memory: &mut ServiceMemory,
    free: &mut FreeIndices,
) -> Result<(), CompileError> {
    let wanted: BTreeSet<IpAddr> = input.wanted.backends.values().map(|b| b.address).collect();
    for (address, backend) in &mut memory.backends {
        backend.removed_ms = match wanted.contains(address) {
            true => None,
            false => backend.removed_ms.or(Some(input.now_ms)),
        };
    }
    for address in wanted {
        if let Entry::Vacant(place) = memory.backends.entry(address) {
            let index = free.backend().ok_or_else(|| too_many("backends", input, "--max-backends"))?;
            place.insert(BackendMemory { index, removed_ms: None });
        }
    }
    Ok(())
}

/// Slots of the table. Without a backend it keeps its size while removed ones still have flows: the slots of
/// a table in transition are how those flows are found.
fn table_size(wanted: &Service, memory: &ServiceMemory) -> u32 {
    match memory.epochs.last() {
        Some(last) if wanted.backends.is_empty() && !memory.backends.is_empty() => last.shape.size,
        _ => entries::table_size(wanted),
    }
}

fn shape(wanted: &Service, eligible: &[bool], size: u32) -> Arc<Shape> {
    let mut members: Vec<_> = wanted
        .backends
        .values()
        .zip(eligible)
        .zip(wanted.seats())
        .filter(|((b, _), _)| b.weight > 0)
        .map(|((b, &eligible), seat)| ShapeMember { address: b.address, weight: b.weight, eligible, seat })
        .collect();
    members.sort_unstable();
    let mut turns = wanted.seating();
    let mut plain: Vec<_> = members.iter().map(|m| (m.seat, m.weight)).collect();
    plain.sort_unstable();
    if turns == plain {
        turns.clear();
    }
    Arc::new(Shape { seed: entries::seed(wanted), size, turns, members })
}

/// The table of a shape, built at most once while it is kept.
fn table(shape: &Arc<Shape>, tables: &mut Vec<(Arc<Shape>, Arc<maglev::Table>)>) -> Arc<maglev::Table> {
    if let Some(at) = tables.iter().position(|(s, _)| s == shape) {
        tables[..=at].rotate_right(1);
    } else {
        let members: Vec<_> = shape
            .members
            .iter()
            .map(|m| maglev::Member { seat: m.seat, weight: m.weight, eligible: m.eligible })
            .collect();
        tables.truncate(KEPT_TABLES - 1);
        tables.insert(
            0,
            (shape.clone(), Arc::new(maglev::build(shape.seed, shape.size, &shape.turns, &members))),
        );
    }
    tables[0].1.clone()
}

/// When each slot last changed, worked out from the epochs.
fn replay(epochs: &[Epoch], size: u32, tables: &mut Vec<(Arc<Shape>, Arc<maglev::Table>)>) -> Vec<i64> {
    let mut changed = vec![i64::MIN; size as usize];
    for pair in epochs.windows(2) {
        note_changes(&pair[0].shape, &pair[1].shape, pair[1].from_ms, &mut changed, tables);
    }
    changed
}

/// Stamps the slots whose primary differs between two comparable shapes.
fn note_changes(
    old: &Arc<Shape>,
    new: &Arc<Shape>,
    at_ms: i64,
    changed: &mut [i64],
    tables: &mut Vec<(Arc<Shape>, Arc<maglev::Table>)>,
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

/// The slots with their marks. Brings the memory's tracked bits up to date.
fn slots(
    memory: &mut ServiceMemory,
    shape: &Arc<Shape>,
    window_ms: i64,
    reshaped: bool,
    tables: &mut Vec<(Arc<Shape>, Arc<maglev::Table>)>,
) -> Vec<Slot> {
    let base_shape = memory.base().map_or_else(|| shape.clone(), |e| e.shape.clone());
    let base = table(&base_shape, tables);
    let current = table(shape, tables);
    let index_of = |members: &[ShapeMember]| -> Vec<u32> {
        members.iter().map(|m| memory.backends.get(&m.address).map_or(NO_BACKEND, |b| b.index)).collect()
    };
    let (current_index, base_index) = (index_of(&shape.members), index_of(&base_shape.members));
    let of = |indices: &[u32], member: u16| indices.get(member as usize).copied().unwrap_or(NO_BACKEND);

    let size = shape.size as usize;
    let mut tracked = vec![0u64; size.div_ceil(64)];
    if reshaped {
        tracked.fill(u64::MAX);
    } else if memory.tracked.len() == tracked.len() {
        tracked.copy_from_slice(&memory.tracked);
    }
    let mut slots = vec![Slot::EMPTY; size];
    for (i, slot) in slots.iter_mut().enumerate() {
        slot.primary = of(&current_index, current.primary[i]);
        slot.secondary = of(&current_index, current.secondary[i]);
        if memory.changed_ms[i] > window_ms {
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
    slots
}

/// Entries of all backends that still have an index, and the interfaces they leave by.
fn backend_entries(
    input: &Input<'_>,
    memory: &ServiceMemory,
    panic: bool,
) -> (Vec<(u32, Backend)>, BTreeSet<u32>) {
    let mut states: HashMap<IpAddr, u32> = HashMap::new();
    for (b, &health) in input.wanted.backends.values().zip(&input.verdicts) {
        let mut state = 0;
        if b.state == BackendState::Draining {
            state |= DRAINING;
        }
        // Under panic the verdicts are ignored, or flows placed now would be taken for stale ones.
        if b.state == BackendState::Down || (health == Health::Unhealthy && !panic) {
            state |= DOWN;
        }
        states.insert(b.address, state);
    }
    let mut egress = BTreeSet::new();
    let entries = memory
        .backends
        .iter()
        .map(|(&address, backend)| {
            let hop = input.next_hops.get(&address);
            egress.extend(hop.map(|hop| hop.ifindex));
            let state = states.get(&address).copied().unwrap_or(DRAINING);
            let entry = entries::backend(address, input.wanted, memory.index, hop, state, input.settings);
            (backend.index, entry)
        })
        .collect();
    (entries, egress)
}

fn view(wanted: &Service, seed: [u64; 2]) -> View {
    let mut bits = 0;
    if wanted.protocol == Protocol::Udp && wanted.udp_stateless {
        bits |= flags::UDP_STATELESS;
    }
    if !wanted.quic.is_empty() {
        bits |= flags::QUIC;
    }
    if wanted.on_down == OnDown::Reset {
        bits |= flags::RESET_ON_DOWN;
    }
    let Scheduler::Maglev = wanted.scheduler;
    View {
        seed,
        flags: bits,
        scheduler: scheduler::MAGLEV,
        protocol: wanted.protocol.number(),
        udp_timeout_s: wanted.udp_timeout_s,
    }
}

fn status(
    input: &Input<'_>,
    memory: &ServiceMemory,
    shape: &Shape,
    rule: &policy::Eligibility,
    slots: &[Slot],
    entries: &[(u32, Backend)],
    drain_ms: i64,
) -> ServiceStatus {
    let mut shares: HashMap<u32, u32> = HashMap::new();
    for slot in slots {
        *shares.entry(slot.primary_index()).or_default() += 1;
    }
    let resolved: HashMap<u32, bool> =
        entries.iter().map(|(i, b)| (*i, b.flags & lb_common::backend::flags::RESOLVED != 0)).collect();
    let share = |index| shares.get(&index).copied().unwrap_or(0);
    let is_resolved = |index| resolved.get(&index).copied().unwrap_or(false);
    let mut backends: Vec<_> = input
        .wanted
        .backends
        .iter()
        .zip(input.verdicts.iter().zip(&rule.eligible))
        .filter_map(|((name, b), (&health, &eligible))| {
            let index = memory.backends.get(&b.address)?.index;
            Some(BackendStatus {
                name: Some(name.clone()),
                address: b.address,
                index,
                weight: b.weight,
                state: b.state,
                health,
                eligible,
                slots: share(index),
                resolved: is_resolved(index),
                removed_until_ms: None,
            })
        })
        .collect();
    backends.extend(memory.backends.iter().filter_map(|(&address, b)| {
        let removed_ms = b.removed_ms?;
        Some(BackendStatus {
            name: None,
            address,
            index: b.index,
            weight: 0,
            state: BackendState::Draining,
            health: Health::Unknown,
            eligible: false,
            slots: 0,
            resolved: is_resolved(b.index),
            removed_until_ms: Some(removed_ms + drain_ms),
        })
    }));
    let until = memory.changed_ms.iter().max().map(|&t| t.saturating_add(drain_ms));
    ServiceStatus {
        name: input.name.clone(),
        id: input.id,
        index: memory.index,
        table_size: shape.size,
        eligible: rule.eligible.iter().filter(|&&e| e).count() as u32,
        panic: rule.panic,
        transition_slots: slots.iter().filter(|s| s.is_transition()).count() as u32,
        tracked_slots: slots.iter().filter(|s| s.is_tracked()).count() as u32,
        transition_until_ms: until.filter(|&t| t > input.now_ms),
        backends,
    }
}
