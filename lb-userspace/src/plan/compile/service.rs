//! Compiles one service: its view, memory, backend entries and costs.
//!
//! `table` builds its slots; `residency` decides on exclusions, `spread` on weights.

use super::{
    BackendMemory, CompileError, CompiledService, Cost, DeploymentSettings, ServiceEntry, ServiceId,
    ServiceMemory, Shape, View,
    features::check_features,
    hold::hold_in,
    map_values,
    memory::FreeIndices,
    reach::forwarding_problem,
    residency::Excluded,
    slot_layout, slow,
    spread::region_weights,
    status::compile_status,
    table::{Hashing, Tables, build_region, build_shape, mark_changes, replay_changes},
};
use crate::{
    desired::model::{
        self, BackendId, BackendState, ForwardingMode, Health, Name, NextHop, OnDown, Protocol, Readiness,
        RegionShares, Scheduler, Service, WhenAllDown,
    },
    plan::policy::{self, BackendObservation, Candidate, region::Weighted},
};
use lb_common::{
    Backend,
    backend::{
        flags::{DOWN, DRAINING},
        mode,
    },
    load::{FLOW, source},
    service::{flags, scheduler},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
    iter::Peekable,
    net::IpAddr,
    sync::Arc,
};

/// Input of a service's compilation.
pub(super) struct Input<'a> {
    pub name: &'a Name,
    pub id: ServiceId,
    pub wanted: &'a Arc<Service>,
    /// Health and readiness, in the order of `wanted.backends`.
    pub verdicts: Vec<BackendObservation>,
    /// Shares of regions and versions; None without region rules and roll-out.
    pub steer: Option<Arc<RegionShares>>,
    /// Excluded backends, in the order of `wanted.backends`; empty if none is excluded.
    pub excluded: Vec<Option<Excluded>>,
    pub next_hops: &'a BTreeMap<IpAddr, NextHop>,
    /// Names of interfaces.
    pub links: &'a BTreeMap<u32, String>,
    pub now_ms: i64,
    pub settings: &'a DeploymentSettings,
    /// Size, seed and hash that the service keeps until there is room for a change.
    pub held: Option<Hashing>,
}

/// Output of a service's compilation.
pub(super) struct ServiceOutput {
    pub index: u32,
    pub entry: ServiceEntry,
    pub backends: Vec<(u32, Backend)>,
    pub costs: Vec<(u32, Cost)>,
    pub egress: BTreeSet<u32>,
    pub memory: Arc<ServiceMemory>,
    pub status: Arc<CompiledService>,
    pub next_change_ms: Option<i64>,
    /// Set if some backends have no index, because none is free; they take no flows.
    pub missing_indices: Option<CompileError>,
}

/// The last output with its input, and recently built tables.
#[derive(Default)]
pub(super) struct Cached {
    last: Option<Last>,
    tables: Tables,
}

struct Last {
    name: Name,
    wanted: Arc<Service>,
    verdicts: Vec<BackendObservation>,
    steer: Option<Arc<RegionShares>>,
    excluded: Vec<Option<Excluded>>,
    next_hops: Vec<Option<NextHop>>,
    held: Option<Hashing>,
    output: Arc<ServiceOutput>,
}

impl Cached {
    /// Last status of the service.
    pub(super) fn status(&self) -> Option<&Arc<CompiledService>> {
        self.last.as_ref().map(|last| &last.output.status)
    }
}

/// Observations of a service's backends, from the sorted observations of all backends.
pub(super) fn observations<'a>(
    name: &Name,
    wanted: &Service,
    health: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a Health)>>,
    replicas: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a Readiness)>>,
    unreachable: &BTreeMap<IpAddr, String>,
) -> Vec<BackendObservation> {
    let health = values_of_service(name, wanted, health);
    let replicas = values_of_service(name, wanted, replicas);
    health
        .into_iter()
        .zip(replicas)
        .zip(wanted.backends.values())
        .map(|((health, ready), backend)| {
            let is_unreachable = unreachable.contains_key(&backend.address);
            BackendObservation { is_unreachable, ..BackendObservation::of(wanted, health, ready) }
        })
        .collect()
}

/// Values of a service's backends, in the order of its backends; missing values are the default. One pass over both,
/// since both are in name order.
fn values_of_service<'a, T: Copy + Default + 'a>(
    name: &Name,
    wanted: &Service,
    all: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a T)>>,
) -> Vec<T> {
    while all.next_if(|(id, _)| id.service < *name).is_some() {}
    wanted
        .backends
        .keys()
        .map(|backend| {
            while all.next_if(|(id, _)| id.service == *name && id.backend < *backend).is_some() {}
            let found = all.next_if(|(id, _)| id.service == *name && id.backend == *backend);
            found.map_or_else(T::default, |(_, &value)| value)
        })
        .collect()
}

/// Compiles a service, or returns the last output if the input has not changed.
pub(super) fn compile(
    input: &Input<'_>,
    memory: Option<&Arc<ServiceMemory>>,
    free: &mut FreeIndices,
    cached: &mut Cached,
) -> Result<Arc<ServiceOutput>, CompileError> {
    // The memory of the last output has an entry for each backend.
    let next_hops = |memory: &ServiceMemory| -> Vec<Option<NextHop>> {
        memory.backends.keys().map(|address| input.next_hops.get(address).copied()).collect()
    };
    if let Some(last) = &cached.last
        && memory.is_some_and(|m| Arc::ptr_eq(m, &last.output.memory))
        && last.output.next_change_ms.is_none_or(|at| input.now_ms < at)
        && last.verdicts == input.verdicts
        && last.steer == input.steer
        && last.excluded == input.excluded
        && last.next_hops == next_hops(&last.output.memory)
        && last.name == *input.name
        && last.held == input.held
        && last.output.missing_indices.is_none()
        && last.wanted == *input.wanted
    {
        return Ok(last.output.clone());
    }
    let output = Arc::new(compile_uncached(input, memory, free, &mut cached.tables)?);
    cached.last = Some(Last {
        name: input.name.clone(),
        wanted: input.wanted.clone(),
        verdicts: input.verdicts.clone(),
        steer: input.steer.clone(),
        excluded: input.excluded.clone(),
        next_hops: next_hops(&output.memory),
        held: input.held,
        output: output.clone(),
    });
    Ok(output)
}

/// Compiles a service without the cache.
fn compile_uncached(
    input: &Input<'_>,
    before: Option<&Arc<ServiceMemory>>,
    free: &mut FreeIndices,
    tables: &mut Tables,
) -> Result<ServiceOutput, CompileError> {
    let wanted = input.wanted;
    check_features(input.name, wanted, input.settings)?;
    let drain_ms = i64::from(wanted.drain_s) * 1_000;
    let mut memory = before.map(|m| (**m).clone()).unwrap_or_default();
    if before.is_none() {
        memory.index = free.take_service().ok_or_else(|| too_many("services", input, "--max-services"))?;
    }
    let missing_indices = allocate_indices(input, &mut memory, free);

    let held = hold_in(input, &mut memory);
    let rule = eligibility(input, &memory, &held.flags);
    let flags = (memory.settled, rule.panic);
    let start = slow::apply_slow_start(wanted, &mut memory, &rule.eligible, flags, input.now_ms);
    memory.settled = rule.settled;
    let weighted = weigh_regions(input, &mut memory, &rule, &start);
    let weights = (&weighted.weights[..], start.scale * weighted.scale);
    let hashing = input.held.unwrap_or_else(|| Hashing::wanted(wanted, &memory));
    let shape = build_shape(wanted, weights, &weighted.takes, hashing);
    let previous = record_epoch(&mut memory, &shape, input.now_ms, drain_ms, tables);

    let mut view = build_view(wanted, &shape, input.settings);
    if !rule.eligible.contains(&true) && input.excluded.contains(&Some(Excluded::Residency)) {
        view.flags |= flags::REFUSED_BY_RESIDENCY;
    }
    if wanted.when_all_down == WhenAllDown::Reset && !shape.members.iter().any(|m| m.eligible && m.weight > 0)
    {
        view.flags |= flags::REJECT;
    }
    // Flows recorded under a table of another hashing may fall on any slot now; and a scheduler that has placed flows
    // anywhere may have left them in any slot.
    let had_exceptions = memory.exceptions;
    memory.exceptions = view.flags & flags::TRACK_ALL != 0;
    let reshaped =
        previous.is_some_and(|p| !p.is_comparable(&shape)) || (had_exceptions && !memory.exceptions);
    let window_ms = input.now_ms - drain_ms;
    let built = (&shape, &weighted.groups[..]);
    let region = build_region(input, &mut memory, built, (window_ms, reshaped), tables, &mut view);

    let (backends, egress) = backend_entries(input, &memory, rule.panic, &held.flags);
    let longest = slot_layout::max_list_len(wanted);
    let room = (region.len() as u32 - view.list_count) + view.list_count.max(longest);
    let entry = ServiceEntry { view, table: Arc::new(region), room };
    memory.pairs = entry.pairs();
    let mut status =
        compile_status(input, &memory, &shape, (&rule, &start, &held.flags), &entry, &backends, drain_ms);
    status.exceptions = had_exceptions || memory.exceptions;
    let window_ends = memory.epochs.iter().skip(1).map(|e| e.from_ms + drain_ms).find(|&t| t > input.now_ms);
    let earlier_ends = memory.earlier_ms.map(|since| since + drain_ms).filter(|&t| t > input.now_ms);
    let next_change_ms = [window_ends, start.next_ms, earlier_ends, held.next_ms].into_iter().flatten().min();
    Ok(ServiceOutput {
        index: memory.index,
        entry,
        costs: costs(wanted, &memory, &weighted.weights),
        backends,
        egress,
        memory: Arc::new(memory),
        status: Arc::new(status),
        next_change_ms,
        missing_indices,
    })
}

/// Decides which backends are eligible.
fn eligibility(input: &Input<'_>, memory: &ServiceMemory, held: &[bool]) -> policy::Eligibility {
    let backends = input.wanted.backends.values().zip(&input.verdicts).enumerate();
    let candidates: Vec<_> = backends
        .map(|(i, (b, seen))| Candidate {
            weight: b.weight,
            state: b.state,
            health: if forwarding_problem(input, b.address).is_none() {
                seen.health
            } else {
                Health::Unhealthy
            },
            // The panic rule overrides neither residency nor a replica's own report.
            declines: seen.readiness.declines()
                || input.is_excluded(i)
                || !memory.backends.contains_key(&b.address),
            is_unreachable: seen.is_unreachable,
            is_held: held.get(i) == Some(&true) && forwarding_problem(input, b.address).is_none(),
        })
        .collect();
    policy::eligible(&candidates, memory.settled, input.wanted.panic_threshold())
}

/// Computes the weights of regions, zones and versions, and notes which backends are forbidden or stand by.
fn weigh_regions(
    input: &Input<'_>,
    memory: &mut ServiceMemory,
    rule: &policy::Eligibility,
    start: &slow::SlowStart,
) -> Weighted {
    let weights = (&start.weights[..], start.scale);
    let weighted =
        region_weights(input.wanted, &input.settings.here, input.steer.as_deref(), weights, &rule.eligible);
    let flags = weighted.takes.iter().zip(&rule.eligible).enumerate();
    for (b, (i, (&takes, &eligible))) in input.wanted.backends.values().zip(flags) {
        if let Some(known) = memory.backends.get_mut(&b.address) {
            known.forbidden = input.excluded.get(i) == Some(&Some(Excluded::Residency));
            known.stands_by = eligible && !takes;
        }
    }
    weighted
}

/// Starts the epoch of a shape, and updates when each slot last changed. Returns the previous shape.
fn record_epoch(
    memory: &mut ServiceMemory,
    shape: &Arc<Shape>,
    now_ms: i64,
    drain_ms: i64,
    tables: &mut Tables,
) -> Option<Arc<Shape>> {
    memory.forget_empty(shape);
    let previous = memory.epochs.last().map(|e| e.shape.clone());
    let is_new = memory.start_epoch(shape, now_ms, drain_ms);
    if shape.size as usize != memory.changed_ms.len() {
        memory.changed_ms = Arc::new(replay_changes(&memory.epochs, shape.size, tables));
    } else if is_new && let Some(previous) = &previous {
        let mut changed = (*memory.changed_ms).clone();
        if previous.is_comparable(shape) {
            mark_changes(previous, shape, now_ms, &mut changed, tables);
        } else {
            changed.fill(now_ms);
        }
        memory.changed_ms = Arc::new(changed);
    }
    previous
}

/// Cost of a flow in a service's loads: with replica reports, a request's share of the configured capacity.
fn load_unit(wanted: &Service) -> u32 {
    let Some(source) = &wanted.replica else { return FLOW };
    policy::load::request_cost(source.capacity.unwrap_or(policy::load::USUAL_CAPACITY))
}

/// Costs of a flow on each backend.
fn costs(wanted: &Service, memory: &ServiceMemory, region_weights: &[u32]) -> Vec<(u32, Cost)> {
    // Replicas of different sizes compare by shares of their capacity, which their reports contain.
    let source = match (wanted.scheduler, &wanted.replica) {
        (Scheduler::Lc, Some(_)) => source::CAPACITY_OR_FLOWS,
        (Scheduler::Lc, None) => source::FLOWS,
        (_, Some(_)) => {
            let cost = Cost { flow: FLOW, source: source::CAPACITY };
            return memory.backends.values().map(|b| (b.index, cost)).collect();
        }
        (_, None) => source::REPORTS,
    };
    // Least connections compares flows relative to each backend's share.
    let weights: Vec<u32> = match wanted.scheduler {
        Scheduler::Lc => region_weights.to_vec(),
        _ => wanted.backends.values().map(|b| b.weight).collect(),
    };
    let cost = |weight: u32| slot_layout::flow_cost(weight, weights.iter().copied());
    let by_address: HashMap<IpAddr, u32> =
        wanted.backends.values().zip(&weights).map(|(b, &weight)| (b.address, cost(weight))).collect();
    memory
        .backends
        .iter()
        .map(|(address, b)| {
            (b.index, Cost { flow: by_address.get(address).copied().unwrap_or(FLOW), source })
        })
        .collect()
}

fn too_many(what: &'static str, input: &Input<'_>, option: &'static str) -> CompileError {
    let limits = &input.settings.limits;
    let limit = u64::from(if what == "services" { limits.services } else { limits.backends });
    CompileError::TooMany { what, needed: limit + 1, limit, first: input.name.to_string(), option }
}

/// Gives each backend an index, and notes removed and returned backends. Returns an error if indices ran out.
fn allocate_indices(
    input: &Input<'_>,
    memory: &mut ServiceMemory,
    free: &mut FreeIndices,
) -> Option<CompileError> {
    let wanted: BTreeSet<IpAddr> = input.wanted.backends.values().map(|b| b.address).collect();
    for (address, backend) in &mut memory.backends {
        backend.removed_ms = match wanted.contains(address) {
            true => None,
            false => backend.removed_ms.or(Some(input.now_ms)),
        };
    }
    let mut error = None;
    for address in wanted {
        if let Entry::Vacant(place) = memory.backends.entry(address) {
            let Some(index) = free.take_backend() else {
                error.get_or_insert_with(|| too_many("backends", input, "--max-backends"));
                continue;
            };
            place.insert(BackendMemory {
                index,
                removed_ms: None,
                started_ms: None,
                stands_by: false,
                forbidden: false,
                ejected_ms: None,
            });
        }
    }
    error
}

/// Whether flows on a backend are lost. Verdicts are ignored under panic and by the ejection limit: otherwise flows placed now would count as stale.
pub(super) fn is_down(b: &model::Backend, seen: &BackendObservation, ignores_health: bool) -> bool {
    b.state == BackendState::Down
        || seen.readiness == Readiness::Failed
        || (seen.health == Health::Unhealthy && !ignores_health)
}

/// Entries of all backends with an index, and their egress interfaces.
fn backend_entries(
    input: &Input<'_>,
    memory: &ServiceMemory,
    panic: bool,
    held: &[bool],
) -> (Vec<(u32, Backend)>, BTreeSet<u32>) {
    let mut states: HashMap<IpAddr, u32> = HashMap::new();
    for (i, (b, seen)) in input.wanted.backends.values().zip(&input.verdicts).enumerate() {
        let mut state = match input.excluded.get(i).copied().flatten() {
            None => 0,
            Some(Excluded::RegionDrains) => DRAINING,
            Some(Excluded::Residency) => DRAINING | DOWN,
        };
        if b.state == BackendState::Draining || seen.readiness.declines() {
            state |= DRAINING;
        }
        if is_down(b, seen, panic || held.get(i) == Some(&true)) {
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
            if input.wanted.mode == ForwardingMode::Nat {
                // Answers leave by the interfaces on which the clients' packets arrive.
                egress.extend(input.settings.attached.keys());
            }
            let state = states.get(&address).copied().unwrap_or(DRAINING);
            let mut entry =
                map_values::backend_entry(address, input.wanted, memory.index, hop, state, input.settings);
            if backend.forbidden {
                // Ends all flows to the backend, including established ones.
                entry.mode = mode::FORBIDDEN;
            }
            (backend.index, entry)
        })
        .collect();
    (entries, egress)
}

fn build_view(wanted: &Service, shape: &Shape, settings: &DeploymentSettings) -> View {
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
    if map_values::has_second_chance_header(wanted, settings) {
        bits |= flags::SECOND_CHANCE;
    }
    if wanted.mode == ForwardingMode::Nat {
        bits |= flags::NAT;
    }
    let limits = wanted.limits();
    let (scheduler, more) = match wanted.scheduler {
        Scheduler::Maglev => (scheduler::MAGLEV, 0),
        Scheduler::P2c => (scheduler::P2C, flags::TRACK_ALL),
        Scheduler::Rr | Scheduler::Wrr => (scheduler::ROUND_ROBIN, flags::TRACK_ALL),
        Scheduler::Random => (scheduler::RANDOM, flags::TRACK_ALL),
        Scheduler::Lc => (scheduler::LEAST_CONN, flags::TRACK_ALL | flags::COUNT_FLOWS),
        Scheduler::SourceHash if wanted.load_cap.is_some() => (scheduler::BOUNDED_LOAD, flags::TRACK_ALL),
        Scheduler::SourceHash => (scheduler::MAGLEV, 0),
    };
    // The table's hash, which may be that of the previous scheduler while the service waits for room.
    let by_source = if shape.by_source { flags::HASH_SOURCE } else { 0 };
    View {
        seed: shape.seed,
        flags: bits | more | by_source | limits.flags,
        limits,
        scheduler,
        protocol: wanted.protocol.number(),
        udp_timeout_s: wanted.udp_timeout_s,
        tcp_timeout_s: wanted.tcp_timeout_s,
        slot_count: shape.size,
        load_cap: wanted.load_cap.map_or(0, |flows| flows.saturating_mul(load_unit(wanted))),
        record_factor: lb_common::rate_limit::record_factor(wanted.drain_s),
        ..View::default()
    }
}
