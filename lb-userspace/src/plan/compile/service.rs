//! One service: what it was compiled from, its memory, its backends' entries.
//!
//! Slots are `table`'s, who may take flows and how many are `spread`'s.

use super::{
    BackendMemory, CompileError, Cost, ServiceEntry, ServiceId, ServiceMemory, ServiceStatus, Settings,
    Shape, View, entries,
    memory::FreeIndices,
    slot_layout, slow,
    spread::{Excluded, steered},
    status::status,
    table::{Hashing, Tables, note_changes, region, replay, shape},
};
use crate::{
    desired::model::{
        self, BackendId, BackendState, ForwardingMode, Health, Name, NextHop, OnDown, Protocol, Readiness,
        RegionShares, Scheduler, Service, region_list,
    },
    plan::policy::{self, Candidate, Seen},
};
use lb_common::{
    Backend,
    backend::{
        flags::{DOWN, DRAINING},
        mode,
    },
    load::{FLOW, source},
    service::{flags, scheduler},
    settings::features,
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
    pub verdicts: Vec<Seen>,
    /// How it is spread over regions and versions; none if all backends are alike.
    pub steer: Option<Arc<RegionShares>>,
    /// Why a backend may take no flow at all; empty if none is excluded.
    pub excluded: Vec<Option<Excluded>>,
    pub next_hops: &'a BTreeMap<IpAddr, NextHop>,
    /// Names of interfaces.
    pub links: &'a BTreeMap<u32, String>,
    pub now_ms: i64,
    pub settings: &'a Settings,
    /// The size, seed and hash that it keeps, because there is no room for a change of them.
    pub held: Option<Hashing>,
}

/// What comes of it.
pub(super) struct Output {
    pub index: u32,
    pub entry: ServiceEntry,
    pub backends: Vec<(u32, Backend)>,
    pub costs: Vec<(u32, Cost)>,
    pub egress: BTreeSet<u32>,
    pub memory: Arc<ServiceMemory>,
    pub status: Arc<ServiceStatus>,
    pub next_change_ms: Option<i64>,
    /// Backends without an index take no flows: there is none left.
    pub lack: Option<CompileError>,
}

/// The last output and its input, and the tables made lately.
#[derive(Default)]
pub(super) struct Cached {
    last: Option<Last>,
    tables: Tables,
}

struct Last {
    name: Name,
    wanted: Arc<Service>,
    verdicts: Vec<Seen>,
    steer: Option<Arc<RegionShares>>,
    excluded: Vec<Option<Excluded>>,
    next_hops: Vec<Option<NextHop>>,
    held: Option<Hashing>,
    output: Arc<Output>,
}

impl Cached {
    /// What was last told about the service.
    pub(super) fn status(&self) -> Option<&Arc<ServiceStatus>> {
        self.last.as_ref().map(|last| &last.output.status)
    }
}

/// What is known of a service's backends, from the sorted observations of all.
pub(super) fn seen<'a>(
    name: &Name,
    wanted: &Service,
    health: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a Health)>>,
    replicas: &mut Peekable<impl Iterator<Item = (&'a BackendId, &'a Readiness)>>,
) -> Vec<Seen> {
    let health = of_service(name, wanted, health);
    let replicas = of_service(name, wanted, replicas);
    health.into_iter().zip(replicas).map(|(health, ready)| Seen::of(wanted, health, ready)).collect()
}

/// A service's part of something known by backend, in the order of its backends; what is missing is the
/// default. One pass over both, as both are in name order.
fn of_service<'a, T: Copy + Default + 'a>(
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
        && last.steer == input.steer
        && last.excluded == input.excluded
        && last.next_hops == next_hops(&last.output.memory)
        && last.name == *input.name
        && last.held == input.held
        && last.output.lack.is_none()
        && last.wanted == *input.wanted
    {
        return Ok(last.output.clone());
    }
    let output = Arc::new(compile_anew(input, memory, free, &mut cached.tables)?);
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

fn compile_anew(
    input: &Input<'_>,
    before: Option<&Arc<ServiceMemory>>,
    free: &mut FreeIndices,
    tables: &mut Tables,
) -> Result<Output, CompileError> {
    let wanted = input.wanted;
    check_features(input.name, wanted, input.settings)?;
    let drain_ms = i64::from(wanted.drain_s) * 1_000;
    let mut memory = before.map(|m| (**m).clone()).unwrap_or_default();
    if before.is_none() {
        memory.index = free.service().ok_or_else(|| too_many("services", input, "--max-services"))?;
    }
    let lack = allocate(input, &mut memory, free);

    let candidates: Vec<_> = wanted
        .backends
        .values()
        .zip(&input.verdicts)
        .enumerate()
        .map(|(i, (b, seen))| Candidate {
            weight: b.weight,
            state: b.state,
            health: if problem(input, b.address).is_none() { seen.health } else { Health::Unhealthy },
            // The panic rule goes no more over residency than over a replica's own word.
            declines: seen.readiness.declines()
                || input.is_excluded(i)
                || !memory.backends.contains_key(&b.address),
        })
        .collect();
    let rule = policy::eligible(&candidates, memory.settled, wanted.panic_percent);
    let slowly = (memory.settled, rule.panic);
    let start = slow::start(wanted, &mut memory, &rule.eligible, slowly, input.now_ms);
    memory.settled = rule.settled;

    let steered = steered(
        wanted,
        &input.settings.here,
        input.steer.as_deref(),
        (&start.weights, start.scale),
        &rule.eligible,
    );
    let who = steered.takes.iter().zip(&rule.eligible).enumerate();
    for (b, (i, (&takes, &eligible))) in wanted.backends.values().zip(who) {
        if let Some(known) = memory.backends.get_mut(&b.address) {
            known.forbidden = input.excluded.get(i) == Some(&Some(Excluded::Residency));
            known.stands_by = eligible && !takes;
        }
    }
    let weights = (&steered.weights[..], start.scale * steered.scale);
    let hashing = input.held.unwrap_or_else(|| Hashing::wanted(wanted, &memory));
    let shape = shape(wanted, weights, &steered.takes, hashing);
    memory.forget_empty(&shape);
    let previous = memory.epochs.last().map(|e| e.shape.clone());
    let is_new = memory.enter(&shape, input.now_ms, drain_ms);
    if shape.size as usize != memory.changed_ms.len() {
        memory.changed_ms = Arc::new(replay(&memory.epochs, shape.size, tables));
    } else if is_new && let Some(previous) = &previous {
        let mut changed = (*memory.changed_ms).clone();
        if previous.comparable(&shape) {
            note_changes(previous, &shape, input.now_ms, &mut changed, tables);
        } else {
            changed.fill(input.now_ms);
        }
        memory.changed_ms = Arc::new(changed);
    }
    let mut view = view(wanted, &shape, input.settings);
    if !rule.eligible.contains(&true) && input.excluded.contains(&Some(Excluded::Residency)) {
        view.flags |= flags::REFUSED_BY_RESIDENCY;
    }
    // A table of another kind says nothing about where flows recorded under it fall now; and a scheduler that has
    // placed flows anywhere may have left them in any slot.
    let had_exceptions = memory.exceptions;
    memory.exceptions = view.flags & flags::TRACK_ALL != 0;
    let reshaped = previous.is_some_and(|p| !p.comparable(&shape)) || (had_exceptions && !memory.exceptions);
    let region = region(input, &mut memory, &shape, input.now_ms - drain_ms, reshaped, tables, &mut view);

    let (backends, egress) = backend_entries(input, &memory, rule.panic);
    let room = (region.len() as u32 - view.list_count) + view.list_count.max(slot_layout::longest(wanted));
    let entry = ServiceEntry { view, table: Arc::new(region), room };
    let mut status = status(input, &memory, &shape, (&rule, &start), &entry, &backends, drain_ms);
    status.exceptions = had_exceptions || memory.exceptions;
    let window_ends = memory.epochs.iter().skip(1).map(|e| e.from_ms + drain_ms).find(|&t| t > input.now_ms);
    let next_change_ms = [window_ends, start.next_ms].into_iter().flatten().min();
    Ok(Output {
        index: memory.index,
        entry,
        costs: costs(wanted, &memory, &steered.weights),
        backends,
        egress,
        memory: Arc::new(memory),
        status: Arc::new(status),
        next_change_ms,
        lack,
    })
}

impl Input<'_> {
    pub(super) fn is_excluded(&self, backend: usize) -> bool {
        self.excluded.get(backend).is_some_and(Option::is_some)
    }

    /// Why a backend is excluded, for people.
    pub(super) fn why_excluded(&self, backend: usize, b: &model::Backend) -> Option<String> {
        let region = b.region.as_ref().unwrap_or(&self.settings.here.region);
        let allowed = self.wanted.regions.iter().flat_map(|rules| rules.allowed.iter().flatten());
        match (*self.excluded.get(backend)?)? {
            Excluded::Residency if b.region.is_none() => {
                Some(format!("residency: only {}, and it does not say where it is", region_list(allowed)))
            }
            Excluded::Residency => Some(format!("residency: only {}, not {region}", region_list(allowed))),
            Excluded::Drains => Some(format!("region {region} drains")),
        }
    }
}

/// Refuses what the loaded program cannot do.
pub(super) fn check_features(name: &Name, wanted: &Service, settings: &Settings) -> Result<(), CompileError> {
    for (bit, what) in program_needs(wanted) {
        if settings.features_off & bit != 0 {
            let feature = features::NAMES.iter().find(|(_, b)| *b == bit).map_or("?", |(name, _)| name);
            return Err(CompileError::FeatureOff { service: name.clone(), what, feature });
        }
    }
    Ok(())
}

/// Features that a service cannot be served without, each with the setting that needs it.
pub fn features_needed(wanted: &Service) -> Vec<(u32, String)> {
    let mut needs = program_needs(wanted);
    if !wanted.quic.is_empty() {
        needs.push((features::QUIC, "quic".to_owned()));
    }
    needs
}

/// Those of [`features_needed`] that a state is refused for where lbd was started without them.
fn program_needs(wanted: &Service) -> Vec<(u32, String)> {
    let needs = [
        (features::NAT, wanted.mode == ForwardingMode::Nat, "mode nat".to_owned()),
        (features::L2, wanted.mode == ForwardingMode::L2, "mode l2".to_owned()),
        (features::LOCAL, wanted.mode == ForwardingMode::Local, "mode local".to_owned()),
        (features::P2C, wanted.scheduler != Scheduler::Maglev, format!("scheduler {:?}", wanted.scheduler)),
        (features::RATE, wanted.limits().flags != 0, "a limit of new flows".to_owned()),
        // What is on by itself only does without.
        (features::SECOND_CHANCE, wanted.second_chance == Some(true), "second_chance".to_owned()),
    ];
    let needed = needs.into_iter().filter(|(_, is_needed, _)| *is_needed);
    needed.map(|(bit, _, what)| (bit, what.to_lowercase())).collect()
}

/// What a flow counts in a service's loads: where replicas report, a request's share of the capacity that the service
/// names.
fn unit_of_load(wanted: &Service) -> u32 {
    let Some(source) = &wanted.replica else { return FLOW };
    policy::load::request_cost(source.capacity.unwrap_or(policy::load::USUAL_CAPACITY))
}

/// How each backend's load is counted.
fn costs(wanted: &Service, memory: &ServiceMemory, steered: &[u32]) -> Vec<(u32, Cost)> {
    let source = match wanted.scheduler {
        Scheduler::Lc => source::FLOWS,
        // Replicas of different sizes compare by shares of their capacity, which their reports know.
        _ if wanted.replica.is_some() => {
            let cost = Cost { flow: 0, source: source::CAPACITY };
            return memory.backends.values().map(|b| (b.index, cost)).collect();
        }
        _ => source::REPORTS,
    };
    // The fewest flows for its share, where that is what the scheduler goes by.
    let weights: Vec<u32> = match wanted.scheduler {
        Scheduler::Lc => steered.to_vec(),
        _ => wanted.backends.values().map(|b| b.weight).collect(),
    };
    let cost = |weight: u32| slot_layout::cost(weight, weights.iter().copied());
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

/// Why packets cannot reach a backend in the service's forwarding mode, as far as routes tell.
pub(super) fn problem(input: &Input<'_>, address: IpAddr) -> Option<String> {
    let hop = input.next_hops.get(&address)?;
    match input.wanted.mode {
        ForwardingMode::L2 if hop.is_routed => Some(format!(
            "mode l2 needs workers on this host's own segment, and {address} is behind a router: \
             use ipip, gue or nat, or put the worker on the segment"
        )),
        ForwardingMode::Nat if !input.settings.attached.contains_key(&hop.ifindex) => Some(format!(
            "mode nat needs the answers of {address}, which come in by interface {}, where lbd is not attached: \
             start it with --iface for that one too",
            input.links.get(&hop.ifindex).cloned().unwrap_or_else(|| format!("with index {}", hop.ifindex))
        )),
        _ => None,
    }
}

/// Gives each backend an index, and notes which are gone and which are back; what there was no index for.
fn allocate(input: &Input<'_>, memory: &mut ServiceMemory, free: &mut FreeIndices) -> Option<CompileError> {
    let wanted: BTreeSet<IpAddr> = input.wanted.backends.values().map(|b| b.address).collect();
    for (address, backend) in &mut memory.backends {
        backend.removed_ms = match wanted.contains(address) {
            true => None,
            false => backend.removed_ms.or(Some(input.now_ms)),
        };
    }
    let mut lack = None;
    for address in wanted {
        if let Entry::Vacant(place) = memory.backends.entry(address) {
            let Some(index) = free.backend() else {
                lack.get_or_insert_with(|| too_many("backends", input, "--max-backends"));
                continue;
            };
            place.insert(BackendMemory {
                index,
                removed_ms: None,
                started_ms: None,
                stands_by: false,
                forbidden: false,
            });
        }
    }
    lack
}

/// Entries of all backends that still have an index, and the interfaces they leave by.
fn backend_entries(
    input: &Input<'_>,
    memory: &ServiceMemory,
    panic: bool,
) -> (Vec<(u32, Backend)>, BTreeSet<u32>) {
    let mut states: HashMap<IpAddr, u32> = HashMap::new();
    for (i, (b, seen)) in input.wanted.backends.values().zip(&input.verdicts).enumerate() {
        let mut state = match input.excluded.get(i).copied().flatten() {
            None => 0,
            Some(Excluded::Drains) => DRAINING,
            Some(Excluded::Residency) => DRAINING | DOWN,
        };
        if b.state == BackendState::Draining || seen.readiness.declines() {
            state |= DRAINING;
        }
        // Under panic the verdicts are ignored, or flows placed now would be taken for stale ones.
        let down = seen.readiness == Readiness::Failed || (seen.health == Health::Unhealthy && !panic);
        if b.state == BackendState::Down || down {
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
                // Answers leave where the clients' packets come in.
                egress.extend(input.settings.attached.keys());
            }
            let state = states.get(&address).copied().unwrap_or(DRAINING);
            let mut entry = entries::backend(address, input.wanted, memory.index, hop, state, input.settings);
            if backend.forbidden {
                // Flows that had been established there, or are held there by anything at all, end here.
                entry.mode = mode::FORBIDDEN;
            }
            (backend.index, entry)
        })
        .collect();
    (entries, egress)
}

fn view(wanted: &Service, shape: &Shape, settings: &Settings) -> View {
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
    if entries::has_chain(wanted, settings) {
        bits |= flags::SECOND_CHANCE;
    }
    if wanted.mode == ForwardingMode::Nat {
        bits |= flags::NAT;
    }
    let limits = wanted.limits();
    let (scheduler, more) = match wanted.scheduler {
        Scheduler::Maglev => (scheduler::MAGLEV, 0),
        Scheduler::P2c => (scheduler::P2C, flags::TRACK_ALL),
        Scheduler::Rr | Scheduler::Wrr => (scheduler::TURNS, flags::TRACK_ALL),
        Scheduler::Random => (scheduler::RANDOM, flags::TRACK_ALL),
        Scheduler::Lc => (scheduler::LEAST, flags::TRACK_ALL | flags::COUNT_FLOWS),
        Scheduler::SourceHash if wanted.load_cap.is_some() => (scheduler::CAPPED, flags::TRACK_ALL),
        Scheduler::SourceHash => (scheduler::MAGLEV, 0),
    };
    // The table's, which may be that of another scheduler while the service waits for room.
    let by_source = if shape.by_source { flags::HASH_SOURCE } else { 0 };
    View {
        seed: shape.seed,
        flags: bits | more | by_source | limits.flags,
        limits,
        scheduler,
        protocol: wanted.protocol.number(),
        udp_timeout_s: wanted.udp_timeout_s,
        slot_count: shape.size,
        load_cap: wanted.load_cap.map_or(0, |flows| flows.saturating_mul(unit_of_load(wanted))),
        ..View::default()
    }
}
